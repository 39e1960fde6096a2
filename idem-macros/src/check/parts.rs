//! The options that name parts of a request: anchor, scope and fingerprint.

use proc_macro2::Ident;
use quote::ToTokens;
use syn::{Lit, LitStr, Result};

use super::value::{self, error};
use super::{Fingerprint, Part, Scheme, Scope};
use crate::args::{Call, Term, did_you_mean};
use crate::errors::Errors;

/// What is common to the two options that name parts of a request.
struct Role {
    option: &'static str,
    words: &'static [&'static str],
    expected: &'static str,
    example: &'static str,
    /// A name that a header could have.
    name: &'static str,
}

const ANCHOR: Role = Role {
    option: "anchor",
    words: &["header", "body_field", "path", "query", "arg"],
    expected: "expected `header(..)`, `body_field(..)`, `path(..)`, `query(..)`, `arg(..)`, a tuple of these, or the path of a constant",
    example: "header(\"Idempotency-Key\")",
    name: "Idempotency-Key",
};

const SCOPE: Role = Role {
    option: "scope",
    words: &["global", "header", "path", "query", "body_field", "arg"],
    expected: "expected `global`, `header(..)`, `path(..)`, `query(..)`, `body_field(..)`, `arg(..)`, a tuple of these, or the path of a constant",
    example: "header(\"X-Tenant\")",
    name: "X-Tenant",
};

const FUNCTION_ANCHOR: Role =
    Role { words: &["arg"], expected: "expected `arg(..)`", example: "arg(event_id)", ..ANCHOR };

const FUNCTION_SCOPE: Role = Role {
    words: &["global", "arg"],
    expected: "expected `global` or `arg(..)`",
    example: "arg(tenant)",
    ..SCOPE
};

/// What values are taken from.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Asked {
    /// A request, and the arguments of its handler.
    Request,
    /// The arguments of a plain function.
    Arguments,
}

/// Reads the options that name parts of a request.
pub(super) struct Parts<'a> {
    pub(super) asked: Asked,
    /// The words by which fields of the body are named.
    pub(super) fields: &'a mut Vec<Ident>,
    pub(super) errors: &'a mut Errors,
}

impl Parts<'_> {
    /// The parts of an anchor or a scope, in order, tuples flattened. Empty
    /// only if that is, or was caused by, a mistake.
    pub(super) fn anchor(&mut self, term: &Term) -> Vec<Part> {
        match self.asked {
            Asked::Request => self.of(&ANCHOR, term),
            Asked::Arguments => self.of(&FUNCTION_ANCHOR, term),
        }
    }

    fn of(&mut self, role: &Role, term: &Term) -> Vec<Part> {
        let mut parts = Vec::new();
        self.collect(role, term, &mut parts);
        parts
    }

    fn collect(&mut self, role: &Role, term: &Term, parts: &mut Vec<Part>) {
        match term {
            Term::Tuple(_, terms) if terms.is_empty() => {
                let Role { option, example, .. } = role;
                let message =
                    format!("`{option}` needs at least one part, as in `{option} = {example}`");
                self.errors.at(term, message);
            }
            Term::Tuple(_, terms) => {
                for term in terms {
                    self.collect(role, term, parts);
                }
            }
            Term::Arguments(word, expressions) if expressions.is_empty() => {
                let message = "`arg(..)` takes expressions over the handler's arguments, as in `arg(body.nonce)`";
                self.errors.at(word, message);
            }
            Term::Arguments(_, expressions) => {
                for expression in expressions {
                    self.add(expression, Part::Argument(expression.clone()), parts);
                }
            }
            _ => {
                let part = self.part(role, term);
                if let Some(part) = self.errors.keep(part) {
                    self.add(term, part, parts);
                }
            }
        }
    }

    fn add(&mut self, at: impl ToTokens, part: Part, parts: &mut Vec<Part>) {
        if parts.iter().any(|other| other.identity() == part.identity()) {
            self.errors.at(at, "the same part twice: it adds nothing to the key, leave it out");
        } else {
            parts.push(part);
        }
    }

    fn part(&mut self, role: &Role, term: &Term) -> Result<Part> {
        if self.asked == Asked::Arguments {
            refuse_requests(role, term)?;
        }
        if let Some(path) = value::constant(term) {
            return Ok(Part::Constant(path));
        }
        let Role { option, words, expected, example, .. } = role;
        match term {
            Term::Call(call) => self.request_part(role, call),
            Term::Word(word) if word == "global" && words.contains(&"global") => error(
                word,
                "`global` is the scope of everybody, so nothing narrows it: leave it out, or the rest",
            ),
            Term::Word(word) if words.iter().any(|known| word == known) => error(
                word,
                format!("`{word}` needs parentheses that say which, as in `{word}(..)`"),
            ),
            Term::Word(word) => {
                let hint = did_you_mean(&word.to_string(), words);
                error(word, format!("unknown {option} `{word}`: {expected}{hint}"))
            }
            Term::Literal(Lit::Str(text)) if words.contains(&&*text.value()) => {
                error(text, format!("write `{}` without quotes", text.value()))
            }
            _ => error(
                term,
                format!(
                    "`{option}` says where a value comes from, as in `{option} = {example}`: {expected}"
                ),
            ),
        }
    }

    fn request_part(&mut self, role: &Role, call: &Call) -> Result<Part> {
        let word = &call.word;
        let (name, part): (_, fn(LitStr) -> Part) = match &*word.to_string() {
            "header" => {
                let name = value::one_string(call, role.name)?;
                value::header_name(name)?;
                (name, Part::Header)
            }
            "body_field" => {
                self.fields.push(word.clone());
                let name = value::one_string(call, "message.nonce")?;
                value::field_path(name)?;
                (name, Part::BodyField)
            }
            "path" => {
                let name = value::one_string(call, "id")?;
                value::parameter_name(name)?;
                (name, Part::Path)
            }
            "query" => {
                let name = value::one_string(call, "id")?;
                value::query_name(name)?;
                (name, Part::Query)
            }
            "global" => return error(call, "`global` takes no parentheses"),
            wrong => {
                let Role { option, words, expected, .. } = role;
                let hint = did_you_mean(wrong, words);
                return error(word, format!("unknown {option} `{wrong}(..)`: {expected}{hint}"));
            }
        };
        Ok(part(name.clone()))
    }

    pub(super) fn scope(&mut self, term: &Term) -> Scope {
        match term {
            Term::Word(word) if word == "global" => Scope::Global,
            _ => Scope::Parts(match self.asked {
                Asked::Request => self.of(&SCOPE, term),
                Asked::Arguments => self.of(&FUNCTION_SCOPE, term),
            }),
        }
    }

    /// A scheme, alone or as the first of a tuple whose others are headers.
    pub(super) fn fingerprint(&mut self, term: &Term) -> Option<Fingerprint> {
        let (scheme, others) = match term {
            Term::Tuple(_, terms) => {
                match terms.split_first() {
                    Some(first_and_others) => first_and_others,
                    None => {
                        self.errors.at(term, "a fingerprint needs a scheme, as in `(request, header(\"X-Version\"))`");
                        return None;
                    }
                }
            }
            _ => (term, &[][..]),
        };
        let mut headers: Vec<LitStr> = Vec::new();
        for other in others {
            let header = fingerprint_header(other);
            let Some(header) = self.errors.keep(header) else {
                continue;
            };
            if has(&headers, &header) {
                self.errors.at(other, "the same header twice");
            } else {
                headers.push(header);
            }
        }
        let scheme = self.scheme(scheme);
        let scheme = self.errors.keep(scheme)?;
        Some(Fingerprint { scheme, headers })
    }

    fn scheme(&mut self, term: &Term) -> Result<Scheme> {
        const EXPECTED: &str = "expected `request`, `json`, `none`, `body_field(..)`, `exclude(..)` or the path of a constant";
        const WORDS: [&str; 5] = ["request", "json", "none", "body_field", "exclude"];
        if let Some(path) = value::constant(term) {
            return Ok(Scheme::Constant(path));
        }
        let (word, call) = match term {
            Term::Word(word) => (word, None),
            Term::Call(call) => (&call.word, Some(call)),
            Term::Literal(Lit::Str(text)) if WORDS.contains(&&*text.value()) => {
                return error(text, format!("write `{}` without quotes", text.value()));
            }
            _ => return error(term, format!("`fingerprint` takes a scheme: {EXPECTED}")),
        };
        match (&*word.to_string(), call) {
            ("request", None) => Ok(Scheme::Request),
            ("json", None) => Ok(Scheme::Json),
            ("none", None) => Ok(Scheme::None),
            ("body_field", Some(call)) => self.body_fields(call).map(Scheme::Fields),
            ("exclude", Some(call)) => self.body_fields(call).map(Scheme::Exclude),
            ("request" | "json" | "none", Some(_)) => {
                error(term, format!("`{word}` takes no parentheses"))
            }
            ("body_field" | "exclude", None) => error(
                word,
                format!("`{word}` needs parentheses that say which, as in `{word}(\"a\", \"b\")`"),
            ),
            ("header", Some(_)) => error(
                word,
                "headers are added to a scheme, as in `(request, header(\"X-Version\"))`",
            ),
            (wrong, _) => {
                let hint = did_you_mean(wrong, &WORDS);
                error(word, format!("unknown fingerprint `{wrong}`: {EXPECTED}{hint}"))
            }
        }
    }

    fn body_fields(&mut self, call: &Call) -> Result<Vec<LitStr>> {
        self.fields.push(call.word.clone());
        let paths = value::strings(call)?;
        for (index, path) in paths.iter().enumerate() {
            let valid = value::field_path(path);
            self.errors.keep(valid);
            if has(&paths[..index], path) {
                self.errors.at(path, "the same field twice");
            }
        }
        Ok(paths)
    }
}

/// A plain function has no request.
fn refuse_requests(role: &Role, term: &Term) -> Result<()> {
    let Role { option, example, .. } = role;
    match term {
        _ if value::constant(term).is_some() => error(
            term,
            format!(
                "a constant says what to read in a request, and a plain function has none: write `{option} = {example}`, and what else the constant says beside it"
            ),
        ),
        Term::Call(Call { word, .. })
            if ["header", "body_field", "path", "query"].iter().any(|known| word == known) =>
        {
            error(
                word,
                format!(
                    "`{word}(..)` reads a request, and a plain function has none: take the value as an argument, as in `{option} = {example}`"
                ),
            )
        }
        _ => Ok(()),
    }
}

fn has(literals: &[LitStr], wanted: &LitStr) -> bool {
    literals.iter().any(|literal| literal.value() == wanted.value())
}

fn fingerprint_header(term: &Term) -> Result<LitStr> {
    match term {
        Term::Call(call) if call.word == "header" => {
            let name = value::one_string(call, "X-Version")?;
            value::header_name(name)?;
            Ok(LitStr::new(&name.value().to_ascii_lowercase(), name.span()))
        }
        _ => error(term, "after the scheme come headers, as in `(request, header(\"X-Version\"))`"),
    }
}

impl Part {
    /// Equal for parts that always have the same value.
    fn identity(&self) -> (&'static str, String) {
        match self {
            Self::Header(name) => ("header", name.value().to_ascii_lowercase()),
            Self::BodyField(path) => ("body_field", path.value()),
            Self::Path(name) => ("path", name.value()),
            Self::Query(name) => ("query", name.value()),
            Self::Argument(expression) => ("arg", expression.to_token_stream().to_string()),
            Self::Constant(path) => ("constant", path.to_token_stream().to_string()),
        }
    }
}
