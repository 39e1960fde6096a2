//! The work of the handlers that are compared: some 300 bytes of JSON in, some 300 out.

use serde::{Deserialize, Serialize};

/// An order, as it is asked for.
#[derive(Debug, Deserialize)]
pub struct Order {
    customer: String,
    currency: String,
    reference: String,
    items: Vec<Item>,
}

#[derive(Debug, Deserialize, Serialize)]
struct Item {
    sku: String,
    name: String,
    quantity: u32,
    price: u64,
}

/// An order, as it was taken.
#[derive(Debug, Serialize)]
pub struct Receipt {
    id: String,
    status: &'static str,
    customer: String,
    currency: String,
    reference: String,
    total: u64,
    items: Vec<Item>,
}

/// A request's body.
pub const REQUEST: &str = r#"{"customer":"c-20931","currency":"EUR","reference":"spring-7","items":[{"sku":"A-1001","name":"lamp","quantity":2,"price":4990},{"sku":"A-1002","name":"desk","quantity":1,"price":28900},{"sku":"B-7","name":"bulb","quantity":4,"price":690},{"sku":"C-30","name":"rug","quantity":1,"price":12900}]}"#;

/// Another one, of the same length.
pub const OTHER_REQUEST: &str = r#"{"customer":"c-20931","currency":"EUR","reference":"spring-8","items":[{"sku":"A-1001","name":"lamp","quantity":2,"price":4990},{"sku":"A-1002","name":"desk","quantity":1,"price":28900},{"sku":"B-7","name":"bulb","quantity":4,"price":690},{"sku":"C-30","name":"rug","quantity":1,"price":12900}]}"#;

impl Order {
    /// Takes it, as the order of this number. Receipts of one order are equally long.
    pub fn take(self, number: u64) -> Receipt {
        let total = self.items.iter().map(|item| u64::from(item.quantity) * item.price).sum();
        let Self { customer, currency, reference, items } = self;
        let id = format!("order-{number:012}");
        Receipt { id, status: "accepted", customer, currency, reference, total, items }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_and_receipts_have_about_300_bytes() {
        let take = |request: &str| {
            let order: Order = serde_json::from_str(request).unwrap();
            serde_json::to_vec(&order.take(7)).unwrap().len()
        };
        assert_eq!(REQUEST.len(), OTHER_REQUEST.len());
        assert!((280..320).contains(&REQUEST.len()), "{}", REQUEST.len());
        assert_eq!(take(REQUEST), take(OTHER_REQUEST));
        assert!((300..400).contains(&take(REQUEST)), "{}", take(REQUEST));
    }
}
