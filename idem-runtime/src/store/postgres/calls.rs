//! The statements: one for each call, which decides and writes in one step. A claim on a record that
//! is there and free to be taken needs a second one ([`Claim::take`]), and so does a completion that
//! finds its claim gone, to say what stands there, so that those that are the most do not pay for
//! them. Claims and completions have a second form, which carries many.
//!
//! What they decide is what [`row`](crate::store::row) says for the embedded stores, and the laws
//! hold both to the same. They have a common shape. `asked` is what the caller brings, with the
//! server's time in it, which is taken once a statement. Each row is looked at before it is touched,
//! without a lock: whoever is refused writes nothing. The conditions of an UPDATE are all on the row
//! itself, since PostgreSQL checks them again on its newest version if somebody was faster. What the
//! statement tells of a refusal, however, is the row of its snapshot; where the two disagree,
//! somebody was faster, and the call is made again ([`Call::once`] answers `None`).

use std::collections::{BTreeMap, HashMap, HashSet};

use sqlx::{
    PgConnection, Postgres, Row as _,
    postgres::{PgArguments, PgRow},
    query::Query,
};

use super::{
    is_conflict,
    rows::{bytes, decode, now, record_of},
};
use crate::{
    decision::{Decision, OnUnknown, decide},
    key::{Key, Token},
    record::{FORMAT, Fingerprint, Flags, Record, State, Ttl},
    store::{
        Checkpoint, Claim, Claimed, Completion, Issue, Renewal, StoreErrorKind, Written,
        clock::end_of,
        row::{Row, found},
    },
};

/// A call of the store.
pub(super) trait Call: Sync {
    type Answer: Send;

    /// Makes it. `None` says that somebody else changed the row in the same moment, so that the
    /// statement could neither do it nor say why not.
    fn once(
        &self,
        session: &mut Session<'_>,
    ) -> impl Future<Output = Result<Option<Self::Answer>, Fault>> + Send;
}

/// Why a call has failed.
#[derive(Debug)]
pub(super) enum Fault {
    /// The database has.
    Database(sqlx::Error),
    /// The record cannot be used.
    Record(StoreErrorKind),
}

impl From<sqlx::Error> for Fault {
    fn from(error: sqlx::Error) -> Self {
        Self::Database(error)
    }
}

impl From<StoreErrorKind> for Fault {
    fn from(kind: StoreErrorKind) -> Self {
        Self::Record(kind)
    }
}

/// A connection, and how to use it.
pub(super) struct Session<'c> {
    pub(super) connection: &'c mut PgConnection,
    /// Whether it may keep prepared statements.
    pub(super) prepares: bool,
}

impl Session<'_> {
    /// All rows of a statement that is a rare one: it is planned anew each time, for the table as it
    /// has become.
    pub(super) async fn rows(
        &mut self,
        query: Query<'_, Postgres, PgArguments>,
    ) -> Result<Vec<PgRow>, sqlx::Error> {
        mark!("postgres.leased.rows.before");
        let rows = query.persistent(false).fetch_all(&mut *self.connection).await;
        mark!("postgres.leased.rows.answered");
        rows
    }

    /// How many rows a statement changed that only changes rows.
    pub(super) async fn changes(
        &mut self,
        query: Query<'_, Postgres, PgArguments>,
    ) -> Result<u64, sqlx::Error> {
        mark!("postgres.leased.change.before");
        let changed = query.persistent(self.prepares).execute(&mut *self.connection).await;
        mark!("postgres.leased.change.answered");
        changed.map(|changed| changed.rows_affected())
    }

    /// The rows of a statement that carries many calls; nothing if it was in others' way, so that
    /// each call is better made by itself.
    pub(super) async fn together(
        &mut self,
        query: Query<'_, Postgres, PgArguments>,
    ) -> Result<Option<Vec<PgRow>>, sqlx::Error> {
        mark!("postgres.leased.together.before");
        let rows = query.persistent(self.prepares).fetch_all(&mut *self.connection).await;
        mark!("postgres.leased.together.answered");
        match rows {
            Err(error) if is_conflict(&error) => Ok(None),
            rows => rows.map(Some),
        }
    }

    /// The row of a statement that has one at the most.
    pub(super) async fn row(
        &mut self,
        query: Query<'_, Postgres, PgArguments>,
    ) -> Result<Option<PgRow>, sqlx::Error> {
        mark!("postgres.row.before");
        let row = query.persistent(self.prepares).fetch_optional(&mut *self.connection).await;
        mark!("postgres.row.answered");
        row
    }
}

/// What time it is for a statement, taken once: a row of one column, `ms`.
macro_rules! now {
    () => {
        "(SELECT floor(extract(epoch FROM clock_timestamp()) * 1000)::bigint AS ms OFFSET 0) AS now"
    };
}

/// The columns of a fresh record.
macro_rules! columns {
    () => {
        "key, scope, operation, operation_id, state, scheme, fingerprint, token, attempt, \
         lease_end, valid_until, kept_until, created, checkpoint, format, flags, payload"
    };
}

/// What a completion sets.
macro_rules! completed {
    () => {
        "state = 3, lease_end = ms, \
         valid_until = CASE WHEN r.flags & 2 = 2 THEN r.valid_until \
                            ELSE ms + least(a.ttl, 9223372036854775807 - ms) END, \
         kept_until = CASE WHEN r.flags & 2 = 2 THEN r.kept_until \
                           ELSE ms + least(a.ttl, 9223372036854775807 - ms) END, \
         format = a.format, flags = r.flags | a.flags, payload = a.payload"
    };
}

/// On which record.
macro_rules! is_held {
    () => {
        "r.key = a.key AND r.format <= a.format AND r.kept_until > ms AND r.state = 1 \
         AND r.token = a.token"
    };
}

impl Call for Claim {
    type Answer = Claimed;

    /// One statement where the key has no row; a second one reads the row if it has. To ask for
    /// both at once costs the database twice the time of the first one alone.
    async fn once(&self, session: &mut Session<'_>) -> Result<Option<Claimed>, Fault> {
        if !self.issued_only && self.is_made(session).await? {
            return Ok(Some(self.made()));
        }
        let Some(row) = session.row(read(&self.key)).await? else {
            // Unless it takes an issued key, it was removed in between.
            return Ok(self.issued_only.then_some(Claimed::Unknown));
        };
        match self.judge(&row)? {
            Some(claimed) => Ok(Some(claimed)),
            None => self.take(session).await,
        }
    }
}

impl Call for [Claim] {
    /// Nothing for a claim that is to be made by itself: its key's record is free to be taken, was
    /// made in the same moment, or cannot be read.
    type Answer = Vec<Option<Claimed>>;

    async fn once(&self, session: &mut Session<'_>) -> Result<Option<Vec<Option<Claimed>>>, Fault> {
        let may_make: Vec<&Claim> = self.iter().filter(|claim| !claim.issued_only).collect();
        let query = sqlx::query(concat!(
            "WITH made AS (
                 INSERT INTO idem_records (",
            columns!(),
            ")
                 SELECT key, scope, operation, operation_id, 1, scheme, fingerprint, token, 1,
                        lease_end, greatest(ttl_end, lease_end), greatest(ttl_end, lease_end), ms,
                        0, format, 0, ''
                 FROM (SELECT *, ms + least(lease, 9223372036854775807 - ms) AS lease_end,
                              ms + least(ttl, 9223372036854775807 - ms) AS ttl_end
                       FROM unnest(
                           $1::bytea[], $2::bytea[], $3::text[], $4::bytea[], $5::text[],
                           $6::bytea[], $7::bytea[], $8::bigint[], $9::bigint[], $10::integer[])
                           AS claim (key, scope, operation, operation_id, scheme, fingerprint,
                                     token, lease, ttl, format), ",
            now!(),
            ") AS asked
                 ORDER BY key
                 ON CONFLICT (key) DO NOTHING
                 RETURNING key
             )
             SELECT string_agg(key, '') AS keys FROM made"
        ))
        .bind(each(may_make.iter().copied(), |claim| &claim.key.as_bytes()[..]))
        .bind(each(may_make.iter().copied(), |claim| &claim.scope.as_bytes()[..]))
        .bind(each(may_make.iter().copied(), |claim| &*claim.operation))
        .bind(each(may_make.iter().copied(), |claim| &claim.operation_id.as_bytes()[..]))
        .bind(each(may_make.iter().copied(), |claim| &*claim.fingerprint.scheme))
        .bind(each(may_make.iter().copied(), |claim| &claim.fingerprint.digest[..]))
        .bind(each(may_make.iter().copied(), |claim| &claim.token.as_bytes()[..]))
        .bind(each(may_make.iter().copied(), |claim| span(Ttl::For(claim.lease))))
        .bind(each(may_make.iter().copied(), |claim| span(claim.ttl)))
        .bind(each(may_make.iter().copied(), |claim| i32::from(claim.format)));
        let Some(rows) = session.together(query).await? else {
            return Ok(Some(self.iter().map(|_| None).collect()));
        };
        let made = keys(&rows)?;
        let there: Vec<_> = self.iter().filter(|claim| !made.contains(&claim.key)).collect();
        let mut found = HashMap::with_capacity(there.len());
        if !there.is_empty() {
            let query = sqlx::query(concat!(
                "SELECT ms, key, scope, operation, operation_id, state, scheme, fingerprint, token,
                        attempt, lease_end, valid_until, kept_until, created, format, flags, payload
                 FROM unnest($1::bytea[]) AS asked (key) JOIN idem_records AS r USING (key), ",
                now!()
            ))
            .bind(each(there.iter().copied(), |claim| &claim.key.as_bytes()[..]));
            for row in session.together(query).await?.unwrap_or_default() {
                found.insert(Key::from_bytes(bytes(&row, "key")?), row);
            }
        }
        let answer = |claim: &Claim| match found.get(&claim.key) {
            _ if made.contains(&claim.key) => Some(claim.made()),
            // A record that cannot be read is the affair of its own claim.
            Some(row) => claim.judge(row).unwrap_or_default(),
            None => claim.issued_only.then_some(Claimed::Unknown),
        };
        Ok(Some(self.iter().map(answer).collect()))
    }
}

/// The keys that a statement carrying many calls names in its one row.
fn keys(rows: &[PgRow]) -> Result<HashSet<Key>, Fault> {
    let mut keys = HashSet::new();
    for row in rows {
        let named: Option<&[u8]> = row.try_get("keys")?;
        keys.extend(named.unwrap_or_default().as_chunks().0.iter().copied().map(Key::from_bytes));
    }
    Ok(keys)
}

/// A column of many calls.
fn each<'c, C: 'c, T>(
    calls: impl IntoIterator<Item = &'c C>,
    column: impl Fn(&'c C) -> T,
) -> Vec<T> {
    calls.into_iter().map(column).collect()
}

impl Claim {
    /// Makes a record, if the key has none.
    async fn is_made(&self, session: &mut Session<'_>) -> Result<bool, Fault> {
        let query = sqlx::query(concat!(
            "INSERT INTO idem_records (",
            columns!(),
            ")
             SELECT $1, $2, $3, $4, 1, $5, $6, $7, 1, lease_end, greatest(ttl_end, lease_end),
                    greatest(ttl_end, lease_end), ms, 0, $10, 0, ''
             FROM (SELECT ms, ms + least($8::bigint, 9223372036854775807 - ms) AS lease_end,
                          ms + least($9::bigint, 9223372036854775807 - ms) AS ttl_end
                   FROM ",
            now!(),
            ") AS asked
             ON CONFLICT (key) DO NOTHING"
        ))
        .bind(self.key.as_bytes())
        .bind(self.scope.as_bytes())
        .bind(&*self.operation)
        .bind(self.operation_id.as_bytes())
        .bind(&*self.fingerprint.scheme)
        .bind(self.fingerprint.digest)
        .bind(self.token.as_bytes())
        .bind(span(Ttl::For(self.lease)))
        .bind(span(self.ttl))
        .bind(i32::from(self.format));
        Ok(session.changes(query).await? > 0)
    }

    /// The answer where it has made a record: a fresh one, from an instant of its own.
    fn made(&self) -> Claimed {
        Claimed::Granted(Row::fresh(self, 0).record(0))
    }

    /// The answer that a record gives which is there; nothing if it is free to be taken.
    fn judge(&self, row: &PgRow) -> Result<Option<Claimed>, Fault> {
        let (now, row) = (now(row)?, decode(row)?);
        let Some(row) = found(Some(&row), self.format, now)? else {
            // It is over, and makes room for a fresh one.
            return Ok(self.issued_only.then_some(Claimed::Unknown));
        };
        let record = row.record(now);
        let asked = self.asked(record.fingerprint == self.fingerprint);
        if row.is_held_by(self.token) || decide(record.seen(), asked) == Decision::Run {
            return Ok(None);
        }
        Ok(Some(Claimed::Found(record)))
    }

    /// Claims a record that is there, unless somebody was faster: it decides by itself, whatever was
    /// seen before.
    async fn take(&self, session: &mut Session<'_>) -> Result<Option<Claimed>, Fault> {
        let query = sqlx::query(
            "WITH asked AS MATERIALIZED (
                 SELECT ms, $1::bytea AS key, $2::bytea AS scope, $3::text AS operation,
                        $4::bytea AS operation_id, $5::text AS scheme, $6::bytea AS fingerprint,
                        $7::bytea AS token,
                        ms + least($8::bigint, 9223372036854775807 - ms) AS lease_end,
                        ms + least($9::bigint, 9223372036854775807 - ms) AS ttl_end,
                        $10::boolean AS issued_only, $11::boolean AS reruns, $12::integer AS format
                 FROM (SELECT floor(extract(epoch FROM clock_timestamp()) * 1000)::bigint AS ms)
                      AS now
             )
             UPDATE idem_records AS r
             SET (scope, operation, operation_id, scheme, fingerprint, state, token, attempt,
                  lease_end, valid_until, kept_until, created, checkpoint, format, flags,
                  payload) = (
                 SELECT CASE WHEN opens THEN a.scope ELSE r.scope END,
                        CASE WHEN opens THEN a.operation ELSE r.operation END,
                        CASE WHEN opens THEN a.operation_id ELSE r.operation_id END,
                        CASE WHEN opens THEN a.scheme ELSE r.scheme END,
                        CASE WHEN opens THEN a.fingerprint ELSE r.fingerprint END,
                        1, a.token,
                        CASE WHEN over THEN 1 WHEN held THEN r.attempt
                             ELSE least(r.attempt, 2147483646) + 1 END,
                        lease_end,
                        -- The validity of an issued key stays: a run that began in time may
                        -- finish after it.
                        CASE WHEN issued THEN r.valid_until
                             ELSE greatest(a.ttl_end, lease_end) END,
                        greatest(CASE WHEN issued THEN r.kept_until ELSE a.ttl_end END,
                                 lease_end),
                        CASE WHEN over THEN a.ms ELSE r.created END,
                        CASE WHEN held THEN r.checkpoint ELSE 0 END,
                        -- The format is the payload's.
                        CASE WHEN over THEN a.format ELSE r.format END,
                        CASE WHEN over THEN 0 ELSE r.flags END,
                        CASE WHEN over THEN '' ELSE r.payload END
                 FROM (SELECT over, held, opens, NOT over AND r.flags & 2 = 2 AS issued,
                              CASE WHEN held THEN greatest(r.lease_end, a.lease_end)
                                   ELSE a.lease_end END AS lease_end
                       FROM (SELECT r.kept_until <= a.ms AS over,
                                    r.kept_until > a.ms AND r.state = 1 AND r.token = a.token
                                        AS held,
                                    -- The claimant says what the operation is.
                                    r.kept_until <= a.ms OR r.state = 0 AS opens) AS f) AS f)
             FROM asked AS a
             WHERE r.key = a.key AND r.format <= a.format
               AND CASE WHEN r.state NOT BETWEEN 0 AND 3 THEN false
                        WHEN r.kept_until <= a.ms THEN NOT a.issued_only
                        -- The answer to the same claim was lost.
                        WHEN r.state = 1 AND r.token = a.token THEN true
                        WHEN r.valid_until <= a.ms THEN false
                        WHEN r.state = 0 THEN true
                        WHEN r.state = 2 OR r.state = 1 AND r.lease_end <= a.ms
                            THEN a.reruns AND r.scheme = a.scheme
                                          AND r.fingerprint = a.fingerprint
                        ELSE false END
             RETURNING a.ms, r.key, r.scope, r.operation, r.operation_id, r.state, r.scheme,
                       r.fingerprint, r.token, r.attempt, r.lease_end, r.valid_until, r.kept_until,
                       r.created, r.format, r.flags, r.payload",
        );
        let query = query
            .bind(self.key.as_bytes())
            .bind(self.scope.as_bytes())
            .bind(&*self.operation)
            .bind(self.operation_id.as_bytes())
            .bind(&*self.fingerprint.scheme)
            .bind(self.fingerprint.digest)
            .bind(self.token.as_bytes())
            .bind(span(Ttl::For(self.lease)))
            .bind(span(self.ttl))
            .bind(self.issued_only)
            .bind(self.on_unknown == OnUnknown::Rerun)
            .bind(i32::from(self.format));
        let Some(row) = session.row(query).await? else { return Ok(None) };
        Ok(Some(Claimed::Granted(decode(&row)?.record(now(&row)?))))
    }
}

impl Call for Issue {
    type Answer = Written;

    async fn once(&self, session: &mut Session<'_>) -> Result<Option<Written>, Fault> {
        let query = sqlx::query(
            "WITH asked AS MATERIALIZED (
                 SELECT ms, $1::bytea AS key, $2::bytea AS scope, $3::text AS operation,
                        $4::bytea AS operation_id, $5::text AS scheme, $6::bytea AS fingerprint,
                        $7::bytea AS token,
                        ms + least($8::bigint, 9223372036854775807 - ms) AS valid_until,
                        -- Never shorter than its validity.
                        ms + least(greatest($8, $9::bigint), 9223372036854775807 - ms)
                            AS kept_until,
                        $10::integer AS flags, $11::bytea AS payload, $12::integer AS format
                 FROM (SELECT floor(extract(epoch FROM clock_timestamp()) * 1000)::bigint AS ms)
                      AS now
             ), seen AS MATERIALIZED (
                 SELECT r.* FROM asked JOIN idem_records AS r ON r.key = asked.key
             ), made AS (
                 INSERT INTO idem_records (
                     key, scope, operation, operation_id, state, scheme, fingerprint, token,
                     attempt, lease_end, valid_until, kept_until, created, checkpoint, format,
                     flags, payload)
                 SELECT key, scope, operation, operation_id, 0, scheme, fingerprint, token,
                        0, ms, valid_until, kept_until, ms, 0, format, flags, payload
                 FROM asked
                 WHERE NOT EXISTS (SELECT FROM seen)
                 ON CONFLICT (key) DO NOTHING
                 RETURNING key
             ), replaced AS (
                 UPDATE idem_records AS r
                 SET scope = a.scope, operation = a.operation, operation_id = a.operation_id,
                     state = 0, scheme = a.scheme, fingerprint = a.fingerprint, token = a.token,
                     attempt = 0, lease_end = a.ms, valid_until = a.valid_until,
                     kept_until = a.kept_until, created = a.ms, checkpoint = 0, format = a.format,
                     flags = a.flags, payload = a.payload
                 FROM asked AS a
                 WHERE r.key = a.key AND r.format <= a.format AND r.state BETWEEN 0 AND 3
                   AND r.kept_until <= a.ms
                 RETURNING r.key
             ), done AS (
                 SELECT key FROM made UNION ALL SELECT key FROM replaced
             )
             SELECT EXISTS (SELECT FROM done) AS done, asked.ms, r.key, r.scope, r.operation,
                    r.operation_id, r.state, r.scheme, r.fingerprint, r.token, r.attempt,
                    r.lease_end, r.valid_until, r.kept_until, r.created, r.format, r.flags,
                    r.payload
             FROM asked LEFT JOIN seen AS r ON NOT EXISTS (SELECT FROM done)",
        )
        .bind(self.key.as_bytes())
        .bind(self.scope.as_bytes())
        .bind(&*self.operation)
        .bind(self.operation_id.as_bytes())
        .bind(&*Fingerprint::NONE.scheme)
        .bind(Fingerprint::NONE.digest)
        .bind(self.token.as_bytes())
        .bind(span(self.valid_for))
        .bind(span(self.kept_for))
        .bind(i32::from(Flags::ISSUED.bits()))
        .bind(&self.payload[..])
        .bind(i32::from(self.format));
        let already = |row: &Row| row.state == State::Issued && row.token == self.token;
        match written(session.row(query).await?, self.format, already, |_| false)? {
            // Who came in between is younger than the snapshot, or has removed the record.
            Some(Written::Gone) => Ok(None),
            answer => Ok(answer),
        }
    }
}

/// A checkpoint and its number, by which it never replaces a later one.
#[derive(Debug)]
pub(super) struct Numbered<'a> {
    pub(super) checkpoint: &'a Checkpoint,
    pub(super) number: i64,
}

impl Call for Numbered<'_> {
    type Answer = Written;

    async fn once(&self, session: &mut Session<'_>) -> Result<Option<Written>, Fault> {
        let Checkpoint { key, token, payload, format } = self.checkpoint;
        let query = sqlx::query(
            "WITH asked AS MATERIALIZED (
                 SELECT ms, $1::bytea AS key, $2::bytea AS token, $3::bigint AS number,
                        $4::bytea AS payload, $5::integer AS format
                 FROM (SELECT floor(extract(epoch FROM clock_timestamp()) * 1000)::bigint AS ms)
                      AS now
             ), done AS (
                 UPDATE idem_records AS r
                 SET checkpoint = a.number, format = a.format, payload = a.payload
                 FROM asked AS a
                 WHERE r.key = a.key AND r.format <= a.format AND r.kept_until > a.ms
                   AND r.state = 1 AND r.token = a.token AND r.checkpoint < a.number
                 RETURNING r.key
             )
             SELECT EXISTS (SELECT FROM done)
                        OR coalesce(r.format <= asked.format AND r.kept_until > asked.ms
                                    AND r.state = 1 AND r.token = asked.token
                                    AND r.checkpoint >= asked.number, false) AS done,
                    asked.ms, r.key, r.scope, r.operation, r.operation_id, r.state, r.scheme,
                    r.fingerprint, r.token, r.attempt, r.lease_end, r.valid_until, r.kept_until,
                    r.created, r.format, r.flags, r.payload
             FROM asked LEFT JOIN idem_records AS r
                        ON r.key = asked.key AND NOT EXISTS (SELECT FROM done)",
        )
        .bind(key.as_bytes())
        .bind(token.as_bytes())
        .bind(self.number)
        .bind(&payload[..])
        .bind(i32::from(*format));
        written(session.row(query).await?, *format, |_| false, |row| row.is_held_by(*token))
    }
}

impl Call for Completion {
    type Answer = Written;

    async fn once(&self, session: &mut Session<'_>) -> Result<Option<Written>, Fault> {
        let query = sqlx::query(concat!(
            "UPDATE idem_records AS r SET ",
            completed!(),
            " FROM (SELECT $1::bytea AS key, $2::bytea AS token, $3::bigint AS ttl,
                           $4::integer AS flags, $5::bytea AS payload, $6::integer AS format) AS a, ",
            now!(),
            " WHERE ",
            is_held!()
        ))
        .bind(self.key.as_bytes())
        .bind(self.token.as_bytes())
        .bind(span(self.ttl))
        .bind(i32::from(self.flags.bits()))
        .bind(&self.payload[..])
        .bind(i32::from(self.format));
        if session.changes(query).await? > 0 {
            return Ok(Some(Written::Done));
        }
        let Some(row) = session.row(read(&self.key)).await? else {
            return Ok(Some(Written::Gone));
        };
        let already = |row: &Row| row.state == State::Completed && row.token == self.token;
        refused(&row, self.format, already, |row| row.is_held_by(self.token))
    }
}

impl Call for [Completion] {
    /// Nothing for a completion that is to be made by itself, since its claim is not held.
    type Answer = Vec<Option<Written>>;

    async fn once(&self, session: &mut Session<'_>) -> Result<Option<Vec<Option<Written>>>, Fault> {
        let query = sqlx::query(concat!(
            "WITH done AS (UPDATE idem_records AS r SET ",
            completed!(),
            " FROM unnest($1::bytea[], $2::bytea[], $3::bigint[], $4::integer[], $5::bytea[],
                          $6::integer[]) AS a (key, token, ttl, flags, payload, format), ",
            now!(),
            " WHERE ",
            is_held!(),
            " RETURNING r.key) SELECT string_agg(key, '') AS keys FROM done"
        ))
        .bind(each(self, |completion| &completion.key.as_bytes()[..]))
        .bind(each(self, |completion| &completion.token.as_bytes()[..]))
        .bind(each(self, |completion| span(completion.ttl)))
        .bind(each(self, |completion| i32::from(completion.flags.bits())))
        .bind(each(self, |completion| &completion.payload[..]))
        .bind(each(self, |completion| i32::from(completion.format)));
        let done = keys(&session.together(query).await?.unwrap_or_default())?;
        let answer =
            |completion: &Completion| done.contains(&completion.key).then_some(Written::Done);
        Ok(Some(self.iter().map(answer).collect()))
    }
}

/// To give up a claim.
#[derive(Debug)]
pub(super) struct Release<'a> {
    pub(super) key: &'a Key,
    pub(super) token: &'a Token,
}

impl Call for Release<'_> {
    type Answer = Written;

    async fn once(&self, session: &mut Session<'_>) -> Result<Option<Written>, Fault> {
        let query = sqlx::query(
            "WITH asked AS MATERIALIZED (
                 SELECT ms, $1::bytea AS key, $2::bytea AS token, $3::integer AS format
                 FROM (SELECT floor(extract(epoch FROM clock_timestamp()) * 1000)::bigint AS ms)
                      AS now
             ), done AS (
                 UPDATE idem_records AS r
                 SET state = 2, lease_end = a.ms
                 FROM asked AS a
                 WHERE r.key = a.key AND r.format <= a.format AND r.kept_until > a.ms
                   AND r.state = 1 AND r.token = a.token
                 RETURNING r.key
             )
             SELECT EXISTS (SELECT FROM done) AS done, asked.ms, r.key, r.scope, r.operation,
                    r.operation_id, r.state, r.scheme, r.fingerprint, r.token, r.attempt,
                    r.lease_end, r.valid_until, r.kept_until, r.created, r.format, r.flags,
                    r.payload
             FROM asked LEFT JOIN idem_records AS r
                        ON r.key = asked.key AND NOT EXISTS (SELECT FROM done)",
        )
        .bind(self.key.as_bytes())
        .bind(self.token.as_bytes())
        .bind(i32::from(FORMAT));
        let already = |row: &Row| row.state == State::Released && row.token == *self.token;
        let held = |row: &Row| row.is_held_by(*self.token);
        written(session.row(query).await?, FORMAT, already, held)
    }
}

/// To undo a claim.
#[derive(Debug)]
pub(super) struct Forget<'a> {
    pub(super) key: &'a Key,
    pub(super) token: &'a Token,
}

impl Call for Forget<'_> {
    type Answer = Written;

    async fn once(&self, session: &mut Session<'_>) -> Result<Option<Written>, Fault> {
        let query = sqlx::query(
            "WITH asked AS MATERIALIZED (
                 SELECT ms, $1::bytea AS key, $2::bytea AS token, $3::integer AS format
                 FROM (SELECT floor(extract(epoch FROM clock_timestamp()) * 1000)::bigint AS ms)
                      AS now
             ), removed AS (
                 DELETE FROM idem_records AS r
                 USING asked AS a
                 WHERE r.key = a.key AND r.format <= a.format AND r.kept_until > a.ms
                   AND r.state = 1 AND r.token = a.token AND r.flags & 2 = 0
                 RETURNING r.key
             ), issued AS (
                 UPDATE idem_records AS r
                 SET state = 0, attempt = 0, lease_end = a.ms
                 FROM asked AS a
                 WHERE r.key = a.key AND r.format <= a.format AND r.kept_until > a.ms
                   AND r.state = 1 AND r.token = a.token AND r.flags & 2 = 2
                 RETURNING r.key
             ), done AS (
                 SELECT key FROM removed UNION ALL SELECT key FROM issued
             )
             SELECT EXISTS (SELECT FROM done) AS done, asked.ms, r.key, r.scope, r.operation,
                    r.operation_id, r.state, r.scheme, r.fingerprint, r.token, r.attempt,
                    r.lease_end, r.valid_until, r.kept_until, r.created, r.format, r.flags,
                    r.payload
             FROM asked LEFT JOIN idem_records AS r
                        ON r.key = asked.key AND NOT EXISTS (SELECT FROM done)",
        )
        .bind(self.key.as_bytes())
        .bind(self.token.as_bytes())
        .bind(i32::from(FORMAT));
        let already = |row: &Row| {
            row.state == State::Issued
                && row.token == *self.token
                && row.flags.contains(Flags::ISSUED)
        };
        let held = |row: &Row| row.is_held_by(*self.token);
        written(session.row(query).await?, FORMAT, already, held)
    }
}

impl Call for [Renewal] {
    type Answer = Vec<bool>;

    async fn once(&self, session: &mut Session<'_>) -> Result<Option<Vec<bool>>, Fault> {
        // Each claim once, and in order, so that two such statements cannot wait for each other.
        let mut longest = BTreeMap::new();
        for Renewal { key, token, lease } in self {
            let longest = longest.entry((*key.as_bytes(), *token.as_bytes())).or_default();
            *longest = span(Ttl::For(*lease)).max(*longest);
        }
        let keys: Vec<&[u8]> = longest.keys().map(|(key, _)| &key[..]).collect();
        let tokens: Vec<&[u8]> = longest.keys().map(|(_, token)| &token[..]).collect();
        let leases: Vec<i64> = longest.values().copied().collect();
        let query = sqlx::query(
            "WITH asked AS MATERIALIZED (
                 SELECT ms, key, token, ms + least(lease, 9223372036854775807 - ms) AS lease_end
                 FROM unnest($1::bytea[], $2::bytea[], $3::bigint[]) AS claim (key, token, lease),
                      (SELECT floor(extract(epoch FROM clock_timestamp()) * 1000)::bigint AS ms)
                          AS now
             )
             UPDATE idem_records AS r
             SET lease_end = greatest(r.lease_end, a.lease_end),
                 kept_until = greatest(r.kept_until, a.lease_end),
                 valid_until = CASE WHEN r.flags & 2 = 2 THEN r.valid_until
                                    ELSE greatest(r.valid_until, a.lease_end) END
             FROM asked AS a
             WHERE r.key = a.key AND r.format <= $4 AND r.kept_until > a.ms
               AND r.state = 1 AND r.token = a.token
             RETURNING r.key, r.token",
        )
        .bind(keys)
        .bind(tokens)
        .bind(leases)
        .bind(i32::from(FORMAT));
        let rows = session.rows(query).await?;
        let mut held: HashSet<([u8; 32], [u8; 16])> = HashSet::with_capacity(rows.len());
        for row in &rows {
            held.insert((bytes(row, "key")?, bytes(row, "token")?));
        }
        let is_held = |renewal: &Renewal| {
            held.contains(&(*renewal.key.as_bytes(), *renewal.token.as_bytes()))
        };
        Ok(Some(self.iter().map(is_held).collect()))
    }
}

impl Call for Key {
    type Answer = Option<Record>;

    async fn once(&self, session: &mut Session<'_>) -> Result<Option<Option<Record>>, Fault> {
        record_of(session.row(read(self)).await?).map(Some)
    }
}

/// The row of a key.
fn read(key: &Key) -> Query<'_, Postgres, PgArguments> {
    sqlx::query(concat!(
        "SELECT ms, key, scope, operation, operation_id, state, scheme, fingerprint, token,
                attempt, lease_end, valid_until, kept_until, created, format, flags, payload
         FROM idem_records, ",
        now!(),
        " WHERE key = $1"
    ))
    .bind(key.as_bytes())
}

/// To remove at most so many records that are over.
#[derive(Debug)]
pub(super) struct Sweep(pub(super) usize);

impl Call for Sweep {
    type Answer = usize;

    async fn once(&self, session: &mut Session<'_>) -> Result<Option<usize>, Fault> {
        // What somebody else is removing or claiming just now is left to them. A row that was claimed
        // a moment before is looked at again once it is locked.
        let query = sqlx::query(
            "WITH now AS MATERIALIZED (
                 SELECT floor(extract(epoch FROM clock_timestamp()) * 1000)::bigint AS ms
             )
             DELETE FROM idem_records WHERE ctid = ANY (ARRAY(
                 SELECT ctid FROM idem_records
                 WHERE bucket <= (SELECT ms >> 16 FROM now)
                   AND kept_until <= (SELECT ms FROM now)
                   AND format <= $1 AND state BETWEEN 0 AND 3
                 ORDER BY bucket
                 LIMIT $2
                 FOR UPDATE SKIP LOCKED))
             RETURNING 1",
        )
        .bind(i32::from(FORMAT))
        .bind(i64::try_from(self.0).unwrap_or(i64::MAX));
        Ok(Some(session.rows(query).await?.len()))
    }
}

/// A time to live as the statements take it: milliseconds, the largest being for ever.
fn span(ttl: Ttl) -> i64 {
    end_of(0, ttl)
}

/// The answer to what was written under a token: done, or the row of the snapshot, if there is one.
///
/// `already` says of that row whether the same was done before, `held` whether it ought to have
/// been done now.
fn written(
    row: Option<PgRow>,
    format: u16,
    already: impl Fn(&Row) -> bool,
    held: impl Fn(&Row) -> bool,
) -> Result<Option<Written>, Fault> {
    // There always is one.
    let row = row.ok_or(sqlx::Error::RowNotFound)?;
    if row.try_get("done")? {
        return Ok(Some(Written::Done));
    }
    if row.try_get::<Option<&[u8]>, _>("key")?.is_none() {
        return Ok(Some(Written::Gone));
    }
    refused(&row, format, already, held)
}

/// The answer that a row gives to what could not be written.
fn refused(
    row: &PgRow,
    format: u16,
    already: impl Fn(&Row) -> bool,
    held: impl Fn(&Row) -> bool,
) -> Result<Option<Written>, Fault> {
    let (now, row) = (now(row)?, decode(row)?);
    Ok(match found(Some(&row), format, now)? {
        None => Some(Written::Gone),
        Some(row) if already(row) => Some(Written::Done),
        Some(row) if held(row) => None,
        Some(row) => Some(Written::Fenced(row.record(now))),
    })
}
