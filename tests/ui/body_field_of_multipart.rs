use axum::{Router, extract::Multipart, routing::post};
use idem_runtime::{Idempotency, idempotent};

// A field may be anywhere in a multipart body, and as large as the body.
#[idempotent(anchor = body_field("nonce"))]
async fn upload(_form: Multipart) {}

fn main() {
    let _: Router<Idempotency> = Router::new().route("/documents", post(upload));
}
