-- The tables of idem's PostgreSQL store (13 or newer), in the first schema of the search path.
-- Running this file again changes nothing.

-- Which shape the tables have. A store that does not know the version refuses to use them.
CREATE TABLE IF NOT EXISTS idem_schema (
    id      integer NOT NULL PRIMARY KEY CHECK (id = 1),
    version integer NOT NULL
);

INSERT INTO idem_schema (id, version) VALUES (1, 1) ON CONFLICT DO NOTHING;

-- One row a key. All times are milliseconds since 1970 by the server's clock; 9223372036854775807
-- is never.
CREATE TABLE IF NOT EXISTS idem_records (
    key          bytea    NOT NULL PRIMARY KEY,
    lease_end    bigint   NOT NULL,
    valid_until  bigint   NOT NULL,
    kept_until   bigint   NOT NULL,
    created      bigint   NOT NULL,
    -- In which minute (of 65.536 seconds) the record is over. The index is on this and not on
    -- kept_until itself, so that a completion, which moves that by as long as the handler took,
    -- seldom touches any index: PostgreSQL then updates in place, within the page (HOT).
    bucket       bigint   NOT NULL GENERATED ALWAYS AS (kept_until >> 16) STORED,
    checkpoint   bigint   NOT NULL, -- numbers the checkpoints under one token: a late one is ignored
    attempt      integer  NOT NULL,
    format       integer  NOT NULL,
    flags        integer  NOT NULL, -- bits: 1 tombstone, 2 issued
    state        smallint NOT NULL, -- 0 issued, 1 running, 2 released, 3 completed
    scope        bytea    NOT NULL, -- the digest of whose key it is
    operation    text     NOT NULL, -- method and route, for people
    operation_id bytea    NOT NULL, -- a UUID
    scheme       text     NOT NULL, -- how the fingerprint was computed
    fingerprint  bytea    NOT NULL,
    token        bytea    NOT NULL, -- who claimed or issued it last
    payload      bytea    NOT NULL  -- the recorded response; until then, what the next attempt finds
) WITH (
    -- Room in each page for the completions of all the claims in it, with responses of some hundred
    -- bytes: under load they travel together, in one statement, before which no room is made. So a
    -- completion touches no index (with 64 and 256 callers at work all did not; 40 of 100 did not
    -- with a factor of 85). It takes twice the disk.
    fillfactor = 30,
    -- Every row is removed within its time to live, and a table that is vacuumed late is a table
    -- that grows.
    autovacuum_vacuum_scale_factor = 0.02,
    autovacuum_analyze_scale_factor = 0.02,
    toast.autovacuum_vacuum_scale_factor = 0.02
);

-- What the sweeper goes by.
CREATE INDEX IF NOT EXISTS idem_records_bucket ON idem_records (bucket);

-- What an operation is found by.
CREATE INDEX IF NOT EXISTS idem_records_operation_id ON idem_records (operation_id);
