//! Where processes that are killed write down what they did: beside their records, in a table or in
//! a list.

use std::{fmt, str::FromStr, sync::Arc, time::Duration};

use idem_runtime::store::{SqliteStore, Store};
use sqlx::{
    Database, Sqlite, SqlitePool,
    sqlite::{SqliteConnectOptions, SqliteJournalMode},
};
#[cfg(feature = "servers")]
use {
    crate::crowd::Crowd,
    idem_runtime::store::{MySqlStore, PostgresStore, RedisStore},
    redis::{aio::ConnectionManager, cluster::ClusterClient, cluster_async::ClusterConnection},
    sqlx::{MySql, MySqlPool, PgPool, Postgres},
};

/// Something that a handler did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Effect {
    /// For which idempotency key.
    pub key: String,
    /// In which process.
    pub process: u32,
    /// In which attempt.
    pub attempt: u32,
    /// Of which operation.
    pub operation: String,
    /// With which key for whoever is called downstream.
    pub derived: String,
}

impl fmt::Display for Effect {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { key, process, attempt, operation, derived } = self;
        write!(f, "{key} {process} {attempt} {operation} {derived}")
    }
}

impl FromStr for Effect {
    type Err = std::num::ParseIntError;

    fn from_str(line: &str) -> Result<Self, Self::Err> {
        let mut words = line.split(' ');
        let mut word = || words.next().unwrap_or_default();
        Ok(Self {
            key: word().to_owned(),
            process: word().parse()?,
            attempt: word().parse()?,
            operation: word().to_owned(),
            derived: word().to_owned(),
        })
    }
}

/// A database in which effects can be written, on a connection that may be in a transaction.
pub trait Book: Database {
    /// Writes an effect down.
    fn write(
        connection: &mut Self::Connection,
        effect: &Effect,
    ) -> impl Future<Output = Result<(), sqlx::Error>> + Send;
}

macro_rules! books {
    ($($database:ty: $insert:literal;)*) => {$(
        impl Book for $database {
            async fn write(
                connection: &mut Self::Connection,
                effect: &Effect,
            ) -> Result<(), sqlx::Error> {
                let insert = sqlx::query($insert).bind(effect.to_string());
                insert.execute(connection).await.map(drop)
            }
        }
    )*};
}

books!(Sqlite: "INSERT INTO effects (line) VALUES (?1)";);
#[cfg(feature = "servers")]
books! {
    Postgres: "INSERT INTO effects (line) VALUES ($1)";
    MySql: "INSERT INTO effects (line) VALUES (?)";
}

const CREATE: &str = "CREATE TABLE IF NOT EXISTS effects (line VARCHAR(500) NOT NULL)";
const ALL: &str = "SELECT line FROM effects";
#[cfg(feature = "servers")]
const LIST: &str = "idem-test-effects";

/// A connection to the effects, and to the records beside them.
#[derive(Clone)]
pub enum Ledger {
    /// In a database file, which is named.
    Sqlite(SqlitePool, String),
    /// In PostgreSQL.
    #[cfg(feature = "servers")]
    Postgres(PgPool, String),
    /// In MySQL or MariaDB.
    #[cfg(feature = "servers")]
    MySql(MySqlPool, String),
    /// In Redis.
    #[cfg(feature = "servers")]
    Redis(ConnectionManager, String),
    /// In a Redis Cluster.
    #[cfg(feature = "servers")]
    Cluster(ClusterConnection, Vec<String>),
}

impl fmt::Debug for Ledger {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Ledger").finish_non_exhaustive()
    }
}

impl Ledger {
    /// Opens what a URL names: `sqlite:<path>`, `postgres:…`, `mysql:…`, `redis:…`, or
    /// `redis-cluster:` and the URLs of nodes with commas between them.
    pub async fn open(url: &str) -> Self {
        let (kind, rest) = url.split_once(':').expect("a URL");
        match kind {
            "sqlite" => {
                let options = SqliteConnectOptions::new()
                    .filename(rest)
                    .create_if_missing(true)
                    .journal_mode(SqliteJournalMode::Wal)
                    .busy_timeout(Duration::from_secs(5));
                let pool = SqlitePool::connect_with(options).await;
                Self::Sqlite(pool.expect("a database"), rest.to_owned())
            }
            #[cfg(feature = "servers")]
            "postgres" => {
                Self::Postgres(PgPool::connect(url).await.expect("a database"), url.to_owned())
            }
            #[cfg(feature = "servers")]
            "mysql" => {
                Self::MySql(MySqlPool::connect(url).await.expect("a database"), url.to_owned())
            }
            #[cfg(feature = "servers")]
            "redis" => {
                let client = redis::Client::open(url).expect("a URL");
                let connection = client.get_connection_manager().await;
                Self::Redis(connection.expect("a connection"), url.to_owned())
            }
            #[cfg(feature = "servers")]
            "redis-cluster" => {
                let nodes: Vec<_> = rest.split(',').map(str::to_owned).collect();
                let client = ClusterClient::new(nodes.clone()).expect("URLs");
                let connection = client.get_async_connection().await;
                Self::Cluster(connection.expect("a connection"), nodes)
            }
            _ => panic!("{kind} needs the feature `servers`"),
        }
    }

    /// Creates the tables of the effects and of the records; a list of effects begins anew.
    pub async fn create(&self) {
        match self {
            Self::Sqlite(pool, _) => {
                sqlx::raw_sql(CREATE).execute(pool).await.expect("a table");
                SqliteStore::create_tables(pool).await.expect("tables");
            }
            #[cfg(feature = "servers")]
            Self::Postgres(pool, url) => {
                sqlx::raw_sql(CREATE).execute(pool).await.expect("a table");
                let store = PostgresStore::connect(url).await.expect("a store");
                store.create_schema().await.expect("tables");
            }
            #[cfg(feature = "servers")]
            Self::MySql(pool, url) => {
                sqlx::raw_sql(CREATE).execute(pool).await.expect("a table");
                let store = MySqlStore::connect(url).await.expect("a store");
                store.create_schema().await.expect("tables");
            }
            #[cfg(feature = "servers")]
            Self::Redis(connection, _) => {
                let drop = redis::Cmd::del(LIST).exec_async(&mut connection.clone()).await;
                drop.expect("no list");
            }
            #[cfg(feature = "servers")]
            Self::Cluster(connection, _) => {
                let drop = redis::Cmd::del(LIST).exec_async(&mut connection.clone()).await;
                drop.expect("no list");
            }
        }
    }

    /// A store of the records, with connections of its own.
    pub async fn store(&self) -> Arc<dyn Store> {
        match self {
            Self::Sqlite(_, path) => Arc::new(SqliteStore::open(path).await.expect("a store")),
            #[cfg(feature = "servers")]
            Self::Postgres(_, url) => Arc::new(PostgresStore::connect(url).await.expect("a store")),
            #[cfg(feature = "servers")]
            Self::MySql(_, url) => Arc::new(MySqlStore::connect(url).await.expect("a store")),
            #[cfg(feature = "servers")]
            Self::Redis(_, url) => {
                Arc::new(RedisStore::connect(url.as_str()).await.expect("a store"))
            }
            #[cfg(feature = "servers")]
            Self::Cluster(_, nodes) => {
                let nodes = nodes.iter().map(String::as_str);
                Arc::new(RedisStore::cluster(nodes).await.expect("a store"))
            }
        }
    }

    /// The same, in which claims and answers travel together with others, where a store has that.
    pub async fn store_in_a_crowd(&self) -> Arc<dyn Store> {
        match self {
            #[cfg(feature = "servers")]
            Self::Postgres(_, url) => {
                let store = PostgresStore::connect(url).await.expect("a store");
                Arc::new(Crowd(store.with_lanes(1)))
            }
            #[cfg(feature = "servers")]
            Self::MySql(_, url) => {
                let store = MySqlStore::connect(url).await.expect("a store");
                Arc::new(Crowd(store.with_lanes(1)))
            }
            _ => self.store().await,
        }
    }

    /// Writes an effect down, at once.
    pub async fn write(&self, effect: &Effect) {
        match self {
            Self::Sqlite(pool, _) => {
                let mut connection = pool.acquire().await.expect("a connection");
                Sqlite::write(&mut connection, effect).await.expect("a row");
            }
            #[cfg(feature = "servers")]
            Self::Postgres(pool, _) => {
                let mut connection = pool.acquire().await.expect("a connection");
                Postgres::write(&mut connection, effect).await.expect("a row");
            }
            #[cfg(feature = "servers")]
            Self::MySql(pool, _) => {
                let mut connection = pool.acquire().await.expect("a connection");
                MySql::write(&mut connection, effect).await.expect("a row");
            }
            #[cfg(feature = "servers")]
            Self::Redis(connection, _) => {
                let push = redis::Cmd::rpush(LIST, effect.to_string());
                push.exec_async(&mut connection.clone()).await.expect("an entry");
            }
            #[cfg(feature = "servers")]
            Self::Cluster(connection, _) => {
                let push = redis::Cmd::rpush(LIST, effect.to_string());
                push.exec_async(&mut connection.clone()).await.expect("an entry");
            }
        }
    }

    /// All effects.
    pub async fn read(&self) -> Vec<Effect> {
        let lines: Vec<String> = match self {
            Self::Sqlite(pool, _) => sqlx::query_scalar(ALL).fetch_all(pool).await.expect("rows"),
            #[cfg(feature = "servers")]
            Self::Postgres(pool, _) => sqlx::query_scalar(ALL).fetch_all(pool).await.expect("rows"),
            #[cfg(feature = "servers")]
            Self::MySql(pool, _) => sqlx::query_scalar(ALL).fetch_all(pool).await.expect("rows"),
            #[cfg(feature = "servers")]
            Self::Redis(connection, _) => {
                let range = redis::Cmd::lrange(LIST, 0, -1);
                range.query_async(&mut connection.clone()).await.expect("entries")
            }
            #[cfg(feature = "servers")]
            Self::Cluster(connection, _) => {
                let range = redis::Cmd::lrange(LIST, 0, -1);
                range.query_async(&mut connection.clone()).await.expect("entries")
            }
        };
        lines.iter().map(|line| line.parse().expect("an effect")).collect()
    }
}
