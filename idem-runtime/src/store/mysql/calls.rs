//! What a store is asked for, each on a connection that it is given.
//!
//! Each call is decided by one statement that the server carries out as a whole: an `INSERT`
//! where there is no row, an `UPDATE` or a `DELETE` that says in its condition under which token or
//! after which reading it holds. There are no transactions, so that no lock outlives its statement,
//! and every call can be made again when nobody knows what became of it.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    fmt::Write as _,
};

use sqlx::MySqlConnection;

use super::{
    failure::{Failure, Remedy},
    many,
    row::{
        Loaded, claim_of, columns, decode, from_now, insert, key_of, load, now, remove, replace,
    },
};
use crate::{
    key::{Key, Token},
    record::{FORMAT, Record},
    store::{
        Checkpoint, Claim, Claimed, Completion, Renewal, Written,
        clock::{Millis, after, end_of},
        row::{Ended, Opening, Row, found},
    },
};

/// A call, which can be made any number of times.
pub(super) trait Call: Sync {
    /// Whether it is made only once server and tables were found to be what the store needs.
    const CHECKED: bool = true;

    type Answer: Send;

    /// How many bytes it carries to the server beside a little.
    fn size(&self) -> usize {
        0
    }

    fn run(
        &self,
        connection: &mut MySqlConnection,
    ) -> impl Future<Output = Result<Self::Answer, Failure>> + Send;
}

/// Claims or issues a key.
pub(super) struct Open<'a, O>(pub(super) &'a O);

impl<O: Opening> Call for Open<'_, O> {
    type Answer = O::Answer;

    fn size(&self) -> usize {
        let (row, _) = self.0.on_nothing(0);
        row.map_or(0, |row| row.payload.len() + row.operation.len() + row.fingerprint.scheme.len())
    }

    /// One statement where the key has no row. Where it has one, that statement fails without
    /// having written anything; the row is read, and changed by a second statement if the decision
    /// on it says so.
    async fn run(&self, connection: &mut MySqlConnection) -> Result<O::Answer, Failure> {
        let opening = self.0;
        // Who finds that a row has changed since it was read looks again: somebody else got on.
        loop {
            // From an instant 0 its times are spans.
            let (fresh, answer) = opening.on_nothing(0);
            let may_be_made = fresh.is_some();
            mark!("mysql.insert.before");
            if let Some(row) = fresh
                && insert(connection, &row).await?
            {
                mark!("mysql.insert.answered");
                return Ok(answer);
            }
            mark!("mysql.leased.insert.refused");
            let loaded = load(connection, opening.key()).await?;
            let Some(Loaded { row: before, now, stamp }) = loaded else {
                if may_be_made {
                    // It was removed in between.
                    continue;
                }
                return Ok(answer);
            };
            let (row, answer) = match found(Some(&before), opening.format(), now)? {
                Some(row) => {
                    let mut row = row.clone();
                    let (changed, answer) = opening.on_row(&mut row, now);
                    (changed.then_some(row), answer)
                }
                None => opening.on_nothing(now),
            };
            let Some(row) = row else { return Ok(answer) };
            mark!("mysql.leased.claim.read");
            if replace(connection, stamp, &row).await? {
                mark!("mysql.leased.claim.replaced");
                return Ok(answer);
            }
        }
    }
}

/// Records an answer.
pub(super) struct Complete<'a>(pub(super) &'a Completion);

impl Call for Complete<'_> {
    type Answer = Written;

    fn size(&self) -> usize {
        self.0.payload.len()
    }

    /// One statement; a second one reads the row if that has changed nothing.
    async fn run(&self, connection: &mut MySqlConnection) -> Result<Written, Failure> {
        let completion = self.0;
        loop {
            mark!("mysql.leased.complete.before");
            if complete(connection, completion).await? {
                mark!("mysql.leased.complete.answered");
                return Ok(Written::Done);
            }
            let looked = look(connection, &completion.key, completion.format).await?;
            let Some(Loaded { mut row, now, .. }) = looked else { return Ok(Written::Gone) };
            match row.complete(completion, now) {
                // It was not held a moment ago, and now it is.
                Ended::Changed | Ended::Removed => {}
                Ended::Already => return Ok(Written::Done),
                Ended::Fenced => return Ok(Written::Fenced(row.record(now))),
            }
        }
    }
}

/// Claims on different keys, in order of keys: nothing is answered to those that are to be made by
/// themselves, since their records are free to be taken or cannot be read.
pub(super) struct OpenAll<'a>(pub(super) &'a [Claim]);

impl Call for OpenAll<'_> {
    type Answer = Vec<Option<Claimed>>;

    fn size(&self) -> usize {
        // In text, a byte takes two.
        let said = |claim: &Claim| claim.operation.len() + claim.fingerprint.scheme.len() + 256;
        self.0.iter().map(|claim| 2 * said(claim)).sum()
    }

    /// One statement where no key has a row; a second one says which have, and reads them.
    async fn run(&self, connection: &mut MySqlConnection) -> Result<Vec<Option<Claimed>>, Failure> {
        // What tells the rows that this statement has made from those of an earlier one under the
        // same token, whose answer was lost. As large as it is, it never comes to its type's end.
        let mark: i64 = rand::random_range(0..1 << 62);
        let mut made = 0;
        if self.0.iter().any(|claim| !claim.issued_only) {
            let insert = many::insert(self.0.iter().filter(|claim| !claim.issued_only), mark);
            mark!("mysql.leased.together.claims.before");
            let inserted = together(connection, insert).await?;
            mark!("mysql.leased.together.claims.answered");
            match inserted {
                Some(rows) => made = rows,
                None => return Ok(vec![None; self.0.len()]),
            }
        }
        let granted = |claim: &Claim| Claimed::Granted(Row::fresh(claim, 0).record(0));
        if made == self.0.len() as u64 {
            return Ok(self.0.iter().map(|claim| Some(granted(claim))).collect());
        }
        let rows = sqlx::query(concat!(
            "SELECT ",
            columns!("existing."),
            ", payload, ",
            now!(),
            " AS read_at FROM ",
            listed!()
        ))
        .bind(list(self.0.iter().map(|claim| (claim.key, String::new()))))
        .fetch_all(connection)
        .await?;
        let mut there: HashMap<_, _> =
            rows.iter().filter_map(|row| Some((key_of(row).ok()?, decode(row)))).collect();
        let answer = |claim: &Claim| match there.remove(&claim.key) {
            None => claim.issued_only.then_some(Claimed::Unknown),
            // A record that cannot be read is the affair of its own claim.
            Some(Err(_)) => None,
            Some(Ok(loaded)) if loaded.row.is_held_by(claim.token) => {
                loaded.is_of(mark).then(|| granted(claim))
            }
            Some(Ok(Loaded { mut row, now, .. })) => match found(Some(&row), claim.format, now) {
                Ok(Some(_)) => {
                    let (changed, answer) = claim.on_row(&mut row, now);
                    (!changed).then_some(answer)
                }
                Ok(None) | Err(_) => None,
            },
        };
        Ok(self.0.iter().map(answer).collect())
    }
}

/// Answers on different keys, in order of keys: nothing is answered to those whose claims are not
/// held.
pub(super) struct CompleteAll<'a>(pub(super) &'a [Completion]);

impl Call for CompleteAll<'_> {
    type Answer = Vec<Option<Written>>;

    fn size(&self) -> usize {
        self.0.iter().map(|completion| 2 * completion.payload.len() + 512).sum()
    }

    /// One statement; a second one says which were written, if not all were.
    async fn run(&self, connection: &mut MySqlConnection) -> Result<Vec<Option<Written>>, Failure> {
        let update = many::complete(self.0);
        mark!("mysql.leased.together.completions.before");
        let written = together(connection, update).await?;
        mark!("mysql.leased.together.completions.answered");
        let Some(written) = written else { return Ok(vec![None; self.0.len()]) };
        if written == self.0.len() as u64 {
            return Ok(self.0.iter().map(|_| Some(Written::Done)).collect());
        }
        let rows = sqlx::query(concat!(
            "SELECT existing.record_key, existing.token FROM ",
            listed!(),
            " WHERE existing.token = UNHEX(listed.token) AND state = 3
               AND format BETWEEN 1 AND ? AND kept_until > ",
            now!()
        ))
        .bind(list(self.0.iter().map(|completion| {
            (completion.key, format!(r#","{}""#, hex(completion.token.as_bytes())))
        })))
        .bind(FORMAT)
        .fetch_all(connection)
        .await?;
        let done: HashSet<_> = rows.iter().flat_map(claim_of).collect();
        let is_done = |completion: &Completion| done.contains(&(completion.key, completion.token));
        let answer = |completion| is_done(completion).then_some(Written::Done);
        Ok(self.0.iter().map(answer).collect())
    }
}

/// How many rows a statement that carries many calls has made or changed; nothing if it was in
/// others' way, so that each call is better made by itself.
async fn together(
    connection: &mut MySqlConnection,
    statement: String,
) -> Result<Option<u64>, Failure> {
    // It consists of what is written in `many`, of digits, and of bytes in hexadecimal.
    let statement = sqlx::raw_sql(sqlx::AssertSqlSafe(statement));
    match statement.execute(connection).await.map_err(Failure::from) {
        Ok(done) => Ok(Some(done.rows_affected())),
        Err(failure) if failure.remedy() == Remedy::Again => Ok(None),
        Err(failure) => Err(failure),
    }
}

/// Does what [`Row::complete`] does, if the key is held under the token.
async fn complete(
    connection: &mut MySqlConnection,
    completion: &Completion,
) -> Result<bool, Failure> {
    let span = end_of(0, completion.ttl);
    // 2 is `Flags::ISSUED`. The flags come last, since what stands before reads them.
    let completed = sqlx::query(concat!(
        "UPDATE idem_records SET
             state = 3,
             lease_end = ",
        now!(),
        ",
             valid_until = IF(flags & 2, valid_until, ",
        from_now!("?"),
        "),
             kept_until = IF(flags & 2, kept_until, ",
        from_now!("?"),
        "),
             format = ?, version = version + 1, payload = ?, flags = flags | ?
         WHERE record_key = ? AND token = ? AND state = 1 AND format BETWEEN 1 AND ?
           AND kept_until > ",
        now!()
    ))
    .bind(span)
    .bind(span)
    .bind(completion.format)
    .bind(&completion.payload[..])
    .bind(completion.flags.bits())
    .bind(&completion.key.as_bytes()[..])
    .bind(&completion.token.as_bytes()[..])
    .bind(completion.format)
    .execute(connection)
    .await?;
    Ok(completed.rows_affected() > 0)
}

/// Changes a row under a token.
pub(super) enum Change<'a> {
    Checkpoint(&'a Checkpoint),
    Release(&'a Key, &'a Token),
    Forget(&'a Key, &'a Token),
}

impl Change<'_> {
    fn key(&self) -> &Key {
        match self {
            Self::Checkpoint(checkpoint) => &checkpoint.key,
            Self::Release(key, _) | Self::Forget(key, _) => key,
        }
    }

    /// The newest format that the caller reads.
    fn format(&self) -> u16 {
        match self {
            Self::Checkpoint(checkpoint) => checkpoint.format,
            Self::Release(..) | Self::Forget(..) => FORMAT,
        }
    }

    fn on_row(&self, row: &mut Row, now: Millis) -> Ended {
        match self {
            Self::Checkpoint(checkpoint) => row.checkpoint(checkpoint),
            Self::Release(_, token) => row.release(**token, now),
            Self::Forget(_, token) => row.forget(**token, now),
        }
    }
}

impl Call for Change<'_> {
    type Answer = Written;

    fn size(&self) -> usize {
        match self {
            Self::Checkpoint(checkpoint) => checkpoint.payload.len(),
            Self::Release(..) | Self::Forget(..) => 0,
        }
    }

    /// Reads the row, and writes it if it is still the one that was read: what a caller that went
    /// away has left on its way comes to nothing once a later call was answered.
    async fn run(&self, connection: &mut MySqlConnection) -> Result<Written, Failure> {
        loop {
            let looked = look(connection, self.key(), self.format()).await?;
            mark!("mysql.leased.change.read");
            let Some(Loaded { mut row, now, stamp }) = looked else { return Ok(Written::Gone) };
            let done = match self.on_row(&mut row, now) {
                Ended::Changed => replace(connection, stamp, &row).await?,
                Ended::Removed => remove(connection, stamp).await?,
                Ended::Already => true,
                Ended::Fenced => return Ok(Written::Fenced(row.record(now))),
            };
            if done {
                mark!("mysql.leased.change.answered");
                return Ok(Written::Done);
            }
        }
    }
}

/// Reads a record.
pub(super) struct Read<'a>(pub(super) &'a Key);

impl Call for Read<'_> {
    type Answer = Option<Record>;

    async fn run(&self, connection: &mut MySqlConnection) -> Result<Option<Record>, Failure> {
        let looked = look(connection, self.0, FORMAT).await?;
        Ok(looked.map(|Loaded { row, now, .. }| row.record(now)))
    }
}

/// Reads a row, unless it is over.
async fn look(
    connection: &mut MySqlConnection,
    key: &Key,
    format: u16,
) -> Result<Option<Loaded>, Failure> {
    let Some(loaded) = load(connection, key).await? else { return Ok(None) };
    let kept = found(Some(&loaded.row), format, loaded.now)?.is_some();
    Ok(kept.then_some(loaded))
}

/// Extends leases.
pub(super) struct Renew<'a>(pub(super) &'a [Renewal]);

/// Many rows, by a list of keys and of what else a statement says of each. The list leads the
/// server to each row by its key: it must not look through the others, which may be locked for as
/// long as somebody's transaction.
macro_rules! listed {
    () => {
        "JSON_TABLE(?, '$[*]' COLUMNS (
             record_key CHAR(64) PATH '$[0]',
             token CHAR(32) PATH '$[1]',
             lease BIGINT PATH '$[2]')) AS listed
         STRAIGHT_JOIN idem_records AS existing FORCE INDEX (PRIMARY)
             ON existing.record_key = UNHEX(listed.record_key)"
    };
}

/// A list of keys for [`listed!`], each with what else is to be said of it.
pub(super) fn list(entries: impl Iterator<Item = (Key, String)>) -> String {
    let mut list = String::from("[");
    for (key, rest) in entries {
        let separator = if list.len() > 1 { "," } else { "" };
        // Writing to a string cannot fail.
        let _ = write!(list, "{separator}[\"{}\"{rest}]", hex(key.as_bytes()));
    }
    list.push(']');
    list
}

fn hex(bytes: &[u8]) -> String {
    let mut hex = String::with_capacity(2 * bytes.len());
    many::push_hex(&mut hex, bytes);
    hex
}

/// Which of the listed rows are held under the token that is listed with them.
macro_rules! held {
    () => {
        concat!(
            "existing.token = UNHEX(listed.token) AND state = 1 AND format BETWEEN 1 AND ?
             AND kept_until > ",
            now!()
        )
    };
}

impl Call for Renew<'_> {
    type Answer = Vec<bool>;

    /// One statement; a second one says which are held, if not all are.
    async fn run(&self, connection: &mut MySqlConnection) -> Result<Vec<bool>, Failure> {
        // Each claim once and all in order, so that no two calls wait for each other.
        let mut leases = BTreeMap::new();
        for renewal in self.0 {
            let claim = (*renewal.key.as_bytes(), *renewal.token.as_bytes());
            let lease: &mut Millis = leases.entry(claim).or_default();
            *lease = after(0, renewal.lease).max(*lease);
        }
        let list = list(leases.iter().map(|((key, token), lease)| {
            (Key::from_bytes(*key), format!(",\"{}\",{lease}", hex(token)))
        }));
        let renewed = sqlx::query(concat!(
            "UPDATE ",
            listed!(),
            " SET
                 lease_end = GREATEST(lease_end, ",
            from_now!("listed.lease"),
            "),
                 valid_until = IF(flags & 2, valid_until, GREATEST(valid_until, ",
            from_now!("listed.lease"),
            ")),
                 kept_until = GREATEST(kept_until, ",
            from_now!("listed.lease"),
            "),
                 version = version + 1
             WHERE ",
            held!()
        ))
        .bind(&list)
        .bind(FORMAT)
        .execute(&mut *connection)
        .await?;
        if renewed.rows_affected() == leases.len() as u64 {
            return Ok(vec![true; self.0.len()]);
        }
        let rows = sqlx::query(concat!(
            "SELECT existing.record_key, existing.token FROM ",
            listed!(),
            " WHERE ",
            held!()
        ))
        .bind(&list)
        .bind(FORMAT)
        .fetch_all(connection)
        .await?;
        let held: Vec<_> = rows.iter().flat_map(claim_of).collect();
        let answer = self.0.iter().map(|renewal| held.contains(&(renewal.key, renewal.token)));
        Ok(answer.collect())
    }
}

/// Removes some rows that are over.
pub(super) struct Sweep(pub(super) usize);

/// What a sweep came to.
pub(super) struct Swept {
    /// How many rows it removed.
    pub(super) removed: usize,
    /// Whether there may be more.
    pub(super) more: bool,
}

/// Rows that are over, and that this release understands: others stay, whatever they seem to say of
/// their time.
macro_rules! over {
    () => {
        concat!(
            "kept_until <= ",
            now!(),
            " AND format BETWEEN 1 AND ? AND state <= 3 AND valid_until <= kept_until"
        )
    };
}

impl Call for Sweep {
    type Answer = Swept;

    /// One statement finds the rows, and passes over what others hold locked, for as long as a
    /// handler's transaction perhaps; another one removes them. No transaction is around the two:
    /// a process that is suspended in the middle would stop the claims of all others.
    async fn run(&self, connection: &mut MySqlConnection) -> Result<Swept, Failure> {
        let rows = sqlx::query(concat!(
            "SELECT record_key FROM idem_records FORCE INDEX (idem_records_kept_until) WHERE ",
            over!(),
            " ORDER BY kept_until LIMIT ? FOR UPDATE SKIP LOCKED"
        ))
        .bind(FORMAT)
        .bind(self.0 as u64)
        .fetch_all(&mut *connection)
        .await?;
        let mut keys: Vec<_> = rows.iter().flat_map(key_of).collect();
        keys.sort_unstable();
        let removed = sqlx::query(concat!("DELETE existing FROM ", listed!(), " WHERE ", over!()))
            .bind(list(keys.into_iter().map(|key| (key, String::new()))))
            .bind(FORMAT)
            .execute(connection)
            .await?;
        Ok(Swept { removed: count(removed.rows_affected()), more: rows.len() == self.0 })
    }
}

pub(super) fn count(rows: u64) -> usize {
    usize::try_from(rows).unwrap_or(usize::MAX)
}

pub(super) use listed;
