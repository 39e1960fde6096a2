-- What there is, and what is still to be told to whom. Running this file again changes nothing.

CREATE TABLE IF NOT EXISTS leash_events (
    number       INTEGER NOT NULL PRIMARY KEY, -- in the order in which they came
    id           TEXT    NOT NULL UNIQUE,
    owner        TEXT    NOT NULL,             -- the id of an API key
    agent        TEXT    NOT NULL,
    network      TEXT    NOT NULL,
    phase        TEXT    NOT NULL,
    payload      TEXT,                         -- of a transaction: what is to be signed
    receipt_hash TEXT,                         -- of a receipt
    signature    TEXT,
    error        TEXT,
    due          INTEGER,                      -- when the chain is asked next, in ms since 1970
    UNIQUE (network, receipt_hash)
) STRICT;

CREATE INDEX IF NOT EXISTS leash_events_due ON leash_events (due) WHERE phase = 'submitted';

-- As everybody is shown them.
CREATE VIEW IF NOT EXISTS leash_shown AS SELECT number, id, owner, agent, phase, json_object(
    'id', id,
    'phase', phase,
    'signature', signature,
    'error', error,
    'agent', agent,
    'network', network,
    'transaction', payload,
    'receipt_hash', receipt_hash,
    'explorer', 'https://explorer.leash.market/event/' || id
) AS document FROM leash_events;

CREATE TABLE IF NOT EXISTS leash_webhooks (
    id     TEXT NOT NULL PRIMARY KEY,
    owner  TEXT NOT NULL,
    url    TEXT NOT NULL,
    secret TEXT NOT NULL
) STRICT;

-- What was not delivered yet.
CREATE TABLE IF NOT EXISTS leash_deliveries (
    -- Never another one's: an attempt that ends late ends its own delivery.
    number     INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT,
    webhook_id TEXT    NOT NULL,
    event_id   TEXT    NOT NULL,
    phase      TEXT    NOT NULL,
    body       TEXT    NOT NULL,           -- the same bytes in every attempt
    attempts   INTEGER NOT NULL DEFAULT 0,
    due        INTEGER NOT NULL DEFAULT 0, -- when the next attempt is, in ms since 1970
    UNIQUE (webhook_id, event_id, phase)
) STRICT;

CREATE INDEX IF NOT EXISTS leash_deliveries_due ON leash_deliveries (due);

-- What is to be told of each event as it is.
CREATE VIEW IF NOT EXISTS leash_news AS SELECT
    leash_webhooks.id AS webhook_id,
    leash_shown.id AS event_id,
    leash_shown.phase AS phase,
    json_object(
        'webhook_id', leash_webhooks.id,
        'event_id', leash_shown.id,
        'phase', leash_shown.phase,
        'event', json(document)
    ) AS body
FROM leash_webhooks JOIN leash_shown USING (owner);

-- A phase and what is to be told of it are one write: neither is there without the other.
CREATE TRIGGER IF NOT EXISTS leash_began AFTER INSERT ON leash_events BEGIN
    INSERT INTO leash_deliveries (webhook_id, event_id, phase, body)
    SELECT webhook_id, event_id, phase, body FROM leash_news WHERE event_id = NEW.id;
END;

CREATE TRIGGER IF NOT EXISTS leash_went_on AFTER UPDATE OF phase ON leash_events BEGIN
    INSERT INTO leash_deliveries (webhook_id, event_id, phase, body)
    SELECT webhook_id, event_id, phase, body FROM leash_news WHERE event_id = NEW.id;
END;
