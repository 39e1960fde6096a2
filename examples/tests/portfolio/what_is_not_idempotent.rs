//! The routes without an anchor, and the lines in the header.

use reqwest::Method;

use super::{
    common::{Shell, over_each_store, send_at_once},
    *,
};

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
