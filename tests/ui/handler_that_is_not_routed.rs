#![deny(unused)]

use idem_runtime::idempotent;

// A handler that nobody routes is dead code, as without the attribute.
#[idempotent(anchor = header("Idempotency-Key"))]
async fn pay(body: String) -> String {
    body
}

fn main() {}
