//! smoke
use axum::{Json, Router, extract::State, routing::post, body::Body, http::Request};
use idem_runtime::{Idempotency, Scope, idempotent, store::MemoryStore, Operation};
use tower::ServiceExt;

#[idempotent(anchor = header("Idempotency-Key"), ttl = "24h")]
async fn pay(State(_): State<Idempotency>, op: Operation, Json(b): Json<serde_json::Value>) -> Result<Json<serde_json::Value>, String> {
    Ok(Json(serde_json::json!({"id": op.id().to_string(), "b": b})))
}
#[idempotent(anchor = arg(b["n"].as_str().unwrap_or("")), ttl = "24h")]
async fn arg(State(_): State<Idempotency>, op: Operation, Json(b): Json<serde_json::Value>) -> Result<Json<serde_json::Value>, String> {
    Ok(Json(serde_json::json!({"id": op.id().to_string(), "b": b})))
}

#[tokio::test]
async fn smoke() {
    let idem = Idempotency::builder(MemoryStore::new()).scope(Scope::header("X-API-Key")).build();
    let app: Router = Router::new().route("/pay", post(pay)).route("/arg", post(arg)).with_state(idem);
    for path in ["/pay", "/arg"] {
    for _ in 0..3 {
        let r = app.clone().oneshot(Request::post(path).header("x-api-key", "a").header("content-type","application/json").header("idempotency-key", "k").body(Body::from("{\"n\":\"1\"}")).unwrap()).await.unwrap();
        let (p, b) = r.into_parts();
        println!("{p:?} {:?}", axum::body::to_bytes(b, 10000).await.unwrap());
    }
        let r = app.clone().oneshot(Request::post(path).header("x-api-key", "a").header("content-type","application/json").header("idempotency-key", "k").body(Body::from("{\"n\":\"1\" }")).unwrap()).await.unwrap();
        let (p, b) = r.into_parts();
        println!("{p:?} {:?}", axum::body::to_bytes(b, 10000).await.unwrap());
    }
}
