use idem_runtime::{Idempotency, idempotent};

struct NotDelivered;

// The caller must hear that the same call is in flight, say.
#[idempotent(anchor = arg(event))]
async fn deliver(idem: &Idempotency, event: u64) -> Result<u64, NotDelivered> {
    Ok(event)
}

fn deliver_later(idem: &Idempotency) {
    let _ = deliver(idem, 1);
}

fn main() {}
