use axum::{Router, routing::post};
use idem_runtime::{Idempotency, RequestContext, idempotent};

// Admission is part of the request, which moves between threads.
#[idempotent(anchor = header("Idempotency-Key"), admit = quota)]
async fn pay(body: String) -> String {
    body
}

async fn quota(_request: RequestContext) -> Result<(), String> {
    let budget = std::rc::Rc::new(1);
    std::future::ready(()).await;
    drop(budget);
    Ok(())
}

fn main() {
    let _: Router<Idempotency> = Router::new().route("/payments", post(pay));
}
