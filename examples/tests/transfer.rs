//! The bank is killed in the middle of a transfer, and money is neither made nor lost.

#![cfg(test)]

mod common;

use std::{
    pin::pin,
    process::Command,
    time::{Duration, Instant},
};

use common::{Answer, Server, Shell, send, sqlite};
use reqwest::RequestBuilder;
use serde_json::json;
use tempfile::TempDir;
use tokio::{task::JoinSet, time::sleep};

const TRANSFER: &str = env!("CARGO_BIN_EXE_transfer");
const SOURCE: &str = include_str!("../src/bin/transfer.rs");
const ADDRESS: &str = "http://127.0.0.1:3007";

/// Long enough for a database to notice that a process died, and for a busy machine to start one.
const PATIENCE: Duration = Duration::from_secs(60);

fn start(store: &str, more: &[&str]) -> Server {
    Server::start(TRANSFER, &[&["--store", store], more].concat())
}

fn order(server: &Server, key: &str, from: &str, to: &str, amount: u64) -> RequestBuilder {
    let body = json!({ "from": from, "to": to, "amount": amount });
    server.post("/transfers", &body).header("Idempotency-Key", key)
}

/// Alice's balance and Bob's; there is never more or less in all.
async fn balances(server: &Server) -> [i64; 2] {
    let shown = send(server.get("/accounts")).await.json();
    let balances = ["alice", "bob"].map(|name| shown[name].as_i64().expect("a balance"));
    assert_eq!(balances.iter().sum::<i64>(), 2_000, "{shown}");
    balances
}

/// Waits until the server has stalled over a request, and kills it as it says.
async fn kill_in_the_middle(server: &Server, request: impl Future<Output = Answer>) {
    let mut request = pin!(request);
    let start = Instant::now();
    let line = loop {
        tokio::select! {
            answer = &mut request => panic!("it answered: {}", answer.text()),
            () = sleep(Duration::from_millis(10)) => {}
        }
        if let Some(line) = server.printed("stalled") {
            break line;
        }
        assert!(start.elapsed() < PATIENCE, "it does not stall");
    };
    let words = line.strip_prefix("stalled: ").expect("what to type");
    let [kill, signal, pid] = words.split(' ').collect::<Vec<_>>()[..] else {
        panic!("not understood: {words}")
    };
    assert_eq!((kill, signal), ("kill", "-9"));
    assert!(Command::new(kill).args([signal, pid]).status().expect("kill").success());
}

/// A good client's way: again, for as long as the database has not noticed that the owner died.
async fn settled(mut attempt: impl AsyncFnMut() -> Answer) -> Answer {
    let start = Instant::now();
    loop {
        let answer = attempt().await;
        if answer.status != 409 {
            return answer;
        }
        assert!(start.elapsed() < PATIENCE, "it stays in flight: {}", answer.text());
        sleep(Duration::from_millis(50)).await;
    }
}

async fn the_lines_in_the_header_do_what_they_say(store: &str) {
    let lines = Shell::lines_in(SOURCE);
    let [pay, accounts, overdraft, stalled, unchanged, retry, changed] = &lines[..] else {
        panic!("other lines: {lines:#?}")
    };
    assert_eq!((stalled, unchanged, unchanged), (retry, accounts, changed));

    let server = start(store, &[]);
    let mut shell = Shell::new(&server, ADDRESS);
    let first = shell.run(pay).await;
    first.is_created();
    shell.run(pay).await.replays(&first);
    assert_eq!(shell.run(accounts).await.json(), json!({ "alice": 750, "bob": 1_250 }));
    let refused = shell.run(overdraft).await;
    refused.is_error(422, "overdraft");
    assert!(!refused.is_replay());
    shell.run(overdraft).await.replays(&refused);
    server.crash();

    assert!(SOURCE.contains("--bin transfer -- --stall in-the-middle"));
    let server = start(store, &["--stall", "in-the-middle"]);
    let mut shell = Shell::new(&server, ADDRESS);
    kill_in_the_middle(&server, shell.run(stalled)).await;
    server.crash();

    let server = start(store, &[]);
    let mut shell = Shell::new(&server, ADDRESS);
    let before = shell.run(unchanged).await;
    assert_eq!(before.json(), json!({ "alice": 750, "bob": 1_250 }));
    settled(async || shell.run(retry).await).await.is_created();
    let after = shell.run(changed).await;
    assert_eq!(after.json(), json!({ "alice": 650, "bob": 1_350 }));
}

async fn killed_anywhere_it_happens_once(store: &str) {
    // Both ways, since the accounts are changed in the order of their names.
    for (from, to) in [("alice", "bob"), ("bob", "alice")] {
        for place in ["in-the-middle", "before-commit", "before-answer"] {
            let key = format!("{from}-{place}");
            let server = start(store, &["--stall", place]);
            let before = balances(&server).await;
            let request = send(order(&server, &key, from, to, 10));
            kill_in_the_middle(&server, request).await;
            server.crash();

            let server = start(store, &[]);
            let is_done = place == "before-answer";
            let moved = if from == "alice" { [-10, 10] } else { [10, -10] };
            let after = [before[0] + moved[0], before[1] + moved[1]];
            let now = settled_balances(&server, if is_done { after } else { before }).await;
            assert_eq!(now, if is_done { after } else { before }, "{key}");
            let retry = settled(async || send(order(&server, &key, from, to, 10)).await).await;
            assert_eq!((retry.status, retry.is_replay()), (201, is_done), "{key}");
            send(order(&server, &key, from, to, 10)).await.replays(&retry);
            assert_eq!(balances(&server).await, after, "{key}");
        }
    }
}

/// A database may still be rolling back what the dead process left.
async fn settled_balances(server: &Server, expected: [i64; 2]) -> [i64; 2] {
    for _ in 0..100 {
        let now = balances(server).await;
        if now == expected {
            return now;
        }
        sleep(Duration::from_millis(20)).await;
    }
    balances(server).await
}

/// Clients go on until they have an answer, while the bank dies again and again.
async fn through_many_crashes_each_order_happens_once(store: &str) {
    const ORDERS: i64 = 60;
    let seed = rand::random::<u64>();
    println!("the moments of this run come of {seed}");
    let mut server = start(store, &[]);
    let port = server.url.rsplit(':').next().expect("a port").parse().expect("a port");
    let client = server.client.clone();
    let before = balances(&server).await;
    let mut clients = JoinSet::new();
    for number in 0..ORDERS {
        let (client, url) = (client.clone(), format!("{}/transfers", server.url));
        // Two of three go one way.
        let (from, to) = if number % 3 == 0 { ("bob", "alice") } else { ("alice", "bob") };
        clients.spawn(async move {
            sleep(Duration::from_millis(number as u64 * 20)).await;
            let start = Instant::now();
            loop {
                let body = json!({ "from": from, "to": to, "amount": 3 });
                let request = client.post(&url).json(&body);
                let request = request.header("Idempotency-Key", format!("many-{number}"));
                match request.timeout(Duration::from_secs(10)).send().await {
                    Ok(response) if response.status() == 201 => break,
                    Ok(response) => assert!([409, 503].contains(&response.status().as_u16())),
                    Err(_) => {}
                }
                assert!(start.elapsed() < PATIENCE, "order {number} has no answer");
                sleep(Duration::from_millis(50)).await;
            }
        });
    }
    let mut state = seed;
    for _ in 0..4 {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        sleep(Duration::from_millis(100 + (state >> 33) % 250)).await;
        server.crash();
        server = Server::start_on(port, TRANSFER, &["--store", store]);
    }
    while let Some(ended) = clients.join_next().await {
        ended.expect("an answer");
    }
    let net = 3 * (ORDERS / 3 - 2 * ORDERS / 3);
    assert_eq!(balances(&server).await, [before[0] + net, before[1] - net], "{seed}");
}

async fn all(store: &str) {
    the_lines_in_the_header_do_what_they_say(store).await;
    killed_anywhere_it_happens_once(store).await;
    through_many_crashes_each_order_happens_once(store).await;
}

#[tokio::test]
async fn on_sqlite() {
    let directory = TempDir::new().expect("a directory");
    all(&sqlite(directory.path())).await;
}

#[cfg(feature = "servers")]
#[tokio::test]
async fn on_postgres() {
    all(tests::servers::postgres::Postgres::shared().database().await.url()).await;
}

#[cfg(feature = "servers")]
#[tokio::test]
async fn on_mysql() {
    all(tests::servers::mariadb::MariaDb::shared().database().await.url()).await;
}

/// An error that is decided after one account was changed leaves neither changed, and is recorded.
#[tokio::test]
async fn what_is_refused_moves_nothing_and_stays_refused() {
    let directory = TempDir::new().expect("a directory");
    let server = start(&sqlite(directory.path()), &[]);
    let orders = [
        ("alice", "nobody", 10, 404, "no_such_account"),
        ("nobody", "bob", 10, 404, "no_such_account"),
        ("bob", "alice", 1_001, 422, "overdraft"),
        ("alice", "bob", 1_001, 422, "overdraft"),
        ("alice", "alice", 10, 422, "nonsense"),
        ("alice", "bob", 0, 422, "nonsense"),
        ("alice", "bob", u64::MAX, 422, "nonsense"),
    ];
    for (number, (from, to, amount, status, code)) in orders.into_iter().enumerate() {
        let request = || order(&server, &format!("refused-{number}"), from, to, amount);
        let refused = send(request()).await;
        refused.is_error(status, code);
        send(request()).await.replays(&refused);
        assert_eq!(balances(&server).await, [1_000, 1_000]);
    }
    let other = send(order(&server, "refused-0", "alice", "bob", 10)).await;
    assert_eq!((other.status, balances(&server).await), (422, [1_000, 1_000]));
}

#[test]
fn a_store_without_transactions_is_refused() {
    let refused = Command::new(TRANSFER).args(["--port", "0", "--store", "memory"]).output();
    let refused = refused.expect("it runs");
    let said = String::from_utf8(refused.stderr).expect("text");
    assert!(!refused.status.success() && said.contains("memory has no transactions"), "{said}");
}
