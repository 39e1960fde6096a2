//! Portfolios that an agent manages for their owners, after an API whose keys the *server* issues.
//!
//! What it shows:
//!
//!  - Keys that are handed out by a first request and taken by a second one: a `flowId` for an
//!    enrolment, valid for 24 hours, and a nonce for a withdrawal, valid for ten minutes, both
//!    counted from when they were issued. Within that time a repetition is replayed; after it, it
//!    is refused as expired, also where it was done long since. What the first request found out
//!    is bound to the key, and the second one takes it by [`Issued`].
//!  - The first requests are safe to repeat themselves, if they are sent with an
//!    `Idempotency-Key`: a repetition reserves nothing more and hands out the same key.
//!  - A nonce that does three jobs: it is the key of the replay, it is part of what the owner
//!    signs (EIP-712), and the chain takes it once. It belongs to one portfolio: `scope =
//!    path("id")`, where an extractor has seen to it that the portfolio is the tenant's own.
//!  - An answer that is final although it is no success: `API_202`.
//!  - Routes that need none of it: starting and stopping is by state, a strategy is made by each
//!    request.
//!
//! Where the document is silent: errors are `{"error": {"code", "message"}}`, with a word for a
//! code where the document has none; `API_007`, `API_008` and `API_202` are a 409, `API_216` is a
//! 400, `API_506` is a 502 and `API_600` a 503 (500 after a panic). A key that was never issued is
//! a 400, and so is a message that is not the one that was handed out, or is not signed by the
//! portfolio's owner: nothing has happened then, and the key can be used with a better request.
//! After a 5xx it cannot, only with the same one. `API_202` is recorded like a success: it ends
//! the flow, and whoever lost that answer gets the same one again. Without an `Idempotency-Key` a
//! repeated first request reserves another slot; with one, its answer is replayed for as long as
//! what it hands out is valid. A key is the tenant's, not the API key's, which may rotate. After a
//! crash the keys of running requests are free again within five seconds. A withdrawal whose last
//! answer was a 5xx is repeated in time: after `API_216`, only the chain knows.
//!
//! `/_sign` (the wallet, which would be the client's), `/_chain` (somebody who takes a signed
//! message to the chain without this server), `/_downstream` and `/_effects` are aids of the
//! demonstration. What idem records outlives this process with `--store`, what the chain did with
//! `--chain`; the portfolios but for the first ones are forgotten.
//!
//! ```sh
//! cargo run -p examples --bin portfolio   # `-- --time-scale 60` makes ten minutes ten seconds
//!
//! # A withdrawal. Stage 1 hands out the nonce; twice with one key, the same one.
//! curl -i http://127.0.0.1:3003/v2/portfolios/acme-1/withdraw/signature \
//!   -H 'X-API-Key: acme-1' -H 'Idempotency-Key: w-1' -H 'Content-Type: application/json' \
//!   -d '{"amount":2500,"to":"0x00000000000000000000000000000000000000aa"}'
//! NONCE=$(curl -s http://127.0.0.1:3003/v2/portfolios/acme-1/withdraw/signature \
//!   -H 'X-API-Key: acme-1' -H 'Idempotency-Key: w-1' -H 'Content-Type: application/json' \
//!   -d '{"amount":2500,"to":"0x00000000000000000000000000000000000000aa"}' | cut -d'"' -f4)
//!
//! # The owner signs.
//! SIG=$(curl -s http://127.0.0.1:3003/_sign -H 'Content-Type: application/json' \
//!   -d '{"portfolioId":"acme-1","to":"0x00000000000000000000000000000000000000aa","amount":2500,"nonce":"'$NONCE'"}' | cut -d'"' -f4)
//!
//! # Stage 2. Twice: the second is a replay.
//! curl -i http://127.0.0.1:3003/v2/portfolios/acme-1/withdraw \
//!   -H 'X-API-Key: acme-1' -H 'Content-Type: application/json' \
//!   -d '{"message":{"portfolioId":"acme-1","to":"0x00000000000000000000000000000000000000aa","amount":2500,"nonce":"'$NONCE'"},"signature":"'$SIG'"}'
//!
//! # Another amount under this nonce (409, API_008), and the nonce at another portfolio (400).
//! curl -i http://127.0.0.1:3003/v2/portfolios/acme-1/withdraw \
//!   -H 'X-API-Key: acme-1' -H 'Content-Type: application/json' \
//!   -d '{"message":{"portfolioId":"acme-1","to":"0x00000000000000000000000000000000000000aa","amount":9900,"nonce":"'$NONCE'"},"signature":"'$SIG'"}'
//! curl -i http://127.0.0.1:3003/v2/portfolios/acme-2/withdraw \
//!   -H 'X-API-Key: acme-1' -H 'Content-Type: application/json' \
//!   -d '{"message":{"portfolioId":"acme-1","to":"0x00000000000000000000000000000000000000aa","amount":2500,"nonce":"'$NONCE'"},"signature":"'$SIG'"}'
//!
//! # An enrolment: the flow, its signature, a downstream that fails once (503), the same again
//! # (201), and again (a replay).
//! FLOW=$(curl -s http://127.0.0.1:3003/v2/enroll/signature \
//!   -H 'X-API-Key: acme-1' -H 'Content-Type: application/json' \
//!   -d '{"user":"0x70997970c51812dc3a010c7d01b50e0d17dc79c8","strategyId":"steady"}' | cut -d'"' -f4)
//! SIG=$(curl -s http://127.0.0.1:3003/_sign -H 'Content-Type: application/json' \
//!   -d '{"flowId":"'$FLOW'","strategyId":"steady","user":"0x70997970c51812dc3a010c7d01b50e0d17dc79c8"}' | cut -d'"' -f4)
//! curl -i http://127.0.0.1:3003/_downstream -H 'Content-Type: application/json' \
//!   -d '{"fail":1,"only":"enrolments"}'
//! curl -i http://127.0.0.1:3003/v2/enroll \
//!   -H 'X-API-Key: acme-1' -H 'Content-Type: application/json' \
//!   -d '{"flowId":"'$FLOW'","signature":"'$SIG'"}'
//! curl -i http://127.0.0.1:3003/_effects
//! ```

mod books;
mod callers;
mod errors;

use std::{
    path::PathBuf,
    process::ExitCode,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use alloy_primitives::{Address, B256, keccak256};
use axum::{
    Json, Router,
    extract::{FromRef, FromRequest, FromRequestParts, Path, State},
    http::{StatusCode, request::Parts},
    routing::{get, post},
};
use clap::Parser;
use examples::{
    Downstream, Server, StoreChoice, Switches, asked_to_stop,
    wallet::{self, Enrolment, Wallet, Withdrawal},
};
use idem_runtime::{
    Anchor, Format, Idempotency, Issued, Operation, Scope, Settle, StepError, Ttl, idempotent,
};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use uuid::Uuid;

use crate::{
    books::{Books, Portfolio, Strategy},
    callers::{API_KEYS, Caller, TENANT, Trader},
    errors::{Error, refusals, withdrawal_refusals},
};

/// The key of an enrolment.
const FLOW_ID: Anchor = Anchor::body_field("flowId").space("enrolments").issued();
const FLOW_VALIDITY: Duration = Duration::from_secs(24 * 60 * 60);

/// The key of a withdrawal, within the portfolio that it was issued for.
const NONCE: Anchor = Anchor::body_field("message.nonce")
    .format(Format::Hex(32))
    .scope(Scope::path("id"))
    .space("withdrawals")
    .issued();
const NONCE_VALIDITY: Duration = Duration::from_secs(10 * 60);

/// What makes a first stage safe to repeat.
const FIRST_STAGE: Anchor = Anchor::header("Idempotency-Key").optional();

#[idempotent(anchor = FIRST_STAGE)]
async fn begin_enrolment(
    Trader(caller): Trader,
    State(app): State<App>,
    operation: Operation,
    Payload(Wish { user, strategy_id }): Payload<Wish>,
) -> Result<Json<Begun>, Error> {
    app.books().own_strategy(caller, &strategy_id)?;
    // Every attempt reserves the same slot and hands out the same flow.
    let slot = operation.derive("slot");
    app.downstream.call("agent_slots", slot).await.map_err(Error::of_chain)?;
    let flow = Flow {
        agent: Address::from_word(keccak256(slot.as_uuid().as_bytes())),
        account_index: app.books().next_account(caller, user),
        message: Enrolment {
            flowId: operation.derive("flow").to_string(),
            strategyId: strategy_id,
            user,
        },
    };
    let anchor = FLOW_ID.ttl(app.switches.scaled(FLOW_VALIDITY));
    let id = flow.message.flowId.clone();
    let Flow { agent, account_index, message } =
        app.idem.issue(&anchor, caller.tenant, &id, flow).await?;
    Ok(Json(Begun {
        flow_id: message.flowId.clone(),
        agent,
        account_index,
        typed_data: wallet::typed_data(&message),
        message,
    }))
}

#[idempotent(anchor = FLOW_ID)]
async fn enroll(
    Trader(caller): Trader,
    State(app): State<App>,
    operation: Operation,
    issued: Issued<Flow>,
    Payload(Signed { signature }): Payload<Signed>,
) -> Result<(StatusCode, Json<Portfolio>), Error> {
    let Flow { agent, account_index: _, message } = issued.payload()?;
    if wallet::signer(&message, &signature) != Some(message.user) {
        return Err(Error::BAD_SIGNATURE);
    }
    let place = format!("{} {} {}", caller.tenant, message.user, message.strategyId);
    let id = operation.derive("portfolio").to_string();
    if app.books().is_enrolled(caller, &message, &id) {
        return Err(Error::ENROLLED);
    }
    app.verify(&operation, &signature).await?;
    let enrolled = app.downstream.call_at(place, "enrolments", operation.derive("enrolment")).await;
    enrolled.map_err(|failure| match failure.is_conflict() {
        true => Error::ENROLLED,
        false => Error::of_chain(failure),
    })?;
    let portfolio = app.books().enroll(caller, id, agent, message);
    Ok((StatusCode::CREATED, Json(portfolio)))
}

#[idempotent(anchor = FIRST_STAGE)]
async fn begin_withdrawal(
    _: Trader,
    OwnPortfolio(portfolio): OwnPortfolio,
    State(app): State<App>,
    operation: Operation,
    Payload(Order { to, amount }): Payload<Order>,
) -> Result<(Settle, Json<Value>), Error> {
    if amount == 0 {
        return Err(Error::invalid("`amount` is zero"));
    }
    let validity = app.switches.scaled(NONCE_VALIDITY);
    let nonce = keccak256(operation.derive("nonce").as_uuid().as_bytes());
    let message = Withdrawal { portfolioId: portfolio.id.clone(), to, amount, nonce };
    let message =
        app.idem.issue(&NONCE.ttl(validity), &portfolio.id, &nonce.to_string(), message).await?;
    let answer = json!({
        "authorizationId": message.nonce,
        "message": message,
        "typedData": wallet::typed_data(&message),
    });
    // A replay of this answer would be of no use once the nonce has expired.
    Ok((Settle::for_time(Ttl::For(validity)), Json(answer)))
}

#[idempotent(anchor = NONCE, refusals = withdrawal_refusals)]
async fn withdraw(
    _: Trader,
    OwnPortfolio(portfolio): OwnPortfolio,
    State(app): State<App>,
    operation: Operation,
    issued: Issued<Withdrawal>,
    Payload(Authorization { message, signature }): Payload<Authorization>,
) -> Result<(StatusCode, Json<Value>), Error> {
    if message != issued.payload()? {
        return Err(Error::invalid("`message` is not the one that was issued with this nonce"));
    }
    if wallet::signer(&message, &signature) != Some(portfolio.user) {
        return Err(Error::BAD_SIGNATURE);
    }
    app.verify(&operation, &signature).await?;
    // The chain takes a nonce once; the transaction's own key makes a second attempt the same one.
    let transfer = operation.derive("transfer");
    let sent = app.downstream.call_at(message.nonce, "transfers", transfer).await;
    sent.map_err(Error::of_chain)?;
    app.downstream.call("confirmations", transfer).await.map_err(Error::of_chain)?;
    let answer = json!({
        "authorizationId": message.nonce,
        "portfolioId": message.portfolioId,
        "amount": message.amount,
        "to": message.to,
        "transaction": keccak256(transfer.as_uuid().as_bytes()),
        "status": "submitted",
    });
    Ok((StatusCode::ACCEPTED, Json(answer)))
}

/// Not idempotent, as documented: each request makes a strategy.
async fn create_strategy(
    Trader(caller): Trader,
    State(app): State<App>,
    Payload(NewStrategy { name }): Payload<NewStrategy>,
) -> (StatusCode, Json<Strategy>) {
    let strategy = Strategy { id: Uuid::new_v4().to_string(), name, tenant: caller.tenant };
    app.books().strategies.push(strategy.clone());
    app.downstream.happened("strategies");
    (StatusCode::CREATED, Json(strategy))
}

async fn list_strategies(caller: Caller, State(app): State<App>) -> Json<Vec<Strategy>> {
    let books = app.books();
    let own = books.strategies.iter().filter(|strategy| strategy.tenant == caller.tenant);
    Json(own.cloned().collect())
}

async fn list_portfolios(caller: Caller, State(app): State<App>) -> Json<Vec<Portfolio>> {
    let books = app.books();
    let own = books.portfolios.values().filter(|portfolio| portfolio.tenant == caller.tenant);
    Json(own.cloned().collect())
}

async fn show_portfolio(_: Caller, OwnPortfolio(portfolio): OwnPortfolio) -> Json<Portfolio> {
    Json(portfolio)
}

async fn start(
    _: Trader,
    own: OwnPortfolio,
    State(app): State<App>,
) -> Result<Json<Portfolio>, Error> {
    app.set_running(own, true, "starts")
}

async fn stop(
    _: Trader,
    own: OwnPortfolio,
    State(app): State<App>,
) -> Result<Json<Portfolio>, Error> {
    app.set_running(own, false, "stops")
}

/// Signs as the wallet of the demonstration that the message concerns.
async fn sign(
    State(app): State<App>,
    Payload(message): Payload<Unsigned>,
) -> Result<Json<Value>, Error> {
    let signer = match &message {
        Unsigned::Withdrawal(message) => {
            app.books().portfolios.get(&message.portfolioId).map(|portfolio| portfolio.user)
        }
        Unsigned::Enrolment(message) => Some(message.user),
    };
    let wallet = Wallet::demo().find(|wallet| Some(wallet.address()) == signer);
    let wallet = wallet.ok_or(Error::invalid("no wallet of the demonstration can sign this"))?;
    let signature = match &message {
        Unsigned::Withdrawal(message) => wallet.sign(message),
        Unsigned::Enrolment(message) => wallet.sign(message),
    };
    let signature = signature.map_err(|_| Error::invalid("this cannot be signed"))?;
    Ok(Json(json!({ "signature": signature })))
}

/// Takes an authorization to the chain past this server.
async fn submit_to_chain(
    State(app): State<App>,
    Payload(Direct { nonce }): Payload<Direct>,
) -> Result<StatusCode, Error> {
    let sent = app.downstream.call_at(nonce, "transfers", Uuid::new_v4()).await;
    sent.map_err(Error::of_chain).map(|()| StatusCode::ACCEPTED)
}

#[derive(Clone, FromRef)]
struct App {
    idem: Idempotency,
    downstream: Downstream,
    switches: Switches,
    books: Arc<Mutex<Books>>,
}

impl App {
    /// Has a signature verified; once, however often its request is tried.
    async fn verify(&self, operation: &Operation, signature: &str) -> Result<(), Error> {
        let verified = async {
            self.downstream.call("verifications", signature).await.map_err(Error::of_verifier)
        };
        operation.step("verify", verified).await.map_err(|error| match error {
            StepError::Failed(error) => error,
            _ => Error::TROUBLE,
        })
    }

    /// By state: what is so already stays so, and nothing happens.
    fn set_running(
        &self,
        OwnPortfolio(portfolio): OwnPortfolio,
        running: bool,
        effect: &'static str,
    ) -> Result<Json<Portfolio>, Error> {
        let mut books = self.books();
        let portfolio = books.portfolios.get_mut(&portfolio.id).ok_or(Error::NO_PORTFOLIO)?;
        if portfolio.running != running {
            portfolio.running = running;
            self.downstream.happened(effect);
        }
        Ok(Json(portfolio.clone()))
    }

    fn books(&self) -> MutexGuard<'_, Books> {
        self.books.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What is bound to a `flowId`.
#[derive(Deserialize, Serialize)]
struct Flow {
    agent: Address,
    /// Only peeked at: who enrols first gets it.
    account_index: u32,
    message: Enrolment,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Wish {
    user: Address,
    strategy_id: String,
}

/// What an enrolment is signed and finished with.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Begun {
    flow_id: String,
    agent: Address,
    account_index: u32,
    message: Enrolment,
    typed_data: Value,
}

#[derive(Deserialize)]
struct Signed {
    signature: String,
}

#[derive(Deserialize)]
struct Order {
    to: Address,
    /// In the token's smallest unit.
    amount: u64,
}

#[derive(Deserialize)]
struct Authorization {
    message: Withdrawal,
    signature: String,
}

#[derive(Deserialize)]
struct NewStrategy {
    name: String,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Unsigned {
    Withdrawal(Withdrawal),
    Enrolment(Enrolment),
}

#[derive(Deserialize)]
struct Direct {
    nonce: B256,
}

/// The portfolio in the path, which is the caller's tenant's: others do not exist.
struct OwnPortfolio(Portfolio);

impl FromRequestParts<App> for OwnPortfolio {
    type Rejection = Error;

    async fn from_request_parts(parts: &mut Parts, app: &App) -> Result<Self, Error> {
        let caller = Caller::from_request_parts(parts, app).await?;
        let Path(id) = Path::<String>::from_request_parts(parts, app).await?;
        let portfolio = app.books().portfolios.get(&id).cloned();
        let own = portfolio.filter(|portfolio| portfolio.tenant == caller.tenant);
        own.map(Self).ok_or(Error::NO_PORTFOLIO)
    }
}

/// A JSON body, turned away in this API's words.
#[derive(FromRequest)]
#[from_request(via(Json), rejection(Error))]
struct Payload<T>(T);

/// Portfolios that an agent manages for their owners
#[derive(Parser)]
struct Command {
    #[command(flatten)]
    switches: Switches,
    /// A file in which the simulated chain remembers what it did
    #[arg(long, value_name = "PATH")]
    chain: Option<PathBuf>,
}

#[tokio::main]
async fn main() -> ExitCode {
    examples::exit(run(Command::parse()).await)
}

async fn run(Command { switches, chain }: Command) -> examples::Result<()> {
    let store = switches.store.clone().unwrap_or(StoreChoice::Memory);
    let engine = Idempotency::builder(store.open().await?)
        .scope(TENANT)
        .ttl(switches.scaled(FLOW_VALIDITY))
        .lease(Duration::from_secs(5))
        .refusals(refusals)
        .build();
    let downstream = match chain {
        Some(ledger) => Downstream::open(&ledger)?,
        None => Downstream::default(),
    };
    let server = Server::bind(switches.port.unwrap_or(3003)).await?;
    let app = Router::new()
        .route("/v2/enroll/signature", post(begin_enrolment))
        .route("/v2/enroll", post(enroll))
        .route("/v2/portfolios", get(list_portfolios))
        .route("/v2/portfolios/{id}", get(show_portfolio))
        .route("/v2/portfolios/{id}/withdraw/signature", post(begin_withdrawal))
        .route("/v2/portfolios/{id}/withdraw", post(withdraw))
        .route("/v2/portfolios/{id}/start", post(start))
        .route("/v2/portfolios/{id}/stop", post(stop))
        .route("/v2/strategies", get(list_strategies).post(create_strategy))
        .route("/_sign", post(sign))
        .route("/_chain", post(submit_to_chain))
        .merge(downstream.routes())
        .with_state(App {
            idem: engine.clone(),
            downstream,
            switches,
            books: Arc::new(Mutex::new(Books::new())),
        });

    println!("portfolio listens on {}, records in {store}", server.url());
    for (key, tenant, trades) in API_KEYS {
        println!("X-API-Key: {key}   ({tenant}{})", if trades { "" } else { ", reads only" });
    }
    for wallet in Wallet::demo() {
        println!("a wallet that /_sign has the key of: {}", wallet.address());
    }
    server.run(app, &engine, asked_to_stop()).await?;
    Ok(())
}
