use axum::{
    Router,
    extract::{Path, State},
    routing::post,
};
use idem_runtime::{Idempotency, idempotent};

// A body that the handler never takes is not read for its key either.
#[idempotent(anchor = body_field("nonce"))]
async fn confirm(State(_): State<Idempotency>, Path(id): Path<u64>) -> String {
    id.to_string()
}

fn main() {
    let _: Router<Idempotency> = Router::new().route("/payments/{id}", post(confirm));
}
