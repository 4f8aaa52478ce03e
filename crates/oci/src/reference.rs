//! Image references: `name[:tag][@digest]`.

use std::fmt;
use std::str::FromStr;

use nom::branch::alt;
use nom::bytes::complete::{tag, take_while1};
use nom::character::complete::char;
use nom::combinator::{all_consuming, opt, recognize, verify};
use nom::multi::{many0, many1, separated_list1};
use nom::sequence::{delimited, preceded};
use nom::{IResult, Parser};

use crate::{Digest, DigestError};

/// `name[:tag][@digest]`, parsed and normalised as docker does: `debian` is
/// `docker.io/library/debian:latest`.
///
/// Grammar: distribution/reference. The name with its host has at most 255 characters, a tag 128.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Reference {
    domain: String,
    path: String,
    tag: Option<String>,
    digest: Option<Digest>,
}

/// Why a text is no [`Reference`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ReferenceError {
    /// Nothing there.
    #[error("the image name is empty")]
    Empty,
    /// Repository names are lower case.
    #[error("image name {0:?} has upper-case letters; repository names are lower case")]
    Uppercase(String),
    /// More than 255 characters.
    #[error("the image name has {0} characters, 255 are allowed")]
    TooLong(usize),
    /// The digest behind `@` is none. The text says why: command lines and Dockerfiles show no causes.
    #[error("image name {name:?}: {why}")]
    Digest {
        /// The whole text.
        name: String,
        /// What is wrong with the digest.
        why: DigestError,
    },
    /// Anything else.
    #[error("{0:?} is not an image name like registry.example.com/team/app:1.0")]
    Grammar(String),
}

const DEFAULT_DOMAIN: &str = "docker.io";
const OFFICIAL: &str = "library/";

impl Reference {
    /// Registry host, with its port: `docker.io`, `localhost:5000`.
    pub fn domain(&self) -> &str {
        &self.domain
    }

    /// Repository within the registry: `library/debian`.
    pub fn path(&self) -> &str {
        &self.path
    }

    /// The tag; `None` only where a digest stands instead.
    pub fn tag(&self) -> Option<&str> {
        self.tag.as_deref()
    }

    /// The digest behind `@`.
    pub fn digest(&self) -> Option<&Digest> {
        self.digest.as_ref()
    }

    /// The name without tag and digest as users write it: `debian`, `team/app`, `host:5000/app`.
    pub fn familiar_name(&self) -> String {
        let official = self.path.strip_prefix(OFFICIAL).filter(|name| !name.contains('/'));
        let short = official.unwrap_or(&self.path);
        // The first component of `docker.io/a.b/c` would be read as a domain if it came first.
        if self.domain == DEFAULT_DOMAIN && split_domain(short).0.is_none() {
            short.to_owned()
        } else {
            format!("{}/{}", self.domain, self.path)
        }
    }

    /// As users write it: without docker.io and library, tag always shown.
    pub fn familiar(&self) -> String {
        self.with_suffix(self.familiar_name())
    }

    /// The same name for this image and no other.
    pub fn with_digest(&self, digest: Digest) -> Reference {
        Reference { digest: Some(digest), ..self.clone() }
    }

    /// The same tag and digest in the repository of `other`.
    pub fn in_repository_of(&self, other: &Reference) -> Reference {
        let (domain, path) = (other.domain.clone(), other.path.clone());
        Reference { domain, path, tag: self.tag.clone(), digest: self.digest }
    }

    fn with_suffix(&self, mut text: String) -> String {
        if let Some(tag) = &self.tag {
            text.push(':');
            text.push_str(tag);
        }
        if let Some(digest) = &self.digest {
            text.push('@');
            text.push_str(&digest.to_string());
        }
        text
    }
}

/// The full form: `docker.io/library/debian:latest`.
impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.with_suffix(format!("{}/{}", self.domain, self.path)))
    }
}

impl fmt::Debug for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for Reference {
    type Err = ReferenceError;

    fn from_str(text: &str) -> Result<Self, ReferenceError> {
        if text.is_empty() {
            return Err(ReferenceError::Empty);
        }
        let grammar = || ReferenceError::Grammar(text.chars().take(100).collect());
        let (rest, digest) = match text.split_once('@') {
            None => (text, None),
            Some((rest, digest)) => {
                let parsed = digest
                    .parse()
                    .map_err(|why| ReferenceError::Digest { name: text.chars().take(100).collect(), why })?;
                (rest, Some(parsed))
            }
        };
        let (domain, remainder) = split_domain(rest);
        let (name, tag) = match remainder.split_once(':') {
            None => (remainder, None),
            Some((name, tag)) => (name, Some(tag)),
        };
        if name.bytes().any(|b| b.is_ascii_uppercase()) {
            return Err(ReferenceError::Uppercase(text.chars().take(100).collect()));
        }
        all_consuming(repository).parse(name).map_err(|_| grammar())?;
        if let Some(tag) = tag {
            all_consuming(tag_word).parse(tag).map_err(|_| grammar())?;
        }
        if let Some(domain) = domain {
            all_consuming(host).parse(domain).map_err(|_| grammar())?;
        }
        let path = match domain {
            None | Some("docker.io" | "index.docker.io") if !name.contains('/') => {
                format!("{OFFICIAL}{name}")
            }
            _ => name.to_owned(),
        };
        let domain = match domain {
            None | Some("index.docker.io") => DEFAULT_DOMAIN.to_owned(),
            Some(domain) => domain.to_owned(),
        };
        let length = domain.len() + 1 + path.len();
        if length > 255 {
            return Err(ReferenceError::TooLong(length));
        }
        let tag = match (tag, digest) {
            (None, None) => Some("latest".to_owned()),
            (tag, _) => tag.map(str::to_owned),
        };
        Ok(Self { domain, path, tag, digest })
    }
}

/// The first component is a host when it holds a dot or a colon or is
/// `localhost` (docker's rule); otherwise the whole text is a repository of Docker Hub.
fn split_domain(text: &str) -> (Option<&str>, &str) {
    match text.split_once('/') {
        Some((first, rest)) if first.contains(['.', ':']) || first == "localhost" => (Some(first), rest),
        _ => (None, text),
    }
}

fn alphanumeric(input: &str) -> IResult<&str, &str> {
    take_while1(|c: char| c.is_ascii_lowercase() || c.is_ascii_digit()).parse(input)
}

/// `path-component := alpha-numeric ( separator alpha-numeric )*`
fn component(input: &str) -> IResult<&str, &str> {
    let separator = alt((tag("__"), tag("_"), tag("."), recognize(many1(char('-')))));
    recognize((alphanumeric, many0((separator, alphanumeric)))).parse(input)
}

fn repository(input: &str) -> IResult<&str, &str> {
    recognize(separated_list1(char('/'), component)).parse(input)
}

fn tag_word(input: &str) -> IResult<&str, &str> {
    let word = take_while1(|c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '.' | '-'));
    verify(word, |word: &str| word.len() <= 128 && !word.starts_with(['.', '-'])).parse(input)
}

/// `host := (domain-name | "[" IPv6 "]") [":" port]`
fn host(input: &str) -> IResult<&str, &str> {
    let label = verify(take_while1(|c: char| c.is_ascii_alphanumeric() || c == '-'), |label: &str| {
        !label.starts_with('-') && !label.ends_with('-')
    });
    let name = recognize(separated_list1(char('.'), label));
    let v6 =
        recognize(delimited(char('['), take_while1(|c: char| c.is_ascii_hexdigit() || c == ':'), char(']')));
    let port = preceded(char(':'), take_while1(|c: char| c.is_ascii_digit()));
    recognize((alt((v6, name)), opt(port))).parse(input)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(text: &str, full: &str, familiar: &str) {
        let parsed: Reference = text.parse().unwrap_or_else(|error| panic!("{text}: {error}"));
        assert_eq!(parsed.to_string(), full, "{text}");
        assert_eq!(parsed.familiar(), familiar, "{text}");
        assert_eq!(full.parse::<Reference>().unwrap(), parsed, "the full form parses to the same");
    }

    #[test]
    fn short_names_are_normalised_as_docker_does() {
        let digest = format!("sha256:{}", "0".repeat(64));
        check("debian", "docker.io/library/debian:latest", "debian:latest");
        check("team/app:1.0", "docker.io/team/app:1.0", "team/app:1.0");
        check("localhost/app", "localhost/app:latest", "localhost/app:latest");
        check("index.docker.io/debian", "docker.io/library/debian:latest", "debian:latest");
        check("library/a/b", "docker.io/library/a/b:latest", "library/a/b:latest");
        check("docker.io/a.b/c", "docker.io/a.b/c:latest", "docker.io/a.b/c:latest");
        check("[::1]:5000/x", "[::1]:5000/x:latest", "[::1]:5000/x:latest");
        check("host:5000/a/b_c.d--e:T", "host:5000/a/b_c.d--e:T", "host:5000/a/b_c.d--e:T");
        check(
            &format!("debian@{digest}"),
            &format!("docker.io/library/debian@{digest}"),
            &format!("debian@{digest}"),
        );
    }

    #[test]
    fn what_docker_refuses_is_refused() {
        let long = "a".repeat(256);
        for bad in [
            "",
            ":tag",
            "a:",
            "a:b:c",
            "-rf",
            "a//b",
            "a/",
            "/a",
            "UPPER",
            "UPPER/x",
            "a b",
            "a:.x",
            "a@sha256:1",
            "a_-b",
            "é",
        ] {
            assert!(bad.parse::<Reference>().is_err(), "{bad}");
        }
        assert!(matches!(long.parse::<Reference>(), Err(ReferenceError::TooLong(_))));
        let digest = format!("a@sha512:{}", "0".repeat(128)).parse::<Reference>().unwrap_err();
        assert!(digest.to_string().contains("sha256 is the one"), "{digest}");
        assert!(matches!("app/UPPER".parse::<Reference>(), Err(ReferenceError::Uppercase(_))));
    }
}
