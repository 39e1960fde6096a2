//! A client that hangs up, at any await from the claim to the record, changes nothing: the effect
//! happens once and its answer is kept for the retry.

#![allow(clippy::expect_used, reason = "a test that cannot go on has failed")]

use std::{future::poll_fn, pin::pin, task::Poll, time::Duration};

use axum::{
    body::{Body, Bytes},
    extract::State,
    handler::Handler,
    http::StatusCode,
    response::Response,
};
use futures_util::stream;
use idem_runtime::{Anchor, IdempotentExt, Operation, Outcome, Policy};
use tests::{
    faults::{Call, Faults, Gate, Ground, HangUp, PATIENCE, eventually, http1_request},
    server::{Server, send},
    shop::{Place, Shop, payment},
    with_faults_on_both_stores,
};
use tokio::{io::AsyncWriteExt, net::TcpStream};

/// Where a request can stand when its client hangs up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Point {
    ClaimUnsent,
    ClaimUnanswered,
    In(Place),
    RecordUnsent,
    RecordUnanswered,
}

const POINTS: [Point; 8] = [
    Point::ClaimUnsent,
    Point::ClaimUnanswered,
    Point::In(Place::Extractor),
    Point::In(Place::BeforeEffect),
    Point::In(Place::AfterEffect),
    Point::In(Place::Body),
    Point::RecordUnsent,
    Point::RecordUnanswered,
];

/// Holds up the next request that comes to a point.
fn hold_at(point: Point, ending: Call, shop: &Shop, faults: &Faults) -> Gate {
    match point {
        Point::ClaimUnsent => faults.hold_before(Call::Claim),
        Point::ClaimUnanswered => faults.hold_after(Call::Claim),
        Point::In(place) => shop.hold_at(place),
        Point::RecordUnsent => faults.hold_before(ending),
        Point::RecordUnanswered => faults.hold_after(ending),
    }
}

/// Hangs up at a point; says what the handler came to, in the background, and the server.
async fn hang_up_at(
    point: Point,
    how: HangUp,
    status: &str,
    ending: Call,
    ground: &Ground,
) -> Shop {
    let (shop, faults) = Shop::over(ground);
    let server = Server::start(shop.router()).await;
    let gate = hold_at(point, ending, &shop, &faults);
    let key = format!("{point:?}-{how:?}-{status}");
    let caller = how.post(server.address, "/pay", &key, status).await;
    gate.reached().await;
    assert_eq!(shop.engine.detached(), 0, "{key}: the client is still there");
    let gone = caller.hang_up();
    eventually(&format!("{key}: it goes on"), || shop.engine.detached() == 1).await;

    // The claim holds while nobody waits, and whoever shuts down can.
    let recorded = matches!(point, Point::RecordUnanswered);
    if !recorded && point != Point::ClaimUnsent {
        let duplicate = send(server.post("/pay", &key, status)).await;
        assert_eq!((duplicate.status, duplicate.code().as_str()), (409, "in_flight"), "{key}");
    }
    assert!(!shop.engine.drain(Duration::from_millis(5)).await, "{key}: it is not done");

    gate.open();
    assert!(shop.engine.drain(PATIENCE).await, "{key}: it is done in the end");
    assert_eq!(shop.engine.detached(), 0, "{key}");
    assert_eq!(shop.told(Outcome::Detached), 1, "{key}");
    drop(gone);
    server.stop().await;
    shop
}

async fn a_hang_up_anywhere_leaves_the_effect_once_and_its_answer(ground: Ground) {
    for how in HangUp::ALL {
        for point in POINTS {
            let shop = hang_up_at(point, how, "201", Call::Complete, &ground).await;
            let server = Server::start(shop.router()).await;
            let retry = send(server.post("/pay", &format!("{point:?}-{how:?}-201"), "201")).await;
            assert_eq!((retry.status, shop.effects.count()), (201, 1), "{point:?} {how:?}");
            assert!(retry.is_replay(), "{point:?} {how:?}");
            assert!(retry.text().starts_with("attempt 1 of"), "{}", retry.text());
        }
    }
}

async fn a_hang_up_while_a_claim_is_given_up_leaves_the_key_to_the_next_attempt(ground: Ground) {
    for point in [Point::In(Place::AfterEffect), Point::RecordUnsent, Point::RecordUnanswered] {
        let how = HangUp::Http1Close;
        let shop = hang_up_at(point, how, "500", Call::Release, &ground).await;
        let server = Server::start(shop.router()).await;
        let retry = send(server.post("/pay", &format!("{point:?}-{how:?}-500"), "500")).await;
        assert_eq!((retry.status, shop.effects.count()), (500, 2), "{point:?}");
        assert!(retry.text().starts_with("attempt 2 of"), "{point:?}: {}", retry.text());
    }
}

async fn a_hang_up_while_a_key_is_forgotten_leaves_it_as_new(ground: Ground) {
    for point in [Point::In(Place::AfterEffect), Point::RecordUnsent, Point::RecordUnanswered] {
        let how = HangUp::Http2Cancel;
        let shop = hang_up_at(point, how, "422", Call::Forget, &ground).await;
        let server = Server::start(shop.router()).await;
        let key = format!("{point:?}-{how:?}-422");
        let another = send(server.post("/pay", &key, "201")).await;
        assert_eq!((another.status, shop.effects.count()), (201, 1), "{point:?}");
        assert!(another.text().starts_with("attempt 1 of"), "{point:?}: {}", another.text());
    }
}

async fn a_hang_up_before_the_body_is_there_claims_nothing(ground: Ground) {
    let (shop, faults) = Shop::over(&ground);
    let server = Server::start(shop.router()).await;
    for reset in [false, true] {
        let mut stream = TcpStream::connect(server.address).await.expect("a connection");
        let begun = http1_request("/pay", "k", 300) + "201";
        stream.write_all(begun.as_bytes()).await.expect("half a request");
        // An answered request on another connection: the server has had time for the first.
        assert_eq!(send(server.post("/pay", &format!("other-{reset}"), "201")).await.status, 201);
        if reset {
            stream.set_zero_linger().expect("a socket option");
        }
        drop(stream);
    }
    assert_eq!(send(server.post("/pay", "k", "201")).await.text(), {
        let replay = send(server.post("/pay", "k", "201")).await;
        assert!(replay.is_replay());
        replay.text()
    });
    server.stop().await;
    // Two others, the first of `k` and its replay.
    assert_eq!(
        (faults.calls(Call::Claim), shop.effects.count(), shop.told(Outcome::Detached)),
        (4, 3, 0)
    );
}

with_faults_on_both_stores!(also on one thread:
    a_hang_up_anywhere_leaves_the_effect_once_and_its_answer,
    a_hang_up_while_a_claim_is_given_up_leaves_the_key_to_the_next_attempt,
    a_hang_up_while_a_key_is_forgotten_leaves_it_as_new,
    a_hang_up_before_the_body_is_there_claims_nothing,
    a_request_dropped_after_any_number_of_polls_is_finished_once,
    hundreds_of_clients_that_hang_up_at_random_leave_one_effect_a_key,
);

const POLICY: Policy = Policy::new(Anchor::header("Idempotency-Key"));

/// Awaits in every place where a handler can, and answers with the status that the body asks for.
async fn restless(State(shop): State<Shop>, operation: Operation, body: String) -> Response {
    tokio::task::yield_now().await;
    let status: u16 = body.parse().expect("a status");
    if !(400..500).contains(&status) {
        shop.effects.happen();
    }
    tokio::task::yield_now().await;
    let said = format!("attempt {} of {}", operation.attempt(), operation.id());
    let streamed = stream::unfold(Some(said), |said| async move {
        tokio::task::yield_now().await;
        said.map(|said| (Ok::<_, std::io::Error>(Bytes::from(said)), None))
    });
    let mut response = Response::new(Body::from_stream(streamed));
    *response.status_mut() = StatusCode::from_u16(status).expect("a status");
    response
}

/// Calls the handler and drops its future after so many polls; `None` if it was not done by then.
async fn polled(shop: &Shop, key: &str, status: &str, polls: usize) -> Option<Response> {
    let mut answer = pin!(restless.idempotent(POLICY).call(payment(key, status), shop.clone()));
    let mut polled = 0;
    poll_fn(|cx| {
        if polled == polls {
            return Poll::Ready(None);
        }
        polled += 1;
        answer.as_mut().poll(cx).map(Some)
    })
    .await
}

async fn text(response: Response) -> String {
    let bytes = axum::body::to_bytes(response.into_body(), usize::MAX).await.expect("a body");
    String::from_utf8_lossy(&bytes).into_owned()
}

async fn a_request_dropped_after_any_number_of_polls_is_finished_once(ground: Ground) {
    // How often an attempt has its effect, and what a second request with the key gets.
    for (status, effects_of_each, second_attempt) in [("200", 1, 1), ("422", 0, 1), ("500", 1, 2)] {
        let (mut whole, mut polls) = (false, 0);
        while !whole {
            let (shop, _) = Shop::over(&ground);
            let key = format!("{status}-{polls}");
            whole = polled(&shop, &key, status, polls).await.is_some();
            assert!(shop.engine.drain(PATIENCE).await, "{key}");
            let began = if polls == 0 { 0 } else { 1 };
            assert_eq!(shop.effects.count(), began * effects_of_each, "{key}");

            let response = polled(&shop, &key, status, usize::MAX).await.expect("an answer");
            assert_eq!(response.status().as_str(), status, "{key}");
            let replayed = response.headers().contains_key("idempotent-replayed");
            assert_eq!(replayed, status == "200" && began == 1, "{key}");
            let attempt = if began == 1 { second_attempt } else { 1 };
            assert!(text(response).await.starts_with(&format!("attempt {attempt} of")), "{key}");
            let attempts = began + usize::from(!replayed);
            assert_eq!(shop.effects.count(), attempts * effects_of_each, "{key}");
            assert_eq!(shop.engine.detached(), 0, "{key}");
            polls += 1;
        }
        assert!(polls > 4, "it awaits in several places");
    }
}

async fn hundreds_of_clients_that_hang_up_at_random_leave_one_effect_a_key(ground: Ground) {
    const KEYS: usize = 40;
    let (shop, _) = Shop::over(&ground);
    let mut callers = Vec::new();
    for call in 0..KEYS * 8 {
        let shop = shop.clone();
        callers.push(tokio::spawn(async move {
            polled(&shop, &format!("k{}", call % KEYS), "200", call / KEYS * 2).await
        }));
    }
    for caller in callers {
        caller.await.expect("no panic");
    }
    assert!(shop.engine.drain(PATIENCE).await);
    assert_eq!(shop.effects.count(), KEYS);
    for key in 0..KEYS {
        let response = polled(&shop, &format!("k{key}"), "200", usize::MAX).await.expect("answer");
        assert!(response.headers().contains_key("idempotent-replayed"));
    }
    assert_eq!(shop.effects.count(), KEYS);
}
