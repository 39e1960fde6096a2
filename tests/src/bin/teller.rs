//! A process that kills itself where it is told: it serves payments over records and effects that
//! it shares with others like it.
//!
//! `teller <URL> <promise> <lease in milliseconds> <number> <mark> <hit> [flaw]` prints its address,
//! the marks that it comes to for the first time, and where it dies. It has one thread, so when that
//! stops at a mark, the process does nothing more; its parent then kills it. It ends when its
//! standard input does.

#![allow(clippy::expect_used, reason = "a test that cannot go on has failed")]

use std::{
    collections::{HashMap, HashSet},
    env,
    io::Read,
    pin::Pin,
    process,
    sync::{Arc, Mutex},
    thread,
    time::Duration,
};

use axum::{
    Router,
    extract::{FromRef, State},
    http::StatusCode,
    response::{IntoResponse, Response},
    routing::post,
};
use futures_util::FutureExt;
use idem_runtime::{
    Anchor, Idempotency, IdempotentExt, IssueError, Key, OnUnknown, Operation, Policy, Record,
    Recovered, RequestContext, Scope, Settle, Token, Tx,
    marks::{self, reached},
    store::{Checkpoint, Claim, Claimed, Completion, Issue, Renewal, Store, StoreError, Written},
};
use tests::ledger::{Book, Effect, Ledger};
use tokio::net::TcpListener;

const KEY: Anchor = Anchor::header("Idempotency-Key");
const VOUCHER: Anchor = KEY.space("vouchers");

#[derive(Clone)]
struct Teller {
    engine: Idempotency,
    ledger: Ledger,
    number: u32,
    lease: Duration,
    /// The keys that were turned away once.
    turned_away: Arc<Mutex<HashSet<String>>>,
}

impl FromRef<Teller> for Idempotency {
    fn from_ref(teller: &Teller) -> Self {
        teller.engine.clone()
    }
}

/// What a body asks for: a key, and how to go about it.
struct Order<'a> {
    way: &'a str,
    key: &'a str,
}

impl<'a> Order<'a> {
    fn read(body: &'a str) -> Self {
        let (way, key) = body.split_once(' ').expect("two words");
        Self { way, key }
    }
}

impl Teller {
    fn effect(&self, order: &Order<'_>, operation: &Operation) -> Effect {
        Effect {
            key: order.key.to_owned(),
            process: self.number,
            attempt: operation.attempt(),
            operation: operation.id().to_string(),
            derived: operation.derive("payment").to_string(),
        }
    }

    /// What is answered instead of a payment.
    fn turn_away(&self, order: &Order<'_>) -> Option<Response> {
        match order.way {
            "declined" => Some((StatusCode::PAYMENT_REQUIRED, "declined").into_response()),
            "refused" => {
                let said = format!("refused by {}", self.number);
                Some((StatusCode::PAYMENT_REQUIRED, Settle::recorded(), said).into_response())
            }
            "failing" => {
                let mut before = self.turned_away.lock().expect("a lock");
                let first = before.insert(order.key.to_owned());
                first.then(|| StatusCode::SERVICE_UNAVAILABLE.into_response())
            }
            _ => None,
        }
    }

    fn paid(&self, operation: &Operation) -> Response {
        let (attempt, number) = (operation.attempt(), self.number);
        (StatusCode::CREATED, format!("attempt {attempt} by {number}")).into_response()
    }
}

async fn pay(State(teller): State<Teller>, operation: Operation, body: String) -> Response {
    let order = Order::read(&body);
    if let Some(response) = teller.turn_away(&order) {
        return response;
    }
    reached("handler.leased.effect.before");
    let effect = teller.effect(&order, &operation);
    match order.way {
        "stepwise" => {
            let step = async {
                teller.ledger.write(&effect).await;
                Ok::<_, std::convert::Infallible>(())
            };
            if operation.step("payment", step).await.is_err() {
                return StatusCode::INTERNAL_SERVER_ERROR.into_response();
            }
        }
        way => {
            teller.ledger.write(&effect).await;
            if way == "slow" {
                tokio::time::sleep(teller.lease / 2).await;
            }
        }
    }
    reached("handler.leased.effect.done");
    teller.paid(&operation)
}

/// The same, but what is turned away has done it first.
async fn pay_in<DB: Book>(
    State(teller): State<Teller>,
    operation: Operation,
    mut tx: Tx<DB>,
    body: String,
) -> Response {
    let order = Order::read(&body);
    let effect = teller.effect(&order, &operation);
    reached("handler.transaction.effect.before");
    if DB::write(&mut *tx, &effect).await.is_err() {
        return StatusCode::SERVICE_UNAVAILABLE.into_response();
    }
    reached("handler.transaction.effect.done");
    teller.turn_away(&order).unwrap_or_else(|| teller.paid(&operation))
}

/// Finds out whether an earlier attempt has paid.
async fn look_it_up(request: RequestContext) -> Recovered {
    let Some(teller) = request.state::<Teller>() else { return Recovered::unknown() };
    let id = request.operation().id().to_string();
    let effects = teller.ledger.read().await;
    match effects.into_iter().find(|effect| effect.operation == id) {
        Some(effect) => {
            Recovered::answered((StatusCode::CREATED, format!("recovered from {}", effect.process)))
        }
        None => Recovered::never_happened(),
    }
}

async fn issue(State(teller): State<Teller>, key: String) -> StatusCode {
    match teller.engine.issue(&VOUCHER, &(), &key, ()).await {
        Ok(()) | Err(IssueError::AlreadyUsed) => StatusCode::NO_CONTENT,
        Err(_) => StatusCode::SERVICE_UNAVAILABLE,
    }
}

/// Stops for good at one hit of a mark.
fn listen(mark: String, hit: usize) {
    let hits: Mutex<HashMap<&str, usize>> = Mutex::default();
    marks::listen(move |name| {
        let count = {
            let mut hits = hits.lock().expect("a lock");
            let count = hits.entry(name).or_default();
            *count += 1;
            *count
        };
        if count == 1 {
            println!("reached {name}");
        }
        if name == mark && count == hit {
            println!("dies at {name}");
            loop {
                thread::park();
            }
        }
    });
}

/// A store with a flaw, which the test must find.
#[derive(Debug)]
struct Flawed {
    store: Arc<dyn Store>,
    flaw: Flaw,
}

#[derive(Debug, PartialEq)]
enum Flaw {
    /// It says that answers are recorded, and records none.
    Loses,
    /// Its leases are over at once, and whoever asks is told that they are not.
    Hastens,
}

type Answer<'a, T> = Pin<Box<dyn Future<Output = Result<T, StoreError>> + Send + 'a>>;

impl Store for Flawed {
    fn claim<'a>(&'a self, claim: &'a Claim) -> Answer<'a, Claimed> {
        let mut claim = claim.clone();
        if self.flaw == Flaw::Hastens {
            claim.lease = Duration::from_millis(1);
        }
        Box::pin(async move { self.store.claim(&claim).await })
    }

    fn complete<'a>(&'a self, completion: &'a Completion) -> Answer<'a, Written> {
        match self.flaw {
            Flaw::Loses => Box::pin(async { Ok(Written::Done) }),
            Flaw::Hastens => self.store.complete(completion),
        }
    }

    fn issue<'a>(&'a self, issue: &'a Issue) -> Answer<'a, Written> {
        self.store.issue(issue)
    }

    fn checkpoint<'a>(&'a self, checkpoint: &'a Checkpoint) -> Answer<'a, Written> {
        self.store.checkpoint(checkpoint)
    }

    fn release<'a>(&'a self, key: &'a Key, token: &'a Token) -> Answer<'a, Written> {
        self.store.release(key, token)
    }

    fn forget<'a>(&'a self, key: &'a Key, token: &'a Token) -> Answer<'a, Written> {
        self.store.forget(key, token)
    }

    fn renew<'a>(&'a self, claims: &'a [Renewal]) -> Answer<'a, Vec<bool>> {
        match self.flaw {
            Flaw::Loses => self.store.renew(claims),
            Flaw::Hastens => Box::pin(async move { Ok(vec![true; claims.len()]) }),
        }
    }

    fn read<'a>(&'a self, key: &'a Key) -> Answer<'a, Option<Record>> {
        self.store.read(key)
    }

    fn sweep(&self, limit: usize) -> Answer<'_, usize> {
        self.store.sweep(limit)
    }
}

#[tokio::main(flavor = "current_thread")]
async fn main() {
    let mut arguments = env::args().skip(1);
    let mut argument = || arguments.next().expect("an argument");
    let (url, promise) = (argument(), argument());
    let lease = Duration::from_millis(argument().parse().expect("milliseconds"));
    let number = argument().parse().expect("a number");
    let (mark, hit) = (argument(), argument().parse().expect("a number"));
    let flaw = match arguments.next().as_deref() {
        Some("loses") => Some(Flaw::Loses),
        Some("hastens") => Some(Flaw::Hastens),
        _ => None,
    };
    // A process that stands still hears nothing: its parent's end reaches it all the same.
    thread::spawn(|| {
        let _ = std::io::stdin().read_to_end(&mut Vec::new());
        process::exit(0);
    });

    let ledger = Ledger::open(&url).await;
    let store = match mark.contains(".together.") {
        true => ledger.store_in_a_crowd().await,
        false => ledger.store().await,
    };
    let store = match flaw {
        None => store,
        Some(flaw) => Arc::new(Flawed { store, flaw }),
    };
    let engine = Idempotency::builder(store).scope(Scope::global()).lease(lease).build();
    let with_policy = |policy: Policy| match promise.as_str() {
        "rerun" => policy,
        "refuse" => policy.on_unknown(OnUnknown::Refuse),
        "recover" => policy.recover(|request| look_it_up(request).boxed()),
        "transaction" => policy.transaction(),
        other => panic!("no promise {other}"),
    };
    let by_key = with_policy(Policy::new(KEY));
    let by_voucher = with_policy(Policy::new(VOUCHER).issued());
    let (by_key, by_voucher) = match &ledger {
        _ if promise != "transaction" => {
            (post(pay.idempotent(by_key)), post(pay.idempotent(by_voucher)))
        }
        Ledger::Sqlite(..) => {
            let pay = pay_in::<sqlx::Sqlite>;
            (post(pay.idempotent(by_key)), post(pay.idempotent(by_voucher)))
        }
        #[cfg(feature = "servers")]
        Ledger::Postgres(..) => {
            let pay = pay_in::<sqlx::Postgres>;
            (post(pay.idempotent(by_key)), post(pay.idempotent(by_voucher)))
        }
        #[cfg(feature = "servers")]
        Ledger::MySql(..) => {
            let pay = pay_in::<sqlx::MySql>;
            (post(pay.idempotent(by_key)), post(pay.idempotent(by_voucher)))
        }
        #[cfg(feature = "servers")]
        _ => panic!("Redis has no transactions"),
    };
    let turned_away = Arc::default();
    let app = Router::new()
        .route("/payments", by_key)
        .route("/redemptions", by_voucher)
        .route("/vouchers", post(issue))
        .with_state(Teller { engine, ledger, number, lease, turned_away });
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    println!("listens at {}", listener.local_addr().expect("an address"));
    // What is done before the first request is no part of one.
    listen(mark, hit);
    axum::serve(listener, app).await.expect("a server");
}
