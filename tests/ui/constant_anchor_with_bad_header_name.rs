use idem_runtime::Anchor;

// A declared anchor is checked even while nothing uses it.
pub const KEY: Anchor = Anchor::header("Idem potency");

fn main() {}
