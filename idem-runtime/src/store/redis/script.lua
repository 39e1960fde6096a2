-- Everything that is done to one record, each time in one atomic step.
--
-- KEYS[1] is the record's key. ARGV[1] says what to do, ARGV[2] is the newest format that the caller
-- reads; what else there is, each step says. The answer is the outcome, the server's time in
-- milliseconds and, where it helps the caller, the record. Its layout is explained in `record.rs`.
--
-- A record that is not changed is not written: a claim that loses costs nobody's disk or replica
-- anything. Of a call that was made before, the record is written again as it is, so that whoever
-- waits for replicas afterwards waits for that record too.

local ISSUED, RUNNING, RELEASED, COMPLETED = 0, 1, 2, 3
local DONE, REFUSED, NOTHING, NEWER, CORRUPT = 0, 1, 2, 3, 4
-- The end of what lasts for ever: the largest integer up to which a number here is exact.
local NEVER = 9007199254740991
local TIMES = '>I2I1I2I4I8I8I8I8I8'
local HEAD, FIXED = 65, 153
local FLAG_ISSUED = 2

local key, step, reads = KEYS[1], ARGV[1], tonumber(ARGV[2])
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)

local function after(span)
    span = tonumber(span)
    return span >= NEVER - now and NEVER or now + span
end

-- What is there may be damaged, which only who purges it can help.
local function corrupt()
    if step ~= 'purge' then return {CORRUPT, now} end
    redis.call('DEL', key)
    return {DONE, now}
end

local raw = redis.call('GET', key)
local r
local head_end
if raw then
    local format = #raw >= 2 and struct.unpack('>I2', raw) or 0
    if format > reads then return {NEWER, now} end
    if format == 0 or #raw < FIXED then return corrupt() end
    r = {}
    r.format, r.state, r.flags, r.attempt, r.lease_end, r.valid, r.kept, r.created, r.stamp =
        struct.unpack(TIMES, raw)
    local scheme, operation = struct.unpack('>I4I4', raw, FIXED - 7)
    head_end = FIXED + scheme + operation
    if r.state > COMPLETED or r.valid > r.kept or head_end > #raw then return corrupt() end
    r.token = raw:sub(HEAD - 15, HEAD)
    if r.kept <= now then
        if step == 'sweep' then
            redis.call('DEL', key)
            return {DONE, now}
        end
        r = nil
    else
        r.what = raw:sub(HEAD + 1, head_end)
        r.payload = raw:sub(head_end + 1)
    end
end

local function save()
    local value = struct.pack(TIMES, r.format, r.state, r.flags, r.attempt, r.lease_end, r.valid,
        r.kept, r.created, r.stamp) .. r.token .. r.what .. r.payload
    -- Redis removes the record when it is over.
    if r.kept >= NEVER then
        redis.call('SET', key, value)
    else
        redis.call('SET', key, value, 'PXAT', r.kept)
    end
    return {DONE, now, value}
end

local function is_issued()
    return bit.band(r.flags, FLAG_ISSUED) ~= 0
end

local function extend(lease_end)
    r.lease_end = math.max(r.lease_end, lease_end)
    r.kept = math.max(r.kept, r.lease_end)
    -- An issued key's validity stays: a run that began in time may finish after it.
    if not is_issued() then r.valid = math.max(r.valid, r.lease_end) end
end

if step == 'read' then
    return r and {DONE, now, raw} or {NOTHING, now}
elseif step == 'look' then
    return r and {DONE, now, raw:sub(1, head_end)} or {NOTHING, now}
elseif step == 'sweep' then
    return {NOTHING, now}
elseif step == 'purge' then
    if r and r.state == RUNNING and r.lease_end > now then return {REFUSED, now} end
    redis.call('DEL', key)
    return {r and DONE or NOTHING, now}
end

local token = ARGV[3]

if step == 'claim' then
    -- What the request is, its lease, its time to live, whether only an issued key will do, and
    -- whether an unknown outcome is run again.
    local what = ARGV[4]
    if not r then
        if ARGV[7] == '1' then return {NOTHING, now} end
        r = {format = reads, flags = 0, attempt = 1, created = now, what = what, payload = ''}
        r.state, r.token, r.lease_end, r.stamp = RUNNING, token, now, 0
    elseif r.state ~= RUNNING or r.token ~= token then
        local is_open = r.state == RELEASED or (r.state == RUNNING and r.lease_end <= now)
        if r.valid <= now then
            return {REFUSED, now, raw}
        elseif r.state == ISSUED then
            -- What was issued is the key alone: its first user says what the operation is.
            r.what = what
        else
            -- The digest of the fingerprint, and its scheme: they follow the scope.
            local scheme = struct.unpack('>I4', what, 81)
            local same = r.what:sub(49, 84) == what:sub(49, 84)
                and r.what:sub(89, 88 + scheme) == what:sub(89, 88 + scheme)
            if not (same and is_open and ARGV[8] == '1') then return {REFUSED, now, raw} end
        end
        r.state, r.token, r.lease_end, r.stamp = RUNNING, token, now, 0
        r.attempt = math.min(r.attempt + 1, 4294967295)
    end
    if not is_issued() then
        r.valid = after(ARGV[6])
        r.kept = r.valid
    end
    extend(after(ARGV[5]))
    return save()
elseif step == 'issue' then
    -- Whose key it is, its validity, for how long it is known, and what is bound to it.
    if r then
        if r.state == ISSUED and r.token == token then return save() end
        return {REFUSED, now, raw}
    end
    r = {format = reads, state = ISSUED, flags = FLAG_ISSUED, attempt = 0, created = now}
    r.lease_end, r.valid, r.stamp = now, after(ARGV[5]), 0
    r.kept = math.max(after(ARGV[6]), r.valid)
    r.token, r.what, r.payload = token, ARGV[4], ARGV[7]
    return save()
end

if not r then return {NOTHING, now} end
local is_held = r.state == RUNNING and r.token == token

if step == 'renew' then
    -- For how long it holds from now.
    if not is_held then return {REFUSED, now} end
    extend(after(ARGV[4]))
    save()
    return {DONE, now}
elseif step == 'complete' then
    -- The answer, its time to live and its flags.
    if not is_held then
        if r.state ~= COMPLETED or r.token ~= token then return {REFUSED, now, raw} end
    else
        r.format, r.state, r.lease_end = reads, COMPLETED, now
        r.flags, r.payload = bit.bor(r.flags, ARGV[6]), ARGV[4]
        if not is_issued() then
            r.valid = after(ARGV[5])
            r.kept = r.valid
        end
    end
elseif step == 'checkpoint' then
    -- What the next attempt finds, and a number that is higher for a later call.
    if not is_held then return {REFUSED, now, raw} end
    local stamp = tonumber(ARGV[5])
    if stamp > r.stamp then
        r.format, r.payload, r.stamp = reads, ARGV[4], stamp
    end
elseif step == 'release' then
    if not is_held then
        if r.state ~= RELEASED or r.token ~= token then return {REFUSED, now, raw} end
    else
        r.state, r.lease_end = RELEASED, now
    end
elseif step == 'forget' then
    if not is_held then
        local is_undone = is_issued() and r.state == ISSUED and r.token == token
        if not is_undone then return {REFUSED, now, raw} end
    elseif is_issued() then
        r.state, r.attempt, r.lease_end = ISSUED, 0, now
    else
        redis.call('DEL', key)
        return {DONE, now}
    end
end
save()
return {DONE, now}
