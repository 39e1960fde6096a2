//! The script that every step is, and how it is called.

use std::sync::LazyLock;

use bytes::Bytes;
use redis::{Cmd, FromRedisValue as _, RedisResult, Value};

use super::connection::unexpected;
use crate::store::clock::Millis;

/// What is done to a record: one command on its key.
pub(super) enum Step<'a> {
    /// Makes the record of a first claim, if there is none: a plain `SET`.
    First {
        record: &'a [u8],
        /// For how many milliseconds it is kept.
        kept: u64,
    },
    /// Calls a script.
    Script { script: &'static Script, arguments: Vec<Argument<'a>> },
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

/// The answer to a step.
pub(super) struct Answer {
    pub(super) outcome: Outcome,
    /// The record, and the server's clock unless it is a plain `SET` that met it.
    pub(super) record: Option<(Bytes, Option<Millis>)>,
}

impl Answer {
    pub(super) fn read(answer: Value) -> RedisResult<Self> {
        let (outcome, record) = match answer {
            Value::Int(outcome) => (outcome, None),
            Value::Array(parts) => {
                let Ok([outcome, now, Value::BulkString(record)]) = <[_; 3]>::try_from(parts)
                else {
                    return Err(unexpected());
                };
                let now = Millis::from_redis_value(now)?;
                (i64::from_redis_value(outcome)?, Some((record.into(), Some(now))))
            }
            // To a plain `SET`: that there was nothing, or what there is.
            Value::Nil => (0, None),
            Value::BulkString(record) => (1, Some((record.into(), None))),
            _ => return Err(unexpected()),
        };
        let outcome = match outcome {
            0 => Outcome::Done,
            1 => Outcome::Refused,
            2 => Outcome::Nothing,
            3 => Outcome::Newer,
            4 => Outcome::Corrupt,
            _ => return Err(unexpected()),
        };
        Ok(Self { outcome, record })
    }
}

/// A text that the servers keep, and the name that they keep it under.
pub(super) struct Script {
    text: String,
    hash: String,
}

impl Script {
    fn new(beginning: &str) -> Self {
        let text = [beginning, include_str!("script.lua")].concat();
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

/// [`GOING_ON`], behind what does for most completions.
static COMPLETING: LazyLock<Script> =
    LazyLock::new(|| Script::new(concat!("#!lua flags=allow-oom\n", include_str!("complete.lua"))));

impl<'a> Step<'a> {
    /// A step that a script knows by this name, for who reads records up to this format and writes
    /// them in it.
    pub(super) fn new(
        name: &'static str,
        format: u16,
        own: impl IntoIterator<Item = Argument<'a>>,
    ) -> Self {
        let script = match name {
            "complete" | "checkpoint" | "release" | "forget" | "renew" => &GOING_ON,
            _ => &OPENING,
        };
        let mut arguments = vec![name.as_bytes().into(), u64::from(format).into()];
        arguments.extend(own);
        Self::Script { script, arguments }
    }

    /// Records an answer, where the record is still as a first claim made it in one command: what
    /// it then begins with, what is to become of it and for how many milliseconds that is kept.
    pub(super) fn complete(first: &'a [u8], completed: &'a [u8], kept: u64) -> Self {
        let arguments = vec![first.into(), completed.into(), kept.into()];
        Self::Script { script: &COMPLETING, arguments }
    }

    /// The call, for a server that knows the script.
    pub(super) fn call(&self, key: &[u8]) -> Cmd {
        match self {
            Self::First { record, kept } => {
                let mut set = Cmd::with_capacity(7, key.len() + record.len() + 40);
                set.arg("SET").arg(key).arg(record).arg("NX").arg("GET").arg("PX").arg(kept);
                set
            }
            Self::Script { script, arguments } => eval("EVALSHA", &script.hash, key, arguments),
        }
    }

    /// The call together with the script, if there is one, which the server then knows.
    pub(super) fn teach(&self, key: &[u8]) -> Cmd {
        match self {
            Self::First { .. } => self.call(key),
            Self::Script { script, arguments } => eval("EVAL", &script.text, key, arguments),
        }
    }

    /// How many bytes the call brings along.
    pub(super) fn size(&self) -> usize {
        match self {
            Self::First { record, .. } => record.len(),
            Self::Script { arguments, .. } => arguments.iter().map(Argument::size).sum(),
        }
    }
}

fn eval(verb: &str, script: &str, key: &[u8], arguments: &[Argument<'_>]) -> Cmd {
    let bytes: usize = arguments.iter().map(Argument::size).sum();
    let mut command =
        Cmd::with_capacity(4 + arguments.len(), verb.len() + script.len() + key.len() + 20 + bytes);
    command.arg(verb).arg(script).arg(1).arg(key);
    for argument in arguments {
        match argument {
            Argument::Bytes(bytes) => command.arg(bytes),
            Argument::Number(number) => command.arg(*number),
        };
    }
    command
}

impl Argument<'_> {
    const fn size(&self) -> usize {
        match self {
            Self::Bytes(bytes) => bytes.len(),
            Self::Number(_) => 20,
        }
    }
}
