-- The budget of one key, shared by all processes. A process restates what it holds and tells what it knows,
-- and gets slots. KEYS: the budget, and the marker of all budgets. ARGV[1] and the reply: JSON, times in seconds.
-- No two machines' clocks are compared: what comes in and goes out are durations, and moments of this clock.
local request = cjson.decode(ARGV[1])

local function load(key)
  local fine, value = pcall(cmsgpack.unpack, redis.pcall('GET', key))
  return fine and type(value) == 'table' and value or nil -- what is not ours counts as lost
end

local function save(key, value, seconds)
  redis.call('SET', key, cmsgpack.pack(value), 'PX', string.format('%.0f', seconds * 1000))
end

-- Every process knows how often the script had run when it last heard of it. If it has run less often than
-- that, or the marker is gone and a budget is not, data was lost, and nobody knows what was sent. Nor does
-- anybody after an outage in which processes went on alone. So nobody sends until all have restated what
-- they hold.
local marker, budget = load(KEYS[2]), load(KEYS[1])
local lost = request.count > (marker and marker.count or 0) or (budget and not marker)
if not marker then
  marker, budget = {count = 0, seen = 1, offset = 0, held = 0}, nil -- seen: no moment is 0
end

-- The clock. When the server's steps back, time goes on from where it was: no slot comes free early, and
-- nobody waits for the clock to catch up.
local time = redis.call('TIME')
local now = time[1] - 1.79e9 + time[2] / 1e6 + marker.offset -- so small that JSON has digits for microseconds
if now < marker.seen then
  marker.offset = marker.offset + marker.seen - now
  now = marker.seen
end
if lost or (request.back and now - marker.seen > request.turnover) then
  marker.held = now + request.hold
end
marker.seen, marker.count = now, math.max(marker.count, request.count) + 1
save(KEYS[2], marker, 86400)
if not budget then -- a first use, unless this process knows better
  budget = {processes = {}, caps = {}, refused = 0, limit = 0, foreign = 0, foreign_until = 0}
  budget.paused, budget.look_until = request.known and now + request.hold or 0, 0
end

-- What this process holds: when each slot was granted, and in how long it comes free, false while it is open:
-- until the answer, because only that proves that the server has counted the request.
local process = budget.processes[request.process] or {sequence = 0, served = 0, want = 0}
if request.sequence <= process.sequence then
  return false -- carried out late: nobody waits for it, and a newer request was heard
end
budget.processes[request.process] = process
process.sequence, process.seen, process.slots = request.sequence, now, request.slots
process.due = 0
for _, slot in ipairs(process.slots) do
  slot[2] = slot[2] and now + slot[2]
end

-- All slots, and when they come free; open ones when their process is not heard of any more.
local slots, processes = {}, 0
for name, other in pairs(budget.processes) do
  local last = math.max(other.seen, other.due)
  other.had = 0 -- in the last period
  for _, slot in ipairs(other.slots) do
    local free = slot[2] or other.seen + request.lifetime
    slots[#slots + 1] = {granted = slot[1], open = not slot[2], free = free, surely = free, of = other}
    last = math.max(last, free)
    other.had = other.had + (slot[1] > now - request.turnover and 1 or 0)
  end
  if last + request.lifetime < now then
    budget.processes[name] = nil
  else
    processes = processes + 1
  end
end

-- What answers said: of the requests granted before `at`, the server had counted `count` by then, and forgets
-- the first of them at `ends`. More than can be ours is somebody else's use of the key. What is missing was not
-- counted: at most `late` requests, nobody knows which. So a period later only so many of them can take a slot,
-- however late their own answers are. Those answers tell when they were counted, which may lower that.
-- One after the other in the order of `at`: what is known of the first ones holds for the later ones, too.
local said, caps, foreign = budget.caps, {}, 0
for _, told in ipairs(request.told) do
  said[#said + 1] = {
    at = now - told.age, ends = told.granted + told.rest, count = told.count, counts_until = now + told.window,
  }
end
table.sort(said, function(a, b) return a.at < b.at end)
for _, cap in ipairs(said) do
  local members, busy, late = {}, 0, -cap.count
  for _, slot in ipairs(slots) do
    if slot.granted < cap.at then
      local unknown = slot.open and slot.free == slot.surely
      late = late + ((unknown or slot.free > cap.ends) and 1 or 0)
      busy = busy + (slot.surely > now and 1 or 0)
      members[#members + 1] = slot.granted > 0 and slot or nil -- 0: without Redis, nobody knows when
    end
  end
  local known = budget.foreign_until > now and budget.foreign or 0
  if now >= cap.ends + request.lifetime then -- not all of them are restated any more
    late = cap.late or -1
  elseif cap.late then
    late = math.max(0, math.min(cap.late, late))
  elseif late + known < 0 and cap.counts_until > now then
    foreign = foreign - late - known
    budget.foreign, budget.foreign_until = -late, cap.counts_until
  elseif known > 0 then
    late = -1
  end
  if late >= 0 and busy > late then -- else it matters no more
    cap.late = late
    caps[#caps + 1] = cap
    table.sort(members, function(a, b) return a.free > b.free end)
    for i = late + 1, #members do
      members[i].free = math.min(members[i].free, cap.at + request.turnover)
    end
  end
end
budget.caps = caps
if request.pause > 0 then
  local refused = budget.paused > now and budget.refused or 0
  budget.paused = math.max(budget.paused, now + request.pause)
  budget.refused = math.max(refused, request.refuse > 0 and now + request.refuse or 0)
  budget.look_until, budget.scout = budget.paused + request.turnover, nil
end

-- After a 429, one request looks whether the server lets it pass before the others follow; for a period at most.
-- Nothing else is granted while it is out. It is told by the moment of its grant, which JSON has rounded.
local scout = budget.scout and budget.scout - 1e-5
if scout and request.passed >= scout then
  budget.look_until, budget.scout, scout = 0, nil, nil
end
local looking, is_out = budget.look_until > now, false
for _, slot in ipairs(slots) do
  is_out = is_out or (looking and scout and slot.open and slot.granted >= scout)
end
budget.limit = request.header_limit > 0 and request.header_limit or budget.limit
local limit = budget.limit > 0 and math.min(budget.limit, request.limit) or request.limit

-- In how long each slot in use comes free, at the earliest. An open one does a period after its grant; if
-- that has passed already, it is time to look again soon. `mine` is when the first one of this process does.
local frees, mine = {}, math.huge
for _, slot in ipairs(slots) do
  if slot.free > now then
    local soonest = slot.open and math.max(slot.granted + request.turnover, now + request.turnover / 8)
    local left = math.min(slot.free, soonest or slot.free) - now
    frees[#frees + 1] = left
    mine = slot.of == process and math.min(mine, left) or mine
  end
end
for _ = 1, budget.foreign_until > now and budget.foreign or 0 do
  frees[#frees + 1] = budget.foreign_until - now
end
table.sort(frees)

-- Each free slot goes to the process that waits and had fewest in the last period, then to the one served
-- longest ago. What falls to another one is kept for it until that is overdue.
process.want, process.due = request.waiting, now
local wants, overdue, line = {}, math.huge, {}
for name, other in pairs(budget.processes) do
  if other.due >= now and other.want > 0 then
    line[#line + 1] = {of = other, had = other.had, want = other.want, name = name}
    if other ~= process then
      wants[#wants + 1], overdue = other.want, math.min(overdue, other.due - now)
    end
  end
end
local function rank(one)
  return string.format('%05d %017.6f %s', one.had, one.of.served, one.name)
end
local free, blocked = limit - #frees, math.max(budget.paused, marker.held, now) - now
free = looking and math.min(free, is_out and 0 or 1) or free
local granted, kept = 0, 0
for _ = 1, blocked == 0 and request.waiting > 0 and free or 0 do
  local first
  for _, one in ipairs(line) do
    first = one.want > 0 and (not first or rank(one) < rank(first)) and one or first
  end
  if first then
    first.had, first.want = first.had + 1, first.want - 1
    granted, kept = granted + (first.of == process and 1 or 0), kept + (first.of == process and 0 or 1)
  end
end
granted = math.max(granted, blocked == 0 and math.min(request.refused, free) or 0) -- refused ones go first
process.served = granted > 0 and now or process.served
if looking and granted > 0 then
  budget.scout, is_out = now, true
end
for _ = 1, granted do
  process.slots[#process.slots + 1] = {now, false}
  frees[#frees + 1] = request.turnover
end

-- When to ask again: as soon as a slot comes free, with those right after it; a process that has its share
-- waits for its own.
local wait = blocked
if blocked == 0 then
  local first = process.had + granted < limit / (#wants + 1) and frees[1] or mine
  wait = request.turnover
  for _, left in ipairs(frees) do
    wait = left <= first + request.together and left or wait
  end
  wait = math.max(math.min(wait, kept > 0 and overdue or wait, is_out and request.turnover / 8 or wait), 0.001)
end
process.want, process.due = request.waiting - granted, now + wait + request.grace

local lasts = math.max(request.lifetime, wait, budget.foreign_until - now, budget.look_until - now)
save(KEYS[1], budget, lasts + 1)
return cjson.encode({
  count = marker.count, now = now,
  granted = granted, wait = wait, paused = blocked, looking = looking,
  refused = budget.paused > now and math.max(0, budget.refused - now) or 0, limit = limit, frees = frees,
  others = wants, processes = processes, expected = #frees + kept, foreign = foreign,
})
