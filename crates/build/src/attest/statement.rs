//! Statements: what is said, and of which bytes (in-toto, Statement v1).

use std::collections::BTreeMap;

use kiln_oci::image::to_json;
use kiln_oci::{Digest, Platform, Reference};
use serde::Serialize;
use serde_json::Value;

use super::Place;
use crate::purl;
use crate::sbom::Document;

const KIND: &str = "https://in-toto.io/Statement/v1";

/// What is said of an image.
#[derive(Debug)]
pub(crate) struct Predicate {
    /// A URI.
    pub(crate) kind: &'static str,
    pub(crate) body: Body,
    /// With a file name.
    pub(crate) place: Place,
}

#[derive(Debug, Serialize)]
#[serde(untagged)]
pub(crate) enum Body {
    Provenance(Value),
    Sbom(Box<Document>),
}

/// What it is said of.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct Subject {
    name: String,
    digest: BTreeMap<&'static str, String>,
}

impl Subject {
    fn new(name: String, digest: &Digest) -> Self {
        Self { name, digest: [("sha256", digest.hex())].into() }
    }

    /// An image, under each of its names.
    pub(crate) fn image(names: &[Reference], platform: &Platform, manifest: &Digest) -> Vec<Self> {
        let named = names.iter().map(|name| Self::new(purl::of_image(name, platform), manifest));
        let named: Vec<Self> = named.collect();
        // A statement names its subject; `_` is BuildKit's word for one without a name.
        if named.is_empty() { vec![Self::new("_".to_owned(), manifest)] } else { named }
    }

    /// A file.
    pub(crate) fn file(path: &[u8], content: &Digest) -> Self {
        Self::new(String::from_utf8_lossy(path).into_owned(), content)
    }
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Statement<'a> {
    #[serde(rename = "_type")]
    kind: &'static str,
    predicate_type: &'static str,
    subject: &'a [Subject],
    predicate: &'a Body,
}

/// The JSON bytes of a statement.
pub(crate) fn statement(predicate: &Predicate, subject: &[Subject]) -> Vec<u8> {
    let Predicate { kind: predicate_type, body, .. } = predicate;
    to_json(&Statement { kind: KIND, predicate_type, subject, predicate: body })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_statement_names_its_subject_by_digest() {
        let (platform, digest) = ("linux/amd64".parse().unwrap(), Digest::of(b"manifest"));
        let names = ["app:1".parse().unwrap(), "ghcr.io/x/app:1".parse().unwrap()];
        let body = Body::Provenance(serde_json::json!({ "a": 1 }));
        let predicate = Predicate { kind: "https://example/p", body, place: Place::default() };
        let read = |names: &[Reference]| -> Value {
            let json = statement(&predicate, &Subject::image(names, &platform, &digest));
            serde_json::from_slice(&json).unwrap()
        };
        let both = read(&names);
        assert_eq!(both["_type"], "https://in-toto.io/Statement/v1");
        assert_eq!(both["predicateType"], "https://example/p");
        assert_eq!(both["predicate"]["a"], 1);
        assert_eq!(both["subject"][0]["name"], "pkg:docker/app@1?platform=linux%2Famd64");
        assert_eq!(both["subject"][1]["digest"]["sha256"], digest.hex());
        assert_eq!(
            read(&[])["subject"],
            serde_json::json!([{ "name": "_", "digest": { "sha256": digest.hex() } }])
        );
    }

    #[test]
    fn names_of_files_are_text_whatever_they_are() {
        let file = Subject::file(b"a/\xff", &Digest::of(b""));
        assert_eq!(file.name, "a/\u{fffd}");
    }
}
