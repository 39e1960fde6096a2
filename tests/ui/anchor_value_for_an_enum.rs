use idem_runtime::AnchorValue;

// What tells variants apart is their author's decision.
#[derive(AnchorValue)]
enum Account {
    Iban(String),
    Number(u64),
}

fn main() {
    let _ = (Account::Iban(String::new()), Account::Number(1));
}
