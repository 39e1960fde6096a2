//! Bodies of requests and responses: bounds, streams, trailers, and what breaks off.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{convert::Infallible, io, time::Duration};

use axum::{body::Body, http::StatusCode, response::IntoResponse};
use bytes::Bytes;
use futures_util::{StreamExt, stream};
use http::{HeaderMap, HeaderValue};
use http_body::Frame;
use http_body_util::{BodyExt, Limited, StreamBody};
use idem_runtime::{
    Anchor, FingerprintScheme, IdempotentExt, Outcome, Policy, Recording, RefusalKind,
};
use tests::{
    on_both_stores,
    server::{Effects, Gate, Server, send},
    stores::Bench,
};
use tokio::sync::mpsc;

const KEY: Anchor = Anchor::header("Idempotency-Key");
const LIMIT: usize = 100;

on_both_stores! {
    a_response_of_the_limit_is_replayed_and_one_byte_more_is_done_once,
    a_stream_beyond_the_limit_reaches_its_caller_whole_and_is_done_once,
    a_stream_slower_than_the_limit_reaches_its_caller_whole_and_is_done_once,
    a_response_with_trailers_reaches_its_caller_whole_and_is_done_once,
    a_response_that_breaks_off_is_done_once,
    what_is_not_recorded_is_streamed_without_a_bound,
    an_empty_response_is_an_answer,
    a_request_of_the_limit_runs_and_one_byte_more_claims_nothing,
    a_request_without_a_length_is_bounded_as_well,
    a_request_beyond_a_layers_limit_claims_nothing,
    the_pieces_in_which_a_request_arrives_do_not_count,
    a_request_with_trailers_runs,
    a_request_that_breaks_off_claims_nothing,
    a_request_without_a_key_is_refused_before_its_body_arrives,
    without_a_fingerprint_nothing_is_buffered,
}

/// The first caller had its answer; from now on it is only known that it was done.
async fn assert_done_once(bench: &Bench, server: &Server) {
    for _ in 0..2 {
        let refused = send(server.post("/", "k", "")).await;
        refused.assert_refused(410, "not_replayable");
        assert_eq!(refused.header("retry-after"), None);
        let id = bench.store.last_record().await.unwrap().operation_id;
        assert_eq!(refused.json()["operation_id"], id.to_string());
    }
    send(server.post("/", "k", "another body")).await.assert_refused(422, "mismatch");
    assert_eq!(bench.effects.count(), 1);
    let refused = Outcome::Refused(RefusalKind::NotReplayable);
    let mismatch = Outcome::Refused(RefusalKind::Mismatch);
    let told = [Outcome::Tombstoned, refused, refused, mismatch];
    assert_eq!(bench.told.outcomes(), told);
    bench.pass(Duration::from_secs(24 * 60 * 60));
    send(server.post("/", "k", "another body")).await;
    assert_eq!(bench.effects.count(), 2);
}

async fn serve<R: IntoResponse + 'static>(
    bench: &Bench,
    answer: impl Fn(Effects) -> R + Clone + Send + Sync + 'static,
) -> Server {
    let engine = bench.engine().response_body_limit(LIMIT);
    let engine = engine.response_time_limit(Duration::from_millis(20));
    let effects = bench.effects.clone();
    let handler = async move || {
        effects.happen();
        answer(effects)
    };
    bench.serve_with(engine, KEY, handler).await
}

async fn a_response_of_the_limit_is_replayed_and_one_byte_more_is_done_once(bench: Bench) {
    let server = serve(&bench, |effects| "x".repeat(LIMIT - 1 + effects.count())).await;
    let (whole, larger) = ("x".repeat(LIMIT), "x".repeat(LIMIT + 1));
    send(server.post("/", "at the limit", "")).await.assert_is(200, &whole, false);
    send(server.post("/", "at the limit", "")).await.assert_is(200, &whole, true);
    let bench = bench.anew();
    let server = serve(&bench, |effects| "x".repeat(LIMIT + effects.count())).await;
    send(server.post("/", "k", "")).await.assert_is(200, &larger, false);
    assert_done_once(&bench, &server).await;
}

/// A stream of so many bytes, one at a time.
fn drops(bytes: usize) -> Body {
    let drop = || Ok::<_, Infallible>(Bytes::from_static(b"x"));
    Body::from_stream(stream::iter((0..bytes).map(move |_| drop())))
}

async fn a_stream_beyond_the_limit_reaches_its_caller_whole_and_is_done_once(bench: Bench) {
    let server = serve(&bench, |effects| drops(LIMIT - 1 + effects.count())).await;
    send(server.post("/", "at the limit", "")).await.assert_is(200, &"x".repeat(LIMIT), false);
    send(server.post("/", "at the limit", "")).await.assert_is(200, &"x".repeat(LIMIT), true);
    let bench = bench.anew();
    let server = serve(&bench, |effects| drops(10 * LIMIT + effects.count())).await;
    let all = "x".repeat(10 * LIMIT + 1);
    send(server.post("/", "k", "")).await.assert_is(200, &all, false);
    assert_done_once(&bench, &server).await;
}

async fn a_stream_slower_than_the_limit_reaches_its_caller_whole_and_is_done_once(bench: Bench) {
    let gate = Gate::default();
    let server = serve(&bench, {
        let gate = gate.clone();
        move |_| {
            let gate = gate.clone();
            let first = stream::iter([Ok::<_, Infallible>("first ")]);
            let last = stream::once(async move {
                gate.pass().await;
                Ok("last")
            });
            Body::from_stream(first.chain(last))
        }
    })
    .await;
    let mut first = server.post("/", "k", "").send().await.unwrap();
    assert_eq!(first.chunk().await.unwrap().unwrap(), "first ");
    // It was recorded before its first byte left, though its last is yet to come.
    send(server.post("/", "k", "")).await.assert_refused(410, "not_replayable");
    gate.end();
    assert_eq!(first.bytes().await.unwrap(), "last");
    send(server.post("/", "k", "")).await.assert_refused(410, "not_replayable");
    assert_eq!(bench.effects.count(), 1);
}

async fn a_response_with_trailers_reaches_its_caller_whole_and_is_done_once(bench: Bench) {
    let server = serve(&bench, |_| {
        let trailers = HeaderMap::from_iter([(
            http::HeaderName::from_static("x-check"),
            HeaderValue::from_static("sum"),
        )]);
        let frames = [Frame::data(Bytes::from_static(b"body")), Frame::trailers(trailers)];
        let body = StreamBody::new(stream::iter(frames.map(Ok::<_, Infallible>)));
        ([("trailer", "x-check")], Body::new(body))
    })
    .await;
    let request = "POST / HTTP/1.1\r\nhost: a\r\nconnection: close\r\nte: trailers\r\n\
        x-api-key: a\r\nidempotency-key: k\r\ncontent-length: 0\r\n\r\n";
    let first = server.send_raw(request.as_bytes()).await.unwrap();
    assert_eq!(String::from_utf8(first.body).unwrap(), "4\r\nbody\r\n0\r\nx-check: sum\r\n\r\n");
    assert_done_once(&bench, &server).await;
}

async fn a_response_that_breaks_off_is_done_once(bench: Bench) {
    let server = serve(&bench, |effects| {
        let end = if effects.count() == 1 { Err(io::Error::other("gone")) } else { Ok("ended") };
        Body::from_stream(stream::iter([Ok("begun"), end]))
    })
    .await;
    let first = server.post("/", "k", "").send().await;
    assert!(match first {
        Ok(first) => first.bytes().await.is_err(),
        Err(_) => true,
    });
    assert_done_once(&bench, &server).await;
}

async fn what_is_not_recorded_is_streamed_without_a_bound(bench: Bench) {
    let gate = Gate::default();
    let server = serve(&bench, {
        let gate = gate.clone();
        move |_| {
            let gate = gate.clone();
            let first = stream::iter([Ok::<_, Infallible>("x".repeat(2 * LIMIT))]);
            let last = stream::once(async move {
                gate.pass().await;
                Ok("last".to_owned())
            });
            (StatusCode::BAD_REQUEST, Body::from_stream(first.chain(last)))
        }
    })
    .await;
    let first = server.post("/", "k", "").send().await.unwrap();
    assert_eq!(first.status(), 400);
    // The key is free before the body is over.
    assert_eq!(bench.told.outcomes(), [Outcome::Forgotten]);
    gate.end();
    assert_eq!(first.bytes().await.unwrap().len(), 2 * LIMIT + 4);
}

async fn an_empty_response_is_an_answer(bench: Bench) {
    let server = serve(&bench, |_| StatusCode::NO_CONTENT).await;
    send(server.post("/", "k", "")).await.assert_is(204, "", false);
    send(server.post("/", "k", "")).await.assert_is(204, "", true);
    assert_eq!(bench.effects.count(), 1);
}

async fn bounded(bench: &Bench) -> Server {
    let effects = bench.effects.clone();
    let handler = async move |body: Bytes| format!("{} of {}", effects.happen(), body.len());
    let engine = bench.engine().request_body_limit(LIMIT);
    bench.serve_with(engine, Policy::new(KEY).record(Recording::All), handler).await
}

async fn a_request_of_the_limit_runs_and_one_byte_more_claims_nothing(bench: Bench) {
    let server = bounded(&bench).await;
    let refused = send(server.post("/", "k", &"x".repeat(LIMIT + 1))).await;
    refused.assert_refused(413, "body_too_large");
    assert_eq!((bench.effects.count(), bench.store.claims().len()), (0, 0));
    send(server.post("/", "k", &"x".repeat(LIMIT))).await.assert_is(200, "1 of 100", false);
    send(server.post("/", "k", &"x".repeat(LIMIT))).await.assert_is(200, "1 of 100", true);
}

/// A body that is sent in pieces, without saying how long it will be.
fn in_pieces(pieces: &[&'static str]) -> reqwest::Body {
    let pieces: Vec<_> = pieces.iter().map(|piece| Ok::<_, Infallible>(*piece)).collect();
    reqwest::Body::wrap_stream(stream::iter(pieces))
}

async fn a_request_without_a_length_is_bounded_as_well(bench: Bench) {
    let server = bounded(&bench).await;
    let chunked = |pieces: usize| server.post("/", "k", "").body(in_pieces(&vec!["x"; pieces]));
    send(chunked(LIMIT + 1)).await.assert_refused(413, "body_too_large");
    assert_eq!((bench.effects.count(), bench.store.claims().len()), (0, 0));
    send(chunked(LIMIT)).await.assert_is(200, "1 of 100", false);
    send(chunked(LIMIT)).await.assert_is(200, "1 of 100", true);
}

async fn a_request_beyond_a_layers_limit_claims_nothing(bench: Bench) {
    let limited = |request: http::Request<Body>| async {
        request.map(|body| Body::new(Limited::new(body, LIMIT)))
    };
    let routes = axum::Router::new()
        .route("/", axum::routing::post(bench.numbered().idempotent(KEY)))
        .layer(axum::middleware::map_request(limited))
        .with_state(bench.engine().build());
    let server = Server::start(routes).await;
    send(server.post("/", "k", &"x".repeat(LIMIT))).await.assert_is(200, "effect 1", false);
    let beyond = send(server.post("/", "other", &"x".repeat(LIMIT + 1))).await;
    beyond.assert_refused(413, "body_too_large");
    assert_eq!(bench.store.claims().len(), 1);
}

async fn the_pieces_in_which_a_request_arrives_do_not_count(bench: Bench) {
    let server = bounded(&bench).await;
    send(server.post("/", "k", "abcd")).await.assert_is(200, "1 of 4", false);
    for pieces in [&["abcd"][..], &["a", "bcd"], &["a", "", "b", "c", "d"]] {
        let retry = server.post("/", "k", "").body(in_pieces(pieces));
        send(retry).await.assert_is(200, "1 of 4", true);
    }
    let other = server.post("/", "k", "").body(in_pieces(&["a", "b", "d", "c"]));
    send(other).await.assert_refused(422, "mismatch");
    assert_eq!(bench.effects.count(), 1);
}

const CHUNKED: &str = "POST / HTTP/1.1\r\nhost: a\r\nconnection: close\r\nx-api-key: a\r\n\
    idempotency-key: k\r\ntransfer-encoding: chunked\r\n\r\n";

async fn a_request_with_trailers_runs(bench: Bench) {
    let effects = bench.effects.clone();
    let server = bench
        .serve(KEY, async move |body: Body| {
            let body = body.collect().await.unwrap();
            let sum = body.trailers().and_then(|trailers| trailers.get("x-sum").cloned());
            let body = String::from_utf8(body.to_bytes().to_vec()).unwrap();
            format!("{} {body} {sum:?}", effects.happen())
        })
        .await;
    let request = format!("{CHUNKED}3\r\nabc\r\n0\r\nx-sum: 7\r\n\r\n");
    for _ in 0..2 {
        let answer = server.send_raw(request.as_bytes()).await.unwrap();
        assert_eq!(String::from_utf8(answer.body).unwrap(), "1 abc Some(\"7\")");
    }
    assert_eq!(bench.effects.count(), 1);
}

async fn a_request_that_breaks_off_claims_nothing(bench: Bench) {
    let server = bounded(&bench).await;
    let length = CHUNKED.replace("transfer-encoding: chunked", "content-length: 9");
    for cut in [
        format!("{CHUNKED}3\r\nabc\r\n"),
        format!("{CHUNKED}3\r\nab"),
        format!("{CHUNKED}zz\r\n"),
        format!("{CHUNKED}3\r\nabcdef\r\n0\r\n\r\n"),
        format!("{CHUNKED}fffffffffffffffff\r\nabc"),
        format!("{length}abc"),
        length,
    ] {
        if let Some(answer) = server.send_cut(cut.as_bytes()).await {
            assert!((400..500).contains(&answer.status), "{cut}: {answer:?}");
        }
    }
    assert_eq!((bench.effects.count(), bench.store.claims().len()), (0, 0));
    send(server.post("/", "k", "abc")).await.assert_is(200, "1 of 3", false);
}

async fn a_request_without_a_key_is_refused_before_its_body_arrives(bench: Bench) {
    let server = bounded(&bench).await;
    let (_pieces, never) = mpsc::channel::<Result<Bytes, Infallible>>(1);
    let request = server.post_without_key("/", "").body(piped(never));
    send(request).await.assert_refused(400, "key_missing");
    assert_eq!((bench.effects.count(), bench.store.claims().len()), (0, 0));
}

fn piped(pieces: mpsc::Receiver<Result<Bytes, Infallible>>) -> reqwest::Body {
    reqwest::Body::wrap_stream(stream::unfold(pieces, async |mut pieces| {
        pieces.recv().await.map(|piece| (piece, pieces))
    }))
}

async fn without_a_fingerprint_nothing_is_buffered(bench: Bench) {
    let (gate, effects) = (Gate::default(), bench.effects.clone());
    let handler = {
        let gate = gate.clone();
        async move |body: Body| {
            let mut body = body.into_data_stream();
            let mut length = body.next().await.unwrap().unwrap().len();
            gate.pass().await;
            while let Some(piece) = body.next().await {
                length += piece.unwrap().len();
            }
            format!("{} of {length}", effects.happen())
        }
    };
    let engine = bench.engine().request_body_limit(LIMIT);
    let policy = Policy::new(KEY).fingerprint(FingerprintScheme::none());
    let server = bench.serve_with(engine, policy, handler).await;
    let (pieces, receiver) = mpsc::channel(1);
    let first = tokio::spawn(send(server.post("/", "k", "").body(piped(receiver))));
    pieces.send(Ok(Bytes::from(vec![b'x'; LIMIT]))).await.unwrap();
    // The handler has read the beginning of a body that is not complete.
    gate.begun().await;
    gate.end();
    for _ in 0..100 {
        pieces.send(Ok(Bytes::from(vec![b'x'; LIMIT]))).await.unwrap();
    }
    drop(pieces);
    first.await.unwrap().assert_is(200, "1 of 10100", false);
    send(server.post("/", "k", "")).await.assert_is(200, "1 of 10100", true);
    assert_eq!(bench.effects.count(), 1);
}
