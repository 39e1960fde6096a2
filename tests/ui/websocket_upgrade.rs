use axum::{Router, routing::any};
use idem_runtime::{Idempotency, idempotent};

pub struct WebSocketUpgrade;

// A connection cannot be recorded.
#[idempotent(anchor = header("Idempotency-Key"))]
async fn chat(_upgrade: WebSocketUpgrade) {}

fn main() {
    let _: Router<Idempotency> = Router::new().route("/chat", any(|| chat(WebSocketUpgrade)));
}
