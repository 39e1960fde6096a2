-- Everything that is done to one record, each time in one atomic step.
--
-- KEYS[1] is the record's key. ARGV[1] says what to do, ARGV[2] is the newest format that the caller
-- reads; what else there is, each step says. The answer is the outcome or, where a record helps the
-- caller, the outcome, the server's time in milliseconds and the record. Its layout is explained in
-- `record.rs`.
--
-- A record that is not changed is not written: a claim that loses costs nobody's disk or replica
-- anything. Of a call that was made before, the record is written again as it is, so that whoever
-- waits for replicas afterwards waits for that record too.
--
-- It is written for the server's time, which all clients share: local variables instead of tables
-- and functions, and one place at the end that writes.

local ISSUED, RUNNING, RELEASED, COMPLETED, SPANS = 0, 1, 2, 3, 4
local DONE, REFUSED, NOTHING, NEWER, CORRUPT = 0, 1, 2, 3, 4
-- The end of what lasts for ever: the largest integer up to which a number here is exact. No sum
-- with it is less, and none is written.
local NEVER = 9007199254740991
local NUMBERS = '>I2I1I2I4I8I8I8I8I8'
local HEAD, FIXED = 65, 153
local FLAG_ISSUED = 2

local key, step, reads = KEYS[1], ARGV[1], tonumber(ARGV[2])
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)

local format, state, flags, attempt, lease_end, valid, kept, created, stamp
local owner, what, payload

-- What is there, if anything is that is not over.
local raw = redis.call('GET', key)
local exists = false
if raw then
    local scheme, operation, body
    format = #raw >= 2 and struct.unpack('>I2', raw) or 0
    if format > reads then return NEWER end
    local is_sound = format > 0 and #raw >= FIXED
    if is_sound then
        format, state, flags, attempt, lease_end, valid, kept, created, stamp =
            struct.unpack(NUMBERS, raw)
        scheme, operation = struct.unpack('>I4I4', raw, FIXED - 7)
        body = FIXED + scheme + operation
        is_sound = state <= SPANS + COMPLETED and valid <= kept and body <= #raw
    end
    if is_sound and state >= SPANS then
        local expiry = redis.call('PEXPIRETIME', key)
        local since = expiry - kept
        is_sound = expiry > 0
        state, lease_end, valid, kept = state - SPANS, since + lease_end, since + valid, expiry
        created = since - created
        raw = is_sound and struct.pack(NUMBERS, format, state, flags, attempt, lease_end, valid, kept,
            created, stamp) .. raw:sub(HEAD - 15)
    end
    if not is_sound then
        -- Only who purges it can help.
        if step ~= 'purge' then return CORRUPT end
        redis.call('DEL', key)
        return DONE
    end
    exists = kept > now
    if exists then
        if step == 'read' then return {DONE, now, raw} end
        if step == 'look' then return {DONE, now, raw:sub(1, body)} end
        owner = raw:sub(HEAD - 15, HEAD)
        what = raw:sub(HEAD + 1, body)
        payload = raw:sub(body + 1)
    end
end

if step == 'read' or step == 'look' then
    return NOTHING
elseif step == 'sweep' then
    if exists or not raw then return NOTHING end
    redis.call('DEL', key)
    return DONE
elseif step == 'purge' then
    if exists and state == RUNNING and lease_end > now then return REFUSED end
    redis.call('DEL', key)
    return exists and DONE or NOTHING
end

local token = ARGV[3]
local is_held = exists and state == RUNNING and owner == token
local is_issued = exists and flags % (2 * FLAG_ISSUED) >= FLAG_ISSUED
-- For how long from now the record is valid and kept, and the lease lasts at least.
local lasts, lease

if step == 'claim' then
    -- What the request is, its lease, its time to live, whether only an issued key will do, and
    -- whether an unknown outcome is run again.
    if not exists then
        if ARGV[7] == '1' then return NOTHING end
        format, flags, attempt, created, what, payload = reads, 0, 1, now, ARGV[4], ''
        state, owner, lease_end, stamp = RUNNING, token, now, 0
    elseif not is_held then
        if valid <= now then
            return {REFUSED, now, raw}
        elseif state == ISSUED then
            -- What was issued is the key alone: its first user says what the operation is.
            what = ARGV[4]
        else
            -- The digest of the fingerprint and its scheme, which follow the scope.
            local scheme = 88 + struct.unpack('>I4', ARGV[4], 81)
            local is_same = what:sub(49, 84) == ARGV[4]:sub(49, 84)
                and what:sub(89, scheme) == ARGV[4]:sub(89, scheme)
            local is_open = state == RELEASED or (state == RUNNING and lease_end <= now)
            if not (is_same and is_open and ARGV[8] == '1') then return {REFUSED, now, raw} end
        end
        state, owner, lease_end, stamp = RUNNING, token, now, 0
        attempt = math.min(attempt + 1, 4294967295)
    end
    lease, lasts = ARGV[5], ARGV[6]
elseif step == 'issue' then
    -- Whose key it is, its validity, for how long it is known, and what is bound to it.
    if exists then
        if state ~= ISSUED or owner ~= token then return {REFUSED, now, raw} end
    else
        format, state, flags, attempt, created = reads, ISSUED, FLAG_ISSUED, 0, now
        owner, what, payload, lease_end, stamp = token, ARGV[4], ARGV[7], now, 0
        valid = math.min(now + ARGV[5], NEVER)
        kept = math.max(math.min(now + ARGV[6], NEVER), valid)
    end
elseif not exists then
    return NOTHING
elseif step == 'renew' then
    -- For how long it holds from now.
    if not is_held then return REFUSED end
    lease = ARGV[4]
elseif step == 'complete' then
    -- The answer, its time to live and its flags.
    if is_held then
        format, state, lease_end, payload = reads, COMPLETED, now, ARGV[4]
        flags, lasts = bit.bor(flags, ARGV[6]), ARGV[5]
    elseif state ~= COMPLETED or owner ~= token then
        return {REFUSED, now, raw}
    end
elseif step == 'checkpoint' then
    -- What the next attempt finds, and a number that is higher for a later call.
    if not is_held then return {REFUSED, now, raw} end
    local number = tonumber(ARGV[5])
    if number > stamp then format, payload, stamp = reads, ARGV[4], number end
elseif step == 'release' then
    if is_held then
        state, lease_end = RELEASED, now
    elseif state ~= RELEASED or owner ~= token then
        return {REFUSED, now, raw}
    end
elseif step == 'forget' then
    if is_held and not is_issued then
        redis.call('DEL', key)
        return DONE
    elseif is_held then
        state, attempt, lease_end = ISSUED, 0, now
    elseif not is_issued or state ~= ISSUED or owner ~= token then
        return {REFUSED, now, raw}
    end
end

-- An issued key's validity stays: a run that began in time may finish after it.
if lasts and not is_issued then
    valid = math.min(now + lasts, NEVER)
    kept = valid
end
if lease then
    lease_end = math.max(lease_end, math.min(now + lease, NEVER))
    kept = math.max(kept, lease_end)
    if not is_issued then valid = math.max(valid, lease_end) end
end

local head = struct.pack(NUMBERS, format, state, flags, attempt, lease_end, valid, kept, created,
    stamp)
local value = head .. owner .. what .. payload
-- Redis removes the record when it is over.
if kept >= NEVER then
    redis.call('SET', key, value)
else
    redis.call('SET', key, value, 'PXAT', kept)
end
return step == 'claim' and {DONE, now, value} or DONE
