//! A payments server whose one handler is safe to retry.
//!
//! When it starts it plays a story against itself, over real HTTP, and prints each exchange: a
//! retry, another body, a duplicate in flight, a failure, a client that hangs up, another tenant.
//! Then it serves, and you can go on.
//!
//! ```sh
//! cargo run -p examples --bin quickstart             # the story, then the server
//! cargo run -p examples --bin quickstart -- --once   # the story alone; fails if it went otherwise
//! ```
//!
//! Records are kept in `quickstart.db`, here: stop the server, start it again, and a retry is still
//! a replay. `--store memory` keeps them in the process, `--time-scale 8640` lets them expire after
//! ten seconds instead of a day. What to type while it serves:
//!
//! ```sh
//! # Twice: the second answer has the same bytes, and `idempotent-replayed: true`.
//! curl -i http://127.0.0.1:3000/payments -H 'X-API-Key: alice' -H 'Idempotency-Key: order-1' \
//!   -H 'Content-Type: application/json' -d '{"amount":100}'
//! # Another body under the same key: 422.
//! curl -i http://127.0.0.1:3000/payments -H 'X-API-Key: alice' -H 'Idempotency-Key: order-1' \
//!   -H 'Content-Type: application/json' -d '{"amount":999}'
//! # The bank's next call fails after it charged.
//! curl -i http://127.0.0.1:3000/_downstream -H 'Content-Type: application/json' \
//!   -d '{"fail":1,"status":503,"latency_ms":500,"after_effect":true}'
//! # Twice: 502, since nobody knows what happened; then 201. The handler ran again, and the bank
//! # charged once all the same, since it got the same derived key.
//! curl -i http://127.0.0.1:3000/payments -H 'X-API-Key: alice' -H 'Idempotency-Key: order-2' \
//!   -H 'Content-Type: application/json' -d '{"amount":250}'
//! # What really happened: five charges in the story, and two more.
//! curl -i http://127.0.0.1:3000/_effects
//! ```
//!
//! Any `X-API-Key` is a tenant of its own here. A real server authenticates in an extractor or a
//! layer, and scopes by the principal that it found (`nora.rs` and `pirate.rs` do).

use std::{process::ExitCode, time::Duration};

use axum::{
    Json, Router,
    extract::{FromRef, State},
    http::StatusCode,
    response::{IntoResponse, Response},
    routing::post,
};
use clap::Parser;
use examples::{Downstream, Failure, Result, Server, StoreChoice, Switches, asked_to_stop};
use idem_runtime::{Idempotency, Operation, Scope, idempotent};
use reqwest::{Client, RequestBuilder};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::sync::oneshot;
use uuid::Uuid;

#[idempotent(anchor = header("Idempotency-Key"))]
async fn create_payment(
    State(bank): State<Downstream>,
    operation: Operation,
    Json(payment): Json<Payment>,
) -> Result<(StatusCode, Json<Receipt>), Unpaid> {
    // The same key in every attempt: should this handler ever run again, the bank knows.
    let charge = operation.derive("charge");
    bank.call("charges", charge).await?;
    Ok((StatusCode::CREATED, Json(Receipt { id: charge.as_uuid(), amount: payment.amount })))
}

#[derive(Deserialize)]
struct Payment {
    amount: u64,
}

#[derive(Serialize)]
struct Receipt {
    id: Uuid,
    amount: u64,
}

/// The bank said no (402: the key is free again), or nothing that one could rely on (502: a retry
/// finds out).
struct Unpaid(Failure);

impl From<Failure> for Unpaid {
    fn from(failure: Failure) -> Self {
        Self(failure)
    }
}

impl IntoResponse for Unpaid {
    fn into_response(self) -> Response {
        let status = match self.0.is_refusal() {
            true => StatusCode::PAYMENT_REQUIRED,
            false => StatusCode::BAD_GATEWAY,
        };
        (status, Json(json!({ "error": self.0.to_string() }))).into_response()
    }
}

#[derive(Clone, FromRef)]
struct App {
    idem: Idempotency,
    bank: Downstream,
}

/// How long an answer is replayed. The engine says it, and not `ttl = "24h"` at the handler, so that
/// `--time-scale` can divide it.
const TIME_TO_LIVE: Duration = Duration::from_secs(24 * 60 * 60);

/// A payments server whose one handler is safe to retry
#[derive(Parser)]
struct Command {
    #[command(flatten)]
    switches: Switches,
    /// Exit after the story, with a failing status if any step was not as told
    #[arg(long)]
    once: bool,
}

#[tokio::main]
async fn main() -> ExitCode {
    examples::exit(run(Command::parse()).await)
}

async fn run(Command { switches, once }: Command) -> Result<()> {
    let store = switches.store.clone().unwrap_or(StoreChoice::Sqlite("quickstart.db".into()));
    let engine = Idempotency::builder(store.open().await?)
        .scope(Scope::header("X-API-Key"))
        .ttl(switches.scaled(TIME_TO_LIVE))
        .build();
    let bank = Downstream::default();
    let app = Router::new()
        .route("/payments", post(create_payment))
        .merge(bank.routes())
        .with_state(App { idem: engine.clone(), bank });

    let server = Server::bind(switches.port.unwrap_or(3000)).await?;
    let url = server.url();
    println!("quickstart listens on {url}, records in {store}; tenants: alice, bob\n");
    let (end, ended) = oneshot::channel::<()>();
    let stop = async {
        tokio::select! {
            () = asked_to_stop() => {}
            _ = ended => {}
        }
    };
    let serving = tokio::spawn(async move { server.run(app, &engine, stop).await });

    let mut story = Story::new(&url)?;
    story.tell().await?;
    if once {
        drop(end);
    } else {
        println!("{}", now_you(&url));
    }
    serving.await??;
    match story.as_told {
        true => Ok(()),
        false => Err("the story did not go as told".into()),
    }
}

fn now_you(url: &str) -> String {
    let payment = "-H 'X-API-Key: alice' -H 'Idempotency-Key: order-1' \
                   -H 'Content-Type: application/json' -d";
    format!(
        "\nNow you (the first one twice; Ctrl-C ends):
curl -i {url}/payments {payment} '{{\"amount\":100}}'
curl -i {url}/payments {payment} '{{\"amount\":999}}'
curl -i {url}/_effects"
    )
}

/// The story that this program tells of itself.
struct Story {
    client: Client,
    url: String,
    /// Keys differ from run to run, since records outlive them.
    run: String,
    steps: u32,
    as_told: bool,
}

/// An answer, as far as the story is about it.
#[derive(Debug, PartialEq, Eq)]
struct Answer {
    status: u16,
    replayed: bool,
    text: String,
}

impl Story {
    fn new(url: &str) -> Result<Self> {
        let client = Client::builder().no_proxy().build()?;
        let run = Uuid::new_v4().simple().to_string()[..6].to_owned();
        Ok(Self { client, url: url.to_owned(), run, steps: 0, as_told: true })
    }

    async fn tell(&mut self) -> Result<()> {
        self.step("A first request runs.");
        let first = self.pay("alice", "a", 100).await?;
        self.expect("201", first.status == 201 && !first.replayed);
        self.expect_charges(1).await?;

        self.step("Its retry gets the same answer, byte for byte, and nobody is charged again.");
        let retry = self.pay("alice", "a", 100).await?;
        self.expect("a replay", retry.replayed && retry.same_as(&first));
        self.expect_charges(1).await?;

        self.step("The same key with another body is refused.");
        let other = self.pay("alice", "a", 999).await?;
        self.expect("422 mismatch", other.is(422, "mismatch"));
        self.expect_charges(1).await?;

        self.step("A duplicate is refused while the original runs; the original is not disturbed.");
        self.behave(json!({ "latency_ms": 800 })).await?;
        let original = self.start_paying("alice", "b", 200).await?;
        let duplicate = self.pay("alice", "b", 200).await?;
        self.expect("409 in_flight", duplicate.is(409, "in_flight"));
        let original = Answer::of(original.await??).await?;
        self.print("alice", "b", 200, &original);
        self.expect("201", original.status == 201);
        self.expect_charges(2).await?;

        self.step("When the handler fails nothing is recorded, and the retry runs.");
        self.behave(json!({ "fail": 1, "status": 503 })).await?;
        let failed = self.pay("alice", "c", 300).await?;
        self.expect("502", failed.status == 502);
        let retry = self.pay("alice", "c", 300).await?;
        self.expect("201", retry.status == 201 && !retry.replayed);
        self.expect_charges(3).await?;

        self.step("A client hangs up; the handler finishes all the same, and the retry replays.");
        self.behave(json!({ "latency_ms": 800 })).await?;
        self.start_paying("alice", "d", 400).await?.abort();
        println!("   alice {}-d  {{\"amount\":400}}  → (hangs up)", self.run);
        self.until("/_effects", "charges", 4).await?;
        let retry = self.pay_patiently("alice", "d", 400).await?;
        self.expect("a replay", retry.status == 201 && retry.replayed);
        self.expect_charges(4).await?;

        self.step("Another tenant's same key is another key.");
        self.behave(json!({})).await?;
        let theirs = self.pay("bob", "a", 100).await?;
        self.expect("201", theirs.status == 201 && !theirs.replayed && theirs.text != first.text);
        self.expect_charges(5).await
    }

    fn step(&mut self, what: &str) {
        self.steps += 1;
        println!("{}. {what}", self.steps);
    }

    fn expect(&mut self, what: &str, is_so: bool) {
        if !is_so {
            self.as_told = false;
            println!("   NOT AS TOLD: expected {what}");
        }
    }

    async fn expect_charges(&mut self, expected: u64) -> Result<()> {
        let charges = self.number("/_effects", "charges").await?;
        self.expect(&format!("{expected} charges, not {charges}"), charges == expected);
        Ok(())
    }

    /// Sends a payment and prints the exchange.
    async fn pay(&self, tenant: &str, key: &str, amount: u64) -> Result<Answer> {
        let answer = Answer::of(self.payment(tenant, key, amount).send().await?).await?;
        self.print(tenant, key, amount, &answer);
        Ok(answer)
    }

    /// Sends a payment as a good client does, again and again for as long as it is in flight.
    async fn pay_patiently(&self, tenant: &str, key: &str, amount: u64) -> Result<Answer> {
        for _ in 0..20 {
            let answer = Answer::of(self.payment(tenant, key, amount).send().await?).await?;
            if !answer.is(409, "in_flight") {
                self.print(tenant, key, amount, &answer);
                return Ok(answer);
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        Err("the payment stays in flight".into())
    }

    /// Sends a payment and returns once the bank is at work on it.
    async fn start_paying(&self, tenant: &str, key: &str, amount: u64) -> Result<InFlight> {
        let calls = self.number("/_downstream", "calls").await?;
        let payment = tokio::spawn(self.payment(tenant, key, amount).send());
        self.until("/_downstream", "calls", calls + 1).await?;
        Ok(payment)
    }

    fn payment(&self, tenant: &str, key: &str, amount: u64) -> RequestBuilder {
        self.client
            .post(format!("{}/payments", self.url))
            .header("X-API-Key", tenant)
            .header("Idempotency-Key", format!("{}-{key}", self.run))
            .json(&json!({ "amount": amount }))
    }

    fn print(&self, tenant: &str, key: &str, amount: u64, answer: &Answer) {
        let replayed = if answer.replayed { " replayed" } else { "" };
        let Answer { status, .. } = answer;
        let (run, text) = (&self.run, answer.summary());
        println!("   {tenant} {run}-{key}  {{\"amount\":{amount}}}  → {status}{replayed} {text}");
    }

    /// Tells the bank how to behave.
    async fn behave(&self, behaviour: Value) -> Result<()> {
        let bank = self.client.post(format!("{}/_downstream", self.url));
        bank.json(&behaviour).send().await?.error_for_status()?;
        Ok(())
    }

    async fn number(&self, path: &str, name: &str) -> Result<u64> {
        let document = self.client.get(format!("{}{path}", self.url)).send().await?;
        let document: Value = document.error_for_status()?.json().await?;
        Ok(document[name].as_u64().unwrap_or_default())
    }

    async fn until(&self, path: &str, name: &str, at_least: u64) -> Result<()> {
        for _ in 0..1_000 {
            if self.number(path, name).await? >= at_least {
                return Ok(());
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        Err(format!("`{name}` did not become {at_least}").into())
    }
}

/// A payment on its way; aborting it hangs up.
type InFlight = tokio::task::JoinHandle<reqwest::Result<reqwest::Response>>;

impl Answer {
    async fn of(response: reqwest::Response) -> Result<Self> {
        let status = response.status().as_u16();
        let replayed = response.headers().contains_key("idempotent-replayed");
        Ok(Self { status, replayed, text: response.text().await? })
    }

    fn same_as(&self, other: &Self) -> bool {
        (self.status, &self.text) == (other.status, &other.text)
    }

    fn is(&self, status: u16, code: &str) -> bool {
        self.status == status && self.code().as_deref() == Some(code)
    }

    /// The code of a problem document.
    fn code(&self) -> Option<String> {
        let document: Value = serde_json::from_str(&self.text).ok()?;
        document["code"].as_str().map(str::to_owned)
    }

    fn summary(&self) -> String {
        self.code().unwrap_or_else(|| self.text.clone())
    }
}
