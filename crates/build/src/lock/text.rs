//! What a lock file says: a line for each name, sorted, so that two branches that add one each do not meet.
//!
//! ```toml
//! version = 1
//!
//! [images]
//! "debian:bookworm" = "sha256:…"
//! ```

use std::collections::BTreeMap;

use kiln_oci::{Digest, Reference};
use serde::Deserialize;
use toml::Spanned;

use super::LockError;

/// Version of the text.
const VERSION: i64 = 1;

const HEAD: &str = "# Which image each name stands for. `kiln build --lock` writes this file; it belongs under version \
                    control.\n";

/// What a lock file pins.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Locked {
    /// Names without a digest of their own, and the manifests or indexes that they stand for.
    images: BTreeMap<Reference, Digest>,
}

/// What every version has.
#[derive(Deserialize)]
struct Versioned {
    version: Spanned<i64>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Document {
    #[serde(rename = "version")]
    _version: i64,
    #[serde(default)]
    images: BTreeMap<Spanned<String>, Spanned<String>>,
}

impl Locked {
    /// Reads the text of `file`.
    ///
    /// # Errors
    /// [`LockError::Form`] with the line, [`LockError::Version`].
    pub(super) fn parse(file: &str, bytes: &[u8]) -> Result<Self, LockError> {
        let wrong = |at: usize, message: &str| {
            let line = 1 + bytes.iter().take(at).filter(|&&byte| byte == b'\n').count();
            let message = message.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
            LockError::Form { file: file.to_owned(), line, message }
        };
        let text = std::str::from_utf8(bytes).map_err(|error| wrong(error.valid_up_to(), "not UTF-8"))?;
        let broken =
            |error: toml::de::Error| wrong(error.span().map_or(0, |span| span.start), error.message());
        // What a later version means by the rest is not for this one to say.
        let Versioned { version } = toml::from_str(text).map_err(broken)?;
        match *version.get_ref() {
            VERSION => {}
            found if found > VERSION => {
                return Err(LockError::Version { file: file.to_owned(), found, known: VERSION });
            }
            found => return Err(wrong(version.span().start, &format!("there is no version {found}"))),
        }
        let document: Document = toml::from_str(text).map_err(broken)?;
        let mut images = BTreeMap::new();
        for (name, digest) in document.images {
            let (at, name) = (name.span().start, name.into_inner());
            let reference: Reference = name.parse().map_err(|error| wrong(at, &format!("{error}")))?;
            if reference.digest().is_some() {
                return Err(wrong(at, &format!("{name:?} has a digest already")));
            }
            let (at, text) = (digest.span().start, digest.into_inner());
            let digest: Digest = text.parse().map_err(|error| wrong(at, &format!("{error}")))?;
            if images.insert(reference, digest).is_some() {
                return Err(wrong(at, &format!("{name:?} is pinned twice")));
            }
        }
        Ok(Self { images })
    }

    /// The text, the same for the same pins.
    pub(super) fn render(&self) -> String {
        let line =
            |(name, digest): (&Reference, &Digest)| format!("\"{}\" = \"{digest}\"\n", name.familiar());
        let mut lines: Vec<String> = self.images.iter().map(line).collect();
        lines.sort();
        format!("{HEAD}version = {VERSION}\n\n[images]\n{}", lines.concat())
    }

    /// What `reference` is pinned to.
    pub(super) fn get(&self, reference: &Reference) -> Option<Digest> {
        self.images.get(reference).copied()
    }

    /// Whether some name is pinned to what `exact` names.
    pub(super) fn pins(&self, exact: &Reference) -> bool {
        self.images.iter().any(|(name, digest)| name.with_digest(*digest) == *exact)
    }

    /// Pins what `new` says; what is pinned stays, unless it `replaces`. Those that have stayed where `new` says
    /// otherwise.
    pub(super) fn take(
        &mut self,
        new: &BTreeMap<Reference, Digest>,
        replaces: bool,
    ) -> Vec<(Reference, Digest)> {
        let mut others = Vec::new();
        for (reference, digest) in new {
            match self.get(reference) {
                Some(pinned) if pinned == *digest => {}
                Some(pinned) if !replaces => others.push((reference.clone(), pinned)),
                _ => {
                    self.images.insert(reference.clone(), *digest);
                }
            }
        }
        others
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pins(of: &[(&str, &[u8])]) -> BTreeMap<Reference, Digest> {
        of.iter().map(|(name, content)| (name.parse().unwrap(), Digest::of(content))).collect()
    }

    fn parse(text: &str) -> Result<Locked, LockError> {
        Locked::parse("kiln.lock", text.as_bytes())
    }

    #[track_caller]
    fn check_error(text: &str, expected: &str) {
        let error = parse(text).unwrap_err().to_string();
        assert!(error.starts_with(expected), "{error}");
    }

    #[test]
    fn the_text_is_sorted_and_reads_as_it_was_written() {
        let mut locked = Locked::default();
        let new = pins(&[("debian", b"d"), ("host:5000/a/b:v1", b"b"), ("alpine:3.20", b"a")]);
        assert_eq!(locked.take(&new, false), []);
        let text = locked.render();
        let names: Vec<&str> =
            text.lines().filter_map(|line| line.strip_prefix('"')?.split('"').next()).collect();
        assert_eq!(names, ["alpine:3.20", "debian:latest", "host:5000/a/b:v1"]);
        assert_eq!(parse(&text).unwrap(), locked);
        assert_eq!(parse("version = 1\n").unwrap(), Locked::default());
    }

    #[test]
    fn a_name_is_found_however_it_is_spelt() {
        let text =
            format!("version = 1\n[images]\n\"docker.io/library/debian\" = \"{}\"\n", Digest::of(b"d"));
        let locked = parse(&text).unwrap();
        assert_eq!(locked.get(&"debian:latest".parse().unwrap()), Some(Digest::of(b"d")));
        assert_eq!(locked.get(&"debian:12".parse().unwrap()), None);
    }

    #[test]
    fn what_is_pinned_stays_unless_it_is_replaced() {
        let mut locked = Locked::default();
        locked.take(&pins(&[("a", b"old"), ("b", b"same")]), false);
        let new = pins(&[("a", b"new"), ("b", b"same"), ("c", b"more")]);
        let others = locked.take(&new, false);
        assert_eq!(others, [("a".parse().unwrap(), Digest::of(b"old"))]);
        assert_eq!(locked.get(&"c".parse().unwrap()), Some(Digest::of(b"more")));
        assert_eq!(locked.take(&new, true), []);
        assert_eq!(locked.get(&"a".parse().unwrap()), Some(Digest::of(b"new")));
    }

    #[test]
    fn what_is_wrong_is_said_with_its_line() {
        let digest = Digest::of(b"x");
        check_error("", "kiln.lock:1: missing field `version`");
        check_error("version = 1\n\n<<<<<<< HEAD\n", "kiln.lock:3: ");
        check_error("version = \"1\"\n", "kiln.lock:1: ");
        check_error("\nversion = 0\n", "kiln.lock:2: there is no version 0");
        check_error("version = 1\nname = 1\n", "kiln.lock:2: unknown field");
        check_error("version = 1\n[images]\n\"a\" = 1\n", "kiln.lock:3: ");
        check_error("version = 1\n[images]\n\"a\" = \"sha256:12\"\n", "kiln.lock:3: ");
        check_error(
            &format!("version = 1\n[images]\n\"A\\u001b\" = \"{digest}\"\n"),
            "kiln.lock:3: image name",
        );
        check_error(&format!("version = 1\n[images]\n\"a@{digest}\" = \"{digest}\"\n"), "kiln.lock:3: ");
        let twice = format!("version = 1\n[images]\n\"a\" = \"{digest}\"\n\"a:latest\" = \"{digest}\"\n");
        check_error(&twice, "kiln.lock:4: \"a:latest\" is pinned twice");
        let not_text = Locked::parse("kiln.lock", b"version = 1\n\xff").unwrap_err().to_string();
        assert_eq!(not_text, "kiln.lock:2: not UTF-8");
        let nested = format!("version = 1\nx = {}", "[".repeat(100_000));
        check_error(&nested, "kiln.lock:2: ");
    }

    #[test]
    fn a_later_version_is_told_from_a_damaged_file() {
        let later = parse("version = 2\n[images.\"debian:12\"]\ndigest = \"sha512:…\"\n").unwrap_err();
        assert!(matches!(later, LockError::Version { found: 2, known: 1, .. }), "{later}");
    }
}
