use idem_runtime::{CallError, Idempotency, idempotent};

// There is no request that could have a header.
#[idempotent(anchor = header("Idempotency-Key"))]
async fn deliver(idem: &Idempotency, event: u64) -> Result<(), CallError> {
    Ok(())
}

fn deliver_later(idem: &Idempotency) {
    let _ = deliver(idem, 1);
}

fn main() {}
