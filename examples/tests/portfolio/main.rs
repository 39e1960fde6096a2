//! The sentences of the portfolios' document that speak of the server, each a test.

#![cfg(test)]

mod anchors;
#[path = "../common/mod.rs"]
mod common;
mod replay_semantics;
mod retry_rules;
mod what_is_not_idempotent;

use std::time::Duration;

use alloy_primitives::Address;
use common::{Answer, Server, send};
use examples::wallet::{Enrolment, Wallet, Withdrawal};
use reqwest::RequestBuilder;
use serde_json::{Value, json};

const PORTFOLIO: &str = env!("CARGO_BIN_EXE_portfolio");
const SOURCE: &str = include_str!("../../src/bin/portfolio/main.rs");
const ADDRESS: &str = "http://127.0.0.1:3003";

const ENROLL: &str = "/v2/enroll";
const ACME: &str = "acme-1";
const ACME_TOO: &str = "acme-2";
const READER: &str = "acme-reader";
const GLOBEX: &str = "globex-1";

/// Longer than each of these windows, of which a busy machine needs its part.
const WINDOW_AND_MORE: Duration = Duration::from_millis(3_500);
/// Ten minutes are three seconds.
const TEN_MINUTES_PASS: &[&str] = &["--time-scale", "200"];
/// A day is three seconds.
const A_DAY_PASSES: &[&str] = &["--time-scale", "28800"];

fn post(server: &Server, path: &str, api_key: &str, body: &Value) -> RequestBuilder {
    server.post(path, body).header("X-API-Key", api_key)
}

/// What the next call of one effect comes to.
fn failing_at(effect: &str) -> Value {
    json!({ "fail": 1, "status": 503, "only": effect })
}

fn again(request: &RequestBuilder) -> RequestBuilder {
    request.try_clone().expect("a plain body")
}

/// The wallet that owns the portfolios that there are at the start.
fn owner() -> Wallet {
    Wallet::demo().next().expect("a wallet")
}

/// The wallet of somebody who has no portfolio yet.
fn newcomer() -> Wallet {
    Wallet::demo().nth(1).expect("a wallet")
}

/// Stage 1 of an enrolment.
fn begin_enrolment(
    server: &Server,
    api_key: &str,
    user: &Wallet,
    strategy: &str,
) -> RequestBuilder {
    let wish = json!({ "user": user.address(), "strategyId": strategy });
    post(server, "/v2/enroll/signature", api_key, &wish)
}

/// Stage 2, for what stage 1 answered.
fn finish_enrolment(
    server: &Server,
    api_key: &str,
    user: &Wallet,
    begun: &Answer,
) -> RequestBuilder {
    assert_eq!(begun.status, 200, "{}", begun.text());
    let begun = begun.json();
    let message: Enrolment = serde_json::from_value(begun["message"].clone()).expect("a message");
    assert_eq!(begun["flowId"], message.flowId);
    let signature = user.sign(&message).expect("a signature");
    post(server, ENROLL, api_key, &json!({ "flowId": message.flowId, "signature": signature }))
}

/// Both: an enrolment, ready to be sent.
async fn enrolment(server: &Server) -> RequestBuilder {
    let begun = send(begin_enrolment(server, ACME, &newcomer(), "steady")).await;
    finish_enrolment(server, ACME, &newcomer(), &begun)
}

/// Stage 1 of a withdrawal.
fn begin_withdrawal(
    server: &Server,
    api_key: &str,
    portfolio: &str,
    amount: u64,
) -> RequestBuilder {
    let path = format!("/v2/portfolios/{portfolio}/withdraw/signature");
    let order = json!({ "to": Address::repeat_byte(0xaa), "amount": amount });
    post(server, &path, api_key, &order)
}

/// What stage 1 answered, signed.
fn signed(begun: &Answer) -> Value {
    assert_eq!(begun.status, 200, "{}", begun.text());
    sign(&begun.json()["message"])
}

/// A message, signed by the owner.
fn sign(message: &Value) -> Value {
    let typed: Withdrawal = serde_json::from_value(message.clone()).expect("a message");
    json!({ "message": message, "signature": owner().sign(&typed).expect("a signature") })
}

/// Stage 2.
fn withdraw(server: &Server, api_key: &str, portfolio: &str, body: &Value) -> RequestBuilder {
    post(server, &format!("/v2/portfolios/{portfolio}/withdraw"), api_key, body)
}

/// Both: a withdrawal's body, ready to be sent.
async fn authorization(server: &Server) -> Value {
    signed(&send(begin_withdrawal(server, ACME, "acme-1", 2_500)).await)
}

#[track_caller]
fn is_accepted(answer: &Answer) {
    assert_eq!((answer.status, answer.is_replay()), (202, false), "{}", answer.text());
}
