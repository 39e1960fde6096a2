//! The sentences of the portfolios' document that speak of the server, each a test.

#![cfg(test)]

mod common;

use std::time::Duration;

use alloy_primitives::{Address, B256};
use common::{
    Answer, Server, Shell, all, answer_lost, failing, over_each_store, over_each_store_with, send,
    send_at_once, slow, sqlite,
};
use examples::wallet::{Enrolment, Wallet, Withdrawal};
use reqwest::{Method, RequestBuilder};
use serde_json::{Value, json};
use tempfile::TempDir;

const PORTFOLIO: &str = env!("CARGO_BIN_EXE_portfolio");
const SOURCE: &str = include_str!("../src/bin/portfolio/main.rs");
const ADDRESS: &str = "http://127.0.0.1:3003";

const ENROLL: &str = "/v2/enroll";
const ACME: &str = "acme-1";
const ACME_TOO: &str = "acme-2";
const READER: &str = "acme-reader";
const GLOBEX: &str = "globex-1";

/// A time that is long enough for a busy machine to do what must be done within it.
const SHORT: Duration = Duration::from_millis(2_500);
/// Ten minutes are two seconds.
const TEN_MINUTES_PASS: &[&str] = &["--time-scale", "300"];
/// A day is two seconds.
const A_DAY_PASSES: &[&str] = &["--time-scale", "43200"];

fn post(server: &Server, path: &str, api_key: &str, body: &Value) -> RequestBuilder {
    server.post(path, body).header("X-API-Key", api_key)
}

/// What the next call of one effect comes to.
fn failing_at(effect: &str) -> Value {
    json!({ "fail": 1, "status": 503, "only": effect })
}

fn again(request: &RequestBuilder) -> RequestBuilder {
    request.try_clone().expect("a plain body")
}

/// The wallet that owns the portfolios that there are at the start.
fn owner() -> Wallet {
    Wallet::demo().next().expect("a wallet")
}

/// The wallet of somebody who has no portfolio yet.
fn newcomer() -> Wallet {
    Wallet::demo().nth(1).expect("a wallet")
}

/// Stage 1 of an enrolment.
fn begin_enrolment(
    server: &Server,
    api_key: &str,
    user: &Wallet,
    strategy: &str,
) -> RequestBuilder {
    let wish = json!({ "user": user.address(), "strategyId": strategy });
    post(server, "/v2/enroll/signature", api_key, &wish)
}

/// Stage 2, for what stage 1 answered.
fn finish_enrolment(
    server: &Server,
    api_key: &str,
    user: &Wallet,
    begun: &Answer,
) -> RequestBuilder {
    assert_eq!(begun.status, 200, "{}", begun.text());
    let begun = begun.json();
    let message: Enrolment = serde_json::from_value(begun["message"].clone()).expect("a message");
    assert_eq!(begun["flowId"], message.flowId);
    let signature = user.sign(&message).expect("a signature");
    post(server, ENROLL, api_key, &json!({ "flowId": message.flowId, "signature": signature }))
}

/// Both: an enrolment, ready to be sent.
async fn enrolment(server: &Server) -> RequestBuilder {
    let begun = send(begin_enrolment(server, ACME, &newcomer(), "steady")).await;
    finish_enrolment(server, ACME, &newcomer(), &begun)
}

/// Stage 1 of a withdrawal.
fn begin_withdrawal(
    server: &Server,
    api_key: &str,
    portfolio: &str,
    amount: u64,
) -> RequestBuilder {
    let path = format!("/v2/portfolios/{portfolio}/withdraw/signature");
    let order = json!({ "to": Address::repeat_byte(0xaa), "amount": amount });
    post(server, &path, api_key, &order)
}

/// What stage 1 answered, signed.
fn signed(begun: &Answer) -> Value {
    assert_eq!(begun.status, 200, "{}", begun.text());
    sign(&begun.json()["message"])
}

/// A message, signed by the owner.
fn sign(message: &Value) -> Value {
    let typed: Withdrawal = serde_json::from_value(message.clone()).expect("a message");
    json!({ "message": message, "signature": owner().sign(&typed).expect("a signature") })
}

/// Stage 2.
fn withdraw(server: &Server, api_key: &str, portfolio: &str, body: &Value) -> RequestBuilder {
    post(server, &format!("/v2/portfolios/{portfolio}/withdraw"), api_key, body)
}

/// Both: a withdrawal's body, ready to be sent.
async fn authorization(server: &Server) -> Value {
    signed(&send(begin_withdrawal(server, ACME, "acme-1", 2_500)).await)
}

#[track_caller]
fn is_accepted(answer: &Answer) {
    assert_eq!((answer.status, answer.is_replay()), (202, false), "{}", answer.text());
}

mod replay_semantics {
    use super::*;

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
            let body: Value =
                serde_json::from_slice(body.body().unwrap().as_bytes().unwrap()).unwrap();
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
}

mod retry_rules {
    use super::*;

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
                let done = send(again(&request)).await;
                assert_eq!((done.status, done.is_replay()), (status, false), "{}", done.text());
                send(request).await.replays(&done);
                assert_eq!(server.effects(effect).await, 1);
            }
            // What was verified is not verified again.
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
}

mod anchors {
    use super::*;

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
            let created =
                send(post(&server, "/v2/strategies", ACME, &json!({ "name": "Bold" }))).await;
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
            tokio::time::sleep(SHORT).await;
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
            tokio::time::sleep(SHORT).await;
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
            tokio::time::sleep(SHORT / 2).await;
            is_accepted(&send(withdraw(&server, ACME, "acme-1", &used)).await);
            server.behave(failing_at("transfers")).await;
            send(withdraw(&server, ACME, "acme-1", &failed)).await.is_error(503, "API_600");
            tokio::time::sleep(SHORT / 2).await;
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
            server.behave(slow()).await;
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
            tokio::time::sleep(SHORT).await;
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
}

mod what_is_not_idempotent {
    use super::*;

    #[tokio::test]
    async fn multiple_calls_make_multiple_strategies() {
        for server in over_each_store(PORTFOLIO) {
            let request = post(&server, "/v2/strategies", ACME, &json!({ "name": "Bold" }));
            let request = request.header("Idempotency-Key", "s-1");
            let answers = send_at_once(&request, 5).await;
            answers.iter().for_each(Answer::is_created);
            assert_eq!(server.effects("strategies").await, 5);
            let listed = send(server.get("/v2/strategies").header("X-API-Key", ACME)).await;
            assert_eq!(listed.json().as_array().unwrap().len(), 6);
            let theirs = send(server.get("/v2/strategies").header("X-API-Key", GLOBEX)).await;
            assert_eq!(theirs.json().as_array().unwrap().len(), 1);
        }
    }

    #[tokio::test]
    async fn starting_what_is_started_is_a_no_op_and_so_is_stopping() {
        for server in over_each_store(PORTFOLIO) {
            let send = async |what: &str| {
                let path = format!("/v2/portfolios/acme-1/{what}");
                let request = server.request(Method::POST, &path).header("X-API-Key", ACME);
                let answer = send(request).await;
                assert_eq!((answer.status, answer.is_replay()), (200, false));
                answer.json()["running"].clone()
            };
            for (what, running, starts, stops) in [
                ("stop", false, 0, 0),
                ("start", true, 1, 0),
                ("start", true, 1, 0),
                ("stop", false, 1, 1),
                ("stop", false, 1, 1),
                ("start", true, 2, 1),
            ] {
                assert_eq!(send(what).await, running);
                assert_eq!(server.effects("starts").await, starts);
                assert_eq!(server.effects("stops").await, stops);
            }
        }
    }

    #[tokio::test]
    async fn reads_need_no_anchor_and_are_never_replays() {
        for server in over_each_store(PORTFOLIO) {
            for path in ["/v2/portfolios", "/v2/portfolios/acme-1", "/v2/strategies"] {
                let read = server.get(path).header("X-API-Key", ACME);
                let read = read.header("Idempotency-Key", "r-1");
                let first = send(again(&read)).await;
                let second = send(read).await;
                assert_eq!((first.status, first.is_replay()), (200, false));
                assert_eq!((second.status, second.is_replay()), (200, false));
            }
        }
    }

    #[tokio::test]
    async fn the_lines_in_the_header_do_what_they_say() {
        let server = Server::start(PORTFOLIO, &[]);
        let mut shell = Shell::new(&server, ADDRESS);
        let lines = Shell::lines_in(SOURCE);
        let [begin, nonce, sig, withdraw, amount, elsewhere, rest @ ..] = &lines[..] else {
            panic!("other lines: {lines:#?}")
        };
        let begun = shell.run(begin).await;
        assert_eq!(begun.status, 200, "{}", begun.text());
        shell.run(nonce).await.replays(&begun);
        assert_eq!(shell.run(sig).await.status, 200);
        let done = shell.run(withdraw).await;
        is_accepted(&done);
        shell.run(withdraw).await.replays(&done);
        shell.run(amount).await.is_error(409, "API_008");
        shell.run(elsewhere).await.is_error(400, "unknown_key");

        let [flow, sig, fail, enroll, effects] = rest else { panic!("other lines: {rest:#?}") };
        for line in [flow, sig, fail] {
            let answer = shell.run(line).await;
            assert_eq!(answer.status, 200, "{}", answer.text());
        }
        shell.run(enroll).await.is_error(503, "API_600");
        let enrolled = shell.run(enroll).await;
        enrolled.is_created();
        shell.run(enroll).await.replays(&enrolled);
        let expected = json!({
            "agent_slots": 1, "confirmations": 1, "enrolments": 1, "transfers": 1,
            "verifications": 2,
        });
        assert_eq!(shell.run(effects).await.json(), expected);
    }
}
