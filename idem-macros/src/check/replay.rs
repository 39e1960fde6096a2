//! How a replay differs from the answer that was recorded.

use syn::{ExprPath, Ident, Lit, Result};

use super::json;
use super::value::{self, error};
use crate::args::{self, Said, Term, did_you_mean, twice};
use crate::errors::Errors;

pub(crate) enum Replay {
    /// At least one of the two.
    Shape {
        status: Option<u16>,
        /// A JSON object.
        merge: Option<String>,
    },
    Function(ExprPath),
}

const EXPECTED: &str = "expected `status = 200`, `merge = { replayed: true }`, or both";

pub(super) fn replay(said: &Said<args::Replay>, errors: &mut Errors) -> Option<Replay> {
    match &said.value {
        args::Replay::Members(members) => shape(&said.key, members, errors),
        args::Replay::Function(term) => {
            errors.keep(function(&said.key, term)).map(Replay::Function)
        }
    }
}

fn function(key: &Ident, term: &Term) -> Result<ExprPath> {
    match term {
        Term::Tuple(..) | Term::Call(_) | Term::Named(..) | Term::Braces(_) => {
            error(term, "write `replay(status = 200, merge = { replayed: true })`, without `=`")
        }
        _ => value::function(key, term, "fn(Response<Bytes>) -> Response<Bytes>"),
    }
}

fn shape(key: &Ident, members: &[Term], errors: &mut Errors) -> Option<Replay> {
    if members.is_empty() {
        errors.at(key, format!("`replay()` changes nothing: {EXPECTED}"));
        return None;
    }
    let (mut status, mut merge) = (None, None);
    for member in members {
        let (slot, word, value) = match member {
            Term::Named(word, value) if word == "status" => (&mut status, word, value),
            Term::Named(word, value) if word == "merge" => (&mut merge, word, value),
            _ => {
                errors.push(not_a_member(member));
                continue;
            }
        };
        if slot.is_some() {
            errors.push(twice(word));
        } else {
            *slot = Some(value);
        }
    }

    let number = status.and_then(|term| errors.keep(self::status(term)));
    let bodiless = number.filter(|number| matches!(number, 204 | 205 | 304));
    if let (Some(term), Some(_), Some(number)) = (status, merge, bodiless) {
        errors.at(
            term,
            format!(
                "a {number} response has no body to merge members into: leave out `merge`, or choose another status"
            ),
        );
    }
    let merge = merge.and_then(|term| self::merge(term, errors));
    Some(Replay::Shape { status: number, merge })
}

fn not_a_member(term: &Term) -> syn::Error {
    const WORDS: [&str; 2] = ["status", "merge"];
    let (at, message) = match term {
        Term::Word(word) | Term::Call(args::Call { word, .. }) if word == "status" => {
            (word, "`status` needs a value, as in `status = 200`".to_owned())
        }
        Term::Word(word) | Term::Call(args::Call { word, .. }) if word == "merge" => {
            (word, "`merge` needs a value, as in `merge = { replayed: true }`".to_owned())
        }
        Term::Named(word, _) | Term::Word(word) => {
            let hint = did_you_mean(&word.to_string(), &WORDS);
            (word, format!("`replay(..)` has no `{word}`: {EXPECTED}{hint}"))
        }
        _ => {
            let message = format!(
                "`replay(..)` changes parts of the recorded answer: {EXPECTED}; for anything else write `replay = path`"
            );
            return syn::Error::new_spanned(term, message);
        }
    };
    syn::Error::new_spanned(at, message)
}

/// The status of a response that is one by itself.
fn status(term: &Term) -> Result<u16> {
    let Term::Literal(Lit::Int(literal)) = term else {
        return error(term, "`status` takes a number, as in `status = 200`");
    };
    match literal.base10_parse() {
        Ok(status @ 200..=599) => Ok(status),
        Ok(status @ 100..=199) => error(
            literal,
            format!("a {status} response only announces another: a status is from 200 to 599"),
        ),
        _ => error(literal, "not the status of a response: a status is from 200 to 599"),
    }
}

fn merge(term: &Term, errors: &mut Errors) -> Option<String> {
    let Term::Braces(braces) = term else {
        errors.at(
            term,
            "`merge` takes a JSON object, as in `merge = { replayed: true }`; for computed members write `replay = path`",
        );
        return None;
    };
    if braces.stream().is_empty() {
        errors.at(braces, "an empty object merges nothing: leave out `merge`");
        return None;
    }
    Some(json::object(braces, errors))
}
