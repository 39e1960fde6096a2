//! What may be retried, and what comes of it.

use tempfile::TempDir;

use super::{
    common::{all, answer_lost, failing, over_each_store, sqlite},
    *,
};

#[tokio::test]
async fn after_api_506_and_api_600_the_same_anchor_and_body_run() {
    for server in over_each_store(PORTFOLIO) {
        let withdrawal = withdraw(&server, ACME, "acme-1", &authorization(&server).await);
        let enrolment = enrolment(&server).await;
        for (request, effect, status) in
            [(withdrawal, "transfers", 202), (enrolment, "enrolments", 201)]
        {
            server.behave(failing_at("verifications")).await;
            send(again(&request)).await.is_error(502, "API_506");
            server.behave(failing_at(effect)).await;
            send(again(&request)).await.is_error(503, "API_600");
            // What was verified is not verified again: the verifier may fail now.
            server.behave(failing_at("verifications")).await;
            let done = send(again(&request)).await;
            assert_eq!((done.status, done.is_replay()), (status, false), "{}", done.text());
            send(request).await.replays(&done);
            assert_eq!(server.effects(effect).await, 1);
        }
        assert_eq!(server.effects("verifications").await, 2);
    }
}

#[tokio::test]
async fn after_a_lost_answer_of_the_chain_the_retry_makes_no_second_transfer() {
    for server in over_each_store(PORTFOLIO) {
        let request = withdraw(&server, ACME, "acme-1", &authorization(&server).await);
        let mut lost = answer_lost();
        lost["only"] = "transfers".into();
        server.behave(lost).await;
        send(again(&request)).await.is_error(503, "API_600");
        assert_eq!(server.effects("transfers").await, 1);
        is_accepted(&send(request).await);
        assert_eq!(server.effects("transfers").await, 1);
    }
}

#[tokio::test]
async fn a_retry_after_a_lost_connection_collapses_into_a_replay() {
    for server in over_each_store(PORTFOLIO) {
        let withdrawal = withdraw(&server, ACME, "acme-1", &authorization(&server).await);
        let enrolment = enrolment(&server).await;
        server.behave(json!({ "latency_ms": 300 })).await;
        for (request, effect, status) in
            [(withdrawal, "transfers", 202), (enrolment, "enrolments", 201)]
        {
            server.begin(again(&request)).await.abort();
            let retry = server.patiently(&request).await;
            assert_eq!((retry.status, retry.is_replay()), (status, true), "{}", retry.text());
            assert_eq!(server.effects(effect).await, 1);
        }
    }
}

/// Killed when the transfer was made and nobody had been told: the nonce is claimed again after
/// the lease, the attempt is the same operation, and the chain knows it.
#[tokio::test]
async fn a_retry_after_the_server_was_killed_makes_no_second_transfer() {
    let directory = TempDir::new().unwrap();
    let (store, ledger) = (sqlite(directory.path()), directory.path().join("chain"));
    let switches = ["--store", &store, "--chain", ledger.to_str().unwrap()];
    for (effects_before_the_end, nth) in [(0, 1), (1, 2)] {
        let server = Server::start(PORTFOLIO, &switches);
        let body = authorization(&server).await;
        server.behave(json!({ "latency_ms": 1_500 })).await;
        let running = server.begin(withdraw(&server, ACME, "acme-1", &body)).await;
        let made = nth - 1 + effects_before_the_end;
        server
            .until(async || {
                server.effects("verifications").await == nth
                    && server.effects("transfers").await == made
            })
            .await;
        server.crash();
        assert!(running.await.is_err(), "there was an answer");

        let server = Server::start(PORTFOLIO, &switches);
        let request = withdraw(&server, ACME, "acme-1", &body);
        send(again(&request)).await.is_error(409, "API_007");
        let retry = server.patiently(&request).await;
        is_accepted(&retry);
        send(request).await.replays(&retry);
        assert_eq!(server.effects("transfers").await, nth);
    }
}

#[tokio::test]
async fn a_crash_loses_no_answer_and_no_issued_key() {
    let directory = TempDir::new().unwrap();
    let store = sqlite(directory.path());
    let server = Server::start(PORTFOLIO, &["--store", &store]);
    let done = authorization(&server).await;
    let answer = send(withdraw(&server, ACME, "acme-1", &done)).await;
    let (unused, flow) = (authorization(&server).await, enrolment(&server).await);
    server.crash();
    let server = Server::start(PORTFOLIO, &["--store", &store]);
    send(withdraw(&server, ACME, "acme-1", &done)).await.replays(&answer);
    assert_eq!(server.effects("transfers").await, 0);
    is_accepted(&send(withdraw(&server, ACME, "acme-1", &unused)).await);
    let mut flow = flow.build().unwrap();
    flow.url_mut().set_port(server.url.rsplit(':').next().unwrap().parse().ok()).unwrap();
    send(RequestBuilder::from_parts(server.client.clone(), flow)).await.is_created();
}

#[tokio::test]
async fn after_a_400_the_input_can_be_fixed_under_the_same_anchor() {
    for server in over_each_store(PORTFOLIO) {
        let body = authorization(&server).await;
        for (pointer, value) in [
            ("/signature", json!("0x00")),
            ("/signature", json!(7)),
            ("/message/amount", json!(9_900)),
            ("/message/to", json!(Address::repeat_byte(0xbb))),
            ("/message/portfolioId", json!("acme-2")),
        ] {
            let mut wrong = body.clone();
            *wrong.pointer_mut(pointer).unwrap() = value;
            let refused = send(withdraw(&server, ACME, "acme-1", &wrong)).await;
            assert_eq!(refused.status, 400, "{}", refused.text());
            assert!(!refused.code().is_empty());
        }
        // Signing something else than what was issued does not help.
        let mut message = body["message"].clone();
        message["amount"] = 9_900.into();
        let refused = send(withdraw(&server, ACME, "acme-1", &sign(&message))).await;
        refused.is_error(400, "invalid");
        server.behave(failing(1, 400)).await;
        let refused = send(withdraw(&server, ACME, "acme-1", &body)).await;
        refused.is_error(400, "bad_signature");
        assert_eq!(server.effects("transfers").await, 0);
        is_accepted(&send(withdraw(&server, ACME, "acme-1", &body)).await);
    }
}

#[tokio::test]
async fn api_202_is_terminal() {
    for server in over_each_store(PORTFOLIO) {
        let (first, second) = (enrolment(&server).await, enrolment(&server).await);
        send(first).await.is_created();
        let refused = send(again(&second)).await;
        refused.is_error(409, "API_202");
        send(second).await.replays(&refused);
        assert_eq!(server.effects("enrolments").await, 1);

        // Also for who has had one from the beginning.
        let begun = send(begin_enrolment(&server, ACME, &owner(), "steady")).await;
        let enrolled = finish_enrolment(&server, ACME, &owner(), &begun);
        send(enrolled).await.is_error(409, "API_202");
    }
}

#[tokio::test]
async fn two_flows_of_one_user_at_once_make_one_portfolio() {
    for server in over_each_store(PORTFOLIO) {
        let flows = [enrolment(&server).await, enrolment(&server).await];
        server.behave(json!({ "latency_ms": 300 })).await;
        let mut answers = all(flows).await;
        answers.sort_by_key(|answer| answer.status);
        answers[0].is_created();
        answers[1].is_error(409, "API_202");
        assert_eq!(server.effects("enrolments").await, 1);
    }
}

#[tokio::test]
async fn another_tenants_id_is_a_404_even_where_an_answer_is_recorded() {
    for server in over_each_store(PORTFOLIO) {
        let body = authorization(&server).await;
        for _ in 0..2 {
            for request in [
                withdraw(&server, GLOBEX, "acme-1", &body),
                begin_withdrawal(&server, GLOBEX, "acme-1", 1),
                post(&server, "/v2/portfolios/acme-1/start", GLOBEX, &Value::Null),
                server.get("/v2/portfolios/acme-1").header("X-API-Key", GLOBEX),
                withdraw(&server, ACME, "nowhere", &body),
            ] {
                send(request).await.is_error(404, "not_found");
            }
            let own = send(withdraw(&server, ACME, "acme-1", &body)).await;
            assert_eq!(own.status, 202);
        }
        assert_eq!(server.effects("transfers").await, 1);
    }
}

#[tokio::test]
async fn without_a_known_key_it_is_a_401_and_with_one_that_only_reads_a_403() {
    for server in over_each_store(PORTFOLIO) {
        let body = authorization(&server).await;
        let request = || withdraw(&server, ACME, "acme-1", &body);
        is_accepted(&send(request()).await);
        for path in [
            "/v2/enroll",
            "/v2/enroll/signature",
            "/v2/portfolios/acme-1/withdraw",
            "/v2/portfolios/acme-1/withdraw/signature",
            "/v2/portfolios/acme-1/start",
            "/v2/strategies",
        ] {
            send(server.post(path, &body)).await.is_error(401, "unauthorized");
            send(post(&server, path, "acme-3", &body)).await.is_error(401, "unauthorized");
            send(post(&server, path, READER, &body)).await.is_error(403, "forbidden");
        }
        let read = server.get("/v2/portfolios/acme-1").header("X-API-Key", READER);
        assert_eq!(send(read).await.status, 200);
        // The nonce is the tenant's: another key of its may repeat the request.
        let other = send(withdraw(&server, ACME_TOO, "acme-1", &body)).await;
        assert!(other.is_replay());
    }
}
