use axum::{Router, extract::State, routing::post};
use idem_runtime::{Idempotency, idempotent};

#[allow(async_fn_in_trait)]
trait Ledger: Clone + Send + Sync {
    async fn save(&self, body: String);
}

// The handler may go on in another task, so `Send` is proved here, for every `L`. rustc says how to
// promise it in the trait; without the macro, `handler.idempotent(POLICY)` asks each concrete
// handler instead.
#[idempotent(anchor = header("Idempotency-Key"))]
async fn pay<L: Ledger>(State(ledger): State<L>, body: String) {
    ledger.save(body).await;
}

#[derive(Clone)]
struct Memory;

impl Ledger for Memory {
    async fn save(&self, _body: String) {}
}

fn main() {
    let _: Router<Idempotency> =
        Router::new().route("/payments", post(|body: String| pay(State(Memory), body.into())));
}
