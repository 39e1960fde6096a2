use idem_runtime::{CallError, Idempotency, idempotent};

fn is_refusal(error: &str) -> bool {
    error.is_empty()
}

// It is asked about the function's own error.
#[idempotent(anchor = arg(event), nothing_happened = is_refusal)]
async fn deliver(idem: &Idempotency, event: u64) -> Result<u64, CallError> {
    Ok(event)
}

fn deliver_later(idem: &Idempotency) {
    let _ = deliver(idem, 1);
}

fn main() {}
