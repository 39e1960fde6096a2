//! A simulated wallet, and what it signs: typed data after EIP-712, hashed and checked by alloy.

use alloy_primitives::{Address, B256, Signature, address, b256};
use alloy_sol_types::{Eip712Domain, SolStruct, eip712_domain, sol};
use k256::ecdsa::SigningKey;
use serde::Serialize;
use serde_json::{Value, json};

sol! {
    /// What the owner of a portfolio signs to have money sent.
    #[derive(Debug, PartialEq, Eq, serde::Deserialize, serde::Serialize)]
    struct Withdrawal {
        string portfolioId;
        address to;
        uint64 amount;
        bytes32 nonce;
    }

    /// What a user signs to take part in a strategy.
    #[derive(Debug, PartialEq, Eq, serde::Deserialize, serde::Serialize)]
    struct Enrolment {
        string flowId;
        string strategyId;
        address user;
    }
}

/// Where the signatures count, and nowhere else.
pub const DOMAIN: Eip712Domain = eip712_domain! {
    name: "Portfolio",
    version: "2",
    chain_id: 31337,
    verifying_contract: address!("00000000000000000000000000000000000071de"),
};

/// The demonstration's private keys: well known, and worth nothing.
const KEYS: [B256; 2] = [
    b256!("ac0974bec39a17e36ba4a6b4d238ff944bacb478cbed5efcae784d7bf4f2ff80"),
    b256!("59c6995e998f97a5a0044966f0945389dc9e86dae88c7a8412f4603b6b78690d"),
];

/// A wallet.
#[derive(Clone, Debug)]
pub struct Wallet(SigningKey);

impl Wallet {
    /// The wallets of the demonstration.
    pub fn demo() -> impl Iterator<Item = Self> {
        KEYS.iter().filter_map(|key| SigningKey::from_slice(key.as_slice()).ok()).map(Self)
    }

    /// Who signs with it.
    pub fn address(&self) -> Address {
        Address::from_private_key(&self.0)
    }

    /// The signature of a message: 65 bytes, in hexadecimal digits.
    ///
    /// # Errors
    ///
    /// When the message cannot be signed, for which there is no known example.
    pub fn sign(&self, message: &impl SolStruct) -> Result<String, k256::ecdsa::Error> {
        let hash = message.eip712_signing_hash(&DOMAIN);
        let signature = self.0.sign_prehash_recoverable(hash.as_slice())?;
        Ok(Signature::from(signature).to_string())
    }
}

/// Who signed a message; nobody if it is no signature, or not in its one canonical form.
pub fn signer(message: &impl SolStruct, signature: &str) -> Option<Address> {
    let signature: Signature = signature.parse().ok()?;
    // Of the two signatures that fit every message, the one with the low `s` counts (EIP-2).
    if signature.normalize_s().is_some() {
        return None;
    }
    signature.recover_address_from_prehash(&message.eip712_signing_hash(&DOMAIN)).ok()
}

/// A message with all that a wallet needs to sign it, as `eth_signTypedData_v4` takes it.
pub fn typed_data<M: SolStruct + Serialize>(message: &M) -> Value {
    let domain = json!({
        "name": DOMAIN.name,
        "version": DOMAIN.version,
        "chainId": DOMAIN.chain_id.map(|id| id.to_string()),
        "verifyingContract": DOMAIN.verifying_contract,
    });
    json!({
        "types": {
            "EIP712Domain": members(&DOMAIN.encode_type()),
            M::NAME: members(&M::eip712_encode_type()),
        },
        "domain": domain,
        "primaryType": M::NAME,
        "message": message,
    })
}

/// The members of an encoded type, `Name(type name,type name)`.
fn members(encoded: &str) -> Vec<Value> {
    let inner = encoded.split_once('(').and_then(|(_, rest)| rest.strip_suffix(')'));
    let pairs = inner.unwrap_or_default().split(',').filter_map(|member| member.split_once(' '));
    pairs.map(|(kind, name)| json!({ "name": name, "type": kind })).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn withdrawal(amount: u64) -> Withdrawal {
        let (to, nonce) = (Address::repeat_byte(1), B256::repeat_byte(2));
        Withdrawal { portfolioId: "p".to_owned(), to, amount, nonce }
    }

    #[test]
    fn a_signature_names_its_signer_and_covers_the_whole_message() {
        for wallet in Wallet::demo() {
            let signature = wallet.sign(&withdrawal(1)).unwrap();
            assert_eq!(signer(&withdrawal(1), &signature), Some(wallet.address()));
            let nonce = B256::repeat_byte(3);
            for other in [withdrawal(2), Withdrawal { nonce, ..withdrawal(1) }] {
                assert_ne!(signer(&other, &signature), Some(wallet.address()));
            }
        }
    }

    #[test]
    fn what_is_no_canonical_signature_has_no_signer() {
        let signature = Wallet::demo().next().unwrap().sign(&withdrawal(1)).unwrap();
        let signature: Signature = signature.parse().unwrap();
        let high = Signature::new(
            signature.r(),
            "0xfffffffffffffffffffffffffffffffebaaedce6af48a03bbfd25e8cd0364141"
                .parse::<alloy_primitives::U256>()
                .unwrap()
                - signature.s(),
            !signature.v(),
        );
        for wrong in [high.to_string(), String::new(), "0x00".to_owned(), "no hex".to_owned()] {
            assert_eq!(signer(&withdrawal(1), &wrong), None, "{wrong}");
        }
    }

    #[test]
    fn typed_data_says_what_alloy_hashes() {
        let types = &typed_data(&withdrawal(1))["types"];
        assert_eq!(types["Withdrawal"][3], json!({ "name": "nonce", "type": "bytes32" }));
        assert_eq!(types["Withdrawal"].as_array().unwrap().len(), 4);
        assert_eq!(types["EIP712Domain"].as_array().unwrap().len(), 4);
    }
}
