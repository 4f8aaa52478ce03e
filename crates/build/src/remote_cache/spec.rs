//! What `--cache-from` and `--cache-to` ask for, taken apart as docker does.

use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::str::FromStr;

use kiln_oci::Reference;
use kiln_remote::{BucketConfig, Provider, Scope};

use crate::export::{Attributes, Compress, OutputError, Packing};

/// Where results are kept for others.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Place {
    /// `type=local`
    Directory(PathBuf),
    /// `type=s3`, `type=gcs`, `type=azblob`
    Bucket(BucketConfig, String),
    /// `type=registry`: a repository.
    Registry(Reference),
    /// `type=inline`: in the config of an image.
    Image(Option<Reference>),
}

impl Place {
    /// Whether it takes a network to get there.
    fn is_away(&self) -> bool {
        matches!(self, Self::Bucket(..) | Self::Registry(_))
    }

    /// As messages call it, without credentials.
    pub(super) fn label(&self) -> String {
        match self {
            Self::Directory(path) => format!("directory {}", path.display()),
            Self::Bucket(_, label) => label.clone(),
            Self::Registry(name) => format!("registry {}", name.familiar()),
            Self::Image(Some(name)) => format!("image {}", name.familiar()),
            Self::Image(None) => "the image".to_owned(),
        }
    }
}

/// `--cache-from`: where to look for results.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CacheSource {
    pub(super) place: Place,
    pub(super) scope: Scope,
    /// It is not asked; what came of it before is believed all the same.
    pub(super) is_silent: bool,
}

/// `--cache-to`: where to leave results.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CacheTarget {
    pub(super) place: Place,
    pub(super) scope: Scope,
    /// `mode=max`: results of all steps; else only what the image consists of.
    pub(super) all: bool,
    pub(super) compress: Compress,
    /// Blobs that are sent at a time.
    pub(super) parallel: usize,
}

/// What a machine sends or asks for at a time.
const PARALLEL: usize = 4;
/// More connections than that are no use to anybody.
const MAX_PARALLEL: usize = 64;

/// Attributes that docker knows and that change nothing here: an export that fails never fails a build, and
/// there is no manifest whose form could be chosen.
const WITHOUT_EFFECT: [&str; 3] = ["image-manifest", "oci-mediatypes", "touch_refresh"];

fn wrong(text: impl Into<String>) -> OutputError {
    OutputError::new(text.into())
}

impl FromStr for CacheSource {
    type Err = OutputError;

    /// `type=…` with attributes, or the name of an image.
    fn from_str(text: &str) -> Result<Self, OutputError> {
        if !text.contains('=') {
            let name = text.parse().map_err(|error| wrong(format!("{error}")))?;
            return Ok(Self { place: Place::Image(Some(name)), scope: Scope::default(), is_silent: false });
        }
        let mut attributes = Attributes::parse(text)?;
        let kind = attributes.kind()?;
        let scope = scope(&mut attributes)?;
        let place = match kind.as_str() {
            "local" => Place::Directory(needed(&mut attributes, "src", &kind)?.into()),
            "inline" => {
                let name = needed(&mut attributes, "ref", &kind)?;
                Place::Image(Some(name.parse().map_err(|error| wrong(format!("{error}")))?))
            }
            "registry" => registry(&mut attributes)?,
            _ => bucket(&mut attributes, &kind)?,
        };
        attributes.finish(&kind, &WITHOUT_EFFECT)?;
        Ok(Self { place, scope, is_silent: false })
    }
}

impl FromStr for CacheTarget {
    type Err = OutputError;

    /// `type=…` with attributes.
    fn from_str(text: &str) -> Result<Self, OutputError> {
        if text == "inline" {
            return "type=inline".parse();
        }
        let mut attributes = Attributes::parse(text)?;
        let kind = attributes.kind()?;
        let all = match attributes.take("mode").as_deref() {
            None | Some("min") => false,
            Some("max") => true,
            Some(other) => return Err(wrong(format!("mode={other} is none of min, max"))),
        };
        let scope = scope(&mut attributes)?;
        attributes.flag("ignore-error")?;
        let compress = attributes.compress(Packing::ZSTD)?.unwrap_or(Compress::new(Packing::ZSTD));
        if matches!(compress.packing, Packing::Estargz { .. }) {
            // Its tar is another one, and so would the image be.
            return Err(wrong("a cache has no compression=estargz"));
        }
        let mut parallel = PARALLEL;
        let place = match kind.as_str() {
            "local" => Place::Directory(needed(&mut attributes, "dest", &kind)?.into()),
            "inline" if all => {
                return Err(wrong("type=inline has the results that the image consists of: no mode=max"));
            }
            "inline" => Place::Image(None),
            "registry" => registry(&mut attributes)?,
            _ => bucket(&mut attributes, &kind)?,
        };
        if let Place::Bucket(config, _) = &place {
            parallel = config.parallel;
        }
        attributes.finish(&kind, &WITHOUT_EFFECT)?;
        Ok(Self { place, scope, all, compress, parallel })
    }
}

impl CacheSource {
    /// Whether what it says is believed by builds only that name it.
    pub(super) fn is_scoped(&self) -> bool {
        self.scope != Scope::default()
    }

    /// Tells it from all others; without credentials.
    pub(super) fn identity(&self) -> String {
        let mut text = format!("{} @{}", self.place.label(), self.scope);
        if let Place::Bucket(config, _) = &self.place {
            // Buckets of several servers, or accounts, may have one name.
            let is_place = |name: &str| ["endpoint", "account_name"].iter().any(|part| name.contains(part));
            let places = config.options.iter().filter(|(name, _)| is_place(name));
            places.for_each(|(name, value)| text.push_str(&format!(" {name}={value}")));
        }
        text
    }

    /// Does not ask it in this build.
    pub fn silence(&mut self) {
        self.is_silent = true;
    }

    /// What it is called without credentials, if it takes a network to get there.
    pub fn away(&self) -> Option<String> {
        self.place.is_away().then(|| self.place.label())
    }
}

impl CacheTarget {
    /// What it is called without credentials, if it takes a network to get there.
    pub fn away(&self) -> Option<String> {
        self.place.is_away().then(|| self.place.label())
    }

    /// Whether the results go into the image's config.
    pub(crate) fn is_inline(&self) -> bool {
        matches!(self.place, Place::Image(_))
    }
}

fn needed(attributes: &mut Attributes, name: &str, kind: &str) -> Result<String, OutputError> {
    let found = attributes.take(name).filter(|value| !value.is_empty());
    found.ok_or_else(|| wrong(format!("type={kind} needs {name}=…")))
}

fn registry(attributes: &mut Attributes) -> Result<Place, OutputError> {
    let name = needed(attributes, "ref", "registry")?;
    if attributes.flag("registry.insecure")? == Some(true) {
        return Err(wrong(
            "registry.insecure: list the registry under [registries] insecure in the configuration file",
        ));
    }
    Ok(Place::Registry(name.parse().map_err(|error| wrong(format!("{error}")))?))
}

/// The account that a URL of Azure's is of: the first part of the host's name. Where that has none, because it is an
/// address or a server of one's own on this machine, the path begins with it.
fn account(url: &str) -> &str {
    let rest = url.split_once("://").map_or(url, |(_, rest)| rest);
    let (place, path) = rest.split_once('/').unwrap_or((rest, ""));
    let host = place.rsplit_once(':').map_or(place, |(host, _)| host);
    let is_address = host == "localhost" || host.starts_with('[') || host.parse::<Ipv4Addr>().is_ok();
    let part = if is_address { path.split('/').next() } else { host.split('.').next() };
    part.unwrap_or_default()
}

/// `scope`, or `name` as docker calls it for buckets.
fn scope(attributes: &mut Attributes) -> Result<Scope, OutputError> {
    let (name, scope) = (attributes.take("name"), attributes.take("scope"));
    let Some(text) = scope.or(name) else { return Ok(Scope::default()) };
    Scope::new(&text).ok_or_else(|| wrong(format!("scope={text} is not 1 to 200 bytes long")))
}

fn bucket(attributes: &mut Attributes, kind: &str) -> Result<Place, OutputError> {
    let (provider, container, scheme) = match kind {
        "s3" => (Provider::S3, "bucket", "s3"),
        "gcs" => (Provider::Gcs, "bucket", "gs"),
        "azblob" => (Provider::Azure, "container", "az"),
        other => {
            let known = "local, inline, registry, s3, gcs, azblob";
            return Err(wrong(format!("type={other} is none of {known}")));
        }
    };
    let prefix = attributes.take("prefix").unwrap_or_default();
    let parallel = match attributes.take("upload_parallelism") {
        None => PARALLEL,
        Some(text) => {
            text.parse().ok().filter(|count| (1..=MAX_PARALLEL).contains(count)).ok_or_else(|| {
                wrong(format!("upload_parallelism={text} is no number from 1 to {MAX_PARALLEL}"))
            })?
        }
    };
    let mut options = Vec::new();
    if let Some(is_path) = attributes.flag("use_path_style")? {
        options.push(("virtual_hosted_style_request".to_owned(), (!is_path).to_string()));
    }
    let mut place = String::new();
    for (name, value) in attributes.rest() {
        if WITHOUT_EFFECT.contains(&name.as_str()) {
            continue;
        }
        if name == container {
            place.clone_from(&value);
        }
        // The library puts names behind the endpoint and a slash.
        let value = if name == "account_url" { value.trim_end_matches('/').to_owned() } else { value };
        let name = match (provider, name.as_str()) {
            // docker's names for what the library calls otherwise.
            (Provider::Azure, "container") => "container_name".to_owned(),
            (Provider::Azure, "account_url") => {
                options.push(("account_name".to_owned(), account(&value).to_owned()));
                "endpoint".to_owned()
            }
            (Provider::Azure, "secret_access_key") => "access_key".to_owned(),
            _ => name,
        };
        if !provider.knows(&name) {
            return Err(wrong(format!("type={kind} has no attribute {name:?}")));
        }
        options.push((name, value));
    }
    if place.is_empty() {
        return Err(wrong(format!("type={kind} needs {container}=…")));
    }
    let shown = prefix.trim_matches('/');
    let label = format!("{scheme}://{place}{}{shown}", if shown.is_empty() { "" } else { "/" });
    Ok(Place::Bucket(BucketConfig { provider, options, prefix, parallel }, label))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn source(text: &str) -> String {
        match text.parse::<CacheSource>() {
            Ok(source) => format!("{} @{}", source.place.label(), source.scope),
            Err(error) => error.to_string(),
        }
    }

    fn target(text: &str) -> String {
        match text.parse::<CacheTarget>() {
            Ok(target) => {
                let mode = if target.all { "max" } else { "min" };
                format!("{} @{} {mode} {}", target.place.label(), target.scope, target.compress.packing)
            }
            Err(error) => error.to_string(),
        }
    }

    #[test]
    fn sources_are_taken_apart() {
        assert_eq!(source("type=local,src=/x"), "directory /x @default");
        assert_eq!(source("type=local,src=/x,scope=feature/y"), "directory /x @feature/y");
        assert_eq!(source("app:1"), "image app:1 @default");
        assert_eq!(source("type=registry,ref=app:1"), "registry app:1 @default");
        assert_eq!(source("type=s3,bucket=b,region=r,prefix=/a/,name=n"), "s3://b/a @n");
        assert_eq!(source("type=s3,bucket=b,access_key_id=ID,secret_access_key=SECRET"), "s3://b @default");
        assert_eq!(source("type=gcs,bucket=b"), "gs://b @default");
        assert_eq!(
            source("type=azblob,account_url=https://me.blob.core.windows.net,container=c"),
            "az://c @default"
        );
    }

    #[test]
    fn the_account_of_azure_is_in_the_host_or_in_the_path() {
        for (url, expected) in [
            ("https://me.blob.core.windows.net", "me"),
            ("me.blob.core.windows.net/", "me"),
            ("https://me.blob.core.windows.net:443/", "me"),
            ("http://127.0.0.1:10000/devstoreaccount1", "devstoreaccount1"),
            ("http://localhost/me/", "me"),
            ("http://[::1]:10000/me", "me"),
            ("http://127.0.0.1:10000", ""),
        ] {
            assert_eq!(account(url), expected, "{url}");
        }
    }

    #[test]
    fn targets_are_taken_apart() {
        assert_eq!(target("type=local,dest=x"), "directory x @default min zstd:3");
        assert_eq!(
            target("type=local,dest=x,mode=max,compression=gzip,compression-level=9,ignore-error=true"),
            "directory x @default max gzip:9"
        );
        assert_eq!(target("type=inline"), "the image @default min zstd:3");
        assert_eq!(target("inline"), target("type=inline"));
        let many = "type=s3,bucket=b,upload_parallelism=9".parse::<CacheTarget>().unwrap();
        assert_eq!(many.parallel, 9);
    }

    #[test]
    fn what_is_wrong_is_said() {
        assert_eq!(target("type=local"), "type=local needs dest=…");
        assert_eq!(source("type=local,dest=x"), "type=local needs src=…");
        assert_eq!(target("type=local,dest=x,mode=all"), "mode=all is none of min, max");
        assert_eq!(target("type=local,dest=x,sauce=y"), "type=local has no attribute \"sauce\"");
        assert_eq!(target("type=s3,region=x"), "type=s3 needs bucket=…");
        assert_eq!(target("type=s3,bucket=b,regoin=x"), "type=s3 has no attribute \"regoin\"");
        assert_eq!(target("type=gha"), "type=gha is none of local, inline, registry, s3, gcs, azblob");
        assert_eq!(target("type=local,dest=x,compression=estargz"), "a cache has no compression=estargz");
        assert_eq!(target("dest=x"), "the type is missing");
        assert_eq!(source("type=local,src=x,scope="), "scope= is not 1 to 200 bytes long");
        assert_eq!(
            target("type=inline,mode=max"),
            "type=inline has the results that the image consists of: no mode=max"
        );
    }
}
