use idem_runtime::AnchorValue;

// A value that is the same in every request is no key.
#[derive(AnchorValue)]
struct Marker;

fn main() {
    let _ = Marker;
}
