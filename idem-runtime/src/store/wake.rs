//! Wake-ups across processes: how who waits hears that the owner elsewhere has ended.

use futures_util::{future::BoxFuture, stream::BoxStream};

use super::StoreError;
use crate::key::Key;

/// A store that can carry a short message to every process that shares it.
///
/// Messages only hasten what looking at the record finds out too: they may be lost, late, doubled
/// or out of order, and say nothing that is to be believed. A process that begins to wait tells
/// [`Awaited`](Signal::Awaited); the one that holds the claim then tells [`Ended`](Signal::Ended)
/// once it is over. So a request that nobody waits for costs no message.
pub trait Wake: Send + Sync {
    /// Tells all processes that listen.
    ///
    /// # Errors
    ///
    /// When the store cannot be reached.
    fn tell(&self, signal: Signal) -> BoxFuture<'_, Result<(), StoreError>>;

    /// Hears what is told from now on, by this process too. The stream ends when the connection is
    /// lost; the caller listens again. An engine listens once, whatever the number of waiters.
    ///
    /// # Errors
    ///
    /// When the store cannot be reached.
    fn listen(&self) -> BoxFuture<'_, Result<BoxStream<'static, Signal>, StoreError>>;
}

/// What processes tell each other of a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Signal {
    /// Somebody waits for its owner.
    Awaited(Key),
    /// Its owner has ended.
    Ended(Key),
}

impl Signal {
    /// The message: one letter and the key's 64 hexadecimal digits, so that any channel of text can
    /// carry it.
    pub fn encode(&self) -> String {
        let (letter, key) = match self {
            Self::Awaited(key) => ('a', key),
            Self::Ended(key) => ('e', key),
        };
        let digits = key.as_bytes().iter().map(|byte| format!("{byte:02x}"));
        std::iter::once(letter.to_string()).chain(digits).collect()
    }

    /// Reads a message; `None` if it is none of these, as from another release.
    pub fn decode(message: &str) -> Option<Self> {
        let (letter, digits) = message.split_at_checked(1)?;
        if digits.len() != 64 || !digits.is_ascii() {
            return None;
        }
        let mut key = [0; 32];
        for (byte, pair) in key.iter_mut().zip(digits.as_bytes().chunks_exact(2)) {
            *byte = u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok()?;
        }
        let key = Key::from_bytes(key);
        match letter {
            "a" => Some(Self::Awaited(key)),
            "e" => Some(Self::Ended(key)),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_is_read_as_it_was_written_and_anything_else_is_none() {
        let key = Key::from_bytes(std::array::from_fn(|i| i as u8 * 7));
        for signal in [Signal::Awaited(key), Signal::Ended(key)] {
            assert_eq!(Signal::decode(&signal.encode()), Some(signal));
        }
        let message = Signal::Ended(key).encode();
        let others = ["", "e", "é", &message[1..], &message[..64], &message.replace('e', "x")];
        assert!(others.iter().all(|other| Signal::decode(other).is_none()));
        assert!(Signal::decode(&format!("{message}0")).is_none());
    }
}
