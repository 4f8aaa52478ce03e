//! `--build-context name=…`: another place that `FROM` and `COPY --from` may mean by a name.

use std::path::{Path, PathBuf};

use kiln_oci::Reference;

use crate::remote_context::ContextSource;
use crate::{LayoutImage, SourceError};

/// A context with a name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NamedContext {
    /// As stages and images are named: familiar, without `:latest`; `name::os/arch` holds for that
    /// platform only.
    pub name: String,
    /// What it is.
    pub source: NamedSource,
}

/// What a name stands for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NamedSource {
    /// A directory, a repository or a URL; never standard input.
    Files(ContextSource),
    /// `docker-image://…`.
    Image(Reference),
    /// `oci-layout://…`: load it with [`crate::load_layout`].
    Layout {
        /// The directory.
        path: PathBuf,
        /// Which image of it.
        image: LayoutImage,
    },
}

/// Why a named context is wrong.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum NamedContextError {
    /// Not `name=value`, or one of them is empty.
    #[error("{text:?} is not of the form NAME=PLACE")]
    Form { text: String },
    /// No stage or image can be called this.
    #[error("{name:?} is not a possible name of a context")]
    Name { name: String },
    /// A tag or digest that is none.
    #[error("{text:?} is not a reference to an image")]
    Image { text: String, source: Box<dyn std::error::Error + Send + Sync> },
    /// Standard input belongs to the main context.
    #[error("the context {name:?} cannot be standard input")]
    Stdin { name: String },
    /// A repository that is wrong or refused.
    #[error("the context {name:?} is wrong")]
    Source { name: String, source: SourceError },
}

impl NamedContext {
    /// Parses `name=directory`, `name=docker-image://reference`,
    /// `name=oci-layout://directory[:tag|@digest]`, `name=` with a git reference or an http URL.
    ///
    /// # Errors
    /// [`NamedContextError`]; whether the place exists shows when it is opened.
    pub fn parse(text: &str) -> Result<Self, NamedContextError> {
        let form = || NamedContextError::Form { text: text.to_owned() };
        let (name, place) = text.split_once('=').ok_or_else(form)?;
        if name.is_empty() || place.is_empty() {
            return Err(form());
        }
        let name = normalise(name)?;
        let source = if let Some(reference) = place.strip_prefix("docker-image://") {
            NamedSource::Image(parse_image(reference)?)
        } else if let Some(layout) = place.strip_prefix("oci-layout://") {
            parse_layout(layout)?
        } else {
            match ContextSource::parse(place) {
                Ok(ContextSource::Stdin) => return Err(NamedContextError::Stdin { name }),
                Ok(source) => NamedSource::Files(source),
                Err(source) => return Err(NamedContextError::Source { name, source }),
            }
        };
        Ok(Self { name, source })
    }
}

/// `Alpine` is no name; `docker.io/library/alpine:latest` is `alpine`.
fn normalise(name: &str) -> Result<String, NamedContextError> {
    let (name, platform) = match name.split_once("::") {
        Some((name, platform)) => (name, Some(platform)),
        None => (name, None),
    };
    let reference: Reference = name.parse().map_err(|_| NamedContextError::Name { name: name.to_owned() })?;
    let familiar = reference.familiar();
    let short = familiar.strip_suffix(":latest").unwrap_or(&familiar);
    Ok(platform.map_or_else(|| short.to_owned(), |platform| format!("{short}::{platform}")))
}

fn parse_image(text: &str) -> Result<Reference, NamedContextError> {
    text.parse().map_err(|error: kiln_oci::ReferenceError| image_error(text, error))
}

fn image_error(text: &str, source: impl std::error::Error + Send + Sync + 'static) -> NamedContextError {
    NamedContextError::Image { text: text.to_owned(), source: Box::new(source) }
}

fn parse_layout(text: &str) -> Result<NamedSource, NamedContextError> {
    if let Some((path, digest)) = text.rsplit_once('@') {
        let digest = digest.parse().map_err(|error: kiln_oci::DigestError| image_error(text, error))?;
        return Ok(NamedSource::Layout { path: path.into(), image: LayoutImage::Digest(digest) });
    }
    // A directory may have a colon in its name; a tag has no slash.
    let tagged = text.rsplit_once(':').filter(|(_, tag)| !tag.is_empty() && !tag.contains('/'));
    Ok(match tagged {
        Some((path, tag)) if !Path::new(text).is_dir() => {
            NamedSource::Layout { path: path.into(), image: LayoutImage::Tag(tag.to_owned()) }
        }
        _ => NamedSource::Layout { path: text.into(), image: LayoutImage::Default },
    })
}

#[cfg(test)]
mod tests {
    use kiln_oci::Digest;

    use super::*;

    fn parse(text: &str) -> NamedContext {
        NamedContext::parse(text).unwrap_or_else(|error| panic!("{text}: {error}"))
    }

    fn layout(path: &str, image: LayoutImage) -> NamedSource {
        NamedSource::Layout { path: path.into(), image }
    }

    #[test]
    fn every_kind_of_place_is_told_apart() {
        let directory = NamedSource::Files(ContextSource::Directory("/absent/dir".into()));
        assert_eq!(parse("src=/absent/dir").source, directory);
        let web = NamedSource::Files(ContextSource::Http("https://h/x.tar".to_owned()));
        assert_eq!(parse("src=https://h/x.tar").source, web);
        assert!(matches!(
            parse("src=https://h/x.git#v1").source,
            NamedSource::Files(ContextSource::Git(git)) if git.reference == "v1"
        ));
        let image = NamedSource::Image("alpine:3".parse().unwrap());
        assert_eq!(parse("base=docker-image://alpine:3").source, image);
    }

    #[test]
    fn layouts_take_a_tag_or_a_digest() {
        let digest = Digest::of(b"x");
        for (text, expected) in [
            ("dir".to_owned(), layout("dir", LayoutImage::Default)),
            ("/a/b:v1".to_owned(), layout("/a/b", LayoutImage::Tag("v1".to_owned()))),
            ("/a:1/b".to_owned(), layout("/a:1/b", LayoutImage::Default)),
            (format!("dir@{digest}"), layout("dir", LayoutImage::Digest(digest))),
        ] {
            assert_eq!(parse(&format!("n=oci-layout://{text}")).source, expected, "{text}");
        }
        let bad = NamedContext::parse("n=oci-layout://dir@sha256:../x");
        assert!(matches!(bad, Err(NamedContextError::Image { .. })));
    }

    #[test]
    fn names_are_those_of_images() {
        assert_eq!(parse("docker.io/library/alpine:latest=x").name, "alpine");
        assert_eq!(parse("alpine:3.20=x").name, "alpine:3.20");
        assert_eq!(parse("ghcr.io/a/b=x").name, "ghcr.io/a/b");
        assert_eq!(parse("alpine::linux/arm64=x").name, "alpine::linux/arm64");
        assert!(matches!(NamedContext::parse("Bad Name=x"), Err(NamedContextError::Name { .. })));
    }

    #[test]
    fn what_cannot_be_is_said() {
        for text in ["", "name", "=x", "name="] {
            assert!(matches!(NamedContext::parse(text), Err(NamedContextError::Form { .. })), "{text}");
        }
        assert!(matches!(NamedContext::parse("n=-"), Err(NamedContextError::Stdin { .. })));
        let refused = NamedContext::parse("n=ssh://-oProxyCommand=id/x");
        assert!(matches!(refused, Err(NamedContextError::Source { .. })));
    }
}
