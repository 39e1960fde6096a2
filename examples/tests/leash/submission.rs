//! Submit is idempotent on `event_id`.

use tempfile::TempDir;

use super::{
    common::{all, answer_lost, failing, slow, sqlite},
    *,
};

#[tokio::test]
async fn the_second_call_is_a_200_and_asks_nobody() {
    for server in over_each_store(LEASH) {
        let event = prepared(&server).await;
        let accepted = send(submit(&server, &event, "5igned")).await;
        is_accepted(&accepted);
        let calls = server.calls().await;
        for _ in 0..3 {
            repeats(&send(submit(&server, &event, "5igned")).await, &accepted);
        }
        // However the id is spelt, and with whatever key.
        let mut spelt = signed(&event, "5igned");
        spelt["event_id"] = event.to_uppercase().into();
        repeats(&send(post(&server, SUBMIT, BUYER, &spelt)).await, &accepted);
        let keyed = keyed(&server, SUBMIT, KEY, &signed(&event, "5igned"));
        repeats(&send(again(&keyed)).await, &accepted);
        repeats(&send(keyed).await, &accepted);
        assert_eq!(server.calls().await, calls);
        assert_eq!(server.effects("transactions").await, 1);
    }
}

#[tokio::test]
async fn once_it_is_confirmed_nobody_is_asked_either() {
    for server in over_each_store_with(LEASH, FAST) {
        let event = prepared(&server).await;
        let accepted = send(submit(&server, &event, "5igned")).await;
        comes_to(&server, &event, "confirmed").await;
        let calls = server.calls().await;
        repeats(&send(submit(&server, &event, "5igned")).await, &accepted);
        let other = send(submit(&server, &event, "0ther")).await;
        other.is_error(409, "event_already_submitted");
        assert_eq!(server.calls().await, calls);
    }
}

#[tokio::test]
async fn with_the_same_key_the_retry_gets_the_202_as_it_was() {
    for server in over_each_store(LEASH) {
        let event = prepared(&server).await;
        let request = keyed(&server, SUBMIT, KEY, &signed(&event, "5igned"));
        let accepted = send(again(&request)).await;
        is_accepted(&accepted);
        let calls = server.calls().await;
        send(again(&request)).await.replays(&accepted);
        // Both hold: without the key it is the event that counts.
        repeats(&send(submit(&server, &event, "5igned")).await, &accepted);
        send(request).await.replays(&accepted);
        assert_eq!(server.calls().await, calls);
    }
}

#[tokio::test]
async fn another_transaction_for_the_event_is_a_409() {
    for server in over_each_store(LEASH) {
        let event = prepared(&server).await;
        is_accepted(&send(submit(&server, &event, "5igned")).await);
        let other = send(submit(&server, &event, "0ther")).await;
        other.is_error(409, "event_already_submitted");
        let request = keyed(&server, SUBMIT, KEY, &signed(&event, "0ther"));
        send(request).await.is_error(409, "event_already_submitted");
        assert_eq!(server.effects("transactions").await, 1);
    }
}

#[tokio::test]
async fn of_many_workers_and_two_transactions_one_reaches_the_chain() {
    for server in over_each_store(LEASH) {
        let event = prepared(&server).await;
        server.behave(slow()).await;
        let requests = (0..40).map(|n| {
            let transaction = ["5igned", "0ther"][n % 2];
            match n % 4 {
                0 | 1 => submit(&server, &event, transaction),
                _ => {
                    let body = signed(&event, transaction);
                    keyed(&server, SUBMIT, &format!("worker {n}"), &body)
                }
            }
        });
        let answers = all(requests).await;
        let count = |status| answers.iter().filter(|answer| answer.status == status).count();
        assert_eq!(count(202), 1);
        assert_eq!(count(409), 20, "the other transaction");
        assert_eq!(count(429) + count(200), 19, "in progress, or done by then");
        assert!(count(429) > 0, "the test was too slow");
        assert_eq!(server.effects("transactions").await, 1);
    }
}

#[tokio::test]
async fn of_two_servers_over_one_store_one_reaches_the_chain() {
    let directory = TempDir::new().unwrap();
    let store = sqlite(directory.path());
    let servers = [(); 2].map(|()| Server::start(LEASH, &["--store", &store]));
    let event = prepared(&servers[0]).await;
    for server in &servers {
        server.behave(slow()).await;
    }
    let requests = (0..40).map(|n| submit(&servers[n % 2], &event, "5igned"));
    let answers = all(requests).await;
    let count = |status| answers.iter().filter(|answer| answer.status == status).count();
    assert_eq!((count(202), count(429) + count(200)), (1, 39));
    let [here, there] = [&servers[0], &servers[1]].map(|server| server.effects("transactions"));
    assert_eq!(here.await + there.await, 1);
}

#[tokio::test]
async fn a_duplicate_of_one_that_is_running_may_be_sent_again() {
    for server in over_each_store(LEASH) {
        let event = prepared(&server).await;
        server.behave(json!({ "latency_ms": 500 })).await;
        let request = submit(&server, &event, "5igned");
        let running = server.begin(again(&request)).await;
        let duplicate = send(again(&request)).await;
        duplicate.is_error(429, "in_progress");
        assert!(duplicate.headers.contains_key("retry-after"));
        // A key of its own does not stand in the way later.
        let keyed = again(&request).header("Idempotency-Key", KEY);
        send(again(&keyed)).await.is_error(429, "in_progress");
        let accepted = running.await.unwrap();
        is_accepted(&accepted);
        repeats(&send(keyed).await, &accepted);
        repeats(&send(request).await, &accepted);
    }
}

#[tokio::test]
async fn what_the_chain_leaves_open_is_only_open_to_the_same_transaction() {
    for server in over_each_store(LEASH) {
        let event = prepared(&server).await;
        server.behave(answer_lost()).await;
        let lost = send(submit(&server, &event, "5igned")).await;
        lost.is_error(502, "chain_unavailable");
        let other = send(submit(&server, &event, "0ther")).await;
        other.is_error(409, "event_already_submitted");
        is_accepted(&send(submit(&server, &event, "5igned")).await);
        assert_eq!(server.effects("transactions").await, 1);
    }
}

#[tokio::test]
async fn what_the_chain_refuses_leaves_the_event_to_another_transaction() {
    for server in over_each_store(LEASH) {
        let event_id = prepared(&server).await;
        server.behave(failing(1, 400)).await;
        let refused = send(submit(&server, &event_id, "exp1red")).await;
        refused.is_error(422, "transaction_refused");
        assert_eq!(event(&server, &event_id).await["phase"], "prepared");
        is_accepted(&send(submit(&server, &event_id, "5igned")).await);
    }
}

#[tokio::test]
async fn an_event_that_is_not_the_callers_cannot_be_submitted() {
    for server in over_each_store(LEASH) {
        let event_id = prepared(&server).await;
        for _ in 0..2 {
            let theirs = post(&server, SUBMIT, SELLER, &signed(&event_id, "5igned"));
            send(theirs).await.is_error(404, "not_found");
        }
        is_accepted(&send(submit(&server, &event_id, "5igned")).await);
        // Not even once there is a record.
        let theirs = post(&server, SUBMIT, SELLER, &signed(&event_id, "5igned"));
        send(theirs).await.is_error(404, "not_found");
        assert_eq!(server.effects("transactions").await, 1);

        let published = send(post(&server, RECEIPTS, BUYER, &receipt(HASH))).await;
        let of_receipt = send(submit(&server, &event_of(&published), "5igned")).await;
        of_receipt.is_error(404, "not_found");
    }
}

#[tokio::test]
async fn what_is_wrong_with_it_is_said_and_nothing_happens() {
    for server in over_each_store(LEASH) {
        let (event_id, another) = (prepared(&server).await, prepared(&server).await);
        for body in [
            json!({ "signed_transaction": "5igned" }),
            json!({ "event_id": "7", "signed_transaction": "5igned" }),
            json!({ "event_id": event_id }),
            json!({ "event_id": event_id, "signed_transaction": 7 }),
            json!({ "event_id": event_id, "signed_transaction": "" }),
            json!({ "event_id": event_id, "signed_transaction": "5igned" }),
            // Unsigned; and signed for another event.
            signed(&event_id, ""),
            json!({
                "event_id": event_id,
                "signed_transaction": signed(&another, "5igned")["signed_transaction"],
            }),
        ] {
            let refused = send(post(&server, SUBMIT, BUYER, &body)).await;
            refused.is_error(400, "invalid");
        }
        assert_eq!(server.calls().await, 0);
        is_accepted(&send(submit(&server, &event_id, "5igned")).await);
    }
}
