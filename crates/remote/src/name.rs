//! What is kept under which name.

use std::fmt;

use kiln_oci::Digest;

/// Stands in front of every name. Another layout of names or records gets another number.
const LAYOUT: &str = "kiln-cache-1";

/// Keeps the records of, say, branches apart; blobs belong to all.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Scope(String);

/// Longer ones are no names of branches any more.
const MAX_SCOPE_BYTES: usize = 200;

impl Default for Scope {
    fn default() -> Self {
        Self("default".to_owned())
    }
}

impl Scope {
    /// Any text of 1 to 200 bytes: `main`, `feature/x`.
    ///
    /// # Errors
    /// `None` for other lengths.
    pub fn new(text: &str) -> Option<Self> {
        (1..=MAX_SCOPE_BYTES).contains(&text.len()).then(|| Self(text.to_owned()))
    }

    /// As one part of a path: letters, digits, `-`, `_` and inner full stops as they are, all else as `=XX`.
    fn escaped(&self) -> String {
        let mut text = String::new();
        for (at, byte) in self.0.bytes().enumerate() {
            match byte {
                b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'_' => text.push(char::from(byte)),
                b'.' if at > 0 => text.push('.'),
                _ => text.push_str(&format!("={byte:02X}")),
            }
        }
        text
    }
}

impl fmt::Display for Scope {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Names an object.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum ObjectName {
    /// The record of a key.
    Record {
        /// Who shares it.
        scope: Scope,
        /// What it answers to.
        key: Digest,
    },
    /// A layer's bytes.
    Blob(Digest),
}

impl ObjectName {
    /// The parts of its path, none of them empty, `.` or `..`, nor with a slash in it.
    pub fn parts(&self) -> Vec<String> {
        let hex = match self {
            Self::Record { key, .. } => key.hex(),
            Self::Blob(digest) => digest.hex(),
        };
        let mut parts = vec![LAYOUT.to_owned()];
        match self {
            Self::Record { scope, .. } => parts.extend(["records".to_owned(), scope.escaped()]),
            Self::Blob(_) => parts.push("blobs".to_owned()),
        }
        // Directories of ten thousands of files are slow on some file systems.
        parts.extend([hex[..2].to_owned(), hex]);
        parts
    }
}

impl fmt::Display for ObjectName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.parts().join("/"))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn names_are_readable() {
        let digest = Digest::of(b"x");
        let hex = digest.hex();
        let short = &hex[..2];
        assert_eq!(ObjectName::Blob(digest).to_string(), format!("kiln-cache-1/blobs/{short}/{hex}"));
        let record = |scope: &str| ObjectName::Record { scope: Scope::new(scope).unwrap(), key: digest };
        let path = |scope: &str| format!("kiln-cache-1/records/{scope}/{short}/{hex}");
        assert_eq!(record("release-1.2").to_string(), path("release-1.2"));
        assert_eq!(record("feature/x").to_string(), path("feature=2Fx"));
        assert_eq!(record("..").to_string(), path("=2E."));
        assert_eq!(Scope::new(""), None);
        assert_eq!(Scope::new(&"x".repeat(201)), None);
    }

    proptest! {
        #[test]
        fn a_scope_is_one_harmless_part_and_no_two_are_alike(a in "\\PC{1,20}", b in "\\PC{1,20}") {
            let escaped = |text: &str| Scope::new(text).map(|scope| scope.escaped());
            for part in [escaped(&a), escaped(&b)].into_iter().flatten() {
                prop_assert!(!part.is_empty() && !part.starts_with('.'));
                prop_assert!(part.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.=".contains(&b)));
            }
            prop_assert_eq!(escaped(&a) == escaped(&b), a == b || (escaped(&a).is_none() && escaped(&b).is_none()));
        }
    }
}
