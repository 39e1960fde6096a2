//! Operations and spaces: within what a key is unique.

use axum::{
    Router,
    extract::Request,
    routing::{any, delete, get, patch, post, put},
};
use idem_runtime::{Anchor, FingerprintScheme, Idempotency, IdempotentExt, Policy};
use reqwest::Method;
use tests::{
    on_both_stores,
    server::{Answer, Server, send},
    stores::Bench,
};

const KEY: Anchor = Anchor::header("Idempotency-Key");

on_both_stores! {
    another_method_is_another_operation,
    another_route_is_another_operation,
    another_path_parameter_is_another_operation,
    percent_encoded_twins_are_one_operation,
    an_encoded_slash_is_no_slash,
    renaming_a_parameter_changes_nothing,
    a_wildcard_counts_whole,
    the_parameters_of_a_nests_prefix_count,
    a_nested_service_keeps_its_prefix,
    moving_a_route_into_a_nest_changes_nothing,
    without_a_matched_route_the_decoded_path_counts,
    in_a_space_the_key_sent_to_another_route_is_a_mismatch,
    in_a_space_the_key_sent_to_another_parameter_is_a_mismatch,
    other_spaces_are_apart,
    an_anchors_space_holds_for_all_its_handlers,
    without_a_fingerprint_a_space_is_one_operation,
    a_record_names_its_operation_without_anybodys_values,
}

type Routes = Router<Idempotency>;

async fn serve(bench: &Bench, routes: Routes) -> Server {
    Server::start(routes.with_state(bench.engine().build())).await
}

async fn ask(server: &Server, method: Method, path: &str) -> Answer {
    let request = server.request(method, path).header("x-api-key", "a");
    send(request.header("idempotency-key", "k")).await
}

/// Sends the key to each of these operations, twice: each runs once.
async fn assert_apart(bench: &Bench, server: &Server, operations: &[(Method, &str)]) {
    for (number, (method, path)) in operations.iter().enumerate() {
        let first = ask(server, method.clone(), path).await;
        assert!(!first.is_replay(), "{method} {path}: {}", first.text());
        assert_eq!(bench.effects.count(), number + 1, "{method} {path}");
    }
    for (number, (method, path)) in operations.iter().enumerate() {
        let retry = ask(server, method.clone(), path).await;
        let expected = format!("effect {}", number + 1);
        assert_eq!((retry.text(), retry.is_replay()), (expected, true), "{method} {path}");
    }
    assert_eq!(bench.effects.count(), operations.len());
}

/// Sends the key to each of these servers and paths: they are one operation.
async fn assert_one(bench: &Bench, twins: &[(&Server, &str)]) {
    let number = bench.effects.count() + 1;
    for (sent, (server, path)) in twins.iter().enumerate() {
        let answer = ask(server, Method::POST, path).await;
        let expected = format!("effect {number}");
        assert_eq!((answer.text(), answer.is_replay()), (expected, sent > 0), "{path}");
    }
    assert_eq!(bench.effects.count(), number);
}

const POST: Method = Method::POST;

async fn another_method_is_another_operation(bench: Bench) {
    let handler = || bench.numbered().idempotent(KEY);
    let by_method = post(handler()).put(handler()).patch(handler()).delete(handler());
    let routes = Router::new().route("/", by_method).route("/any", any(handler()));
    let server = serve(&bench, routes).await;
    let methods = [Method::POST, Method::PUT, Method::PATCH, Method::DELETE];
    let operations: Vec<_> = methods
        .iter()
        .flat_map(|method| ["/", "/any"].map(|path| (method.clone(), path)))
        .collect();
    assert_apart(&bench, &server, &operations).await;
}

async fn another_route_is_another_operation(bench: Bench) {
    let handler = || bench.numbered().idempotent(KEY);
    let routes = Router::new()
        .route("/a", post(handler()))
        .route("/a/", post(handler()))
        .route("/A", post(handler()))
        .route("/a/b", post(handler()))
        .route("/{name}", post(handler()));
    let server = serve(&bench, routes).await;
    let paths = ["/a", "/a/", "/A", "/a/b", "/c"];
    assert_apart(&bench, &server, &paths.map(|path| (POST, path))).await;
}

async fn another_path_parameter_is_another_operation(bench: Bench) {
    let handler = || bench.numbered().idempotent(KEY);
    let routes = Router::new()
        .route("/orders/{id}", post(handler()))
        .route("/orders/{id}/lines/{line}", post(handler()))
        .route("/files/{name}", post(handler()));
    let server = serve(&bench, routes).await;
    let paths = [
        "/orders/1",
        "/orders/2",
        "/orders/01",
        "/orders/1%20",
        "/orders/1/lines/12",
        "/orders/11/lines/2",
        "/orders/2/lines/1",
        "/files/1",
    ];
    assert_apart(&bench, &server, &paths.map(|path| (POST, path))).await;
}

async fn percent_encoded_twins_are_one_operation(bench: Bench) {
    let routes = Router::new().route("/u/{name}", post(bench.numbered().idempotent(KEY)));
    let server = serve(&bench, routes).await;
    let twins = ["/u/jo%40a.b", "/u/jo@a.b", "/u/%6Ao@a.b", "/u/%6ao@a%2eb", "/u/jo%40a%2Eb"];
    assert_one(&bench, &twins.map(|path| (&server, path))).await;
    // Decoding happens once, and a plus is a plus.
    assert_one(&bench, &[(&server, "/u/jo%2540a.b")]).await;
    assert_one(&bench, &[(&server, "/u/a+b"), (&server, "/u/a%2Bb")]).await;
    assert_one(&bench, &[(&server, "/u/a%20b")]).await;
}

async fn an_encoded_slash_is_no_slash(bench: Bench) {
    let handler = || bench.numbered().idempotent(KEY);
    let routes =
        Router::new().route("/u/{a}", post(handler())).route("/u/{a}/{b}", post(handler()));
    let server = serve(&bench, routes.fallback(handler())).await;
    let paths = ["/u/a%2Fb", "/u/a/b", "/none/a%2Fb", "/none/a/b"];
    assert_apart(&bench, &server, &paths.map(|path| (POST, path))).await;
}

async fn renaming_a_parameter_changes_nothing(bench: Bench) {
    let route = |route| Router::new().route(route, post(bench.numbered().idempotent(KEY)));
    let before = serve(&bench, route("/orders/{id}/{*rest}")).await;
    let after = serve(&bench, route("/orders/{order_id}/{*path}")).await;
    assert_one(&bench, &[(&before, "/orders/1/a/b"), (&after, "/orders/1/a/b")]).await;
    assert_one(&bench, &[(&after, "/orders/2/a/b"), (&before, "/orders/2/a/b")]).await;
}

async fn a_wildcard_counts_whole(bench: Bench) {
    let routes = Router::new().route("/files/{*path}", post(bench.numbered().idempotent(KEY)));
    let server = serve(&bench, routes).await;
    let paths = ["/files/a", "/files/a/b", "/files/a/b/", "/files/b/a", "/files/a//b"];
    assert_apart(&bench, &server, &paths.map(|path| (POST, path))).await;
}

async fn the_parameters_of_a_nests_prefix_count(bench: Bench) {
    let pay = Router::new()
        .route("/pay", post(bench.numbered().idempotent(KEY)))
        .route("/pay/{id}", post(bench.numbered().idempotent(KEY)));
    let routes = Router::new()
        .nest("/tenants/{tenant}", pay.clone())
        .nest("/a/{x}/b/{y}", Router::new().nest("/c/{z}", pay));
    let server = serve(&bench, routes).await;
    let paths = [
        "/tenants/1/pay",
        "/tenants/2/pay",
        "/tenants/1/pay/2",
        "/tenants/2/pay/1",
        "/a/1/b/2/c/3/pay/4",
        "/a/1/b/2/c/4/pay/3",
        "/a/2/b/1/c/3/pay/4",
    ];
    assert_apart(&bench, &server, &paths.map(|path| (POST, path))).await;
}

async fn a_nested_service_keeps_its_prefix(bench: Bench) {
    let engine = bench.engine().build();
    let pay = Router::new()
        .route("/pay/{id}", post(bench.numbered().idempotent(KEY)))
        .fallback(bench.numbered().idempotent(KEY))
        .with_state(engine.clone());
    let routes = Router::new()
        .nest_service("/a/{tenant}", pay.clone())
        .nest_service("/b", pay.clone())
        .route_service("/c/{*rest}", pay);
    let server = serve(&bench, routes).await;
    let paths = [
        "/a/1/pay/7",
        "/a/2/pay/7",
        "/b/pay/7",
        "/a/1/none",
        "/a/2/none",
        "/b/none",
        "/b/none/",
        "/c/one",
        "/c/two",
    ];
    assert_apart(&bench, &server, &paths.map(|path| (POST, path))).await;
}

async fn moving_a_route_into_a_nest_changes_nothing(bench: Bench) {
    let handler = || post(bench.numbered().idempotent(KEY));
    let flat = serve(&bench, Router::new().route("/v1/{id}/pay", handler())).await;
    let nested = Router::new().nest("/v1/{tenant}", Router::new().route("/pay", handler()));
    let nested = serve(&bench, nested).await;
    assert_one(&bench, &[(&flat, "/v1/7/pay"), (&nested, "/v1/7/pay")]).await;
}

async fn without_a_matched_route_the_decoded_path_counts(bench: Bench) {
    let routes = Router::new()
        .route("/known", get(async || "known"))
        .fallback(bench.numbered().idempotent(KEY));
    let server = serve(&bench, routes).await;
    let paths = ["/a", "/a/", "/b", "/", "/a/b", "/%ff", "/%fe"];
    assert_apart(&bench, &server, &paths.map(|path| (POST, path))).await;
    assert_one(&bench, &[(&server, "/x%41"), (&server, "/xA"), (&server, "/%78A")]).await;
}

/// Answers with its number and the path that it was called at.
fn echo(
    bench: &Bench,
) -> impl Fn(Request) -> std::future::Ready<String> + Clone + Send + Sync + use<> {
    let effects = bench.effects.clone();
    move |request| std::future::ready(format!("{} {}", effects.happen(), request.uri().path()))
}

async fn in_a_space_the_key_sent_to_another_route_is_a_mismatch(bench: Bench) {
    const SHARED: Policy = Policy::new(KEY).space("money");
    let handler = || echo(&bench).idempotent(SHARED);
    let routes = Router::new()
        .route("/pay", post(handler()).put(handler()))
        .route("/refund", post(handler()))
        .route("/alone", post(echo(&bench).idempotent(KEY)));
    let server = serve(&bench, routes).await;
    ask(&server, POST, "/pay").await.assert_is(200, "1 /pay", false);
    ask(&server, POST, "/pay").await.assert_is(200, "1 /pay", true);
    ask(&server, POST, "/refund").await.assert_refused(422, "mismatch");
    ask(&server, Method::PUT, "/pay").await.assert_refused(422, "mismatch");
    ask(&server, POST, "/alone").await.assert_is(200, "2 /alone", false);
    assert_eq!(bench.effects.count(), 2);
}

async fn in_a_space_the_key_sent_to_another_parameter_is_a_mismatch(bench: Bench) {
    let policy = Policy::new(KEY).space("orders");
    let routes = Router::new().route("/orders/{id}", post(echo(&bench).idempotent(policy)));
    let server = serve(&bench, routes).await;
    ask(&server, POST, "/orders/1").await.assert_is(200, "1 /orders/1", false);
    ask(&server, POST, "/orders/2").await.assert_refused(422, "mismatch");
    ask(&server, POST, "/orders/%31").await.assert_is(200, "1 /orders/1", true);
    assert_eq!(bench.effects.count(), 1);
}

async fn other_spaces_are_apart(bench: Bench) {
    let in_space = |name| post(bench.numbered().idempotent(Policy::new(KEY).space(name)));
    let routes = Router::new()
        .route("/one", in_space("one"))
        .route("/two", in_space("two"))
        .route("/three", in_space("POST"))
        .route("/four", post(bench.numbered().idempotent(KEY)));
    let server = serve(&bench, routes).await;
    let paths = ["/one", "/two", "/three", "/four"];
    assert_apart(&bench, &server, &paths.map(|path| (POST, path))).await;
}

async fn an_anchors_space_holds_for_all_its_handlers(bench: Bench) {
    const FLOW: Anchor = KEY.space("flows");
    let routes = Router::new()
        .route("/begin", post(bench.numbered().idempotent(FLOW)))
        .route("/end", put(bench.numbered().idempotent(FLOW)))
        .route("/apart", patch(bench.numbered().idempotent(Policy::new(FLOW).space("apart"))))
        .route("/plain", delete(bench.numbered()));
    let server = serve(&bench, routes).await;
    ask(&server, POST, "/begin").await.assert_is(200, "effect 1", false);
    ask(&server, Method::PUT, "/end").await.assert_refused(422, "mismatch");
    ask(&server, Method::PATCH, "/apart").await.assert_is(200, "effect 2", false);
    ask(&server, Method::DELETE, "/plain").await.assert_is(200, "effect 3", false);
    ask(&server, Method::DELETE, "/plain").await.assert_is(200, "effect 4", false);
}

async fn without_a_fingerprint_a_space_is_one_operation(bench: Bench) {
    let policy = Policy::new(KEY).space("receipts").fingerprint(FingerprintScheme::none());
    let handler = || post(bench.numbered().idempotent(policy));
    let routes = Router::new().route("/pay", handler()).route("/redeem", handler());
    let server = serve(&bench, routes).await;
    ask(&server, POST, "/pay").await.assert_is(200, "effect 1", false);
    ask(&server, POST, "/redeem").await.assert_is(200, "effect 1", true);
    assert_eq!(bench.effects.count(), 1);
}

async fn a_record_names_its_operation_without_anybodys_values(bench: Bench) {
    let handler = || bench.numbered().idempotent(KEY);
    let routes = Router::new().route("/orders/{id}", post(handler())).fallback(handler());
    let server = serve(&bench, routes).await;
    for (path, operation) in
        [("/orders/secret-7?secret=1", "POST /orders/{id}"), ("/secret/7", "POST (no route)")]
    {
        ask(&server, POST, path).await;
        let record = bench.store.last_record().await;
        assert_eq!(record.map(|record| record.operation.to_string()).as_deref(), Some(operation));
    }
}
