//! Sealed records: what is stored is read by nobody but the application.
//!
//! A [`Seal`] stands between the engine and its store. Every payload goes through it: recorded
//! answers, tombstones, what is bound to issued keys, the results of steps.

#[cfg(feature = "seal")]
mod key_ring;

use std::fmt;

use bytes::{BufMut, Bytes, BytesMut};

#[cfg(feature = "seal")]
pub use self::key_ring::KeyRing;
use crate::key::Key;

/// Seals payloads before they are stored, and opens them again.
///
/// Say it with [`Builder::seal`](crate::Builder::seal). `KeyRing` (feature `seal`) is one that
/// encrypts; write another for keys that live elsewhere. It is called on the way of a request and
/// must not block: fetch keys beforehand.
///
/// Everything else of a record stays readable, so that a store can decide and an operator can look:
/// its times and state, method and route, the operation id, the digests of key, scope and request,
/// the length of the payload. Say a [secret](crate::Builder::secret) as well: without one, whoever
/// reads the store can try out keys and bodies against their digests.
///
/// ```
/// use idem_runtime::{Key, Seal, SealError};
///
/// /// Only for show: it hides nothing from anybody.
/// #[derive(Debug)]
/// struct Reversed;
///
/// impl Seal for Reversed {
///     fn seal(&self, key: &Key, payload: &[u8]) -> Result<Vec<u8>, SealError> {
///         Ok(payload.iter().chain(key.as_bytes()).rev().copied().collect())
///     }
///
///     fn open(&self, key: &Key, sealed: &[u8]) -> Result<Vec<u8>, SealError> {
///         let plain: Vec<u8> = sealed.iter().rev().copied().collect();
///         // The seal of another record is none.
///         plain.strip_suffix(key.as_bytes()).map(<[u8]>::to_vec).ok_or(SealError::Broken)
///     }
/// }
///
/// let key = Key::from_bytes([7; 32]);
/// let sealed = Reversed.seal(&key, b"paid").unwrap();
/// assert_eq!(Reversed.open(&key, &sealed).unwrap(), b"paid");
/// assert!(Reversed.open(&Key::from_bytes([8; 32]), &sealed).is_err());
/// ```
pub trait Seal: fmt::Debug + Send + Sync + 'static {
    /// Seals a payload for the record of this key, and for no other: what was moved from one record
    /// to another must not open.
    ///
    /// # Errors
    ///
    /// When it cannot; nothing is stored then, and idem tries again as with a store that fails.
    fn seal(&self, key: &Key, payload: &[u8]) -> Result<Vec<u8>, SealError>;

    /// Opens what [`seal`](Self::seal) made for the record of this key.
    ///
    /// # Errors
    ///
    /// When it cannot, or when this is not what was sealed. The record is then refused with
    /// [`RecordUnreadable`](crate::RefusalKind::RecordUnreadable): never replayed, never run over,
    /// never removed before its time.
    fn open(&self, key: &Key, sealed: &[u8]) -> Result<Vec<u8>, SealError>;

    /// Whether payloads that were stored without a seal are read too. By default they are refused:
    /// whoever can write to the store could otherwise put an answer there.
    fn accepts_unsealed(&self) -> bool {
        false
    }
}

/// Why a payload was not sealed or opened.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SealError {
    /// It is not sealed, and unsealed ones are not accepted.
    #[error("the payload is not sealed")]
    Unsealed,
    /// It is sealed, and the engine was built without a seal.
    #[error("the payload is sealed and the engine has no seal")]
    NoSeal,
    /// It is sealed in a way that this release does not know.
    #[error("the payload is sealed in an unknown way")]
    UnknownScheme,
    /// It is sealed under a key that is not on the ring, or no longer.
    #[error("the payload is sealed under key {0}, which is not on the ring")]
    UnknownKey(u32),
    /// It was changed, cut short, or sealed for another record.
    #[error("the payload's seal is broken")]
    Broken,
    /// Something else, in words.
    #[error("{0}")]
    Failed(String),
}

/// The first byte of a payload that is sealed; what [`Seal::seal`] made follows.
const SEALED: u8 = 3;

/// The first byte of what stands in for a payload that could not be opened, on its way from the
/// store to whoever needs it. It is never stored.
const UNOPENED: u8 = 0;

/// Seals a payload, in the form in which it is stored.
pub(crate) fn close(seal: &dyn Seal, key: &Key, payload: &[u8]) -> Result<Bytes, SealError> {
    let sealed = seal.seal(key, payload)?;
    let mut stored = BytesMut::with_capacity(1 + sealed.len());
    stored.put_u8(SEALED);
    stored.put_slice(&sealed);
    Ok(stored.freeze())
}

/// Opens a payload in the form in which it is stored.
///
/// One that cannot be opened becomes a stand-in that nothing can decode, and not an error: a
/// mismatch or a request in flight is told without the payload, and a claim that was granted must
/// be known, so that it can be taken back.
pub(crate) fn open(seal: &dyn Seal, key: &Key, stored: &Bytes) -> Bytes {
    let opened = match stored.split_first() {
        Some((&SEALED, sealed)) => seal.open(key, sealed).map(Bytes::from),
        _ if seal.accepts_unsealed() => Ok(stored.clone()),
        _ => Err(SealError::Unsealed),
    };
    opened.unwrap_or_else(|error| unopened(&error))
}

/// Why a payload that nothing can decode is as it is, where that has to do with seals.
pub(crate) fn why_unreadable(payload: &[u8]) -> Option<SealError> {
    match payload {
        [SEALED, ..] => Some(SealError::NoSeal),
        [UNOPENED, why, words @ ..] => Some(match why {
            0 => SealError::Unsealed,
            1 => SealError::UnknownScheme,
            2 => SealError::UnknownKey(u32::from_be_bytes(words.try_into().ok()?)),
            3 => SealError::Broken,
            4 => SealError::NoSeal,
            _ => SealError::Failed(String::from_utf8_lossy(words).into_owned()),
        }),
        _ => None,
    }
}

fn unopened(error: &SealError) -> Bytes {
    let mut stand_in = BytesMut::new();
    stand_in.put_u8(UNOPENED);
    match error {
        SealError::Unsealed => stand_in.put_u8(0),
        SealError::UnknownScheme => stand_in.put_u8(1),
        SealError::UnknownKey(id) => {
            stand_in.put_u8(2);
            stand_in.put_u32(*id);
        }
        SealError::Broken => stand_in.put_u8(3),
        SealError::NoSeal => stand_in.put_u8(4),
        SealError::Failed(words) => {
            stand_in.put_u8(5);
            stand_in.put_slice(words.as_bytes());
        }
    }
    stand_in.freeze()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::{Progress, RecordedResponse};

    #[test]
    fn what_could_not_be_opened_says_why_to_whoever_decodes_it() {
        for error in [
            SealError::Unsealed,
            SealError::NoSeal,
            SealError::UnknownScheme,
            SealError::UnknownKey(0),
            SealError::UnknownKey(u32::MAX),
            SealError::Broken,
            SealError::Failed(String::new()),
            SealError::Failed("the vault is closed".to_owned()),
        ] {
            let stand_in = unopened(&error);
            assert_eq!(why_unreadable(&stand_in), Some(error.clone()));
            let response = RecordedResponse::decode(&stand_in).unwrap_err();
            let progress = Progress::decode(&stand_in).unwrap_err();
            for corrupt in [response, progress] {
                let source = std::error::Error::source(&corrupt).unwrap();
                assert_eq!(source.downcast_ref(), Some(&error));
            }
        }
    }

    #[test]
    fn what_is_sealed_is_not_decoded_without_a_seal() {
        let corrupt = RecordedResponse::decode(&Bytes::from_static(b"\x03whatever")).unwrap_err();
        let source = std::error::Error::source(&corrupt).unwrap();
        assert_eq!(source.downcast_ref(), Some(&SealError::NoSeal));
    }
}
