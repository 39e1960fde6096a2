//! Event ids are the canonical handle.

use super::*;

#[tokio::test]
async fn without_a_key_every_prepare_and_submit_returns_an_event() {
    for server in over_each_store(LEASH) {
        let first = prepared(&server).await;
        let second = prepared(&server).await;
        assert_ne!(first, second);
        let accepted = send(submit(&server, &first, "5igned")).await;
        is_accepted(&accepted);
        assert_eq!(event_of(&accepted), first);
        assert_eq!(server.effects("events").await, 2);
    }
}

#[tokio::test]
async fn an_event_tells_its_phase_its_signature_and_its_error() {
    for server in over_each_store_with(LEASH, FAST) {
        let id = prepared(&server).await;
        let shown = event(&server, &id).await;
        assert_eq!((&shown["phase"], &shown["signature"]), (&json!("prepared"), &Value::Null));
        assert_eq!(shown["explorer"], format!("https://explorer.leash.market/event/{id}"));
        let accepted = send(submit(&server, &id, "5igned")).await;
        let shown = comes_to(&server, &id, "confirmed").await;
        assert_eq!(shown["signature"], accepted.json()["signature"]);
        assert_eq!(shown["error"], Value::Null);

        let id = prepared(&server).await;
        server.behave(json!({ "fail": 1, "status": 404, "only": "confirmations" })).await;
        is_accepted(&send(submit(&server, &id, "dr0pped")).await);
        let shown = comes_to(&server, &id, "failed").await;
        assert!(shown["signature"].is_string() && shown["error"].is_string(), "{shown}");
        assert_eq!(server.effects("confirmations").await, 1);
    }
}

#[tokio::test]
async fn a_chain_that_does_not_answer_is_asked_again() {
    for server in over_each_store_with(LEASH, FAST) {
        let id = prepared(&server).await;
        server.behave(json!({ "fail": 3, "status": 503, "only": "confirmations" })).await;
        is_accepted(&send(submit(&server, &id, "5igned")).await);
        comes_to(&server, &id, "confirmed").await;
        assert_eq!(server.effects("confirmations").await, 1);
    }
}

#[tokio::test]
async fn confirmation_is_not_the_response() {
    for server in over_each_store(LEASH) {
        let id = prepared(&server).await;
        is_accepted(&send(submit(&server, &id, "5igned")).await);
        assert_eq!(event(&server, &id).await["phase"], "submitted");
        assert_eq!(server.effects("confirmations").await, 0);
    }
}

#[tokio::test]
async fn polling_is_cheap() {
    for server in over_each_store(LEASH) {
        let id = prepared(&server).await;
        let calls = server.calls().await;
        let answer = get(&server, &format!("/v1/events/{id}"), BUYER).await;
        assert_eq!(answer.headers["cache-control"], "private, max-age=5");
        assert_eq!(answer.headers["vary"], "x-api-key");
        assert_eq!(server.calls().await, calls);
    }
}

#[tokio::test]
async fn the_feed_shows_the_same_row() {
    for server in over_each_store(LEASH) {
        let mut ids = Vec::new();
        for _ in 0..3 {
            ids.push(prepared(&server).await);
        }
        let published = send(post(&server, RECEIPTS, BUYER, &receipt(HASH))).await;
        is_accepted(&send(submit(&server, &ids[1], "5igned")).await);
        let of = async |query: &str| {
            let rows = feed(&server, BUYER, query).await;
            rows.iter().map(|row| row["id"].as_str().unwrap().to_owned()).collect::<Vec<_>>()
        };
        let row = event(&server, &ids[1]).await;
        assert_eq!(feed(&server, BUYER, &format!("?id={}", ids[1])).await, [row]);
        assert_eq!(of("?phase=prepared").await, [&*ids[0], &ids[2]]);
        assert_eq!(of("?phase=receipt.published").await, [event_of(&published)]);
        assert_eq!(of(&format!("?agent=scout&id={}", ids[2])).await, [&*ids[2]]);
        assert_eq!(of(&format!("?agent=rover&id={}", ids[2])).await, [""; 0]);
        assert_eq!(of("?limit=2").await, ids[..2]);
        assert_eq!(of(&format!("?limit=1&after={}", ids[1])).await, ids[2..]);
        for wrong in ["?phase=lost", "?id=7", "?limit=-1", "?colour=red"] {
            let answer = get(&server, &format!("/v1/events{wrong}"), BUYER).await;
            answer.is_error(400, "invalid");
        }
    }
}

#[tokio::test]
async fn an_event_is_its_api_keys() {
    for server in over_each_store(LEASH) {
        let id = prepared(&server).await;
        for (path, api_key) in [
            (format!("/v1/events/{id}"), BUYER_TOO),
            (format!("/v1/events/{id}"), SELLER),
            ("/v1/events/0b5b9a8e-0f53-4c7e-9d5e-1f2f3a4b5c6d".to_owned(), BUYER),
            ("/v1/events/7".to_owned(), BUYER),
        ] {
            get(&server, &path, api_key).await.is_error(404, "not_found");
        }
        assert_eq!(feed(&server, SELLER, &format!("?id={id}")).await, [Value::Null; 0]);
    }
}
