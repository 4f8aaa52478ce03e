//! What `--output` asks for, taken apart as docker does.

use std::collections::BTreeMap;
use std::str::FromStr;

use kiln_oci::{Platform, Reference};

use super::archive::ArchiveFormat;
use super::file::Dest;
use super::packing::{Compress, Packing, PackingError};
use crate::attest::is_file_name;

/// One thing that a build shall leave.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Output {
    /// `type=image`, and `type=docker` without a file: an image in the store.
    Image(ImageOutput),
    /// `type=docker`, `type=oci`: an archive or a layout.
    Archive(ArchiveOutput),
    /// `type=tar`: the files.
    Tar(TreeOutput),
    /// `type=local`: the files, in a directory.
    Local(TreeOutput),
    /// `type=cacheonly`: nothing but the cache.
    CacheOnly,
}

/// How an image is written.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ImageFormat {
    /// `None`: nobody asked for anything.
    pub compress: Option<Compress>,
    /// `oci-mediatypes=false`
    pub docker_types: bool,
    /// `rewrite-timestamp`
    pub rewrite_timestamp: bool,
    /// `source-date-epoch`: seconds since 1970, instead of the build's `SOURCE_DATE_EPOCH`.
    pub epoch: Option<i64>,
    /// `annotation…`
    pub annotations: Annotations,
    /// `oci-artifact`: what is said of it is an artifact with the image as its subject.
    pub artifact: bool,
}

/// Annotations of what a platform's manifest is.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Annotations {
    /// Of the manifest; with a platform: of that one's alone.
    manifest: Vec<(Option<String>, String, String)>,
    /// Of the descriptor that points to it.
    descriptor: Vec<(Option<String>, String, String)>,
    /// Of the index that lists the manifests of several platforms.
    index: BTreeMap<String, String>,
    /// Of the descriptor that points to the index.
    index_descriptor: BTreeMap<String, String>,
}

impl Annotations {
    /// Those of the manifest for `platform`.
    pub fn of_manifest(&self, platform: &Platform) -> BTreeMap<String, String> {
        Self::of(&self.manifest, platform)
    }

    /// Those of the descriptor that points to the manifest for `platform`.
    pub fn of_descriptor(&self, platform: &Platform) -> BTreeMap<String, String> {
        Self::of(&self.descriptor, platform)
    }

    fn of(all: &[(Option<String>, String, String)], platform: &Platform) -> BTreeMap<String, String> {
        let name = platform.to_string();
        let fits = |(asked, _, _): &&(Option<String>, String, String)| {
            asked.as_ref().is_none_or(|asked| *asked == name)
        };
        all.iter().filter(fits).map(|(_, key, value)| (key.clone(), value.clone())).collect()
    }

    /// Those of the index.
    pub fn of_index(&self) -> &BTreeMap<String, String> {
        &self.index
    }

    /// Those of the descriptor that points to the index.
    pub fn of_index_descriptor(&self) -> &BTreeMap<String, String> {
        &self.index_descriptor
    }

    /// Whether they say something of an index, which only an image for several platforms has.
    pub fn need_index(&self) -> bool {
        !self.index.is_empty() || !self.index_descriptor.is_empty()
    }

    fn is_empty(&self) -> bool {
        self.manifest.is_empty() && self.descriptor.is_empty() && !self.need_index()
    }

    /// Adds `--annotation [TYPE[PLATFORM]:]KEY=VALUE`.
    ///
    /// # Errors
    /// [`OutputError`].
    pub fn add_flag(&mut self, text: &str) -> Result<(), OutputError> {
        let wrong = || OutputError(format!("annotation {text:?} is not [TYPE[PLATFORM]:]KEY=VALUE"));
        let (key, value) = text.split_once('=').ok_or_else(wrong)?;
        let (kinds, key) = match key.split_once(':') {
            // A key may have a colon of its own.
            Some((kinds, rest)) if kinds.split(',').all(|kind| kind_of(kind).is_some()) => (kinds, rest),
            _ => ("manifest", key),
        };
        if key.is_empty() {
            return Err(wrong());
        }
        kinds.split(',').try_for_each(|kind| self.add(kind, key, value))
    }

    /// `kind`: `manifest`, `manifest-descriptor`, perhaps with `[platform]`, `index` or `index-descriptor`.
    fn add(&mut self, kind: &str, key: &str, value: &str) -> Result<(), OutputError> {
        let unknown = || {
            OutputError(format!("{kind:?} is none of manifest, manifest-descriptor, index, index-descriptor"))
        };
        let (name, platform) = kind_of(kind).ok_or_else(unknown)?;
        if name.starts_with("index") && platform.is_some() {
            return Err(OutputError(format!("{kind:?}: an index is of all platforms")));
        }
        // Platforms go by many names.
        let platform = platform.map(|text| {
            text.parse::<Platform>()
                .map(|platform| platform.to_string())
                .map_err(|error| OutputError(error.to_string()))
        });
        let platform = platform.transpose()?;
        let (kind, entry) = (name, (platform, key.to_owned(), value.to_owned()));
        let pair = || (key.to_owned(), value.to_owned());
        match kind {
            "manifest" => self.manifest.push(entry),
            "manifest-descriptor" => self.descriptor.push(entry),
            "index" => self.index.extend([pair()]),
            "index-descriptor" => self.index_descriptor.extend([pair()]),
            _ => return Err(unknown()),
        }
        Ok(())
    }
}

/// `TYPE` or `TYPE[PLATFORM]`.
fn kind_of(text: &str) -> Option<(&str, Option<&str>)> {
    let (kind, platform) = match text.split_once('[') {
        Some((kind, rest)) => (kind, Some(rest.strip_suffix(']')?)),
        None => (text, None),
    };
    let kinds = ["manifest", "manifest-descriptor", "index", "index-descriptor"];
    kinds.contains(&kind).then_some((kind, platform))
}

/// An image in the store.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ImageOutput {
    /// Names for it.
    pub names: Vec<Reference>,
    /// How it is written.
    pub format: ImageFormat,
    /// `dangling-name-prefix`: for an image without a name, `PREFIX@DIGEST`.
    pub dangling_prefix: Option<Reference>,
    /// `name-canonical`: every name with the digest behind it, too.
    pub canonical: bool,
    /// `push`, `type=registry`: to the registries that its names say, too.
    pub push: bool,
    /// `push-by-digest`: without the tags.
    pub by_digest: bool,
}

/// A file or directory with an image in it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ArchiveOutput {
    /// Who shall read it.
    pub kind: ArchiveFormat,
    /// Names for the image.
    pub names: Vec<Reference>,
    /// Where it goes.
    pub dest: Dest,
    /// `tar=false`: a layout directory.
    pub directory: bool,
    /// How the image is written.
    pub format: ImageFormat,
}

/// Files without an image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TreeOutput {
    /// Where they go.
    pub dest: Dest,
    /// They stand below a directory named after the platform. `None`: they do when there are several.
    pub platform_split: Option<bool>,
    /// What becomes of what is there.
    pub mode: LocalMode,
    /// `source-date-epoch`, as for images.
    pub epoch: Option<i64>,
    /// `attestation-prefix`: what the names of files begin with that say something of the others.
    pub attestation_prefix: String,
}

/// What `type=local` does with files that are in the directory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum LocalMode {
    /// They stay.
    #[default]
    Copy,
    /// They go, unless the build made them too.
    Delete,
}

/// What is wrong with an output.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct OutputError(String);

impl OutputError {
    pub(crate) fn new(text: String) -> Self {
        Self(text)
    }
}

impl From<PackingError> for OutputError {
    fn from(error: PackingError) -> Self {
        Self(error.to_string())
    }
}

impl Output {
    /// What a build leaves when nobody says: an image of these names in the store.
    pub fn image(names: &[Reference]) -> Self {
        Self::Image(ImageOutput { names: names.to_vec(), ..ImageOutput::default() })
    }

    /// Gives it these names, if it takes names and there are any.
    pub fn set_names(&mut self, names: &[Reference]) {
        if names.is_empty() {
            return;
        }
        match self {
            Self::Image(output) => output.names = names.to_vec(),
            Self::Archive(output) => output.names = names.to_vec(),
            Self::Tar(_) | Self::Local(_) | Self::CacheOnly => {}
        }
    }

    /// Checks that it can be made: for several platforms or for one only, and with something to be said of it or
    /// without.
    ///
    /// # Errors
    /// [`OutputError`], which says what to ask for instead.
    pub fn check(&self, is_for_several: bool, is_attested: bool) -> Result<(), OutputError> {
        let refused = |what: &str| Err(OutputError(what.to_owned()));
        match self {
            Self::Archive(ArchiveOutput { kind: ArchiveFormat::Docker, .. }) if is_for_several => {
                refused("type=docker holds an image for one platform; type=oci and type=image hold several")
            }
            Self::Local(TreeOutput { platform_split: Some(false), mode: LocalMode::Delete, .. })
                if is_for_several =>
            {
                refused(
                    "mode=delete without platform-split: each platform would remove the files of the others",
                )
            }
            Self::Image(ImageOutput { format, .. }) | Self::Archive(ArchiveOutput { format, .. })
                if format.annotations.need_index() && !is_for_several && !is_attested =>
            {
                refused("an image for one platform has no index to annotate")
            }
            Self::Image(ImageOutput { format, .. })
            | Self::Archive(ArchiveOutput { kind: ArchiveFormat::Oci, format, .. })
                if format.docker_types && is_attested =>
            {
                refused("oci-mediatypes=false: docker's media types have none for attestations")
            }
            _ => Ok(()),
        }
    }

    /// How its image is written; `None`: there is none.
    pub fn format_mut(&mut self) -> Option<&mut ImageFormat> {
        match self {
            Self::Image(output) => Some(&mut output.format),
            Self::Archive(output) => Some(&mut output.format),
            Self::Tar(_) | Self::Local(_) | Self::CacheOnly => None,
        }
    }

    /// Whether it is an image.
    pub fn is_image(&self) -> bool {
        matches!(self, Self::Image(_) | Self::Archive(_))
    }

    /// Whether it goes to standard output.
    pub fn is_stdout(&self) -> bool {
        match self {
            Self::Archive(ArchiveOutput { dest, .. }) => *dest == Dest::Stdout,
            Self::Tar(TreeOutput { dest, .. }) => *dest == Dest::Stdout,
            Self::Image(_) | Self::Local(_) | Self::CacheOnly => false,
        }
    }

    /// Whether it can only be written in OCI's media types.
    pub(crate) fn oci_types(format: &ImageFormat, compress: &Compress) -> bool {
        !format.docker_types || compress.packing.needs_oci() || !format.annotations.is_empty()
    }
}

impl FromStr for Output {
    type Err = OutputError;

    /// `DIR`, `-`, or `type=…` with attributes, as docker's `--output` takes them.
    fn from_str(text: &str) -> Result<Self, OutputError> {
        let fields = csv(text)?;
        if let [only] = fields.as_slice()
            && only == text
            && !only.starts_with("type=")
        {
            return Ok(match Dest::parse(only) {
                Dest::Stdout => Self::Tar(TreeOutput::to(Dest::Stdout)),
                dest => Self::Local(TreeOutput::to(dest)),
            });
        }
        let mut attributes = Attributes::of_fields(&fields)?;
        let kind = attributes.kind()?;
        let output = attributes.output(&kind)?;
        attributes.finish(&kind, &[])?;
        Ok(output)
    }
}

impl TreeOutput {
    fn to(dest: Dest) -> Self {
        let attestation_prefix = String::new();
        Self { dest, platform_split: None, mode: LocalMode::Copy, epoch: None, attestation_prefix }
    }
}

/// The year 10000, which image configs cannot hold (RFC 3339).
const MAX_EPOCH: i64 = 253_402_300_800;

/// Attributes that nobody took yet.
#[derive(Default)]
pub(crate) struct Attributes {
    values: Vec<(String, String)>,
}

/// About what is so whatever they say: what is said of an image stands beside it, an image in the store is unpacked,
/// and all of its layers are in it.
const WITHOUT_EFFECT: [&str; 6] = [
    "attestation-inline",
    "attestation-prefix",
    "buildinfo",
    "buildinfo-attrs",
    "prefer-nondist-layers",
    "unpack",
];

impl Attributes {
    /// Those of one line of comma-separated values.
    pub(crate) fn parse(text: &str) -> Result<Self, OutputError> {
        // There may be passwords in it: it is not shown.
        let quotes = |_| OutputError("quotes stand around a whole field, or twice inside them".to_owned());
        Self::of_fields(&csv(text).map_err(quotes)?)
    }

    fn of_fields(fields: &[String]) -> Result<Self, OutputError> {
        let mut attributes = Self::default();
        for field in fields {
            // The value may be a password.
            let shown = field.chars().take(20).collect::<String>();
            let (key, value) =
                field.split_once('=').ok_or_else(|| OutputError(format!("{shown:?} is not NAME=VALUE")))?;
            let key = if key.starts_with("annotation") { key.to_owned() } else { key.to_lowercase() };
            attributes.values.push((key, value.to_owned()));
        }
        Ok(attributes)
    }

    /// `type`
    pub(crate) fn kind(&mut self) -> Result<String, OutputError> {
        self.take("type").ok_or_else(|| OutputError("the type is missing".to_owned()))
    }

    /// All that nobody took.
    pub(crate) fn rest(&mut self) -> Vec<(String, String)> {
        std::mem::take(&mut self.values)
    }

    /// Whether all were taken, those of `ignored` apart.
    pub(crate) fn finish(self, kind: &str, ignored: &[&str]) -> Result<(), OutputError> {
        match self.values.iter().find(|(key, _)| !ignored.contains(&key.as_str())) {
            Some((key, _)) => Err(OutputError(format!("type={kind} has no attribute {key:?}"))),
            None => Ok(()),
        }
    }

    /// How layers are packed; `None`: nobody asked.
    pub(crate) fn compress(&mut self, default: Packing) -> Result<Option<Compress>, OutputError> {
        let name = self.take("compression");
        let level = self.take("compression-level");
        let level = level.map(|level| {
            level.parse::<i64>().map_err(|_| OutputError(format!("compression-level={level} is no number")))
        });
        let level = level.transpose()?;
        let force = self.flag("force-compression")?;
        let asked = name.is_some() || level.is_some() || force.is_some();
        let compress = Compress::of_options(name.as_deref(), level, force.unwrap_or(false), default)?;
        Ok(asked.then_some(compress))
    }

    /// The last one of this name.
    pub(crate) fn take(&mut self, key: &str) -> Option<String> {
        let found = self.values.iter().rfind(|(known, _)| known == key).map(|(_, value)| value.clone());
        self.values.retain(|(known, _)| known != key);
        found
    }

    pub(crate) fn flag(&mut self, key: &str) -> Result<Option<bool>, OutputError> {
        let Some(value) = self.take(key) else { return Ok(None) };
        match value.as_str() {
            "1" | "t" | "T" | "true" | "TRUE" | "True" => Ok(Some(true)),
            "0" | "f" | "F" | "false" | "FALSE" | "False" => Ok(Some(false)),
            _ => Err(OutputError(format!("{key}={value} is neither true nor false"))),
        }
    }

    fn dest(&mut self) -> Option<Dest> {
        self.take("dest").map(|dest| Dest::parse(&dest))
    }

    fn output(&mut self, kind: &str) -> Result<Output, OutputError> {
        match kind {
            "image" => self.image(),
            // docker loads it: here it is in the store at once.
            "docker" if self.values.iter().all(|(key, _)| key != "dest") => self.image(),
            "docker" => self.archive(ArchiveFormat::Docker),
            "oci" => self.archive(ArchiveFormat::Oci),
            "tar" => {
                let dest = self.dest().unwrap_or(Dest::Stdout);
                let (platform_split, epoch) = (self.flag("platform-split")?, self.epoch()?);
                let attestation_prefix = self.attestation_prefix()?;
                let tree = TreeOutput::to(dest);
                Ok(Output::Tar(TreeOutput { platform_split, epoch, attestation_prefix, ..tree }))
            }
            "local" => {
                let dest = self.dest().ok_or_else(|| OutputError("type=local needs dest=DIR".to_owned()))?;
                if dest == Dest::Stdout {
                    return Err(OutputError("type=local writes a directory, not to `-`".to_owned()));
                }
                let mode = match self.take("mode").as_deref() {
                    None | Some("copy") => LocalMode::Copy,
                    Some("delete") => LocalMode::Delete,
                    Some(other) => return Err(OutputError(format!("mode={other} is none of copy, delete"))),
                };
                let (platform_split, epoch) = (self.flag("platform-split")?, self.epoch()?);
                let attestation_prefix = self.attestation_prefix()?;
                Ok(Output::Local(TreeOutput { dest, platform_split, mode, epoch, attestation_prefix }))
            }
            "cacheonly" => Ok(Output::CacheOnly),
            "registry" => {
                self.values.retain(|(key, _)| key != "push");
                self.values.push(("push".to_owned(), "true".to_owned()));
                self.image()
            }
            other => Err(OutputError(format!(
                "type={other} is none of image, docker, oci, tar, local, cacheonly, registry"
            ))),
        }
    }

    /// `source-date-epoch`; empty: none of its own.
    fn epoch(&mut self) -> Result<Option<i64>, OutputError> {
        let Some(text) = self.take("source-date-epoch").filter(|text| !text.is_empty()) else {
            return Ok(None);
        };
        let seconds = text.parse().ok().filter(|seconds| (0..MAX_EPOCH).contains(seconds));
        let wrong = || OutputError(format!("source-date-epoch={text} is no number of seconds since 1970"));
        seconds.map(Some).ok_or_else(wrong)
    }

    fn attestation_prefix(&mut self) -> Result<String, OutputError> {
        let prefix = self.take("attestation-prefix").unwrap_or_default();
        if prefix.is_empty() || is_file_name(&prefix) {
            return Ok(prefix);
        }
        Err(OutputError(format!("attestation-prefix={prefix:?} does not begin the name of a file")))
    }

    fn image(&mut self) -> Result<Output, OutputError> {
        let by_digest = self.flag("push-by-digest")?.unwrap_or(false);
        let push = self.flag("push")?.unwrap_or(by_digest);
        if self.flag("store")? == Some(false) {
            return Err(OutputError("store=false: an image is always kept in the store, too".to_owned()));
        }
        // Who may be spoken to without encryption is not for one build to say.
        if self.flag("registry.insecure")? == Some(true) {
            return Err(OutputError(
                "registry.insecure: use --insecure-registry HOST, or list the registry under [registries] \
                 insecure in the configuration file"
                    .to_owned(),
            ));
        }
        let prefix = self.take("dangling-name-prefix").map(|prefix| reference(&prefix)).transpose()?;
        Ok(Output::Image(ImageOutput {
            names: self.names()?,
            dangling_prefix: prefix,
            canonical: self.flag("name-canonical")?.unwrap_or(false),
            format: self.format()?,
            push,
            by_digest,
        }))
    }

    fn archive(&mut self, kind: ArchiveFormat) -> Result<Output, OutputError> {
        let dest = self.dest().unwrap_or(Dest::Stdout);
        let directory = self.flag("tar")? == Some(false);
        if directory && dest == Dest::Stdout {
            return Err(OutputError("tar=false writes a directory: say which with dest=DIR".to_owned()));
        }
        Ok(Output::Archive(ArchiveOutput {
            kind,
            names: self.names()?,
            dest,
            directory,
            format: self.format()?,
        }))
    }

    fn names(&mut self) -> Result<Vec<Reference>, OutputError> {
        let names = self.take("name").unwrap_or_default();
        names.split(',').map(str::trim).filter(|name| !name.is_empty()).map(reference).collect()
    }

    fn format(&mut self) -> Result<ImageFormat, OutputError> {
        let compress = self.compress(Packing::GZIP)?;
        let mut annotations = Annotations::default();
        for (key, value) in std::mem::take(&mut self.values) {
            match annotation(&key) {
                Some((kind, key)) => annotations.add(&kind, key, &value)?,
                None if WITHOUT_EFFECT.contains(&key.as_str()) => {}
                None => self.values.push((key, value)),
            }
        }
        Ok(ImageFormat {
            compress,
            docker_types: self.flag("oci-mediatypes")? == Some(false),
            rewrite_timestamp: self.flag("rewrite-timestamp")?.unwrap_or(false),
            epoch: self.epoch()?,
            annotations,
            artifact: self.flag("oci-artifact")?.unwrap_or(false),
        })
    }
}

/// `annotation[-KIND][\[PLATFORM\]].KEY`: kind with platform, and key.
fn annotation(key: &str) -> Option<(String, &str)> {
    let rest = key.strip_prefix("annotation")?;
    // A platform has no full stop; a key may have brackets.
    let (kind, key) = rest.split_once('.')?;
    let kind = match kind.strip_prefix('-') {
        Some(kind) => kind.to_owned(),
        None if kind.is_empty() || kind.starts_with('[') => format!("manifest{kind}"),
        None => return None,
    };
    (!key.is_empty()).then_some((kind, key))
}

fn reference(name: &str) -> Result<Reference, OutputError> {
    name.parse().map_err(|error| OutputError(format!("{error}")))
}

/// Fields of one line of comma-separated values, quotes and all (RFC 4180).
fn csv(line: &str) -> Result<Vec<String>, OutputError> {
    let wrong = || OutputError(format!("{line:?}: quotes stand around a whole field, or twice inside them"));
    let mut fields = Vec::new();
    let mut rest = line;
    loop {
        let mut field = String::new();
        if let Some(mut quoted) = rest.strip_prefix('"') {
            loop {
                let (text, after) = quoted.split_once('"').ok_or_else(wrong)?;
                field.push_str(text);
                match after.strip_prefix('"') {
                    Some(more) => {
                        field.push('"');
                        quoted = more;
                    }
                    None => {
                        rest = after;
                        break;
                    }
                }
            }
            if !rest.is_empty() && !rest.starts_with(',') {
                return Err(wrong());
            }
        } else {
            let end = rest.find(',').unwrap_or(rest.len());
            field.push_str(&rest[..end]);
            if field.contains('"') {
                return Err(wrong());
            }
            rest = &rest[end..];
        }
        fields.push(field);
        match rest.strip_prefix(',') {
            Some(more) => rest = more,
            None => return Ok(fields),
        }
    }
}

#[cfg(test)]
mod tests;
