//! What a manifest or an index refers to by its `subject`.

use std::collections::BTreeMap;

use serde::Deserialize;

use super::{DocumentError, read};
use crate::image::Descriptor;

/// The key that says in a list of referrers what kind of thing an entry is.
const ARTIFACT_TYPE: &str = "artifactType";

/// What a manifest or an index says of itself and of what it refers to.
#[derive(Debug, Clone, PartialEq)]
pub struct Referring {
    /// What it is about; `None`: it refers to nothing.
    pub subject: Option<Descriptor>,
    /// What kind of thing it is: its own word, or else the media type of its config. Empty: it does not say.
    pub artifact_type: String,
    /// Its annotations.
    pub annotations: BTreeMap<String, String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Parts {
    #[serde(default)]
    subject: Option<Descriptor>,
    #[serde(default)]
    artifact_type: Option<String>,
    #[serde(default)]
    config: Option<Descriptor>,
    #[serde(default)]
    annotations: Option<BTreeMap<String, String>>,
}

/// Reads what a manifest or an index refers to.
///
/// # Errors
/// [`DocumentError`].
pub fn read_referring(json: &[u8]) -> Result<Referring, DocumentError> {
    let Parts { subject, artifact_type, config, annotations } = read(json)?;
    let own = artifact_type.filter(|kind| !kind.is_empty());
    let artifact_type = own.or_else(|| config.map(|config| config.media_type)).unwrap_or_default();
    Ok(Referring { subject, artifact_type, annotations: annotations.unwrap_or_default() })
}

impl Referring {
    /// The entry of a list of referrers for this document, which `descriptor` points to.
    pub fn listed(&self, descriptor: &Descriptor) -> Descriptor {
        let mut listed = Descriptor::new(&descriptor.media_type, descriptor.digest, descriptor.size);
        listed.annotations.clone_from(&self.annotations);
        if !self.artifact_type.is_empty() {
            listed.extra.insert(ARTIFACT_TYPE.to_owned(), self.artifact_type.clone().into());
        }
        listed
    }
}

/// What kind of thing an entry of a list of referrers is; empty: the list does not say.
pub fn artifact_type(descriptor: &Descriptor) -> &str {
    descriptor.extra.get(ARTIFACT_TYPE).and_then(|kind| kind.as_str()).unwrap_or_default()
}
