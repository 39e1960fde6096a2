//! Database servers, set to be as durable as one would have them.

#![expect(clippy::expect_used, reason = "a measurement that cannot go on has failed")]

use std::time::Duration;

use servers::{mariadb::MariaDb, postgres::Postgres, redis::Redis};
use sqlx::{
    AssertSqlSafe, ConnectOptions as _, Connection as _, MySqlConnection, MySqlPool, PgConnection,
    PgPool, Row as _,
    mysql::{MySqlConnectOptions, MySqlPoolOptions, MySqlRow},
    postgres::{PgConnectOptions, PgPoolOptions},
};

use crate::processes::family;

/// Flushes at each commit. Checkpoints are asked for between measurements and not made within.
const POSTGRES: &str = "-c fsync=on -c full_page_writes=on -c synchronous_commit=on \
                        -c shared_buffers=1GB \
                        -c min_wal_size=2GB -c max_wal_size=8GB -c checkpoint_timeout=1h";
/// Flushes at each commit.
const MARIADB: &str = "--innodb-flush-log-at-trx-commit=1 --innodb-buffer-pool-size=1G \
                       --innodb-log-file-size=1G";
/// The log is not rewritten within a measurement.
const REDIS: &str = "--appendfsync everysec --auto-aof-rewrite-percentage 0";

/// How many files of PostgreSQL's log, of 16 MB each, are made beforehand.
const LOG_FILES: usize = 64;

/// How many connections a pool has, idem's and everybody's.
pub const CONNECTIONS: u32 = 16;
/// How long a call may wait for one.
const PATIENCE: Duration = Duration::from_secs(30);

/// A pool with the settings that the documentation of idem's store recommends for one of its own.
///
/// # Panics
///
/// When the URL is none.
pub fn postgres_pool(url: &str) -> PgPool {
    let options: PgConnectOptions = url.parse().expect("a URL");
    let options = options.disable_statement_logging();
    let settings =
        [("enable_seqscan", "off"), ("jit", "off"), ("plan_cache_mode", "force_generic_plan")];
    PgPoolOptions::new()
        .max_connections(CONNECTIONS)
        .acquire_timeout(PATIENCE)
        .test_before_acquire(false)
        .connect_lazy_with(options.options(settings))
}

/// A pool with the settings that the documentation of idem's store recommends.
///
/// # Panics
///
/// When the URL is none.
pub fn mariadb_pool(url: &str) -> MySqlPool {
    let options: MySqlConnectOptions = url.parse().expect("a URL");
    MySqlPoolOptions::new()
        .max_connections(CONNECTIONS)
        .acquire_timeout(PATIENCE)
        .test_before_acquire(false)
        .connect_lazy_with(options.disable_statement_logging())
}

/// What kind of server it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// PostgreSQL.
    Postgres,
    /// MariaDB.
    MariaDb,
    /// Redis.
    Redis,
}

/// What a server is to hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Records {
    /// Those of a measurement: tables are emptied in between, and old versions of rows are removed
    /// by nobody.
    Few,
    /// Many that stay: old versions are removed in the background. Redis keeps no log, which would
    /// be of nothing but how they came there.
    Many,
}

/// A server of the benchmark's own. It ends with this value.
#[derive(Debug)]
pub enum Server {
    /// PostgreSQL.
    Postgres(Postgres),
    /// MariaDB.
    MariaDb(MariaDb),
    /// Redis.
    Redis(Redis),
}

impl Server {
    /// Starts one.
    pub fn start(kind: Kind, records: Records) -> Self {
        let is_many = records == Records::Many;
        match kind {
            Kind::Postgres => {
                let vacuum = if is_many { "on" } else { "off" };
                let settings = format!("{POSTGRES} -c autovacuum={vacuum}");
                Self::Postgres(Postgres::start_own_with(&settings))
            }
            Kind::MariaDb => Self::MariaDb(MariaDb::start_own_with(MARIADB)),
            Kind::Redis => {
                let log = if is_many { "no" } else { "yes" };
                Self::Redis(Redis::start_own_with(&format!("{REDIS} --appendonly {log}")))
            }
        }
    }

    /// The URL of an empty database on it; of Redis, that of the server.
    pub async fn database(&self) -> String {
        match self {
            Self::Postgres(server) => server.database().await.url().to_owned(),
            Self::MariaDb(server) => server.database().await.url().to_owned(),
            Self::Redis(server) => server.url().to_owned(),
        }
    }

    /// All its processes.
    pub fn processes(&self) -> Vec<u32> {
        family(match self {
            Self::Postgres(server) => server.pid(),
            Self::MariaDb(server) => server.pid(),
            Self::Redis(server) => server.pid(),
        })
    }

    /// What it says of its version and of what makes it durable.
    pub async fn settings(&self) -> (&'static str, String) {
        match self {
            Self::Postgres(_) => {
                let mut settings = vec![self.ask_postgres("SHOW server_version").await];
                for name in [
                    "fsync",
                    "synchronous_commit",
                    "full_page_writes",
                    "wal_sync_method",
                    "shared_buffers",
                    "autovacuum",
                ] {
                    let value = self.ask_postgres(&format!("SHOW {name}")).await;
                    settings.push(format!("{name}={value}"));
                }
                ("PostgreSQL", settings.join(", "))
            }
            Self::MariaDb(_) => {
                let mut settings = vec![self.ask_mariadb("SELECT version()", 0).await];
                for name in [
                    "innodb_flush_log_at_trx_commit",
                    "innodb_flush_method",
                    "innodb_doublewrite",
                    "log_bin",
                    "innodb_buffer_pool_size",
                ] {
                    let value = self.ask_mariadb(&format!("SHOW VARIABLES LIKE '{name}'"), 1).await;
                    settings.push(format!("{name}={value}"));
                }
                ("MariaDB", settings.join(", "))
            }
            Self::Redis(server) => {
                let info: String = server.ask(&["INFO", "server"]).expect("what it says");
                let version = info.lines().find_map(|line| line.strip_prefix("redis_version:"));
                let mut settings = vec![version.expect("a version").trim().to_owned()];
                for name in ["appendonly", "appendfsync", "maxmemory-policy"] {
                    let value: Vec<String> =
                        server.ask(&["CONFIG", "GET", name]).expect("a setting");
                    settings.push(value.join("="));
                }
                ("Redis", settings.join(", "))
            }
        }
    }

    /// How many bytes of log it has written; `None` if it keeps no log.
    pub async fn log_bytes(&self) -> Option<f64> {
        let bytes = match self {
            Self::Postgres(_) => {
                self.ask_postgres("SELECT (pg_current_wal_insert_lsn() - '0/0')::text").await
            }
            Self::MariaDb(_) => {
                self.ask_mariadb("SHOW GLOBAL STATUS LIKE 'Innodb_os_log_written'", 1).await
            }
            Self::Redis(server) => {
                let info: String = server.ask(&["INFO", "persistence"]).expect("what it says");
                let size = info.lines().find_map(|line| line.strip_prefix("aof_current_size:"));
                size?.trim().to_owned()
            }
        };
        Some(bytes.parse().expect("a number"))
    }

    /// Empties the database of this URL and leaves its tables.
    pub async fn empty(&self, url: &str) {
        match self {
            Self::Postgres(_) => {
                let mut connection = PgConnection::connect(url).await.expect("a connection");
                let all = "SELECT string_agg(format('%I', tablename), ', ') FROM pg_tables \
                           WHERE schemaname = 'public' AND tablename <> 'idem_schema'";
                let all: Option<String> =
                    sqlx::query_scalar(all).fetch_one(&mut connection).await.expect("names");
                if let Some(all) = all {
                    let truncate = AssertSqlSafe(format!("TRUNCATE {all}"));
                    sqlx::raw_sql(truncate).execute(&mut connection).await.expect("empty tables");
                }
            }
            Self::MariaDb(_) => {
                let mut connection = MySqlConnection::connect(url).await.expect("a connection");
                let all = "SELECT table_name FROM information_schema.tables \
                           WHERE table_schema = DATABASE() AND table_name <> 'idem_schema'";
                let all = sqlx::query(all).fetch_all(&mut connection).await.expect("names");
                for table in all {
                    let table: String = table.try_get(0).expect("a name");
                    let truncate = AssertSqlSafe(format!("TRUNCATE {table}"));
                    sqlx::raw_sql(truncate).execute(&mut connection).await.expect("an empty table");
                }
            }
            Self::Redis(server) => {
                server.ask::<String>(&["FLUSHALL"]).expect("an empty server");
            }
        }
    }

    /// Has it make the files of its log that measurements will fill: otherwise all who commit as one
    /// is full make the next one at the same time.
    pub async fn prepare(&self) {
        if let Self::Postgres(server) = self {
            let mut connection =
                PgConnection::connect(server.maintenance_url()).await.expect("a connection");
            for _ in 0..LOG_FILES {
                let next = "SELECT pg_logical_emit_message(false, '', ''), pg_switch_wal()";
                sqlx::raw_sql(next).execute(&mut connection).await.expect("another file");
            }
            // It then uses them again.
            sqlx::raw_sql("CHECKPOINT").execute(&mut connection).await.expect("a checkpoint");
        }
    }

    /// Has it bring its data files up to date, so that it does not do so while it is measured.
    pub async fn checkpoint(&self) {
        if let Self::Postgres(server) = self {
            let database = server.maintenance_url();
            let mut connection = PgConnection::connect(database).await.expect("a connection");
            sqlx::raw_sql("CHECKPOINT").execute(&mut connection).await.expect("a checkpoint");
        }
    }

    async fn ask_postgres(&self, sql: &str) -> String {
        let Self::Postgres(server) = self else { unreachable!("asked of PostgreSQL only") };
        let mut connection =
            PgConnection::connect(server.maintenance_url()).await.expect("a connection");
        let sql = AssertSqlSafe(sql.to_owned());
        sqlx::query_scalar(sql).fetch_one(&mut connection).await.expect("an answer")
    }

    async fn ask_mariadb(&self, sql: &str, column: usize) -> String {
        let Self::MariaDb(server) = self else { unreachable!("asked of MariaDB only") };
        let mut connection =
            MySqlConnection::connect(server.maintenance_url()).await.expect("a connection");
        let sql = AssertSqlSafe(sql.to_owned());
        let row: MySqlRow =
            sqlx::query(sql).persistent(false).fetch_one(&mut connection).await.expect("an answer");
        row.try_get(column).expect("a text")
    }
}
