//! What there is: events, webhooks, and what is still to be delivered to them.
//!
//! Each change is one statement, so none is half done, whenever the process dies or a client hangs
//! up; and each can be repeated.

use std::{
    path::{Path, PathBuf},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use alloy_primitives::B256;
use examples::StoreChoice;
use serde::Deserialize;
use serde_json::Value;
use sqlx::{
    Row, SqlitePool,
    sqlite::{
        SqliteConnectOptions, SqliteJournalMode, SqlitePoolOptions, SqliteRow, SqliteSynchronous,
    },
};
use uuid::Uuid;

use crate::callers::Caller;

/// Where an event is. A transaction goes from `prepared` to `submitted` to `confirmed` or `failed`,
/// a receipt from `receipt.published` to `receipt.pulled`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Phase {
    Prepared,
    Submitted,
    Confirmed,
    Failed,
    #[serde(rename = "receipt.published")]
    Published,
    #[serde(rename = "receipt.pulled")]
    Pulled,
}

impl Phase {
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Prepared => "prepared",
            Self::Submitted => "submitted",
            Self::Confirmed => "confirmed",
            Self::Failed => "failed",
            Self::Published => "receipt.published",
            Self::Pulled => "receipt.pulled",
        }
    }
}

/// Which chain. A name that is spelt otherwise would be another one, so only these are taken.
#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Network {
    Base,
    Solana,
}

impl Network {
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Base => "base",
            Self::Solana => "solana",
        }
    }
}

/// Which events are asked for.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Filter {
    id: Option<Uuid>,
    phase: Option<Phase>,
    agent: Option<String>,
    /// Only those that came after this one.
    after: Option<Uuid>,
    limit: Option<u32>,
}

/// An event, as it begins.
pub(crate) struct Begun<'a> {
    pub(crate) agent: &'a str,
    pub(crate) network: Network,
    pub(crate) subject: Subject<'a>,
}

/// What an event is about.
pub(crate) enum Subject<'a> {
    /// What is to be signed.
    Transaction(&'a str),
    /// By its hash.
    Receipt(B256),
}

/// A transaction that waits to be confirmed.
pub(crate) struct Awaited {
    pub(crate) id: Uuid,
    pub(crate) signature: String,
}

/// Something to be delivered.
pub(crate) struct Delivery {
    number: i64,
    pub(crate) url: String,
    pub(crate) secret: String,
    pub(crate) body: String,
}

type Result<T> = std::result::Result<T, sqlx::Error>;

/// What there is; a clone is the same books.
#[derive(Clone)]
pub(crate) struct Books(SqlitePool);

impl Books {
    /// Opens the books: in this file, or else beside idem's records, or else in memory.
    pub(crate) async fn open(file: Option<PathBuf>, store: &StoreChoice) -> Result<Self> {
        let options = match (file, store) {
            (Some(file), _) => durable(&file),
            (None, StoreChoice::Sqlite(records)) => durable(&records.with_extension("leash.db")),
            (None, _) => SqliteConnectOptions::new().in_memory(true),
        };
        // One connection: the writes are short, and a database in memory is its connection's.
        let pool =
            SqlitePoolOptions::new().max_connections(1).max_lifetime(None).idle_timeout(None);
        let pool = pool.connect_with(options).await?;
        sqlx::raw_sql(include_str!("books.sql")).execute(&pool).await?;
        Ok(Self(pool))
    }

    /// Writes an event down, unless it is there already; whether it was not.
    pub(crate) async fn begin(&self, caller: Caller, id: Uuid, event: Begun<'_>) -> Result<bool> {
        let Begun { agent, network, subject } = event;
        let (phase, payload, receipt_hash) = match subject {
            Subject::Transaction(payload) => (Phase::Prepared, Some(payload), None),
            Subject::Receipt(hash) => (Phase::Published, None, Some(hash.to_string())),
        };
        let insert = "INSERT INTO leash_events \
             (id, owner, agent, network, phase, payload, receipt_hash) \
             VALUES (?, ?, ?, ?, ?, ?, ?) ON CONFLICT DO NOTHING";
        let insert = sqlx::query(insert).bind(id.to_string()).bind(caller.id).bind(agent);
        let insert = insert.bind(network.name()).bind(phase.name()).bind(payload);
        let inserted = insert.bind(receipt_hash).execute(&self.0).await?;
        Ok(inserted.rows_affected() > 0)
    }

    /// Notes what the chain has taken; once.
    pub(crate) async fn submit(&self, id: Uuid, signature: &str, wait: Duration) -> Result<()> {
        let update = "UPDATE leash_events SET phase = 'submitted', signature = ?, due = ? \
             WHERE id = ? AND phase = 'prepared'";
        let update = sqlx::query(update).bind(signature).bind(now() + millis(wait));
        update.bind(id.to_string()).execute(&self.0).await.map(drop)
    }

    /// Transactions of which the chain is to be asked now. It is asked again after `wait`, if nothing
    /// comes of it.
    pub(crate) async fn awaited(&self, wait: Duration) -> Result<Vec<Awaited>> {
        let update = "UPDATE leash_events SET due = ? WHERE number IN (SELECT number \
             FROM leash_events WHERE phase = 'submitted' AND due <= ? ORDER BY due LIMIT 32) \
             RETURNING id, signature";
        let update = sqlx::query(update).bind(now() + millis(wait)).bind(now());
        let rows = update.fetch_all(&self.0).await?;
        rows.iter()
            .map(|row| Ok(Awaited { id: uuid(row, 0)?, signature: row.try_get(1)? }))
            .collect()
    }

    /// Notes what became of a transaction; once.
    pub(crate) async fn settle(&self, id: Uuid, error: Option<&str>) -> Result<()> {
        let phase = if error.is_some() { Phase::Failed } else { Phase::Confirmed };
        let update =
            "UPDATE leash_events SET phase = ?, error = ? WHERE id = ? AND phase = 'submitted'";
        let update = sqlx::query(update).bind(phase.name()).bind(error).bind(id.to_string());
        update.execute(&self.0).await.map(drop)
    }

    /// The caller's receipts of an agent, which are pulled by this.
    pub(crate) async fn pull(&self, caller: Caller, agent: &str) -> Result<Vec<Value>> {
        let update = "UPDATE leash_events SET phase = 'receipt.pulled' \
             WHERE owner = ? AND agent = ? AND phase = 'receipt.published'";
        sqlx::query(update).bind(caller.id).bind(agent).execute(&self.0).await?;
        let filter = "SELECT document FROM leash_shown \
             WHERE owner = ? AND agent = ? AND phase = 'receipt.pulled' ORDER BY number";
        let rows = sqlx::query(filter).bind(caller.id).bind(agent).fetch_all(&self.0).await?;
        rows.iter().map(document).collect()
    }

    /// The caller's own event, whatever is another's is not there.
    pub(crate) async fn find(&self, caller: Caller, id: Uuid) -> Result<Option<Value>> {
        let filter = "SELECT document FROM leash_shown WHERE owner = ? AND id = ?";
        let row = sqlx::query(filter).bind(caller.id).bind(id.to_string());
        row.fetch_optional(&self.0).await?.as_ref().map(document).transpose()
    }

    /// The caller's own events, oldest first.
    pub(crate) async fn list(&self, caller: Caller, filter: &Filter) -> Result<Vec<Value>> {
        let text = |id: Option<Uuid>| id.map(|id| id.to_string());
        let rows = sqlx::query(
            "SELECT document FROM leash_shown WHERE owner = ?1 AND (?2 IS NULL OR id = ?2) \
             AND (?3 IS NULL OR phase = ?3) AND (?4 IS NULL OR agent = ?4) AND (?5 IS NULL OR number \
             > (SELECT number FROM leash_shown WHERE owner = ?1 AND id = ?5)) \
             ORDER BY number LIMIT ?6",
        );
        let rows = rows.bind(caller.id).bind(text(filter.id)).bind(filter.phase.map(Phase::name));
        let rows = rows.bind(filter.agent.as_deref()).bind(text(filter.after));
        let rows = rows.bind(filter.limit.unwrap_or(100).min(100)).fetch_all(&self.0).await?;
        rows.iter().map(document).collect()
    }

    /// Subscribes an endpoint to the caller's events from now on.
    pub(crate) async fn subscribe(
        &self,
        caller: Caller,
        id: Uuid,
        url: &str,
        secret: &str,
    ) -> Result<()> {
        let insert = "INSERT INTO leash_webhooks (id, owner, url, secret) VALUES (?, ?, ?, ?) \
             ON CONFLICT DO NOTHING";
        let insert = sqlx::query(insert).bind(id.to_string()).bind(caller.id).bind(url);
        insert.bind(secret).execute(&self.0).await.map(drop)
    }

    /// Up to so many things to be delivered now. Each is due again after `first`, then after twice
    /// as long each time, but never later than after `longest`, until it is [`delivered`].
    ///
    /// [`delivered`]: Self::delivered
    pub(crate) async fn due(
        &self,
        at_most: usize,
        first: Duration,
        longest: Duration,
    ) -> Result<Vec<Delivery>> {
        let update = "UPDATE leash_deliveries \
             SET attempts = attempts + 1, due = ?1 + min(?2 << min(attempts, 20), ?3) \
             WHERE number IN (SELECT number FROM leash_deliveries WHERE due <= ?1 \
             ORDER BY due, number LIMIT ?4) \
             RETURNING number, body, \
             (SELECT url FROM leash_webhooks WHERE id = webhook_id), \
             (SELECT secret FROM leash_webhooks WHERE id = webhook_id)";
        let update = sqlx::query(update).bind(now()).bind(millis(first)).bind(millis(longest));
        let rows = update.bind(at_most as i64).fetch_all(&self.0).await?;
        let delivery = |row: &SqliteRow| {
            let (number, body) = (row.try_get(0)?, row.try_get(1)?);
            Ok(Delivery { number, body, url: row.try_get(2)?, secret: row.try_get(3)? })
        };
        rows.iter().map(delivery).collect()
    }

    /// Something was delivered.
    pub(crate) async fn delivered(&self, Delivery { number, .. }: Delivery) -> Result<()> {
        let delete = sqlx::query("DELETE FROM leash_deliveries WHERE number = ?").bind(number);
        delete.execute(&self.0).await.map(drop)
    }
}

/// What was answered is on the disk.
fn durable(file: &Path) -> SqliteConnectOptions {
    SqliteConnectOptions::new()
        .filename(file)
        .create_if_missing(true)
        .journal_mode(SqliteJournalMode::Wal)
        .synchronous(SqliteSynchronous::Full)
}

fn document(row: &SqliteRow) -> Result<Value> {
    serde_json::from_str(row.try_get(0)?).map_err(|error| sqlx::Error::Decode(error.into()))
}

fn uuid(row: &SqliteRow, column: usize) -> Result<Uuid> {
    Uuid::parse_str(row.try_get(column)?).map_err(|error| sqlx::Error::Decode(error.into()))
}

/// In milliseconds since 1970.
fn now() -> i64 {
    millis(SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default())
}

fn millis(time: Duration) -> i64 {
    i64::try_from(time.as_millis()).unwrap_or(i64::MAX)
}
