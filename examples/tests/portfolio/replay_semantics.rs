//! What becomes of an anchor that the server has seen.

use super::{
    common::{over_each_store, send_at_once, slow},
    *,
};

#[tokio::test]
async fn the_same_anchor_and_body_replay_200_201_and_202_without_side_effects() {
    for server in over_each_store(PORTFOLIO) {
        let begin = begin_withdrawal(&server, ACME, "acme-1", 2_500);
        let begin = begin.header("Idempotency-Key", "w");
        let begun = send(again(&begin)).await;
        let withdrawal = withdraw(&server, ACME, "acme-1", &signed(&begun));
        let enrolment = enrolment(&server).await;
        for (request, status) in [(begin, 200), (enrolment, 201), (withdrawal, 202)] {
            let first = match status {
                200 => begun.clone(),
                _ => send(again(&request)).await,
            };
            assert_eq!((first.status, first.is_replay()), (status, false), "{}", first.text());
            for _ in 0..3 {
                send(again(&request)).await.replays(&first);
            }
        }
        for effect in ["enrolments", "transfers", "agent_slots"] {
            assert_eq!(server.effects(effect).await, 1, "{effect}");
        }
    }
}

#[tokio::test]
async fn the_same_anchor_while_it_executes_is_a_409_api_007() {
    for server in over_each_store(PORTFOLIO) {
        let withdrawal = withdraw(&server, ACME, "acme-1", &authorization(&server).await);
        let enrolment = enrolment(&server).await;
        server.behave(slow()).await;
        for request in [withdrawal, enrolment] {
            let running = server.begin(again(&request)).await;
            let duplicate = send(again(&request)).await;
            duplicate.is_error(409, "API_007");
            assert!(duplicate.headers.contains_key("retry-after"));
            let first = running.await.unwrap();
            assert!(matches!(first.status, 201 | 202), "{}", first.text());
            server.patiently(&request).await.replays(&first);
        }
    }
}

#[tokio::test]
async fn the_same_anchor_with_another_body_is_a_409_api_008_and_the_original_still_replays() {
    for server in over_each_store(PORTFOLIO) {
        let body = authorization(&server).await;
        let request = withdraw(&server, ACME, "acme-1", &body);
        let first = send(again(&request)).await;
        is_accepted(&first);
        let mut message = body["message"].clone();
        message["amount"] = 9_900.into();
        let other = withdraw(&server, ACME, "acme-1", &sign(&message));
        send(other).await.is_error(409, "API_008");
        // Verbatim: a space counts.
        let spaced = withdraw(&server, ACME, "acme-1", &body).body(format!("{body} "));
        send(spaced).await.is_error(409, "API_008");
        send(request).await.replays(&first);
        assert_eq!(server.effects("transfers").await, 1);

        let request = enrolment(&server).await;
        let first = send(again(&request)).await;
        first.is_created();
        let body = request.try_clone().unwrap().build().unwrap();
        let body: Value = serde_json::from_slice(body.body().unwrap().as_bytes().unwrap()).unwrap();
        let other = json!({ "flowId": body["flowId"], "signature": "0x00" });
        send(post(&server, ENROLL, ACME, &other)).await.is_error(409, "API_008");
        send(request).await.replays(&first);
    }
}

#[tokio::test]
async fn another_body_while_it_executes_and_after_a_5xx_is_a_conflict_too() {
    for server in over_each_store(PORTFOLIO) {
        let body = authorization(&server).await;
        let mut other = body.clone();
        other["signature"] = "0x00".into();
        let other = withdraw(&server, ACME, "acme-1", &other);
        let request = withdraw(&server, ACME, "acme-1", &body);
        server.behave(slow()).await;
        let running = server.begin(again(&request)).await;
        send(again(&other)).await.is_error(409, "API_008");
        is_accepted(&running.await.unwrap());

        let body = authorization(&server).await;
        let request = withdraw(&server, ACME, "acme-1", &body);
        let mut other = body.clone();
        other["signature"] = "0x00".into();
        server.behave(failing_at("transfers")).await;
        send(again(&request)).await.is_error(503, "API_600");
        send(withdraw(&server, ACME, "acme-1", &other)).await.is_error(409, "API_008");
        is_accepted(&send(request).await);
    }
}

#[tokio::test]
async fn after_a_conflict_a_fresh_anchor_from_stage_1_is_accepted() {
    for server in over_each_store(PORTFOLIO) {
        for transfers in 1..=2 {
            let request = withdraw(&server, ACME, "acme-1", &authorization(&server).await);
            is_accepted(&send(request).await);
            assert_eq!(server.effects("transfers").await, transfers);
        }
    }
}

#[tokio::test]
async fn fifty_duplicates_of_one_withdrawal_make_one_transfer() {
    for server in over_each_store(PORTFOLIO) {
        let request = withdraw(&server, ACME, "acme-1", &authorization(&server).await);
        server.behave(json!({ "latency_ms": 300 })).await;
        let answers = send_at_once(&request, 50).await;
        let (done, refused): (Vec<_>, Vec<_>) =
            answers.iter().partition(|answer| answer.status == 202);
        assert_eq!(done.iter().filter(|answer| !answer.is_replay()).count(), 1);
        assert!(done.iter().all(|answer| answer.body == done[0].body));
        refused.iter().for_each(|answer| answer.is_error(409, "API_007"));
        server.patiently(&request).await.replays(done[0]);
        assert_eq!(server.effects("transfers").await, 1);
    }
}
