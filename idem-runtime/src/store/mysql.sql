-- The tables of idem's MySQL and MariaDB store. Running this file again changes nothing.

-- One row a key. All times are milliseconds since 1970; 9223372036854775807 is never.
--
-- Keys are bytes and are compared as such. The texts are for people, who read them as UTF-8
-- whatever the database's own character set is; their types hold all that fits into a packet, so
-- that a server that is not in strict mode has nothing to cut off.
CREATE TABLE IF NOT EXISTS idem_records (
    record_key   BINARY(32)        NOT NULL,
    scope        BINARY(32)        NOT NULL, -- the digest of whose key it is
    operation    LONGTEXT          NOT NULL, -- method and route, for people
    operation_id BINARY(16)        NOT NULL, -- a UUID
    state        TINYINT UNSIGNED  NOT NULL, -- 0 issued, 1 running, 2 released, 3 completed
    scheme       LONGTEXT          NOT NULL, -- how the fingerprint was computed
    fingerprint  BINARY(32)        NOT NULL,
    token        BINARY(16)        NOT NULL, -- who claimed or issued it last
    attempt      INT UNSIGNED      NOT NULL,
    lease_end    BIGINT            NOT NULL,
    valid_until  BIGINT            NOT NULL,
    kept_until   BIGINT            NOT NULL,
    created      BIGINT            NOT NULL,
    format       SMALLINT UNSIGNED NOT NULL,
    flags        SMALLINT UNSIGNED NOT NULL, -- bits: 1 tombstone, 2 issued
    version      BIGINT            NOT NULL, -- another one after each change under one token
    payload      LONGBLOB          NOT NULL, -- the recorded response; until then, what the next attempt finds
    PRIMARY KEY (record_key),
    -- What the sweeper goes by.
    KEY idem_records_kept_until (kept_until),
    -- What an application and a support ticket ask by. It is not unique: a claimant that proposes
    -- an id a second time must not fail for it.
    KEY idem_records_operation_id (operation_id)
) ENGINE = InnoDB ROW_FORMAT = DYNAMIC DEFAULT CHARACTER SET = utf8mb4 COLLATE = utf8mb4_bin;

-- Which shape the tables have. A store that does not know the version refuses to use them.
--
-- It comes last: there is no transaction around these statements, and whoever sees a version may
-- rely on the rest.
CREATE TABLE IF NOT EXISTS idem_schema (
    id      TINYINT UNSIGNED NOT NULL PRIMARY KEY, -- always 1
    version INT UNSIGNED     NOT NULL
) ENGINE = InnoDB;

INSERT INTO idem_schema (id, version) VALUES (1, 1) ON DUPLICATE KEY UPDATE id = 1;
