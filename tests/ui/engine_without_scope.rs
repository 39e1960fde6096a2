use idem_runtime::{Idempotency, store::MemoryStore};

fn main() {
    // Without a scope, one tenant's keys would find another's answers.
    let _ = Idempotency::builder(MemoryStore::new()).build();
}
