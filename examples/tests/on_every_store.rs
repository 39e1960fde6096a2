//! Each example on each store for many processes, of real servers: a request, its retry, another
//! one under its key; and then the same after a crash of the example.
//!
//! What else the examples promise is tested beside this, on the stores that need no server.

#![cfg(test)]

mod common;

use std::{
    path::Path,
    process::{Command, Stdio},
    time::{SystemTime, UNIX_EPOCH},
};

use alloy_primitives::Address;
use common::{Answer, Server, send};
use examples::wallet::{Wallet, Withdrawal};
use hmac::{Hmac, KeyInit, Mac};
use reqwest::{RequestBuilder, Url};
use serde_json::{Value, json};
use sha2::Sha256;
use tempfile::TempDir;
use tests::servers::{
    mariadb::MariaDb,
    postgres::Postgres,
    redis::{Cluster, Redis},
};
use uuid::Uuid;

const ADMIN: &str = env!("CARGO_BIN_EXE_admin");
const CONSUMER: &str = env!("CARGO_BIN_EXE_consumer");
const LEASH: &str = env!("CARGO_BIN_EXE_leash");
const NORA: &str = env!("CARGO_BIN_EXE_nora");
const PIRATE: &str = env!("CARGO_BIN_EXE_pirate");
const PORTFOLIO: &str = env!("CARGO_BIN_EXE_portfolio");
const QUICKSTART: &str = env!("CARGO_BIN_EXE_quickstart");
const SKADI: &str = env!("CARGO_BIN_EXE_skadi");

#[tokio::test]
async fn postgres() {
    let database = Postgres::shared().database().await;
    // It is nobody's command line that makes the tables of somebody else's server.
    let none = admin(database.url(), &["list", "all"]).expect_err("there are no tables");
    assert!(none.contains("tables are missing"), "{none}");
    every_example_on(database.url()).await;
}

#[tokio::test]
async fn mysql() {
    let database = MariaDb::shared().database().await;
    admin(database.url(), &["list", "all"]).expect_err("there are no tables");
    every_example_on(database.url()).await;
}

#[tokio::test]
async fn redis() {
    every_example_on(Redis::shared().url()).await;
}

#[tokio::test]
async fn redis_cluster() {
    let nodes = Cluster::shared().urls();
    let nodes: Vec<_> = nodes.iter().map(|url| url.trim_start_matches("redis://")).collect();
    let nodes = nodes.iter().map(|node| node.trim_end_matches('/')).collect::<Vec<_>>().join(",");
    every_example_on(&format!("redis-cluster://{nodes}")).await;
}

/// Nobody listens there, and the password is in no message.
#[test]
fn what_cannot_be_opened_is_explained_and_no_password_is_told() {
    for (store, says) in [
        ("postgres://app:s3cret@127.0.0.1:1/shop", "postgres"),
        ("mysql://app:s3cret@127.0.0.1:1/shop", "mysql"),
        ("redis://app:s3cret@127.0.0.1:1/0", "redis"),
        ("redis-cluster://app:s3cret@127.0.0.1:1,127.0.0.1:2", "redis"),
        ("postgres://app:s3cret@127.0.0.1:port/shop", "invalid port number"),
        ("postgresql:/app:s3cret@127.0.0.1/shop", "expected `memory`"),
        ("oracle://app:s3cret@127.0.0.1/shop", "expected `memory`"),
    ] {
        let output = Command::new(NORA).args(["--port", "0", "--store", store]).output();
        let output = output.expect("it runs");
        let said = [output.stdout, output.stderr].concat();
        let said = String::from_utf8(said).expect("text");
        assert!(!output.status.success(), "{store}: {said}");
        assert!(said.contains(says), "{store}: {said}");
        assert!(!said.contains("s3cret"), "{store}: {said}");
    }
}

async fn every_example_on(store: &str) {
    quickstart_and_admin(store).await;
    let directory = TempDir::new().expect("a directory");
    let file = |name| directory.path().join(name).to_str().expect("a path").to_owned();
    let (chain, books) = (file("chain"), file("books.db"));
    example(NORA, store, &[], nora).await;
    example(PIRATE, store, &[], pirate).await;
    example(PORTFOLIO, store, &["--chain", &chain], portfolio).await;
    example(SKADI, store, &[], skadi).await;
    example(LEASH, store, &["--books", &books], leash).await;
    consumer(store, directory.path());
}

/// A request, and another one under the same key, which gets this status.
struct Calls {
    first: RequestBuilder,
    other: RequestBuilder,
    status: u16,
}

async fn example(program: &str, store: &str, more: &[&str], calls: impl AsyncFn(&Server) -> Calls) {
    let start = || Server::start(program, &[&["--store", store], more].concat());
    let server = start();
    let calls = calls(&server).await;
    let original = send(at(&server, &calls.first)).await;
    assert!((200..300).contains(&original.status), "{program} {}", original.text());
    assert!(!original.is_replay(), "{program}");
    repeats(&server, &calls, &original).await;
    server.crash();
    repeats(&start(), &calls, &original).await;
}

async fn repeats(server: &Server, calls: &Calls, original: &Answer) {
    send(at(server, &calls.first)).await.replays(original);
    let other = send(at(server, &calls.other)).await;
    assert_eq!(other.status, calls.status, "{}", other.text());
}

/// The same request, wherever the example listens now.
fn at(server: &Server, request: &RequestBuilder) -> RequestBuilder {
    let (client, request) = request.try_clone().expect("a plain body").build_split();
    let mut request = request.expect("a request");
    let url: Url = server.url.parse().expect("a URL");
    request.url_mut().set_port(url.port()).expect("a URL with a host");
    RequestBuilder::from_parts(client, request)
}

/// A key that no earlier run has used: a server may be somebody's own.
fn key() -> String {
    Uuid::new_v4().to_string()
}

async fn quickstart_and_admin(store: &str) {
    let once = Command::new(QUICKSTART).args(["--once", "--port", "0", "--store", store]).output();
    let once = once.expect("it runs");
    let told = String::from_utf8(once.stdout).expect("text");
    assert!(once.status.success() && !told.contains("NOT AS TOLD"), "{store}: {told}");

    let key = key();
    example(QUICKSTART, store, &[], async |server: &Server| {
        server.line_with("Now you");
        let pay = |amount| {
            let request = server.post("/payments", &json!({ "amount": amount }));
            request.header("X-API-Key", "alice").header("Idempotency-Key", &key)
        };
        Calls { first: pay(100), other: pay(999), status: 422 }
    })
    .await;

    let name = ["--scope", "alice", "--key", &key, "--method", "POST", "--route", "/payments"];
    let with = |task: &[&'static str]| [task, &name[..]].concat();
    let found = admin(store, &with(&["find"])).expect("a record");
    assert!(found.contains("completed: 201"), "{found}");
    let id = found.lines().find_map(|line| line.strip_prefix("id ")).expect("an id").trim();
    let by_id = admin(store, &["find", id]).expect("the same record");
    assert!(by_id.contains(id) && by_id.contains("completed: 201"), "{by_id}");
    admin(store, &with(&["purge", "key"])).expect("a record to purge");
    let gone = admin(store, &with(&["find"])).expect_err("it is gone");
    assert!(gone.contains("there is no such record"), "{gone}");
}

/// What the tool says; what is wrong, where it fails.
fn admin(store: &str, words: &[&str]) -> Result<String, String> {
    let output = Command::new(ADMIN).args(["--store", store]).args(words).output();
    let output = output.expect("it runs");
    let text = |bytes| String::from_utf8(bytes).expect("text");
    match output.status.success() {
        true => Ok(text(output.stdout)),
        false => Err(text(output.stderr)),
    }
}

/// A burn, approved by one signature for ever; what is beside the records is forgotten in a crash.
/// And an intent, whose key is all that counts: another amount gets the same answer.
async fn nora(server: &Server) -> Calls {
    let post = |path: &str, body: &Value| {
        server.post(&format!("/v2/intents/{path}"), body).header("X-API-Key", "acme-sandbox-1")
    };
    let burn = send(post("offramp", &json!({ "amount": "20.00" }))).await.json();
    let approve = async |signature| {
        let path = format!("{}/approve-burn", burn["id"].as_str().expect("an id"));
        send(post(&path, &json!({ "txSignature": signature }))).await
    };
    let approved = approve("sig-a").await;
    assert_eq!(approved.status, 200, "{}", approved.text());
    approve("sig-a").await.replays(&approved);
    approve("sig-b").await.is_error(409, "other_tx_signature");

    let key = key();
    let intent =
        |amount| post("onramp", &json!({ "amount": amount })).header("idempotency-key", &key);
    Calls { first: intent("150.00"), other: intent("99.00"), status: 201 }
}

async fn pirate(server: &Server) -> Calls {
    let key = key();
    let token = |name: &str| {
        let body = json!({ "name": name, "symbol": "DBL", "authority": "WALLET_PUBKEY",
            "kind": "dbc", "payer": "WALLET_PUBKEY", "mode": "unsigned" });
        let request = server.post("/v2/tokens", &body).header("Idempotency-Key", &key);
        request.header("Authorization", "Bearer blackbeard")
    };
    Calls { first: token("Doubloon"), other: token("Guinea"), status: 409 }
}

/// A withdrawal, by the nonce that the server handed out.
async fn portfolio(server: &Server) -> Calls {
    let post = |path: &str, body: &Value| {
        let request = server.post(&format!("/v2/portfolios/acme-1/{path}"), body);
        request.header("X-API-Key", "acme-1")
    };
    let order = json!({ "to": Address::repeat_byte(0xaa), "amount": 2_500 });
    let begun = send(post("withdraw/signature", &order)).await.json();
    let signed = |message: &Value| {
        let typed: Withdrawal = serde_json::from_value(message.clone()).expect("a message");
        let wallet = Wallet::demo().next().expect("a wallet");
        let signature = wallet.sign(&typed).expect("a signature");
        post("withdraw", &json!({ "message": message, "signature": signature }))
    };
    let mut other = begun["message"].clone();
    other["amount"] = 9_900.into();
    Calls { first: signed(&begun["message"]), other: signed(&other), status: 409 }
}

async fn skadi(server: &Server) -> Calls {
    let (key, now) = (key(), SystemTime::now().duration_since(UNIX_EPOCH).expect("a time"));
    let submit = |amount: &str| {
        let body = json!({ "insured": "Acme", "policy": "P-7", "amount": amount,
            "effective": "2027-01-01" });
        let (timestamp, body) = (now.as_secs().to_string(), body.to_string());
        let mac = Hmac::<Sha256>::new_from_slice(b"oak").expect("a key");
        let mac = mac.chain_update(&timestamp).chain_update(&body).finalize().into_bytes();
        let request = server.client.post(format!("{}/create-submission", server.url));
        let request = request.header("Content-Type", "application/json").body(body);
        let request = request.header("X-API-Key", "harbor-1").header("X-Timestamp", timestamp);
        let request = request.header("X-Signature", format!("sha256={}", hex::encode(mac)));
        request.header("Idempotency-Key", &key)
    };
    Calls { first: submit("125.00"), other: submit("7.00"), status: 409 }
}

async fn leash(server: &Server) -> Calls {
    let key = key();
    let prepare = |amount| {
        let body = json!({ "agent": "scout", "network": "solana", "to": "seller",
            "amount": amount });
        let request = server.post("/v1/prepare", &body).header("X-API-Key", "buyer-1");
        request.header("Idempotency-Key", &key)
    };
    Calls { first: prepare(2_500), other: prepare(9_900), status: 409 }
}

/// Killed between its charge and the record of that; the next one finishes, under the same key.
fn consumer(store: &str, directory: &Path) {
    let order = key();
    let command = |words: &[&str]| {
        let mut command = Command::new(CONSUMER);
        command.arg("--directory").arg(directory.join("consumer")).args(words);
        command
    };
    let put = |amount| {
        let put = command(&["put", "--order", &order, "--amount", amount]).status();
        assert!(put.expect("it runs").success());
    };
    let run = ["run", "--store", store, "--visibility-ms", "300", "--lease-ms", "1000"];
    put("100");
    let mut stalled = command(&[&run[..], &["--stall", "after-effect"]].concat());
    let mut stalled = stalled.stdout(Stdio::piped()).spawn().expect("it runs");
    let said = std::io::BufReader::new(stalled.stdout.take().expect("its output"));
    let mut said = std::io::BufRead::lines(said).map_while(Result::ok);
    assert!(said.any(|line| line == "stalled"), "{store}");
    stalled.kill().expect("a living process");
    stalled.wait().expect("its end");
    put("100");
    put("999");
    let rest = command(&[&run[..], &["--until-empty"]].concat()).output().expect("it runs");
    let said = String::from_utf8(rest.stdout).expect("text");
    assert!(rest.status.success(), "{store}: {said}");
    let count = |start: &str| said.lines().filter(|line| line.starts_with(start)).count();
    let paid = (count(&format!("paid {order}")), count(&format!("put {order} aside")));
    assert_eq!(paid, (2, 1), "{store}: {said}");
    let ledger = std::fs::read_to_string(directory.join("consumer/ledger")).expect("a ledger");
    for effect in ["charges", "mails"] {
        let happened = ledger.matches(&format!("\"effect\":\"{effect}\"")).count();
        assert_eq!(happened, 1, "{store}: {ledger}");
    }
}
