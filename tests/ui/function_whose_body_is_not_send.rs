use std::rc::Rc;

use idem_runtime::{CallError, Idempotency, idempotent};

// It may finish in a task of its own, on another thread.
#[idempotent(anchor = arg(event))]
async fn deliver(idem: &Idempotency, event: u64) -> Result<u64, CallError> {
    let shared = Rc::new(event);
    std::future::ready(()).await;
    Ok(*shared)
}

fn deliver_later(idem: &Idempotency) {
    let _ = deliver(idem, 1);
}

fn main() {}
