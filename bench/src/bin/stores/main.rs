//! What a store of idem's does a second, beside what one would write by hand on the same database.
//! See README.md.

mod by_hand;
mod growth;
mod load;
mod slow_flush;
mod subjects;

use std::{
    collections::{BTreeMap, HashMap},
    process::ExitCode,
    time::{Duration, Instant},
};

use bench::{
    databases::{Records, Server},
    processes::{Meter, written},
    report::{At, Goal, Report, figure},
    statistics::Bound,
};
use clap::Parser;
use tempfile::TempDir;

use self::{
    load::{Ask, Load},
    subjects::{CONTENDERS, Contender, Result},
};

/// Measures stores alone.
#[derive(Debug, Parser)]
struct Options {
    /// How often everything is measured.
    #[arg(long, default_value_t = 20)]
    rounds: usize,
    /// How long a burst of first claims lasts; one of replays is half as long, and one of refusals
    /// a quarter.
    #[arg(long, default_value_t = 0.2)]
    seconds: f64,
    /// Who is compared; all of them unless it is said.
    #[arg(long, value_delimiter = ',')]
    only: Vec<String>,
    /// By how many callers at once.
    #[arg(long, value_delimiter = ',', default_value = "1,16,64,256")]
    callers: Vec<usize>,
    /// Makes each flush of the disk take longer, as in `1ms`.
    #[arg(long, value_parser = delay)]
    flush_delay: Option<Duration>,
    /// Compares stores that already have so many records, instead, as in `10000,10000000`.
    #[arg(long, value_delimiter = ',')]
    records: Vec<u64>,
    /// How long such a store is used before it is measured, in seconds.
    #[arg(long, default_value_t = 20.0)]
    warm_up: f64,
}

fn delay(text: &str) -> std::result::Result<Duration, String> {
    let (number, unit) = match text.strip_suffix("us") {
        Some(number) => (number, 1),
        None => (text.strip_suffix("ms").ok_or("say it as in 1ms or 500us")?, 1000),
    };
    let number: u64 = number.parse().map_err(|_| "say it as in 1ms or 500us")?;
    Ok(Duration::from_micros(number * unit))
}

/// What is done.
const FIRST: &str = "claim and completion";
const REPLAY: &str = "replay";
const REFUSAL: &str = "refusal";

fn main() -> ExitCode {
    let options = Options::parse();
    match run(&options) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}

fn run(options: &Options) -> Result<ExitCode> {
    let known = |name: &&String| CONTENDERS.iter().any(|contender| contender.name == **name);
    if let Some(unknown) = options.only.iter().find(|name| !known(name)) {
        let all: Vec<_> = CONTENDERS.iter().map(|contender| contender.name).collect();
        return Err(format!("no contender {unknown}: there is {}", all.join(", ")).into());
    }
    if let Some(delay) = options.flush_delay.filter(|_| !slow_flush::is_slow()) {
        return slow_flush::run_again(delay);
    }
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    runtime.block_on(async {
        match options.records.is_empty() {
            true => measure(options).await,
            false => growth::measure(options).await,
        }
    })?;
    Ok(ExitCode::SUCCESS)
}

/// A contender, with what it needs.
struct Target<'a> {
    contender: &'a Contender,
    database: Option<&'a Server>,
    load: Load,
    /// Where an embedded database is; it goes away with the target.
    _directory: TempDir,
}

async fn measure(options: &Options) -> Result<()> {
    let chosen = |contender: &&Contender| {
        options.only.is_empty() || options.only.iter().any(|name| name == contender.name)
    };
    let contenders: Vec<&Contender> = CONTENDERS.iter().filter(chosen).collect();
    let mut databases = HashMap::new();
    for kind in contenders.iter().filter_map(|contender| contender.database) {
        databases.entry(kind).or_insert_with(|| Server::start(kind, Records::Few));
    }
    let (question, title) = match options.flush_delay {
        None => ("stores", "Stores alone, beside two statements by hand".to_owned()),
        Some(delay) => {
            let title = format!("Stores alone, with {delay:?} more for each flush of the disk");
            ("stores-slow-disk", title)
        }
    };
    let mut report = Report::new(question, &title, "bench/run stores");
    report.settings = settings(options, databases.values()).await;
    for database in databases.values() {
        database.prepare().await;
    }
    let mut urls = HashMap::new();
    for contender in &contenders {
        if let Some(kind) = contender.database {
            urls.insert(contender.name, databases[&kind].database().await);
        }
    }
    let start = Instant::now();
    for round in 0..options.rounds {
        let mut targets = Vec::new();
        for contender in &contenders {
            let database = contender.database.map(|kind| &databases[&kind]);
            let url = urls.get(contender.name).map(String::as_str);
            let target = Target::start(contender, database, url, options).await;
            targets.push(target.map_err(|error| format!("{}: {error}", contender.name))?);
        }
        for database in databases.values() {
            database.checkpoint().await;
        }
        let mut callers = options.callers.clone();
        if round % 2 == 1 {
            callers.reverse();
            targets.reverse();
        }
        for callers in callers {
            for ask in [Ask::First, Ask::Replay, Ask::Refuse] {
                for target in &mut targets {
                    let measured = target.measure(ask, callers, options, &mut report).await;
                    measured.map_err(|error| format!("{}: {error}", target.contender.name))?;
                }
            }
        }
        progress(start, round, options.rounds);
    }
    conclude(&mut report);
    println!("{}", report.tables());
    let panel = |phase: &'static str, title: &str| {
        report.panel(title, "callers at once", move |ratio| {
            ratio.at.phase == phase && ratio.figure == figure::THROUGHPUT
        })
    };
    let panels =
        [panel(FIRST, "claims and completions ÷ by hand"), panel(REPLAY, "replays ÷ by hand")];
    for path in report.write(&panels)? {
        println!("{}", path.display());
    }
    Ok(())
}

fn progress(start: Instant, round: usize, rounds: usize) {
    let left = start.elapsed() / (round as u32 + 1) * (rounds - round - 1) as u32;
    eprintln!("round {} of {rounds}; {} s left", round + 1, left.as_secs());
}

async fn settings(
    options: &Options,
    databases: impl Iterator<Item = &Server>,
) -> BTreeMap<String, String> {
    let mut settings = BTreeMap::new();
    for database in databases {
        let (name, said) = database.settings().await;
        settings.insert(name.to_owned(), said);
    }
    settings.insert("SQLite".to_owned(), format!("{}, synchronous=FULL", rusqlite::version()));
    let flush = options.flush_delay.map_or_else(
        || "as the disk does them".to_owned(),
        |delay| format!("{delay:?} longer than the disk takes"),
    );
    settings.insert("flushes".to_owned(), flush);
    settings.insert(
        "load".to_owned(),
        format!(
            "{} rounds of {} s bursts; callers on two workers, databases beside them, nobody pinned",
            options.rounds, options.seconds
        ),
    );
    settings
}

impl<'a> Target<'a> {
    /// Makes it anew, on an empty database, and uses its connections once.
    async fn start(
        contender: &'a Contender,
        database: Option<&'a Server>,
        url: Option<&str>,
        options: &Options,
    ) -> Result<Self> {
        let directory = tempfile::Builder::new().prefix("idem-bench-").tempdir()?;
        if let (Some(database), Some(url)) = (database, url) {
            database.empty(url).await;
        }
        let files = directory.path().to_string_lossy();
        let subject = (contender.make)(url.unwrap_or(&files).to_owned()).await?;
        let mut load = Load::new(subject, 1);
        let most = options.callers.iter().copied().max().unwrap_or(1);
        load.burst(Ask::First, most, Duration::ZERO).await?;
        Ok(Self { contender, database, load, _directory: directory })
    }

    async fn measure(
        &mut self,
        ask: Ask,
        callers: usize,
        options: &Options,
        report: &mut Report,
    ) -> Result<()> {
        let (phase, share) = match ask {
            Ask::First => (FIRST, 1),
            Ask::Replay => (REPLAY, 2),
            Ask::Refuse => (REFUSAL, 4),
        };
        let time = Duration::from_secs_f64(options.seconds / f64::from(share));
        if ask == Ask::Refuse {
            self.load.hold().await?;
        }
        let figures = figures(&mut self.load, self.database, ask, callers, time).await?;
        report.add(&At::new(self.contender.name, phase, callers as u64), figures);
        Ok(())
    }
}

/// The figures of one burst.
async fn figures(
    load: &mut Load,
    database: Option<&Server>,
    ask: Ask,
    callers: usize,
    time: Duration,
) -> Result<Vec<(&'static str, f64)>> {
    let log = match database {
        Some(database) => database.log_bytes().await,
        None => None,
    };
    let disk = written(&std::env::temp_dir());
    let server = database.map(|database| Meter::start(database.processes()));
    let own = Meter::start(vec![std::process::id()]);
    let burst = load.burst(ask, callers, time).await?;
    let (own, _) = own.stop();
    let server = server.map(|meter| meter.stop().0);
    let disk = written(&std::env::temp_dir()).zip(disk).map(|(after, before)| after - before);
    let micros = |time: Duration| time.as_secs_f64() * 1e6;
    let done = burst.done as f64;
    let mut figures = vec![
        (figure::THROUGHPUT, done / burst.time.as_secs_f64()),
        (figure::P50, micros(burst.p50)),
        (figure::P99, micros(burst.p99)),
        (figure::CPU, micros(own) / done),
        (figure::BOTH_CPU, micros(own + server.unwrap_or_default()) / done),
    ];
    figures.extend(server.map(|server| (figure::DATABASE_CPU, micros(server) / done)));
    if ask == Ask::First {
        figures.extend(disk.map(|disk| (figure::DISK_BYTES, disk as f64 / done)));
        if let (Some(database), Some(before)) = (database, log)
            && let Some(after) = database.log_bytes().await
        {
            figures.push((figure::LOG_BYTES, (after - before) / done));
        }
    }
    Ok(figures)
}

fn conclude(report: &mut Report) {
    let cells: Vec<At> = report.cells.iter().map(|cell| cell.at.clone()).collect();
    for at in &cells {
        let contender = CONTENDERS.iter().find(|contender| contender.name == at.contender);
        let Some(by_hand) = contender.and_then(|contender| contender.by_hand) else { continue };
        let reference = At { contender: by_hand.to_owned(), ..at.clone() };
        report.compare(at, figure::THROUGHPUT, &reference);
        report.compare(at, figure::BOTH_CPU, &reference);
    }
    let at_least =
        |store, callers, bound| (store, callers, figure::THROUGHPUT, Bound::AtLeast(bound));
    let goals = match &*report.question {
        "stores-slow-disk" => vec![at_least("postgres", 16, 0.95)],
        _ => vec![
            at_least("postgres", 1, 0.97),
            at_least("postgres", 16, 1.3),
            at_least("postgres", 64, 3.5),
            at_least("postgres", 256, 6.0),
            ("postgres", 64, figure::BOTH_CPU, Bound::AtMost(50.0)),
            at_least("mariadb", 1, 0.95),
            at_least("mariadb", 64, 2.8),
            at_least("mariadb", 256, 5.5),
            at_least("sqlite", 64, 6.0),
            at_least("redis", 64, 0.7),
            ("redis", 64, figure::P99, Bound::AtMost(1.3)),
        ],
    };
    let disk = if report.question == "stores-slow-disk" { ", slow disk" } else { "" };
    for (store, callers, figure, bound) in goals {
        let of = At::new(store, FIRST, callers);
        let reference = At::new(&format!("{store} by hand"), FIRST, callers);
        let (what, reference) = match figure {
            figure::BOTH_CPU => ("CPU µs an operation, client and server".to_owned(), None),
            figure::P99 => (format!("p99 ÷ {}", reference.contender), Some(reference)),
            _ => (format!("throughput ÷ {}", reference.contender), Some(reference)),
        };
        let callers =
            if callers == 1 { "1 caller".to_owned() } else { format!("{callers} callers") };
        let what = format!("{store} store, claim + completion, {what}, {callers}{disk}");
        report.judge(Goal { what, of, figure, reference, bound });
    }
}
