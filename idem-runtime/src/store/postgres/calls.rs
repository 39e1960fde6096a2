//! The statements: one for each call, which decides and writes in one step. A claim on a record that
//! is there and free to be taken needs a second one ([`Claim::take`]), so that those that are the
//! most, on fresh keys and on keys that are taken, do not pay for it.
//!
//! What they decide is what [`row`](crate::store::row) says for the embedded stores, and the laws
//! hold both to the same. They have a common shape. `asked` is what the caller brings, with the
//! server's time in it, which is taken once a statement. Each row is looked at before it is touched,
//! without a lock: whoever is refused writes nothing. The conditions of an UPDATE are all on the row
//! itself, since PostgreSQL checks them again on its newest version if somebody was faster. What the
//! statement tells of a refusal, however, is the row of its snapshot; where the two disagree,
//! somebody was faster, and the call is made again ([`Call::once`] answers `None`).

use std::collections::{BTreeMap, HashSet};

use sqlx::{
    PgConnection, Postgres, Row as _,
    postgres::{PgArguments, PgRow},
    query::Query,
};

use super::rows::{bytes, decode, now, record_of};
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

impl Call for Claim {
    type Answer = Claimed;

    async fn once(&self, session: &mut Session<'_>) -> Result<Option<Claimed>, Fault> {
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
             ), seen AS MATERIALIZED (
                 SELECT r.* FROM asked JOIN idem_records AS r ON r.key = asked.key
             ), made AS (
                 INSERT INTO idem_records (
                     key, scope, operation, operation_id, state, scheme, fingerprint, token,
                     attempt, lease_end, valid_until, kept_until, created, checkpoint, format,
                     flags, payload)
                 SELECT key, scope, operation, operation_id, 1, scheme, fingerprint, token,
                        1, lease_end, greatest(ttl_end, lease_end), greatest(ttl_end, lease_end),
                        ms, 0, format, 0, ''
                 FROM asked
                 WHERE NOT issued_only AND NOT EXISTS (SELECT FROM seen)
                 ON CONFLICT (key) DO NOTHING
                 RETURNING *
             )
             SELECT granted, (SELECT ms FROM asked) AS ms, key, scope, operation, operation_id,
                    state, scheme, fingerprint, token, attempt, lease_end, valid_until, kept_until,
                    created, format, flags, payload
             FROM (SELECT true AS granted, * FROM made
                   UNION ALL SELECT false, * FROM seen) AS r",
        );
        let query = self.bind_to(query);
        let Some(row) = session.row(query).await? else {
            // Nothing was there. What a claim that may make a record met nevertheless is younger
            // than its snapshot.
            return Ok(self.issued_only.then_some(Claimed::Unknown));
        };
        let (now, record) = (now(&row)?, decode(&row)?);
        if row.try_get("granted")? {
            return Ok(Some(Claimed::Granted(record.record(now))));
        }
        let Some(row) = found(Some(&record), self.format, now)? else {
            // The record is over, and makes room for a fresh one.
            return match self.issued_only {
                true => Ok(Some(Claimed::Unknown)),
                false => self.take(session).await,
            };
        };
        let record = row.record(now);
        let asked = self.asked(record.fingerprint == self.fingerprint);
        if !row.is_held_by(self.token) && decide(record.seen(), asked) != Decision::Run {
            return Ok(Some(Claimed::Found(record)));
        }
        self.take(session).await
    }
}

impl Claim {
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
        let Some(row) = session.row(self.bind_to(query)).await? else { return Ok(None) };
        Ok(Some(Claimed::Granted(decode(&row)?.record(now(&row)?))))
    }

    fn bind_to<'q>(
        &'q self,
        query: Query<'q, Postgres, PgArguments>,
    ) -> Query<'q, Postgres, PgArguments> {
        query
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
            .bind(i32::from(self.format))
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
        let query = sqlx::query(
            "WITH asked AS MATERIALIZED (
                 SELECT ms, $1::bytea AS key, $2::bytea AS token,
                        ms + least($3::bigint, 9223372036854775807 - ms) AS ttl_end,
                        $4::integer AS flags, $5::bytea AS payload, $6::integer AS format
                 FROM (SELECT floor(extract(epoch FROM clock_timestamp()) * 1000)::bigint AS ms)
                      AS now
             ), done AS (
                 UPDATE idem_records AS r
                 SET state = 3, lease_end = a.ms,
                     valid_until = CASE WHEN r.flags & 2 = 2 THEN r.valid_until ELSE a.ttl_end END,
                     kept_until = CASE WHEN r.flags & 2 = 2 THEN r.kept_until ELSE a.ttl_end END,
                     format = a.format, flags = r.flags | a.flags, payload = a.payload
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
        .bind(span(self.ttl))
        .bind(i32::from(self.flags.bits()))
        .bind(&self.payload[..])
        .bind(i32::from(self.format));
        let already = |row: &Row| row.state == State::Completed && row.token == self.token;
        let held = |row: &Row| row.is_held_by(self.token);
        written(session.row(query).await?, self.format, already, held)
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
        let query = sqlx::query(
            "SELECT ms, key, scope, operation, operation_id, state, scheme, fingerprint, token,
                    attempt, lease_end, valid_until, kept_until, created, format, flags, payload
             FROM idem_records,
                  (SELECT floor(extract(epoch FROM clock_timestamp()) * 1000)::bigint AS ms) AS now
             WHERE key = $1",
        )
        .bind(self.as_bytes());
        record_of(session.row(query).await?).map(Some)
    }
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
    let (now, row) = (now(&row)?, decode(&row)?);
    Ok(match found(Some(&row), format, now)? {
        None => Some(Written::Gone),
        Some(row) if already(row) => Some(Written::Done),
        Some(row) if held(row) => None,
        Some(row) => Some(Written::Fenced(row.record(now))),
    })
}
