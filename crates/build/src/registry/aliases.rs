//! Names of Docker Hub that mean images elsewhere.
//!
//! A name without a host is one of Docker Hub, to docker and to kiln, in the store, in a Dockerfile and in what is
//! printed. An alias leaves all of that alone, and says at which registry the image of that name is. See
//! `docs/adr/0034-the-client-continued.md`.

use std::borrow::Cow;
use std::collections::BTreeMap;

use kiln_oci::Reference;

/// The host of names that have none.
const SHORT: &str = "docker.io";

/// Where images are whose names say Docker Hub.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Aliases(BTreeMap<String, Reference>);

/// What is no alias.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum AliasError {
    /// Nothing that an alias could be for.
    #[error("{0:?} is no short name; one is like `debian` or `team/app`, without host, tag or digest")]
    Name(String),
    /// Nothing that it could stand for.
    #[error(
        "{0:?} says not where an image is; that is like `registry.example.com/team/app`, without tag or digest"
    )]
    Target(String),
}

impl Aliases {
    /// Adds an alias: images called `name` are those of `target`.
    ///
    /// # Errors
    /// [`AliasError`].
    pub fn insert(&mut self, name: &str, target: &str) -> Result<(), AliasError> {
        let wrong = || AliasError::Name(name.to_owned());
        let short = bare(name).filter(|short| short.domain() == SHORT && !says_host(name));
        let short = short.ok_or_else(wrong)?;
        let wrong = || AliasError::Target(target.to_owned());
        let target = bare(target).filter(|_| says_host(target)).ok_or_else(wrong)?;
        self.0.insert(short.path().to_owned(), target);
        Ok(())
    }

    /// Where the image of this name is.
    pub fn place<'a>(&self, name: &'a Reference) -> Cow<'a, Reference> {
        match self.0.get(name.path()).filter(|_| name.domain() == SHORT) {
            Some(target) => Cow::Owned(name.in_repository_of(target)),
            None => Cow::Borrowed(name),
        }
    }
}

/// A name without tag and digest.
fn bare(text: &str) -> Option<Reference> {
    let last = text.rsplit('/').next().unwrap_or(text);
    if last.contains([':', '@']) { None } else { text.parse().ok() }
}

/// Whether it does not depend on anybody's rules which registry is meant.
fn says_host(text: &str) -> bool {
    let first = text.split_once('/').map_or("", |(first, _)| first);
    first.contains(['.', ':']) || first == "localhost"
}

#[cfg(test)]
mod tests {
    use super::*;

    fn aliases(pairs: &[(&str, &str)]) -> Result<Aliases, AliasError> {
        let mut aliases = Aliases::default();
        pairs.iter().try_for_each(|(name, target)| aliases.insert(name, target))?;
        Ok(aliases)
    }

    #[test]
    fn a_short_name_leads_to_its_place_with_tag_and_digest() {
        let aliases = aliases(&[("debian", "r.example:5000/base/debian"), ("team/app", "localhost/app")]);
        let digest = format!("sha256:{}", "0".repeat(64));
        let place = |name: &str| {
            let name = name.parse::<Reference>().unwrap();
            aliases.as_ref().unwrap().place(&name).to_string()
        };
        assert_eq!(place("debian"), "r.example:5000/base/debian:latest");
        assert_eq!(place("docker.io/library/debian:12"), "r.example:5000/base/debian:12");
        assert_eq!(place(&format!("debian@{digest}")), format!("r.example:5000/base/debian@{digest}"));
        assert_eq!(place("team/app:v1"), "localhost/app:v1");
        // Where an alias leads, no other begins; and other hosts have names of their own.
        assert_eq!(place("app"), "docker.io/library/app:latest");
        assert_eq!(place("quay.io/library/debian"), "quay.io/library/debian:latest");
        assert_eq!(place("ubuntu"), "docker.io/library/ubuntu:latest");
    }

    #[test]
    fn what_is_no_alias_is_refused() {
        for name in ["", "quay.io/x", "docker.io/library/debian", "debian:12", "a@b", "UPPER", "localhost/x"]
        {
            let error = aliases(&[(name, "r.example/x")]).unwrap_err();
            assert_eq!(error, AliasError::Name(name.to_owned()));
        }
        for target in ["", "debian", "team/app", "r.example/x:1", "r.example/", "https://r.example/x"] {
            let error = aliases(&[("x", target)]).unwrap_err();
            assert_eq!(error, AliasError::Target(target.to_owned()));
        }
    }
}
