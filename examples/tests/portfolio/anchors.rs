//! The keys that the server issues.

use alloy_primitives::B256;

use super::{
    common::{answer_lost, over_each_store, over_each_store_with},
    *,
};

#[tokio::test]
async fn stage_1_issues_the_flow_and_with_a_key_a_repetition_reserves_nothing_more() {
    for server in over_each_store(PORTFOLIO) {
        let request = begin_enrolment(&server, ACME, &newcomer(), "steady");
        let keyed = again(&request).header("Idempotency-Key", "e-1");
        let first = send(again(&keyed)).await;
        assert_eq!(first.status, 200);
        assert_eq!(first.json()["accountIndex"], 0);
        send(again(&keyed)).await.replays(&first);
        assert_eq!(server.effects("agent_slots").await, 1);
        // A fresh flow costs another slot; it only peeks at the index.
        let second = send(request).await;
        assert_ne!(second.json()["flowId"], first.json()["flowId"]);
        assert_ne!(second.json()["agent"], first.json()["agent"]);
        assert_eq!(second.json()["accountIndex"], 0);
        assert_eq!(server.effects("agent_slots").await, 2);

        // Whose first answer was lost gets the same slot.
        let mut lost = answer_lost();
        lost["only"] = "agent_slots".into();
        server.behave(lost).await;
        let keyed = begin_enrolment(&server, ACME, &newcomer(), "steady");
        let keyed = keyed.header("Idempotency-Key", "e-2");
        send(again(&keyed)).await.is_error(503, "API_600");
        assert_eq!(send(keyed).await.status, 200);
        assert_eq!(server.effects("agent_slots").await, 3);
    }
}

#[tokio::test]
async fn an_enrolment_uses_the_slot_and_burns_the_account_index_on_success() {
    for server in over_each_store(PORTFOLIO) {
        let created = send(post(&server, "/v2/strategies", ACME, &json!({ "name": "Bold" }))).await;
        let bold = created.json()["id"].as_str().unwrap().to_owned();
        let begun = send(begin_enrolment(&server, ACME, &newcomer(), "steady")).await;
        let done = send(finish_enrolment(&server, ACME, &newcomer(), &begun)).await;
        assert_eq!(done.json()["agent"], begun.json()["agent"]);
        assert_eq!(done.json()["accountIndex"], 0);
        let begun = send(begin_enrolment(&server, ACME, &newcomer(), &bold)).await;
        assert_eq!(begun.json()["accountIndex"], 1);
        let path = format!("/v2/portfolios/{}", done.json()["id"].as_str().unwrap());
        let shown = send(server.get(&path).header("X-API-Key", ACME)).await;
        assert_eq!(shown.json(), done.json());
    }
}

#[tokio::test]
async fn a_flow_that_was_never_issued_is_a_400() {
    for server in over_each_store(PORTFOLIO) {
        let unknown =
            json!({ "flowId": "7c7a2e3f-1a2b-4c3d-8e4f-5a6b7c8d9e0f", "signature": "0x" });
        send(post(&server, ENROLL, ACME, &unknown)).await.is_error(400, "unknown_key");
        for wrong in [json!({}), json!({ "flowId": null }), json!({ "flowId": {} })] {
            send(post(&server, ENROLL, ACME, &wrong)).await.is_error(400, "invalid");
        }
        // Another tenant's is as good as none.
        let begun = send(begin_enrolment(&server, ACME, &newcomer(), "steady")).await;
        let theirs = finish_enrolment(&server, GLOBEX, &newcomer(), &begun);
        send(theirs).await.is_error(400, "unknown_key");
        send(finish_enrolment(&server, ACME, &newcomer(), &begun)).await.is_created();
    }
}

#[tokio::test]
async fn a_flow_is_valid_for_24_hours_from_issuance_and_then_stage_2_is_a_400() {
    for server in over_each_store_with(PORTFOLIO, A_DAY_PASSES) {
        let (used, unused) = (enrolment(&server).await, enrolment(&server).await);
        let done = send(again(&used)).await;
        done.is_created();
        send(again(&used)).await.replays(&done);
        tokio::time::sleep(WINDOW_AND_MORE).await;
        for request in [used, unused] {
            send(request).await.is_error(400, "expired_flow");
        }
        assert_eq!(server.effects("enrolments").await, 1);
    }
}

#[tokio::test]
async fn a_nonce_is_32_bytes_after_0x_and_also_surfaced_as_authorization_id() {
    for server in over_each_store(PORTFOLIO) {
        let begun = send(begin_withdrawal(&server, ACME, "acme-1", 2_500)).await.json();
        let nonce = begun["authorizationId"].as_str().unwrap();
        assert_eq!(begun["message"]["nonce"], nonce);
        let digits = nonce.strip_prefix("0x").unwrap();
        assert!(digits.len() == 64 && digits.bytes().all(|b| b.is_ascii_hexdigit()), "{nonce}");
        assert_eq!(begun["typedData"]["primaryType"], "Withdrawal");
        let done = send(withdraw(&server, ACME, "acme-1", &sign(&begun["message"]))).await;
        assert_eq!(done.json()["authorizationId"], nonce);
    }
}

#[tokio::test]
async fn a_nonce_is_valid_for_10_minutes_from_issuance_and_then_it_is_api_216() {
    for server in over_each_store_with(PORTFOLIO, TEN_MINUTES_PASS) {
        let (used, unused) = (authorization(&server).await, authorization(&server).await);
        let done = send(withdraw(&server, ACME, "acme-1", &used)).await;
        is_accepted(&done);
        send(withdraw(&server, ACME, "acme-1", &used)).await.replays(&done);
        tokio::time::sleep(WINDOW_AND_MORE).await;
        // Also the one that was done, and whatever else is in the body.
        let mut other = used.clone();
        other["signature"] = "0x00".into();
        for body in [used, unused, other] {
            let late = send(withdraw(&server, ACME, "acme-1", &body)).await;
            late.is_error(400, "API_216");
        }
        assert_eq!(server.effects("transfers").await, 1);
    }
}

/// And neither a replay nor a failed attempt prolongs it.
#[tokio::test]
async fn the_validity_counts_from_issuance_and_not_from_its_use() {
    for server in over_each_store_with(PORTFOLIO, TEN_MINUTES_PASS) {
        let (used, failed) = (authorization(&server).await, authorization(&server).await);
        tokio::time::sleep(WINDOW_AND_MORE / 2).await;
        is_accepted(&send(withdraw(&server, ACME, "acme-1", &used)).await);
        server.behave(failing_at("transfers")).await;
        send(withdraw(&server, ACME, "acme-1", &failed)).await.is_error(503, "API_600");
        tokio::time::sleep(WINDOW_AND_MORE / 2).await;
        for body in [used, failed] {
            let late = send(withdraw(&server, ACME, "acme-1", &body)).await;
            late.is_error(400, "API_216");
        }
    }
}

#[tokio::test]
async fn a_withdrawal_that_began_in_time_ends_well() {
    for server in over_each_store_with(PORTFOLIO, TEN_MINUTES_PASS) {
        let body = authorization(&server).await;
        server.behave(json!({ "latency_ms": 1_200 })).await;
        is_accepted(&send(withdraw(&server, ACME, "acme-1", &body)).await);
        let late = send(withdraw(&server, ACME, "acme-1", &body)).await;
        late.is_error(400, "API_216");
    }
}

/// A stage 1 that would hand out a nonce which has expired helps nobody.
#[tokio::test]
async fn a_repeated_stage_1_hands_out_the_same_nonce_while_it_is_valid() {
    for server in over_each_store_with(PORTFOLIO, TEN_MINUTES_PASS) {
        let request = begin_withdrawal(&server, ACME, "acme-1", 2_500);
        let request = request.header("Idempotency-Key", "w-1");
        let first = send(again(&request)).await;
        send(again(&request)).await.replays(&first);
        tokio::time::sleep(WINDOW_AND_MORE).await;
        let fresh = send(request).await;
        assert!(!fresh.is_replay());
        assert_ne!(fresh.json()["authorizationId"], first.json()["authorizationId"]);
        is_accepted(&send(withdraw(&server, ACME, "acme-1", &signed(&fresh))).await);
    }
}

#[tokio::test]
async fn a_nonce_that_was_never_issued_or_is_none_is_a_400() {
    for server in over_each_store(PORTFOLIO) {
        let body = authorization(&server).await;
        let with = |nonce: Value| {
            let mut body = body.clone();
            body["message"]["nonce"] = nonce;
            withdraw(&server, ACME, "acme-1", &body)
        };
        let unknown = json!(B256::repeat_byte(7));
        send(with(unknown)).await.is_error(400, "unknown_key");
        for wrong in [json!(null), json!(""), json!("0x12"), json!(7), json!("nonce")] {
            send(with(wrong)).await.is_error(400, "invalid");
        }
        let twice = body.to_string().replace("\"nonce\":", "\"nonce\":\"\",\"nonce\":");
        let twice = withdraw(&server, ACME, "acme-1", &body).body(twice);
        send(twice).await.is_error(400, "invalid");
        is_accepted(&send(withdraw(&server, ACME, "acme-1", &body)).await);
    }
}

#[tokio::test]
async fn a_nonce_is_bound_to_its_portfolio_before_and_after_its_use() {
    for server in over_each_store(PORTFOLIO) {
        let body = authorization(&server).await;
        let mut message = body["message"].clone();
        message["portfolioId"] = "acme-2".into();
        for _ in 0..2 {
            for elsewhere in [body.clone(), sign(&message)] {
                let refused = send(withdraw(&server, ACME, "acme-2", &elsewhere)).await;
                refused.is_error(400, "unknown_key");
            }
            assert_eq!(send(withdraw(&server, ACME, "acme-1", &body)).await.status, 202);
        }
        assert_eq!(server.effects("transfers").await, 1);
    }
}

#[tokio::test]
async fn the_nonce_is_part_of_what_is_signed() {
    for server in over_each_store(PORTFOLIO) {
        let (first, second) = (authorization(&server).await, authorization(&server).await);
        let mut mixed = first.clone();
        mixed["signature"] = second["signature"].clone();
        let refused = send(withdraw(&server, ACME, "acme-1", &mixed)).await;
        refused.is_error(400, "bad_signature");
        // Nor may anybody else sign it.
        let typed: Withdrawal = serde_json::from_value(first["message"].clone()).unwrap();
        mixed["signature"] = newcomer().sign(&typed).unwrap().into();
        let refused = send(withdraw(&server, ACME, "acme-1", &mixed)).await;
        refused.is_error(400, "bad_signature");
        assert_eq!(server.effects("transfers").await, 0);
        is_accepted(&send(withdraw(&server, ACME, "acme-1", &first)).await);
    }
}

#[tokio::test]
async fn the_chain_refuses_a_nonce_twice_whoever_brings_it() {
    for server in over_each_store(PORTFOLIO) {
        let body = authorization(&server).await;
        let nonce = json!({ "nonce": body["message"]["nonce"] });
        assert_eq!(send(server.post("/_chain", &nonce)).await.status, 202);
        send(server.post("/_chain", &nonce)).await.is_error(409, "nonce_used");
        for _ in 0..2 {
            let refused = send(withdraw(&server, ACME, "acme-1", &body)).await;
            refused.is_error(409, "nonce_used");
        }
        assert_eq!(server.effects("transfers").await, 1);

        let body = authorization(&server).await;
        let nonce = json!({ "nonce": body["message"]["nonce"] });
        is_accepted(&send(withdraw(&server, ACME, "acme-1", &body)).await);
        send(server.post("/_chain", &nonce)).await.is_error(409, "nonce_used");
        assert_eq!(server.effects("transfers").await, 2);
    }
}
