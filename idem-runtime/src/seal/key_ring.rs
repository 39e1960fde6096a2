//! Encryption with XChaCha20-Poly1305 under keys that are rotated.

use std::fmt;

use chacha20poly1305::{
    KeyInit, Tag, XChaCha20Poly1305, XNonce,
    aead::{AeadInOut, Generate},
};

use super::{Seal, SealError};
use crate::key::Key;

/// XChaCha20-Poly1305.
const ALGORITHM: u8 = 1;
/// Algorithm and key id.
const HEAD: usize = 1 + 4;
const NONCE: usize = 24;
const TAG: usize = 16;
/// What the associated data begin with, so that no seal of another protocol is one of these.
const SCHEME: &[u8] = b"idem/sealed/1";

/// Encrypts what is stored with XChaCha20-Poly1305: under one key, and reads it under any number.
///
/// # Rotation
///
/// The id of its key is in each payload. To change keys while processes are replaced one by one,
/// deploy twice: first all learn to [read](Self::reads) the new key, then all write under it and
/// read the old one. The old key can go when nothing is kept any more that was sealed under it,
/// which is after the longest time to live; what it sealed for ever needs it for ever.
///
/// ```
/// # use idem_runtime::{Idempotency, KeyRing, Scope, store::MemoryStore};
/// # let (last_year, this_year) = ([1; 32], [2; 32]);
/// let idem = Idempotency::builder(MemoryStore::new())
///     .scope(Scope::header("X-API-Key"))
///     .secret("the same in all processes")
///     .seal(KeyRing::new(2, &this_year).reads(1, &last_year))
///     .build();
/// # let _ = idem;
/// ```
///
/// # What it protects
///
/// Whoever reads the store, its log or its backups learns no payload but its length. Whoever can
/// write to it can make no answer up and move none from one record to another. They can still
/// remove a record or bring an older state of it back, as a restored backup does: no encryption of
/// payloads prevents that.
///
/// # Format
///
/// ```text
/// 3: u8 (sealed), 1: u8 (this algorithm), key id: u32, nonce: 24 bytes,
/// then the encrypted payload and its tag, 16 bytes (all numbers big endian)
/// associated data: "idem/sealed/1", algorithm, key id, the record's key: 32 bytes
/// ```
///
/// The nonce is taken from the operating system for each payload: at 192 bits, one that comes twice
/// is not to be expected in any number of records (draft-irtf-cfrg-xchacha-03 §3.1). Keys are wiped
/// from memory when the ring is dropped.
pub struct KeyRing {
    writes: u32,
    keys: Vec<(u32, XChaCha20Poly1305)>,
    accepts_unsealed: bool,
}

impl KeyRing {
    /// A ring with one key, by which payloads are sealed. The id is yours to choose and never to
    /// use again for another key; the key is 32 random bytes.
    pub fn new(id: u32, key: &[u8; 32]) -> Self {
        let keys = vec![(id, XChaCha20Poly1305::new(key.into()))];
        Self { writes: id, keys, accepts_unsealed: false }
    }

    /// Reads what is sealed under another key too: an old one, or the next.
    ///
    /// # Panics
    ///
    /// When the ring has a key of this id: which of the two is meant would be a guess.
    #[must_use]
    #[track_caller]
    pub fn reads(mut self, id: u32, key: &[u8; 32]) -> Self {
        assert!(self.key(id).is_none(), "reads: there is another key with the id {id}");
        self.keys.push((id, XChaCha20Poly1305::new(key.into())));
        self
    }

    /// Reads what was stored before records were sealed. Say it while such records are kept, which
    /// is one time to live, and no longer: meanwhile who can write to the store can put an answer
    /// there.
    #[must_use]
    pub fn accept_unsealed(mut self) -> Self {
        self.accepts_unsealed = true;
        self
    }

    fn key(&self, id: u32) -> Option<&XChaCha20Poly1305> {
        self.keys.iter().find(|(known, _)| *known == id).map(|(_, key)| key)
    }

    fn seal_with(&self, nonce: &XNonce, key: &Key, payload: &[u8]) -> Result<Vec<u8>, SealError> {
        let cipher = self.key(self.writes).ok_or(SealError::UnknownKey(self.writes))?;
        let mut sealed = Vec::with_capacity(HEAD + NONCE + payload.len() + TAG);
        sealed.push(ALGORITHM);
        sealed.extend(self.writes.to_be_bytes());
        let associated = associated(&sealed, key);
        sealed.extend_from_slice(nonce);
        sealed.extend_from_slice(payload);
        let tag = cipher
            .encrypt_inout_detached(nonce, &associated, (&mut sealed[HEAD + NONCE..]).into())
            .map_err(|_| SealError::Failed("the payload is too large to be sealed".to_owned()))?;
        sealed.extend_from_slice(&tag);
        Ok(sealed)
    }
}

/// What a payload is bound to without being part of it.
fn associated(head: &[u8], key: &Key) -> Vec<u8> {
    [SCHEME, head, key.as_bytes()].concat()
}

/// Keys are shown to nobody.
impl fmt::Debug for KeyRing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ids: Vec<_> = self.keys.iter().map(|(id, _)| id).collect();
        f.debug_struct("KeyRing")
            .field("writes", &self.writes)
            .field("reads", &ids)
            .field("accepts_unsealed", &self.accepts_unsealed)
            .finish()
    }
}

impl Seal for KeyRing {
    fn seal(&self, key: &Key, payload: &[u8]) -> Result<Vec<u8>, SealError> {
        let nonce = XNonce::try_generate().map_err(|error| {
            SealError::Failed(format!("the system has no random numbers: {error}"))
        })?;
        self.seal_with(&nonce, key, payload)
    }

    fn open(&self, key: &Key, sealed: &[u8]) -> Result<Vec<u8>, SealError> {
        let (head, rest) = sealed.split_first_chunk::<HEAD>().ok_or(SealError::Broken)?;
        let [ALGORITHM, id @ ..] = *head else { return Err(SealError::UnknownScheme) };
        let id = u32::from_be_bytes(id);
        let cipher = self.key(id).ok_or(SealError::UnknownKey(id))?;
        let (nonce, rest) = rest.split_first_chunk::<NONCE>().ok_or(SealError::Broken)?;
        let (encrypted, tag) = rest.split_last_chunk::<TAG>().ok_or(SealError::Broken)?;
        let mut payload = encrypted.to_vec();
        cipher
            .decrypt_inout_detached(
                &XNonce::from(*nonce),
                &associated(head, key),
                payload.as_mut_slice().into(),
                &Tag::from(*tag),
            )
            .map_err(|_| SealError::Broken)?;
        Ok(payload)
    }

    fn accepts_unsealed(&self) -> bool {
        self.accepts_unsealed
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::seal;

    const OLD: [u8; 32] = [1; 32];
    const NEW: [u8; 32] = [2; 32];
    const RECORD: Key = Key::from_bytes([7; 32]);
    const OTHER: Key = Key::from_bytes([8; 32]);

    /// Computed with libsodium: what is stored today must be readable for ever.
    #[test]
    fn the_format_is_what_it_was() {
        let key = std::array::from_fn(|i| i as u8);
        let nonce = XNonce::from(std::array::from_fn::<u8, NONCE, _>(|i| 100 + i as u8));
        let ring = KeyRing::new(0x0102_0304, &key);
        let sealed = ring.seal_with(&nonce, &RECORD, b"paid").unwrap();
        let hex: String = sealed.iter().map(|byte| format!("{byte:02x}")).collect();
        let expected = "0101020304\
            6465666768696a6b6c6d6e6f707172737475767778797a7b\
            0c1290d4\
            3b6b229d8740810cc81fd6831c7fcc63";
        assert_eq!(hex, expected);
        assert_eq!(ring.open(&RECORD, &sealed).unwrap(), b"paid");
    }

    #[test]
    fn a_payload_of_any_length_survives_and_is_not_seen() {
        let ring = KeyRing::new(1, &OLD);
        for length in [0, 1, 63, 64, 65, 5_000] {
            let payload = b"payload!".iter().copied().cycle().take(length).collect::<Vec<_>>();
            let sealed = ring.seal(&RECORD, &payload).unwrap();
            assert_eq!(sealed.len(), HEAD + NONCE + length + TAG);
            assert!(!sealed.windows(8).any(|window| window == b"payload!"));
            assert_eq!(ring.open(&RECORD, &sealed).unwrap(), payload);
        }
    }

    #[test]
    fn the_same_is_never_sealed_the_same_way() {
        let ring = KeyRing::new(1, &OLD);
        let nonce = || ring.seal(&RECORD, b"paid").unwrap()[HEAD..HEAD + NONCE].to_vec();
        let nonces: std::collections::HashSet<_> = (0..1_000).map(|_| nonce()).collect();
        assert_eq!(nonces.len(), 1_000);
    }

    #[test]
    fn a_seal_of_another_record_is_broken() {
        let ring = KeyRing::new(1, &OLD);
        let sealed = ring.seal(&RECORD, b"paid").unwrap();
        assert_eq!(ring.open(&OTHER, &sealed), Err(SealError::Broken));
    }

    #[test]
    fn no_bit_can_be_changed_and_no_byte_cut_off_or_added() {
        // Under both ids is the same key: that the id cannot be changed is for the tag to say.
        let ring = KeyRing::new(0, &OLD).reads(1, &OLD);
        let sealed = ring.seal(&RECORD, b"paid").unwrap();
        for bit in 0..sealed.len() * 8 {
            let mut changed = sealed.clone();
            changed[bit / 8] ^= 1 << (bit % 8);
            assert!(ring.open(&RECORD, &changed).is_err(), "bit {bit}");
        }
        for length in 0..sealed.len() {
            assert_eq!(ring.open(&RECORD, &sealed[..length]), Err(SealError::Broken), "{length}");
        }
        assert_eq!(ring.open(&RECORD, &[&sealed[..], &[0]].concat()), Err(SealError::Broken));
    }

    #[test]
    fn keys_are_rotated() {
        let before = KeyRing::new(1, &OLD);
        let learning = KeyRing::new(1, &OLD).reads(2, &NEW);
        let rotated = KeyRing::new(2, &NEW).reads(1, &OLD);
        let after = KeyRing::new(2, &NEW);
        let old = before.seal(&RECORD, b"old").unwrap();
        let new = rotated.seal(&RECORD, b"new").unwrap();
        for ring in [&learning, &rotated] {
            assert_eq!(ring.open(&RECORD, &old).unwrap(), b"old");
            assert_eq!(ring.open(&RECORD, &new).unwrap(), b"new");
        }
        assert_eq!(before.open(&RECORD, &new), Err(SealError::UnknownKey(2)));
        assert_eq!(after.open(&RECORD, &old), Err(SealError::UnknownKey(1)));
        let reused = KeyRing::new(1, &NEW);
        assert_eq!(reused.open(&RECORD, &old), Err(SealError::Broken));
    }

    #[test]
    fn what_is_not_sealed_is_read_only_where_that_is_said() {
        let plain = bytes::Bytes::from_static(b"\x01\x00\xc8\0\0\0\0");
        let ring = KeyRing::new(1, &OLD);
        let stand_in = seal::open(&ring, &RECORD, &plain);
        assert_eq!(seal::why_unreadable(&stand_in), Some(SealError::Unsealed));
        let ring = ring.accept_unsealed();
        assert_eq!(seal::open(&ring, &RECORD, &plain), plain);
        // A seal is looked at all the same.
        let sealed = seal::close(&ring, &RECORD, &plain).unwrap();
        assert_eq!(sealed[..2], [3, ALGORITHM]);
        assert_eq!(seal::open(&ring, &RECORD, &sealed), plain);
        let stand_in = seal::open(&ring, &OTHER, &sealed);
        assert_eq!(seal::why_unreadable(&stand_in), Some(SealError::Broken));
    }

    #[test]
    #[should_panic(expected = "reads: there is another key with the id 1")]
    fn an_id_is_given_once() {
        let _ = KeyRing::new(1, &OLD).reads(1, &NEW);
    }

    #[test]
    fn its_keys_are_shown_to_nobody() {
        let shown = format!("{:?}", KeyRing::new(1, &[0xab; 32]).reads(9, &NEW));
        assert_eq!(shown, "KeyRing { writes: 1, reads: [1, 9], accepts_unsealed: false }");
    }
}
