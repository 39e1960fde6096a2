//! A client that hangs up on a layer changes nothing either.

use axum::{Router, extract::State, response::Response, routing::post};
use idem_runtime::{Operation, Outcome};
use tests::{
    faults::{Call, Ground, HangUp, PATIENCE, eventually},
    server::{Server, send},
    shop::{Place, Shop, pay},
    with_faults_on_both_stores,
};

use super::WRITES;

with_faults_on_both_stores!(also on one thread:
    a_hang_up_anywhere_leaves_the_effect_once_and_its_answer,
    a_hang_up_under_a_layer_and_a_policy_leaves_both_answers,
);

async fn plain(State(shop): State<Shop>, operation: Operation, body: String) -> Response {
    shop.work(&operation, body).await
}

fn routes(shop: &Shop) -> Router {
    let routes = Router::new().route("/plain", post(plain)).route("/own", post(pay));
    routes.with_state(shop.clone()).layer(shop.engine.layer(WRITES))
}

async fn a_hang_up_anywhere_leaves_the_effect_once_and_its_answer(ground: Ground) {
    for how in HangUp::ALL {
        for point in ["claim", "before", "after", "body", "record unsent", "record unanswered"] {
            let (shop, faults) = Shop::over(&ground);
            let server = Server::start(routes(&shop)).await;
            let gate = match point {
                "claim" => faults.hold_after(Call::Claim),
                "before" => shop.hold_at(Place::BeforeEffect),
                "after" => shop.hold_at(Place::AfterEffect),
                "body" => shop.hold_at(Place::Body),
                "record unsent" => faults.hold_before(Call::Complete),
                _ => faults.hold_after(Call::Complete),
            };
            let key = format!("{how:?} {point}").replace(' ', "-");
            let caller = how.post(server.address, "/plain", &key, "201").await;
            gate.reached().await;
            let gone = caller.hang_up();
            eventually(&format!("{key}: it goes on"), || shop.engine.detached() == 1).await;
            gate.open();
            assert!(shop.engine.drain(PATIENCE).await, "{key}: it is done in the end");
            drop(gone);
            let retry = send(server.post("/plain", &key, "201")).await;
            assert_eq!((retry.status, retry.is_replay()), (201, true), "{key}");
            assert!(retry.text().starts_with("attempt 1 of"), "{key}: {}", retry.text());
            assert_eq!((shop.effects.count(), shop.told(Outcome::Detached)), (1, 1), "{key}");
        }
    }
}

async fn a_hang_up_under_a_layer_and_a_policy_leaves_both_answers(ground: Ground) {
    for how in HangUp::ALL {
        let (shop, _) = Shop::over(&ground);
        let server = Server::start(routes(&shop)).await;
        let gate = shop.hold_at(Place::AfterEffect);
        let key = format!("both-{how:?}");
        let caller = how.post(server.address, "/own", &key, "201").await;
        gate.reached().await;
        let gone = caller.hang_up();
        eventually("it goes on", || shop.engine.detached() == 1).await;
        gate.open();
        assert!(shop.engine.drain(PATIENCE).await);
        drop(gone);
        assert_eq!((shop.effects.count(), shop.told(Outcome::Recorded)), (1, 2));
        let retry = send(server.post("/own", &key, "201")).await;
        assert_eq!((retry.status, retry.is_replay()), (201, true));
    }
}
