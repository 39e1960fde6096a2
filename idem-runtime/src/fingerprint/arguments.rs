//! Fingerprints of plain functions: what makes two calls "the same call".
//!
//! A function's arguments exist only as expressions in its attribute, so the scheme names them: a
//! record is compared in the arguments that it was made with, as long as the attribute still has
//! them. One that was renamed or left out cannot be compared any more, which is neither a match nor
//! a mismatch.
//!
//! ```text
//! scheme    = "function/1" { " " argument, as it is written, percent-encoded }
//! digest of = bytes("idem-fingerprint/1") bytes(scheme) list(function's name, if the space is named)
//!             { digest of the argument as a JSON value }
//! ```

use std::borrow::Cow;

use percent_encoding::{percent_decode_str, utf8_percent_encode};

use super::{RESERVED, Scheme, TAG};
use crate::{
    key::{Digester, Values, put_bytes},
    record::Fingerprint,
};

const FUNCTION: &str = "function/1";

/// Whether a record's scheme is one of plain functions.
pub(crate) fn is_of_function(scheme: &str) -> bool {
    scheme.split(' ').next() == Some(FUNCTION)
}

/// The parts of a call that its fingerprint covers.
#[derive(Clone, Debug)]
pub(crate) struct CallSubject {
    /// Given where the space is named: the key alone does not say which function it is.
    pub(crate) name: Option<&'static str>,
    /// Each by its expression, with the digest of its JSON.
    pub(crate) arguments: Vec<(&'static str, [u8; 32])>,
}

/// Why a call has no fingerprint under a scheme.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Incomparable {
    /// What was recorded under it is no call of this kind.
    Other,
    /// It names arguments that the function no longer has, or is of a newer release.
    Unknown,
}

impl CallSubject {
    /// The fingerprint of the call.
    pub(crate) fn fingerprint(&self, digester: &Digester) -> Fingerprint {
        if self.name.is_none() && self.arguments.is_empty() {
            return Fingerprint::NONE;
        }
        let mut scheme = FUNCTION.to_owned();
        for (argument, _) in &self.arguments {
            scheme.push(' ');
            scheme.extend(utf8_percent_encode(argument, RESERVED));
        }
        self.digest(scheme, self.arguments.iter().map(|(_, digest)| digest), digester)
    }

    /// The fingerprint under the scheme of a record.
    pub(crate) fn under_scheme(
        &self,
        scheme: &str,
        digester: &Digester,
    ) -> Result<Fingerprint, Incomparable> {
        // Where the space is named, whatever was recorded without a name was none of a function's.
        if scheme == Fingerprint::NONE.scheme && self.name.is_none() {
            return Ok(Fingerprint::NONE);
        }
        if !is_of_function(scheme) {
            let of_requests = Scheme::parse(scheme).is_some();
            return Err(if of_requests { Incomparable::Other } else { Incomparable::Unknown });
        }
        let digests: Option<Vec<_>> = scheme
            .split(' ')
            .skip(1)
            .map(|word| {
                let argument = percent_decode_str(word).decode_utf8().ok()?;
                self.arguments.iter().find(|(known, _)| *known == argument)
            })
            .map(|found| found.map(|(_, digest)| digest))
            .collect();
        let digests = digests.ok_or(Incomparable::Unknown)?;
        Ok(self.digest(scheme.to_owned(), digests.into_iter(), digester))
    }

    fn digest<'d>(
        &self,
        scheme: String,
        arguments: impl Iterator<Item = &'d [u8; 32]>,
        digester: &Digester,
    ) -> Fingerprint {
        let mut bytes = Vec::with_capacity(256);
        put_bytes(&mut bytes, TAG);
        put_bytes(&mut bytes, scheme.as_bytes());
        Values::from_iter(self.name).write_to(&mut bytes);
        arguments.for_each(|digest| bytes.extend_from_slice(digest));
        Fingerprint { scheme: Cow::Owned(scheme), digest: digester.digest(&[&bytes]) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::json::canonical_digest;

    fn subject(
        name: Option<&'static str>,
        arguments: &[(&'static str, &'static str)],
    ) -> CallSubject {
        let digest = |json: &str| canonical_digest(json.as_bytes(), &[]).unwrap();
        let arguments = arguments.iter().map(|(argument, json)| (*argument, digest(json)));
        CallSubject { name, arguments: arguments.collect() }
    }

    fn of(call: &CallSubject) -> Fingerprint {
        call.fingerprint(&Digester::Plain)
    }

    #[test]
    fn a_call_is_known_by_its_key_alone_unless_something_is_said() {
        assert_eq!(of(&subject(None, &[])), Fingerprint::NONE);
        assert_ne!(of(&subject(Some("f"), &[])), of(&subject(Some("g"), &[])));
        assert_ne!(of(&subject(Some("f"), &[])).scheme, Fingerprint::NONE.scheme);
    }

    #[test]
    fn arguments_are_compared_by_what_they_mean() {
        let reference = of(&subject(None, &[("body", r#"{"a":1,"b":2}"#)]));
        assert_eq!(of(&subject(None, &[("body", r#"{"b":2.0,"a":1}"#)])), reference);
        assert_ne!(of(&subject(None, &[("body", r#"{"a":1,"b":3}"#)])), reference);
        assert_ne!(
            of(&subject(None, &[("a", "1"), ("b", "2")])),
            of(&subject(None, &[("a", "1")]))
        );
    }

    #[test]
    fn a_record_is_compared_in_the_arguments_that_it_was_made_with() {
        let (before, now) =
            (subject(None, &[("a b%", "1")]), subject(None, &[("c", "3"), ("a b%", "1")]));
        let recorded = of(&before);
        let compare = |call: &CallSubject| call.under_scheme(&recorded.scheme, &Digester::Plain);
        assert_eq!(compare(&now), Ok(recorded.clone()));
        assert_ne!(compare(&subject(None, &[("a b%", "2")])), Ok(recorded.clone()));
        assert_eq!(compare(&subject(None, &[("renamed", "1")])), Err(Incomparable::Unknown));
        assert_eq!(now.under_scheme("none/1", &Digester::Plain), Ok(Fingerprint::NONE));
        assert_eq!(now.under_scheme("function/2", &Digester::Plain), Err(Incomparable::Unknown));
    }

    #[test]
    fn what_a_handler_recorded_in_a_shared_space_is_another_thing() {
        let call = subject(Some("f"), &[]);
        for scheme in ["none/1", "request/1", "json/1 +x-a", "fields/1 /a"] {
            assert_eq!(call.under_scheme(scheme, &Digester::Plain), Err(Incomparable::Other));
        }
    }

    /// The scheme cannot change: a digest that was computed once is computed for ever.
    #[test]
    fn fingerprints_are_what_they_were() {
        let call = of(&subject(Some("deliver"), &[("amount", "100"), ("to . iban", "\"x\"")]));
        assert_eq!(call.scheme, "function/1 amount to%20.%20iban");
        let hex: String = call.digest.iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(hex, "acf8e42f2e23f7eb747e705ddef5a3306126f2c8c08c3b658391eeb4ce59207b");
    }
}
