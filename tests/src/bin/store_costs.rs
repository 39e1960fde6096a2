//! Measures what a record costs in each store: statements, flushes, bytes of log, bytes kept. The
//! figures in the guide's page on choosing a store are its output.
//!
//! `cargo run -p tests --features servers --bin store_costs -- [RECORDS [BODY BYTES [STORE…]]]`
//! starts servers of its own, set to be as durable as they can.

#![allow(clippy::expect_used, reason = "a measurement that cannot go on has failed")]

use std::{
    collections::BTreeMap,
    env, fs,
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use futures_util::{StreamExt, future::BoxFuture, stream};
use idem_runtime::{
    Fingerprint, Flags, Key, OnUnknown, OperationId, RecordedResponse, ScopeDigest, Token, Ttl,
    store::{
        Claim, Claimed, Completion, MemoryStore, MySqlStore, PostgresStore, RedisStore,
        SqliteStore, Store, Written,
    },
};
use sqlx::{MySqlPool, PgPool, Row};
use tests::servers::{mariadb::MariaDb, postgres::Postgres, redis::Redis};

/// How many calls are counted one by one, and how many of them are made at once in a second run.
const COUNTED: usize = 2_000;
const AT_ONCE: usize = 64;
/// After so long PostgreSQL's connections have told what they did.
const SETTLED: Duration = Duration::from_secs(12);

/// What somebody counts, by name; since the server started.
type Counters = BTreeMap<&'static str, f64>;

/// A store that is measured.
struct Subject<'a> {
    name: &'static str,
    store: Arc<dyn Store>,
    /// What was counted until now.
    counters: &'a (dyn Fn() -> BoxFuture<'a, Counters> + 'a),
    /// How long after a call it is counted.
    settled: Duration,
}

/// Claims on the keys of a range, and the answers to them.
#[derive(Clone)]
struct Work {
    body: Vec<u8>,
    /// Keys of one run are not those of another.
    run: u64,
}

impl Work {
    fn claim(&self, number: usize) -> Claim {
        let digest = |tag: u8| {
            let mut digest = [tag; 32];
            // Spread over the whole range, as digests are.
            let mixed = (number as u64 ^ self.run).wrapping_mul(0x9e37_79b9_7f4a_7c15);
            digest[..8].copy_from_slice(&mixed.to_be_bytes());
            digest[8..16].copy_from_slice(&mixed.rotate_left(29).to_le_bytes());
            digest
        };
        let mut token = [1; 16];
        token.copy_from_slice(&digest(2)[..16]);
        Claim {
            key: Key::from_bytes(digest(3)),
            scope: ScopeDigest::from_bytes([4; 32]),
            operation: "POST /payments".into(),
            operation_id: OperationId::random(),
            fingerprint: Fingerprint { scheme: "request/1".into(), digest: digest(5) },
            token: Token::from_bytes(token),
            lease: Duration::from_secs(30),
            ttl: Ttl::For(Duration::from_secs(24 * 60 * 60)),
            issued_only: false,
            on_unknown: OnUnknown::Rerun,
            format: 1,
        }
    }

    fn completion(&self, number: usize) -> Completion {
        let Claim { key, token, ttl, format, .. } = self.claim(number);
        let headers: [(&[u8], &[u8]); 1] = [(b"content-type", b"application/json")];
        let payload = RecordedResponse::encode(201, &headers, &self.body);
        Completion { key, token, ttl, flags: Flags::default(), payload, format }
    }
}

/// What is done to each key.
#[derive(Clone, Copy)]
enum Step {
    Claim,
    Complete,
    Replay,
}

impl Step {
    const ALL: [Self; 3] = [Self::Claim, Self::Complete, Self::Replay];

    fn name(self) -> &'static str {
        match self {
            Self::Claim => "claim",
            Self::Complete => "completion",
            Self::Replay => "replay",
        }
    }

    async fn take(self, store: &dyn Store, work: &Work, number: usize) {
        match self {
            Self::Claim => {
                let claimed = store.claim(&work.claim(number)).await.expect("an answer");
                assert!(matches!(claimed, Claimed::Granted(_)), "{claimed:?}");
            }
            Self::Complete => {
                let written = store.complete(&work.completion(number)).await.expect("an answer");
                assert!(matches!(written, Written::Done), "{written:?}");
            }
            Self::Replay => {
                let mut claim = work.claim(number);
                claim.token = Token::random();
                let claimed = store.claim(&claim).await.expect("an answer");
                assert!(matches!(claimed, Claimed::Found(_)), "{claimed:?}");
            }
        }
    }
}

async fn take_all(step: Step, store: &Arc<dyn Store>, work: &Work, n: usize, at_once: usize) {
    let calls = (0..n).map(|number| async move { step.take(&**store, work, number).await });
    stream::iter(calls).buffer_unordered(at_once).collect::<()>().await;
}

impl Subject<'_> {
    /// Prints what each call cost, one after the other and many at once.
    async fn count(&self, body: &[u8]) {
        for at_once in [1, AT_ONCE] {
            let work = Work { body: body.to_vec(), run: rand::random() };
            for step in Step::ALL {
                let before = (self.counters)().await;
                take_all(step, &self.store, &work, COUNTED, at_once).await;
                tokio::time::sleep(self.settled).await;
                let after = (self.counters)().await;
                print!("{:9} {at_once:3} at once, a {:11}", self.name, step.name());
                for (name, after) in after {
                    print!("  {name} {:.2}", (after - before[name]) / COUNTED as f64);
                }
                println!();
            }
        }
    }

    /// Fills it with completed records, a thousand at a time as they come and go.
    async fn fill(&self, records: usize, body: &[u8]) {
        let start = Instant::now();
        for run in 0..records as u64 / 1_000 {
            let work = Work { body: body.to_vec(), run: (run + 1) << 32 };
            for step in [Step::Claim, Step::Complete] {
                take_all(step, &self.store, &work, 1_000, AT_ONCE).await;
            }
        }
        println!("{:9} {records} records in {:.1?}", self.name, start.elapsed());
    }
}

fn per_record(what: &str, bytes: f64, records: usize) {
    println!("          {what}: {:.0} bytes a record", bytes / records as f64);
}

#[tokio::main]
async fn main() {
    let arguments: Vec<_> = env::args().skip(1).collect();
    let number = |n: usize| arguments.get(n).map(|text| text.parse().expect("a number"));
    let records: usize = number(0).unwrap_or(100_000) / 1_000 * 1_000;
    let body = vec![b'x'; number(1).unwrap_or(300)];
    let payload = Work { body: body.clone(), run: 0 }.completion(0).payload.len();
    println!("{records} records; a body of {} bytes is a payload of {payload}", body.len());
    let chosen = arguments.get(2..).filter(|stores| !stores.is_empty());
    let is_chosen = |store: &str| chosen.is_none_or(|stores| stores.iter().any(|it| it == store));
    if is_chosen("memory") {
        memory(records, &body).await;
    }
    if is_chosen("sqlite") {
        sqlite(records, &body).await;
    }
    if is_chosen("postgres") {
        postgres(records, &body).await;
    }
    if is_chosen("mysql") {
        mysql(records, &body).await;
    }
    if is_chosen("redis") {
        redis(records, &body).await;
    }
}

fn nothing<'a>() -> BoxFuture<'a, Counters> {
    Box::pin(async { Counters::new() })
}

async fn memory(records: usize, body: &[u8]) {
    let subject = Subject {
        name: "memory",
        store: Arc::new(MemoryStore::new()),
        counters: &nothing,
        settled: Duration::ZERO,
    };
    let before = resident();
    subject.fill(records, body).await;
    per_record("resident memory", resident() - before, records);
}

/// What this process has in memory.
fn resident() -> f64 {
    let status = fs::read_to_string("/proc/self/status").expect("a process");
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("a size");
    1024.0 * line.trim().trim_end_matches(" kB").parse::<f64>().expect("a number")
}

async fn sqlite(records: usize, body: &[u8]) {
    let directory = tempfile::tempdir().expect("a directory");
    let file = directory.path().join("records.db");
    let store = Arc::new(SqliteStore::open(&file).await.expect("a database"));
    let counters = || -> BoxFuture<'_, Counters> {
        Box::pin(async {
            let io = fs::read_to_string("/proc/self/io").expect("a process");
            let line = io.lines().find_map(|line| line.strip_prefix("wchar: "));
            let written = line.expect("a count").parse().expect("a number");
            Counters::from([("bytes written", written)])
        })
    };
    let subject =
        Subject { name: "sqlite", store, counters: &counters, settled: Duration::from_millis(200) };
    subject.count(body).await;
    drop(subject);

    let file = directory.path().join("filled.db");
    let store = Arc::new(SqliteStore::open(&file).await.expect("a database"));
    let subject = Subject { name: "sqlite", store, counters: &nothing, settled: Duration::ZERO };
    subject.fill(records, body).await;
    drop(subject);
    // The last connection takes the log back into the file.
    while Path::new(&format!("{}-wal", file.display())).exists() {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    per_record("file", fs::metadata(&file).expect("a file").len() as f64, records);
}

async fn postgres(records: usize, body: &[u8]) {
    let server = Postgres::start_own_with(
        "-c fsync=on -c full_page_writes=on -c synchronous_commit=on -c max_wal_size=8GB",
    );
    let database = server.database().await;
    let store = PostgresStore::connect(database.url()).await.expect("a store");
    store.create_schema().await.expect("tables");
    let pool = PgPool::connect(database.url()).await.expect("a pool");
    let version: String = one(&pool, "SELECT version()").await;
    println!("{version}");
    let counters = || -> BoxFuture<'_, Counters> {
        Box::pin(async {
            let commits = "SELECT xact_commit::float8 FROM pg_stat_database \
                           WHERE datname = current_database()";
            let flushes = "SELECT wal_sync::float8 FROM pg_stat_wal";
            let log = "SELECT (pg_current_wal_insert_lsn() - '0/0')::float8";
            Counters::from([
                ("statements", one(&pool, commits).await),
                ("flushes", one(&pool, flushes).await),
                ("bytes of WAL", one(&pool, log).await),
            ])
        })
    };
    let store = Arc::new(store);
    let subject = Subject { name: "postgres", store, counters: &counters, settled: SETTLED };
    // After a checkpoint the first change to each page is logged as the whole page: not in these.
    sqlx::raw_sql("CHECKPOINT").execute(&pool).await.expect("a checkpoint");
    subject.count(body).await;
    sqlx::raw_sql("TRUNCATE idem_records").execute(&pool).await.expect("an empty table");
    let before = counters().await["bytes of WAL"];
    subject.fill(records, body).await;
    per_record("WAL", counters().await["bytes of WAL"] - before, records);
    for (what, size) in [
        ("table", "SELECT pg_table_size('idem_records')::float8"),
        ("primary key", "SELECT pg_relation_size('idem_records_pkey')::float8"),
        ("index of the sweeper", "SELECT pg_relation_size('idem_records_bucket')::float8"),
        ("index of ids", "SELECT pg_relation_size('idem_records_operation_id')::float8"),
        ("all", "SELECT pg_total_relation_size('idem_records')::float8"),
    ] {
        per_record(what, one(&pool, size).await, records);
    }
    tokio::time::sleep(SETTLED).await;
    let hot = "SELECT 100.0::float8 * n_tup_hot_upd / n_tup_upd FROM pg_stat_user_tables \
               WHERE relname = 'idem_records'";
    println!("          completions within their page: {:.1} %", one::<f64>(&pool, hot).await);
}

async fn one<T>(pool: &PgPool, sql: &'static str) -> T
where
    T: for<'r> sqlx::Decode<'r, sqlx::Postgres> + sqlx::Type<sqlx::Postgres> + Send + Unpin,
{
    sqlx::query(sql).fetch_one(pool).await.and_then(|row| row.try_get(0)).expect("a value")
}

async fn mysql(records: usize, body: &[u8]) {
    let server = MariaDb::start_own_with(
        "--innodb-flush-log-at-trx-commit=1 --innodb-buffer-pool-size=512M",
    );
    let database = server.database().await;
    let store = MySqlStore::connect(database.url()).await.expect("a store");
    store.create_schema().await.expect("tables");
    let pool = MySqlPool::connect(database.url()).await.expect("a pool");
    let version = sqlx::query_scalar::<_, String>("SELECT version()").fetch_one(&pool).await;
    println!("{}", version.expect("a version"));
    let counters = || -> BoxFuture<'_, Counters> {
        Box::pin(async {
            let status = sqlx::raw_sql(
                "SHOW GLOBAL STATUS WHERE Variable_name IN \
                 ('Questions', 'Innodb_lsn_current', 'Innodb_os_log_fsyncs')",
            );
            let rows = status.fetch_all(&pool).await.expect("counters");
            let of = |name: &str| {
                let row =
                    rows.iter().find(|row| row.try_get::<String, _>(0).is_ok_and(|it| it == name));
                row.map(|row| {
                    row.try_get::<String, _>(1).expect("a value").parse().expect("a number")
                })
            };
            let mut counters = Counters::new();
            counters.extend(of("Questions").map(|n| ("statements", n)));
            counters.extend(of("Innodb_os_log_fsyncs").map(|n| ("flushes", n)));
            counters.extend(of("Innodb_lsn_current").map(|n| ("bytes of redo log", n)));
            counters
        })
    };
    let store = Arc::new(store);
    let subject = Subject { name: "mysql", store, counters: &counters, settled: Duration::ZERO };
    subject.count(body).await;
    sqlx::raw_sql("TRUNCATE idem_records").execute(&pool).await.expect("an empty table");
    let before = counters().await["bytes of redo log"];
    subject.fill(records, body).await;
    per_record("redo log", counters().await["bytes of redo log"] - before, records);
    sqlx::raw_sql("ANALYZE TABLE idem_records").execute(&pool).await.expect("an analysis");
    let sizes = "SELECT CAST(data_length AS DOUBLE), CAST(index_length AS DOUBLE) \
                 FROM information_schema.tables \
                 WHERE table_schema = DATABASE() AND table_name = 'idem_records'";
    let sizes = sqlx::query(sizes).fetch_one(&pool).await.expect("sizes");
    per_record("table", sizes.try_get(0).expect("a size"), records);
    per_record("two indexes", sizes.try_get(1).expect("a size"), records);
    let files = fs::read_dir(server.directory().join("data")).expect("the data");
    let mut files = files.flatten().map(|file| file.path().join("idem_records.ibd"));
    let file = files.find_map(|file| fs::metadata(file).ok()).expect("the table's file");
    per_record("file", file.len() as f64, records);
}

async fn redis(records: usize, body: &[u8]) {
    let server = Redis::start_own_with("--appendfsync always");
    let store = Arc::new(RedisStore::connect(server.url()).await.expect("a store"));
    let info = |section: &str| server.ask::<String>(&["INFO", section]).expect("what it says");
    let field = |section: &str, name: &str| -> f64 {
        let info = info(section);
        let line = info.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
        let value = line.and_then(|line| line.trim().parse().ok());
        value.unwrap_or_else(|| panic!("{section} says no {name}"))
    };
    let version = info("server");
    println!("{}", version.lines().find(|line| line.starts_with("redis_version")).expect("one"));
    let counters = || -> BoxFuture<'_, Counters> {
        Box::pin(async {
            // `cmdstat_evalsha:calls=…,usec=…`: what a client sends; a script's own calls are not.
            let stats = info("commandstats");
            let calls = stats.lines().filter_map(|line| line.strip_prefix("cmdstat_eval"));
            let calls = calls.filter_map(|line| {
                line.split_once("calls=")?.1.split(',').next()?.parse::<f64>().ok()
            });
            Counters::from([
                ("scripts", calls.sum()),
                ("bytes of AOF", field("persistence", "aof_current_size")),
            ])
        })
    };
    let subject =
        Subject { name: "redis", store, counters: &counters, settled: Duration::from_millis(200) };
    subject.count(body).await;
    server.ask::<String>(&["FLUSHALL"]).expect("an empty server");
    let before = field("memory", "used_memory");
    subject.fill(records, body).await;
    per_record("memory", field("memory", "used_memory") - before, records);
    let keys = server.ask::<f64>(&["DBSIZE"]).expect("a number");
    println!("          {:.2} keys a record", keys / records as f64);
}
