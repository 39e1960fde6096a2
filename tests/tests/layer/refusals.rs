//! What a handler's own policy refuses is never the layer's answer: it is forgotten where the handler
//! cannot have run, and an unknown outcome where it may have.

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex},
    time::Duration,
};

use axum::{
    Router,
    extract::Request,
    http::StatusCode,
    response::{IntoResponse, Response},
    routing::post,
};
use idem_runtime::{
    Anchor, Builder, FingerprintScheme, Idempotency, IdempotentExt, InFlight, OnUnknown, Policy,
    Recording, Scope, Scoped, Settle, State,
    store::{Clock, ManualClock, MemoryStore, StoreErrorKind},
};
use reqwest::RequestBuilder;
use tests::{
    faults::{Call, Fault, Faults, Faulty, Gate},
    on_both_stores,
    server::{Answer, Effects, Server, engine, send},
    stores::Bench,
};
use tokio::task::JoinHandle;
use tower::ServiceExt;

use super::{KEY, WRITES};

on_both_stores! {
    a_request_that_cannot_have_run_is_forgotten,
    a_handler_that_passes_a_refusal_on_may_have_done_something,
    a_mismatch_holds_the_key_to_nothing,
    an_answer_that_was_not_kept_is_forgotten,
    a_store_that_fails_further_in_leaves_the_key_free,
    a_running_request_is_an_unknown_outcome,
    a_shutdown_is_an_unknown_outcome,
    a_lost_lease_is_an_unknown_outcome,
    a_panic_is_an_unknown_outcome,
    what_the_handlers_policy_does_not_know_is_an_unknown_outcome,
    a_record_that_cannot_be_read_is_an_unknown_outcome,
    what_an_earlier_attempt_did_counts_after_any_refusal,
}

const INNER: Anchor = Anchor::header("X-Inner");
const RECORDINGS: [Recording; 3] = [Recording::Success, Recording::Final, Recording::All];
const LAPSE: Duration = Duration::from_secs(31);

/// A handler with a policy, under a layer with another one. Their records are in two stores.
struct Both {
    bench: Bench,
    server: Arc<Server>,
    inner: Idempotency,
    faults: Faults,
    clock: ManualClock,
    effects: Effects,
    gates: Arc<Mutex<VecDeque<Gate>>>,
}

impl Both {
    async fn new(bench: &Bench, recording: Recording, policy: impl Into<Policy>) -> Self {
        Self::with(bench, recording, policy, |engine| engine).await
    }

    async fn with(
        bench: &Bench,
        recording: Recording,
        policy: impl Into<Policy>,
        build: impl FnOnce(Builder<Scoped>) -> Builder<Scoped>,
    ) -> Self {
        let clock = Clock::manual();
        let (store, faults) = Faulty::over(MemoryStore::builder().clock(clock.clone()).build());
        let inner = build(engine(store)).build();
        let (effects, gates) = (Effects::default(), Arc::<Mutex<VecDeque<Gate>>>::default());
        let handler = {
            let (effects, gates) = (effects.clone(), Arc::clone(&gates));
            async move |body: String| work(&effects, &gates, &body).await
        };
        let routes = Router::new().route("/", post(handler.idempotent(policy)));
        let routes = routes.with_state(inner.clone());
        // Each layer has keys of its own.
        let space = match recording {
            Recording::Success => "success",
            Recording::Final => "final",
            _ => "all",
        };
        let layer = bench.engine().build().layer(WRITES.record(recording).space(space));
        let server = Arc::new(Server::start(routes.layer(layer)).await);
        let bench = bench.clone();
        Self { bench, server, inner, faults, clock, effects, gates }
    }

    fn request(&self, outer: &str, inner: &str, body: &str) -> RequestBuilder {
        self.server.post("/", outer, body).header("x-inner", inner)
    }

    async fn ask(&self, outer: &str, inner: &str, body: &str) -> Answer {
        send(self.request(outer, inner, body)).await
    }

    /// Sends a request whose handler is held up.
    async fn hold(&self, outer: &str, inner: &str) -> (Gate, JoinHandle<Answer>) {
        let gate = Gate::default();
        self.gates.lock().unwrap().push_back(gate.clone());
        let running = tokio::spawn(send(self.request(outer, inner, "201")));
        gate.reached().await;
        (gate, running)
    }

    /// What the layer's record of the last request is.
    async fn record(&self) -> Option<(State, u32)> {
        let record = self.bench.store.last_record().await?;
        Some((record.state, record.attempt))
    }
}

async fn work(effects: &Effects, gates: &Mutex<VecDeque<Gate>>, body: &str) -> Response {
    let number = effects.happen();
    let gate = gates.lock().unwrap().pop_front();
    if let Some(gate) = gate {
        gate.pass().await;
    }
    let answer = format!("effect {number}");
    match body {
        "panic" => panic!("as told"),
        "tombstone" => (Settle::tombstone(), answer).into_response(),
        body => (body.parse::<StatusCode>().unwrap(), answer).into_response(),
    }
}

const RELEASED: Option<(State, u32)> = Some((State::Released, 1));

async fn a_request_that_cannot_have_run_is_forgotten(bench: Bench) {
    let issued = INNER.space("issued").issued();
    let json = Policy::new(INNER).fingerprint(FingerprintScheme::json());
    let by_tenant = Policy::new(INNER).scope(Scope::header("X-Tenant"));
    let cases: [(Policy, &str, &str, u16, &str); 6] = [
        (Policy::new(Anchor::header("X-Other")), "i", "201", 400, "key_missing"),
        (Policy::new(INNER), "", "201", 400, "key_malformed"),
        (json, "i", r#"{"a":1,"a":2}"#, 400, "body_malformed"),
        (by_tenant, "i", "201", 401, "scope_missing"),
        (Policy::new(issued), "i", "201", 400, "unknown_key"),
        (Policy::new(issued), "old", "201", 400, "expired_key"),
    ];
    for recording in RECORDINGS {
        for (policy, inner, body, status, code) in cases {
            let both = Both::new(&bench, recording, policy).await;
            let an_hour = issued.ttl(Duration::from_secs(60 * 60));
            both.inner.issue(&an_hour, "a", "old", ()).await.unwrap();
            both.clock.advance(Duration::from_secs(2 * 60 * 60));
            for _ in 0..2 {
                both.ask(code, inner, body).await.assert_refused(status, code);
                assert_eq!(both.record().await, None, "{recording:?} {code}");
            }
            assert_eq!(both.effects.count(), 0);
        }
        for (limit, detached, status, code) in [(1, 9, 413, "body_too_large"), (9, 0, 503, "busy")]
        {
            let build =
                |engine: Builder<Scoped>| engine.request_body_limit(limit).detached_limit(detached);
            let both = Both::with(&bench, recording, INNER, build).await;
            both.ask(code, "i", "201").await.assert_refused(status, code);
            assert_eq!(both.record().await, None, "{recording:?} {code}");
            assert_eq!(both.effects.count(), 0);
        }
    }
}

/// What it did before must not be done again as another operation.
async fn a_handler_that_passes_a_refusal_on_may_have_done_something(bench: Bench) {
    let busy = engine(MemoryStore::new()).detached_limit(0).build();
    let asked = Router::new().route("/", post((async || "").idempotent(INNER))).with_state(busy);
    let effects = bench.effects.clone();
    let handler = move |request: Request| {
        effects.happen();
        asked.clone().oneshot(request)
    };
    let server = bench.serve(KEY, handler).await;
    let mut operations = Vec::new();
    for attempt in 1..=2 {
        send(server.post("/", "k", "").header("x-inner", "i")).await.assert_refused(503, "busy");
        let record = bench.store.last_record().await.unwrap();
        assert_eq!((record.state, record.attempt), (State::Released, attempt));
        operations.push(record.operation_id);
    }
    assert_eq!(operations[0], operations[1]);
    assert_eq!(bench.effects.count(), 2);
}

async fn a_mismatch_holds_the_key_to_nothing(bench: Bench) {
    for recording in RECORDINGS {
        let both = Both::new(&bench, recording, INNER).await;
        both.ask("one", "i", "201").await.assert_is(201, "effect 1", false);
        both.ask("two", "i", "202").await.assert_refused(422, "mismatch");
        assert_eq!(both.record().await, None, "{recording:?}");
        // The right request under the same key: further in it is a replay, and here it is recorded.
        both.ask("two", "i", "201").await.assert_is(201, "effect 1", true);
        assert_eq!(both.record().await, Some((State::Completed, 1)));
        assert_eq!(both.effects.count(), 1);
    }
}

async fn an_answer_that_was_not_kept_is_forgotten(bench: Bench) {
    for recording in RECORDINGS {
        let both = Both::new(&bench, recording, INNER).await;
        both.ask("one", "i", "tombstone").await.assert_is(200, "effect 1", false);
        both.ask("one", "i", "tombstone").await.assert_refused(410, "not_replayable");
        for _ in 0..2 {
            both.ask("two", "i", "tombstone").await.assert_refused(410, "not_replayable");
            assert_eq!(both.record().await, None, "{recording:?}");
        }
        assert_eq!(both.effects.count(), 1);
    }
}

async fn a_store_that_fails_further_in_leaves_the_key_free(bench: Bench) {
    let cases =
        [(StoreErrorKind::Unreachable, "store_unavailable"), (StoreErrorKind::Full, "store_full")];
    for (recording, (kind, code)) in
        RECORDINGS.into_iter().flat_map(|recording| cases.map(|case| (recording, case)))
    {
        let both = Both::new(&bench, recording, INNER).await;
        both.faults.always(Call::Claim, Fault::Fail(kind));
        both.ask(code, "i", "201").await.assert_refused(503, code);
        assert_eq!((both.record().await, both.effects.count()), (None, 0), "{recording:?}");
        both.faults.mend(Call::Claim);
        both.ask(code, "i", "201").await.assert_is(201, "effect 1", false);
        both.ask(code, "i", "201").await.assert_is(201, "effect 1", true);
    }
}

async fn a_running_request_is_an_unknown_outcome(bench: Bench) {
    for recording in RECORDINGS {
        let both = Both::new(&bench, recording, INNER).await;
        let (gate, running) = both.hold("one", "i").await;
        both.ask("two", "i", "201").await.assert_refused(409, "in_flight");
        assert_eq!(both.record().await, RELEASED, "{recording:?}");
        // Only the same request may try again.
        both.ask("two", "i", "202").await.assert_refused(422, "mismatch");
        gate.open();
        running.await.unwrap().assert_is(201, "effect 1", false);
        both.ask("two", "i", "201").await.assert_is(201, "effect 1", true);
        assert_eq!(both.record().await, Some((State::Completed, 2)), "{recording:?}");
        assert_eq!(both.effects.count(), 1);
    }
}

async fn a_shutdown_is_an_unknown_outcome(bench: Bench) {
    let waits = Policy::new(INNER).in_flight(InFlight::Wait(Duration::from_secs(60)));
    for recording in RECORDINGS {
        let both = Both::new(&bench, recording, waits).await;
        let (gate, running) = both.hold("one", "i").await;
        both.inner.shut_down();
        both.ask("two", "i", "201").await.assert_refused(503, "shutting_down");
        assert_eq!(both.record().await, RELEASED, "{recording:?}");
        gate.open();
        running.await.unwrap().assert_is(201, "effect 1", false);
    }
}

async fn a_lost_lease_is_an_unknown_outcome(bench: Bench) {
    for recording in RECORDINGS {
        let both = Both::new(&bench, recording, INNER).await;
        let (first_gate, first) = both.hold("one", "i").await;
        let first_claim = both.bench.store.last_claim();
        both.clock.advance(LAPSE);
        let (second_gate, second) = both.hold("two", "i").await;
        first_gate.open();
        first.await.unwrap().assert_refused(409, "lease_lost");
        let store: &dyn idem_runtime::store::Store = &both.bench.store;
        let record = store.read(&first_claim.key).await.unwrap().unwrap();
        assert_eq!(record.state, State::Released, "{recording:?}");
        second_gate.open();
        second.await.unwrap().assert_is(201, "effect 2", false);
        both.ask("one", "i", "201").await.assert_is(201, "effect 2", true);
        assert_eq!(both.effects.count(), 2);
    }
}

async fn a_panic_is_an_unknown_outcome(bench: Bench) {
    for recording in RECORDINGS {
        let both = Both::new(&bench, recording, INNER).await;
        for attempt in 1..=2 {
            both.ask("one", "i", "panic").await.assert_refused(500, "handler_panicked");
            assert_eq!(both.record().await, Some((State::Released, attempt)), "{recording:?}");
        }
        assert_eq!(both.effects.count(), 2);
    }
}

async fn what_the_handlers_policy_does_not_know_is_an_unknown_outcome(bench: Bench) {
    let refuses = Policy::new(INNER).on_unknown(OnUnknown::Refuse);
    for recording in RECORDINGS {
        let both = Both::new(&bench, recording, refuses).await;
        both.ask("one", "i", "502").await.assert_is(502, "effect 1", false);
        both.ask("two", "i", "502").await.assert_refused(409, "unknown_outcome");
        assert_eq!((both.record().await, both.effects.count()), (RELEASED, 1), "{recording:?}");
    }
}

async fn a_record_that_cannot_be_read_is_an_unknown_outcome(bench: Bench) {
    for recording in RECORDINGS {
        let both = Both::new(&bench, recording, INNER).await;
        both.faults.once(Call::Claim, Fault::Fail(StoreErrorKind::Corrupt));
        both.ask("one", "i", "201").await.assert_refused(503, "record_unreadable");
        assert_eq!((both.record().await, both.effects.count()), (RELEASED, 0), "{recording:?}");
        both.ask("one", "i", "201").await.assert_is(201, "effect 1", false);
    }
}

async fn what_an_earlier_attempt_did_counts_after_any_refusal(bench: Bench) {
    let both = Both::new(&bench, Recording::Success, INNER).await;
    both.ask("one", "i", "502").await.assert_is(502, "effect 1", false);
    both.faults.always(Call::Claim, Fault::Fail(StoreErrorKind::Full));
    both.ask("one", "i", "502").await.assert_refused(503, "store_full");
    assert_eq!(both.record().await, Some((State::Released, 2)));
}
