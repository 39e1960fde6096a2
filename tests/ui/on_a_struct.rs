use idem_runtime::idempotent;

// The attribute goes on handlers, and the item under it stays.
#[idempotent(anchor = header("Idempotency-Key"))]
struct Payment;

fn main() {
    let _ = Payment;
}
