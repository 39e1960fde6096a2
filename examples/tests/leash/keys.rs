//! `Idempotency-Key`, on any POST.

use super::{
    common::{failing, send_at_once, slow},
    *,
};

/// A POST that takes a key, another body for it, its success, and how one sees what it did.
struct Write {
    path: &'static str,
    body: Value,
    other: Value,
    status: u16,
}

/// All of them.
async fn writes(server: &Server) -> [Write; 4] {
    let event = prepared(server).await;
    let hooks = |port: u16| json!({ "url": format!("http://127.0.0.1:{port}/"), "secret": SECRET });
    [
        Write { path: PREPARE, body: transfer(1), other: transfer(2), status: 201 },
        Write {
            path: SUBMIT,
            body: signed(&event, "5igned"),
            other: signed(&event, "0ther"),
            status: 202,
        },
        Write {
            path: RECEIPTS,
            body: receipt(HASH),
            other: receipt(&HASH.replace('2', "3")),
            status: 201,
        },
        Write { path: WEBHOOKS, body: hooks(9), other: hooks(10), status: 201 },
    ]
}

#[tokio::test]
async fn a_retry_gets_the_same_body_the_same_status_and_the_same_event() {
    for server in over_each_store(LEASH) {
        for Write { path, body, status, .. } in writes(&server).await {
            let original = send(keyed(&server, path, KEY, &body)).await;
            assert_eq!((original.status, original.is_replay()), (status, false));
            for _ in 0..3 {
                send(keyed(&server, path, KEY, &body)).await.replays(&original);
            }
        }
        let expected = json!({ "events": 2, "transactions": 1, "receipts": 1 });
        assert_eq!(send(server.get("/_effects")).await.json(), expected);
    }
}

#[tokio::test]
async fn another_body_under_the_key_is_a_mismatch_and_does_nothing() {
    for server in over_each_store(LEASH) {
        let before = feed(&server, BUYER, "").await.len();
        for Write { path, body, other, .. } in writes(&server).await {
            let original = send(keyed(&server, path, KEY, &body)).await;
            let mismatch = send(keyed(&server, path, KEY, &other)).await;
            mismatch.is_error(409, "idempotency_body_mismatch");
            send(keyed(&server, path, KEY, &body)).await.replays(&original);
        }
        assert_eq!(feed(&server, BUYER, "").await.len(), before + 3);
    }
}

#[tokio::test]
async fn a_key_is_of_one_api_key_and_of_one_route() {
    for server in over_each_store(LEASH) {
        let ours = send(keyed(&server, PREPARE, KEY, &transfer(1))).await;
        let theirs = post(&server, PREPARE, BUYER_TOO, &transfer(1));
        let theirs = send(theirs.header("Idempotency-Key", KEY)).await;
        theirs.is_created();
        assert_ne!(event_of(&ours), event_of(&theirs));
        // The same key elsewhere is another one; an agent's receipts are a route of their own.
        for path in [RECEIPTS, "/v1/receipts/rover"] {
            let answer = send(keyed(&server, path, KEY, &receipt(HASH))).await;
            assert!(!answer.is_replay() || answer.status == 200, "{}", answer.text());
        }
        send(keyed(&server, PREPARE, KEY, &transfer(1))).await.replays(&ours);
    }
}

#[tokio::test]
async fn a_key_has_up_to_64_characters_of_any_kind() {
    for server in over_each_store(LEASH) {
        let longest = "k".repeat(64);
        for key in [KEY, "7", "order 7/2026 (retry)", &longest] {
            let original = send(keyed(&server, PREPARE, key, &transfer(1))).await;
            original.is_created();
            send(keyed(&server, PREPARE, key, &transfer(1))).await.replays(&original);
        }
        for key in [&*"k".repeat(65), ""] {
            for Write { path, body, .. } in writes(&server).await {
                let refused = send(keyed(&server, path, key, &body)).await;
                refused.is_error(400, "invalid_idempotency_key");
            }
        }
        // Besides the four events, one for each call of `writes`.
        assert_eq!(server.effects("events").await, 6);
        assert_eq!(server.effects("transactions").await, 0);
    }
}

#[tokio::test]
async fn after_24_hours_the_key_is_a_new_one() {
    for server in over_each_store_with(LEASH, A_DAY_PASSES) {
        let original = send(keyed(&server, PREPARE, KEY, &transfer(1))).await;
        send(keyed(&server, PREPARE, KEY, &transfer(1))).await.replays(&original);
        tokio::time::sleep(WINDOW_AND_MORE).await;
        let second = send(keyed(&server, PREPARE, KEY, &transfer(1))).await;
        second.is_created();
        assert_ne!(event_of(&original), event_of(&second));
    }
}

#[tokio::test]
async fn of_fifty_at_once_one_runs() {
    for server in over_each_store(LEASH) {
        let event = prepared(&server).await;
        server.behave(slow()).await;
        let request = keyed(&server, SUBMIT, KEY, &signed(&event, "5igned"));
        let (mut ran, mut waiting) = (0, 0);
        for answer in send_at_once(&request, 50).await {
            match answer.status {
                202 => ran += usize::from(!answer.is_replay()),
                _ => {
                    answer.is_error(429, "in_progress");
                    assert!(answer.headers.contains_key("retry-after"));
                    waiting += 1;
                }
            }
        }
        assert_eq!(ran, 1);
        assert!(waiting > 0, "the test was too slow");
        assert_eq!(server.effects("transactions").await, 1);
    }
}

#[tokio::test]
async fn what_was_refused_is_refused_again_under_its_key() {
    for server in over_each_store(LEASH) {
        let event = prepared(&server).await;
        server.behave(failing(1, 422)).await;
        let refused = send(keyed(&server, SUBMIT, KEY, &signed(&event, "5igned"))).await;
        refused.is_error(422, "transaction_refused");
        send(keyed(&server, SUBMIT, KEY, &signed(&event, "5igned"))).await.replays(&refused);
        // The event is free for another transaction all the same.
        is_accepted(&send(keyed(&server, SUBMIT, "another", &signed(&event, "0ther"))).await);
        assert_eq!(server.effects("transactions").await, 1);
    }
}

#[tokio::test]
async fn after_a_5xx_the_same_key_runs_again() {
    for server in over_each_store(LEASH) {
        let event = prepared(&server).await;
        let request = keyed(&server, SUBMIT, KEY, &signed(&event, "5igned"));
        server.behave(failing(1, 503)).await;
        send(again(&request)).await.is_error(502, "chain_unavailable");
        let other = keyed(&server, SUBMIT, KEY, &signed(&event, "0ther"));
        send(other).await.is_error(409, "idempotency_body_mismatch");
        let accepted = send(again(&request)).await;
        is_accepted(&accepted);
        send(request).await.replays(&accepted);
    }
}

#[tokio::test]
async fn a_client_that_hung_up_gets_the_answer_later() {
    for server in over_each_store(LEASH) {
        let event = prepared(&server).await;
        server.behave(json!({ "latency_ms": 300 })).await;
        let request = keyed(&server, SUBMIT, KEY, &signed(&event, "5igned"));
        server.begin(again(&request)).await.abort();
        let retry = server.patiently(&request).await;
        assert_eq!((retry.status, retry.is_replay()), (202, true), "{}", retry.text());
        assert_eq!(server.effects("transactions").await, 1);
    }
}

#[tokio::test]
async fn without_a_known_api_key_it_is_a_401_with_a_key_and_without() {
    for server in over_each_store(LEASH) {
        for Write { path, body, .. } in writes(&server).await {
            send(keyed(&server, path, KEY, &body)).await;
            for request in [server.post(path, &body), post(&server, path, "nobody", &body)] {
                send(again(&request)).await.is_error(401, "unauthorized");
                let request = request.header("Idempotency-Key", KEY);
                send(request).await.is_error(401, "unauthorized");
            }
        }
        send(server.get("/v1/events")).await.is_error(401, "unauthorized");
    }
}

#[tokio::test]
async fn a_key_on_a_read_is_ignored_and_the_client_is_told() {
    for server in over_each_store(LEASH) {
        for _ in 0..2 {
            let read = server.get("/v1/events").header("X-API-Key", BUYER);
            let answer = send(read.header("Idempotency-Key", KEY)).await;
            assert_eq!((answer.status, answer.is_replay()), (200, false));
            assert_eq!(answer.headers["idempotent-ignored"], "true");
        }
    }
}
