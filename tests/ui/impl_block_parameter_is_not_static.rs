use std::marker::PhantomData;

use axum::{Extension, Router, routing::post};
use idem_runtime::{Idempotency, idempotent};

struct Handlers<T>(PhantomData<T>);

impl<T: Clone + Send + Sync + ToString> Handlers<T> {
    // The parameters of a function get their `'static` from the macro; those of an `impl` block
    // are out of its reach, and rustc asks for it there.
    #[idempotent(anchor = header("Idempotency-Key"))]
    async fn pay(Extension(tenant): Extension<T>, body: String) -> String {
        body + &tenant.to_string()
    }
}

fn main() {
    let _: Router<Idempotency> = Router::new().route("/payments", post(Handlers::<u64>::pay));
}
