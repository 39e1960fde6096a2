//! What a store does a second when it already has many records, while a sweeper removes what is
//! over.

use std::{
    fmt::Write as _,
    fs,
    sync::Arc,
    time::{Duration, Instant},
};

use bench::{
    databases::{Kind, Records, Server},
    keys::key,
    report::{At, Goal, Report, figure},
    statistics::{Bound, counted},
};
use futures_util::{StreamExt as _, stream};
use idem_runtime::store::Store;
use redis::Script;
use sqlx::{AssertSqlSafe, Connection as _, MySqlConnection, PgConnection, Row as _};
use tokio::task::JoinHandle;

use crate::{
    FIRST, Options, figures,
    load::{Ask, Load},
    progress, settings,
    subjects::{CONTENDERS, DAY, Idem, Result, Subject as _, open},
};

/// For how long the records of a burst are kept: the sweeper has as much to remove as is written.
const TTL: Duration = Duration::from_secs(5);
/// How often it runs, and how much it removes at a time: in an engine, each minute, and as much.
const SWEEPS: Duration = Duration::from_secs(1);
const SWEPT_AT_ONCE: usize = 1_000;
/// Bursts whose keys are those of records that stay.
const FILLING: u32 = 1 << 19;
/// How many callers use a store before it is measured.
const WARMING: usize = 256;
/// How long a step of filling may take.
const PATIENCE: Duration = Duration::from_secs(60);
/// Bytes of memory, and of disk, that a record may take at the most.
const MEMORY: u64 = 1_100;
const DISK: u64 = 2_500;

/// A store with so many records.
struct Filled {
    at: At,
    load: Load,
    /// Whose database it is on; each has a server of its own where that keeps all in memory.
    server: usize,
    sweeping: JoinHandle<()>,
}

impl Drop for Filled {
    fn drop(&mut self) {
        self.sweeping.abort();
    }
}

pub(crate) async fn measure(options: &Options) -> Result<()> {
    let title = "Claims and completions in stores that already have many records";
    let mut report = Report::new("stores-growth", title, "bench/run stores");
    let of_idem = CONTENDERS.iter().filter(|it| it.by_hand.is_some() || it.name == "memory");
    for contender in of_idem {
        if !options.only.is_empty() && !options.only.iter().any(|name| name == contender.name) {
            continue;
        }
        let measured = measure_one(options, contender.name, contender.database, &mut report).await;
        measured.map_err(|error| format!("{}: {error}", contender.name))?;
    }
    conclude(&mut report, options);
    println!("{}", report.tables());
    let panel = report.panel("time an operation ÷ with the fewest records", "records", |ratio| {
        ratio.figure == TIME && ratio.at.callers == options.callers[0] as u64
    });
    for path in report.write(&[panel])? {
        println!("{}", path.display());
    }
    Ok(())
}

/// Microseconds from one operation's end to the next one's.
const TIME: &str = "µs between ends";

async fn measure_one(
    options: &Options,
    store: &'static str,
    database: Option<Kind>,
    report: &mut Report,
) -> Result<()> {
    let directory = tempfile::Builder::new().prefix("idem-bench-").tempdir()?;
    let mut servers = Vec::new();
    let mut all = Vec::new();
    for records in &options.records {
        let in_memory = database.is_none() && store == "memory" || database == Some(Kind::Redis);
        let (needed, has) = match in_memory {
            true => (records * MEMORY, memory()),
            false => (records * DISK, disk()?),
        };
        if needed > has {
            let what = format!("{store} with {} records", counted(*records));
            let why = format!("not measured: {} GB needed, {} GB free", needed >> 30, has >> 30);
            eprintln!("{what}: {why}");
            report.settings.insert(what, why);
            continue;
        }
        // A server that has one database has one size.
        if let Some(kind) = database
            && (servers.is_empty() || kind == Kind::Redis)
        {
            servers.push(Server::start(kind, Records::Many));
        }
        let place = match servers.last() {
            Some(server) => server.database().await,
            None => {
                let place = directory.path().join(records.to_string());
                fs::create_dir(&place)?;
                place.to_string_lossy().into_owned()
            }
        };
        let start = Instant::now();
        let kept = fill(store, &place, *records).await?;
        eprintln!("{store}: {} records in {} s", counted(*records), start.elapsed().as_secs());
        let sweeping = sweep(Arc::clone(&kept));
        let load = Load::new(Arc::new(Idem::new(kept, TTL)), 1);
        let at = At { records: Some(*records), ..At::new(store, FIRST, 0) };
        all.push(Filled { at, load, server: servers.len().saturating_sub(1), sweeping });
    }
    for server in &servers {
        server.checkpoint().await;
    }
    report.settings.extend(settings(options, servers.iter()).await);
    // Until each page has been touched since the checkpoint, PostgreSQL logs whole pages, and until
    // it was read, a database reads it.
    for filled in &mut all {
        let time = Duration::from_secs_f64(options.warm_up);
        filled.load.burst(Ask::First, WARMING, time).await?;
    }
    let start = Instant::now();
    let time = Duration::from_secs_f64(options.seconds);
    for round in 0..options.rounds {
        all.reverse();
        for callers in &options.callers {
            for filled in &mut all {
                let server = servers.get(filled.server);
                let mut figures =
                    figures(&mut filled.load, server, Ask::First, *callers, time).await?;
                let throughput = figures.iter().find(|(name, _)| *name == figure::THROUGHPUT);
                figures.extend(throughput.map(|(_, a_second)| (TIME, 1e6 / a_second)));
                let at = At { callers: *callers as u64, ..filled.at.clone() };
                report.add(&at, figures);
            }
        }
        progress(start, round, options.rounds);
    }
    Ok(())
}

/// Removes what is over, as an engine does.
fn sweep(store: Arc<dyn Store>) -> JoinHandle<()> {
    tokio::spawn(async move {
        loop {
            tokio::time::sleep(SWEEPS).await;
            loop {
                match store.sweep(SWEPT_AT_ONCE).await {
                    Ok(SWEPT_AT_ONCE) => {}
                    Ok(_) => break,
                    Err(error) => {
                        eprintln!("sweeping: {error}");
                        break;
                    }
                }
            }
        }
    })
}

fn conclude(report: &mut Report, options: &Options) {
    let fewest = options.records.iter().min().copied();
    let most = options.records.iter().max().copied().unwrap_or_default();
    let cells: Vec<At> = report.cells.iter().map(|cell| cell.at.clone()).collect();
    for at in cells.iter().filter(|at| at.records != fewest) {
        let reference = At { records: fewest, ..at.clone() };
        report.compare(at, TIME, &reference);
    }
    for at in cells.iter().filter(|at| at.records == Some(most) && at.records != fewest) {
        let from = counted(fewest.unwrap_or_default());
        let what = format!(
            "{} store, claim + completion, time with {} live records ÷ with {from}, {} callers",
            at.contender,
            counted(most),
            at.callers
        );
        let reference = Some(At { records: fewest, ..at.clone() });
        let bound = Bound::AtMost(1.25);
        report.judge(Goal { what, of: at.clone(), figure: TIME, reference, bound });
    }
}

/// How many bytes of memory can be had.
fn memory() -> u64 {
    let said = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = said.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
    let kilobytes = line.and_then(|line| line.trim().trim_end_matches(" kB").parse::<u64>().ok());
    kilobytes.unwrap_or_default() * 1024
}

/// How many bytes can be written where the databases are.
fn disk() -> Result<u64> {
    let has = rustix::fs::statvfs(std::env::temp_dir())?;
    Ok(has.f_bavail * has.f_frsize)
}

/// Makes a store with so many completed records.
///
/// One is written by the store itself. The database is told to repeat it: under keys that are
/// spread over the whole range and come in order, other operation ids, and ends within a day. For
/// its indexes that is what a day of requests leaves behind.
async fn fill(store: &str, place: &str, records: u64) -> Result<Arc<dyn Store>> {
    let opened = open(store, place).await?;
    let subject = Idem::new(Arc::clone(&opened), DAY);
    if store == "memory" {
        let all = 0..u32::try_from(records)?;
        let filling = stream::iter(all).map(|number| subject.first(key(FILLING, 0, number)));
        let filled = filling.buffer_unordered(64).all(|done| async { done.is_ok_and(|done| done) });
        return if filled.await { Ok(opened) } else { Err("it does not fill".into()) };
    }
    if !subject.first(key(FILLING, 0, 0)).await? {
        return Err("a fresh key is not granted".into());
    }
    match store {
        "sqlite" => {
            drop((subject, opened));
            // Its connections close in the background; the last one takes back the log.
            while fs::exists(format!("{place}/records.db-wal"))? {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
            fill_sqlite(place, records)?;
            return open(store, place).await;
        }
        "redis" => fill_redis(place, records).await?,
        "mariadb" => fill_mariadb(place, records).await?,
        "postgres" => fill_postgres(place, records).await?,
        other => return Err(format!("{other} cannot be filled").into()),
    }
    Ok(opened)
}

async fn execute_postgres(connection: &mut PgConnection, sql: String) -> Result<()> {
    sqlx::raw_sql(AssertSqlSafe(sql)).execute(connection).await?;
    Ok(())
}

async fn fill_postgres(url: &str, records: u64) -> Result<()> {
    let mut connection = PgConnection::connect(url).await?;
    let columns = "SELECT column_name::text FROM information_schema.columns \
                   WHERE table_name = 'idem_records' AND is_generated = 'NEVER'";
    let columns: Vec<String> = sqlx::query_scalar(columns).fetch_all(&mut connection).await?;
    let values = columns.iter().map(|column| match &**column {
        "key" => format!(
            "decode(lpad(to_hex(n * 4294967296 / {}), 8, '0'), 'hex') \
             || substring(sha256(int8send(n)), 1, 28)",
            records + 1
        ),
        "operation_id" => "substring(sha256(int8send(-n)), 1, 16)".to_owned(),
        // Within the day before the template's end.
        "valid_until" | "kept_until" => format!("t.{column} - n % 43200 * 1000"),
        column => format!("t.{column}"),
    });
    let values: Vec<_> = values.collect();
    let indexes = "SELECT indexname::text, indexdef FROM pg_indexes \
                   WHERE tablename = 'idem_records' AND indexname NOT IN \
                   (SELECT conname FROM pg_constraint)";
    let indexes = sqlx::query(indexes).fetch_all(&mut connection).await?;
    for index in &indexes {
        let name: String = index.try_get(0)?;
        execute_postgres(&mut connection, format!("DROP INDEX {name}")).await?;
    }
    let insert = format!(
        "INSERT INTO idem_records ({}) SELECT {} FROM idem_records AS t, \
         generate_series(1::bigint, {}) AS n",
        columns.join(", "),
        values.join(", "),
        records - 1
    );
    execute_postgres(&mut connection, insert).await?;
    execute_postgres(&mut connection, "SET maintenance_work_mem = '1GB'".to_owned()).await?;
    for index in &indexes {
        execute_postgres(&mut connection, index.try_get(1)?).await?;
    }
    execute_postgres(&mut connection, "VACUUM (FREEZE, ANALYZE) idem_records".to_owned()).await
}

async fn execute_mariadb(connection: &mut MySqlConnection, sql: String) -> Result<()> {
    sqlx::raw_sql(AssertSqlSafe(sql)).execute(connection).await?;
    Ok(())
}

async fn fill_mariadb(url: &str, records: u64) -> Result<()> {
    let mut connection = MySqlConnection::connect(url).await?;
    let columns = "SELECT column_name FROM information_schema.columns \
                   WHERE table_schema = DATABASE() AND table_name = 'idem_records' \
                   ORDER BY ordinal_position";
    let columns: Vec<String> = sqlx::query_scalar(columns).fetch_all(&mut connection).await?;
    let values = columns.iter().map(|column| match &**column {
        "record_key" => format!(
            "CONCAT(UNHEX(LPAD(HEX(seq * 4294967296 DIV {}), 8, '0')), \
             LEFT(UNHEX(SHA2(seq, 256)), 28))",
            records + 1
        ),
        "operation_id" => "UNHEX(MD5(seq))".to_owned(),
        "valid_until" | "kept_until" => format!("t.{column} - seq % 43200 * 1000"),
        column => format!("t.{column}"),
    });
    let values: Vec<_> = values.collect();
    let indexes = "SELECT index_name, GROUP_CONCAT(column_name ORDER BY seq_in_index) \
                   FROM information_schema.statistics \
                   WHERE table_schema = DATABASE() AND table_name = 'idem_records' \
                   AND index_name <> 'PRIMARY' GROUP BY index_name";
    let indexes = sqlx::query(indexes).fetch_all(&mut connection).await?;
    let (mut drops, mut adds) = (Vec::new(), Vec::new());
    for index in &indexes {
        let (name, columns): (String, String) = (index.try_get(0)?, index.try_get(1)?);
        drops.push(format!("DROP KEY {name}"));
        adds.push(format!("ADD KEY {name} ({columns})"));
    }
    let change = |changes: &[String]| format!("ALTER TABLE idem_records {}", changes.join(", "));
    execute_mariadb(&mut connection, change(&drops)).await?;
    let template = "CREATE TEMPORARY TABLE template AS SELECT * FROM idem_records";
    execute_mariadb(&mut connection, template.to_owned()).await?;
    for first in (1..records).step_by(1_000_000) {
        let last = (first + 999_999).min(records - 1);
        let insert = format!(
            "INSERT INTO idem_records ({}) SELECT {} FROM seq_{first}_to_{last} JOIN template AS t",
            columns.join(", "),
            values.join(", ")
        );
        execute_mariadb(&mut connection, insert).await?;
    }
    execute_mariadb(&mut connection, change(&adds)).await?;
    execute_mariadb(&mut connection, "ANALYZE TABLE idem_records".to_owned()).await
}

fn fill_sqlite(directory: &str, records: u64) -> Result<()> {
    let connection = rusqlite::Connection::open(format!("{directory}/records.db"))?;
    // Nobody else has it open, and it is not needed if this fails.
    connection.pragma_update(None, "journal_mode", "OFF")?;
    connection.pragma_update(None, "synchronous", "OFF")?;
    connection.pragma_update(None, "cache_size", -1_000_000)?;
    let names = |sql: &str| -> rusqlite::Result<Vec<[String; 2]>> {
        let mut statement = connection.prepare(sql)?;
        let rows = statement.query_map((), |row| Ok([row.get(0)?, row.get(1)?]))?;
        rows.collect()
    };
    let columns = names("SELECT name, type FROM pragma_table_info('idem_records')")?;
    let values = columns.iter().map(|[column, _]| match &**column {
        "key" => format!(
            "unhex(printf('%08x', n * 4294967296 / {}) || hex(randomblob(28)))",
            records + 1
        ),
        "operation_id" => "randomblob(16)".to_owned(),
        "valid_until" | "kept_until" => format!("t.{column} - n % 43200 * 1000"),
        column => format!("t.{column}"),
    });
    let values: Vec<_> = values.collect();
    let columns: Vec<_> = columns.iter().map(|[column, _]| &**column).collect();
    let indexes = "SELECT name, sql FROM sqlite_master \
                   WHERE type = 'index' AND tbl_name = 'idem_records' AND sql IS NOT NULL";
    let indexes = names(indexes)?;
    let mut script = String::new();
    for [name, _] in &indexes {
        writeln!(script, "DROP INDEX {name};")?;
    }
    writeln!(
        script,
        "CREATE TEMPORARY TABLE template AS SELECT * FROM idem_records;
         WITH RECURSIVE s (n) AS (VALUES (1) UNION ALL SELECT n + 1 FROM s WHERE n < {})
         INSERT INTO idem_records ({}) SELECT {} FROM s, temp.template AS t;",
        records - 1,
        columns.join(", "),
        values.join(", ")
    )?;
    for [_, sql] in &indexes {
        writeln!(script, "{sql};")?;
    }
    Ok(connection.execute_batch(&script)?)
}

/// Repeats all keys that the store has made of one record: each is a prefix and some digits.
async fn fill_redis(url: &str, records: u64) -> Result<()> {
    let client = redis::Client::open(url)?;
    let patient = redis::AsyncConnectionConfig::new().set_response_timeout(Some(PATIENCE));
    let mut connection = client.get_multiplexed_async_connection_with_config(&patient).await?;
    let names: Vec<String> = redis::cmd("KEYS").arg("idem:*").query_async(&mut connection).await?;
    let repeat = Script::new(
        "local digits = tonumber(ARGV[3])
         for n = tonumber(ARGV[4]), tonumber(ARGV[5]) do
             local name = redis.sha1hex(n)
             name = KEYS[1] .. string.sub(name .. name, 1, digits)
             redis.call('RESTORE', name, ARGV[1], ARGV[2])
         end",
    );
    for name in names {
        let prefix = name.trim_end_matches(|digit: char| digit.is_ascii_hexdigit());
        let ttl: i64 = redis::cmd("PTTL").arg(&name).query_async(&mut connection).await?;
        let dump: Vec<u8> = redis::cmd("DUMP").arg(&name).query_async(&mut connection).await?;
        for first in (1..records).step_by(10_000) {
            let last = (first + 9_999).min(records - 1);
            let mut call = repeat.key(prefix);
            call.arg(ttl.max(0)).arg(&dump).arg(name.len() - prefix.len()).arg(first).arg(last);
            call.invoke_async::<()>(&mut connection).await?;
        }
    }
    Ok(())
}
