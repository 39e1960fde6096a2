//! The sentences of Leash's document that speak of the server, each a test.

#![cfg(test)]

#[path = "../common/mod.rs"]
mod common;
mod crashes;
mod events;
mod keys;
mod receipts;
mod submission;
mod webhooks;

use std::time::Duration;

use common::{Answer, Server, Shell, over_each_store, over_each_store_with, send};
use reqwest::RequestBuilder;
use serde_json::{Value, json};

const LEASH: &str = env!("CARGO_BIN_EXE_leash");
const SOURCE: &str = include_str!("../../src/bin/leash/main.rs");
const ADDRESS: &str = "http://127.0.0.1:3005";

const PREPARE: &str = "/v1/prepare";
const SUBMIT: &str = "/v1/submit";
const RECEIPTS: &str = "/v1/receipts/scout";
const WEBHOOKS: &str = "/v1/webhooks";

const BUYER: &str = "buyer-1";
const BUYER_TOO: &str = "buyer-2";
const SELLER: &str = "seller-1";

const KEY: &str = "0b5b9a8e-0f53-4c7e-9d5e-1f2f3a4b5c6d";
const HASH: &str = "2c26b46b68ffc68ff99b453c1d30413413422d706483bfa0f98a5e886266e7ae";
const SECRET: &str = "whsec_0123456789";

/// Transactions are final after a tenth of a second, and deliveries are repeated as fast.
const FAST: &[&str] = &["--time-scale", "100"];
/// A day is three seconds.
const A_DAY_PASSES: &[&str] = &["--time-scale", "28800"];
/// Longer than that.
const WINDOW_AND_MORE: Duration = Duration::from_millis(3_500);

fn post(server: &Server, path: &str, api_key: &str, body: &Value) -> RequestBuilder {
    server.post(path, body).header("X-API-Key", api_key)
}

fn keyed(server: &Server, path: &str, key: &str, body: &Value) -> RequestBuilder {
    post(server, path, BUYER, body).header("Idempotency-Key", key)
}

async fn get(server: &Server, path: &str, api_key: &str) -> Answer {
    send(server.get(path).header("X-API-Key", api_key)).await
}

fn again(request: &RequestBuilder) -> RequestBuilder {
    request.try_clone().expect("a plain body")
}

fn transfer(amount: u64) -> Value {
    json!({ "agent": "scout", "network": "solana", "to": "seller", "amount": amount })
}

fn receipt(receipt_hash: &str) -> Value {
    json!({ "network": "solana", "receipt_hash": receipt_hash })
}

/// What was prepared for an event of the buyer's, with this signature.
fn signed(event: &str, signature: &str) -> Value {
    let transaction = format!("solana:{event}:scout:seller:2500.{signature}");
    json!({ "event_id": event, "signed_transaction": transaction })
}

fn event_of(answer: &Answer) -> String {
    answer.json()["event_id"].as_str().unwrap_or_else(|| panic!("{}", answer.text())).to_owned()
}

/// A fresh event of the buyer's, prepared.
async fn prepared(server: &Server) -> String {
    let answer = send(post(server, PREPARE, BUYER, &transfer(2_500))).await;
    answer.is_created();
    let event = event_of(&answer);
    assert_eq!(answer.json()["transaction"], format!("solana:{event}:scout:seller:2500"));
    event
}

/// The buyer's submission for an event, without a key.
fn submit(server: &Server, event: &str, signature: &str) -> RequestBuilder {
    post(server, SUBMIT, BUYER, &signed(event, signature))
}

/// The buyer's event, as it is now.
async fn event(server: &Server, id: &str) -> Value {
    let answer = get(server, &format!("/v1/events/{id}"), BUYER).await;
    assert_eq!(answer.status, 200, "{}", answer.text());
    answer.json()
}

/// Waits until the buyer's event is in a phase.
async fn comes_to(server: &Server, id: &str, phase: &str) -> Value {
    server.until(async || event(server, id).await["phase"] == phase).await;
    event(server, id).await
}

/// The events in somebody's feed.
async fn feed(server: &Server, api_key: &str, query: &str) -> Vec<Value> {
    let answer = get(server, &format!("/v1/events{query}"), api_key).await;
    assert_eq!(answer.status, 200, "{}", answer.text());
    answer.json()["data"].as_array().expect("a list").clone()
}

#[track_caller]
fn is_accepted(answer: &Answer) {
    assert_eq!((answer.status, answer.is_replay()), (202, false), "{}", answer.text());
}

/// It says that the event was submitted before, and by which transaction.
#[track_caller]
fn repeats(answer: &Answer, original: &Answer) {
    assert_eq!(answer.status, 200, "{}", answer.text());
    let mut expected = original.json();
    expected["replayed"] = true.into();
    assert_eq!(answer.json(), expected);
}

#[tokio::test]
async fn the_lines_in_the_header_do_what_they_say() {
    let server = Server::start(LEASH, &[]);
    let mut shell = Shell::new(&server, ADDRESS);
    let lines = Shell::lines_in(SOURCE);
    let [
        subscribe,
        prepare,
        remember,
        other_amount,
        submit,
        other_transaction,
        show,
        list,
        buyer,
        seller,
        pull,
        effects,
    ] = &lines[..]
    else {
        panic!("other lines: {lines:#?}")
    };
    shell.run(subscribe).await.is_created();
    let original = shell.run(prepare).await;
    original.is_created();
    shell.run(remember).await.replays(&original);
    shell.run(other_amount).await.is_error(409, "idempotency_body_mismatch");
    let accepted = shell.run(submit).await;
    is_accepted(&accepted);
    repeats(&shell.run(submit).await, &accepted);
    shell.run(other_transaction).await.is_error(409, "event_already_submitted");
    let shown = shell.run(show).await.json();
    assert_eq!(shown["phase"], "submitted");
    assert_eq!(shell.run(list).await.json()["data"], json!([shown]));
    let first = shell.run(buyer).await;
    first.is_created();
    assert_eq!(shell.run(seller).await.json(), json!({ "duplicate": true, "event_id": null }));
    let pulled = shell.run(pull).await.json();
    assert_eq!(pulled["data"][0]["id"], first.json()["event_id"]);
    assert_eq!(pulled["data"][0]["phase"], "receipt.pulled");
    let expected = json!({ "events": 1, "transactions": 1, "receipts": 1 });
    assert_eq!(shell.run(effects).await.json(), expected);
}
