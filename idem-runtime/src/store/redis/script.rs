//! The script that every step is, and how it is called.

use std::sync::LazyLock;

use bytes::Bytes;
use redis::{Cmd, FromRedisValue as _, RedisResult, Value};

use super::connection::unexpected;
use crate::store::clock::Millis;

/// What is done to a record, with what the script is told about it.
pub(super) struct Step<'a> {
    pub(super) name: &'static str,
    /// The newest format that the caller reads, and the one of what it writes.
    pub(super) format: u16,
    pub(super) arguments: Vec<Argument<'a>>,
}

pub(super) enum Argument<'a> {
    Bytes(&'a [u8]),
    Number(u64),
}

impl<'a, const N: usize> From<&'a [u8; N]> for Argument<'a> {
    fn from(bytes: &'a [u8; N]) -> Self {
        Self::Bytes(bytes)
    }
}

impl<'a> From<&'a [u8]> for Argument<'a> {
    fn from(bytes: &'a [u8]) -> Self {
        Self::Bytes(bytes)
    }
}

impl From<u64> for Argument<'_> {
    fn from(number: u64) -> Self {
        Self::Number(number)
    }
}

impl From<bool> for Argument<'_> {
    fn from(yes: bool) -> Self {
        Self::Number(yes.into())
    }
}

/// What the script says of a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    /// It is done, now or before.
    Done,
    /// The record stands in its way.
    Refused,
    /// There is no record.
    Nothing,
    /// The record is of a newer format than the caller reads.
    Newer,
    /// What is there is no record.
    Corrupt,
}

/// The script's answer.
pub(super) struct Answer {
    pub(super) outcome: Outcome,
    /// The server's clock.
    pub(super) now: Millis,
    pub(super) record: Option<Bytes>,
}

impl Answer {
    pub(super) fn read(answer: Value) -> RedisResult<Self> {
        let Value::Array(parts) = answer else { return Err(unexpected()) };
        let mut parts = parts.into_iter();
        let mut part = || parts.next().ok_or_else(unexpected);
        let outcome = match i64::from_redis_value(part()?)? {
            0 => Outcome::Done,
            1 => Outcome::Refused,
            2 => Outcome::Nothing,
            3 => Outcome::Newer,
            4 => Outcome::Corrupt,
            _ => return Err(unexpected()),
        };
        let now = Millis::from_redis_value(part()?)?;
        let record = match parts.next() {
            Some(Value::BulkString(record)) => Some(record.into()),
            None => None,
            Some(_) => return Err(unexpected()),
        };
        Ok(Self { outcome, now, record })
    }
}

/// A text that the servers keep, and the name that they keep it under.
struct Script {
    text: String,
    hash: String,
}

impl Script {
    fn new(first_line: &str) -> Self {
        let text = format!("{first_line}{}", include_str!("script.lua"));
        let hash = redis::Script::new(&text).get_hash().to_owned();
        Self { text, hash }
    }
}

/// What makes records: refused when the server's memory is full, in the middle of the script, so
/// that a replay, which writes nothing, is not.
static OPENING: LazyLock<Script> = LazyLock::new(|| Script::new(""));
/// What goes on with records that were made: let through when the server's memory is full, since
/// refusing it would repeat what has already happened.
static GOING_ON: LazyLock<Script> = LazyLock::new(|| Script::new("#!lua flags=allow-oom\n"));

impl Step<'_> {
    fn script(&self) -> &'static Script {
        match self.name {
            "complete" | "checkpoint" | "release" | "forget" | "renew" => &GOING_ON,
            _ => &OPENING,
        }
    }

    /// The call, for a server that knows the script.
    pub(super) fn call(&self, key: &str) -> Cmd {
        self.command("EVALSHA", &self.script().hash, key)
    }

    /// The call together with the script, which the server then knows.
    pub(super) fn teach(&self, key: &str) -> Cmd {
        self.command("EVAL", &self.script().text, key)
    }

    fn command(&self, verb: &str, script: &str, key: &str) -> Cmd {
        let bytes: usize = self.arguments.iter().map(Argument::size).sum();
        let mut command = Cmd::with_capacity(
            6 + self.arguments.len(),
            verb.len() + script.len() + key.len() + 32 + bytes,
        );
        command.arg(verb).arg(script).arg(1).arg(key).arg(self.name).arg(self.format);
        for argument in &self.arguments {
            match argument {
                Argument::Bytes(bytes) => command.arg(bytes),
                Argument::Number(number) => command.arg(*number),
            };
        }
        command
    }

    /// How many bytes the call brings along.
    pub(super) fn size(&self) -> usize {
        self.arguments.iter().map(Argument::size).sum()
    }
}

impl Argument<'_> {
    const fn size(&self) -> usize {
        match self {
            Self::Bytes(bytes) => bytes.len(),
            Self::Number(_) => 20,
        }
    }
}
