//! The rate limit: what costs something of it, and what does not.

use std::time::{Duration, Instant};

use serde_json::json;

use super::{
    HARBOR, HARBOR_TOO, KEY, SKADI, SUBMIT, TERN, body,
    common::{Answer, Server, all, answer_lost, over_each_store, send, send_at_once, slow},
    is_conflict, keyed, other_body, ran, read, write_as,
};

/// A principal's budget, and how soon it has one more.
const BUDGET: usize = 30;
const REFILL: Duration = Duration::from_secs(2);

/// Sends submissions with fresh keys until the budget is spent, which is one for all API keys of a
/// principal; how many ran, and the refusal.
async fn spend(server: &Server) -> (usize, Answer) {
    for ran in 0..10 * BUDGET {
        let who = [HARBOR, HARBOR_TOO][ran % 2];
        let request = write_as(who, server, SUBMIT, &body());
        let answer = send(request.header("Idempotency-Key", format!("spend {ran}"))).await;
        if answer.status != 201 {
            return (ran, answer);
        }
    }
    panic!("there is no end to the budget");
}

/// How many a budget may have let through since then, at most.
fn at_most(since: Instant) -> usize {
    BUDGET + 1 + (since.elapsed().as_millis() / REFILL.as_millis()) as usize
}

#[tokio::test]
async fn replays_count_0_against_the_budget_and_so_do_conflicts() {
    for server in over_each_store(SKADI) {
        let original = send(keyed(&server, SUBMIT, KEY, &body())).await;
        original.is_created();
        for _ in 0..2 * BUDGET {
            send(keyed(&server, SUBMIT, KEY, &body())).await.replays(&original);
            is_conflict(&send(keyed(&server, SUBMIT, KEY, &other_body())).await);
        }
        server.behave(slow()).await;
        let running = keyed(&server, SUBMIT, "running", &body());
        let first = server.begin(running.try_clone().unwrap()).await;
        for duplicate in send_at_once(&running, 2 * BUDGET).await {
            assert!(duplicate.code() == "in_flight" || duplicate.is_replay());
        }
        first.await.unwrap().is_created();
        server.behave(json!({})).await;
        let (ran, refused) = spend(&server).await;
        assert!(ran >= BUDGET - 2, "{ran}");
        refused.is_error(429, "rate_limited");
    }
}

#[tokio::test]
async fn the_original_call_does_count() {
    for server in over_each_store(SKADI) {
        let since = Instant::now();
        let (ran, refused) = spend(&server).await;
        refused.is_error(429, "rate_limited");
        let wait: u64 = refused.headers["retry-after"].to_str().unwrap().parse().unwrap();
        assert!((1..=REFILL.as_secs()).contains(&wait), "{wait}");
        assert!((BUDGET..=at_most(since)).contains(&ran), "{ran}");
        assert_eq!(server.effects("submissions").await, ran as u64);
    }
}

#[tokio::test]
async fn leaving_the_key_out_or_quoting_is_no_way_around_the_budget() {
    for server in over_each_store(SKADI) {
        for path in [SUBMIT, "/renewals"] {
            let since = Instant::now();
            let request = write_as(TERN, &server, path, &body());
            let answers = send_at_once(&request, 3 * BUDGET).await;
            let ran = answers.iter().filter(|answer| answer.status == 201).count();
            assert!(ran <= at_most(since), "{ran}");
            for refused in answers.iter().filter(|answer| answer.status != 201) {
                refused.is_error(429, "rate_limited");
                assert!(refused.headers.contains_key("retry-after"));
            }
        }
    }
}

#[tokio::test]
async fn of_many_at_once_no_more_run_than_the_budget_has() {
    for server in over_each_store(SKADI) {
        let since = Instant::now();
        let requests = (0..3 * BUDGET).map(|n| keyed(&server, SUBMIT, &n.to_string(), &body()));
        let answers = all(requests.collect::<Vec<_>>()).await;
        let ran = answers.iter().filter(|answer| answer.status == 201).count();
        assert!((BUDGET..=at_most(since)).contains(&ran), "{ran}");
        answers
            .iter()
            .filter(|it| it.status != 201)
            .for_each(|it| it.is_error(429, "rate_limited"));
        assert_eq!(server.effects("submissions").await, ran as u64);
    }
}

#[tokio::test]
async fn a_client_whose_budget_is_spent_still_gets_its_replay() {
    for server in over_each_store(SKADI) {
        let original = send(keyed(&server, SUBMIT, KEY, &body())).await;
        let (_, refused) = spend(&server).await;
        refused.is_error(429, "rate_limited");
        for _ in 0..10 {
            send(keyed(&server, SUBMIT, KEY, &body())).await.replays(&original);
        }
        is_conflict(&send(keyed(&server, SUBMIT, KEY, &other_body())).await);
        // The budget is the principal's own.
        let theirs = write_as(TERN, &server, SUBMIT, &body());
        send(theirs).await.is_created();
        // Reads cost nothing.
        ran(&send(read(&server, "/submissions")).await, 200);
    }
}

#[tokio::test]
async fn a_request_that_the_budget_turned_away_leaves_its_key_free() {
    for server in over_each_store(SKADI) {
        let (n, refused) = spend(&server).await;
        refused.is_error(429, "rate_limited");
        let wait = refused.headers["retry-after"].to_str().unwrap().parse().unwrap();
        tokio::time::sleep(Duration::from_secs(wait)).await;
        // Another body may have it: nothing was kept.
        let key = format!("spend {n}");
        let original = send(keyed(&server, SUBMIT, &key, &other_body())).await;
        original.is_created();
        send(keyed(&server, SUBMIT, &key, &other_body())).await.replays(&original);
    }
}

#[tokio::test]
async fn a_retry_that_the_budget_turned_away_is_still_a_retry() {
    for server in over_each_store(SKADI) {
        server.behave(answer_lost()).await;
        let failed = send(keyed(&server, SUBMIT, KEY, &body())).await;
        failed.is_error(502, "carrier_unavailable");
        spend(&server).await;
        let mut retry = send(keyed(&server, SUBMIT, KEY, &body())).await;
        // It has no answer yet, but it has a body.
        is_conflict(&send(keyed(&server, SUBMIT, KEY, &other_body())).await);
        while retry.code() == "rate_limited" {
            tokio::time::sleep(Duration::from_millis(200)).await;
            retry = send(keyed(&server, SUBMIT, KEY, &body())).await;
        }
        retry.is_created();
        let submissions = send(read(&server, "/submissions")).await.json();
        let submissions = submissions["data"].as_array().unwrap().len() as u64;
        assert_eq!(server.effects("submissions").await, submissions);
    }
}
