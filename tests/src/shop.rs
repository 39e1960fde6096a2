//! An application with one effect, which can be held up or fail in every place.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex},
    thread,
    time::Duration,
};

use axum::{
    Router,
    body::{Body, Bytes},
    extract::{FromRef, FromRequest, Request, State},
    handler::Handler,
    http::StatusCode,
    response::Response,
    routing::post,
};
use futures_util::stream;
use idem_runtime::{Builder, Idempotency, Operation, Outcome, Scoped, idempotent};

use crate::{
    faults::{Faults, Gate, Ground},
    server::{Answer, Effects, Remember, engine},
};

/// Where a handler can be held up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Place {
    /// In its last extractor.
    Extractor,
    /// In its body, with nothing done.
    BeforeEffect,
    /// In its body, with the effect done.
    AfterEffect,
    /// In the stream of its response's body.
    Body,
}

/// One process: an engine of its own over a store that it may share.
#[derive(Clone, Debug)]
pub struct Shop {
    /// The engine.
    pub engine: Idempotency,
    /// How often the effect happened in this process.
    pub effects: Effects,
    /// What the engine told.
    pub remember: Remember,
    gates: Arc<Mutex<HashMap<Place, Gate>>>,
    operation: Arc<Mutex<Option<Operation>>>,
}

impl FromRef<Shop> for Idempotency {
    fn from_ref(shop: &Shop) -> Self {
        shop.engine.clone()
    }
}

impl Shop {
    /// With a default engine.
    pub fn over(ground: &Ground) -> (Self, Faults) {
        Self::with(ground, |engine| engine)
    }

    /// With an engine that is built like this.
    pub fn with(
        ground: &Ground,
        build: impl FnOnce(Builder<Scoped>) -> Builder<Scoped>,
    ) -> (Self, Faults) {
        let (store, faults) = ground.faulty();
        let remember = Remember::default();
        let engine = build(engine(store).observer(remember.observer())).build();
        let (effects, gates, operation) = (Effects::default(), Arc::default(), Arc::default());
        (Self { engine, effects, remember, gates, operation }, faults)
    }

    /// Its routes: `/pay`.
    pub fn router(&self) -> Router {
        Router::new().route("/pay", post(pay)).with_state(self.clone())
    }

    /// Holds up the next request that comes to a place.
    pub fn hold_at(&self, place: Place) -> Gate {
        let gate = Gate::default();
        self.gates.lock().expect("a lock").insert(place, gate.clone());
        gate
    }

    /// Comes to a place.
    pub async fn come_to(&self, place: Place) {
        let gate = self.gates.lock().expect("a lock").remove(&place);
        if let Some(gate) = gate {
            gate.pass().await;
        }
    }

    /// How often this was told.
    pub fn told(&self, outcome: Outcome) -> usize {
        self.remember.outcomes().iter().filter(|told| **told == outcome).count()
    }

    /// The operation that the handler which started last works on.
    pub fn operation(&self) -> Operation {
        self.operation.lock().expect("a lock").clone().expect("a handler that started")
    }

    /// Pays in process, without a connection that could break.
    pub async fn pay(&self, key: &str, body: &str) -> Answer {
        self.call(pay, payment(key, body)).await
    }

    /// Calls any handler in process.
    pub async fn call<T>(&self, handler: impl Handler<T, Self>, request: Request) -> Answer {
        let (head, body) = Handler::call(handler, request, self.clone()).await.into_parts();
        let body = axum::body::to_bytes(body, usize::MAX).await;
        Answer {
            status: head.status.as_u16(),
            headers: head.headers,
            body: body.map(|body| body.to_vec()).unwrap_or_default(),
        }
    }

    /// Pays in a task of its own.
    pub fn start_to_pay(&self, key: &str, body: &str) -> tokio::task::JoinHandle<Answer> {
        let (shop, key, body) = (self.clone(), key.to_owned(), body.to_owned());
        tokio::spawn(async move { shop.pay(&key, &body).await })
    }
}

/// A payment of tenant `a`.
pub fn payment(key: &str, body: &str) -> Request {
    Request::post("/pay")
        .header("x-api-key", "a")
        .header("idempotency-key", key)
        .body(Body::from(body.to_owned()))
        .expect("a request")
}

/// The body, read by way of [`Place::Extractor`].
#[derive(Debug)]
pub struct Slow(String);

impl FromRequest<Shop> for Slow {
    type Rejection = StatusCode;

    async fn from_request(request: Request, shop: &Shop) -> Result<Self, StatusCode> {
        shop.come_to(Place::Extractor).await;
        let body = String::from_request(request, shop).await;
        let body = body.map_err(|_| StatusCode::BAD_REQUEST)?;
        match body.as_str() {
            "panic in extractor" => panic!("on purpose"),
            "reject" => Err(StatusCode::UNPROCESSABLE_ENTITY),
            _ => Ok(Self(body)),
        }
    }
}

/// [`Shop::work`], made safe to retry.
#[idempotent(anchor = header("Idempotency-Key"))]
pub async fn pay(State(shop): State<Shop>, operation: Operation, Slow(body): Slow) -> Response {
    shop.work(&operation, body).await
}

impl Shop {
    /// Answers with the status that its body asks for, after an effect unless that is a 4xx; a
    /// body that says where to panic is obeyed.
    pub async fn work(&self, operation: &Operation, body: String) -> Response {
        let shop = self.clone();
        *shop.operation.lock().expect("a lock") = Some(operation.clone());
        if body == "block" {
            thread::sleep(Duration::from_millis(1_200));
        }
        shop.come_to(Place::BeforeEffect).await;
        assert_ne!(body, "panic before", "on purpose");
        let status = body.parse().unwrap_or(StatusCode::CREATED);
        if !status.is_client_error() {
            shop.effects.happen();
        }
        shop.come_to(Place::AfterEffect).await;
        assert_ne!(body, "panic after", "on purpose");
        let said = format!("attempt {} of {}", operation.attempt(), operation.id());
        let streamed = stream::once(async move {
            shop.come_to(Place::Body).await;
            assert_ne!(body, "panic in body", "on purpose");
            Ok::<_, std::io::Error>(Bytes::from(said))
        });
        let mut response = Response::new(Body::from_stream(streamed));
        *response.status_mut() = status;
        response
    }
}
