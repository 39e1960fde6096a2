//! Completed records of a remote store, kept at hand: which requests are answered from them, and
//! for how long what was purged in another process still is.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

use std::{sync::Arc, time::Duration};

use axum::http::{Method, StatusCode};
use idem_runtime::{
    Anchor, CallError, Idempotency, KeyName, KeyRing, Operation, Outcome, Policy, RefusalKind,
    Settle, idempotent,
    store::{ReplayCache, Store},
};
use tests::{
    on_both_stores,
    server::{Gate, Server, send},
    stores::Bench,
};

const KEY: Anchor = Anchor::header("Idempotency-Key");
/// As long as a record is replayed without asking for it again, if nothing else is said.
const MAX_AGE: Duration = Duration::from_secs(10);

on_both_stores! {
    a_repetition_is_asked_for_once,
    a_repetition_of_another_request_is_refused,
    a_record_is_replayed_for_as_long_as_it_is_kept,
    a_key_that_was_handed_out_expires,
    a_purge_takes_effect_at_once,
    a_purge_in_another_process_takes_effect_in_a_while,
    another_request_runs_at_once_after_a_purge_in_another_process,
    what_is_running_is_never_at_hand,
    what_ended_without_an_answer_is_never_at_hand,
    that_an_answer_could_not_be_kept_is_at_hand,
    a_plain_function_is_answered_too,
    what_is_sealed_is_opened_at_each_replay,
    nothing_is_kept_where_that_is_said,
    nothing_is_kept_of_a_store_that_is_near,
}

/// A process over a remote store, whose time is the store's.
async fn process(bench: &Bench, policy: impl Into<Policy>) -> (Server, Idempotency) {
    process_with(bench, ReplayCache::new().clock(bench.clock.clone()), policy).await
}

async fn process_with(
    bench: &Bench,
    cache: impl Into<Option<ReplayCache>>,
    policy: impl Into<Policy>,
) -> (Server, Idempotency) {
    use axum::{Router, routing::post};
    use idem_runtime::IdempotentExt;
    let engine = bench.engine().replay_cache(cache).build();
    let route = post(bench.numbered().idempotent(policy));
    let router = Router::new().route("/", route).with_state(engine.clone());
    (Server::start(router).await, engine)
}

fn name(key: &str) -> KeyName {
    KeyName::of(&KEY, key).operation(&Method::POST, "/", [""; 0])
}

async fn purge(engine: &Idempotency, key: &str) {
    assert_eq!(engine.admin().purge("a", &name(key)).await.unwrap().removed, 1);
}

async fn a_repetition_is_asked_for_once(bench: Bench) {
    let bench = bench.remote();
    let (server, _) = process(&bench, KEY).await;
    let first = send(server.post("/", "k", "{}")).await;
    first.assert_is(200, "effect 1", false);
    for asked in [2, 2, 2] {
        let replay = send(server.post("/", "k", "{}")).await;
        replay.assert_is(200, "effect 1", true);
        assert_eq!(replay.header("idempotent-operation"), first.header("idempotent-operation"));
        assert_eq!(replay.header("content-type"), first.header("content-type"));
        assert_eq!(bench.store.claims().len(), asked);
    }
    bench.pass(MAX_AGE);
    for _ in 0..2 {
        send(server.post("/", "k", "{}")).await.assert_is(200, "effect 1", true);
        assert_eq!(bench.store.claims().len(), 3, "it was too old");
    }
    assert_eq!(bench.effects.count(), 1);
    let told = bench.told.outcomes();
    assert_eq!(told[0], Outcome::Recorded);
    assert_eq!(told[1..], [Outcome::Replayed; 5]);
}

async fn a_repetition_of_another_request_is_refused(bench: Bench) {
    let bench = bench.remote();
    let (server, _) = process(&bench, KEY).await;
    for _ in 0..2 {
        send(server.post("/", "k", "{}")).await;
    }
    for asked in [3, 4] {
        send(server.post("/", "k", "[]")).await.assert_refused(422, "mismatch");
        assert_eq!(bench.store.claims().len(), asked, "what it is, the store says");
    }
    let mut other = server.post("/", "k", "{}").build().unwrap();
    other.headers_mut().insert("x-api-key", "b".parse().unwrap());
    let other = reqwest::Client::new().execute(other).await.unwrap();
    assert_eq!(other.text().await.unwrap(), "effect 2", "another tenant's key is another key");
}

async fn a_record_is_replayed_for_as_long_as_it_is_kept(bench: Bench) {
    let bench = bench.remote();
    let (server, _) = process(&bench, KEY.ttl(Duration::from_secs(5))).await;
    for replay in [false, true, true] {
        send(server.post("/", "k", "{}")).await.assert_is(200, "effect 1", replay);
    }
    bench.pass(Duration::from_millis(4_999));
    send(server.post("/", "k", "{}")).await.assert_is(200, "effect 1", true);
    bench.pass(Duration::from_millis(1));
    for replay in [false, true, true] {
        send(server.post("/", "k", "{}")).await.assert_is(200, "effect 2", replay);
    }
}

async fn a_key_that_was_handed_out_expires(bench: Bench) {
    const VOUCHER: Anchor = KEY.space("vouchers").ttl(Duration::from_secs(5));
    let bench = bench.remote();
    let (server, engine) = process(&bench, Policy::new(VOUCHER).issued()).await;
    send(server.post("/", "v", "{}")).await.assert_refused(400, "unknown_key");
    engine.issue(&VOUCHER, "a", "v", ()).await.unwrap();
    for replay in [false, true, true] {
        send(server.post("/", "v", "{}")).await.assert_is(200, "effect 1", replay);
    }
    assert_eq!(bench.store.claims().len(), 3);
    bench.pass(Duration::from_secs(5));
    for asked in [4, 5] {
        send(server.post("/", "v", "{}")).await.assert_refused(400, "expired_key");
        assert_eq!(bench.store.claims().len(), asked);
    }
}

async fn a_purge_takes_effect_at_once(bench: Bench) {
    let bench = bench.remote();
    let (server, engine) = process(&bench, KEY).await;
    for replay in [false, true, true] {
        send(server.post("/", "k", "{}")).await.assert_is(200, "effect 1", replay);
    }
    purge(&engine, "k").await;
    for replay in [false, true, true] {
        send(server.post("/", "k", "{}")).await.assert_is(200, "effect 2", replay);
    }
    assert_eq!(engine.admin().purge_scope("a").await.unwrap().removed, 1);
    send(server.post("/", "k", "{}")).await.assert_is(200, "effect 3", false);
}

async fn a_purge_in_another_process_takes_effect_in_a_while(bench: Bench) {
    let bench = bench.remote();
    let ((here, engine), (there, operator)) =
        (process(&bench, KEY).await, process(&bench, KEY).await);
    for replay in [false, true] {
        send(here.post("/", "k", "{}")).await.assert_is(200, "effect 1", replay);
    }
    bench.pass(Duration::from_secs(3));
    purge(&operator, "k").await;
    send(here.post("/", "k", "{}")).await.assert_is(200, "effect 1", true);
    // Whoever asks the store hears that it is gone.
    assert!(engine.look_up("a").key(&name("k")).await.unwrap().is_none());
    send(there.post("/", "k", "{}")).await.assert_is(200, "effect 2", false);
    bench.pass(MAX_AGE - Duration::from_millis(3_001));
    send(here.post("/", "k", "{}")).await.assert_is(200, "effect 1", true);
    bench.pass(Duration::from_millis(1));
    for server in [&here, &there, &here] {
        send(server.post("/", "k", "{}")).await.assert_is(200, "effect 2", true);
    }
    assert_eq!(bench.effects.count(), 2, "nothing ran because of what was at hand");
}

async fn another_request_runs_at_once_after_a_purge_in_another_process(bench: Bench) {
    let bench = bench.remote();
    let ((here, _), (_there, operator)) = (process(&bench, KEY).await, process(&bench, KEY).await);
    for replay in [false, true, true] {
        send(here.post("/", "k", "{}")).await.assert_is(200, "effect 1", replay);
    }
    purge(&operator, "k").await;
    send(here.post("/", "k", "[]")).await.assert_is(200, "effect 2", false);
    send(here.post("/", "k", "{}")).await.assert_refused(422, "mismatch");
}

async fn what_is_running_is_never_at_hand(bench: Bench) {
    let (bench, gate) = (bench.remote(), Gate::default());
    let server = bench.serve(KEY, gate.handler(&bench.effects)).await;
    let owner = tokio::spawn(send(server.post("/", "k", "{}")));
    gate.begun().await;
    for asked in [2, 3] {
        send(server.post("/", "k", "{}")).await.assert_refused(409, "in_flight");
        assert_eq!(bench.store.claims().len(), asked);
    }
    gate.end();
    owner.await.unwrap().assert_is(200, "effect 1", false);
    for asked in [4, 4] {
        send(server.post("/", "k", "{}")).await.assert_is(200, "effect 1", true);
        assert_eq!(bench.store.claims().len(), asked);
    }
}

async fn what_ended_without_an_answer_is_never_at_hand(bench: Bench) {
    let bench = bench.remote();
    let pay = async |operation: Operation| match operation.attempt() {
        1 | 2 => (StatusCode::BAD_GATEWAY, operation.attempt().to_string()),
        attempt => (StatusCode::OK, attempt.to_string()),
    };
    let server = bench.serve(KEY, pay).await;
    let expected = [(502, "1", false), (502, "2", false), (200, "3", false), (200, "3", true)];
    for (asked, (status, body, replay)) in (1..).zip(expected) {
        send(server.post("/", "k", "{}")).await.assert_is(status, body, replay);
        assert_eq!(bench.store.claims().len(), asked);
    }
}

async fn that_an_answer_could_not_be_kept_is_at_hand(bench: Bench) {
    let bench = bench.remote();
    let server = bench.serve(KEY, async || (Settle::tombstone(), "not to be kept")).await;
    send(server.post("/", "k", "{}")).await.assert_is(200, "not to be kept", false);
    for asked in [2, 2] {
        send(server.post("/", "k", "{}")).await.assert_refused(410, "not_replayable");
        assert_eq!(bench.store.claims().len(), asked);
    }
    let told = Outcome::Refused(RefusalKind::NotReplayable);
    assert_eq!(bench.told.outcomes()[1..], [told, told]);
}

#[idempotent(anchor = arg(event), scope = global, operation = operation)]
async fn deliver(_idem: &Idempotency, event: String) -> Result<String, CallError> {
    Ok(format!("{event}, attempt {}", operation.attempt()))
}

async fn a_plain_function_is_answered_too(bench: Bench) {
    let bench = bench.remote();
    let engine = bench.engine().build();
    for asked in [1, 2, 2] {
        assert_eq!(deliver(&engine, "e-1".into()).await.unwrap(), "e-1, attempt 1");
        assert_eq!(bench.store.claims().len(), asked);
    }
}

async fn what_is_sealed_is_opened_at_each_replay(bench: Bench) {
    let bench = bench.remote();
    let engine = |ring: Option<KeyRing>| match ring {
        Some(ring) => bench.engine().seal(ring),
        None => bench.engine(),
    };
    let sealed = engine(Some(KeyRing::new(1, &[7; 32])));
    let server = bench.serve_with(sealed, KEY, bench.numbered()).await;
    for replay in [false, true, true, true] {
        send(server.post("/", "k", "{}")).await.assert_is(200, "effect 1", replay);
    }
    assert_eq!(bench.store.claims().len(), 2);
    let stored = bench.store.last_record().await.unwrap().payload;
    assert!(!stored.windows(6).any(|window| window == b"effect"), "{stored:?}");
    // It cannot be opened without the key, at hand or not.
    let server = bench.serve_with(engine(None), KEY, bench.numbered()).await;
    for _ in 0..2 {
        send(server.post("/", "k", "{}")).await.assert_refused(503, "record_unreadable");
    }
}

async fn each_is_asked_for(bench: &Bench, server: &Server) {
    for (asked, replay) in [(1, false), (2, true), (3, true)] {
        send(server.post("/", "k", "{}")).await.assert_is(200, "effect 1", replay);
        assert_eq!(bench.store.claims().len(), asked);
    }
}

async fn nothing_is_kept_where_that_is_said(bench: Bench) {
    let bench = bench.remote();
    let (server, engine) = process_with(&bench, None, KEY).await;
    each_is_asked_for(&bench, &server).await;
    assert!(!format!("{engine:?}").contains("Cached"), "{engine:?}");
}

async fn nothing_is_kept_of_a_store_that_is_near(bench: Bench) {
    let (server, _) = process(&bench, KEY).await;
    each_is_asked_for(&bench, &server).await;
    let store: Arc<dyn Store> = Arc::new(bench.remote().store);
    assert!(store.is_remote(), "a store behind a pointer is where it is");
}
