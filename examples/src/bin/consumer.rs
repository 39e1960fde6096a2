//! A consumer of a queue that delivers each message at least once, and a job that happens once.
//!
//! The queue is a directory: a message is a file, and its name says from when on it can be taken. A
//! consumer that takes one hides it for a while; one that dies does not acknowledge it, and it comes
//! back. The job is a plain idempotent function: it charges and then writes a mail, each a step with
//! a key of its own for whoever is called.
//!
//! ```sh
//! cargo run -p examples --bin consumer -- put --order o-1 --amount 100
//! cargo run -p examples --bin consumer -- put --order o-1 --amount 100   # the producer's retry
//! cargo run -p examples --bin consumer -- put --order o-1 --amount 999   # another one: it is put aside
//! cargo run -p examples --bin consumer -- run --until-empty
//! cat consumer/ledger                                                    # one charge, one mail
//!
//! # Dies after the charge and before anything of it is written down; kill it with -9 when it says
//! # so, and let another one go on: one charge, since the bank knows the key.
//! cargo run -p examples --bin consumer -- put --order o-2 --amount 250
//! cargo run -p examples --bin consumer -- run --stall after-effect
//! cargo run -p examples --bin consumer -- run --until-empty
//! ```

use std::{
    ffi::OsStr,
    fs, io,
    path::{Path, PathBuf},
    process::ExitCode,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use clap::{Args, Parser, Subcommand, ValueEnum};
use examples::{Downstream, Failure, Result, StoreChoice};
use idem_runtime::{CallError, Idempotency, RefusalKind, Scope, StepError, idempotent};
use serde::{Deserialize, Serialize};
use tokio::time::sleep;
use uuid::Uuid;

/// What is to be paid for.
#[derive(Clone, Deserialize, Serialize)]
struct Message {
    order: String,
    amount: u64,
}

/// What came of it.
#[derive(Deserialize, Serialize)]
struct Paid {
    attempt: u32,
    charge: Uuid,
}

/// Charges for an order and says so, once, however often its message comes.
#[idempotent(
    anchor = arg(message.order),
    space = "orders",
    ttl = "7d",
    fingerprint = arg(message.amount),
    operation = operation,
    nothing_happened = Unpaid::is_refusal,
)]
async fn pay(idem: &Idempotency, world: World, message: Message) -> Result<Paid, Unpaid> {
    let first = operation.attempt() == 1;
    world.stall(first, Stall::BeforeEffect).await;
    let charge = operation.derive("charge");
    let charging = async {
        println!("charging {} for {}", message.amount, message.order);
        world.bank.call("charges", charge).await?;
        world.stall(first, Stall::AfterEffect).await;
        Ok::<_, Failure>(charge.as_uuid())
    };
    let charge = operation.step("charge", charging).await?;
    world.stall(first, Stall::BetweenSteps).await;
    let mailing = async {
        println!("writing to whom ordered {}", message.order);
        world.bank.call("mails", operation.derive("mail")).await
    };
    operation.step("mail", mailing).await?;
    Ok(Paid { attempt: operation.attempt(), charge })
}

#[derive(Debug, thiserror::Error)]
enum Unpaid {
    /// The bank's, or the post's.
    #[error(transparent)]
    Downstream(#[from] Failure),
    /// The step could not be written down, or another attempt has taken over.
    #[error("a step came to nothing")]
    Step(#[source] StepError<Failure>),
    #[error(transparent)]
    Idempotency(#[from] CallError),
}

impl Unpaid {
    /// Whether it says that nothing happened.
    fn is_refusal(&self) -> bool {
        matches!(self, Self::Downstream(failure) if failure.is_refusal())
    }
}

impl From<StepError<Failure>> for Unpaid {
    fn from(error: StepError<Failure>) -> Self {
        match error {
            StepError::Failed(failure) => Self::Downstream(failure),
            error => Self::Step(error),
        }
    }
}

/// What the job works with.
#[derive(Clone)]
struct World {
    bank: Downstream,
    stall: Option<Stall>,
}

/// Where a job's first attempt can stop for good, for whoever wants to kill it there.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Stall {
    /// With nothing done.
    BeforeEffect,
    /// The bank has charged, and nobody has written it down.
    AfterEffect,
    /// The charge is written down, and there is no mail yet.
    BetweenSteps,
    /// All is done and recorded, and the message is not acknowledged.
    AfterRecord,
}

impl World {
    async fn stall(&self, first: bool, here: Stall) {
        if first && self.stall == Some(here) {
            println!("stalled");
            std::future::pending().await
        }
    }
}

/// Takes messages and does what they say, until there are none if that is asked for.
async fn consume(queue: &Queue, idem: &Idempotency, world: &World, run: &Run) -> Result<()> {
    loop {
        let Some(taken) = queue.take(Duration::from_millis(run.visibility_ms))? else {
            if run.until_empty && queue.is_empty()? {
                return Ok(());
            }
            sleep(Duration::from_millis(20)).await;
            continue;
        };
        let order = taken.message.order.clone();
        match pay(idem, world.clone(), taken.message.clone()).await {
            Ok(paid) => {
                world.stall(paid.attempt == 1, Stall::AfterRecord).await;
                println!("paid {order} by {} in attempt {}", paid.charge, paid.attempt);
                taken.acknowledge()?;
            }
            Err(Unpaid::Idempotency(error)) if error.kind() == RefusalKind::NotReplayable => {
                println!("paid {order}");
                taken.acknowledge()?;
            }
            // To deliver it again changes nothing: somebody must look.
            Err(Unpaid::Idempotency(error)) if !error.is_retryable() => {
                println!("put {order} aside: {error}");
                taken.put_aside()?;
            }
            Err(error) => {
                println!("later {order}: {error}");
                let wait = match &error {
                    Unpaid::Idempotency(error) => error.retry_after(),
                    Unpaid::Downstream(_) | Unpaid::Step(_) => None,
                };
                taken.deliver_in(wait.unwrap_or(Duration::from_millis(200)))?;
            }
        }
    }
}

/// A directory of messages. The name of each says from when on it can be taken, in milliseconds
/// since 1970: who renames it has taken it.
struct Queue {
    directory: PathBuf,
}

/// A message that others do not see for a while.
struct Taken {
    file: PathBuf,
    message: Message,
}

impl Queue {
    fn open(directory: PathBuf) -> io::Result<Self> {
        fs::create_dir_all(&directory)?;
        Ok(Self { directory })
    }

    fn put(&self, message: &Message) -> io::Result<()> {
        let id = Uuid::new_v4();
        let unfinished = self.directory.join(format!("{id}.unfinished"));
        fs::write(&unfinished, serde_json::to_vec(message)?)?;
        fs::rename(unfinished, self.directory.join(format!("{id}@{}.json", now())))
    }

    /// Hides the oldest message that can be taken, for so long.
    fn take(&self, hidden: Duration) -> io::Result<Option<Taken>> {
        let mut visible = self.messages()?;
        visible.retain(|(from, _)| *from <= now());
        visible.sort();
        for (_, file) in visible {
            let hiding = renamed(&file, hidden);
            match fs::rename(&file, &hiding) {
                Ok(()) => {
                    let message = serde_json::from_slice(&fs::read(&hiding)?)?;
                    return Ok(Some(Taken { file: hiding, message }));
                }
                // Another consumer was faster.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(error),
            }
        }
        Ok(None)
    }

    fn is_empty(&self) -> io::Result<bool> {
        Ok(self.messages()?.is_empty())
    }

    fn messages(&self) -> io::Result<Vec<(u128, PathBuf)>> {
        let mut messages = Vec::new();
        for entry in fs::read_dir(&self.directory)? {
            let file = entry?.path();
            if file.extension() != Some(OsStr::new("json")) {
                continue;
            }
            let from = parts(&file).and_then(|(_, from)| from.parse().ok());
            messages.extend(from.map(|from| (from, file)));
        }
        Ok(messages)
    }
}

impl Taken {
    /// It is done.
    fn acknowledge(self) -> io::Result<()> {
        gone_is_done(fs::remove_file(self.file))
    }

    /// It is to come again.
    fn deliver_in(self, wait: Duration) -> io::Result<()> {
        let later = renamed(&self.file, wait);
        gone_is_done(fs::rename(self.file, later))
    }

    /// It is to come no more.
    fn put_aside(self) -> io::Result<()> {
        let aside = self.file.with_extension("aside");
        gone_is_done(fs::rename(self.file, aside))
    }
}

/// Where the time to hide a message is over, somebody else has it now.
fn gone_is_done(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        result => result,
    }
}

fn renamed(file: &Path, visible_in: Duration) -> PathBuf {
    let id = parts(file).map_or("", |(id, _)| id);
    file.with_file_name(format!("{id}@{}.json", now() + visible_in.as_millis()))
}

/// Id, and from when on it can be taken.
fn parts(file: &Path) -> Option<(&str, &str)> {
    file.file_stem()?.to_str()?.split_once('@')
}

fn now() -> u128 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis())
}

/// A consumer of a queue that delivers at least once, and a job that happens once
#[derive(Parser)]
struct Command {
    /// Where queue and ledger are, and the records unless they are to be elsewhere
    #[arg(long, default_value = "consumer", global = true)]
    directory: PathBuf,
    #[command(subcommand)]
    what: What,
}

#[derive(Subcommand)]
enum What {
    /// Put a message into the queue
    Put {
        #[arg(long)]
        order: String,
        #[arg(long)]
        amount: u64,
    },
    /// Take messages out of it
    Run(Run),
}

#[derive(Args)]
struct Run {
    /// Exit when the queue is empty
    #[arg(long)]
    until_empty: bool,
    /// For how long a message that was taken is hidden from others, in milliseconds
    #[arg(long, default_value_t = 5_000)]
    visibility_ms: u64,
    /// For how long a job's claim outlives its process, in milliseconds
    #[arg(long, default_value_t = 5_000)]
    lease_ms: u64,
    /// Where idem keeps its records, see `stores.rs` [default: sqlite:DIRECTORY/records.db]
    #[arg(long)]
    store: Option<StoreChoice>,
    /// Stop for good at this place of a job's first attempt
    #[arg(long)]
    stall: Option<Stall>,
}

#[tokio::main]
async fn main() -> ExitCode {
    examples::exit(run(Command::parse()).await)
}

async fn run(Command { directory, what }: Command) -> Result<()> {
    let queue = Queue::open(directory.join("queue"))?;
    let run = match what {
        What::Put { order, amount } => return Ok(queue.put(&Message { order, amount })?),
        What::Run(run) => run,
    };
    let beside = || StoreChoice::Sqlite(directory.join("records.db"));
    let store = run.store.clone().unwrap_or_else(beside);
    // Nobody's orders have the number of another's: there is one scope.
    let idem = Idempotency::builder(store.open().await?)
        .scope(Scope::global())
        .lease(Duration::from_millis(run.lease_ms))
        .build();
    let bank = Downstream::open(&directory.join("ledger"))?;
    let world = World { bank, stall: run.stall };
    consume(&queue, &idem, &world, &run).await
}
