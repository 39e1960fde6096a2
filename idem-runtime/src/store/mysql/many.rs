//! The statements that carry many claims or many completions.
//!
//! They are written out, each as long as it needs to be: to prepare one costs a round trip for each
//! length that comes up, and a list of another form (`JSON_TABLE`) costs the server three times the
//! time. Nothing that a client says gets in but as hexadecimal digits.

use std::fmt::Write as _;

use super::row::now;
use crate::{
    key::Key,
    store::{
        Claim, Completion,
        clock::{Millis, NEVER, end_of},
        row::Row,
    },
};

/// The server's present instant, for all rows of a statement: it is sent before it, with it.
const NOW: &str = concat!("SET @idem_now = ", now!(), "; ");

/// Makes rows for claims on fresh keys, with a mark in their `version`; whatever is there already is
/// left alone (`IGNORE`).
pub(super) fn insert<'c>(claims: impl Iterator<Item = &'c Claim>, mark: i64) -> String {
    let mut sql = String::from(NOW);
    sql.push_str(
        "INSERT IGNORE INTO idem_records (record_key, scope, operation, operation_id, state, \
         scheme, fingerprint, token, attempt, lease_end, valid_until, kept_until, created, format, \
         flags, version, payload) VALUES ",
    );
    for (number, claim) in claims.enumerate() {
        // From an instant 0 its times are spans.
        let row = Row::fresh(claim, 0);
        sql.push_str(if number == 0 { "(" } else { ", (" });
        push_bytes(&mut sql, row.key.as_bytes());
        sql.push(',');
        push_bytes(&mut sql, row.scope.as_bytes());
        sql.push(',');
        push_bytes(&mut sql, row.operation.as_bytes());
        sql.push(',');
        push_bytes(&mut sql, row.operation_id.as_bytes());
        sql.push_str(",1,");
        push_bytes(&mut sql, row.fingerprint.scheme.as_bytes());
        sql.push(',');
        push_bytes(&mut sql, &row.fingerprint.digest);
        sql.push(',');
        push_bytes(&mut sql, row.token.as_bytes());
        sql.push_str(",1,");
        push_from_now(&mut sql, row.lease_end);
        sql.push(',');
        push_from_now(&mut sql, row.valid_until);
        sql.push(',');
        push_from_now(&mut sql, row.kept_until);
        push(&mut sql, format_args!(",@idem_now,{},0,{mark},'')", row.format));
    }
    sql
}

/// Does what [`Row::complete`] does on each key that is held under its token.
pub(super) fn complete(completions: &[Completion]) -> String {
    let mut sql = String::from(NOW);
    // The flags come last, since what stands before reads them.
    sql.push_str("UPDATE idem_records FORCE INDEX (PRIMARY) SET state = 3, lease_end = @idem_now");
    for column in ["valid_until", "kept_until"] {
        push(&mut sql, format_args!(", {column} = IF(flags & 2, {column}, "));
        push_each(&mut sql, completions, |sql, completion| {
            push_from_now(sql, end_of(0, completion.ttl));
        });
        sql.push(')');
    }
    sql.push_str(", format = ");
    let format = |sql: &mut String, completion: &Completion| {
        push(sql, format_args!("{}", completion.format));
    };
    push_each(&mut sql, completions, format);
    sql.push_str(", version = version + 1, payload = ");
    push_each(&mut sql, completions, |sql, completion| push_bytes(sql, &completion.payload));
    sql.push_str(", flags = flags | ");
    push_each(&mut sql, completions, |sql, completion| {
        push(sql, format_args!("{}", completion.flags.bits()));
    });
    sql.push_str(" WHERE record_key IN (");
    for (number, Completion { key, .. }) in completions.iter().enumerate() {
        sql.push_str(if number == 0 { "" } else { "," });
        push_bytes(&mut sql, key.as_bytes());
    }
    sql.push_str(") AND token = ");
    push_each(&mut sql, completions, |sql, completion| {
        push_bytes(sql, completion.token.as_bytes())
    });
    sql.push_str(" AND state = 1 AND format BETWEEN 1 AND ");
    push_each(&mut sql, completions, format);
    sql.push_str(" AND kept_until > @idem_now");
    sql
}

/// What is said of each row: once if it is the same of all.
fn push_each(
    sql: &mut String,
    completions: &[Completion],
    value: impl Fn(&mut String, &Completion),
) {
    let said: Vec<(&Key, String)> = completions
        .iter()
        .map(|completion| {
            let mut said = String::new();
            value(&mut said, completion);
            (&completion.key, said)
        })
        .collect();
    if let [(_, first), rest @ ..] = &said[..]
        && rest.iter().all(|(_, other)| other == first)
    {
        return sql.push_str(first);
    }
    sql.push_str("CASE record_key");
    for (key, said) in &said {
        sql.push_str(" WHEN ");
        push_bytes(sql, key.as_bytes());
        sql.push_str(" THEN ");
        sql.push_str(said);
    }
    sql.push_str(" END");
}

/// The instant so many milliseconds from now, at most never.
fn push_from_now(sql: &mut String, span: Millis) {
    // Half of all time is more than can be added to any instant that a server knows.
    if span > NEVER / 2 {
        return push(sql, format_args!("{NEVER}"));
    }
    push(sql, format_args!("@idem_now+{span}"));
}

fn push_bytes(sql: &mut String, bytes: &[u8]) {
    sql.push_str("X'");
    push_hex(sql, bytes);
    sql.push('\'');
}

pub(super) fn push_hex(text: &mut String, bytes: &[u8]) {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    text.reserve(2 * bytes.len());
    for byte in bytes {
        text.push(char::from(DIGITS[usize::from(byte >> 4)]));
        text.push(char::from(DIGITS[usize::from(byte & 15)]));
    }
}

fn push(text: &mut String, what: std::fmt::Arguments<'_>) {
    // Writing to a string cannot fail.
    let _ = text.write_fmt(what);
}
