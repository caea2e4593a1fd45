-- One budget, shared by all processes: takes in what one of them reports, and says what it may send.
-- All times are whole microseconds. Only durations come in and go out, so no two clocks are compared.
local state, leases, slots, waiting = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local ask = cjson.decode(ARGV[1])

local function whole(number) -- tostring would round to 14 digits
  return string.format('%.0f', number)
end

-- The clock. When the server's steps back, time goes on from where it was: no slot comes free early,
-- and nobody waits for the clock to catch up.
local time = redis.call('TIME')
local now = time[1] * 1000000 + time[2]
local kept = redis.call('HMGET', state,
  'epoch', 'seen', 'offset', 'paused', 'refused', 'held', 'limit', 'strangers', 'trips', 'trip')
local epoch = kept[1]
local seen = tonumber(kept[2] or now)
local offset = tonumber(kept[3] or 0)
local paused = tonumber(kept[4] or 0)
local refused = tonumber(kept[5] or 0)
local held = tonumber(kept[6] or 0)
local header_limit = tonumber(kept[7] or 0)
local strangers = tonumber(kept[8] or 0)
local trips = tonumber(kept[9] or 0)
local trip = tonumber(kept[10] or 0)
if ask.trips > 0 then
  trip = trips > 0 and math.min(trip, ask.trip) or ask.trip
  trips = trips + ask.trips
end
now = now + offset
if now < seen then
  offset = offset + seen - now
  now = seen
end

-- After an outage, or if the data was lost under processes that are in the middle of something, nobody
-- knows yet what was sent meanwhile. Until all have told, they keep to what each may do alone.
local lost = ask.epoch ~= '' and ask.epoch ~= epoch
local silent = not epoch or now - seen > ask.turnover
if (lost and held == 0) or (ask.back and silent and held <= now) then
  held = now + ask.hold
end
epoch = epoch or (whole(now) .. '-' .. ask.me)

-- What became of requests.
for _, id in ipairs(ask.dropped) do
  redis.call('ZREM', leases, id)
  redis.call('ZREM', slots, id)
end
for id, left in pairs(ask.ended) do
  redis.call('ZREM', leases, id)
  if left > 0 then
    redis.call('ZADD', slots, whole(now + left), id)
  end
end
for id, left in pairs(ask.open) do
  redis.call('ZADD', leases, whole(now + left), id)
end
redis.call('ZREMRANGEBYSCORE', leases, '-inf', whole(now))
redis.call('ZREMRANGEBYSCORE', slots, '-inf', whole(now))

-- What the headers said.
if ask.pause > 0 then
  if paused <= now then
    refused = 0
  end
  paused = math.max(paused, now + ask.pause)
  if ask.refuse > 0 then
    refused = math.max(refused, now + ask.refuse)
  end
end
if ask.header_limit > 0 then
  header_limit = ask.header_limit
end
local limit = header_limit > 0 and math.min(header_limit, ask.limit) or ask.limit
local foreign = 0
if ask.window > 0 then
  foreign = math.max(0, ask.used - redis.call('ZCARD', leases) - redis.call('ZCARD', slots))
  for _ = 1, foreign do
    strangers = strangers + 1
    redis.call('ZADD', slots, whole(now + ask.window), ':' .. strangers)
  end
end

-- When each slot in use comes free. One whose request has not been heard of may do so sooner than its
-- lease ends: as if it had been counted as it left.
local frees, processes, seen_process = {}, 0, {}
local function note(process)
  if process ~= '' and not seen_process[process] then
    seen_process[process] = true
    processes = processes + 1
  end
end
local function collect(key, early)
  local found = redis.call('ZRANGE', key, 0, -1, 'WITHSCORES')
  for i = 1, #found, 2 do
    note(string.match(found[i], '^(.*):'))
    local left = tonumber(found[i + 1]) - now
    frees[#frees + 1] = left > early and left - early or left
  end
end
collect(leases, ask.counted_within)
collect(slots, 0)
note(ask.me)

-- Who waits, and how often each has had its turn. Nothing is kept for one that has not come back in
-- time; if it was only slow, it goes on where it was.
local line, others, mine, least = {}, {}, nil, nil
local found = redis.call('HGETALL', waiting)
for i = 1, #found, 2 do
  local turn, want, due = string.match(found[i + 1], '^(%S+) (%S+) (%S+)$')
  local process = {name = found[i], turn = tonumber(turn), want = tonumber(want), due = tonumber(due)}
  if process.name == ask.me then
    mine = process
  elseif process.due + 2 * ask.turnover < now then
    redis.call('HDEL', waiting, process.name)
  elseif process.due >= now then
    note(process.name)
    line[#line + 1] = process
    others[#others + 1] = process.want
    least = math.min(least or process.turn, process.turn)
  end
end
local want = ask.waiting
if want > 0 then
  mine = mine or {name = ask.me, turn = least or 0}
  if ask.refused > 0 and least then -- refused requests go before all others
    mine.turn = math.min(mine.turn, least - ask.refused)
  end
  mine.want = want
  line[#line + 1] = mine
end

local function next_in_line()
  local first
  for _, process in ipairs(line) do
    if process.want > 0 and (not first or process.turn < first.turn
        or (process.turn == first.turn and process.name < first.name)) then
      first = process
    end
  end
  if first then
    first.turn = first.turn + 1
    first.want = first.want - 1
  end
  return first
end

-- Slots go in turn to those who wait; what falls to another is kept for it until it is overdue.
local granted, kept_for_others = 0, 0
local blocked = math.max(paused, held) - now
if blocked <= 0 and want > 0 then
  for _ = 1, limit - #frees do
    local first = next_in_line()
    if not first then
      break
    elseif first == mine then
      redis.call('ZADD', leases, whole(now + ask.turnover + ask.counted_within),
        ask.me .. ':' .. whole(ask.first + granted))
      granted = granted + 1
    else
      kept_for_others = kept_for_others + 1
    end
  end
end
want = want - granted

-- When to ask again: as soon as a slot comes free for this process, or with those right after it.
local wait = 0
if want > 0 then
  local turn = mine.turn
  if blocked > 0 then
    wait = blocked
  else
    table.sort(frees)
    local first
    for i = math.max(0, #frees - limit) + 1, #frees do
      if first and frees[i] > first + ask.together then
        break
      end
      if next_in_line() == mine then
        first = first or frees[i]
        wait = frees[i]
      end
    end
    if not first then
      wait = frees[#frees] or ask.turnover
    end
    if kept_for_others > 0 then
      for _, process in ipairs(line) do
        if process ~= mine then
          wait = math.min(wait, process.due - now + 1000)
        end
      end
    end
    wait = math.max(wait, 1000)
  end
  redis.call('HSET', waiting, ask.me,
    whole(turn) .. ' ' .. whole(want) .. ' ' .. whole(now + wait + ask.grace))
else
  redis.call('HDEL', waiting, ask.me)
end
for _ = 1, granted do
  frees[#frees + 1] = ask.turnover
end

redis.call('HSET', state, 'epoch', epoch, 'seen', whole(now), 'offset', whole(offset),
  'paused', whole(paused), 'refused', whole(refused), 'held', whole(held),
  'limit', whole(header_limit), 'strangers', whole(strangers), 'trips', whole(trips), 'trip', whole(trip))
local lasts = math.max(ask.turnover + ask.counted_within, wait, paused - now, held - now)
for _, key in ipairs(KEYS) do
  redis.call('PEXPIRE', key, whole(math.ceil(lasts / 1000) + 1000))
end

local function left(moment)
  return math.max(0, moment - now)
end
return cjson.encode({
  epoch = epoch, granted = granted, wait = wait, held = left(held), paused = left(paused),
  refused = paused > now and left(refused) or 0, limit = limit, frees = frees, others = others,
  processes = processes, expected = #frees + kept_for_others, foreign = foreign,
  trips = trips, trip = trip,
})
