use idem_runtime::AnchorValue;

// Every field of an id can be a part of a key.
#[derive(AnchorValue)]
struct Amount {
    currency: String,
    value: f64,
}

fn main() {
    let _ = Amount { currency: String::new(), value: 1.0 };
}
