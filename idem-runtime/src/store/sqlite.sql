-- The tables of idem's SQLite store. Running this file again changes nothing.

-- Which shape the tables have. A store that does not know the version refuses to open them.
-- (`PRAGMA user_version` belongs to the application.)
CREATE TABLE IF NOT EXISTS idem_schema (
    id      INTEGER NOT NULL PRIMARY KEY CHECK (id = 1),
    version INTEGER NOT NULL
) STRICT;

INSERT OR IGNORE INTO idem_schema (id, version) VALUES (1, 1);

-- One row a key. All times are milliseconds since 1970; 9223372036854775807 is never.
--
-- An ordinary table with an index on the key, and not WITHOUT ROWID: a row carries a whole
-- response, and a B-tree whose inner pages hold such rows is deep.
CREATE TABLE IF NOT EXISTS idem_records (
    key          BLOB    NOT NULL PRIMARY KEY, -- 32 bytes
    scope        BLOB    NOT NULL,             -- 32 bytes: the digest of whose key it is
    operation    TEXT    NOT NULL,             -- method and route, for people
    operation_id BLOB    NOT NULL,             -- 16 bytes: a UUID
    state        INTEGER NOT NULL,             -- 0 issued, 1 running, 2 released, 3 completed
    scheme       TEXT    NOT NULL,             -- how the fingerprint was computed
    fingerprint  BLOB    NOT NULL,             -- 32 bytes
    token        BLOB    NOT NULL,             -- 16 bytes: who claimed or issued it last
    attempt      INTEGER NOT NULL,
    lease_end    INTEGER NOT NULL,
    valid_until  INTEGER NOT NULL,
    kept_until   INTEGER NOT NULL,
    created      INTEGER NOT NULL,
    format       INTEGER NOT NULL,
    flags        INTEGER NOT NULL,             -- bits: 1 tombstone, 2 issued
    payload      BLOB    NOT NULL              -- the recorded response; until then, what the next attempt finds
) STRICT;

-- What the sweeper goes by.
CREATE INDEX IF NOT EXISTS idem_records_kept_until ON idem_records (kept_until);

-- What an application and a support ticket ask by. It is not unique: a claimant that proposes an id
-- a second time must not fail for it.
CREATE INDEX IF NOT EXISTS idem_records_operation_id ON idem_records (operation_id);
