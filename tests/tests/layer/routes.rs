//! What a layer alone does to the routes behind it.

use std::{sync::Arc, time::Duration};

use axum::{
    Router,
    extract::MatchedPath,
    http::StatusCode,
    routing::{any, get, post, put},
};
use idem_runtime::{
    IdempotentExt, InFlight, Mode, Outcome, Policy, RecordedResponse, Recording, RefusalKind,
    Settle, store::Store,
};
use reqwest::Method;
use tests::{
    on_both_stores,
    server::{Gate, Server, send},
    stores::Bench,
};
use tokio::sync::Barrier;

use super::{KEY, WRITES, ask, is_ignored, operation_of, serve};

on_both_stores! {
    every_write_runs_once_and_its_retry_gets_the_answer,
    another_body_under_the_key_is_refused,
    a_write_without_a_key_is_refused_unless_it_is_optional,
    a_duplicate_of_a_running_request_is_told_to_wait,
    fifty_concurrent_duplicates_have_one_effect,
    what_a_handler_says_of_its_answer_is_heard,
    a_panic_is_an_unknown_outcome,
    reads_are_left_alone_and_a_key_sent_to_one_is_ignored,
    a_read_is_not_buffered,
    excepted_routes_are_left_alone,
    whatever_a_function_says_is_left_alone,
    an_excepted_handler_keeps_its_own_policy,
    each_route_and_parameter_is_an_operation,
    a_nested_router_has_a_layer_of_its_own,
    one_policy_layered_twice_is_one,
    a_path_without_a_route_is_left_to_the_router_by_a_route_layer,
    a_layer_that_is_off_or_only_observes_changes_nothing,
    what_idem_says_of_one_answer_is_in_no_record,
}

async fn every_write_runs_once_and_its_retry_gets_the_answer(bench: Bench) {
    let routes = Router::new().route("/", any(bench.numbered()));
    let server = serve(&bench, WRITES, routes).await;
    let purge = Method::from_bytes(b"PURGE").unwrap();
    let methods = [Method::POST, Method::PUT, Method::PATCH, Method::DELETE, purge];
    for (number, method) in methods.into_iter().enumerate() {
        let body = format!("effect {}", number + 1);
        let first = ask(&server, method.clone(), "/").await;
        first.assert_is(200, &body, false);
        for _ in 0..2 {
            let retry = ask(&server, method.clone(), "/").await;
            retry.assert_is(200, &body, true);
            assert_eq!(operation_of(&retry), operation_of(&first));
            assert!(!is_ignored(&retry));
        }
    }
    assert_eq!(bench.effects.count(), 5);
    let record = bench.store.last_record().await.unwrap();
    assert_eq!(&*record.operation, "PURGE /");
}

async fn another_body_under_the_key_is_refused(bench: Bench) {
    let server = serve(&bench, WRITES, Router::new().route("/", post(bench.numbered()))).await;
    let first = send(server.post("/", "k", "100")).await;
    let other = send(server.post("/", "k", "999")).await;
    other.assert_refused(422, "mismatch");
    assert_eq!(operation_of(&other), operation_of(&first));
    assert_eq!(other.json()["operation_id"], operation_of(&first));
    assert_eq!(bench.effects.count(), 1);
}

async fn a_write_without_a_key_is_refused_unless_it_is_optional(bench: Bench) {
    let routes = || Router::new().route("/", post(bench.numbered()));
    let server = serve(&bench, WRITES, routes()).await;
    let refused = send(server.post_without_key("/", "100")).await;
    refused.assert_refused(400, "key_missing");
    assert_eq!(refused.header("idempotent-operation"), None);
    assert_eq!(bench.effects.count(), 0);

    let server = serve(&bench, WRITES.optional(), routes()).await;
    for number in 1..=2 {
        let body = format!("effect {number}");
        send(server.post_without_key("/", "100")).await.assert_is(200, &body, false);
    }
    send(server.post("/", "k", "100")).await.assert_is(200, "effect 3", false);
    send(server.post("/", "k", "100")).await.assert_is(200, "effect 3", true);
}

async fn a_duplicate_of_a_running_request_is_told_to_wait(bench: Bench) {
    let gate = Gate::default();
    let routes = Router::new().route("/", post(gate.handler(&bench.effects)));
    let server = Arc::new(serve(&bench, WRITES, routes).await);
    let running = tokio::spawn(send(server.post("/", "k", "100")));
    gate.begun().await;
    let refused = send(server.post("/", "k", "100")).await;
    refused.assert_refused(409, "in_flight");
    assert_eq!(refused.header("retry-after"), Some("1"));
    gate.end();
    let first = running.await.unwrap();
    first.assert_is(200, "effect 1", false);
    assert_eq!(operation_of(&refused), operation_of(&first));
    send(server.post("/", "k", "100")).await.assert_is(200, "effect 1", true);
}

async fn fifty_concurrent_duplicates_have_one_effect(bench: Bench) {
    let policy = WRITES.in_flight(InFlight::Wait(Duration::from_secs(20)));
    let effects = bench.effects.clone();
    let slow = async move || {
        let number = effects.happen();
        tokio::time::sleep(Duration::from_millis(20)).await;
        format!("effect {number}")
    };
    let server = serve(&bench, policy, Router::new().route("/", post(slow))).await;
    let start = Arc::new(Barrier::new(50));
    let callers: Vec<_> = (0..50)
        .map(|_| (Arc::clone(&start), server.post("/", "k", "100")))
        .map(|(start, request)| {
            tokio::spawn(async move {
                start.wait().await;
                send(request).await
            })
        })
        .collect();
    let mut replays = 0;
    for caller in callers {
        let answer = caller.await.unwrap();
        assert_eq!((answer.status, answer.text().as_str()), (200, "effect 1"));
        replays += usize::from(answer.is_replay());
    }
    assert_eq!((bench.effects.count(), replays), (1, 49));
}

async fn what_a_handler_says_of_its_answer_is_heard(bench: Bench) {
    let (one, two) = (bench.effects.clone(), bench.effects.clone());
    let closed = async move || {
        (StatusCode::CONFLICT, Settle::recorded(), format!("effect {}", one.happen()))
    };
    let unsure = async move || (Settle::uncertain(), format!("effect {}", two.happen()));
    let routes = Router::new().route("/closed", post(closed)).route("/unsure", post(unsure));
    let server = serve(&bench, WRITES, routes).await;
    ask(&server, Method::POST, "/closed").await.assert_is(409, "effect 1", false);
    ask(&server, Method::POST, "/closed").await.assert_is(409, "effect 1", true);
    let first = ask(&server, Method::POST, "/unsure").await;
    let second = ask(&server, Method::POST, "/unsure").await;
    second.assert_is(200, "effect 3", false);
    assert_eq!(operation_of(&first), operation_of(&second));
    assert_eq!(bench.store.last_record().await.unwrap().attempt, 2);
}

async fn a_panic_is_an_unknown_outcome(bench: Bench) {
    let effects = bench.effects.clone();
    let panics = async move || -> String {
        match effects.happen() {
            1 => panic!("as told"),
            number => format!("effect {number}"),
        }
    };
    let server = serve(&bench, WRITES, Router::new().route("/", post(panics))).await;
    let failed = ask(&server, Method::POST, "/").await;
    failed.assert_refused(500, "handler_panicked");
    let retry = ask(&server, Method::POST, "/").await;
    retry.assert_is(200, "effect 2", false);
    assert_eq!(operation_of(&retry), operation_of(&failed));
    ask(&server, Method::POST, "/").await.assert_is(200, "effect 2", true);
}

async fn reads_are_left_alone_and_a_key_sent_to_one_is_ignored(bench: Bench) {
    let routes = Router::new().route("/{id}", any(bench.numbered()));
    let server = serve(&bench, WRITES, routes).await;
    let reads = [Method::GET, Method::HEAD, Method::OPTIONS, Method::TRACE];
    for method in &reads {
        let without = server.request(method.clone(), "/7").header("x-api-key", "a");
        let without = send(without).await;
        assert_eq!((without.status, is_ignored(&without)), (200, false), "{method}");
    }
    assert_eq!((bench.effects.count(), bench.told.outcomes().len()), (4, 0));
    for method in &reads {
        for _ in 0..2 {
            let with = ask(&server, method.clone(), "/7").await;
            assert_eq!((with.status, is_ignored(&with)), (200, true), "{method}");
            assert!(!with.is_replay());
            assert_eq!(with.header("idempotent-operation"), None);
        }
    }
    // One that could not be a key was sent all the same.
    let broken = server.request(Method::GET, "/7").header("idempotency-key", "");
    assert!(is_ignored(&send(broken).await));
    assert_eq!(bench.effects.count(), 13);
    assert_eq!(bench.told.outcomes(), [Outcome::Ignored; 9]);
    assert!(bench.store.claims().is_empty());
}

async fn a_read_is_not_buffered(bench: Bench) {
    let engine = bench.engine().request_body_limit(3).build();
    let echo = async |body: String| body;
    let routes = Router::new().route("/", get(echo).post(echo)).layer(engine.layer(WRITES));
    let server = Server::start(routes).await;
    let ask = async |method| {
        let request = server.request(method, "/").header("x-api-key", "a");
        send(request.header("idempotency-key", "k").body("four")).await
    };
    ask(Method::GET).await.assert_is(200, "four", false);
    ask(Method::POST).await.assert_refused(413, "body_too_large");
}

async fn excepted_routes_are_left_alone(bench: Bench) {
    let api = Router::new()
        .route("/health", any(bench.numbered()))
        .route("/orders/{id}/seen", post(bench.numbered()))
        .route("/orders", post(bench.numbered()));
    let routes = Router::new().route("/login", post(bench.numbered())).nest("/api", api);
    let layer = bench.engine().build().layer(WRITES);
    let layer = layer.except(["/login", "/api/health"]).except(["/api/orders/{id}/seen"]);
    let server = Server::start(routes.layer(layer)).await;
    let excepted = ["/login", "/api/health", "/api/orders/7/seen"];
    for (round, path) in excepted.iter().flat_map(|path| [(1, path), (2, path)]) {
        let answer = ask(&server, Method::POST, path).await;
        assert_eq!((answer.status, answer.is_replay()), (200, false), "{path} {round}");
        assert!(is_ignored(&answer), "{path}");
    }
    send(server.post_without_key("/login", "")).await.assert_is(200, "effect 7", false);
    assert!(bench.store.claims().is_empty());
    ask(&server, Method::POST, "/api/orders").await.assert_is(200, "effect 8", false);
    ask(&server, Method::POST, "/api/orders").await.assert_is(200, "effect 8", true);
    send(server.post_without_key("/api/orders", "")).await.assert_refused(400, "key_missing");
}

async fn whatever_a_function_says_is_left_alone(bench: Bench) {
    let layer = bench.engine().build().layer(WRITES).except_when(|head| {
        let route = head.extensions.get::<MatchedPath>().map(MatchedPath::as_str);
        head.method == Method::PUT && route == Some("/files/{name}")
    });
    let both = put(bench.numbered()).post(bench.numbered());
    let server = Server::start(Router::new().route("/files/{name}", both).layer(layer)).await;
    for number in 1..=2 {
        let answer = ask(&server, Method::PUT, "/files/a").await;
        answer.assert_is(200, &format!("effect {number}"), false);
        assert!(is_ignored(&answer));
    }
    ask(&server, Method::POST, "/files/a").await.assert_is(200, "effect 3", false);
    ask(&server, Method::POST, "/files/a").await.assert_is(200, "effect 3", true);
}

async fn an_excepted_handler_keeps_its_own_policy(bench: Bench) {
    let engine = bench.engine().build();
    let own = || bench.numbered().idempotent(WRITES);
    let routes = Router::new().route("/own", post(own()).get(own())).with_state(engine.clone());
    let server = Server::start(routes.layer(engine.layer(WRITES).except(["/own"]))).await;
    for (method, body) in [(Method::POST, "effect 1"), (Method::GET, "effect 2")] {
        for replay in [false, true] {
            let answer = ask(&server, method.clone(), "/own").await;
            answer.assert_is(200, body, replay);
            assert!(!is_ignored(&answer));
        }
    }
    assert!(!bench.told.outcomes().contains(&Outcome::Ignored));
}

async fn each_route_and_parameter_is_an_operation(bench: Bench) {
    let orders = Router::new().route("/orders/{id}", post(bench.numbered()).put(bench.numbered()));
    let routes =
        Router::new().route("/{a}/{b}", post(bench.numbered())).nest("/t/{tenant}", orders);
    let server = serve(&bench, WRITES, routes.fallback(bench.numbered())).await;
    let operations = [
        (Method::POST, "/t/1/orders/2"),
        (Method::PUT, "/t/1/orders/2"),
        (Method::POST, "/t/2/orders/1"),
        (Method::POST, "/1/2"),
        (Method::POST, "/none"),
        (Method::POST, "/none/at/all"),
    ];
    for replay in [false, true] {
        for (number, (method, path)) in operations.iter().enumerate() {
            let answer = ask(&server, method.clone(), path).await;
            answer.assert_is(200, &format!("effect {}", number + 1), replay);
        }
    }
}

async fn a_nested_router_has_a_layer_of_its_own(bench: Bench) {
    let api = Router::new().route("/pay", post(bench.numbered()));
    let api = api.layer(bench.engine().build().layer(WRITES));
    let service = api.clone();
    let routes = Router::new()
        .route("/open", post(bench.numbered()))
        .nest("/api", api)
        .nest_service("/service", service);
    let server = Server::start(routes).await;
    for (path, number) in [("/api/pay", 1), ("/service/pay", 2)] {
        for replay in [false, true] {
            let answer = ask(&server, Method::POST, path).await;
            answer.assert_is(200, &format!("effect {number}"), replay);
        }
        let record = bench.store.last_record().await.unwrap();
        assert_eq!(*record.operation, format!("POST {path}"));
    }
    ask(&server, Method::POST, "/open").await.assert_is(200, "effect 3", false);
    ask(&server, Method::POST, "/open").await.assert_is(200, "effect 4", false);
}

async fn one_policy_layered_twice_is_one(bench: Bench) {
    let engine = bench.engine().build();
    let api = Router::new().route("/pay", post(bench.numbered())).layer(engine.layer(WRITES));
    let server = Server::start(Router::new().nest("/api", api).layer(engine.layer(WRITES))).await;
    ask(&server, Method::POST, "/api/pay").await.assert_is(200, "effect 1", false);
    ask(&server, Method::POST, "/api/pay").await.assert_is(200, "effect 1", true);
    assert_eq!(bench.told.outcomes(), [Outcome::Recorded, Outcome::Replayed]);
    assert_eq!(bench.store.claims().len(), 2);
}

async fn a_path_without_a_route_is_left_to_the_router_by_a_route_layer(bench: Bench) {
    let routes = || Router::new().route("/pay", post(bench.numbered()));
    let layer = bench.engine().build().layer(WRITES);
    let server = Server::start(routes().route_layer(layer.clone())).await;
    assert_eq!(send(server.post_without_key("/none", "")).await.status, 404);
    send(server.post_without_key("/pay", "")).await.assert_refused(400, "key_missing");
    let server = Server::start(routes().layer(layer)).await;
    send(server.post_without_key("/none", "")).await.assert_refused(400, "key_missing");
    // It was not recorded: the route may come.
    for _ in 0..2 {
        let absent = send(server.post("/none", "k", "")).await;
        assert_eq!((absent.status, absent.is_replay()), (404, false));
    }
}

async fn a_layer_that_is_off_or_only_observes_changes_nothing(bench: Bench) {
    let both = || post(bench.numbered()).get(bench.numbered());
    let routes = || Router::new().route("/", both());
    let refused = Outcome::Refused(RefusalKind::KeyMissing);
    let seen = [Outcome::Ignored, Outcome::Recorded, Outcome::Replayed, refused];
    for (mode, told) in [(Mode::Off, &[][..]), (Mode::Observe, &seen)] {
        let server = serve(&bench, WRITES.mode(mode), routes()).await;
        let asked = [
            ask(&server, Method::GET, "/").await,
            ask(&server, Method::POST, "/").await,
            ask(&server, Method::POST, "/").await,
            send(server.post_without_key("/", "")).await,
        ];
        for answer in asked {
            assert_eq!(answer.status, 200, "{mode:?}");
            let ours = answer.headers.keys().any(|name| name.as_str().starts_with("idempotent"));
            assert!(!ours, "{mode:?}: {:?}", answer.headers);
        }
        assert_eq!(bench.told.outcomes(), told, "{mode:?}");
        let claimed = |outcome: &&Outcome| **outcome == Outcome::Recorded;
        let only_seen: Vec<_> = told.iter().filter(|told| !claimed(told)).copied().collect();
        assert_eq!(bench.told.unenforced(), only_seen, "{mode:?}");
    }
    assert_eq!(bench.effects.count(), 8);
}

async fn what_idem_says_of_one_answer_is_in_no_record(bench: Bench) {
    let engine = bench.engine().build();
    // Further in, a handler has its own policy, and another route uses no key.
    const OTHER: Policy = Policy::new(KEY).record(Recording::All);
    let inner = Router::new()
        .route("/own", post(bench.numbered().idempotent(OTHER)))
        .route("/none", post(bench.numbered()))
        .with_state(engine.clone())
        .layer(engine.layer(OTHER).except(["/none"]));
    let server = Server::start(inner.layer(engine.layer(Policy::new(KEY).space("all")))).await;
    let answer = ask(&server, Method::POST, "/own").await;
    answer.assert_is(200, "effect 1", false);
    let used = send(server.post("/none", "other", "")).await;
    assert!(!is_ignored(&used), "{:?}", used.headers);
    let claims = bench.store.claims();
    assert_eq!(claims.len(), 4);
    for claim in claims {
        let record = bench.store.read(&claim.key).await.unwrap().expect("a record");
        let recorded = RecordedResponse::decode(&record.payload).unwrap();
        let names = recorded.headers.iter().map(|(name, _)| String::from_utf8_lossy(name));
        assert!(names.into_iter().all(|name| !name.starts_with("idempotent")), "{recorded:?}");
    }
    send(server.post("/none", "other", "")).await.assert_is(200, "effect 2", true);
}
