//! Reading JSON bodies without building a tree: one field by its path, and the canonical digest.
//!
//! serde_json reads all text here, as it does in the handlers behind: a body means the same to both.

use std::{borrow::Cow, cell::Cell, fmt};

use serde::de::{DeserializeSeed, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde_json::value::RawValue;
use sha2::{Digest, Sha256};

use crate::key::put_bytes;

/// Why a JSON body could not be read.
#[derive(Debug, thiserror::Error)]
pub(crate) enum JsonError {
    #[error("the body is not valid JSON")]
    Syntax(#[source] serde_json::Error),
    /// Two readers may choose differently between them.
    #[error("an object in the body has one name twice")]
    DuplicateName,
}

/// Splits `message.nonce` or the JSON Pointer `/message/nonce` (RFC 6901) into names.
pub(crate) fn segments(path: &str) -> Vec<Cow<'_, str>> {
    match path.strip_prefix('/') {
        Some(pointer) => pointer
            .split('/')
            .map(|segment| match segment.contains('~') {
                true => Cow::Owned(segment.replace("~1", "/").replace("~0", "~")),
                false => Cow::Borrowed(segment),
            })
            .collect(),
        None => path.split('.').map(Cow::Borrowed).collect(),
    }
}

/// Finds the value at a path, reading the whole document once.
///
/// A name that stands twice on the path is refused: the handler's own reader could choose the
/// other.
pub(crate) fn find<'b>(
    body: &'b [u8],
    path: &[Cow<'_, str>],
) -> Result<Option<&'b RawValue>, JsonError> {
    let duplicate = Cell::new(false);
    let mut reader = serde_json::Deserializer::from_slice(body);
    let found = Find { path, duplicate: &duplicate }
        .deserialize(&mut reader)
        .and_then(|found| reader.end().map(|()| found));
    match found {
        Ok(found) => Ok(found),
        Err(_) if duplicate.get() => Err(JsonError::DuplicateName),
        Err(error) => Err(JsonError::Syntax(error)),
    }
}

/// What stands at a path, as an anchor sees it.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Scalar {
    /// A string's characters, a number in canonical decimal form, `true` or `false`.
    Text(String),
    Null,
    /// An object or an array.
    Compound,
}

/// The text of a value.
pub(crate) fn scalar(value: &RawValue) -> Result<Scalar, JsonError> {
    let text = value.get();
    Ok(match text.as_bytes().first() {
        Some(b'"') => Scalar::Text(serde_json::from_str(text).map_err(JsonError::Syntax)?),
        Some(b'{' | b'[') => Scalar::Compound,
        Some(b'n') => Scalar::Null,
        Some(b't' | b'f') => Scalar::Text(text.to_owned()),
        _ => Scalar::Text(canonical_number(text)),
    })
}

struct Find<'p, 'n> {
    path: &'p [Cow<'n, str>],
    duplicate: &'p Cell<bool>,
}

impl<'de> DeserializeSeed<'de> for Find<'_, '_> {
    type Value = Option<&'de RawValue>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        match self.path {
            [] => serde::Deserialize::deserialize(deserializer).map(Some),
            _ => deserializer.deserialize_any(self),
        }
    }
}

impl<'de> Visitor<'de> for Find<'_, '_> {
    type Value = Option<&'de RawValue>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("any JSON value")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let Some((name, rest)) = self.path.split_first() else { return Ok(None) };
        let mut found = None;
        while let Some(same) = map.next_key_seed(SameName(name))? {
            if !same {
                map.next_value::<IgnoredAny>()?;
            } else if found.is_some() {
                self.duplicate.set(true);
                return Err(serde::de::Error::custom("a name on the path stands twice"));
            } else {
                found = Some(map.next_value_seed(Find { path: rest, ..self })?);
            }
        }
        Ok(found.flatten())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Self::Value, A::Error> {
        let (index, rest) = match self.path.split_first() {
            Some((name, rest)) => (name.parse::<usize>().ok(), rest),
            None => (None, self.path),
        };
        let mut found = None;
        for position in 0.. {
            if Some(position) == index {
                match seq.next_element_seed(Find { path: rest, duplicate: self.duplicate })? {
                    Some(value) => found = value,
                    None => break,
                }
            } else if seq.next_element::<IgnoredAny>()?.is_none() {
                break;
            }
        }
        Ok(found)
    }

    fn visit_bool<E>(self, _: bool) -> Result<Self::Value, E> {
        Ok(None)
    }

    fn visit_i64<E>(self, _: i64) -> Result<Self::Value, E> {
        Ok(None)
    }

    fn visit_u64<E>(self, _: u64) -> Result<Self::Value, E> {
        Ok(None)
    }

    fn visit_f64<E>(self, _: f64) -> Result<Self::Value, E> {
        Ok(None)
    }

    fn visit_str<E>(self, _: &str) -> Result<Self::Value, E> {
        Ok(None)
    }

    fn visit_unit<E>(self) -> Result<Self::Value, E> {
        Ok(None)
    }
}

/// Compares a name in place.
struct SameName<'p>(&'p str);

impl<'de> DeserializeSeed<'de> for SameName<'_> {
    type Value = bool;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<bool, D::Error> {
        deserializer.deserialize_identifier(self)
    }
}

impl Visitor<'_> for SameName<'_> {
    type Value = bool;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a name")
    }

    fn visit_str<E>(self, name: &str) -> Result<bool, E> {
        Ok(self.0 == name)
    }
}

/// The members of one object over those of another, each with its own text: those that stay keep
/// their place, new ones come last.
pub(crate) fn merge(object: &[u8], over: &[u8]) -> Result<Vec<u8>, JsonError> {
    let Members(mut members) = serde_json::from_slice(object).map_err(JsonError::Syntax)?;
    let Members(over) = serde_json::from_slice(over).map_err(JsonError::Syntax)?;
    for (name, value) in over {
        match members.iter_mut().find(|(known, _)| *known == name) {
            Some((_, known)) => *known = value,
            None => members.push((name, value)),
        }
    }
    serde_json::to_vec(&Members(members)).map_err(JsonError::Syntax)
}

/// An object's members in the order in which they stand.
struct Members<'de>(Vec<(String, &'de RawValue)>);

impl<'de> serde::Deserialize<'de> for Members<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(MembersVisitor)
    }
}

struct MembersVisitor;

impl<'de> Visitor<'de> for MembersVisitor {
    type Value = Members<'de>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Members<'de>, A::Error> {
        let mut members = Vec::new();
        while let Some(member) = map.next_entry()? {
            members.push(member);
        }
        Ok(Members(members))
    }
}

impl serde::Serialize for Members<'_> {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(self.0.iter().map(|(name, value)| (name, value)))
    }
}

/// Two numbers have one canonical form exactly when they have one decimal value.
///
/// Nothing is rounded: 2^53 and 2^53 + 1 stay apart, 1, 1.0 and 10e-1 come together. Integers of
/// up to forty digits keep their usual form.
fn canonical_number(text: &str) -> String {
    let (sign, unsigned) = match text.strip_prefix('-') {
        Some(unsigned) => ("-", unsigned),
        None => ("", text),
    };
    let (mantissa, exponent) = unsigned.split_once(['e', 'E']).unwrap_or((unsigned, "0"));
    let (whole, fraction) = mantissa.split_once('.').unwrap_or((mantissa, ""));
    let digits = [whole, fraction].concat();
    let significant = digits.trim_start_matches('0');
    let trimmed = significant.trim_end_matches('0');
    if trimmed.is_empty() {
        return "0".to_owned();
    }
    let shift = (significant.len() - trimmed.len()) as i128 - fraction.len() as i128;
    // An exponent beyond 128 bits is nobody's number: it is only equal to itself.
    let Some(exponent) = exponent.parse::<i128>().ok().and_then(|e| e.checked_add(shift)) else {
        return text.to_owned();
    };
    match usize::try_from(exponent) {
        Ok(zeros) if trimmed.len().saturating_add(zeros) <= 40 => {
            format!("{sign}{trimmed}{}", "0".repeat(zeros))
        }
        _ => format!("{sign}{trimmed}e{exponent}"),
    }
}

/// The digest of a JSON document by its meaning: objects are unordered, numbers are compared by
/// their exact value, white space and escapes do not count. Members at the excluded paths are left
/// out.
///
/// Each container is represented in the one around it by its digest, so the work is linear in the
/// body however deep it is nested.
pub(crate) fn canonical_digest(
    body: &[u8],
    exclude: &[Vec<Cow<'_, str>>],
) -> Result<[u8; 32], JsonError> {
    // From here on the text is known to be JSON, and telling its tokens apart is all that is left.
    serde_json::from_slice::<IgnoredAny>(body).map_err(JsonError::Syntax)?;
    let mut stack: Vec<Container> = Vec::new();
    let mut rest = body;
    while let Some((token, after)) = next_token(rest) {
        rest = after;
        let node = match token {
            b"{" => {
                stack.push(Container::Object { members: Vec::new(), name: None });
                continue;
            }
            b"[" => {
                stack.push(Container::Array { hash: Sha256::new(), count: 0 });
                continue;
            }
            b"}" | b"]" => match stack.pop() {
                Some(container) => container.close()?,
                None => break,
            },
            [b'"', ..] => {
                let text: String = serde_json::from_slice(token).map_err(JsonError::Syntax)?;
                if let Some(Container::Object { name: name @ None, .. }) = stack.last_mut() {
                    *name = Some(text);
                    continue;
                }
                Node::scalar(b'"', text.as_bytes())
            }
            [first @ (b't' | b'f' | b'n'), ..] => Node::scalar(*first, b""),
            number => {
                Node::scalar(b'#', canonical_number(&String::from_utf8_lossy(number)).as_bytes())
            }
        };
        let excluded = exclude.iter().any(|path| stands_at(&stack, path));
        match stack.last_mut() {
            Some(container) => container.add(node, excluded),
            None => return Ok(node.digest()),
        }
    }
    // Only an empty text has no value, and that is not JSON.
    Err(JsonError::Syntax(serde::de::Error::custom("no value")))
}

/// The next token of a text that is known to be JSON, commas and colons passed over.
fn next_token(text: &[u8]) -> Option<(&[u8], &[u8])> {
    let start = text.iter().position(|byte| !b" \t\r\n,:".contains(byte))?;
    let text = &text[start..];
    let length = match text[0] {
        b'{' | b'}' | b'[' | b']' => 1,
        b'"' => {
            let mut end = 1;
            while text.get(end)? != &b'"' {
                end += if text[end] == b'\\' { 2 } else { 1 };
            }
            end + 1
        }
        _ => text.iter().position(|byte| b" \t\r\n,:]}".contains(byte)).unwrap_or(text.len()),
    };
    Some(text.split_at(length))
}

/// A value as its container sees it: a tag, and its text or its digest.
struct Node(Vec<u8>);

impl Node {
    fn scalar(tag: u8, text: &[u8]) -> Self {
        let mut bytes = Vec::with_capacity(1 + text.len());
        bytes.push(tag);
        bytes.extend_from_slice(text);
        Self(bytes)
    }

    fn digest(&self) -> [u8; 32] {
        Sha256::digest(&self.0).into()
    }
}

enum Container {
    Array { hash: Sha256, count: usize },
    Object { members: Vec<(String, Option<Node>)>, name: Option<String> },
}

impl Container {
    fn add(&mut self, node: Node, excluded: bool) {
        match self {
            Self::Array { hash, count } => {
                if !excluded {
                    hash.update((node.0.len() as u64).to_be_bytes());
                    hash.update(&node.0);
                }
                *count += 1;
            }
            Self::Object { members, name } => {
                if let Some(name) = name.take() {
                    members.push((name, (!excluded).then_some(node)));
                }
            }
        }
    }

    fn close(self) -> Result<Node, JsonError> {
        match self {
            Self::Array { hash, .. } => Ok(Node::scalar(b'[', &hash.finalize())),
            Self::Object { mut members, .. } => {
                members.sort_unstable_by(|(a, _), (b, _)| a.cmp(b));
                if members.windows(2).any(|pair| pair[0].0 == pair[1].0) {
                    return Err(JsonError::DuplicateName);
                }
                let mut bytes = Vec::new();
                for (name, node) in members {
                    if let Some(node) = node {
                        put_bytes(&mut bytes, name.as_bytes());
                        put_bytes(&mut bytes, &node.0);
                    }
                }
                Ok(Node::scalar(b'{', &Sha256::digest(&bytes)))
            }
        }
    }

    /// Whether the value that is being read stands under this name.
    fn is_at(&self, segment: &str) -> bool {
        match self {
            Self::Array { count, .. } => segment.parse() == Ok(*count),
            Self::Object { name, .. } => name.as_deref() == Some(segment),
        }
    }
}

fn stands_at(stack: &[Container], path: &[Cow<'_, str>]) -> bool {
    stack.len() == path.len()
        && stack.iter().zip(path).all(|(container, name)| container.is_at(name))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text_at(body: &str, path: &str) -> Result<Option<Scalar>, JsonError> {
        find(body.as_bytes(), &segments(path))?.map(scalar).transpose()
    }

    fn found(body: &str, path: &str) -> Option<Scalar> {
        text_at(body, path).unwrap()
    }

    #[test]
    fn a_field_is_found_by_name_by_pointer_and_by_index() {
        let body = r#"{"a":{"b.c":[{"n":7}],"d":"x\u0041"},"z":null,"f":false,"e":""}"#;
        assert_eq!(found(body, "a.d"), Some(Scalar::Text("xA".into())));
        assert_eq!(found(body, "/a/b.c/0/n"), Some(Scalar::Text("7".into())));
        assert_eq!(found(body, "/a/b.c/1/n"), None);
        assert_eq!(found(body, "a.d.deeper"), None);
        assert_eq!(found(body, "z"), Some(Scalar::Null));
        assert_eq!(found(body, "f"), Some(Scalar::Text("false".into())));
        assert_eq!(found(body, "e"), Some(Scalar::Text(String::new())));
        assert_eq!(found(body, "a"), Some(Scalar::Compound));
        assert_eq!(found(r#"{"a/b":{"c~d":1}}"#, "/a~1b/c~0d"), Some(Scalar::Text("1".into())));
        assert_eq!(found(r#"{"\u0061":1}"#, "a"), Some(Scalar::Text("1".into())));
    }

    #[test]
    fn a_name_twice_on_the_path_is_refused_and_elsewhere_is_not() {
        let twice = text_at(r#"{"m":{"n":1,"n":2}}"#, "m.n");
        assert!(matches!(twice, Err(JsonError::DuplicateName)), "{twice:?}");
        let escaped = text_at(r#"{"n":1,"\u006e":2}"#, "n");
        assert!(matches!(escaped, Err(JsonError::DuplicateName)), "{escaped:?}");
        assert_eq!(found(r#"{"x":1,"x":2,"n":3}"#, "n"), Some(Scalar::Text("3".into())));
    }

    #[test]
    fn what_is_not_json_is_refused_even_behind_the_field() {
        for body in ["", "{", r#"{"n":1} x"#, r#"{"n":1,}"#, r#"{"n":01}"#, "\u{feff}{}"] {
            assert!(matches!(text_at(body, "n"), Err(JsonError::Syntax(_))), "{body}");
        }
    }

    #[test]
    fn numbers_are_compared_by_their_exact_value() {
        for same in [
            ["1", "1.0", "10e-1", "0.1E+1", "1.000e0"].as_slice(),
            &["0", "-0", "0.0", "0e99"],
            &["120", "1.2e2", "12e1", "0.12e3"],
            &["-0.5", "-5e-1", "-50E-2"],
        ] {
            for text in same {
                assert_eq!(canonical_number(text), canonical_number(same[0]), "{text}");
            }
        }
        let different = [
            "9007199254740992",
            "9007199254740993",
            "18446744073709551616",
            "18446744073709551617",
            "0.1",
            "0.1000000000000000055511151231257827",
            "1e400",
            "1e401",
            "-1",
            "1",
        ];
        for (i, a) in different.iter().enumerate() {
            for b in &different[i + 1..] {
                assert_ne!(canonical_number(a), canonical_number(b));
            }
        }
        assert_eq!(canonical_number("120"), "120");
    }

    /// Whoever can send a body can send any exponent.
    #[test]
    fn no_exponent_is_too_large_to_be_compared() {
        let exponents = [u64::MAX as u128 - 1, u64::MAX as u128, u64::MAX as u128 + 1, u128::MAX];
        for exponent in exponents {
            for text in [format!("1e{exponent}"), format!("120.5e{exponent}")] {
                assert!(canonical_number(&text).len() < 60, "{text}");
                assert_ne!(canonical_number(&text), canonical_number(&format!("-{text}")));
                let _ = canonical_number(&text.replace('e', "e-"));
            }
        }
        let (a, b) = (u64::MAX as u128, u64::MAX as u128 - 1);
        assert_eq!(canonical_number(&format!("1e{a}")), canonical_number(&format!("10e{b}")));
    }

    fn digest(body: &str) -> [u8; 32] {
        canonical_digest(body.as_bytes(), &[]).unwrap()
    }

    #[test]
    fn equal_values_have_one_digest() {
        let reference = digest(r#"{"a":[1,{"x":"y"}],"b":null}"#);
        assert_eq!(digest("{ \"b\" : null,\n\"a\":[1.0,{\"\\u0078\":\"y\"}] }"), reference);
        assert_eq!(digest("\"a\""), digest("\"\\u0061\""));
    }

    #[test]
    fn different_values_have_different_digests() {
        let bodies = [
            "null",
            "true",
            "false",
            "0",
            "\"0\"",
            "\"null\"",
            "[]",
            "{}",
            "[null]",
            "[[]]",
            "[{}]",
            r#"{"a":null}"#,
            r#"{"a":1,"b":2}"#,
            r#"{"a":2,"b":1}"#,
            r#"{"ab":1}"#,
            r#"["a","b"]"#,
            r#"["ab",""]"#,
            r#"["b","a"]"#,
            r#"[["a"],"b"]"#,
            r#"["a",["b"]]"#,
        ];
        for (i, a) in bodies.iter().enumerate() {
            for b in &bodies[i + 1..] {
                assert_ne!(digest(a), digest(b), "{a} {b}");
            }
        }
    }

    #[test]
    fn duplicate_names_are_refused_anywhere() {
        for body in [r#"{"a":1,"a":1}"#, r#"[{"x":{"a":1,"\u0061":2}}]"#] {
            let refused = canonical_digest(body.as_bytes(), &[]);
            assert!(matches!(refused, Err(JsonError::DuplicateName)), "{body}");
        }
    }

    #[test]
    fn excluded_members_do_not_count() {
        let without = [segments("meta.at"), segments("/list/1")];
        let digest = |body: &str| canonical_digest(body.as_bytes(), &without).unwrap();
        let reference = digest(r#"{"meta":{},"list":[1,3]}"#);
        assert_eq!(
            digest(r#"{"meta":{"at":5},"list":[1,2,3]}"#),
            digest(r#"{"meta":{},"list":[1,9,3]}"#)
        );
        assert_ne!(digest(r#"{"meta":{"by":5},"list":[1,3]}"#), reference);
        assert_ne!(digest(r#"{"at":5,"meta":{},"list":[1,3]}"#), reference);
    }

    #[test]
    fn merged_members_leave_the_others_as_they_stand() {
        let merged = merge(br#"{ "b": 1.0, "a":"\u0041", "r" : 0 }"#, br#"{"r":true,"e":null}"#);
        let merged = String::from_utf8(merged.unwrap()).unwrap();
        assert_eq!(merged, r#"{"b":1.0,"a":"\u0041","r":true,"e":null}"#);
        assert!(merge(b"[]", b"{}").is_err());
    }

    #[test]
    fn deep_nesting_costs_no_stack() {
        let deep = "[".repeat(200_000) + &"]".repeat(200_000);
        assert!(canonical_digest(deep.as_bytes(), &[]).is_ok());
        assert!(find(deep.as_bytes(), &segments("a.b")).unwrap().is_none());
    }
}
