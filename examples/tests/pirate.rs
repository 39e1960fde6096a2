//! The sentences of Pirate's document that speak of the server, each a test.

#![cfg(test)]

mod common;

use std::time::Duration;

use common::{
    Answer, Server, Shell, all, answer_lost, failing, over_each_store, over_each_store_with, send,
    send_at_once, slow, sqlite,
};
use reqwest::{Method, RequestBuilder};
use serde_json::{Value, json};
use tempfile::TempDir;

const PIRATE: &str = env!("CARGO_BIN_EXE_pirate");
const SOURCE: &str = include_str!("../src/bin/pirate.rs");
const ADDRESS: &str = "http://127.0.0.1:3002";

const KEY: &str = "5f3e2c8a-1d1d-4f9b-a2c2-9a1b2c3d4e5f";

const POOLS: &str = "/v2/pools";
const FEE_CLAIMS: &str = "/v2/pools/POOL_ADDRESS/fee-claims";
const AIRDROPS: &str = "/v2/airdrops";
const TOKENS: &str = "/v2/tokens";
const TRANSACTIONS: &str = "/v2/transactions";

/// A write endpoint, its normal success, and what it makes happen.
struct Write {
    path: &'static str,
    status: u16,
    effect: &'static str,
}

const WRITES: [Write; 5] = [
    Write { path: POOLS, status: 201, effect: "pools" },
    Write { path: FEE_CLAIMS, status: 201, effect: "fee_claims" },
    Write { path: AIRDROPS, status: 201, effect: "airdrops" },
    Write { path: TOKENS, status: 201, effect: "tokens" },
    Write { path: TRANSACTIONS, status: 202, effect: "broadcasts" },
];

/// A body that every write endpoint takes.
fn body() -> Value {
    json!({
        "name": "Doubloon", "symbol": "DBL",
        "mint": "MINT", "authority": "WALLET_PUBKEY",
        "kind": "dbc", "payer": "WALLET_PUBKEY", "mode": "unsigned",
        "transaction": "AQAB",
    })
}

/// The same with a field of it changed.
fn body_with(field: &str, value: &str) -> Value {
    let mut body = body();
    body[field] = value.into();
    body
}

fn write(server: &Server, path: &str, body: &Value) -> RequestBuilder {
    server.post(path, body).header("Authorization", "Bearer blackbeard")
}

fn keyed(server: &Server, path: &str, key: &str, body: &Value) -> RequestBuilder {
    write(server, path, body).header("Idempotency-Key", key)
}

fn read(server: &Server, path: &str) -> RequestBuilder {
    server.get(path).header("Authorization", "Bearer blackbeard")
}

#[track_caller]
fn is_mismatch(answer: &Answer) {
    answer.is_error(409, "conflict");
    let message = answer.json()["error"]["message"].to_string();
    assert!(message.contains("Idempotency-Key") && message.contains("different"), "{message}");
}

#[tokio::test]
async fn a_first_call_runs_and_its_retry_is_byte_identical_on_every_write_endpoint() {
    for server in over_each_store(PIRATE) {
        for Write { path, status, effect } in WRITES {
            let request = keyed(&server, path, path, &body());
            let original = send(request.try_clone().unwrap()).await;
            assert_eq!((original.status, original.is_replay()), (status, false), "{path}");
            for _ in 0..3 {
                send(request.try_clone().unwrap()).await.replays(&original);
            }
            assert_eq!(server.effects(effect).await, 1, "{path}");
        }
    }
}

#[tokio::test]
async fn another_body_under_the_key_is_a_conflict_on_every_write_endpoint() {
    for server in over_each_store(PIRATE) {
        for Write { path, effect, .. } in WRITES {
            let original = send(keyed(&server, path, path, &body())).await;
            let other = body_with("name", "Florin");
            is_mismatch(&send(keyed(&server, path, path, &other)).await);
            // It is the body that counts, byte for byte.
            let spaced = write(&server, path, &Value::Null).header("Idempotency-Key", path);
            is_mismatch(&send(spaced.body(format!("{} ", body()))).await);
            send(keyed(&server, path, path, &body())).await.replays(&original);
            assert_eq!(server.effects(effect).await, 1, "{path}");
        }
    }
}

#[tokio::test]
async fn a_key_sent_to_another_endpoint_is_a_conflict() {
    for server in over_each_store(PIRATE) {
        for first in WRITES {
            let key = format!("key of {}", first.path);
            let original = send(keyed(&server, first.path, &key, &body())).await;
            assert_eq!(original.status, first.status);
            for second in WRITES.iter().filter(|second| second.path != first.path) {
                is_mismatch(&send(keyed(&server, second.path, &key, &body())).await);
            }
            send(keyed(&server, first.path, &key, &body())).await.replays(&original);
        }
        for Write { effect, .. } in WRITES {
            assert_eq!(server.effects(effect).await, 1, "{effect}");
        }
    }
}

#[tokio::test]
async fn the_same_key_for_another_pool_is_a_conflict() {
    for server in over_each_store(PIRATE) {
        let pool = send(write(&server, POOLS, &body())).await.json();
        let other = format!("/v2/pools/{}/fee-claims", pool["address"].as_str().unwrap());
        send(keyed(&server, FEE_CLAIMS, KEY, &body())).await.is_created();
        is_mismatch(&send(keyed(&server, &other, KEY, &body())).await);
        send(keyed(&server, &other, "another key", &body())).await.is_created();
    }
}

#[tokio::test]
async fn a_concurrent_duplicate_is_a_conflict_on_every_write_endpoint() {
    for server in over_each_store(PIRATE) {
        server.behave(slow()).await;
        let requests = WRITES.map(|it| (keyed(&server, it.path, it.path, &body()), it));
        let mut originals = Vec::new();
        for (request, _) in &requests {
            originals.push(server.begin(request.try_clone().unwrap()).await);
        }
        for (request, _) in &requests {
            for duplicate in send_at_once(request, 3).await {
                duplicate.is_error(409, "conflict");
                assert!(duplicate.headers.contains_key("retry-after"));
            }
        }
        for (original, (request, Write { path, status, effect })) in
            originals.into_iter().zip(requests)
        {
            let original = original.await.unwrap();
            assert_eq!(original.status, status, "{path}");
            server.patiently(&request).await.replays(&original);
            assert_eq!(server.effects(effect).await, 1, "{path}");
        }
    }
}

#[tokio::test]
async fn of_two_bodies_at_once_under_one_key_one_runs() {
    for server in over_each_store(PIRATE) {
        server.behave(slow()).await;
        let bodies = (0..10).map(|n| body_with("name", &n.to_string()));
        let requests = bodies.map(|body| keyed(&server, POOLS, KEY, &body)).collect::<Vec<_>>();
        let answers = all(requests).await;
        assert_eq!(answers.iter().filter(|answer| answer.status == 201).count(), 1);
        answers.iter().filter(|answer| answer.status != 201).for_each(is_mismatch);
        assert_eq!(server.effects("pools").await, 1);
    }
}

#[tokio::test]
async fn without_the_header_two_equal_requests_run_twice() {
    for server in over_each_store(PIRATE) {
        for (path, effect) in [(POOLS, "pools"), (TRANSACTIONS, "broadcasts")] {
            for _ in 0..2 {
                assert!(!send(write(&server, path, &body())).await.is_replay());
            }
            assert_eq!(server.effects(effect).await, 2);
        }
        // A mint is made for each, if none is named.
        let token = json!({ "name": "Doubloon", "symbol": "DBL" });
        let tokens = send_at_once(&write(&server, TOKENS, &token), 2).await;
        assert_ne!(tokens[0].json()["mint"], tokens[1].json()["mint"]);
        assert_eq!(server.effects("tokens").await, 2);
    }
}

/// The API has no other code for its other 409s.
#[tokio::test]
async fn without_the_header_what_the_chain_does_once_fails_the_second_time_as_a_conflict() {
    for server in over_each_store(PIRATE) {
        for (path, effect) in
            [(FEE_CLAIMS, "fee_claims"), (AIRDROPS, "airdrops"), (TOKENS, "tokens")]
        {
            send(write(&server, path, &body())).await.is_created();
            send(write(&server, path, &body())).await.is_error(409, "conflict");
            assert_eq!(server.effects(effect).await, 1, "{path}");
        }
    }
}

#[tokio::test]
async fn a_fresh_key_is_a_new_operation() {
    for server in over_each_store(PIRATE) {
        let first = send(keyed(&server, POOLS, KEY, &body())).await;
        let second = send(keyed(&server, POOLS, "another key", &body())).await;
        second.is_created();
        assert_ne!(first.json()["address"], second.json()["address"]);
        assert_eq!(server.effects("pools").await, 2);
    }
}

#[tokio::test]
async fn another_api_keys_same_key_is_another_key() {
    for server in over_each_store(PIRATE) {
        let theirs = server.post(POOLS, &body()).header("Idempotency-Key", KEY);
        let theirs = theirs.header("Authorization", "Bearer bonny");
        let first = send(keyed(&server, POOLS, KEY, &body())).await;
        let second = send(theirs.try_clone().unwrap()).await;
        second.is_created();
        assert_ne!(first.json()["address"], second.json()["address"]);
        send(theirs).await.replays(&second);
        send(keyed(&server, POOLS, KEY, &body())).await.replays(&first);
    }
}

#[tokio::test]
async fn reads_ignore_the_header() {
    for server in over_each_store(PIRATE) {
        let pool = send(keyed(&server, POOLS, KEY, &body())).await.json();
        let one = format!("{POOLS}/{}", pool["address"].as_str().unwrap());
        for path in [POOLS, AIRDROPS, TOKENS, TRANSACTIONS, &one] {
            for key in [KEY, "", "another key"] {
                let answer = send(read(&server, path).header("Idempotency-Key", key)).await;
                assert_eq!((answer.status, answer.is_replay()), (200, false), "{path}");
            }
        }
        // A read does not claim a key, and sees what is there now.
        let before = send(read(&server, POOLS).header("Idempotency-Key", "fresh")).await;
        send(keyed(&server, POOLS, "fresh", &body())).await.is_created();
        let after = send(read(&server, POOLS).header("Idempotency-Key", "fresh")).await;
        assert_ne!(before.body, after.body);
    }
}

#[tokio::test]
async fn the_cached_status_is_that_of_the_first_call_whatever_it_was() {
    for server in over_each_store(PIRATE) {
        let path = "/v2/pools/NOWHERE/fee-claims";
        let missing = send(keyed(&server, path, "a", &body())).await;
        missing.is_error(404, "not_found");
        send(keyed(&server, path, "a", &body())).await.replays(&missing);
        is_mismatch(&send(keyed(&server, path, "a", &body_with("mode", "signed"))).await);

        server.behave(failing(1, 400)).await;
        let refused = send(keyed(&server, TRANSACTIONS, "b", &body())).await;
        refused.is_error(422, "unprocessable");
        send(keyed(&server, TRANSACTIONS, "b", &body())).await.replays(&refused);

        send(write(&server, AIRDROPS, &body())).await.is_created();
        let conflict = send(keyed(&server, AIRDROPS, "c", &body())).await;
        conflict.is_error(409, "conflict");
        send(keyed(&server, AIRDROPS, "c", &body())).await.replays(&conflict);
    }
}

#[tokio::test]
async fn after_a_failure_the_same_key_runs_again_with_one_effect() {
    for server in over_each_store(PIRATE) {
        for Write { path, status, effect } in WRITES {
            for (name, behaviour) in [("lost", answer_lost()), ("failed", failing(1, 503))] {
                // Each time something that the chain has not seen.
                let body = body_with("mint", name);
                let pool = send(write(&server, POOLS, &body)).await.json();
                let path = path.replace("POOL_ADDRESS", pool["address"].as_str().unwrap());
                let before = server.effects(effect).await;
                server.behave(behaviour).await;
                let request = keyed(&server, &path, &format!("{path} {name}"), &body);
                let failed = send(request.try_clone().unwrap()).await;
                failed.is_error(502, "chain_unavailable");
                let retry = send(request.try_clone().unwrap()).await;
                assert_eq!((retry.status, retry.is_replay()), (status, false), "{}", retry.text());
                send(request).await.replays(&retry);
                assert_eq!(server.effects(effect).await, before + 1, "{path}");
            }
        }
    }
}

#[tokio::test]
async fn after_a_failure_another_body_is_still_a_conflict() {
    for server in over_each_store(PIRATE) {
        server.behave(answer_lost()).await;
        send(keyed(&server, POOLS, KEY, &body())).await.is_error(502, "chain_unavailable");
        is_mismatch(&send(keyed(&server, POOLS, KEY, &body_with("name", "Florin"))).await);
        assert_eq!(server.effects("pools").await, 1);
    }
}

#[tokio::test]
async fn a_client_that_hung_up_finds_its_answer() {
    for server in over_each_store(PIRATE) {
        server.behave(slow()).await;
        let request = keyed(&server, POOLS, KEY, &body());
        server.begin(request.try_clone().unwrap()).await.abort();
        let retry = server.patiently(&request).await;
        assert!(retry.is_replay() && retry.status == 201, "{}", retry.text());
        assert_eq!(server.effects("pools").await, 1);
    }
}

#[tokio::test]
async fn external_uid_tags_the_object_and_is_no_key() {
    for server in over_each_store(PIRATE) {
        let tagged = body_with("external_uid", "ledger-7");
        for key in ["a", "b"] {
            let pool = send(keyed(&server, POOLS, key, &tagged)).await;
            assert_eq!(pool.json()["external_uid"], "ledger-7");
        }
        send(keyed(&server, POOLS, "c", &body())).await.is_created();
        let found = send(read(&server, "/v2/pools?external_uid=ledger-7")).await.json();
        assert_eq!(found["data"].as_array().unwrap().len(), 2);
        let theirs = server.get("/v2/pools").header("Authorization", "Bearer bonny");
        assert_eq!(send(theirs).await.json(), json!({ "data": [] }));
    }
}

#[tokio::test]
async fn a_rerun_keeps_one_object() {
    for server in over_each_store(PIRATE) {
        server.behave(answer_lost()).await;
        for _ in 0..3 {
            send(keyed(&server, TOKENS, KEY, &json!({ "name": "a", "symbol": "b" }))).await;
        }
        let tokens = send(read(&server, TOKENS)).await.json();
        assert_eq!(tokens["data"].as_array().unwrap().len(), 1);
    }
}

/// A day is two seconds.
#[tokio::test]
async fn after_the_window_the_key_runs_again() {
    for server in over_each_store_with(PIRATE, &["--time-scale", "43200"]) {
        let original = send(keyed(&server, POOLS, KEY, &body())).await;
        send(keyed(&server, POOLS, KEY, &body())).await.replays(&original);
        tokio::time::sleep(Duration::from_millis(2_100)).await;
        send(keyed(&server, POOLS, KEY, &body_with("name", "Florin"))).await.is_created();
        assert_eq!(server.effects("pools").await, 2);
    }
}

#[tokio::test]
async fn without_a_known_api_key_nothing_is_told() {
    for server in over_each_store(PIRATE) {
        send(keyed(&server, POOLS, KEY, &body())).await.is_created();
        for sent in ["", "Bearer", "Bearer kidd", "Basic blackbeard", "blackbeard"] {
            for (method, path) in [(Method::POST, POOLS), (Method::GET, POOLS)] {
                let request = server.request(method, path).header("Idempotency-Key", KEY);
                let request = request.header("Authorization", sent).json(&body());
                send(request).await.is_error(401, "unauthorized");
            }
        }
        let request = server.post(POOLS, &body()).header("Idempotency-Key", KEY);
        send(request).await.is_error(401, "unauthorized");
    }
}

#[tokio::test]
async fn what_cannot_be_a_key_or_a_body_is_told_in_the_apis_words() {
    for server in over_each_store(PIRATE) {
        let long = "k".repeat(256);
        for key in ["", &long, "\"open"] {
            send(keyed(&server, POOLS, key, &body())).await.is_error(400, "bad_request");
        }
        for body in ["{", "[]", r#"{"name":7}"#] {
            let request = write(&server, POOLS, &Value::Null).header("Idempotency-Key", KEY);
            let refused = send(request.body(body)).await;
            assert!(matches!(refused.status, 400 | 422), "{body}: {}", refused.text());
            assert!(!refused.code().is_empty());
        }
        // None of them used the key up.
        send(keyed(&server, POOLS, KEY, &body())).await.is_created();
    }
}

#[tokio::test]
async fn a_crash_of_the_server_loses_no_answer_that_it_gave() {
    let directory = TempDir::new().unwrap();
    let store = sqlite(directory.path());
    let server = Server::start(PIRATE, &["--store", &store]);
    let original = send(keyed(&server, POOLS, KEY, &body())).await;
    drop(server);
    let server = Server::start(PIRATE, &["--store", &store]);
    send(keyed(&server, POOLS, KEY, &body())).await.replays(&original);
    assert_eq!(server.effects("pools").await, 0);
}

#[tokio::test]
async fn the_lines_in_the_header_do_what_they_say() {
    let server = Server::start(PIRATE, &[]);
    let mut shell = Shell::new(&server, ADDRESS);
    let lines = Shell::lines_in(SOURCE);
    let [pool, other_body, other_route, claim, airdrop, submit, find, effects] = &lines[..] else {
        panic!("other lines: {lines:#?}")
    };
    let original = shell.run(pool).await;
    original.is_created();
    shell.run(pool).await.replays(&original);
    is_mismatch(&shell.run(other_body).await);
    is_mismatch(&shell.run(other_route).await);
    for (line, status) in [(claim, 201), (airdrop, 201), (submit, 202)] {
        let original = shell.run(line).await;
        assert_eq!(original.status, status, "{}", original.text());
        shell.run(line).await.replays(&original);
    }
    assert_eq!(shell.run(find).await.json()["data"], json!([original.json()]));
    let expected = json!({ "pools": 1, "fee_claims": 1, "airdrops": 1, "broadcasts": 1 });
    assert_eq!(shell.run(effects).await.json(), expected);
}
