//! Records in a PostgreSQL database, which any number of processes share.
//!
//! Each call is one statement, which decides and writes ([`calls`]); here is what goes on around
//! it: connections, time-outs, and what is asked again.

mod calls;
mod manage;
mod rows;
mod schema;
mod transaction;
mod wake;

use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicI64, Ordering},
    },
    time::Duration,
};

use futures_util::future::BoxFuture;
use sqlx::{
    ConnectOptions as _, Connection as _, PgConnection, PgPool, Postgres,
    pool::PoolConnection,
    postgres::{PgConnectOptions, PgPoolOptions},
};
use tokio::{
    sync::OnceCell,
    time::{sleep, timeout},
};

use self::calls::{Call, Fault, Forget, Numbered, Release, Session, Sweep};
pub use self::schema::SchemaMismatch;
use super::{
    Bundled, Checkpoint, Claim, Claimed, Completion, Issue, Manage, Renewal, Store, StoreError,
    StoreErrorKind, Transact, Wake, Written,
    lanes::{Carrier, Lanes, carry},
};
use crate::{
    key::{Key, Token},
    record::Record,
};

/// The name of this store in errors.
const NAME: &str = "postgres";
/// How long a call may take, with all that is asked again. An engine's own time-out is shorter
/// unless it was told otherwise.
const TIMEOUT: Duration = Duration::from_secs(10);
/// How long a call waits for a connection, also where the server refuses any: sqlx goes on trying. Within
/// the time-out of an engine, so that the reason is told.
const ACQUIRE_TIMEOUT: Duration = Duration::from_secs(3);
/// How often a call is made at the most, if each time somebody else was faster.
const ATTEMPTS: u32 = 12;
/// How many rows are removed by one statement, so that none of them is locked for long.
const SWEPT_AT_ONCE: usize = 500;

/// A store in a PostgreSQL database (13 or newer): for any number of processes on any number of
/// machines.
///
/// All of them go by the clock of the database server, and what is answered is as durable as its
/// `synchronous_commit` says; leave it on. After a failover to a replica that had not received
/// everything, what it had not received never happened: use synchronous replication if that must
/// not be.
///
/// ```no_run
/// # async fn example() -> Result<(), Box<dyn std::error::Error>> {
/// use idem_runtime::store::PostgresStore;
///
/// let store = PostgresStore::connect("postgres://app@db.internal/app").await?;
/// store.create_schema().await?;
/// # Ok(())
/// # }
/// ```
///
/// # Tables
///
/// [`create_schema`](Self::create_schema) creates them, or a migration of yours that contains
/// [`SCHEMA`](Self::SCHEMA). They are named `idem_records` and `idem_schema`, in the first schema of
/// the search path, so that another schema is a matter of the URL:
/// `postgres://app@db.internal/app?options=-csearch_path%3Didem`.
///
/// # Connections
///
/// [`connect`](Self::connect) makes a pool of its own; [`new`](Self::new) takes the application's,
/// which then should know:
///
///  - A claim, and later a completion, takes a connection for one statement; none is held while a
///    handler runs, transactional ones aside. A handler that holds one itself needs another one to
///    be free.
///  - There are as many statements under way at once as pay: few where the database is near and its
///    disk fast, up to the size of the pool where a statement mostly waits. What comes beyond that
///    travels together, in one statement ([`with_lanes`](Self::with_lanes),
///    [`bundled`](Self::bundled)). A statement that waits for a row holds up all that travel in it:
///    pools of idem's own set `lock_timeout = 1s`, after which each goes by itself.
///  - `test_before_acquire`, which sqlx has on by default, costs each call one more round trip (a
///    fifth of the throughput on a fast network). Without it, a connection that has died is noticed
///    by the call that meets it, which then is made once more on one that was tried: every call can
///    be made twice. Turn it off in a pool that only idem uses.
///  - PostgreSQL keeps the plan of a prepared statement, and plans for a table as it is: while that
///    is almost empty, to read through it is cheapest, and stays the plan for up to a minute after
///    a burst. Pools of idem's own set `enable_seqscan = off`, and `plan_cache_mode =
///    force_generic_plan`, since no plan depends on what is asked; set them in a pool that only idem
///    uses.
///  - TLS is sqlx's: without one of its features `tls-rustls` or `tls-native-tls`, which your own
///    `Cargo.toml` may turn on (`sqlx = { version = "0.9", features = ["tls-rustls"] }`),
///    connections are not encrypted, and `sslmode=require` is refused.
///
/// # Poolers
///
/// Behind a pooler in *transaction* mode (PgBouncer and its like), a statement that one connection
/// has prepared is looked for on another. PgBouncer ≥ 1.21 takes care of that if
/// `max_prepared_statements` is set; for others, say
/// [`through_transaction_pooler`](Self::through_transaction_pooler). Without it the first call looks
/// for such a pooler, on two connections beside those of the pool, and fails
/// ([`Refused`](StoreErrorKind::Refused)) where it finds one; a pooler that is busy at that moment
/// may escape it. [`connect`](Self::connect) refuses poolers of every kind, which keep its settings
/// from the server: use [`new`](Self::new) there. (For sqlx, PgBouncer needs
/// `ignore_startup_parameters = extra_float_digits`.)
///
/// LISTEN does not pass a transaction pooler: requests that wait for an owner in another process
/// then look at the record now and then.
///
/// A clone is another handle to the same records.
#[derive(Clone, Debug)]
pub struct PostgresStore(Arc<Shared>);

struct Shared {
    pool: PgPool,
    /// Whether connections may keep prepared statements.
    prepares: bool,
    lanes: Lanes,
    /// Set once the tables were found to be those of this release.
    checked: OnceCell<()>,
}

impl fmt::Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Shared")
            .field("pool", &self.pool)
            .field("prepares", &self.prepares)
            .finish_non_exhaustive()
    }
}

impl PostgresStore {
    /// The tables, for teams that create them by migrations of their own. Running it again changes
    /// nothing.
    pub const SCHEMA: &str = include_str!("postgres.sql");

    /// Connects to a database, with a pool of idem's own of up to ten connections.
    ///
    /// The URL is [sqlx's](https://docs.rs/sqlx/latest/sqlx/postgres/struct.PgConnectOptions.html).
    /// The tables need not exist yet, see [`create_schema`](Self::create_schema).
    ///
    /// # Errors
    ///
    /// When the URL cannot be read or the database refuses
    /// ([`Refused`](StoreErrorKind::Refused)), or cannot be reached. It is refused, too, if a pooler
    /// in between keeps the connection's settings from the server.
    pub async fn connect(url: &str) -> Result<Self, StoreError> {
        let options: PgConnectOptions = url.parse().map_err(failure)?;
        let options = options.disable_statement_logging().options([
            // See "Connections" above. Where there is no index, the table is read all the same;
            // its cost then looks enormous, which is no reason to compile the plan.
            ("enable_seqscan", "off"),
            ("jit", "off"),
            // Whoever called has given up by then.
            ("statement_timeout", "10s"),
            // Who waits for a row holds up all that travel in the same statement; after that, each
            // goes by itself.
            ("lock_timeout", "1s"),
            // The plan of a statement depends on nothing that is asked.
            ("plan_cache_mode", "force_generic_plan"),
        ]);
        let trying = async {
            let mut connection = options.connect().await?;
            let setting = sqlx::query_scalar("SELECT current_setting('enable_seqscan')");
            let setting: String = setting.persistent(false).fetch_one(&mut connection).await?;
            connection.close().await?;
            Ok(setting)
        };
        let setting = timeout(TIMEOUT, trying).await.unwrap_or(Err(sqlx::Error::PoolTimedOut));
        if setting.map_err(failure)? != "off" {
            let cause = "the connection's settings do not reach the server: is there a pooler?";
            return Err(StoreError::caused_by(NAME, StoreErrorKind::Refused, cause));
        }
        let pool = PgPoolOptions::new()
            .max_connections(10)
            .acquire_timeout(ACQUIRE_TIMEOUT)
            .test_before_acquire(false)
            .connect_lazy_with(options);
        Ok(Self::new(pool))
    }

    /// Keeps the records in a database of the application's, through its pool.
    pub fn new(pool: PgPool) -> Self {
        let lanes = pool.options().get_max_connections();
        Self::assemble(pool, true, lanes)
    }

    /// The same records, with at most so many statements for claims and completions under way at
    /// once: those beyond travel together.
    ///
    /// By default as many as pay, judged by what a statement takes that is alone, and no more than the
    /// pool has connections.
    ///
    /// Other handles to this store go on as they are, and their calls do not travel with these.
    #[must_use]
    pub fn with_lanes(self, at_most: u32) -> Self {
        Self::assemble(self.0.pool.clone(), self.0.prepares, at_most)
    }

    /// How many calls have travelled together, since this store was made.
    pub fn bundled(&self) -> Bundled {
        self.0.lanes.bundled()
    }

    /// The same records through a pooler in transaction mode that knows nothing of prepared
    /// statements.
    ///
    /// Each statement is then prepared anew, in a transaction of its own, which takes three more
    /// round trips.
    #[must_use]
    pub fn through_transaction_pooler(self) -> Self {
        Self::assemble(self.0.pool.clone(), false, self.0.lanes.most())
    }

    fn assemble(pool: PgPool, prepares: bool, lanes: u32) -> Self {
        let lanes = Lanes::new(lanes);
        Self(Arc::new(Shared { pool, prepares, lanes, checked: OnceCell::new() }))
    }

    /// Makes a call, after the tables were found to be those of this release.
    async fn ask<C: Call + ?Sized>(&self, call: &C) -> Result<C::Answer, StoreError> {
        self.ready().await?;
        self.ask_unchecked(call).await
    }

    /// Finds out, once, whether connections and tables are what this release needs.
    async fn ready(&self) -> Result<(), StoreError> {
        let check = || async {
            self.check_statements().await?;
            self.check_schema().await
        };
        self.0.checked.get_or_try_init(check).await.map(drop)
    }

    /// Refuses to share connections with others without knowing. Two new connections prepare their
    /// first statement, which both give the same name: behind a pooler in transaction mode that is
    /// not busy, both get to the same connection of the server.
    ///
    /// Mixed-up statements fail, as a rule; in the worst case one is executed in the place of
    /// another.
    async fn check_statements(&self) -> Result<(), StoreError> {
        if !self.0.prepares {
            return Ok(());
        }
        let options = self.0.pool.connect_options();
        let checking = async {
            let mut first = options.connect().await?;
            sqlx::query("SELECT 1").execute(&mut first).await?;
            let mut second = options.connect().await?;
            sqlx::query("SELECT 1").execute(&mut second).await?;
            first.close().await?;
            second.close().await
        };
        match timeout(TIMEOUT, checking).await {
            Ok(Err(error)) if is_mixed_up(&error) => Err(failure(error)),
            // Whatever else is the matter, the call itself will meet it.
            _ => Ok(()),
        }
    }

    /// Makes a call, once more on another connection if that was lost, and again where somebody else
    /// was faster.
    async fn ask_unchecked<C: Call + ?Sized>(&self, call: &C) -> Result<C::Answer, StoreError> {
        let asking = async {
            let mut lost = false;
            let mut attempt = 0;
            loop {
                attempt += 1;
                let mut in_use = self.acquire(lost).await?;
                let answer = self.once(call, &mut in_use.connection).await;
                in_use.well = match &answer {
                    Err(Fault::Database(error)) => kind_of(error) != StoreErrorKind::Unreachable,
                    _ => true,
                };
                drop(in_use);
                match answer {
                    Ok(Some(answer)) => return Ok(answer),
                    Ok(None) if attempt < ATTEMPTS => {}
                    Ok(None) => return Err(StoreError::new(NAME, StoreErrorKind::TimedOut)),
                    Err(Fault::Record(kind)) => return Err(StoreError::new(NAME, kind)),
                    Err(Fault::Database(error)) => match kind_of(&error) {
                        // Whether it was done is not known, and every call can be made twice.
                        StoreErrorKind::Unreachable if !lost => lost = true,
                        _ if is_conflict(&error) && attempt < ATTEMPTS => {}
                        _ => return Err(failure(error)),
                    },
                }
                if attempt > 1 {
                    let at_most = 1 << attempt.min(6);
                    sleep(Duration::from_micros(rand::random_range(0..at_most * 500))).await;
                }
            }
        };
        timeout(TIMEOUT, asking).await.unwrap_or_else(|elapsed| {
            Err(StoreError::caused_by(NAME, StoreErrorKind::TimedOut, elapsed))
        })
    }

    async fn once<C: Call + ?Sized>(
        &self,
        call: &C,
        connection: &mut PgConnection,
    ) -> Result<Option<C::Answer>, Fault> {
        if self.0.prepares {
            return call.once(&mut Session { connection, prepares: true }).await;
        }
        // Within a transaction, a pooler stays with one connection.
        let mut transaction = connection.begin().await?;
        let mut session = Session { connection: &mut transaction, prepares: false };
        let answer = call.once(&mut session).await?;
        transaction.commit().await?;
        Ok(answer)
    }

    /// A connection; one that was tried if `lost` says that another one has died, since those
    /// beside it may have too.
    async fn acquire(&self, lost: bool) -> Result<InUse, StoreError> {
        loop {
            let connection = self.0.pool.acquire().await.map_err(failure)?;
            let mut in_use = InUse { connection, well: false };
            if !lost || in_use.connection.ping().await.is_ok() {
                return Ok(in_use);
            }
        }
    }
}

/// A connection that a call uses. It is closed unless the call has ended well: one whose statement
/// nobody waits for any more may never answer, as after a failover that left its host dark.
struct InUse {
    connection: PoolConnection<Postgres>,
    well: bool,
}

impl Drop for InUse {
    fn drop(&mut self) {
        if !self.well {
            self.connection.close_on_drop();
        }
    }
}

fn failure(error: sqlx::Error) -> StoreError {
    let kind = kind_of(&error);
    if is_mixed_up(&error) {
        return StoreError::caused_by(NAME, kind, MixedUp(error));
    }
    StoreError::caused_by(NAME, kind, error)
}

/// Whether a prepared statement is not there, or is already: it was prepared on another connection.
fn is_mixed_up(error: &sqlx::Error) -> bool {
    // invalid_sql_statement_name, duplicate_prepared_statement.
    matches!(state_of(error).as_deref(), Some("26000" | "42P05"))
}

/// Statements of one connection have met those of another.
#[derive(Debug, thiserror::Error)]
#[error(
    "prepared statements are mixed up: behind a pooler in transaction mode, use \
     `PostgresStore::through_transaction_pooler`"
)]
struct MixedUp(#[source] sqlx::Error);

fn state_of(error: &sqlx::Error) -> Option<String> {
    error.as_database_error()?.code().map(String::from)
}

/// Whether two statements were in each other's way, so that the same may succeed now.
fn is_conflict(error: &sqlx::Error) -> bool {
    // serialization_failure, deadlock_detected, lock_not_available.
    matches!(state_of(error).as_deref(), Some("40001" | "40P01" | "55P03"))
}

/// By SQLSTATE, <https://www.postgresql.org/docs/current/errcodes-appendix.html>.
fn kind_of(error: &sqlx::Error) -> StoreErrorKind {
    match error {
        sqlx::Error::Database(_) => match state_of(error).as_deref().unwrap_or_default() {
            // What a pooler or server says to a client that it does not understand.
            "08P01" => StoreErrorKind::Refused,
            // connection_exception; operator_intervention (shut down, starting up) but for
            // query_canceled and database_dropped; too_many_connections; out_of_memory; io_error;
            // read_only_sql_transaction, which is how a server answers that was the primary before
            // a failover; a session that was timed out.
            "57014" => StoreErrorKind::TimedOut,
            "57P04" => StoreErrorKind::Refused,
            "53300" | "53200" | "58030" | "25006" | "25P03" => StoreErrorKind::Unreachable,
            state if state.starts_with("08") || state.starts_with("57") => {
                StoreErrorKind::Unreachable
            }
            // In each other's way for too long.
            "55P03" | "40001" | "40P01" => StoreErrorKind::TimedOut,
            "53100" => StoreErrorKind::Full,
            // program_limit_exceeded.
            state if state.starts_with("54") => StoreErrorKind::TooLarge,
            // data_corrupted, index_corrupted.
            "XX001" | "XX002" => StoreErrorKind::Corrupt,
            _ => StoreErrorKind::Refused,
        },
        sqlx::Error::PoolTimedOut => StoreErrorKind::TimedOut,
        sqlx::Error::Io(_)
        | sqlx::Error::Protocol(_)
        | sqlx::Error::PoolClosed
        | sqlx::Error::WorkerCrashed => StoreErrorKind::Unreachable,
        sqlx::Error::ColumnDecode { .. } | sqlx::Error::Decode(_) | sqlx::Error::RowNotFound => {
            StoreErrorKind::Corrupt
        }
        _ => StoreErrorKind::Refused,
    }
}

impl Carrier for PostgresStore {
    const NAME: &str = NAME;

    fn lanes(&self) -> &Lanes {
        &self.0.lanes
    }

    fn patience(&self) -> Duration {
        TIMEOUT
    }

    async fn claim_one(&self, claim: &Claim) -> Result<Claimed, StoreError> {
        self.ask_unchecked(claim).await
    }

    async fn complete_one(&self, completion: &Completion) -> Result<Written, StoreError> {
        self.ask_unchecked(completion).await
    }

    async fn claim_all(&self, claims: &[Claim]) -> Result<Vec<Option<Claimed>>, StoreError> {
        self.ask_unchecked(claims).await
    }

    async fn complete_all(
        &self,
        completions: &[Completion],
    ) -> Result<Vec<Option<Written>>, StoreError> {
        self.ask_unchecked(completions).await
    }
}

impl Store for PostgresStore {
    fn claim<'a>(&'a self, claim: &'a Claim) -> BoxFuture<'a, Result<Claimed, StoreError>> {
        Box::pin(async move {
            self.ready().await?;
            carry(self, claim).await
        })
    }

    fn issue<'a>(&'a self, issue: &'a Issue) -> BoxFuture<'a, Result<Written, StoreError>> {
        Box::pin(self.ask(issue))
    }

    fn checkpoint<'a>(
        &'a self,
        checkpoint: &'a Checkpoint,
    ) -> BoxFuture<'a, Result<Written, StoreError>> {
        // Numbered as they are made, since they may reach the database in another order. A token is
        // of one process, and so are the numbers.
        static NUMBER: AtomicI64 = AtomicI64::new(1);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        Box::pin(async move { self.ask(&Numbered { checkpoint, number }).await })
    }

    fn complete<'a>(
        &'a self,
        completion: &'a Completion,
    ) -> BoxFuture<'a, Result<Written, StoreError>> {
        Box::pin(async move {
            self.ready().await?;
            carry(self, completion).await
        })
    }

    fn release<'a>(
        &'a self,
        key: &'a Key,
        token: &'a Token,
    ) -> BoxFuture<'a, Result<Written, StoreError>> {
        Box::pin(async move { self.ask(&Release { key, token }).await })
    }

    fn forget<'a>(
        &'a self,
        key: &'a Key,
        token: &'a Token,
    ) -> BoxFuture<'a, Result<Written, StoreError>> {
        Box::pin(async move { self.ask(&Forget { key, token }).await })
    }

    fn renew<'a>(&'a self, claims: &'a [Renewal]) -> BoxFuture<'a, Result<Vec<bool>, StoreError>> {
        Box::pin(async move {
            if claims.is_empty() {
                return Ok(Vec::new());
            }
            self.ask(claims).await
        })
    }

    fn read<'a>(&'a self, key: &'a Key) -> BoxFuture<'a, Result<Option<Record>, StoreError>> {
        Box::pin(self.ask(key))
    }

    fn sweep(&self, limit: usize) -> BoxFuture<'_, Result<usize, StoreError>> {
        Box::pin(async move {
            let mut removed = 0;
            while removed < limit {
                let at_once = SWEPT_AT_ONCE.min(limit - removed);
                let swept = self.ask(&Sweep(at_once)).await?;
                removed += swept;
                if swept < at_once {
                    break;
                }
            }
            Ok(removed)
        })
    }

    fn is_remote(&self) -> bool {
        true
    }

    fn manage(&self) -> Option<&dyn Manage> {
        Some(self)
    }

    fn transact(&self) -> Option<&dyn Transact> {
        Some(self)
    }

    fn wake(&self) -> Option<&dyn Wake> {
        Some(self)
    }
}
