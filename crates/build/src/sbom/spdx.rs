//! The document: SPDX 2.3 as JSON.

use kiln_oci::image::to_json;
use kiln_oci::{Digest, Platform};
use serde::Serialize;

use super::{Contents, Package};
use crate::engine::rfc3339;

/// What the predicate is.
pub(crate) const KIND: &str = "https://spdx.dev/Document";

const NOTHING: &str = "NOASSERTION";
const DOCUMENT: &str = "SPDXRef-DOCUMENT";
const IMAGE: &str = "SPDXRef-Image";

/// What is in an image.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Document {
    spdx_version: &'static str,
    data_license: &'static str,
    #[serde(rename = "SPDXID")]
    id: &'static str,
    name: String,
    document_namespace: String,
    creation_info: CreationInfo,
    #[serde(skip_serializing_if = "String::is_empty")]
    comment: String,
    packages: Vec<Listed>,
    relationships: Vec<Relationship>,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct CreationInfo {
    created: String,
    creators: Vec<String>,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Listed {
    #[serde(rename = "SPDXID")]
    id: String,
    name: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    version_info: String,
    supplier: &'static str,
    download_location: &'static str,
    files_analyzed: bool,
    license_concluded: &'static str,
    license_declared: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    license_comments: Option<String>,
    copyright_text: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    primary_package_purpose: Option<&'static str>,
    #[serde(skip_serializing_if = "String::is_empty")]
    source_info: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    comment: Option<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    external_refs: Vec<ExternalRef>,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct ExternalRef {
    reference_category: &'static str,
    reference_type: &'static str,
    reference_locator: String,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Relationship {
    spdx_element_id: &'static str,
    relationship_type: &'static str,
    related_spdx_element: String,
}

/// The document of an image for `platform`, made at this time. Its namespace is made of its digest: the same image
/// gives the same bytes.
pub(crate) fn document(
    contents: &Contents,
    name: Option<&str>,
    platform: &Platform,
    created_unix: i64,
) -> Document {
    let name = name.unwrap_or("image");
    let mut packages = vec![Listed {
        id: IMAGE.to_owned(),
        name: name.to_owned(),
        primary_package_purpose: Some("CONTAINER"),
        source_info: format!("image for {platform}"),
        ..Listed::default()
    }];
    packages.extend(contents.packages.iter().map(Listed::of));
    let relation = |spdx_element_id, relationship_type, other: &Listed| Relationship {
        spdx_element_id,
        relationship_type,
        related_spdx_element: other.id.clone(),
    };
    let mut relationships = vec![relation(DOCUMENT, "DESCRIBES", &packages[0])];
    relationships.extend(packages[1..].iter().map(|package| relation(IMAGE, "CONTAINS", package)));
    let mut document = Document {
        spdx_version: "SPDX-2.3",
        data_license: "CC0-1.0",
        id: DOCUMENT,
        name: name.to_owned(),
        document_namespace: String::new(),
        creation_info: CreationInfo {
            created: rfc3339(created_unix),
            creators: vec![format!("Tool: kiln-{}", env!("CARGO_PKG_VERSION"))],
        },
        comment: contents.notes.join("; "),
        packages,
        relationships,
    };
    let digest = Digest::of(&to_json(&document)).hex();
    document.document_namespace = format!("https://spdx.org/spdxdocs/{}-{digest}", plain(name));
    document
}

/// Nothing is said of a package but what is set.
impl Default for Listed {
    fn default() -> Self {
        Self {
            id: String::new(),
            name: String::new(),
            version_info: String::new(),
            supplier: NOTHING,
            download_location: NOTHING,
            files_analyzed: false,
            license_concluded: NOTHING,
            license_declared: NOTHING,
            license_comments: None,
            copyright_text: NOTHING,
            primary_package_purpose: None,
            source_info: String::new(),
            comment: None,
            external_refs: Vec::new(),
        }
    }
}

impl Listed {
    fn of(package: &Package) -> Self {
        let Package { purl, name, version, license, maintainer, found_in } = package;
        let digest = Digest::of(purl.as_bytes()).hex();
        let kind = purl.trim_start_matches("pkg:").split('/').next().unwrap_or_default();
        Self {
            id: format!("SPDXRef-Package-{}-{}-{}", plain(kind), plain(name), &digest[..16]),
            name: name.clone(),
            version_info: version.clone(),
            // What a package says of its licence is no SPDX expression for certain.
            license_comments: license.as_ref().map(|license| format!("the package says: {license}")),
            source_info: format!("found in {found_in}"),
            // SPDX would want to know whether that is a person or an organisation.
            comment: maintainer.as_ref().map(|maintainer| format!("maintainer: {maintainer}")),
            external_refs: vec![ExternalRef {
                reference_category: "PACKAGE-MANAGER",
                reference_type: "purl",
                reference_locator: purl.clone(),
            }],
            ..Self::default()
        }
    }
}

/// `name` in the letters that an identifier may have.
fn plain(name: &str) -> String {
    name.chars().map(|c| if c.is_ascii_alphanumeric() || matches!(c, '.' | '-') { c } else { '-' }).collect()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use serde_json::Value;

    use super::*;

    fn package(purl: &str, name: &str) -> Package {
        Package {
            purl: purl.to_owned(),
            name: name.to_owned(),
            version: "1".to_owned(),
            license: Some("MIT".to_owned()),
            maintainer: Some("Somebody <a@b>".to_owned()),
            found_in: "/lib/apk/db/installed".to_owned(),
        }
    }

    fn json(contents: &Contents, created: i64) -> Value {
        let platform = "linux/amd64".parse().unwrap();
        serde_json::to_value(document(contents, Some("team/app:1"), &platform, created)).unwrap()
    }

    #[test]
    fn a_document_has_what_spdx_wants() {
        let packages = vec![package("pkg:apk/alpine/a_b@1", "a_b"), package("pkg:npm/a-b@1", "a-b")];
        let contents = Contents { packages, notes: vec!["one".into(), "two".into()] };
        let read = json(&contents, 86_400);
        assert_eq!(read["spdxVersion"], "SPDX-2.3");
        assert_eq!(read["SPDXID"], "SPDXRef-DOCUMENT");
        assert_eq!(read["creationInfo"]["created"], "1970-01-02T00:00:00Z");
        assert_eq!(read["comment"], "one; two");
        let namespace = read["documentNamespace"].as_str().unwrap();
        assert!(namespace.starts_with("https://spdx.org/spdxdocs/team-app-1-"), "{namespace}");
        let listed = read["packages"].as_array().unwrap();
        let ids: BTreeSet<&str> = listed.iter().map(|it| it["SPDXID"].as_str().unwrap()).collect();
        assert_eq!(ids.len(), 3, "they are told apart: {ids:?}");
        let fits = |id: &&str| id.chars().all(|c| c.is_ascii_alphanumeric() || "-.".contains(c));
        assert!(ids.iter().all(fits), "{ids:?}");
        assert_eq!(listed[1]["externalRefs"][0]["referenceLocator"], "pkg:apk/alpine/a_b@1");
        assert_eq!(listed[1]["licenseComments"], "the package says: MIT");
        assert_eq!(listed[1]["comment"], "maintainer: Somebody <a@b>");
        let relations = read["relationships"].as_array().unwrap();
        assert_eq!(relations[0]["relationshipType"], "DESCRIBES");
        let related = relations.iter().map(|it| it["relatedSpdxElement"].as_str().unwrap());
        assert_eq!(related.collect::<BTreeSet<_>>(), ids);
    }

    #[test]
    fn the_namespace_changes_with_what_is_said_and_with_nothing_else() {
        let none = Contents::default();
        let one = Contents { packages: vec![package("pkg:npm/a@1", "a")], ..Contents::default() };
        let namespace = |contents, at| json(contents, at)["documentNamespace"].clone();
        assert_eq!(namespace(&none, 1), namespace(&none, 1));
        assert_ne!(namespace(&none, 1), namespace(&none, 2));
        assert_ne!(namespace(&none, 1), namespace(&one, 1));
    }
}
