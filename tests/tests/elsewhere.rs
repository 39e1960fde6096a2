//! Waiting for an owner in another process, over a store that carries messages between them.

#![allow(clippy::expect_used, reason = "a test that cannot go on has failed")]

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use axum::{Router, body::Body, http::Request, response::Response, routing::post};
use futures_util::{StreamExt, future::BoxFuture, stream::BoxStream};
use http_body_util::BodyExt;
use idem_runtime::{
    Anchor, Idempotency, IdempotentExt, InFlight, Key, Policy, Record, Scope, Token,
    store::{
        Checkpoint, Claim, Claimed, Completion, Issue, MemoryStore, Renewal, Signal, Store,
        StoreError, StoreErrorKind, Wake, Written,
    },
};
use tokio::{
    sync::{Notify, broadcast},
    time::Instant,
};
use tower::ServiceExt;

/// A store in memory that carries messages as a server would, and remembers them.
#[derive(Clone, Debug)]
struct Carrier {
    store: MemoryStore,
    line: Arc<Line>,
}

#[derive(Debug)]
struct Line {
    signals: broadcast::Sender<Signal>,
    told: Mutex<Vec<Signal>>,
    is_cut: AtomicBool,
    cut: Notify,
}

impl Carrier {
    fn new() -> Self {
        let line = Line {
            signals: broadcast::Sender::new(64),
            told: Mutex::default(),
            is_cut: AtomicBool::new(false),
            cut: Notify::new(),
        };
        Self { store: MemoryStore::new(), line: Arc::new(line) }
    }

    fn told(&self) -> Vec<Signal> {
        self.line.told.lock().expect("a lock").clone()
    }

    fn cut(&self, cut: bool) {
        self.line.is_cut.store(cut, Ordering::SeqCst);
        self.line.cut.notify_waiters();
    }
}

impl Wake for Carrier {
    fn tell(&self, signal: Signal) -> BoxFuture<'_, Result<(), StoreError>> {
        Box::pin(async move {
            self.line.told.lock().expect("a lock").push(signal);
            if self.line.is_cut.load(Ordering::SeqCst) {
                return Err(StoreError::new("carrier", StoreErrorKind::Unreachable));
            }
            let _ = self.line.signals.send(signal);
            Ok(())
        })
    }

    fn listen(&self) -> BoxFuture<'_, Result<BoxStream<'static, Signal>, StoreError>> {
        Box::pin(async move {
            if self.line.is_cut.load(Ordering::SeqCst) {
                return Err(StoreError::new("carrier", StoreErrorKind::Unreachable));
            }
            let (receiver, line) = (self.line.signals.subscribe(), Arc::clone(&self.line));
            let signals =
                futures_util::stream::unfold((receiver, line), |(mut receiver, line)| async move {
                    let signal = tokio::select! {
                        signal = receiver.recv() => signal.ok()?,
                        () = line.cut.notified() => return None,
                    };
                    Some((signal, (receiver, line)))
                });
            Ok(signals.boxed())
        })
    }
}

type Answer<'a, T> = BoxFuture<'a, Result<T, StoreError>>;

impl Store for Carrier {
    fn claim<'a>(&'a self, claim: &'a Claim) -> Answer<'a, Claimed> {
        self.store.claim(claim)
    }

    fn issue<'a>(&'a self, issue: &'a Issue) -> Answer<'a, Written> {
        self.store.issue(issue)
    }

    fn checkpoint<'a>(&'a self, checkpoint: &'a Checkpoint) -> Answer<'a, Written> {
        self.store.checkpoint(checkpoint)
    }

    fn complete<'a>(&'a self, completion: &'a Completion) -> Answer<'a, Written> {
        self.store.complete(completion)
    }

    fn release<'a>(&'a self, key: &'a Key, token: &'a Token) -> Answer<'a, Written> {
        self.store.release(key, token)
    }

    fn forget<'a>(&'a self, key: &'a Key, token: &'a Token) -> Answer<'a, Written> {
        self.store.forget(key, token)
    }

    fn renew<'a>(&'a self, claims: &'a [Renewal]) -> Answer<'a, Vec<bool>> {
        self.store.renew(claims)
    }

    fn read<'a>(&'a self, key: &'a Key) -> Answer<'a, Option<Record>> {
        self.store.read(key)
    }

    fn sweep(&self, limit: usize) -> Answer<'_, usize> {
        self.store.sweep(limit)
    }

    fn wake(&self) -> Option<&dyn Wake> {
        Some(self)
    }
}

/// Longer than it takes until the record is looked at only now and then.
const LONG: Duration = Duration::from_secs(10);

/// A process: an engine of its own over the store. Its handler answers once it is told to.
fn process(store: &Carrier, go_on: &Arc<Notify>) -> Router {
    let policy = Policy::new(Anchor::header("Idempotency-Key"))
        .in_flight(InFlight::Wait(Duration::from_secs(60)));
    let engine = Idempotency::builder(store.clone()).scope(Scope::global()).build();
    let go_on = Arc::clone(go_on);
    let handler = move || {
        let go_on = Arc::clone(&go_on);
        async move {
            go_on.notified().await;
            "done"
        }
    };
    Router::new().route("/", post(handler.idempotent(policy))).with_state(engine)
}

fn send(app: &Router, key: &str) -> tokio::task::JoinHandle<Response> {
    let request = Request::post("/").header("Idempotency-Key", key).body(Body::empty());
    let (app, request) = (app.clone(), request.expect("a request"));
    tokio::spawn(async move { app.oneshot(request).await.expect("an answer") })
}

/// How long after the owner's end a duplicate in another process was answered.
async fn delay(store: &Carrier, key: &str) -> Duration {
    let go_on = Arc::new(Notify::new());
    let (here, there) = (process(store, &go_on), process(store, &go_on));
    let owner = send(&here, key);
    tokio::time::sleep(Duration::from_millis(1)).await;
    let duplicate = send(&there, key);
    tokio::time::sleep(LONG).await;
    let ended = Instant::now();
    go_on.notify_one();
    assert_eq!(owner.await.expect("an owner").status(), 200);
    let answer = duplicate.await.expect("a duplicate");
    assert!(answer.headers().contains_key("idempotent-replayed"));
    let body = answer.into_body().collect().await.expect("a body").to_bytes();
    assert_eq!(body, "done");
    ended.elapsed()
}

/// Time stands still but for what the engines sleep.
#[tokio::test(start_paused = true)]
async fn an_owner_elsewhere_wakes_its_waiters_at_once() {
    let store = Carrier::new();
    let mut waited = Duration::ZERO;
    for key in ["a", "b", "c", "d"] {
        waited += delay(&store, key).await;
    }
    assert!(waited < Duration::from_millis(40), "{waited:?}");
    let told = store.told();
    let of = |wanted: fn(&Signal) -> bool| told.iter().filter(|signal| wanted(signal)).count();
    assert_eq!(of(|signal| matches!(signal, Signal::Awaited(_))), 4, "{told:?}");
    assert_eq!(of(|signal| matches!(signal, Signal::Ended(_))), 4, "{told:?}");
}

#[tokio::test(start_paused = true)]
async fn without_messages_the_record_is_looked_at() {
    let store = Carrier::new();
    store.cut(true);
    let waited = delay(&store, "k").await;
    assert!(waited < Duration::from_secs(3), "{waited:?}");
}

#[tokio::test(start_paused = true)]
async fn a_lost_connection_is_made_again() {
    let store = Carrier::new();
    let go_on = Arc::new(Notify::new());
    let (here, there) = (process(&store, &go_on), process(&store, &go_on));
    // Both listen from their first request on.
    for (app, key) in [(&here, "x"), (&there, "y")] {
        let running = send(app, key);
        go_on.notify_one();
        running.await.expect("an answer");
    }
    store.cut(true);
    tokio::time::sleep(LONG).await;
    store.cut(false);
    tokio::time::sleep(LONG * 3).await;
    let owner = send(&here, "k");
    tokio::time::sleep(Duration::from_millis(1)).await;
    let duplicate = send(&there, "k");
    tokio::time::sleep(LONG).await;
    let ended = Instant::now();
    go_on.notify_one();
    owner.await.expect("an owner");
    duplicate.await.expect("a duplicate");
    assert!(ended.elapsed() < Duration::from_millis(10), "{:?}", ended.elapsed());
}

/// Most requests have no duplicate that waits: they cost no message.
#[tokio::test(start_paused = true)]
async fn nobody_is_told_where_nobody_waits_elsewhere() {
    let store = Carrier::new();
    let go_on = Arc::new(Notify::new());
    let here = process(&store, &go_on);
    let owner = send(&here, "k");
    tokio::time::sleep(LONG).await;
    let duplicate_here = send(&here, "k");
    tokio::time::sleep(LONG).await;
    go_on.notify_one();
    owner.await.expect("an owner");
    assert_eq!(duplicate_here.await.expect("a replay").status(), 200);
    assert_eq!(store.told(), []);
}
