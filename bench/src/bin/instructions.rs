//! How many instructions a request takes, counted by callgrind.
//!
//! A request goes through hyper's HTTP/1 connection over a pipe in memory, on a runtime of one
//! thread: no kernel, no clock that matters, and a count that repeats. Each variant is run twice
//! under valgrind, with few and with many requests; what the many took more, divided by how many
//! more they were, is the cost of one. The client's side, which is small and the same for all, is
//! part of it.
//!
//! SHA-256 is counted apart. Valgrind hides the processor's SHA instructions, so under it the digest
//! runs in software and costs some thirty times what it costs outside.
//!
//! What lets a handler survive its client is counted by its functions: what they do themselves, and
//! have others do, but for the work that they protect and the box that this has in any case.
//!
//! `--check` compares the counts with those in `instructions.json` and fails where one is more than
//! two per cent larger; `--accept` writes that file.

use std::{
    collections::{BTreeMap, HashMap},
    env,
    error::Error,
    fs,
    path::Path,
    process::{Command, ExitCode},
};

use axum::{Json, Router, http::StatusCode, routing::post};
use bench::{
    machine::package,
    order::{Order, REQUEST, Receipt},
    report::{
        At, Goal, Report,
        figure::{DIGEST, INSTRUCTIONS, PROTECTION},
    },
    statistics::Bound,
};
use hyper_util::{rt::TokioIo, service::TowerToHyperService};
use idem_runtime::{Idempotency, Scope, idempotent, store::MemoryStore};
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};

type Failure = Box<dyn Error>;

const FEW: usize = 200;
const MANY: usize = 1_200;
/// What a count may be larger than the one that was accepted.
const TOLERANCE: f64 = 0.02;
/// The variants, and whether each request has a key of its own.
const VARIANTS: [(&str, bool); 5] = [
    ("bare axum", true),
    ("first request", true),
    ("replay", false),
    ("conflict", false),
    (WAITING, true),
];
/// As most handlers wait for something: only then can a client hang up half-way.
const WAITING: &str = "first request, its handler waits once";

async fn bare(Json(order): Json<Order>) -> (StatusCode, Json<Receipt>) {
    (StatusCode::CREATED, Json(order.take(7)))
}

#[idempotent(anchor = header("Idempotency-Key"))]
async fn guarded(Json(order): Json<Order>) -> (StatusCode, Json<Receipt>) {
    (StatusCode::CREATED, Json(order.take(7)))
}

#[idempotent(anchor = header("Idempotency-Key"))]
async fn waiting(Json(order): Json<Order>) -> (StatusCode, Json<Receipt>) {
    tokio::task::yield_now().await;
    (StatusCode::CREATED, Json(order.take(7)))
}

/// Never answers: whoever comes second finds it running.
#[idempotent(anchor = header("Idempotency-Key"))]
async fn endless(Json(_): Json<Order>) -> (StatusCode, Json<Receipt>) {
    std::future::pending().await
}

fn router(variant: &str) -> Router {
    let engine =
        || Idempotency::builder(MemoryStore::new()).scope(Scope::header("X-API-Key")).build();
    match variant {
        "bare axum" => Router::new().route("/orders", post(bare)),
        "conflict" => Router::new().route("/orders", post(endless)).with_state(engine()),
        WAITING => Router::new().route("/orders", post(waiting)).with_state(engine()),
        _ => Router::new().route("/orders", post(guarded)).with_state(engine()),
    }
}

fn request(key: usize) -> Vec<u8> {
    format!(
        "POST /orders HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n\
         content-length: {}\r\nx-api-key: tenant-1\r\nidempotency-key: {key:036}\r\n\r\n{REQUEST}",
        REQUEST.len()
    )
    .into_bytes()
}

fn connect(app: &Router) -> DuplexStream {
    let (client, server) = duplex(64 * 1024);
    let service = TowerToHyperService::new(app.clone());
    tokio::spawn(async move {
        let connection = hyper::server::conn::http1::Builder::new();
        // It ends with its client.
        let _ = connection.serve_connection(TokioIo::new(server), service).await;
    });
    client
}

/// Sends requests one after the other, and stops at an answer that is not the expected one.
async fn send(variant: &str, own_keys: bool, requests: usize) -> Result<(), Failure> {
    let app = router(variant);
    let (mut client, mut owner) = (connect(&app), connect(&app));
    if variant == "conflict" {
        owner.write_all(&request(0)).await?;
        tokio::task::yield_now().await;
    }
    let (status, replays): (&[u8], _) = match variant {
        "conflict" => (b"HTTP/1.1 409", false),
        "replay" => (b"HTTP/1.1 201", true),
        _ => (b"HTTP/1.1 201", false),
    };
    // The client does as little as it can: it counts too.
    let (mut buffer, mut asked) = (vec![0; 64 * 1024], request(0));
    let head_end = asked.len() - REQUEST.len();
    let digits = head_end - 12..head_end - 4;
    for number in 0..requests {
        let mut key = if own_keys { number } else { 0 };
        for digit in asked[digits.clone()].iter_mut().rev() {
            *digit = b'0' + (key % 10) as u8;
            key /= 10;
        }
        client.write_all(&asked).await?;
        let read = client.read(&mut buffer).await?;
        let answer = &buffer[..read];
        let is_looked_at = number < 2 || number + 1 == requests;
        let is_wrong = !answer.starts_with(status)
            || is_looked_at && is_replay(answer) != (replays && number > 0);
        if is_wrong {
            let answer = String::from_utf8_lossy(answer);
            return Err(format!("{variant}, request {number}: {answer}").into());
        }
    }
    Ok(())
}

fn is_replay(answer: &[u8]) -> bool {
    String::from_utf8_lossy(answer).contains("idempotent-replayed: true")
}

/// The instructions of a whole run, and of these some that are counted apart.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Count {
    all: u64,
    digest: u64,
    protection: u64,
}

/// What a function is part of.
#[derive(Clone, Copy, PartialEq)]
enum Part {
    Digest,
    Protection,
    /// What is protected, and its box.
    Protected,
    Other,
}

impl Part {
    fn of(function: &str) -> Self {
        if function.contains("sha2::") || function.contains("sha256") {
            Self::Digest
        } else if function.contains("Exchange::claim::") || function.contains("__rust_dealloc") {
            Self::Protected
        } else if function.contains("idem_runtime::detach::FinishAnyway<")
            && !function.contains("futures_util")
        {
            Self::Protection
        } else {
            Self::Other
        }
    }
}

fn count(variant: &str, requests: usize, directory: &Path) -> Result<Count, Failure> {
    let out = directory.join("callgrind.out");
    let output = Command::new("valgrind")
        .arg("--tool=callgrind")
        .arg(format!("--callgrind-out-file={}", out.display()))
        .arg(env::current_exe()?)
        .args(["run", variant, &requests.to_string()])
        .output()
        .map_err(|error| format!("valgrind, which `bench/run` installs: {error}"))?;
    if !output.status.success() {
        return Err(String::from_utf8_lossy(&output.stderr).into());
    }
    read_count(&fs::read_to_string(out)?)
}

/// Reads callgrind's own format: <https://valgrind.org/docs/manual/cl-format.html>. What a function
/// costs itself stands on lines of its own; the line after `calls=` is what its callee cost.
fn read_count(text: &str) -> Result<Count, Failure> {
    let mut parts = HashMap::new();
    // A name is said once, with a number, and then by that.
    let mut part = |named: &str| {
        let (number, name) = named.split_once(' ').unwrap_or((named, ""));
        *parts.entry(number.to_owned()).or_insert_with(|| Part::of(name))
    };
    let (mut function, mut callee, mut is_callees) = (Part::Other, Part::Other, false);
    let mut counted = Count::default();
    for line in text.lines() {
        if let Some(named) = line.strip_prefix("fn=") {
            function = part(named);
        } else if let Some(named) = line.strip_prefix("cfn=") {
            callee = part(named);
        } else if line.starts_with("calls=") {
            is_callees = true;
        } else if line.starts_with(|first: char| first.is_ascii_digit() || "+-*".contains(first)) {
            let cost: u64 = line.split(' ').nth(1).ok_or("a line without a cost")?.parse()?;
            if std::mem::take(&mut is_callees) {
                if function == Part::Protection && callee == Part::Other {
                    counted.protection += cost;
                }
                continue;
            }
            counted.all += cost;
            counted.digest += if function == Part::Digest { cost } else { 0 };
            counted.protection += if function == Part::Protection { cost } else { 0 };
        }
    }
    if counted.all == 0 {
        return Err("callgrind has counted nothing".into());
    }
    Ok(counted)
}

/// What a request takes: instructions without SHA-256, of SHA-256, and of surviving a hang-up.
fn measure(variant: &str, directory: &Path) -> Result<[f64; 3], Failure> {
    let (few, many) = (count(variant, FEW, directory)?, count(variant, MANY, directory)?);
    let a_request = |of: fn(Count) -> u64| (of(many) - of(few)) as f64 / (MANY - FEW) as f64;
    let (digest, protection) =
        (a_request(|count| count.digest), a_request(|count| count.protection));
    if variant != "bare axum" && (digest == 0.0 || protection == 0.0) {
        return Err("what is counted apart is not found by its functions' names".into());
    }
    Ok([a_request(|count| count.all - count.digest), digest, protection])
}

fn main() -> Result<ExitCode, Failure> {
    let words: Vec<_> = env::args().skip(1).collect();
    let words: Vec<_> = words.iter().map(String::as_str).collect();
    let (check, accept) = match words[..] {
        ["run", variant, requests] => {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build()?;
            let own_keys = VARIANTS.contains(&(variant, true));
            runtime.block_on(send(variant, own_keys, requests.parse()?))?;
            return Ok(ExitCode::SUCCESS);
        }
        [] => (false, false),
        ["--check"] => (true, false),
        ["--accept"] => (false, true),
        _ => return Err("only --check or --accept can be said".into()),
    };
    let directory = tempfile::tempdir()?;
    let title = "Instructions a request, in memory";
    let mut report = Report::new("instructions", title, "bench/run instructions");
    let mut counts = BTreeMap::new();
    for (variant, _) in VARIANTS {
        let [all, digest, protection] = measure(variant, directory.path())?;
        let figures = [(INSTRUCTIONS, all), (PROTECTION, protection), (DIGEST, digest)];
        report.add(&At::new("idem", variant, 1), figures);
        counts.insert(variant.to_owned(), all);
    }
    let bare = counts["bare axum"];
    let difference = At::new("idem", "first request beyond bare axum", 1);
    report.add(&difference, [(INSTRUCTIONS, counts["first request"] - bare)]);
    report.judge(Goal {
        what: "memory store, first request, instructions beyond bare axum".into(),
        of: difference,
        figure: INSTRUCTIONS,
        reference: None,
        bound: Bound::AtMost(6_000.0),
    });
    report.judge(Goal {
        what: "replay, instructions against bare axum".into(),
        of: At::new("idem", "replay", 1),
        figure: INSTRUCTIONS,
        reference: Some(At::new("idem", "bare axum", 1)),
        bound: Bound::AtMost(0.45),
    });
    report.judge(Goal {
        what: "surviving a hang-up, instructions".into(),
        of: At::new("idem", WAITING, 1),
        figure: PROTECTION,
        reference: None,
        bound: Bound::AtMost(300.0),
    });
    println!("{}", report.tables());
    let accepted = package().join("instructions.json");
    if accept {
        fs::write(&accepted, serde_json::to_string_pretty(&counts)? + "\n")?;
    }
    if check {
        return judge(&counts, &serde_json::from_str(&fs::read_to_string(&accepted)?)?);
    }
    for file in report.write(&[])? {
        println!("{}", file.display());
    }
    Ok(ExitCode::SUCCESS)
}

/// Compares counts with those that were accepted. What counts is what idem adds: what axum, hyper and
/// the compiler make of the rest may change with their versions.
fn judge(
    counts: &BTreeMap<String, f64>,
    accepted: &BTreeMap<String, f64>,
) -> Result<ExitCode, Failure> {
    let mut is_good = true;
    for (variant, count) in counts {
        let before =
            accepted.get(variant).ok_or_else(|| format!("{variant} was never accepted"))?;
        let change = count / before - 1.0;
        println!(
            "{variant}: {count:.0}, {:+.1} % of the {before:.0} that were accepted",
            100.0 * change
        );
        is_good &= change <= TOLERANCE || variant == "bare axum";
    }
    if is_good {
        return Ok(ExitCode::SUCCESS);
    }
    eprintln!(
        "A request takes over {:.0} % more instructions than were accepted. Find out why; if it has \
         to be so, `bench/run instructions --accept` accepts it.",
        100.0 * TOLERANCE
    );
    Ok(ExitCode::FAILURE)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_count_is_read_as_callgrind_writes_it() {
        let poll = "<idem_runtime::detach::FinishAnyway<T> as core::future::future::Future>::poll";
        let text = format!(
            "version: 1\nevents: Ir\n\nfn=(1) main\n16 5\ncfn=(2) sha2::sha256::compress256\n\
             calls=1 20\n16 400\n+1 7\ncfn=(4) {poll}\ncalls=1 1\n+3 90\n\nfn=(2)\n20 300\n\
             cfn=(3) sha2::soft::compress\ncalls=2 0\n* 100\n\nfn=(3)\n-2 100\n\nfn=(4)\n5 20\n\
             cfn=(5) idem_runtime::http::serve::Exchange::claim::{{{{closure}}}}\ncalls=1 1\n6 60\n\
             cfn=(6) tracing::span::Span::current\ncalls=1 1\n7 10\n\nfn=(5)\n1 60\n\nfn=(6)\n\
             1 10\ntotals: 502\n"
        );
        let count = read_count(&text).unwrap();
        assert_eq!(count, Count { all: 502, digest: 400, protection: 30 });
    }
}
