//! Image JSON that came from elsewhere: read so that it means one thing only, or refused with the
//! place in it.
//!
//! What other readers could take for something else is refused: a name twice, a name in other
//! letters (Go's readers do not care), a manifest that is an index as well. What is accepted can be
//! read with serde alone from then on.

mod referring;
mod strict;
#[cfg(test)]
mod tests;
mod text;

use serde::Deserialize;
use serde::de::{DeserializeOwned, IgnoredAny};

use crate::image::{Descriptor, Extra, ImageConfig, Index, Manifest, media_type};

pub use referring::{Referring, artifact_type, read_referring};
pub use text::JsonText;

/// Layers of an image; more are refused.
pub const MAX_LAYERS: usize = 4096;

/// Why a document is refused.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DocumentError {
    /// It does not parse.
    #[error("it is no valid JSON")]
    Json(#[source] serde_json::Error),
    /// A value is missing or of the wrong type.
    #[error("{at}: {message}")]
    Form { at: String, message: String },
    /// Arrays and objects within each other.
    #[error("{at}: more than {limit} levels", limit = strict::MAX_DEPTH)]
    Depth { at: String },
    /// One name twice in an object: readers disagree about which of them counts.
    #[error("{at}: the name is there twice")]
    Twice { at: String },
    /// A name that is told from a known one by upper and lower case only.
    #[error("{name:?} is {known:?} for some readers and not for others")]
    Letters { name: String, known: &'static str },
    /// Manifest and index at once (CVE-2021-41190).
    #[error("it is a manifest and an index at once: {names}")]
    Ambiguous { names: String },
    /// Its own media type is not the one that it was announced with.
    #[error("mediaType: it says {own:?}, what points to it says {announced:?}")]
    MediaType { own: String, announced: String },
    /// Nothing that leads to an image.
    #[error("media type {0:?} is neither an image manifest nor an index")]
    UnknownKind(String),
    /// Docker's manifests of before 2016.
    #[error("it is a docker manifest of schema 1, whose layers nothing vouches for")]
    Schema1,
    /// Indexes within each other.
    #[error("it is an index in an index, more than {limit} levels deep")]
    Nested { limit: usize },
    /// A value that means nothing or something dangerous.
    #[error("{at}: {value:?} {what}")]
    Value { at: String, value: String, what: &'static str },
    /// Two counts that have to go together.
    #[error("{at}: there are {actual}, for {layers} layers")]
    Count { at: &'static str, actual: usize, layers: usize },
    /// A blob of 2^63 bytes or more.
    #[error("{at}: no blob is as large as {size} bytes")]
    Size { at: String, size: String },
    /// More than anybody needs.
    #[error("there are more than {limit} {what}")]
    TooMany { what: &'static str, limit: usize },
}

impl DocumentError {
    /// Whether it is too large rather than wrong.
    pub fn is_limit(&self) -> bool {
        matches!(self, Self::Size { .. } | Self::TooMany { .. })
    }
}

/// Reads JSON of any kind that means one thing only.
///
/// # Errors
/// [`DocumentError`].
pub fn read<T: DeserializeOwned>(json: &[u8]) -> Result<T, DocumentError> {
    strict::check(json)?;
    let mut deserializer = serde_json::Deserializer::from_slice(json);
    serde_path_to_error::deserialize(&mut deserializer).map_err(|error| DocumentError::Form {
        at: strict::clip(&error.path().to_string()),
        message: strict::clip(&error.inner().to_string()),
    })
}

/// What decides which document it is, before anything else is believed.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Head {
    #[serde(default)]
    schema_version: Option<serde_json::Number>,
    #[serde(default)]
    media_type: Option<String>,
    #[serde(default)]
    config: Option<IgnoredAny>,
    #[serde(default)]
    layers: Option<IgnoredAny>,
    #[serde(default)]
    manifests: Option<IgnoredAny>,
    #[serde(default)]
    fs_layers: Option<IgnoredAny>,
}

impl Head {
    fn check(json: &[u8], announced: &str) -> Result<(), DocumentError> {
        let head: Head = read(json)?;
        if head.fs_layers.is_some() || head.schema_version.as_ref().and_then(|v| v.as_u64()) == Some(1) {
            return Err(DocumentError::Schema1);
        }
        if head.manifests.is_some() && (head.layers.is_some() || head.config.is_some()) {
            let names = [("config", &head.config), ("layers", &head.layers), ("manifests", &head.manifests)];
            let names: Vec<&str> =
                names.iter().filter(|(_, it)| it.is_some()).map(|(name, _)| *name).collect();
            return Err(DocumentError::Ambiguous { names: names.join(", ") });
        }
        if let Some(own) = head.media_type.as_deref().filter(|own| !own.is_empty() && *own != announced) {
            let (own, announced) = (strict::clip(own), strict::clip(announced));
            return Err(DocumentError::MediaType { own, announced });
        }
        match head.schema_version {
            Some(version) if version.as_u64() == Some(2) => Ok(()),
            version => Err(DocumentError::Value {
                at: "schemaVersion".to_owned(),
                value: version.map(|version| version.to_string()).unwrap_or_default(),
                what: "is not 2",
            }),
        }
    }
}

/// Media type of a manifest or an index that nothing announces: its own, or what its parts say.
///
/// # Errors
/// [`DocumentError`], [`DocumentError::UnknownKind`] among them.
pub fn own_media_type(json: &[u8]) -> Result<String, DocumentError> {
    let head: Head = read(json)?;
    match head.media_type {
        Some(own) if is_manifest(&own) || is_index(&own) => Ok(own),
        Some(other) if !other.is_empty() => Err(unknown_kind(&other)),
        _ if head.manifests.is_some() => Ok(media_type::OCI_INDEX.to_owned()),
        _ => Ok(media_type::OCI_MANIFEST.to_owned()),
    }
}

/// Whether this is the media type of an image manifest.
pub fn is_manifest(media_type: &str) -> bool {
    matches!(media_type, media_type::OCI_MANIFEST | media_type::DOCKER_MANIFEST)
}

/// Whether this is the media type of an index.
pub fn is_index(media_type: &str) -> bool {
    matches!(media_type, media_type::OCI_INDEX | media_type::DOCKER_INDEX)
}

/// Why something of this media type leads to no image.
pub fn unknown_kind(media_type: &str) -> DocumentError {
    if media_type.starts_with("application/vnd.docker.distribution.manifest.v1") {
        return DocumentError::Schema1;
    }
    DocumentError::UnknownKind(strict::clip(media_type))
}

/// Reads an image manifest that something announces with this media type.
///
/// # Errors
/// [`DocumentError`].
pub fn read_manifest(json: &[u8], announced: &str) -> Result<Manifest, DocumentError> {
    Head::check(json, announced)?;
    if !is_manifest(announced) {
        let (own, announced) = (strict::clip(announced), media_type::OCI_MANIFEST.to_owned());
        return Err(DocumentError::MediaType { own, announced });
    }
    let manifest: Manifest = read(json)?;
    letters(
        &manifest.extra,
        &["schemaVersion", "mediaType", "config", "layers", "manifests", "annotations"],
    )?;
    check_layers(manifest.layers.len())?;
    Ok(manifest)
}

/// Reads an index that something announces with this media type.
///
/// # Errors
/// [`DocumentError`].
pub fn read_index(json: &[u8], announced: &str) -> Result<Index, DocumentError> {
    Head::check(json, announced)?;
    let index: Index = read(json)?;
    letters(&index.extra, &["schemaVersion", "mediaType", "config", "layers", "manifests", "annotations"])?;
    for (nth, descriptor) in index.manifests.iter().enumerate() {
        check_platform(nth, descriptor)?;
    }
    Ok(index)
}

/// Reads the config of an image with so many layers.
///
/// # Errors
/// [`DocumentError`].
pub fn read_config(json: &[u8], layers: usize) -> Result<ImageConfig, DocumentError> {
    check_layers(layers)?;
    let config: ImageConfig = read(json)?;
    letters(&config.extra, &["architecture", "variant", "os", "config", "rootfs", "history"])?;
    let count = |at, actual| DocumentError::Count { at, actual, layers };
    if config.rootfs.diff_ids.len() != layers {
        return Err(count("rootfs.diff_ids", config.rootfs.diff_ids.len()));
    }
    let made_layers = config.history.iter().filter(|entry| !entry.empty_layer).count();
    if made_layers > layers {
        return Err(count("history without empty_layer", made_layers));
    }
    check_word("os", &config.os)?;
    check_word("architecture", &config.architecture)?;
    check_word("variant", config.variant.as_deref().unwrap_or_default())?;
    check_run_config(&config)?;
    Ok(config)
}

/// As many layers as an image may have.
///
/// # Errors
/// [`DocumentError::TooMany`].
pub fn check_layers(count: usize) -> Result<(), DocumentError> {
    if count > MAX_LAYERS {
        return Err(DocumentError::TooMany { what: "layers", limit: MAX_LAYERS });
    }
    Ok(())
}

fn letters(extra: &Extra, known: &[&'static str]) -> Result<(), DocumentError> {
    for name in extra.keys() {
        if let Some(known) = known.iter().find(|known| known.eq_ignore_ascii_case(name)) {
            return Err(DocumentError::Letters { name: strict::clip(name), known });
        }
    }
    Ok(())
}

fn check_platform(nth: usize, descriptor: &Descriptor) -> Result<(), DocumentError> {
    let Some(platform) = &descriptor.platform else { return Ok(()) };
    let at = |name: &str| format!("manifests[{nth}].platform.{name}");
    check_word(&at("os"), &platform.os)?;
    check_word(&at("architecture"), &platform.architecture)?;
    check_word(&at("variant"), platform.variant.as_deref().unwrap_or_default())
}

/// Words of a platform become part of file names.
fn check_word(at: &str, word: &str) -> Result<(), DocumentError> {
    let fits = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'-' | b'.');
    if word.len() <= 64 && !word.starts_with('.') && word.bytes().all(fits) {
        return Ok(());
    }
    Err(value(at, word, "is no word of a platform"))
}

fn check_run_config(config: &ImageConfig) -> Result<(), DocumentError> {
    let run = &config.config;
    for (nth, variable) in run.env.iter().enumerate() {
        if matches!(variable.find('='), None | Some(0)) {
            return Err(value(&format!("config.Env[{nth}]"), variable, "is not of the form NAME=VALUE"));
        }
    }
    let lists = [
        ("Env", run.env.as_slice()),
        ("Entrypoint", run.entrypoint.as_deref().unwrap_or_default()),
        ("Cmd", run.cmd.as_deref().unwrap_or_default()),
        ("Shell", &run.shell),
    ];
    let listed = lists.iter().flat_map(|(name, list)| list.iter().map(move |text| (*name, text)));
    let single = [("User", &run.user), ("WorkingDir", &run.working_dir)];
    for (name, text) in listed.chain(single) {
        if text.contains('\0') {
            return Err(value(&format!("config.{name}"), text, "has a NUL in it"));
        }
    }
    Ok(())
}

fn value(at: &str, value: &str, what: &'static str) -> DocumentError {
    DocumentError::Value { at: at.to_owned(), value: strict::clip(value), what }
}
