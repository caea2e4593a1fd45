-- The budget of one key, shared by all processes. A process restates what it holds and what it knows, and
-- gets slots. KEYS: the budget, and the marker of all budgets. ARGV[1] and the reply: JSON. Times are whole
-- microseconds; only durations come in and go out, so no two machines' clocks are compared.
local request = cjson.decode(ARGV[1])

local function load(key)
  local packed = redis.pcall('GET', key)
  local fine, value = pcall(cmsgpack.unpack, packed)
  return fine and type(value) == 'table' and value or nil -- what is not ours counts as lost
end

local function save(key, value, seconds)
  redis.call('SET', key, cmsgpack.pack(value), 'PX', string.format('%.0f', seconds * 1000))
end

-- Every process knows how often the script had run when it last heard of it. A lower count, or a budget
-- that is gone too early, means that data was lost: nobody knows what was sent. The same holds after an
-- outage in which processes went on alone. Nobody sends until all of them have restated what they hold.
local marker, budget = load(KEYS[2]), load(KEYS[1])
local lost = request.count > (marker and marker.count or 0) or (budget and not marker)
if not marker then
  marker, budget = {count = 0, seen = 0, offset = 0, held = 0}, nil
end

-- The clock. When the server's steps back, time goes on from where it was: no slot comes free early, and
-- nobody waits for the clock to catch up.
local time = redis.call('TIME')
local now = time[1] * 1000000 + time[2] + marker.offset
if now < marker.seen then
  marker.offset = marker.offset + marker.seen - now
  now = marker.seen
end
if lost or (request.back and now - marker.seen > request.turnover) then
  marker.held = now + request.hold
end
marker.seen, marker.count = now, math.max(marker.count, request.count) + 1
save(KEYS[2], marker, 86400)
if not budget then
  budget = {processes = {}, caps = {}, paused = 0, refused = 0, limit = 0, foreign = 0, foreign_until = 0}
  budget.paused = request.known and now + request.hold or 0
end

-- What this process holds: when each slot was granted, and in how long it comes free, false while that is
-- open: until the answer, because only that proves that the server has counted the request.
local process = budget.processes[request.process] or {sequence = 0, due = 0}
if request.sequence <= process.sequence then
  return false -- carried out late: nobody waits for it, and a newer request has been heard
end
budget.processes[request.process] = process
process.sequence, process.seen, process.trip, process.slots = request.sequence, now, request.trip, {}
for i, slot in ipairs(request.slots) do
  process.slots[i] = {slot[1], slot[2] and now + slot[2]}
end

-- All slots, and when they come free. Open ones lapse with a process that is not heard of any more. The
-- quickest round trip counts only if every process knows its own.
local slots, others, processes, trip = {}, {}, 0, math.huge
for name, other in pairs(budget.processes) do
  local lapse, held = other.seen + request.lifetime, 0
  for _, slot in ipairs(other.slots) do
    local free = slot[2] or lapse
    slots[#slots + 1] = {granted = slot[1], open = not slot[2], free = free, surely = free}
    held = math.max(held, free)
  end
  if other ~= process and other.due >= now then
    others[#others + 1] = {name = name, process = other, turn = other.turn, want = other.want}
  end
  if other ~= process and math.max(held, other.due + request.turnover) + request.lifetime < now then
    budget.processes[name] = nil
  else
    processes = processes + 1
    trip = math.min(trip, other.trip)
  end
end

-- A cap: of the requests granted before `at`, at most `late` had not been counted then. So a period later
-- only so many of them can take a slot, however late their own answers are.
local function apply(cap)
  local members, busy = {}, 0
  for _, slot in ipairs(slots) do
    if slot.granted < cap.at then
      members[#members + 1] = slot
      busy = busy + (slot.surely > now and 1 or 0)
    end
  end
  table.sort(members, function(a, b) return a.free > b.free end)
  for i = cap.late + 1, #members do
    members[i].free = math.min(members[i].free, cap.at + request.turnover)
  end
  return busy > cap.late -- whether it can still matter
end

local caps = {}
for _, cap in ipairs(budget.caps) do
  if apply(cap) then
    caps[#caps + 1] = cap
  end
end

-- What a header said: how many requests the server had counted before the answer came. Ours can be those
-- that it had not forgotten when the request was granted. More than that is somebody else's use of the key;
-- what is missing from it is late.
local foreign, told = 0, request.told
if told then
  local came, possible = now - told.age, 0
  for _, slot in ipairs(slots) do
    possible = possible + (slot.granted < came and slot.free > told.granted and 1 or 0)
  end
  local known = budget.foreign_until > now and budget.foreign or 0
  if told.count > possible + known and told.window > 0 then
    foreign = told.count - possible - known
    budget.foreign, budget.foreign_until = known + foreign, now + told.window
  elseif known == 0 and told.count <= possible then
    local cap = {at = came, late = possible - told.count}
    if apply(cap) then
      caps[#caps + 1] = cap
    end
  end
end
budget.caps = caps
if request.pause > 0 then
  budget.refused = budget.paused > now and budget.refused or 0
  budget.paused = math.max(budget.paused, now + request.pause)
  budget.refused = request.refuse > 0 and math.max(budget.refused, now + request.refuse) or budget.refused
end
budget.limit = request.header_limit > 0 and request.header_limit or budget.limit
local limit = budget.limit > 0 and math.min(budget.limit, request.limit) or request.limit

-- In how long each slot in use comes free, at the earliest. An open one does a period after it was granted;
-- if that has passed already, it is time to look again soon.
local frees = {}
for _, slot in ipairs(slots) do
  if slot.free > now then
    local soonest = slot.open and math.max(slot.granted + request.turnover, now + request.turnover / 8)
    frees[#frees + 1] = math.min(slot.free, soonest or slot.free) - now
  end
end
for _ = 1, budget.foreign_until > now and budget.foreign or 0 do
  frees[#frees + 1] = budget.foreign_until - now
end
table.sort(frees)

-- Slots go in turn to the processes that wait. What falls to another is kept for it until it is overdue.
local line, wants, least = {}, {}, nil
for i, other in ipairs(others) do
  line[i], wants[i] = other, other.want
  least = math.min(least or other.turn, other.turn)
end
local mine = {name = request.process, turn = process.turn or least or 0, want = request.waiting}
if request.refused > 0 and least then -- refused requests go before all others
  mine.turn = math.min(mine.turn, least - request.refused)
end
line[#line + 1] = mine
local function next_in_line()
  local first
  for _, one in ipairs(line) do
    if one.want > 0 and (not first or one.turn < first.turn
        or (one.turn == first.turn and one.name < first.name)) then
      first = one
    end
  end
  if first then
    first.turn, first.want = first.turn + 1, first.want - 1
  end
  return first
end

local granted, kept, blocked = 0, 0, math.max(budget.paused, marker.held, now) - now
if blocked == 0 and request.waiting > 0 then
  for _ = 1, limit - #frees do
    local first = next_in_line()
    if first == mine then
      granted = granted + 1
      process.slots[#process.slots + 1] = {now, false}
    elseif first then
      kept = kept + 1
    end
  end
end

-- When to ask again: as soon as a slot comes free for this process, with those right after it.
process.turn, process.want, process.due = mine.want > 0 and mine.turn or nil, mine.want, 0
local wait = blocked
if mine.want > 0 and blocked == 0 then
  local first
  for i = math.max(0, #frees - limit) + 1, #frees do
    if first and frees[i] > first + request.together then
      break
    elseif next_in_line() == mine then
      first, wait = first or frees[i], frees[i]
    end
  end
  wait = first and wait or frees[#frees] or request.turnover
  for _, other in ipairs(kept > 0 and others or {}) do
    wait = math.min(wait, other.process.due - now)
  end
  wait = math.max(wait, 1000)
end
if process.want > 0 then
  process.due = now + wait + request.grace
end
for _ = 1, granted do
  frees[#frees + 1] = request.turnover
end

local lasts = math.max(request.lifetime, wait, blocked, budget.foreign_until - now)
save(KEYS[1], budget, lasts / 1000000 + 1)
return cjson.encode({
  count = marker.count, now = string.format('%.0f', now), -- as a number it would be rounded
  granted = granted, wait = wait, paused = blocked,
  refused = budget.paused > now and math.max(0, budget.refused - now) or 0, limit = limit, frees = frees, others = wants,
  processes = processes, expected = #frees + kept, foreign = foreign, trip = trip < math.huge and trip or 0,
})
