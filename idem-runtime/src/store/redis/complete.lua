-- The end of most claims, tried before all else: the record is as its first claim made it.
--
-- ARGV[1] is the token, ARGV[2] what the record then begins with, up to the instant at which it was
-- made, ARGV[3] the answer and ARGV[4] its time to live. Where that is no span that Redis can count,
-- ARGV[2] does not say `spans`. Whatever else there is, the step `complete` sees to.

local SPANS_RUNNING, SPANS_COMPLETED = 5, 7

local raw, head = redis.call('GET', KEYS[1]), ARGV[2]
if
    raw
    and raw:byte(3) == SPANS_RUNNING
    and head:byte(3) == SPANS_COMPLETED
    and raw:sub(50, 65) == ARGV[1]
    and raw:sub(1, 2) == head:sub(1, 2)
then
    redis.call('SET', KEYS[1], head .. raw:sub(34) .. ARGV[3], 'PX', ARGV[4])
    return 0
end

local format, _, flags = struct.unpack('>I2I1I2', head)
local ARGV = {'complete', format, ARGV[1], ARGV[3], ARGV[4], flags}

