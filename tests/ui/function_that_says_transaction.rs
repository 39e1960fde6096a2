use idem_runtime::{CallError, Idempotency, idempotent};

// A plain function has no extractors, and so no `Tx`.
#[idempotent(anchor = arg(event), scope = global, transaction)]
async fn deliver(_idem: &Idempotency, event: String) -> Result<String, CallError> {
    Ok(event)
}

fn main() {
    let _ = deliver;
}
