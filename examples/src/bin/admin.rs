//! An operator's tool: what became of an operation, and what to do about it.
//!
//! It works on the store of a server, running or not, whichever it is. A support ticket says an operation id, which
//! the client saw in a refusal; or a key, and whose it is.
//!
//! ```sh
//! cargo run -p examples --bin quickstart     # in another terminal, and pay: see there
//! alias admin='cargo run -q -p examples --bin admin -- --store sqlite:quickstart.db'
//!
//! admin list all                             # the oldest records first, with their operation ids
//! admin list unsettled                       # those of which nobody knows what happened
//! admin find 018f6b1e-7c52-4d0a-8a38-2f1f5a8b9c01
//! admin find --scope alice --key order-1 --method POST --route /payments
//!
//! # The bank's books say what happened: retries get this answer for a day.
//! admin settle done 018f6b1e-7c52-4d0a-8a38-2f1f5a8b9c01 --status 201 \
//!   --header 'content-type: application/json' --body '{"amount":100}'
//! # They say that nothing has: the next request with this key runs afresh.
//! admin settle not-done 018f6b1e-7c52-4d0a-8a38-2f1f5a8b9c01
//!
//! admin purge key --scope alice --key order-1 --method POST --route /payments
//! admin purge scope alice                    # all of a tenant's records
//! ```
//!
//! Whoever may read the store may use it: there is no other protection. A server whose
//! engine has a secret computes its keys with it; for those, say `--secret` too.

use std::{process::ExitCode, time::Duration};

use axum::http::{HeaderName, HeaderValue, Method, Response, StatusCode};
use clap::{Args, Parser, Subcommand, ValueEnum};
use examples::{Result, StoreChoice};
use idem_runtime::{
    Admin, Answer, Became, Format, Found, Idempotency, KeyName, OperationId, Record,
    RecordedResponse, Scope, State, Ttl, Values,
    store::{Kind, Listing, Purged},
};

/// Finds, lists, settles and purges the records of a server
#[derive(Parser)]
struct Command {
    /// Where the server keeps its records: `sqlite:PATH`, or the URL of a server, see `stores.rs`
    #[arg(long)]
    store: StoreChoice,
    /// The secret of the server's engine, if it has one
    #[arg(long)]
    secret: Option<String>,
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Shows what became of an operation
    Find {
        #[command(flatten)]
        which: Which,
        /// Shows the recorded answer, too: it is the tenant's own
        #[arg(long)]
        answer: bool,
    },
    /// Lists records, the oldest first
    List {
        kind: KindChoice,
        /// Whose: the values of the scope; everybody's if there is none
        #[arg(long)]
        scope: Vec<String>,
        /// At most so many
        #[arg(long, value_name = "N", default_value_t = 50)]
        limit: usize,
    },
    /// Says of an operation whose outcome is unknown what happened
    #[command(subcommand)]
    Settle(Settlement),
    /// Removes records, unless they are running: what was done may then be done again
    #[command(subcommand)]
    Purge(Doomed),
}

#[derive(Clone, Copy, ValueEnum)]
enum KindChoice {
    /// Nobody knows whether their effect happened
    Unsettled,
    /// Done, with an answer that could not be kept
    Tombstones,
    /// At work
    Running,
    /// Whatever became of them
    All,
}

#[derive(Subcommand)]
enum Settlement {
    /// It was done, and this is its answer
    Done {
        #[arg(value_name = "OPERATION_ID")]
        id: OperationId,
        #[arg(long, value_parser = status)]
        status: StatusCode,
        /// A header, as `name: value`
        #[arg(long = "header", value_name = "HEADER", value_parser = header)]
        headers: Vec<(HeaderName, HeaderValue)>,
        #[arg(long, default_value = "")]
        body: String,
        /// How long retries get it: `90s`, `24h`, `7days`, or `forever`
        #[arg(long, default_value = "24h", value_parser = ttl)]
        ttl: Ttl,
    },
    /// A plain function did it, and this is its value
    Returned {
        #[arg(value_name = "OPERATION_ID")]
        id: OperationId,
        /// The value as JSON
        #[arg(value_name = "JSON")]
        value: serde_json::Value,
        /// How long calls get it: `90s`, `24h`, `7days`, or `forever`
        #[arg(long, default_value = "24h", value_parser = ttl)]
        ttl: Ttl,
    },
    /// No attempt has done anything: the key is free, and its next request another operation
    NotDone {
        #[arg(value_name = "OPERATION_ID")]
        id: OperationId,
    },
}

#[derive(Subcommand)]
enum Doomed {
    /// The record of one key
    Key(Which),
    /// All records of a scope
    Scope {
        /// The values of the scope
        #[arg(required = true)]
        scope: Vec<String>,
    },
}

/// An operation by its id, or a key by its name.
#[derive(Args)]
struct Which {
    /// The operation, from a refusal, a log or a listing; without it, say `--key`
    #[arg(value_name = "OPERATION_ID", required_unless_present = "key", conflicts_with = "key")]
    id: Option<OperationId>,
    /// The key: the values of the anchor, in order
    #[arg(long, value_name = "VALUE")]
    key: Vec<String>,
    /// Whose it is: the values of the scope; none for a global one
    #[arg(long, value_name = "VALUE", requires = "key")]
    scope: Vec<String>,
    /// The format of the key's values: `uuid`, or `hex:32` for so many bytes
    #[arg(long, value_parser = format, requires = "key")]
    format: Option<Format>,
    /// The space of the key, if its handlers name one
    #[arg(long, value_name = "NAME", requires = "key", conflicts_with = "route")]
    space: Option<String>,
    /// The method that the request was sent with
    #[arg(long, requires = "route")]
    method: Option<Method>,
    /// The route that took it, such as `/payments/{id}`
    #[arg(long, requires_all = ["method", "key"])]
    route: Option<String>,
    /// The values of the route's parameters, in order
    #[arg(long = "parameter", value_name = "VALUE", requires = "route")]
    parameters: Vec<String>,
}

impl Which {
    fn name(&self) -> KeyName {
        let mut name = KeyName::of_arguments(&Values::from_iter(&self.key));
        if let Some(format) = self.format {
            name = name.format(format);
        }
        if let Some(space) = &self.space {
            name = name.space(space.clone());
        }
        if let (Some(method), Some(route)) = (&self.method, &self.route) {
            name = name.operation(method, route, &self.parameters);
        }
        name
    }

    async fn find(&self, admin: &Admin<'_>) -> Result<Option<Found>> {
        Ok(match self.id {
            Some(id) => admin.find_operation(id).await?,
            None => admin.find(&Values::from_iter(&self.scope), &self.name()).await?,
        })
    }

    async fn purge(&self, admin: &Admin<'_>) -> Result<Purged> {
        Ok(match self.id {
            Some(id) => admin.purge_operation(id).await?,
            None => admin.purge(&Values::from_iter(&self.scope), &self.name()).await?,
        })
    }
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    examples::exit(run(Command::parse()).await)
}

async fn run(Command { store, secret, task }: Command) -> Result<()> {
    // Whose keys are, each command says: the engine serves no request.
    let engine = Idempotency::builder(store.open_existing().await?).scope(Scope::global());
    let engine = match secret.as_deref() {
        Some("") => return Err("an empty secret keeps nothing secret".into()),
        Some(secret) => engine.secret(secret),
        None => engine,
    };
    let engine = engine.build();
    let admin = engine.admin();
    match task {
        Task::Find { which, answer } => {
            let found = which.find(&admin).await?.ok_or("there is no such record")?;
            show(&found, answer);
        }
        Task::List { kind, scope, limit } => list(&admin, kind, &scope, limit).await?,
        Task::Settle(Settlement::Done { id, status, headers, body, ttl }) => {
            let mut answer = Response::new(body.into());
            *answer.status_mut() = status;
            answer.headers_mut().extend(headers);
            admin.settle_done(id, &answer, ttl).await?;
            println!("settled as done: retries get a {status} {}", for_time(ttl));
        }
        Task::Settle(Settlement::Returned { id, value, ttl }) => {
            admin.settle_done_with_value(id, &value, ttl).await?;
            println!("settled as done: calls get this value {}", for_time(ttl));
        }
        Task::Settle(Settlement::NotDone { id }) => {
            admin.settle_not_done(id).await?;
            println!("settled as not done: the next request with its key runs afresh");
        }
        Task::Purge(Doomed::Key(which)) => match which.purge(&admin).await? {
            Purged { removed: 0, running: 0 } => return Err("there is no such record".into()),
            Purged { removed: 0, .. } => return Err("it is running: nothing was removed".into()),
            _ => println!("removed its record"),
        },
        Task::Purge(Doomed::Scope { scope }) => {
            let Purged { removed, running } = admin.purge_scope(&Values::from_iter(&scope)).await?;
            println!("removed {removed} records, left {running} that are running");
        }
    }
    Ok(())
}

async fn list(admin: &Admin<'_>, kind: KindChoice, scope: &[String], limit: usize) -> Result<()> {
    let kind = match kind {
        KindChoice::Unsettled => Kind::Unsettled,
        KindChoice::Tombstones => Kind::Tombstones,
        KindChoice::Running => Kind::Running,
        KindChoice::All => Kind::Any,
    };
    let scope = (!scope.is_empty()).then(|| admin.scope(&Values::from_iter(scope)));
    let page = admin.list(&Listing { kind, scope, after: None, limit }).await?;
    for record in &page.records {
        let Record { operation_id, operation, attempt, .. } = record;
        let (state, age) = (state(record), time(record.age));
        println!("{operation_id}  {state:<15}  attempt {attempt:<3}  {age:>12} old  {operation}");
    }
    match page.next {
        Some(_) => println!("and more: see `--limit`"),
        None if page.records.is_empty() => println!("none"),
        None => {}
    }
    Ok(())
}

/// What a listing knows of what became of a record.
fn state(record: &Record) -> &'static str {
    match record.state {
        _ if Kind::Running.covers(record) => "running",
        _ if Kind::Unsettled.covers(record) => "unknown outcome",
        _ if Kind::Tombstones.covers(record) => "tombstone",
        State::Issued => "issued",
        State::Running | State::Released | State::Completed => "completed",
    }
}

fn show(found: &Found, with_answer: bool) {
    let record = &found.record;
    println!("operation  {}", record.operation);
    println!("id         {}", record.operation_id);
    let became = match &found.became {
        Became::Issued => "its key was issued, and nothing has used it yet".to_owned(),
        Became::Expired => "its key has expired".to_owned(),
        Became::Running => format!("running, under a lease of {} more", time(record.lease_left)),
        Became::UnknownOutcome => {
            "unknown outcome: an attempt ended without saying whether its effect happened"
                .to_owned()
        }
        Became::Completed(Answer::Response(answer)) => {
            let RecordedResponse { status, headers, body } = answer;
            format!("completed: {status} (headers: {}, body: {} bytes)", headers.len(), body.len())
        }
        Became::Completed(Answer::Value(value)) => {
            format!("completed: a value of {} bytes", value.json.len())
        }
        Became::Tombstone { status: Some(status) } => {
            format!("completed: {status}, whose answer could not be kept")
        }
        Became::Tombstone { status: None } => {
            "completed, with a value that could not be kept".to_owned()
        }
        other => format!("{other:?}"),
    };
    println!("became     {became}");
    println!("attempt    {}", record.attempt);
    println!("made       {} ago", time(record.age));
    println!("kept       {}", for_time(record.kept_left));
    println!("scope      {:?}", record.scope);
    match &found.became {
        Became::Completed(Answer::Response(answer)) if with_answer => {
            println!();
            for (name, value) in &answer.headers {
                println!("{}: {}", String::from_utf8_lossy(name), String::from_utf8_lossy(value));
            }
            println!("\n{}", String::from_utf8_lossy(&answer.body));
        }
        Became::Completed(Answer::Value(value)) if with_answer => {
            println!("\n{}", String::from_utf8_lossy(&value.json));
        }
        _ => {}
    }
}

/// A span of time without the small change.
fn time(span: Duration) -> humantime::FormattedDuration {
    let whole = Duration::from_secs(span.as_secs());
    humantime::format_duration(if whole.is_zero() { span } else { whole })
}

fn for_time(ttl: Ttl) -> String {
    match ttl {
        Ttl::For(span) => format!("for {}", time(span)),
        Ttl::Forever => "for ever".to_owned(),
    }
}

fn status(text: &str) -> Result<StatusCode> {
    Ok(text.parse()?)
}

fn header(text: &str) -> Result<(HeaderName, HeaderValue)> {
    let (name, value) = text.split_once(':').ok_or("expected `name: value`")?;
    Ok((name.trim().parse()?, value.trim().parse()?))
}

fn ttl(text: &str) -> Result<Ttl> {
    match text {
        "forever" => Ok(Ttl::Forever),
        span => Ok(Ttl::For(humantime::parse_duration(span)?)),
    }
}

fn format(text: &str) -> Result<Format> {
    match text.split_once(':') {
        None if text == "uuid" => Ok(Format::Uuid),
        Some(("hex", bytes)) => match bytes.parse()? {
            0 => Err("a key of no bytes is no key".into()),
            bytes => Ok(Format::Hex(bytes)),
        },
        _ => Err("expected `uuid` or `hex:BYTES`".into()),
    }
}
