-- The end of most claims, tried before all else: the record is as its first claim made it.
--
-- ARGV[1] is what the record then begins with, up to and with the operation id, ARGV[2] the record
-- that is to be, and ARGV[3] its time to live in milliseconds. To whatever else there is, the step
-- `complete` is done, whose arguments are parts of that record.
--
-- A text costs more here than anything else, since Redis hashes all of its bytes whenever one comes
-- up: hence a record that the caller has put together, and no more of the old one than is compared.

if redis.call('GETRANGE', KEYS[1], '0', '80') == ARGV[1] then
    redis.call('SET', KEYS[1], ARGV[2], 'PX', ARGV[3])
    return 0
end

local format, _, flags = struct.unpack('>I2I1I2', ARGV[2])
local scheme, operation = struct.unpack('>I4I4', ARGV[2], 146)
local payload = ARGV[2]:sub(154 + scheme + operation)
local ARGV = {'complete', format, ARGV[2]:sub(50, 65), payload, ARGV[3], flags}

