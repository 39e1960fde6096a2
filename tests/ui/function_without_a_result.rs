use idem_runtime::{Idempotency, idempotent};

// A call that is refused has no value, so there must be a way to say so.
#[idempotent(anchor = arg(event))]
async fn deliver(idem: &Idempotency, event: u64) -> String {
    event.to_string()
}

fn deliver_later(idem: &Idempotency) {
    let _ = deliver(idem, 1);
}

fn main() {}
