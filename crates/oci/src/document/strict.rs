//! One walk over JSON before anything is made of it: depth, names, numbers of blobs.

use std::collections::HashSet;
use std::fmt;

use serde::de::{DeserializeSeed, MapAccess, SeqAccess, Visitor};

use super::DocumentError;

/// Objects and arrays within each other.
pub(super) const MAX_DEPTH: usize = 64;
/// Values in one document: each takes some hundred bytes of memory, however few it has in the file.
const MAX_VALUES: usize = 500_000;

/// Finds what [`DocumentError`] says of any kind of document.
pub(super) fn check(json: &[u8]) -> Result<(), DocumentError> {
    let mut walk = Walk { path: Vec::new(), values: 0, fault: None };
    let mut deserializer = serde_json::Deserializer::from_slice(json);
    let walked = Value { walk: &mut walk }.deserialize(&mut deserializer).and_then(|()| deserializer.end());
    match (walk.fault, walked) {
        (Some(fault), _) => Err(fault),
        (None, Err(error)) => Err(DocumentError::Json(error)),
        (None, Ok(())) => Ok(()),
    }
}

/// Keeps hostile text out of messages beyond a line's length.
pub(super) fn clip(text: &str) -> String {
    match text.char_indices().nth(100) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text.to_owned(),
    }
}

enum Step {
    Name(String),
    Nth(usize),
}

struct Walk {
    path: Vec<Step>,
    values: usize,
    /// What the walk ended for.
    fault: Option<DocumentError>,
}

impl Walk {
    fn at(&self) -> String {
        let mut text = String::new();
        for step in &self.path {
            match step {
                Step::Nth(nth) => text.push_str(&format!("[{nth}]")),
                Step::Name(name) if text.is_empty() => text.push_str(&clip(name)),
                Step::Name(name) => text.push_str(&format!(".{}", clip(name))),
            }
            // Where it begins is enough of a path.
            if text.len() > 200 {
                return text + "…";
            }
        }
        if text.is_empty() { "the document".to_owned() } else { text }
    }

    fn fail<E: serde::de::Error>(&mut self, fault: DocumentError) -> E {
        self.fault = Some(fault);
        E::custom("refused")
    }

    fn enter<E: serde::de::Error>(&mut self, step: Step) -> Result<(), E> {
        self.path.push(step);
        if self.path.len() > MAX_DEPTH {
            let at = self.at();
            return Err(self.fail(DocumentError::Depth { at }));
        }
        Ok(())
    }

    fn number<E: serde::de::Error>(&mut self, is_size: bool, shown: impl fmt::Display) -> Result<(), E> {
        if is_size && matches!(self.path.last(), Some(Step::Name(name)) if name == "size") {
            let (at, size) = (self.at(), shown.to_string());
            return Err(self.fail(DocumentError::Size { at, size }));
        }
        Ok(())
    }
}

/// Any JSON value, of which nothing is kept.
struct Value<'w> {
    walk: &'w mut Walk,
}

impl<'de> DeserializeSeed<'de> for Value<'_> {
    type Value = ();

    fn deserialize<D: serde::Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        self.walk.values += 1;
        if self.walk.values > MAX_VALUES {
            return Err(self.walk.fail(DocumentError::TooMany { what: "values in it", limit: MAX_VALUES }));
        }
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Value<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("JSON")
    }

    fn visit_unit<E>(self) -> Result<(), E> {
        Ok(())
    }

    fn visit_bool<E>(self, _: bool) -> Result<(), E> {
        Ok(())
    }

    fn visit_str<E>(self, _: &str) -> Result<(), E> {
        Ok(())
    }

    fn visit_i64<E>(self, _: i64) -> Result<(), E> {
        Ok(())
    }

    fn visit_u64<E: serde::de::Error>(self, number: u64) -> Result<(), E> {
        self.walk.number(i64::try_from(number).is_err(), number)
    }

    fn visit_f64<E: serde::de::Error>(self, number: f64) -> Result<(), E> {
        // What is beyond 64 bits arrives as a float.
        self.walk.number(number >= 9.2e18, number)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<(), A::Error> {
        for nth in 0.. {
            self.walk.enter(Step::Nth(nth))?;
            let more = seq.next_element_seed(Value { walk: self.walk })?;
            self.walk.path.pop();
            if more.is_none() {
                break;
            }
        }
        Ok(())
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        let mut seen: HashSet<String> = HashSet::new();
        while let Some(name) = map.next_key::<String>()? {
            self.walk.enter(Step::Name(name.clone()))?;
            if !seen.insert(name) {
                let at = self.walk.at();
                return Err(self.walk.fail(DocumentError::Twice { at }));
            }
            map.next_value_seed(Value { walk: self.walk })?;
            self.walk.path.pop();
        }
        Ok(())
    }
}
