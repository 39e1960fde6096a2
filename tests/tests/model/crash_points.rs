//! A process that dies at any await of the engine, the store's calls among them: each step is
//! taken once, but for the one that the crash interrupts; `recover` is asked about the same
//! operation; one answer is recorded.

use std::{
    collections::BTreeSet,
    future::poll_fn,
    pin::pin,
    sync::{Arc, Mutex},
    task::Poll,
    time::Duration,
};

use axum::{
    body::Body,
    extract::{FromRef, Request, State},
    handler::Handler,
    response::Response,
};
use futures_util::future::BoxFuture;
use idem_runtime::{
    Anchor, Idempotency, IdempotentExt, Key, Operation, OperationId, Policy, Record, Recovered,
    RequestContext, Scope, Token,
    store::{
        Checkpoint, Claim, Claimed, Clock, Completion, Issue, ManualClock, MemoryStore, Renewal,
        Store, StoreError, Written,
    },
};
use tokio::task::yield_now;

use crate::schedule::Recover;

const STEPS: [&str; 3] = ["reserve", "charge", "ship"];
const LEASE: Duration = Duration::from_secs(30);

/// A store whose every call can be left before it is made and before its answer is there.
#[derive(Clone, Debug)]
struct Far(MemoryStore);

type Asked<'a, T> = BoxFuture<'a, Result<T, StoreError>>;

fn far<'a, T: Send + 'a>(call: Asked<'a, T>) -> Asked<'a, T> {
    Box::pin(async move {
        yield_now().await;
        let answer = call.await;
        yield_now().await;
        answer
    })
}

impl Store for Far {
    fn claim<'a>(&'a self, claim: &'a Claim) -> Asked<'a, Claimed> {
        far(self.0.claim(claim))
    }

    fn complete<'a>(&'a self, completion: &'a Completion) -> Asked<'a, Written> {
        far(self.0.complete(completion))
    }

    fn issue<'a>(&'a self, issue: &'a Issue) -> Asked<'a, Written> {
        far(self.0.issue(issue))
    }

    fn checkpoint<'a>(&'a self, checkpoint: &'a Checkpoint) -> Asked<'a, Written> {
        far(self.0.checkpoint(checkpoint))
    }

    fn release<'a>(&'a self, key: &'a Key, token: &'a Token) -> Asked<'a, Written> {
        far(self.0.release(key, token))
    }

    fn forget<'a>(&'a self, key: &'a Key, token: &'a Token) -> Asked<'a, Written> {
        far(self.0.forget(key, token))
    }

    fn renew<'a>(&'a self, claims: &'a [Renewal]) -> Asked<'a, Vec<bool>> {
        far(self.0.renew(claims))
    }

    fn read<'a>(&'a self, key: &'a Key) -> Asked<'a, Option<Record>> {
        far(self.0.read(key))
    }

    fn sweep(&self, limit: usize) -> Asked<'_, usize> {
        far(self.0.sweep(limit))
    }
}

/// What happened outside of all processes.
#[derive(Debug, Default)]
struct Outside {
    effects: [usize; 3],
    /// The operations that asked for effects or for what had become of them.
    operations: BTreeSet<String>,
    asked: usize,
}

/// One process.
#[derive(Clone, Debug)]
struct App {
    engine: Idempotency,
    outside: Arc<Mutex<Outside>>,
    says: Recover,
}

impl FromRef<App> for Idempotency {
    fn from_ref(app: &App) -> Self {
        app.engine.clone()
    }
}

impl App {
    fn outside(&self, operation: OperationId, happen: impl FnOnce(&mut Outside)) {
        let mut outside = self.outside.lock().expect("a lock");
        outside.operations.insert(operation.to_string());
        happen(&mut outside);
    }
}

async fn order(State(app): State<App>, operation: Operation) -> Result<String, String> {
    let mut said = format!("attempt {}", operation.attempt());
    for (number, name) in STEPS.into_iter().enumerate() {
        let effect = async {
            yield_now().await;
            app.outside(operation.id(), |outside| outside.effects[number] += 1);
            yield_now().await;
            Ok::<_, std::convert::Infallible>(name.to_owned())
        };
        let done = operation.step(name, effect).await.map_err(|error| error.to_string())?;
        said = format!("{said} {done}");
        yield_now().await;
    }
    Ok(said)
}

fn recover(context: RequestContext) -> BoxFuture<'static, Recovered> {
    Box::pin(async move {
        yield_now().await;
        let app = context.state::<App>().expect("the state").clone();
        app.outside(context.operation().id(), |outside| outside.asked += 1);
        yield_now().await;
        match app.says {
            Recover::Answered => Recovered::answered("recovered"),
            Recover::Never => Recovered::never_happened(),
            Recover::Unknown => Recovered::unknown(),
        }
    })
}

const POLICY: Policy = Policy::new(Anchor::header("idempotency-key")).lease(LEASE).recover(recover);

#[derive(Debug, PartialEq, Eq)]
struct Answer {
    status: u16,
    replayed: bool,
    body: String,
}

struct Orders {
    store: Far,
    clock: ManualClock,
    outside: Arc<Mutex<Outside>>,
}

impl Orders {
    fn new() -> Self {
        let clock = Clock::manual();
        let store = Far(MemoryStore::builder().clock(clock.clone()).build());
        Self { store, clock, outside: Arc::default() }
    }

    /// Sends the request to a new process, which dies after so many polls of it; `None` if it had
    /// not answered by then.
    fn ask(&self, says: Recover, polls: usize) -> Option<Answer> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .start_paused(true)
            .build()
            .expect("a runtime");
        let engine = Idempotency::builder(self.store.clone()).scope(Scope::global()).build();
        let app = App { engine, outside: Arc::clone(&self.outside), says };
        let answer = runtime.block_on(async {
            let request = Request::post("/").header("idempotency-key", "k");
            let request = request.body(Body::empty()).expect("a request");
            let mut answering = pin!(order.idempotent(POLICY).call(request, app));
            let mut left = polls;
            let response: Response = poll_fn(|cx| {
                if left == 0 {
                    return Poll::Ready(None);
                }
                left -= 1;
                answering.as_mut().poll(cx).map(Some)
            })
            .await?;
            let replayed = response.headers().contains_key("idempotent-replayed");
            let status = response.status().as_u16();
            let body = axum::body::to_bytes(response.into_body(), usize::MAX).await;
            let body = String::from_utf8_lossy(&body.expect("a body")).into_owned();
            Some(Answer { status, replayed, body })
        });
        // What had been moved to the background dies with the runtime, before it is polled again.
        drop(runtime);
        answer
    }

    /// A process that does not die.
    fn ask_at_leisure(&self, says: Recover) -> Answer {
        self.ask(says, usize::MAX).expect("an answer")
    }

    fn the_lease_ends(&self) {
        self.clock.advance(LEASE);
    }

    /// Asserts what holds after so many crashes and a whole attempt.
    fn check(&self, crashes: usize, what: &str) {
        let outside = self.outside.lock().expect("a lock");
        let taken: usize = outside.effects.iter().sum();
        assert!(outside.effects.iter().all(|taken| *taken >= 1), "{what}: {outside:?}");
        assert!(taken <= STEPS.len() + crashes, "{what}: {outside:?}");
        assert_eq!(outside.operations.len(), 1, "{what}: {outside:?}");
    }
}

#[test]
fn a_crash_at_any_await_repeats_one_step_at_most() {
    for polls in 0.. {
        let orders = Orders::new();
        let first = orders.ask(Recover::Never, polls);
        orders.the_lease_ends();
        let second = orders.ask_at_leisure(Recover::Never);
        let what = format!("after {polls} polls");
        assert_eq!(second.status, 200, "{what}: {second:?}");
        assert!(second.body.ends_with(" reserve charge ship"), "{what}: {second:?}");
        orders.check(1, &what);
        let third = orders.ask_at_leisure(Recover::Never);
        assert_eq!(third, Answer { replayed: true, ..second }, "{what}");
        if let Some(first) = first {
            assert_eq!(first.body, third.body, "{what}");
            assert!(polls > 15, "there were only {polls} awaits");
            println!("{polls} polls make one attempt");
            return;
        }
    }
}

#[test]
fn two_crashes_at_any_two_awaits_repeat_two_steps_at_most() {
    for first in 0.. {
        let mut whole = false;
        for second in 0.. {
            let orders = Orders::new();
            whole = orders.ask(Recover::Never, first).is_some();
            orders.the_lease_ends();
            let again = orders.ask(Recover::Never, second);
            orders.the_lease_ends();
            let what = format!("after {first} and {second} polls");
            let third = orders.ask_at_leisure(Recover::Never);
            assert_eq!(third.status, 200, "{what}: {third:?}");
            orders.check(2, &what);
            let last = orders.ask_at_leisure(Recover::Never);
            assert_eq!(last, Answer { replayed: true, ..third }, "{what}");
            if again.is_some() {
                break;
            }
        }
        if whole {
            return;
        }
    }
}

#[test]
fn what_is_found_out_after_a_crash_at_any_await_is_recorded_once() {
    for polls in 0.. {
        let orders = Orders::new();
        let first = orders.ask(Recover::Answered, polls);
        orders.the_lease_ends();
        let what = format!("after {polls} polls");
        // First it cannot be said, which changes nothing.
        let unknown = orders.ask_at_leisure(Recover::Unknown);
        let claimed = orders.outside.lock().expect("a lock").asked > 0;
        let before = orders.outside.lock().expect("a lock").effects;
        let second = orders.ask_at_leisure(Recover::Answered);
        let outside = orders.outside.lock().expect("a lock");
        if claimed {
            assert_eq!(unknown.status, 409, "{what}: {unknown:?}");
            assert!(unknown.body.contains("unknown_outcome"), "{what}: {unknown:?}");
            let answer = Answer { status: 200, replayed: true, body: "recovered".to_owned() };
            assert_eq!(second, answer, "{what}");
            assert_eq!((outside.asked, outside.effects), (2, before), "{what}");
            assert_eq!(outside.operations.len(), 1, "{what}: {outside:?}");
        } else {
            // Nothing was claimed, or everything was recorded: nobody had to be asked.
            assert_eq!((second.status, outside.effects), (200, [1; 3]), "{what}: {second:?}");
        }
        drop(outside);
        assert_eq!(orders.ask_at_leisure(Recover::Never).body, second.body, "{what}");
        if first.is_some() {
            return;
        }
    }
}
