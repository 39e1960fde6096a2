//! Records in a MySQL or MariaDB database.
//!
//! What is asked of the store is a [`Call`] ([`calls`]), which a connection of the pool carries out
//! within a bound of time and makes again where that may help ([`MySqlStore::call`]). The rows are
//! in [`row`], and what the server's errors mean in [`failure`].

mod calls;
mod failure;
mod manage;
mod many;
mod row;
mod schema;
mod transaction;

use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use futures_util::future::BoxFuture;
use sqlx::{
    ConnectOptions as _, MySql, MySqlConnection, MySqlPool,
    mysql::{MySqlConnectOptions, MySqlPoolOptions},
    pool::PoolConnection,
};
use tokio::time::{sleep, timeout};

use self::{
    calls::{Call, Change, Complete, CompleteAll, Open, OpenAll, Read, Renew, Sweep},
    failure::{Failure, Remedy},
    schema::{Check, CreateSchema},
};
use super::{
    Bundled, Checkpoint, Claim, Claimed, Completion, Issue, Manage, Renewal, Store, StoreError,
    StoreErrorKind, Transact, Written,
    lanes::{Carrier, Lanes, carry},
};
use crate::{
    key::{Key, Token},
    record::Record,
};

/// The name of this store in errors.
const NAME: &str = "mysql";
/// The version of the tables that this release reads and writes.
const SCHEMA_VERSION: u32 = 1;
/// How long a call may take with all that is tried, unless the application says another time.
const PATIENCE: Duration = Duration::from_secs(5);
/// How many connections a pool of idem's own has.
const CONNECTIONS: u32 = 16;
/// How often a call is made again after a deadlock or a broken connection.
const RETRIES: u32 = 10;
/// What a statement may take up in a packet beside what its call carries.
const PACKET_MARGIN: usize = 1024;
/// How many rows a sweep or a purge removes at once. A claim on one of them waits as long: ten to
/// fifteen milliseconds with payloads of 1 KiB, where it was measured.
const SWEPT_AT_ONCE: usize = 500;

/// A store in a MySQL (from 8.0 on) or MariaDB (from 10.6 on) database, for any number of
/// processes.
///
/// It keeps to statements that both servers document. Its tests run on MariaDB 10.11; they take the
/// URL of any other server, a MySQL one too.
///
/// # What it asks of the server
///
/// A claim on a fresh key is one statement and one round trip, and so is a completion. A claim that
/// finds a record takes a second statement, which reads it, and a third if it is granted. There are
/// as many under way at once as pay: few where the database is near and its disk fast, up to the
/// size of the pool where a statement mostly waits. What comes beyond that travels together, in one
/// statement ([`with_lanes`](Self::with_lanes), [`bundled`](Self::bundled)). Nothing
/// is locked for longer than a statement, a claim that is refused writes nothing, and no connection
/// is held while a handler runs, transactional ones aside. Time is the server's own (in UTC, so that
/// no time zone and no change to summer time matters); of several servers, that of the one that
/// takes the writes.
///
/// A call is made again when the server gave up its statement for another one's sake (a deadlock)
/// and when the connection turns out to be broken: all calls can be, since each goes by its
/// claimant's token. There is no message from process to process, so a request that waits for
/// another one looks at the record now and then.
///
/// How durable an answer is, the server's settings say: with `innodb_flush_log_at_trx_commit = 1`
/// and `sync_binlog = 1` it is on the disk. A replica that takes over before it has received the
/// last claims does not know them, and their requests may run a second time: use semi-synchronous
/// or group replication where that matters. Replicated by statement (`binlog_format = STATEMENT`,
/// which is nobody's default), each renewal and each sweep leaves a warning in the server's log.
///
/// # Connections
///
/// From a URL ([`connect`](Self::connect)) the store makes a pool of its own. An encrypted
/// connection needs one of sqlx's `tls-…` features, which the application names in a dependency of
/// its own, `sqlx = { version = "0.9", features = ["tls-rustls"] }`; cargo builds sqlx once, with
/// the features of all. Without such a feature `ssl-mode=REQUIRED` is refused, and an account under
/// MySQL's `caching_sha2_password` needs the feature `mysql-rsa`.
///
/// Over a pool of the application's ([`new`](Self::new)) the store shares its connections and their
/// settings. Three of these are worth a look: `test_before_acquire`, which is on unless it is
/// turned off, costs each call a round trip that this store does without; `acquire_timeout` is 30
/// seconds unless it is set, and the store's own bound is the shorter one; and
/// `innodb_lock_wait_timeout`, a setting of the server's, is best one second, as in pools of idem's
/// own: a statement that waits for a row holds up all calls that travel in it, and each goes by itself
/// after that.
///
/// A clone is another handle to the same records.
///
/// ```no_run
/// # async fn example() -> Result<(), Box<dyn std::error::Error>> {
/// use idem_runtime::store::MySqlStore;
///
/// let store = MySqlStore::connect("mysql://user:password@localhost/payments").await?;
/// store.create_schema().await?;
/// # Ok(())
/// # }
/// ```
#[derive(Clone)]
pub struct MySqlStore(Arc<Shared>);

struct Shared {
    pool: MySqlPool,
    patience: Duration,
    lanes: Lanes,
    /// Whether server, session and tables were found to be what the store needs.
    ready: AtomicBool,
}

impl MySqlStore {
    /// The tables, for teams that create them by migrations of their own. Running it again changes
    /// nothing.
    pub const SCHEMA: &str = include_str!("mysql.sql");

    /// Connects to the database that a URL names, with a pool of the store's own of at most 16
    /// connections.
    ///
    /// The tables need not exist yet: see [`create_schema`](Self::create_schema).
    ///
    /// # Errors
    ///
    /// When the URL is none, or the server cannot be reached or refuses the account.
    pub async fn connect(url: &str) -> Result<Self, StoreError> {
        let refused = |error| Failure::from(error).into_error();
        let options: MySqlConnectOptions = url.parse().map_err(refused)?;
        let pool = MySqlPoolOptions::new()
            .max_connections(CONNECTIONS)
            .acquire_timeout(PATIENCE)
            // It is found broken when it is used, and the call made again on another one.
            .test_before_acquire(false)
            .after_connect(|connection, _| {
                Box::pin(async move {
                    // Who waits for a row holds up all that travel in the same statement; after
                    // that, each goes by itself, as often as its caller waits.
                    let settings = "SET SESSION autocommit = 1, sql_safe_updates = 0,
                                    innodb_lock_wait_timeout = 1";
                    sqlx::raw_sql(settings).execute(connection).await.map(drop)
                })
            })
            .connect_with(options.disable_statement_logging());
        Ok(Self::new(pool.await.map_err(refused)?))
    }

    /// Keeps the records in a database of the application's, through its pool.
    pub fn new(pool: MySqlPool) -> Self {
        let lanes = pool.options().get_max_connections();
        Self::assemble(pool, PATIENCE, lanes)
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
        Self::assemble(self.0.pool.clone(), self.0.patience, at_most)
    }

    /// How many calls have travelled together, since this store was made.
    pub fn bundled(&self) -> Bundled {
        self.0.lanes.bundled()
    }

    /// The same records, asked for no longer than this long a call, with all that is tried.
    ///
    /// Five seconds unless it is said. A sweep is several calls.
    #[must_use]
    pub fn with_timeout(self, time: Duration) -> Self {
        Self::assemble(self.0.pool.clone(), time, self.0.lanes.most())
    }

    fn assemble(pool: MySqlPool, patience: Duration, lanes: u32) -> Self {
        let lanes = Lanes::new(lanes);
        Self(Arc::new(Shared { pool, patience, lanes, ready: AtomicBool::new(false) }))
    }

    /// Creates the tables if they do not exist. Any number of processes may do so at once.
    ///
    /// The account needs the right to create tables. One that does not have it can use
    /// [`SCHEMA`](Self::SCHEMA) in a migration of its own.
    ///
    /// # Errors
    ///
    /// As for [`check`](Self::check).
    pub async fn create_schema(&self) -> Result<(), StoreError> {
        self.call(&CreateSchema).await?;
        self.check().await
    }

    /// Finds out whether the store can work: whether server and connection are what it needs, and
    /// the tables those that this release knows.
    ///
    /// The first calls do so until one has found that it can, so this is for whoever wants to know
    /// when the program starts.
    ///
    /// # Errors
    ///
    /// [`Refused`](StoreErrorKind::Refused) when the tables do not exist, the server is too old, or
    /// the connections commit nothing by themselves, read what others have not committed, or make
    /// no statements on many rows; [`Newer`](StoreErrorKind::Newer) when the tables are those of a
    /// newer release; and whatever keeps the server from answering. The source says it in words.
    pub async fn check(&self) -> Result<(), StoreError> {
        self.call(&Check).await
    }

    /// Makes a call, and makes it again where that may help, within the bound of time.
    async fn call<C: Call>(&self, call: &C) -> Result<C::Answer, StoreError> {
        let mut last = None;
        match timeout(self.0.patience, self.try_often(call, &mut last)).await {
            Ok(answer) => answer.map_err(Failure::into_error),
            // Why it was tried again says more than that it took too long.
            Err(elapsed) => Err(last.map_or_else(
                || StoreError::caused_by(NAME, StoreErrorKind::TimedOut, elapsed),
                Failure::into_error,
            )),
        }
    }

    async fn try_often<C: Call>(
        &self,
        call: &C,
        last: &mut Option<Failure>,
    ) -> Result<C::Answer, Failure> {
        let mut tries = 0;
        loop {
            let connection = self.0.pool.acquire().await?;
            let mut held = Held { connection, answered: false };
            if tries > 0 {
                match fits(call, &mut held.connection).await {
                    Ok(()) => {}
                    // The idle connections of a server that went away are all broken.
                    Err(failure) if failure.remedy() == Remedy::Elsewhere => continue,
                    Err(failure) => {
                        held.answered = true;
                        return Err(failure);
                    }
                }
            }
            let failure = match self.try_once(call, &mut held.connection).await {
                Ok(answer) => {
                    held.answered = true;
                    return Ok(answer);
                }
                Err(failure) => failure,
            };
            if failure.remedy() != Remedy::Elsewhere {
                held.answered = true;
            }
            if failure.remedy() == Remedy::None || tries == RETRIES {
                return Err(failure);
            }
            *last = Some(failure);
            tries += 1;
            // Those that were in each other's way do not come back together.
            sleep(Duration::from_millis(rand::random_range(0..=2 * u64::from(tries)))).await;
        }
    }

    async fn try_once<C: Call>(
        &self,
        call: &C,
        connection: &mut MySqlConnection,
    ) -> Result<C::Answer, Failure> {
        if C::CHECKED && !self.0.ready.load(Ordering::Relaxed) {
            Check.run(connection).await?;
            self.0.ready.store(true, Ordering::Relaxed);
        }
        call.run(connection).await
    }
}

/// Whether a call fits into a packet: a server hangs up on one that is too large for it, and often
/// before it could say so.
async fn fits(call: &impl Call, connection: &mut MySqlConnection) -> Result<(), Failure> {
    let largest = "SELECT CAST(@@max_allowed_packet AS SIGNED)";
    let largest: i64 = sqlx::query_scalar(largest).fetch_one(connection).await?;
    match usize::try_from(largest) {
        Ok(largest) if call.size() + PACKET_MARGIN > largest => {
            Err(StoreErrorKind::TooLarge.into())
        }
        _ => Ok(()),
    }
}

/// A connection on which a call is made.
///
/// Unless the server has answered all that it was asked, the connection is closed: somebody else
/// could take what still comes for an answer to a statement of his own. This is so if the caller
/// goes away in the middle.
struct Held {
    connection: PoolConnection<MySql>,
    answered: bool,
}

impl Drop for Held {
    fn drop(&mut self) {
        if !self.answered {
            self.connection.close_on_drop();
        }
    }
}

impl fmt::Debug for MySqlStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MySqlStore")
            .field("pool", &self.0.pool)
            .field("timeout", &self.0.patience)
            .finish_non_exhaustive()
    }
}

impl Carrier for MySqlStore {
    const NAME: &str = NAME;

    fn lanes(&self) -> &Lanes {
        &self.0.lanes
    }

    fn patience(&self) -> Duration {
        self.0.patience
    }

    async fn claim_one(&self, claim: &Claim) -> Result<Claimed, StoreError> {
        self.call(&Open(claim)).await
    }

    async fn complete_one(&self, completion: &Completion) -> Result<Written, StoreError> {
        self.call(&Complete(completion)).await
    }

    async fn claim_all(&self, claims: &[Claim]) -> Result<Vec<Option<Claimed>>, StoreError> {
        self.call(&OpenAll(claims)).await
    }

    async fn complete_all(
        &self,
        completions: &[Completion],
    ) -> Result<Vec<Option<Written>>, StoreError> {
        self.call(&CompleteAll(completions)).await
    }
}

impl Store for MySqlStore {
    fn claim<'a>(&'a self, claim: &'a Claim) -> BoxFuture<'a, Result<Claimed, StoreError>> {
        Box::pin(carry(self, claim))
    }

    fn issue<'a>(&'a self, issue: &'a Issue) -> BoxFuture<'a, Result<Written, StoreError>> {
        Box::pin(async move { self.call(&Open(issue)).await })
    }

    fn checkpoint<'a>(
        &'a self,
        checkpoint: &'a Checkpoint,
    ) -> BoxFuture<'a, Result<Written, StoreError>> {
        Box::pin(async move { self.call(&Change::Checkpoint(checkpoint)).await })
    }

    fn complete<'a>(
        &'a self,
        completion: &'a Completion,
    ) -> BoxFuture<'a, Result<Written, StoreError>> {
        Box::pin(carry(self, completion))
    }

    fn release<'a>(
        &'a self,
        key: &'a Key,
        token: &'a Token,
    ) -> BoxFuture<'a, Result<Written, StoreError>> {
        Box::pin(async move { self.call(&Change::Release(key, token)).await })
    }

    fn forget<'a>(
        &'a self,
        key: &'a Key,
        token: &'a Token,
    ) -> BoxFuture<'a, Result<Written, StoreError>> {
        Box::pin(async move { self.call(&Change::Forget(key, token)).await })
    }

    fn renew<'a>(&'a self, claims: &'a [Renewal]) -> BoxFuture<'a, Result<Vec<bool>, StoreError>> {
        Box::pin(async move {
            if claims.is_empty() {
                return Ok(Vec::new());
            }
            self.call(&Renew(claims)).await
        })
    }

    fn read<'a>(&'a self, key: &'a Key) -> BoxFuture<'a, Result<Option<Record>, StoreError>> {
        Box::pin(async move { self.call(&Read(key)).await })
    }

    fn sweep(&self, limit: usize) -> BoxFuture<'_, Result<usize, StoreError>> {
        Box::pin(async move {
            let mut removed = 0;
            while removed < limit {
                let at_once = SWEPT_AT_ONCE.min(limit - removed);
                let swept = self.call(&Sweep(at_once)).await?;
                removed += swept.removed;
                if !swept.more {
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
}
