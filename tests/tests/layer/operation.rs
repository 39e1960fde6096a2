//! The operation: as a handler under a layer sees it, and wherever a support ticket or a log can
//! carry its id.

use std::{
    io,
    sync::{Arc, Mutex},
};

use axum::{
    Router,
    extract::{FromRef, State},
    http::{HeaderName, StatusCode},
    routing::post,
};
use bytes::Bytes;
use http::Response;
use idem_runtime::{
    Idempotency, IdempotentExt, OPERATION, Operation, Outcome, Policy, RecordedResponse, Refusal,
    RefusalKind, idempotent,
};
use reqwest::Method;
use tests::{
    faults::{Gate, eventually},
    on_both_stores,
    server::{Effects, Server, send},
    stores::Bench,
};

use super::{KEY, WRITES, ask, operation_of, serve};

on_both_stores! {
    a_plain_handler_sees_the_layers_operation,
    an_annotated_handler_sees_its_own_and_without_a_claim_the_layers,
    every_answer_about_an_operation_names_it,
    the_header_is_the_applications_choice,
    it_is_part_of_no_record,
    what_a_handler_logs_leads_to_its_record,
}

async fn a_plain_handler_sees_the_layers_operation(bench: Bench) {
    let (charged, effects) = (Effects::default(), bench.effects.clone());
    let count = charged.clone();
    let handler = async move |operation: Operation| {
        let charge = async || Ok::<_, StatusCode>(count.happen());
        let number = operation.step("charge", charge()).await.unwrap();
        let (id, attempt) = (operation.id(), operation.attempt());
        let said = format!("charge {number} attempt {attempt} {id} {}", operation.derive("psp"));
        match effects.happen() {
            1 => (StatusCode::CONFLICT, said),
            _ => (StatusCode::CREATED, said),
        }
    };
    let server = serve(&bench, WRITES, Router::new().route("/", post(handler))).await;
    let first = ask(&server, Method::POST, "/").await;
    let id = operation_of(&first);
    assert!(first.text().starts_with(&format!("charge 1 attempt 1 {id} ")), "{}", first.text());
    // A step was taken: the 409 has not freed the key, and the retry does not charge again.
    let retry = ask(&server, Method::POST, "/").await;
    let expected = first.text().replace("attempt 1", "attempt 2");
    retry.assert_is(201, &expected, false);
    assert_eq!((operation_of(&retry), charged.count()), (id, 1));
    assert_eq!(bench.told.outcomes(), [Outcome::Released, Outcome::Recorded]);
}

#[derive(Clone, FromRef)]
struct App {
    engine: Idempotency,
}

#[idempotent(anchor = header("X-Own"), optional)]
async fn own(State(_): State<Idempotency>, before: Operation, _: String) -> String {
    format!("{} {}", before.id(), before.attempt())
}

#[idempotent(anchor = header("X-Own"), optional)]
async fn own_at_the_end(operation: Operation) -> String {
    format!("{} {}", operation.id(), operation.attempt())
}

async fn an_annotated_handler_sees_its_own_and_without_a_claim_the_layers(bench: Bench) {
    let app = App { engine: bench.engine().build() };
    let routes = Router::new()
        .route("/first", post(own))
        .route("/last", post(own_at_the_end))
        .with_state(app.clone());
    let server = Server::start(routes.layer(app.engine.layer(WRITES))).await;
    for path in ["/first", "/last"] {
        let with = send(server.post(path, "1", "").header("x-own", "o")).await;
        let claimed = bench.store.last_claim().operation_id;
        assert_eq!(with.text(), format!("{claimed} 1"), "{path}");
        assert_ne!(operation_of(&with), claimed.to_string(), "{path}");
        let without = send(server.post(path, "2", "")).await;
        assert_eq!(without.text(), format!("{} 1", operation_of(&without)), "{path}");
    }
}

fn ours(refusal: &Refusal) -> Response<Bytes> {
    let mut response = Response::new(Bytes::from_static(b"no"));
    *response.status_mut() = match refusal.kind() {
        RefusalKind::Mismatch => StatusCode::IM_A_TEAPOT,
        kind => kind.status(),
    };
    response
}

async fn every_answer_about_an_operation_names_it(bench: Bench) {
    let gate = Gate::default();
    let handler = {
        let gate = gate.clone();
        async move |operation: Operation, body: String| {
            match body.as_str() {
                "wait" => gate.pass().await,
                "panic" => panic!("as told"),
                _ => {}
            }
            operation.id().to_string()
        }
    };
    let engine = bench.engine().refusals(ours).build();
    let routes = Router::new()
        .route("/own", post(handler.clone().idempotent(WRITES)))
        .with_state(engine.clone())
        .merge(Router::new().route("/layer", post(handler)).layer(engine.layer(WRITES)));
    let server = Server::start(routes).await;
    for path in ["/own", "/layer"] {
        let first = send(server.post(path, "k", "100")).await;
        let id = operation_of(&first);
        first.assert_is(200, &id, false);
        let replay = send(server.post(path, "k", "100")).await;
        let mismatch = send(server.post(path, "k", "999")).await;
        assert_eq!((replay.status, mismatch.status, mismatch.text().as_str()), (200, 418, "no"));
        assert_eq!((operation_of(&replay), operation_of(&mismatch)), (id.clone(), id));
        let panicked = send(server.post(path, "p", "panic")).await;
        let record = bench.store.last_record().await.unwrap();
        assert_eq!(operation_of(&panicked), record.operation_id.to_string());
        // Nothing is known of an operation without a key.
        let none = send(server.post_without_key(path, "100")).await;
        assert_eq!((none.status, none.header("idempotent-operation")), (400, None));
    }
    let running = tokio::spawn(server.post("/layer", "w", "wait").send());
    gate.reached().await;
    let in_flight = send(server.post("/layer", "w", "wait")).await;
    let record = bench.store.last_record().await.unwrap();
    assert_eq!(in_flight.status, 409);
    assert_eq!(operation_of(&in_flight), record.operation_id.to_string());
    gate.open();
    let answer = running.await.unwrap().unwrap();
    assert_eq!(answer.headers()["idempotent-operation"], record.operation_id.to_string().as_str());
}

async fn the_header_is_the_applications_choice(bench: Bench) {
    let ours = HeaderName::from_static("x-operation");
    let names = [Some(ours.clone()), None, Some(OPERATION)];
    // What the handler itself says of that name does not count.
    let handler = async || ([("x-operation", "mine")], "done");
    for (key, name) in names.into_iter().enumerate() {
        let engine = bench.engine().operation_header(name.clone()).build();
        let routes = Router::new().route("/", post(handler)).layer(engine.layer(WRITES));
        let server = Server::start(routes).await;
        for _ in 0..2 {
            let answer = send(server.post("/", &key.to_string(), "")).await;
            let id = bench.store.last_record().await.unwrap().operation_id.to_string();
            let renamed = name == Some(ours.clone());
            let expected = if renamed { id.as_str() } else { "mine" };
            assert_eq!(answer.header("x-operation"), Some(expected));
            let named = answer.header("idempotent-operation");
            assert_eq!(named, (name == Some(OPERATION)).then_some(id.as_str()));
        }
    }
}

async fn it_is_part_of_no_record(bench: Bench) {
    let engine = bench.engine().keep(&OPERATION).build();
    // The handler's own policy says it, and the layer records the handler's answer.
    let routes = Router::new().route("/", post(bench.numbered().idempotent(WRITES)));
    let layer = engine.layer(Policy::new(KEY).space("outer"));
    let server = Server::start(routes.with_state(engine).layer(layer)).await;
    let first = ask(&server, Method::POST, "/").await;
    let claims = bench.store.claims();
    assert_eq!(claims.len(), 2);
    assert_eq!(operation_of(&first), claims[0].operation_id.to_string());
    for claim in claims {
        let store: &dyn idem_runtime::store::Store = &bench.store;
        let record = store.read(&claim.key).await.unwrap().unwrap();
        let headers = RecordedResponse::decode(&record.payload).unwrap().headers;
        assert!(headers.iter().all(|(name, _)| !name.starts_with(b"idempotent")), "{headers:?}");
    }
    assert_eq!(operation_of(&ask(&server, Method::POST, "/").await), operation_of(&first));
}

/// What was logged on one thread.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl io::Write for Log {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Log {
    /// The line in which this was said.
    fn line(&self, said: &str) -> Option<String> {
        let log = String::from_utf8(self.0.lock().unwrap().clone()).unwrap();
        log.lines().find(|line| line.contains(said)).map(str::to_owned)
    }
}

async fn what_a_handler_logs_leads_to_its_record(bench: Bench) {
    let log = Log::default();
    let writer = log.clone();
    // The level of a service in production.
    let subscriber = tracing_subscriber::fmt()
        .with_max_level(tracing::Level::INFO)
        .with_ansi(false)
        .with_writer(move || writer.clone())
        .finish();
    let _guard = tracing::subscriber::set_default(subscriber);
    let gate = Gate::default();
    let (passing, effects) = (gate.clone(), bench.effects.clone());
    let handler = async move |body: String| {
        let number = effects.happen();
        tracing::info!("handler {number} begins");
        if body == "wait" {
            passing.pass().await;
        }
        tracing::info!("handler {number} ends");
        if number == 1 { StatusCode::BAD_GATEWAY } else { StatusCode::OK }
    };
    let engine = bench.engine().build();
    let routes = Router::new()
        .route("/orders/{id}", post(handler.clone()))
        .layer(engine.layer(WRITES))
        .merge(Router::new().route("/own", post(handler.idempotent(WRITES))).with_state(engine));
    let server = Server::start(routes).await;
    for attempt in 1..=2 {
        send(server.post("/orders/7", "k", "100")).await;
        let id = bench.store.last_record().await.unwrap().operation_id;
        let line = log.line(&format!("handler {attempt} ends")).unwrap();
        let fields = format!(
            "idempotent{{operation=\"POST /orders/{{id}}\" operation_id={id} attempt={attempt}}}"
        );
        assert!(line.contains(&fields), "{line}");
        assert!(!line.contains("orders/7"));
    }
    // It goes along when nobody waits any more.
    let caller = tokio::spawn(server.post("/own", "w", "wait").send());
    gate.reached().await;
    caller.abort();
    eventually("the client is gone", || bench.told.outcomes().contains(&Outcome::Detached)).await;
    gate.open();
    eventually("it is done", || bench.told.outcomes().ends_with(&[Outcome::Recorded])).await;
    let id = bench.store.last_record().await.unwrap().operation_id;
    let line = log.line("handler 3 ends").unwrap();
    assert!(line.contains(&format!("operation_id={id} attempt=1")), "{line}");
    // A replay runs nothing and has no span; what idem tells of it is the observer's.
    send(server.post("/orders/7", "k", "100")).await;
    assert_eq!(log.line("handler 4"), None);
}
