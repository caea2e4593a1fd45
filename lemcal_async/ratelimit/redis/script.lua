-- The budget of one key, shared by all processes. Each call reports everything that the calling process holds
-- and knows, and grants slots. KEYS: the budget; the marker that all budgets share. ARGV[1] and the reply are
-- JSON, with times in seconds. Requests and replies contain durations and moments of this clock only, so the
-- clocks of different machines are never compared.
local request = cjson.decode(ARGV[1])

local function load(key)
  local ok, value = pcall(cmsgpack.unpack, redis.pcall('GET', key))
  return ok and type(value) == 'table' and value or nil -- foreign data counts as lost data
end

local function save(key, value, ttl)
  redis.call('SET', key, cmsgpack.pack(value), 'PX', string.format('%.0f', ttl * 1000))
end

-- Detect lost data. Each process reports how often the script had run as of its last reply. If the marker shows
-- fewer runs, or a budget exists without a marker, Redis lost data, and what was sent is unknown. It is also
-- unknown after an outage in which processes continued without Redis. In either case, sending is on hold until
-- every process has reported what it holds.
local marker, budget = load(KEYS[2]), load(KEYS[1])
local lost = request.runs > (marker and marker.runs or 0) or (budget and not marker)
if not marker then
  marker, budget = {runs = 0, now = 1, offset = 0, hold_until = 0}, nil -- now = 1: before any real time
end

-- The clock. If the system clock steps back, time continues from the last known moment: no slot frees up early,
-- and nothing waits for the system clock to catch up.
local time = redis.call('TIME')
local now = time[1] - 1.79e9 + time[2] / 1e6 + marker.offset -- small enough for microseconds in JSON
if now < marker.now then
  marker.offset = marker.offset + marker.now - now
  now = marker.now
end
if lost or (request.recovering and now - marker.now > request.reuse_after) then
  marker.hold_until = now + request.hold
end
marker.now, marker.runs = now, math.max(marker.runs, request.runs) + 1
save(KEYS[2], marker, 86400)
if not budget then -- a new key, unless this process has seen its budget before
  budget = {processes = {}, caps = {}, refused_until = 0, limit = 0, foreign = 0, foreign_until = 0}
  budget.paused_until, budget.trial_until = request.known and now + request.hold or 0, 0
end

-- The slots of this process: when each was granted, and when it frees up. Until the response arrives, a slot is
-- open (false): only the response proves that the server has counted the request.
local process = budget.processes[request.process] or {sequence = 0, served_at = 0, demand = 0}
if request.sequence <= process.sequence then
  return false -- executed late: a newer request was processed already, and nobody waits for this reply
end
budget.processes[request.process] = process
process.sequence, process.seen, process.slots = request.sequence, now, request.slots
process.claim_by = 0
for _, slot in ipairs(process.slots) do
  slot[2] = slot[2] and now + slot[2]
end

-- All slots, and when they free up. Open ones do when their process has not reported for too long.
local slots, processes = {}, 0
for name, other in pairs(budget.processes) do
  local last = math.max(other.seen, other.claim_by)
  other.recent = 0 -- grants in the last period
  for _, slot in ipairs(other.slots) do
    local free = slot[2] or other.seen + request.slot_ttl
    slots[#slots + 1] = {granted = slot[1], open = not slot[2], free = free, uncapped = free, of = other}
    last = math.max(last, free)
    other.recent = other.recent + (slot[1] > now - request.reuse_after and 1 or 0)
  end
  if last + request.slot_ttl < now then
    budget.processes[name] = nil
  else
    processes = processes + 1
  end
end

-- Apply the server's counts. A count says: of the requests granted before `at`, the server had counted `count`
-- by then, and it forgets the first of them at `ends`. A count above our own requests reveals foreign use of
-- the key. A count below them means that up to `uncounted` requests had not been counted yet, without saying
-- which ones. So a period later, at most that many still occupy slots, however late their own responses are;
-- those responses reveal when they were counted, which can lower the cap. Counts are applied in the order of
-- `at`, because what the earlier ones reveal applies to the later ones.
local counts, caps, foreign = budget.caps, {}, 0
for _, new in ipairs(request.counts) do
  counts[#counts + 1] = {
    at = now - new.age, ends = new.granted + new.rest, count = new.count, valid_until = now + new.valid_for,
  }
end
table.sort(counts, function(a, b) return a.at < b.at end)
for _, cap in ipairs(counts) do
  local members, occupied, uncounted = {}, 0, -cap.count
  for _, slot in ipairs(slots) do
    if slot.granted < cap.at then
      local unknown = slot.open and slot.free == slot.uncapped
      uncounted = uncounted + ((unknown or slot.free > cap.ends) and 1 or 0)
      occupied = occupied + (slot.uncapped > now and 1 or 0)
      members[#members + 1] = slot.granted > 0 and slot or nil -- 0: granted without Redis, time unknown
    end
  end
  local known = budget.foreign_until > now and budget.foreign or 0
  if now >= cap.ends + request.slot_ttl then -- some of the slots are no longer reported
    uncounted = cap.uncounted or -1
  elseif cap.uncounted then
    uncounted = math.max(0, math.min(cap.uncounted, uncounted))
  elseif uncounted + known < 0 and cap.valid_until > now then
    foreign = foreign - uncounted - known
    budget.foreign, budget.foreign_until = -uncounted, cap.valid_until
  elseif known > 0 then
    uncounted = -1
  end
  if uncounted >= 0 and occupied > uncounted then -- otherwise the cap has no effect any more
    cap.uncounted = uncounted
    caps[#caps + 1] = cap
    table.sort(members, function(a, b) return a.free > b.free end)
    for i = uncounted + 1, #members do
      members[i].free = math.min(members[i].free, cap.at + request.reuse_after)
    end
  end
end
budget.caps = caps
if request.pause > 0 then
  local refused_until = budget.paused_until > now and budget.refused_until or 0
  budget.paused_until = math.max(budget.paused_until, now + request.pause)
  budget.refused_until = math.max(refused_until, request.refuse > 0 and now + request.refuse or 0)
  budget.trial_until, budget.trial = budget.paused_until + request.reuse_after, nil
end

-- After a 429 the key is on trial, for a period at most: one trial request must pass before anything else is
-- granted. It is identified by the moment of its grant, which JSON has rounded.
local trial = budget.trial and budget.trial - 1e-5
if trial and request.last_passed >= trial then
  budget.trial_until, budget.trial, trial = 0, nil, nil
end
local on_trial, trial_pending = budget.trial_until > now, false
for _, slot in ipairs(slots) do
  trial_pending = trial_pending or (on_trial and trial and slot.open and slot.granted >= trial)
end
budget.limit = request.header_limit > 0 and request.header_limit or budget.limit
local limit = budget.limit > 0 and math.min(budget.limit, request.limit) or request.limit

-- Seconds until each occupied slot frees up, at the earliest. An open slot frees up a period after its grant; if
-- that has passed already, poll again soon. `own` is the first one of this process.
local free_in, own = {}, math.huge
for _, slot in ipairs(slots) do
  if slot.free > now then
    local soonest = slot.open and math.max(slot.granted + request.reuse_after, now + request.reuse_after / 8)
    local left = math.min(slot.free, soonest or slot.free) - now
    free_in[#free_in + 1] = left
    own = slot.of == process and math.min(own, left) or own
  end
end
for _ = 1, budget.foreign_until > now and budget.foreign or 0 do
  free_in[#free_in + 1] = budget.foreign_until - now
end
table.sort(free_in)

-- Distribute the free slots. Each goes to the waiting process with the fewest grants in the last period, then to
-- the one served longest ago. Slots of another process stay reserved until it is overdue to claim them.
process.demand, process.claim_by = request.waiting, now
local other_demands, next_claim, queue = {}, math.huge, {}
for name, other in pairs(budget.processes) do
  if other.claim_by >= now and other.demand > 0 then
    queue[#queue + 1] = {of = other, recent = other.recent, demand = other.demand, name = name}
    if other ~= process then
      other_demands[#other_demands + 1] = other.demand
      next_claim = math.min(next_claim, other.claim_by - now)
    end
  end
end
local function rank(entry)
  return string.format('%05d %017.6f %s', entry.recent, entry.of.served_at, entry.name)
end
local free, paused = limit - #free_in, math.max(budget.paused_until, marker.hold_until, now) - now
free = on_trial and math.min(free, trial_pending and 0 or 1) or free
local granted, reserved = 0, 0
for _ = 1, paused == 0 and request.waiting > 0 and free or 0 do
  local first
  for _, entry in ipairs(queue) do
    first = entry.demand > 0 and (not first or rank(entry) < rank(first)) and entry or first
  end
  if first then
    first.recent, first.demand = first.recent + 1, first.demand - 1
    granted, reserved = granted + (first.of == process and 1 or 0), reserved + (first.of == process and 0 or 1)
  end
end
granted = math.max(granted, paused == 0 and math.min(request.refused, free) or 0) -- refused requests go first
process.served_at = granted > 0 and now or process.served_at
if on_trial and granted > 0 then
  budget.trial, trial_pending = now, true
end
for _ = 1, granted do
  process.slots[#process.slots + 1] = {now, false}
  free_in[#free_in + 1] = request.reuse_after
end

-- When to ask again: as soon as a slot frees up, including those right after it. A process that has its share
-- waits for one of its own slots.
local wait = paused
if paused == 0 then
  local first = process.recent + granted < limit / (#other_demands + 1) and free_in[1] or own
  wait = request.reuse_after
  for _, left in ipairs(free_in) do
    wait = left <= first + request.coalesce_within and left or wait
  end
  wait = math.min(wait, reserved > 0 and next_claim or wait, trial_pending and request.reuse_after / 8 or wait)
  wait = math.max(wait, 0.001)
end
process.demand, process.claim_by = request.waiting - granted, now + wait + request.grace

local ttl = math.max(request.slot_ttl, wait, budget.foreign_until - now, budget.trial_until - now)
save(KEYS[1], budget, ttl + 1)
return cjson.encode({
  runs = marker.runs, now = now,
  granted = granted, wait = wait, paused = paused, on_trial = on_trial,
  refused = budget.paused_until > now and math.max(0, budget.refused_until - now) or 0,
  limit = limit, free_in = free_in, other_demands = other_demands, processes = processes,
  expected = #free_in + reserved, foreign = foreign,
})
