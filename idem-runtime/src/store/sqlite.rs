//! Records in an SQLite database.
//!
//! Calls that arrive while a transaction is being written are collected and written together by
//! the next one ([`queue`]); within a transaction, each call is decided on the row that it finds
//! and by the same code as in memory ([`batch`]).

mod batch;
mod manage;
mod queue;

use std::{
    fmt,
    path::Path,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use futures_util::future::BoxFuture;
use sqlx::{
    ConnectOptions as _, Connection as _, Row as _, SqlitePool,
    sqlite::{
        SqliteConnectOptions, SqliteConnection, SqliteJournalMode, SqlitePoolOptions,
        SqliteSynchronous,
    },
};

use self::queue::{Op, Queue, Reply};
use super::{
    Checkpoint, Claim, Claimed, Clock, Completion, Issue, Manage, Renewal, Store, StoreError,
    StoreErrorKind, Written, row::found,
};
use crate::{
    key::{Key, Token},
    record::{FORMAT, Record},
};

/// The name of this store in errors.
const NAME: &str = "sqlite";
/// The version of the tables that this release reads and writes.
const SCHEMA_VERSION: i64 = 1;
/// For how long a connection waits for the lock of another process.
const BUSY_TIMEOUT: Duration = Duration::from_secs(5);
/// How many rows a sweep or a purge removes in one transaction: a pause of a few milliseconds for the claims
/// that wait behind it.
const SWEPT_AT_ONCE: usize = 500;

/// A store in an SQLite database: for one machine, through restarts and crashes.
///
/// What it has answered is on the disk (`synchronous = FULL`). Any number of processes on one
/// machine can share a file; they go by its wall clock, see [`Clock::system`]. Do not put the file
/// on a network file system: [SQLite's locks do not work there](https://sqlite.org/useovernet.html).
///
/// Calls that arrive together are committed together, so that many requests share one flush of the
/// disk. A tokio task does this, on the runtime of the call that finds none at work; should that
/// runtime end in the middle, the calls it was working on fail as
/// [`Unreachable`](StoreErrorKind::Unreachable), and the next one starts another.
///
/// A clone is another handle to the same records.
///
/// ```
/// # async fn example() -> Result<(), Box<dyn std::error::Error>> {
/// # let directory = tempfile::tempdir()?;
/// # let path = directory.path().join("idem.db");
/// use idem_runtime::store::SqliteStore;
///
/// let store = SqliteStore::open(path).await?;
/// # drop(store);
/// # Ok(())
/// # }
/// # tokio::runtime::Runtime::new().unwrap().block_on(example()).unwrap();
/// ```
#[derive(Clone)]
pub struct SqliteStore(Arc<Shared>);

struct Shared {
    pool: SqlitePool,
    clock: Clock,
    queue: Mutex<Queue>,
    /// An in-memory database lives as long as any connection to it: this one does nothing else, so
    /// that the pool may lose and replace its own.
    anchor: Option<Arc<Mutex<SqliteConnection>>>,
}

impl SqliteStore {
    /// The tables, for teams that create them by migrations of their own. Running it again changes
    /// nothing.
    pub const SCHEMA: &str = include_str!("sqlite.sql");

    /// Opens a database file of idem's own, and creates it and its tables if they do not exist.
    ///
    /// # Errors
    ///
    /// When the file cannot be opened or written, or is not a database
    /// ([`Unreachable`](StoreErrorKind::Unreachable), [`Refused`](StoreErrorKind::Refused),
    /// [`Corrupt`](StoreErrorKind::Corrupt)), or its tables are those of a newer release
    /// ([`Newer`](StoreErrorKind::Newer)). `:memory:` and the empty path, which SQLite would take
    /// for a database that vanishes, are [`Refused`](StoreErrorKind::Refused): see
    /// [`in_memory`](Self::in_memory).
    pub async fn open(path: impl AsRef<Path>) -> Result<Self, StoreError> {
        let path = path.as_ref();
        if path.as_os_str() == ":memory:" {
            return Err(StoreError::new(NAME, StoreErrorKind::Refused));
        }
        // An absolute path cannot begin with `file:`, by which SQLite would take it for a URI.
        let path = std::path::absolute(path)
            .map_err(|error| StoreError::caused_by(NAME, StoreErrorKind::Refused, error))?;
        let options = connect_options()
            .filename(path)
            .create_if_missing(true)
            .journal_mode(SqliteJournalMode::Wal)
            .synchronous(SqliteSynchronous::Full);
        // One connection writes, the others read.
        let pool = pool_options(4).connect_lazy_with(options);
        // Two processes that create one file at the same time lock each other out for a moment, and
        // SQLite's busy time-out does not cover the change to write-ahead logging.
        let start = tokio::time::Instant::now();
        while let Err(error) = Self::create_tables(&pool).await {
            if error.kind() != StoreErrorKind::TimedOut || start.elapsed() > BUSY_TIMEOUT {
                return Err(error);
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        Ok(Self::assemble(pool, Clock::system(), None))
    }

    /// A database in memory, gone with its last handle: for tests.
    ///
    /// # Errors
    ///
    /// When SQLite cannot make one.
    pub async fn in_memory() -> Result<Self, StoreError> {
        // A name makes the database visible to all connections of this process.
        static NUMBER: AtomicU64 = AtomicU64::new(0);
        let name = format!("/idem-{}", NUMBER.fetch_add(1, Ordering::Relaxed));
        let options = connect_options().filename(name).vfs("memdb").create_if_missing(true);
        let anchor = options.connect().await.map_err(|error| failure(error).error())?;
        // One connection: such a database has no write-ahead log that would let one read while
        // another writes.
        let pool = pool_options(1).connect_lazy_with(options);
        Self::create_tables(&pool).await?;
        Ok(Self::assemble(pool, Clock::system(), Some(Arc::new(Mutex::new(anchor)))))
    }

    /// Keeps the records in a database of the application's, through its pool.
    ///
    /// The tables must exist: see [`create_tables`](Self::create_tables) and
    /// [`SCHEMA`](Self::SCHEMA). How durable and how concurrent the store is, the pool's options
    /// say: use `journal_mode = WAL` and `synchronous = FULL`, a busy time-out, and connections for
    /// at least one more than the transactions that the application holds at a time. A handler
    /// that has a write transaction open keeps the store from writing as long.
    ///
    /// # Errors
    ///
    /// [`Refused`](StoreErrorKind::Refused) when the tables do not exist,
    /// [`Newer`](StoreErrorKind::Newer) when they are those of a newer release, and whatever keeps
    /// the database from answering.
    pub async fn from_pool(pool: SqlitePool) -> Result<Self, StoreError> {
        let mut connection = pool.acquire().await.map_err(|error| failure(error).error())?;
        check_version(&mut connection).await?;
        drop(connection);
        Ok(Self::assemble(pool, Clock::system(), None))
    }

    /// Creates the tables if they do not exist.
    ///
    /// # Errors
    ///
    /// [`Newer`](StoreErrorKind::Newer) when the tables are those of a newer release, and whatever
    /// keeps the database from answering.
    pub async fn create_tables(pool: &SqlitePool) -> Result<(), StoreError> {
        let mut connection = pool.acquire().await.map_err(|error| failure(error).error())?;
        let created = create_tables(&mut connection).await;
        if created.is_err() {
            // It may have lost its transaction without noticing: see `queue::write_on`.
            connection.close_on_drop();
        }
        created
    }

    /// The same records, by another clock.
    ///
    /// All handles to one database must go by the same clock.
    #[must_use]
    pub fn with_clock(self, clock: impl Into<Clock>) -> Self {
        Self::assemble(self.0.pool.clone(), clock.into(), self.0.anchor.clone())
    }

    fn assemble(
        pool: SqlitePool,
        clock: Clock,
        anchor: Option<Arc<Mutex<SqliteConnection>>>,
    ) -> Self {
        Self(Arc::new(Shared { pool, clock, queue: Mutex::default(), anchor }))
    }

    /// Has a call written with all others that wait.
    async fn write<T>(&self, op: impl FnOnce(Reply<T>) -> Op) -> Result<T, StoreError> {
        let (reply, answer) = tokio::sync::oneshot::channel();
        queue::push(&self.0, op(reply))?;
        // The task went away with its runtime: the call was made or it was not.
        answer.await.unwrap_or_else(|gone| {
            Err(StoreError::caused_by(NAME, StoreErrorKind::Unreachable, gone))
        })
    }
}

/// The calls that wait carry responses, which are nobody's to see in a log.
impl fmt::Debug for SqliteStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SqliteStore")
            .field("pool", &self.0.pool)
            .field("clock", &self.0.clock)
            .finish_non_exhaustive()
    }
}

/// What all connections of idem's own have in common.
fn connect_options() -> SqliteConnectOptions {
    SqliteConnectOptions::new().busy_timeout(BUSY_TIMEOUT).disable_statement_logging()
}

/// Pools of idem's own: a connection to a file does not age, and needs no test before each use.
fn pool_options(connections: u32) -> SqlitePoolOptions {
    SqlitePoolOptions::new()
        .max_connections(connections)
        .acquire_timeout(2 * BUSY_TIMEOUT)
        .max_lifetime(None)
        .idle_timeout(None)
        .test_before_acquire(false)
}

async fn create_tables(connection: &mut SqliteConnection) -> Result<(), StoreError> {
    let failed = |error| failure(error).error();
    let mut transaction = connection.begin_with("BEGIN IMMEDIATE").await.map_err(failed)?;
    let exists = "SELECT count(*) FROM sqlite_schema WHERE type = 'table' AND name = 'idem_schema'";
    let tables: i64 =
        sqlx::query_scalar(exists).fetch_one(&mut *transaction).await.map_err(failed)?;
    if tables > 0 {
        // Before anything is created: this release's indices may not fit another's tables.
        check_version(&mut transaction).await?;
    }
    sqlx::raw_sql(SqliteStore::SCHEMA).execute(&mut *transaction).await.map_err(failed)?;
    transaction.commit().await.map_err(failed)
}

async fn check_version(connection: &mut SqliteConnection) -> Result<(), StoreError> {
    let version: i64 = sqlx::query("SELECT version FROM idem_schema WHERE id = 1")
        .fetch_one(connection)
        .await
        .and_then(|row| row.try_get(0))
        .map_err(|error| failure(error).error())?;
    match version {
        SCHEMA_VERSION => Ok(()),
        ..SCHEMA_VERSION => Err(StoreError::new(NAME, StoreErrorKind::Corrupt)),
        _ => Err(StoreError::new(NAME, StoreErrorKind::Newer)),
    }
}

/// A failure of the database, which several calls may have met together.
#[derive(Clone, Debug)]
struct Failure {
    kind: StoreErrorKind,
    source: Arc<sqlx::Error>,
}

impl Failure {
    fn error(&self) -> StoreError {
        StoreError::caused_by(NAME, self.kind, Arc::clone(&self.source))
    }
}

fn failure(error: sqlx::Error) -> Failure {
    Failure { kind: kind_of(&error), source: Arc::new(error) }
}

/// By SQLite's primary result code, <https://sqlite.org/rescode.html>.
fn kind_of(error: &sqlx::Error) -> StoreErrorKind {
    match error {
        sqlx::Error::Database(error) => {
            let code = error.code().and_then(|code| code.parse::<u32>().ok());
            match code.map(|extended| extended & 0xff) {
                // BUSY, LOCKED, PROTOCOL: another process holds a lock.
                Some(5 | 6 | 15) => StoreErrorKind::TimedOut,
                // NOMEM, INTERRUPT, IOERR, CANTOPEN.
                Some(7 | 9 | 10 | 14) => StoreErrorKind::Unreachable,
                // FULL: the disk, or `max_page_count`.
                Some(13) => StoreErrorKind::Full,
                // TOOBIG.
                Some(18) => StoreErrorKind::TooLarge,
                // CORRUPT, NOTADB.
                Some(11 | 26) => StoreErrorKind::Corrupt,
                _ => StoreErrorKind::Refused,
            }
        }
        sqlx::Error::PoolTimedOut => StoreErrorKind::TimedOut,
        // The last two are a connection that was left within a transaction; another one is not.
        sqlx::Error::PoolClosed
        | sqlx::Error::WorkerCrashed
        | sqlx::Error::Io(_)
        | sqlx::Error::InvalidSavePointStatement
        | sqlx::Error::BeginFailed => StoreErrorKind::Unreachable,
        sqlx::Error::ColumnDecode { .. } | sqlx::Error::Decode(_) | sqlx::Error::RowNotFound => {
            StoreErrorKind::Corrupt
        }
        _ => StoreErrorKind::Refused,
    }
}

impl Store for SqliteStore {
    fn claim<'a>(&'a self, claim: &'a Claim) -> BoxFuture<'a, Result<Claimed, StoreError>> {
        Box::pin(self.write(|reply| Op::Claim(Box::new(claim.clone()), reply)))
    }

    fn issue<'a>(&'a self, issue: &'a Issue) -> BoxFuture<'a, Result<Written, StoreError>> {
        Box::pin(self.write(|reply| Op::Issue(Box::new(issue.clone()), reply)))
    }

    fn checkpoint<'a>(
        &'a self,
        checkpoint: &'a Checkpoint,
    ) -> BoxFuture<'a, Result<Written, StoreError>> {
        Box::pin(self.write(|reply| Op::Checkpoint(Box::new(checkpoint.clone()), reply)))
    }

    fn complete<'a>(
        &'a self,
        completion: &'a Completion,
    ) -> BoxFuture<'a, Result<Written, StoreError>> {
        Box::pin(self.write(|reply| Op::Complete(Box::new(completion.clone()), reply)))
    }

    fn release<'a>(
        &'a self,
        key: &'a Key,
        token: &'a Token,
    ) -> BoxFuture<'a, Result<Written, StoreError>> {
        Box::pin(self.write(|reply| Op::Release(*key, *token, reply)))
    }

    fn forget<'a>(
        &'a self,
        key: &'a Key,
        token: &'a Token,
    ) -> BoxFuture<'a, Result<Written, StoreError>> {
        Box::pin(self.write(|reply| Op::Forget(*key, *token, reply)))
    }

    fn renew<'a>(&'a self, claims: &'a [Renewal]) -> BoxFuture<'a, Result<Vec<bool>, StoreError>> {
        Box::pin(async move {
            if claims.is_empty() {
                return Ok(Vec::new());
            }
            self.write(|reply| Op::Renew(claims.to_vec(), reply)).await
        })
    }

    /// Does not wait for what is being written: in a file, readers and the writer do not block each
    /// other.
    fn read<'a>(&'a self, key: &'a Key) -> BoxFuture<'a, Result<Option<Record>, StoreError>> {
        Box::pin(async move {
            let failed = |error| failure(error).error();
            let mut connection = self.0.pool.acquire().await.map_err(failed)?;
            let mut rows = batch::load(&mut connection, &[*key]).await.map_err(failed)?;
            let now = self.0.clock.now();
            let row = rows.remove(key).transpose();
            let record = row
                .and_then(|row| Ok(found(row.as_ref(), FORMAT, now)?.map(|row| row.record(now))));
            record.map_err(|kind| StoreError::new(NAME, kind))
        })
    }

    fn sweep(&self, limit: usize) -> BoxFuture<'_, Result<usize, StoreError>> {
        Box::pin(async move {
            let mut removed = 0;
            while removed < limit {
                let at_once = SWEPT_AT_ONCE.min(limit - removed);
                let swept = self.write(|reply| Op::Sweep(at_once, reply)).await?;
                removed += swept;
                if swept < at_once {
                    break;
                }
            }
            Ok(removed)
        })
    }

    fn manage(&self) -> Option<&dyn Manage> {
        Some(self)
    }
}

#[cfg(test)]
mod tests;
