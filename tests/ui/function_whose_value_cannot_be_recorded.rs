use idem_runtime::{CallError, Idempotency, idempotent};

struct Delivered;

// What is replayed was written down and is read back.
#[idempotent(anchor = arg(event))]
async fn deliver(idem: &Idempotency, event: u64) -> Result<Delivered, CallError> {
    Ok(Delivered)
}

fn deliver_later(idem: &Idempotency) {
    let _ = deliver(idem, 1);
}

fn main() {}
