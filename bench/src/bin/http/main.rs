//! What idempotency costs over HTTP: the same small handler, bare, protected by idem on each of its
//! stores, by its peers and by hand. See README.md.

#![expect(clippy::expect_used, reason = "a measurement that cannot go on has failed")]

mod by_hand;
mod contenders;
mod load;
#[cfg(feature = "peers")]
mod peers;
mod server;

use std::{
    collections::{BTreeMap, HashMap},
    io::{Error, Result},
    process::ExitCode,
    time::{Duration, Instant},
};

use bench::{
    databases::{Kind, Records, Server},
    order::{Order, REQUEST},
    processes::Meter,
    report::{At, Goal, Ratio, Report, figure},
    statistics::Bound,
};
use clap::{Parser, Subcommand};

use self::{
    contenders::{CONTENDERS, Contender, Repeated},
    load::{Answer, Ask, Load},
    server::{LOAD_CORE, Process, pin, serve},
};

/// Measures what idempotency costs over HTTP.
#[derive(Parser)]
struct Options {
    #[command(subcommand)]
    command: Option<Mode>,
    /// How often everything is measured.
    #[arg(long, default_value_t = 20)]
    rounds: usize,
    /// How long a burst of first requests lasts; one of repeated ones is half as long, and one of
    /// refused ones a quarter.
    #[arg(long, default_value_t = 0.2)]
    seconds: f64,
    /// Who is compared; all of them unless it is said.
    #[arg(long, value_delimiter = ',')]
    only: Vec<String>,
    /// Over how many connections.
    #[arg(long, value_delimiter = ',', default_value = "1,16,64,256")]
    connections: Vec<usize>,
    /// What is asked.
    #[arg(long, value_delimiter = ',', default_value = "first,replay,mismatch,in flight")]
    phases: Vec<String>,
}

#[derive(Subcommand)]
enum Mode {
    /// Serves a contender, for this program itself.
    #[command(hide = true)]
    Serve { name: String, place: String },
}

const FIRST: &str = "first";
const REPLAY: &str = "replay";
const MISMATCH: &str = "mismatch";
const IN_FLIGHT: &str = "in flight";
const BARE: &str = "bare axum";

fn main() -> ExitCode {
    let options = Options::parse();
    let done = match options.command {
        Some(Mode::Serve { name, place }) => serve(&name, place),
        None => measure(&options),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}

fn measure(options: &Options) -> Result<()> {
    let chosen = |contender: &&Contender| {
        options.only.is_empty() || options.only.iter().any(|name| name == contender.name)
    };
    let contenders: Vec<&Contender> = CONTENDERS.iter().filter(chosen).collect();
    let known = |name: &&String| CONTENDERS.iter().any(|contender| contender.name == **name);
    if let Some(unknown) = options.only.iter().find(|name| !known(name)) {
        let all: Vec<_> = CONTENDERS.iter().map(|contender| contender.name).collect();
        return Err(Error::other(format!("no contender {unknown}: there is {}", all.join(", "))));
    }
    // They run on all cores, and so start before this process confines itself to one.
    let mut databases = HashMap::new();
    for kind in contenders.iter().filter_map(|contender| contender.database) {
        databases.entry(kind).or_insert_with(|| Server::start(kind, Records::Few));
    }
    pin(LOAD_CORE)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(measure_all(options, &contenders, &databases))
}

/// A contender whose server runs.
struct Target<'a> {
    contender: &'a Contender,
    database: Option<&'a Server>,
    process: Process,
    load: Load,
    /// Where an embedded database is; it goes away with the target.
    _directory: tempfile::TempDir,
}

async fn measure_all(
    options: &Options,
    contenders: &[&Contender],
    databases: &HashMap<Kind, Server>,
) -> Result<()> {
    let title = "A small JSON handler over HTTP, by who makes it safe to retry";
    let mut report = Report::new("http", title, "bench/run http");
    report.settings = settings(options, databases).await;
    for database in databases.values() {
        database.prepare().await;
    }
    let mut urls = HashMap::new();
    for contender in contenders {
        if let Some(kind) = contender.database {
            urls.insert(contender.name, databases[&kind].database().await);
        }
    }
    let start = Instant::now();
    for round in 0..options.rounds {
        let mut targets = Vec::new();
        for contender in contenders {
            let database = contender.database.map(|kind| &databases[&kind]);
            let url = urls.get(contender.name).map(String::as_str);
            let target = Target::start(contender, database, url, options).await;
            targets.push(target.map_err(|error| blame(contender, &error))?);
        }
        for database in databases.values() {
            database.checkpoint().await;
        }
        let mut connections = options.connections.clone();
        if round % 2 == 1 {
            connections.reverse();
            targets.reverse();
        }
        for connections in connections {
            for phase in &options.phases {
                for target in &mut targets {
                    let measured = target.measure(phase, connections, options, &mut report).await;
                    measured.map_err(|error| blame(target.contender, &error))?;
                }
            }
        }
        let passed = start.elapsed();
        let left = passed / (round as u32 + 1) * (options.rounds - round - 1) as u32;
        eprintln!("round {} of {}; {} s left", round + 1, options.rounds, left.as_secs());
    }
    conclude(&mut report);
    println!("{}", report.tables());
    let throughput = |phase: &'static str| {
        move |ratio: &Ratio| {
            ratio.at.phase == phase
                && ratio.figure == figure::THROUGHPUT
                && ratio.reference.contender == BARE
        }
    };
    let panels = [
        report.panel("first requests ÷ bare axum", "connections", throughput(FIRST)),
        report.panel("replays ÷ running it again, bare", "connections", throughput(REPLAY)),
    ];
    for path in report.write(&panels)? {
        println!("{}", path.display());
    }
    Ok(())
}

fn blame(contender: &Contender, error: &Error) -> Error {
    Error::other(format!("{}: {error}", contender.name))
}

async fn settings(
    options: &Options,
    databases: &HashMap<Kind, Server>,
) -> BTreeMap<String, String> {
    let mut settings = BTreeMap::new();
    for database in databases.values() {
        let (name, said) = database.settings().await;
        settings.insert(name.to_owned(), said);
    }
    settings.insert(
        "load".to_owned(),
        format!(
            "{} rounds of {} s bursts; each server on one core with one worker, the load on \
             another, databases on all",
            options.rounds, options.seconds
        ),
    );
    settings
}

impl<'a> Target<'a> {
    /// Starts its server on an empty database, and asks over each connection once.
    async fn start(
        contender: &'a Contender,
        database: Option<&'a Server>,
        url: Option<&str>,
        options: &Options,
    ) -> Result<Self> {
        let directory = tempfile::Builder::new().prefix("idem-bench-").tempdir()?;
        let files = directory.path().to_string_lossy().into_owned();
        if let (Some(database), Some(url)) = (database, url) {
            database.empty(url).await;
        }
        let process = Process::start(contender.name, url.unwrap_or(&files))?;
        let most = options.connections.iter().copied().max().unwrap_or(1);
        let load = Load::new(process.port, most, contender.sessions).await?;
        let mut target = Self { contender, database, process, load, _directory: directory };
        target.load.burst(Ask::Fresh, most, Duration::ZERO, created()).await?;
        Ok(target)
    }

    async fn measure(
        &mut self,
        phase: &str,
        connections: usize,
        options: &Options,
        report: &mut Report,
    ) -> Result<()> {
        let runs = self.contender.repeated == Repeated::Runs;
        let refused = |status| Answer { status, length: None };
        let (ask, expected, executes, share) = match phase {
            FIRST => (Ask::Fresh, created(), true, 1),
            REPLAY => (Ask::Again, created(), runs, 2),
            MISMATCH => {
                let Some(status) = self.contender.mismatch else { return Ok(()) };
                (Ask::Other, refused(status), false, 4)
            }
            IN_FLIGHT => {
                let Some(status) = self.contender.in_flight else { return Ok(()) };
                (Ask::Held, refused(status), false, 4)
            }
            other => return Err(Error::other(format!("nothing is called {other}"))),
        };
        let time = Duration::from_secs_f64(options.seconds / f64::from(share));
        let holding = match ask {
            Ask::Held => Some(self.load.hold().await?),
            _ => None,
        };
        if ask == Ask::Again {
            self.load.rehearse(connections, expected).await?;
        }
        let before = self.load.executed().await?;
        let families = self.database.map(Server::processes);
        let database = families.map(Meter::start);
        let server = Meter::start(vec![self.process.id()]);
        let own = Meter::start(vec![std::process::id()]);
        let burst = self.load.burst(ask, connections, time, expected).await;
        let burst = burst.map_err(|error| Error::other(format!("{phase}: {error}")))?;
        let (own, passed) = own.stop();
        let (server, _) = server.stop();
        let database = database.map(|meter| meter.stop().0);
        let executed = self.load.executed().await? - before;
        if executed != if executes { burst.answers } else { 0 } {
            let answers = burst.answers;
            let error = format!("{phase}: {executed} executions for {answers} answers");
            return Err(Error::other(error));
        }
        if let Some(holding) = holding {
            self.load.release(holding).await?;
        }
        let micros = |time: Duration| time.as_secs_f64() * 1e6;
        let each = |time: Duration| micros(time) / burst.answers as f64;
        let mut figures = vec![
            (figure::THROUGHPUT, burst.answers as f64 / burst.time.as_secs_f64()),
            (figure::P50, micros(burst.p50)),
            (figure::P99, micros(burst.p99)),
            (figure::CPU, each(server)),
            (figure::LOAD, own.as_secs_f64() / passed.as_secs_f64()),
        ];
        figures.extend(database.map(|database| (figure::DATABASE_CPU, each(database))));
        report.add(&At::new(self.contender.name, phase, connections as u64), figures);
        Ok(())
    }
}

/// The answer of the handler.
fn created() -> Answer {
    let order: Order = serde_json::from_str(REQUEST).expect("an order");
    let receipt = serde_json::to_vec(&order.take(0)).expect("a receipt");
    Answer { status: 201, length: Some(receipt.len()) }
}

fn conclude(report: &mut Report) {
    let cells: Vec<At> = report.cells.iter().map(|cell| cell.at.clone()).collect();
    for at in &cells {
        let reference = |name: &str| At { contender: name.to_owned(), ..at.clone() };
        if at.contender != BARE && [FIRST, REPLAY].contains(&&*at.phase) {
            report.compare(at, figure::THROUGHPUT, &reference(BARE));
            report.compare(at, figure::CPU, &reference(BARE));
        }
        let references: &[&str] = match (&*at.contender, &*at.phase) {
            ("postgres", REPLAY) => &["postgres uncached", "postgres by hand"],
            ("postgres" | "postgres uncached", _) => &["postgres by hand"],
            ("transactional", _) => &["transactional by hand"],
            _ => &[],
        };
        for name in references {
            report.compare(at, figure::THROUGHPUT, &reference(name));
        }
    }
    let goals = [
        ("memory", FIRST, figure::THROUGHPUT, BARE, Bound::AtLeast(0.9)),
        ("memory", FIRST, figure::CPU, BARE, Bound::AtMost(1.15)),
        ("memory", REPLAY, figure::THROUGHPUT, BARE, Bound::AtLeast(1.35)),
        ("transactional", FIRST, figure::THROUGHPUT, "transactional by hand", Bound::AtLeast(0.95)),
        ("postgres", REPLAY, figure::THROUGHPUT, "postgres uncached", Bound::AtLeast(4.0)),
        ("postgres", REPLAY, figure::THROUGHPUT, BARE, Bound::AtLeast(0.8)),
    ];
    for (contender, phase, figure, reference, bound) in goals {
        let what = match phase {
            FIRST => "first requests",
            _ => "replays",
        };
        let figure_name = if figure == figure::CPU { "CPU" } else { "throughput" };
        report.judge(Goal {
            what: format!("{contender}, {what}, {figure_name} ÷ {reference}, 64 connections"),
            of: At::new(contender, phase, 64),
            figure,
            reference: Some(At::new(reference, phase, 64)),
            bound,
        });
    }
}
