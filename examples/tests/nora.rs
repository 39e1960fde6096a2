//! The sentences of Nora's document that speak of the server, each a test.

#![cfg(test)]

mod common;

use std::time::Duration;

use common::{
    Answer, Server, Shell, all, answer_lost, failing, over_each_store, over_each_store_with, send,
    send_at_once, slow, sqlite,
};
use reqwest::{Method, RequestBuilder};
use serde_json::{Value, json};
use tempfile::TempDir;

const NORA: &str = env!("CARGO_BIN_EXE_nora");
const SOURCE: &str = include_str!("../src/bin/nora.rs");
const ADDRESS: &str = "http://127.0.0.1:3001";

const KEY: &str = "0b5b9a8e-0f53-4c7e-9d5e-1f2f3a4b5c6d";
const ONRAMP: &str = "/v2/intents/onramp";
const OFFRAMP: &str = "/v2/intents/offramp";

const SANDBOX: &str = "acme-sandbox-1";
const SANDBOX_TOO: &str = "acme-sandbox-2";
const PRODUCTION: &str = "acme-production-1";
const STRANGER: &str = "umbrella-sandbox-1";

/// An intent for an amount, under a key.
fn intent(server: &Server, path: &str, key: &str, amount: &str) -> RequestBuilder {
    server
        .post(path, &json!({ "amount": amount }))
        .header("X-API-Key", SANDBOX)
        .header("idempotency-key", key)
}

/// The same request from another API key.
fn by(server: &Server, api_key: &str, path: &str, key: &str) -> RequestBuilder {
    let body = json!({ "amount": "10.00" });
    server.post(path, &body).header("X-API-Key", api_key).header("idempotency-key", key)
}

/// The id of a fresh intent to burn, of acme's sandbox.
async fn burn(server: &Server) -> String {
    let body = json!({ "amount": "20.00" });
    let created = send(server.post(OFFRAMP, &body).header("X-API-Key", SANDBOX)).await;
    created.is_created();
    id(&created)
}

fn id(answer: &Answer) -> String {
    answer.json()["id"].as_str().expect("an id").to_owned()
}

fn approve(server: &Server, api_key: &str, id: &str, signature: &str) -> RequestBuilder {
    let path = format!("/v2/intents/{id}/approve-burn");
    server.post(&path, &json!({ "txSignature": signature })).header("X-API-Key", api_key)
}

async fn shown(server: &Server, id: &str) -> Value {
    let path = format!("/v2/intents/{id}");
    send(server.get(&path).header("X-API-Key", SANDBOX)).await.json()
}

#[track_caller]
fn is_approved(answer: &Answer, signature: &str) {
    assert_eq!(answer.status, 200, "{}", answer.text());
    assert_eq!(answer.json()["status"], "burn_approved");
    assert_eq!(answer.json()["txSignature"], signature);
}

mod intents {
    use super::*;

    #[tokio::test]
    async fn a_retry_does_not_run_again_and_replays_body_and_status() {
        for server in over_each_store(NORA) {
            for (path, effect) in [(ONRAMP, "onramp_intents"), (OFFRAMP, "offramp_intents")] {
                let original = send(intent(&server, path, KEY, "150.00")).await;
                original.is_created();
                for _ in 0..3 {
                    send(intent(&server, path, KEY, "150.00")).await.replays(&original);
                }
                assert_eq!(server.effects(effect).await, 1);
                assert_eq!(shown(&server, &id(&original)).await, original.json());
            }
        }
    }

    #[tokio::test]
    async fn many_clicks_at_once_make_one_intent() {
        for server in over_each_store(NORA) {
            server.behave(slow()).await;
            let request = intent(&server, ONRAMP, KEY, "150.00");
            let answers = send_at_once(&request, 20).await;
            let created = answers.iter().filter(|answer| answer.status == 201).count();
            assert!(created >= 1);
            for answer in answers.iter().filter(|answer| answer.status != 201) {
                answer.is_error(409, "in_progress");
                assert!(answer.headers.contains_key("retry-after"));
            }
            assert!(server.patiently(&request).await.is_replay());
            assert_eq!(server.effects("onramp_intents").await, 1);
        }
    }

    #[tokio::test]
    async fn the_key_is_optional() {
        for server in over_each_store(NORA) {
            let body = json!({ "amount": "10.00" });
            let request = server.post(ONRAMP, &body).header("X-API-Key", SANDBOX);
            let answers = send_at_once(&request, 2).await;
            assert!(answers.iter().all(|answer| answer.status == 201 && !answer.is_replay()));
            assert_ne!(id(&answers[0]), id(&answers[1]));
            assert_eq!(server.effects("onramp_intents").await, 2);
        }
    }

    #[tokio::test]
    async fn the_key_is_validated_as_a_uuid() {
        let long = "0b5b9a8e-0f53-4c7e-9d5e-1f2f3a4b5c6d-0";
        for server in over_each_store(NORA) {
            for wrong in ["", "1", "order-1", long, "g b5b9a8e-0f53-4c7e-9d5e-1f2f3a4b5c6d"] {
                let refused = send(intent(&server, ONRAMP, wrong, "1.00")).await;
                refused.is_error(400, "invalid_idempotency_key");
            }
            let twice = intent(&server, ONRAMP, KEY, "1.00").header("idempotency-key", KEY);
            send(twice).await.is_error(400, "invalid_idempotency_key");
            assert_eq!(server.effects("onramp_intents").await, 0);
        }
    }

    #[tokio::test]
    async fn every_spelling_of_a_uuid_is_the_same_key() {
        for server in over_each_store(NORA) {
            let original = send(intent(&server, ONRAMP, KEY, "1.00")).await;
            for spelling in [KEY.to_uppercase(), KEY.replace('-', ""), format!("\"{KEY}\"")] {
                send(intent(&server, ONRAMP, &spelling, "1.00")).await.replays(&original);
            }
        }
    }

    #[tokio::test]
    async fn an_edited_form_under_the_old_key_replays_the_stale_response() {
        for server in over_each_store(NORA) {
            let original = send(intent(&server, ONRAMP, KEY, "150.00")).await;
            send(intent(&server, ONRAMP, KEY, "999.00")).await.replays(&original);
            // Nobody looks at the body at all.
            for body in ["", "{}", "not JSON", "[1]"] {
                let request = server.request(Method::POST, ONRAMP).body(body);
                let request = request.header("X-API-Key", SANDBOX).header("idempotency-key", KEY);
                send(request).await.replays(&original);
            }
            assert_eq!(server.effects("onramp_intents").await, 1);
        }
    }

    #[tokio::test]
    async fn an_edited_form_under_a_fresh_key_runs() {
        for server in over_each_store(NORA) {
            let first = send(intent(&server, ONRAMP, KEY, "150.00")).await;
            let fresh = "7c7a2e3f-1a2b-4c3d-8e4f-5a6b7c8d9e0f";
            let second = send(intent(&server, ONRAMP, fresh, "150.00")).await;
            second.is_created();
            assert_ne!(id(&first), id(&second));
        }
    }

    #[tokio::test]
    async fn keys_are_scoped_per_endpoint() {
        for server in over_each_store(NORA) {
            let on = send(intent(&server, ONRAMP, KEY, "10.00")).await;
            let off = send(intent(&server, OFFRAMP, KEY, "10.00")).await;
            off.is_created();
            assert_ne!(id(&on), id(&off));
            send(intent(&server, ONRAMP, KEY, "10.00")).await.replays(&on);
            send(intent(&server, OFFRAMP, KEY, "10.00")).await.replays(&off);
        }
    }

    #[tokio::test]
    async fn keys_are_scoped_per_api_key_and_so_per_instance() {
        for server in over_each_store(NORA) {
            let mut ids = Vec::new();
            for api_key in [SANDBOX, SANDBOX_TOO, PRODUCTION, STRANGER] {
                let original = send(by(&server, api_key, ONRAMP, KEY)).await;
                original.is_created();
                send(by(&server, api_key, ONRAMP, KEY)).await.replays(&original);
                ids.push(id(&original));
            }
            ids.sort();
            ids.dedup();
            assert_eq!(ids.len(), 4);
            assert_eq!(server.effects("onramp_intents").await, 4);
        }
    }

    /// A day is two seconds.
    #[tokio::test]
    async fn after_the_window_a_retry_is_a_fresh_operation() {
        for server in over_each_store_with(NORA, &["--time-scale", "43200"]) {
            let original = send(intent(&server, ONRAMP, KEY, "10.00")).await;
            send(intent(&server, ONRAMP, KEY, "10.00")).await.replays(&original);
            tokio::time::sleep(Duration::from_millis(2_100)).await;
            let late = send(intent(&server, ONRAMP, KEY, "10.00")).await;
            late.is_created();
            assert_ne!(id(&late), id(&original));
            assert_eq!(server.effects("onramp_intents").await, 2);
        }
    }

    #[tokio::test]
    async fn a_client_that_crashed_gets_the_original_success_if_its_call_landed() {
        for server in over_each_store(NORA) {
            server.behave(slow()).await;
            let request = intent(&server, ONRAMP, KEY, "10.00");
            server.begin(request.try_clone().unwrap()).await.abort();
            let retry = server.patiently(&request).await;
            assert!(retry.is_replay() && retry.status == 201, "{}", retry.text());
            assert_eq!(server.effects("onramp_intents").await, 1);
        }
    }

    #[tokio::test]
    async fn and_executes_freshly_if_it_did_not() {
        for server in over_each_store(NORA) {
            for status in [503, 400] {
                server.behave(failing(1, status)).await;
                let key = uuid::Uuid::new_v4().to_string();
                let failed = send(intent(&server, ONRAMP, &key, "10.00")).await;
                assert!(matches!(failed.status, 502 | 422), "{}", failed.text());
                send(intent(&server, ONRAMP, &key, "10.00")).await.is_created();
            }
            assert_eq!(server.effects("onramp_intents").await, 2);
        }
    }

    #[tokio::test]
    async fn a_rerun_after_a_lost_answer_makes_one_intent() {
        for server in over_each_store(NORA) {
            server.behave(answer_lost()).await;
            send(intent(&server, ONRAMP, KEY, "10.00")).await.is_error(502, "uncertain");
            let retry = send(intent(&server, ONRAMP, KEY, "10.00")).await;
            retry.is_created();
            send(intent(&server, ONRAMP, KEY, "10.00")).await.replays(&retry);
            assert_eq!(server.effects("onramp_intents").await, 1);
        }
    }

    #[tokio::test]
    async fn a_body_that_is_turned_away_does_not_use_the_key_up() {
        for server in over_each_store(NORA) {
            for amount in ["", "0", "-1", "1e3", "1.", "lots"] {
                send(intent(&server, ONRAMP, KEY, amount)).await.is_error(422, "invalid");
            }
            let no_json = server.request(Method::POST, ONRAMP).header("X-API-Key", SANDBOX);
            let no_json = no_json.header("idempotency-key", KEY).body("{");
            send(no_json).await.is_error(415, "invalid");
            send(intent(&server, ONRAMP, KEY, "10.00")).await.is_created();
        }
    }

    #[tokio::test]
    async fn a_crash_of_the_server_loses_no_answer_that_it_gave() {
        let directory = TempDir::new().unwrap();
        let store = sqlite(directory.path());
        let server = Server::start(NORA, &["--store", &store]);
        let original = send(intent(&server, ONRAMP, KEY, "10.00")).await;
        drop(server);
        let server = Server::start(NORA, &["--store", &store]);
        send(intent(&server, ONRAMP, KEY, "10.00")).await.replays(&original);
        assert_eq!(server.effects("onramp_intents").await, 0);
    }
}

mod burns {
    use super::*;

    #[tokio::test]
    async fn resubmitting_the_same_signature_is_a_no_op() {
        for server in over_each_store(NORA) {
            let id = burn(&server).await;
            let first = send(approve(&server, SANDBOX, &id, "sig-a")).await;
            is_approved(&first, "sig-a");
            for api_key in [SANDBOX, SANDBOX_TOO] {
                send(approve(&server, api_key, &id, "sig-a")).await.replays(&first);
            }
            assert_eq!(server.effects("burns").await, 1);
        }
    }

    #[tokio::test]
    async fn a_different_signature_is_rejected() {
        for server in over_each_store(NORA) {
            let id = burn(&server).await;
            send(approve(&server, SANDBOX, &id, "sig-a")).await;
            for api_key in [SANDBOX, SANDBOX_TOO] {
                let other = send(approve(&server, api_key, &id, "sig-b")).await;
                other.is_error(409, "other_tx_signature");
            }
            assert_eq!(shown(&server, &id).await["txSignature"], "sig-a");
            assert_eq!(server.effects("burns").await, 1);
        }
    }

    #[tokio::test]
    async fn each_intent_has_a_signature_of_its_own() {
        for server in over_each_store(NORA) {
            for signature in ["sig-a", "sig-b"] {
                let id = burn(&server).await;
                is_approved(&send(approve(&server, SANDBOX, &id, signature)).await, signature);
            }
            assert_eq!(server.effects("burns").await, 2);
        }
    }

    #[tokio::test]
    async fn two_api_keys_cannot_approve_one_burn_with_two_signatures_at_once() {
        for server in over_each_store(NORA) {
            server.behave(slow()).await;
            let id = burn(&server).await;
            let requests = (0..12).map(|n| {
                let api_key = [SANDBOX, SANDBOX_TOO][n % 2];
                approve(&server, api_key, &id, &format!("sig-{n}"))
            });
            let answers = all(requests).await;
            let approved: Vec<_> = answers.iter().filter(|answer| answer.status == 200).collect();
            assert_eq!(approved.len(), 1);
            for answer in answers.iter().filter(|answer| answer.status != 200) {
                answer.is_error(409, "other_tx_signature");
            }
            assert_eq!(shown(&server, &id).await, approved[0].json());
            assert_eq!(server.effects("burns").await, 1);
        }
    }

    #[tokio::test]
    async fn only_the_signature_counts_not_the_rest_of_the_body() {
        for server in over_each_store(NORA) {
            let id = burn(&server).await;
            let first = send(approve(&server, SANDBOX, &id, "sig-a")).await;
            let path = format!("/v2/intents/{id}/approve-burn");
            let body = json!({ "note": "again", "txSignature": "sig-a" });
            let again = server.post(&path, &body).header("X-API-Key", SANDBOX);
            send(again).await.replays(&first);
        }
    }

    #[tokio::test]
    async fn it_takes_no_idempotency_key() {
        for server in over_each_store(NORA) {
            let id = burn(&server).await;
            let with_key = |signature: &str, key: &str| {
                approve(&server, SANDBOX, &id, signature).header("idempotency-key", key)
            };
            let first = send(with_key("sig-a", "no UUID")).await;
            is_approved(&first, "sig-a");
            send(with_key("sig-a", KEY)).await.replays(&first);
            send(with_key("sig-b", KEY)).await.is_error(409, "other_tx_signature");
        }
    }

    #[tokio::test]
    async fn an_expired_blockhash_leaves_the_intent_free_for_a_new_signature() {
        for server in over_each_store(NORA) {
            let id = burn(&server).await;
            server.behave(failing(1, 400)).await;
            send(approve(&server, SANDBOX, &id, "sig-a")).await.is_error(422, "burn_refused");
            assert_eq!(shown(&server, &id).await["status"], "awaiting_burn");
            is_approved(&send(approve(&server, SANDBOX_TOO, &id, "sig-b")).await, "sig-b");
            send(approve(&server, SANDBOX, &id, "sig-a")).await.is_error(409, "other_tx_signature");
            assert_eq!(server.effects("burns").await, 1);
        }
    }

    #[tokio::test]
    async fn an_uncertain_approval_does_not() {
        for server in over_each_store(NORA) {
            for behaviour in [answer_lost(), failing(1, 503)] {
                let burnt = server.effects("burns").await;
                let id = burn(&server).await;
                server.behave(behaviour).await;
                let (first, second) = (format!("{id}-a"), format!("{id}-b"));
                let lost = send(approve(&server, SANDBOX, &id, &first)).await;
                lost.is_error(502, "burn_uncertain");
                for api_key in [SANDBOX, SANDBOX_TOO] {
                    let other = send(approve(&server, api_key, &id, &second)).await;
                    other.is_error(409, "other_tx_signature");
                }
                is_approved(&send(approve(&server, SANDBOX, &id, &first)).await, &first);
                assert_eq!(server.effects("burns").await, burnt + 1);
            }
        }
    }

    #[tokio::test]
    async fn what_was_broadcast_before_its_answer_was_lost_cannot_be_refused_later() {
        for server in over_each_store(NORA) {
            let id = burn(&server).await;
            server.behave(answer_lost()).await;
            send(approve(&server, SANDBOX, &id, "sig-a")).await.is_error(502, "burn_uncertain");
            server.behave(failing(1, 400)).await;
            is_approved(&send(approve(&server, SANDBOX, &id, "sig-a")).await, "sig-a");
            assert_eq!(server.effects("burns").await, 1);
        }
    }

    #[tokio::test]
    async fn the_same_signature_is_in_progress_while_it_is_approved() {
        for server in over_each_store(NORA) {
            server.behave(slow()).await;
            let id = burn(&server).await;
            let first = server.begin(approve(&server, SANDBOX, &id, "sig-a")).await;
            let again = approve(&server, SANDBOX, &id, "sig-a");
            send(again.try_clone().unwrap()).await.is_error(409, "in_progress");
            let first = first.await.unwrap();
            is_approved(&first, "sig-a");
            server.patiently(&again).await.replays(&first);
        }
    }

    /// A day is 86 milliseconds: the window of keys is over long since.
    #[tokio::test]
    async fn a_signature_counts_for_ever() {
        for server in over_each_store_with(NORA, &["--time-scale", "1000000"]) {
            let id = burn(&server).await;
            let first = send(approve(&server, SANDBOX, &id, "sig-a")).await;
            tokio::time::sleep(Duration::from_millis(300)).await;
            send(approve(&server, SANDBOX, &id, "sig-a")).await.replays(&first);
            let other = send(approve(&server, SANDBOX, &id, "sig-b")).await;
            other.is_error(409, "other_tx_signature");
        }
    }

    #[tokio::test]
    async fn an_intent_of_another_instance_does_not_exist_not_even_once_it_is_approved() {
        for server in over_each_store(NORA) {
            let id = burn(&server).await;
            for _ in 0..2 {
                for api_key in [PRODUCTION, STRANGER] {
                    let theirs = send(approve(&server, api_key, &id, "sig-a")).await;
                    theirs.is_error(404, "not_found");
                    let path = format!("/v2/intents/{id}");
                    let theirs = send(server.get(&path).header("X-API-Key", api_key)).await;
                    theirs.is_error(404, "not_found");
                }
                send(approve(&server, SANDBOX, &id, "sig-a")).await;
            }
            send(approve(&server, SANDBOX, KEY, "sig-a")).await.is_error(404, "not_found");
        }
    }

    /// Or two spellings would be two keys.
    #[tokio::test]
    async fn an_intent_has_one_spelling() {
        for server in over_each_store(NORA) {
            let id = burn(&server).await;
            let first = send(approve(&server, SANDBOX, &id, "sig-a")).await;
            for spelling in [id.to_uppercase(), id.replace('-', ""), format!("%7B{id}%7D")] {
                let other = send(approve(&server, SANDBOX, &spelling, "sig-b")).await;
                other.is_error(404, "not_found");
            }
            // Percent-encoding is no other spelling.
            let encoded = id.replace('-', "%2D");
            send(approve(&server, SANDBOX, &encoded, "sig-a")).await.replays(&first);
            let other = send(approve(&server, SANDBOX, &encoded, "sig-b")).await;
            other.is_error(409, "other_tx_signature");
        }
    }

    #[tokio::test]
    async fn what_is_no_approval_uses_nothing_up() {
        for server in over_each_store(NORA) {
            let id = burn(&server).await;
            let path = format!("/v2/intents/{id}/approve-burn");
            for body in ["{}", "[]", r#"{"txSignature":null}"#, r#"{"txSignature":""}"#, "{"] {
                let request = server.request(Method::POST, &path).body(body);
                let request = request.header("content-type", "application/json");
                let refused = send(request.header("X-API-Key", SANDBOX)).await;
                assert!(matches!(refused.status, 400 | 422), "{body}: {}", refused.text());
                assert!(!refused.code().is_empty());
            }
            is_approved(&send(approve(&server, SANDBOX, &id, "sig-a")).await, "sig-a");
        }
    }

    #[tokio::test]
    async fn an_onramp_burns_nothing() {
        for server in over_each_store(NORA) {
            let onramp = id(&send(by(&server, SANDBOX, ONRAMP, KEY)).await);
            let refused = send(approve(&server, SANDBOX, &onramp, "sig-a")).await;
            refused.is_error(409, "not_a_burn");
            assert_eq!(server.effects("burns").await, 0);
        }
    }
}

mod everything_else {
    use super::*;

    fn party(server: &Server, api_key: &str, cpf: &str) -> RequestBuilder {
        let body = json!({ "cpf": cpf, "name": "Ana" });
        server.post("/v2/parties", &body).header("X-API-Key", api_key)
    }

    fn wallet(server: &Server, api_key: &str, id: &str, wallet: &str) -> RequestBuilder {
        let path = format!("/v2/parties/{id}/wallet");
        let request = server.request(Method::PATCH, &path).header("X-API-Key", api_key);
        request.json(&json!({ "wallet": wallet }))
    }

    #[tokio::test]
    async fn a_duplicate_cpf_is_a_409_and_a_key_changes_nothing() {
        for server in over_each_store(NORA) {
            let request = |key: &str| {
                party(&server, SANDBOX, "529.982.247-25").header("idempotency-key", key)
            };
            send(request(KEY)).await.is_created();
            for key in [KEY, "no UUID"] {
                send(request(key)).await.is_error(409, "duplicate_cpf");
            }
            let other_spelling = send(party(&server, SANDBOX_TOO, "52998224725")).await;
            other_spelling.is_error(409, "duplicate_cpf");
            assert_eq!(server.effects("parties").await, 1);
            send(party(&server, PRODUCTION, "52998224725")).await.is_created();
        }
    }

    #[tokio::test]
    async fn one_person_at_once_is_one_party() {
        for server in over_each_store(NORA) {
            let answers = send_at_once(&party(&server, SANDBOX, "52998224725"), 10).await;
            assert_eq!(answers.iter().filter(|answer| answer.status == 201).count(), 1);
            assert_eq!(server.effects("parties").await, 1);
        }
    }

    #[tokio::test]
    async fn a_wallet_is_replaced_in_place_and_a_duplicate_call_is_a_no_op() {
        for server in over_each_store(NORA) {
            let id = id(&send(party(&server, SANDBOX, "52998224725")).await);
            for (address, bindings) in [("0xaa", 1), ("0xaa", 1), ("0xbb", 2), ("0xaa", 3)] {
                let bound = send(wallet(&server, SANDBOX, &id, address)).await;
                assert_eq!((bound.status, &bound.json()["wallet"]), (200, &json!(address)));
                let path = format!("/v2/parties/{id}");
                let shown = send(server.get(&path).header("X-API-Key", SANDBOX)).await;
                assert_eq!(shown.json(), bound.json());
                assert_eq!(server.effects("wallet_bindings").await, bindings);
            }
            send(wallet(&server, STRANGER, &id, "0xcc")).await.is_error(404, "not_found");
        }
    }

    #[tokio::test]
    async fn reads_do_not_need_the_header_and_do_not_mind_it() {
        for server in over_each_store(NORA) {
            let created = send(intent(&server, ONRAMP, KEY, "1.00")).await;
            let path = format!("/v2/intents/{}", id(&created));
            for key in [KEY, "no UUID"] {
                let read = server.get(&path).header("X-API-Key", SANDBOX);
                let read = send(read.header("idempotency-key", key)).await;
                assert_eq!((read.status, read.is_replay()), (200, false));
                assert_eq!(read.json(), created.json());
            }
        }
    }

    /// Also where an answer is recorded: it is not for everybody.
    #[tokio::test]
    async fn without_a_known_api_key_there_is_a_401() {
        for server in over_each_store(NORA) {
            let id = burn(&server).await;
            send(approve(&server, SANDBOX, &id, "sig-a")).await;
            send(intent(&server, ONRAMP, KEY, "1.00")).await.is_created();
            for (method, path) in [
                (Method::POST, ONRAMP),
                (Method::POST, OFFRAMP),
                (Method::POST, &*format!("/v2/intents/{id}/approve-burn")),
                (Method::GET, &*format!("/v2/intents/{id}")),
                (Method::POST, "/v2/parties"),
                (Method::PATCH, "/v2/parties/x/wallet"),
            ] {
                let request = || {
                    let request = server.request(method.clone(), path);
                    request.header("idempotency-key", KEY).json(&json!({ "txSignature": "sig-a" }))
                };
                send(request()).await.is_error(401, "unauthorized");
                let unknown = request().header("X-API-Key", "acme-sandbox-3");
                send(unknown).await.is_error(401, "unauthorized");
            }
        }
    }

    #[tokio::test]
    async fn the_lines_in_the_header_do_what_they_say() {
        let server = Server::start(NORA, &[]);
        let mut shell = Shell::new(&server, ADDRESS);
        let lines = Shell::lines_in(SOURCE);
        let [onramp, offramp, approve, other, show, rest @ ..] = &lines[..] else {
            panic!("other lines: {lines:#?}")
        };
        let original = shell.run(onramp).await;
        original.is_created();
        shell.run(onramp).await.replays(&original);
        shell.run(offramp).await.is_created();
        let approved = shell.run(approve).await;
        is_approved(&approved, "5VERYsigned");
        shell.run(other).await.is_error(409, "other_tx_signature");
        assert_eq!(shell.run(show).await.json(), approved.json());

        let [offramp, lose, lost, other, again, party, effects] = rest else {
            panic!("other lines: {rest:#?}")
        };
        shell.run(offramp).await.is_created();
        assert_eq!(shell.run(lose).await.status, 200);
        shell.run(lost).await.is_error(502, "burn_uncertain");
        shell.run(other).await.is_error(409, "other_tx_signature");
        is_approved(&shell.run(again).await, "4lost");
        shell.run(party).await.is_created();
        let expected = json!({
            "onramp_intents": 1, "offramp_intents": 2, "burns": 2, "parties": 1,
        });
        assert_eq!(shell.run(effects).await.json(), expected);
    }
}
