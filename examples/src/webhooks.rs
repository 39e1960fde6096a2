//! What a webhook's delivery is signed with, for both sides: HMAC-SHA-256 over the time of the
//! attempt and the body.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use hmac::{Hmac, KeyInit, Mac};
use sha2::Sha256;

/// How far a signature's time may be off: for so long, whoever has recorded a delivery can repeat
/// it.
const TOLERANCE: Duration = Duration::from_secs(5 * 60);

/// The signature of a body under a secret, made now: `t=…,v1=…`, in Unix seconds and hexadecimal
/// digits.
pub fn sign(secret: &str, body: &[u8]) -> String {
    let seconds = now().to_string();
    // A key of any length will do, so there is always a signature.
    let digits = mac(secret, &seconds, body).map(|mac| hex::encode(mac.finalize().into_bytes()));
    format!("t={seconds},v1={}", digits.unwrap_or_default())
}

/// Whether it is the signature of this body under this secret, and of late.
pub fn is_signed(secret: &str, signature: &str, body: &[u8]) -> bool {
    let parts = signature.strip_prefix("t=").and_then(|rest| rest.split_once(",v1="));
    let Some((seconds, digits)) = parts else { return false };
    let of_late = |seconds: u64| now().abs_diff(seconds) <= TOLERANCE.as_secs();
    let (Ok(sent), Some(mac)) = (hex::decode(digits), mac(secret, seconds, body)) else {
        return false;
    };
    // In constant time.
    seconds.parse().is_ok_and(of_late) && mac.verify_slice(&sent).is_ok()
}

fn mac(secret: &str, seconds: &str, body: &[u8]) -> Option<Hmac<Sha256>> {
    let mac = Hmac::<Sha256>::new_from_slice(secret.as_bytes()).ok()?;
    Some(mac.chain_update(seconds).chain_update(".").chain_update(body))
}

/// In Unix seconds.
fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_signature_covers_the_secret_the_time_and_the_body() {
        let signature = sign("oak", b"body");
        assert!(is_signed("oak", &signature, b"body"));
        assert!(!is_signed("elm", &signature, b"body"));
        assert!(!is_signed("oak", &signature, b"bodies"));
        let later = signature.replacen("t=", "t=0", 1);
        assert!(!is_signed("oak", &later, b"body"), "{later}");
    }

    #[test]
    fn an_old_signature_counts_no_longer() {
        let signed_at = |seconds: u64| {
            let seconds = seconds.to_string();
            let mac = mac("oak", &seconds, b"body").unwrap();
            format!("t={seconds},v1={}", hex::encode(mac.finalize().into_bytes()))
        };
        assert!(is_signed("oak", &signed_at(now() - 290), b"body"));
        for seconds in [0, now() - 310, now() + 310, u64::MAX] {
            assert!(!is_signed("oak", &signed_at(seconds), b"body"), "{seconds}");
        }
    }

    #[test]
    fn what_is_no_signature_signs_nothing() {
        let digits = "0".repeat(64);
        for wrong in ["", "t=", "t=1", "t=,v1=", "v1=00", &format!("t={},v1={digits}", now())] {
            assert!(!is_signed("oak", wrong, b"body"), "{wrong}");
        }
    }
}
