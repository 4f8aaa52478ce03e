//! The configuration file: `/etc/kiln/config.toml` as root, `$XDG_CONFIG_HOME/kiln/config.toml` as a
//! user; KILN_CONFIG names another.
//!
//! ```toml
//! max-layer = "100GB"     # unpack layers and archives of up to this size
//! ca-certificates = ["/etc/corp-ca.pem"]   # trusted by RUN steps and containers as well
//!
//! [registries]
//! insecure = ["host:5000"]     # may speak plain http, and show any certificate
//! mirrors = { "docker.io" = ["mirror.lan:5000", "https://harbor.lan/hub"] }   # read there first
//! stall-timeout = "30s"   # give up on a transfer that stands still, and try again
//! transfer-timeout = "1h"      # give up on a manifest or blob that takes longer, all tries together
//! tries = 5                    # of what brings nothing
//! token-hosts = ["auth.corp"]  # may get credentials as a token server of another host
//! tag-ttl = "1d"          # look up a pulled tag again after so long, when a build stands on it
//!
//! [registries.aliases]
//! debian = "registry.corp/base/debian"     # where the image of that name is
//!
//! [gc]                    # garbage collection, after builds as well
//! max-store = "50GB"      # or a part of the file system: "20%"
//! min-free = "10%"
//! keep-duration = "7d"
//! after-builds = true
//! ```

use std::collections::BTreeMap;
use std::io;
use std::num::NonZeroU32;
use std::path::{Path, PathBuf};
use std::time::Duration;

use kiln_build::gc::Policy;
use kiln_build::registry::Aliases;
use kiln_content::Space;
use kiln_executor::Authorities;
use kiln_layer::Limits;
use kiln_registry::Mirror;
use serde::{Deserialize, Deserializer};

use crate::args::registry::parse_deadline;
use crate::args::store::{Size, parse_duration};
use crate::errors::Failure;
use crate::rootless;

/// What the file says.
#[derive(Debug, Default, Deserialize, PartialEq, Eq)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub(crate) struct Config {
    #[serde(default, deserialize_with = "size")]
    pub(crate) max_layer: Option<Size>,
    #[serde(default)]
    pub(crate) ca_certificates: Vec<PathBuf>,
    #[serde(default)]
    pub(crate) registries: RegistriesConfig,
    #[serde(default)]
    pub(crate) gc: GcConfig,
}

/// `[registries]`
#[derive(Debug, Default, Clone, Deserialize, PartialEq, Eq)]
#[serde(deny_unknown_fields, default, rename_all = "kebab-case")]
pub(crate) struct RegistriesConfig {
    pub(crate) insecure: Vec<String>,
    #[serde(deserialize_with = "mirrors")]
    pub(crate) mirrors: BTreeMap<String, Vec<Mirror>>,
    #[serde(deserialize_with = "duration")]
    pub(crate) stall_timeout: Option<Duration>,
    #[serde(deserialize_with = "deadline")]
    pub(crate) transfer_timeout: Option<Duration>,
    pub(crate) tries: Option<NonZeroU32>,
    pub(crate) token_hosts: Vec<String>,
    #[serde(deserialize_with = "duration")]
    pub(crate) tag_ttl: Option<Duration>,
    #[serde(deserialize_with = "aliases")]
    pub(crate) aliases: Aliases,
}

/// `[gc]`
#[derive(Debug, Default, Clone, Deserialize, PartialEq, Eq)]
#[serde(deny_unknown_fields, default, rename_all = "kebab-case")]
pub(crate) struct GcConfig {
    #[serde(deserialize_with = "size")]
    pub(crate) max_store: Option<Size>,
    #[serde(deserialize_with = "size")]
    pub(crate) min_free: Option<Size>,
    #[serde(deserialize_with = "duration")]
    pub(crate) keep_duration: Option<Duration>,
    after_builds: Option<bool>,
}

impl GcConfig {
    /// The policy for a store on this file system.
    pub(crate) fn policy(&self, root: &Path) -> Policy {
        let whole = file_system_bytes(root);
        Policy {
            keep: self.keep_duration,
            max_store_bytes: self.max_store.map(|size| size.bytes(whole)),
            min_free_bytes: self.min_free.map(|size| size.bytes(whole)),
            ..Policy::default()
        }
    }

    /// Whether garbage is collected after builds: when there is a policy, unless it says otherwise.
    pub(crate) fn is_automatic(&self) -> bool {
        let Self { max_store, min_free, keep_duration, after_builds } = self;
        let any = max_store.is_some() || min_free.is_some() || keep_duration.is_some();
        after_builds.unwrap_or(any)
    }
}

fn file_system_bytes(root: &Path) -> u64 {
    Space::of(root).map_or(0, |space| space.total_bytes)
}

/// How much may be unpacked: what the command line says, else what the file says.
pub(crate) fn limits(named: Option<Size>, root: &Path) -> Result<Limits, Failure> {
    let named = match named {
        Some(named) => Some(named),
        None => Config::read()?.max_layer,
    };
    Ok(named.map_or_else(Limits::default, |size| Limits::vouched(size.bytes(file_system_bytes(root)))))
}

/// Files with certificates that processes shall trust: those that the configuration names, then `named`.
pub(crate) fn certificates(named: &[PathBuf]) -> Result<Vec<PathBuf>, Failure> {
    let mut files = Config::read()?.ca_certificates;
    if let Some(relative) = files.iter().find(|file| file.is_relative()) {
        let problem = format!("ca-certificates: {} is no absolute path", relative.display());
        return Err(Failure::usage(problem));
    }
    files.extend(named.iter().map(|file| std::path::absolute(file).unwrap_or_else(|_| file.clone())));
    Ok(files)
}

/// What is in those files.
pub(crate) fn authorities(named: &[PathBuf]) -> Result<Authorities, Failure> {
    let mut all = Authorities::default();
    for file in certificates(named)? {
        all.add(&file).map_err(|error| Failure::certificates(&file, &error))?;
    }
    Ok(all)
}

fn size<'de, D: Deserializer<'de>>(value: D) -> Result<Option<Size>, D::Error> {
    String::deserialize(value)?.parse().map(Some).map_err(serde::de::Error::custom)
}

/// A list for each registry.
fn mirrors<'de, D: Deserializer<'de>>(value: D) -> Result<BTreeMap<String, Vec<Mirror>>, D::Error> {
    let texts = BTreeMap::<String, Vec<String>>::deserialize(value)?;
    let parse = |(registry, mirrors): (String, Vec<String>)| {
        let mirrors: Result<Vec<Mirror>, _> = mirrors.iter().map(|mirror| mirror.parse()).collect();
        Ok((registry, mirrors.map_err(serde::de::Error::custom)?))
    };
    texts.into_iter().map(parse).collect()
}

/// A place for each name.
fn aliases<'de, D: Deserializer<'de>>(value: D) -> Result<Aliases, D::Error> {
    let mut aliases = Aliases::default();
    for (name, place) in BTreeMap::<String, String>::deserialize(value)? {
        aliases.insert(&name, &place).map_err(serde::de::Error::custom)?;
    }
    Ok(aliases)
}

fn duration<'de, D: Deserializer<'de>>(value: D) -> Result<Option<Duration>, D::Error> {
    parse_duration(&String::deserialize(value)?).map(Some).map_err(serde::de::Error::custom)
}

fn deadline<'de, D: Deserializer<'de>>(value: D) -> Result<Option<Duration>, D::Error> {
    parse_deadline(&String::deserialize(value)?).map(Some).map_err(serde::de::Error::custom)
}

impl Config {
    /// Reads the file; none is an empty one, unless KILN_CONFIG names it.
    pub(crate) fn read() -> Result<Self, Failure> {
        let named = std::env::var_os("KILN_CONFIG").filter(|path| !path.is_empty()).map(PathBuf::from);
        let Some(path) = named.clone().or_else(usual_path) else { return Ok(Self::default()) };
        let unreadable = |what: &dyn std::fmt::Display| Failure::usage(format!("{}: {what}", path.display()));
        match std::fs::read_to_string(&path) {
            Ok(text) => Self::parse(&text).map_err(|error| unreadable(&error)),
            Err(error) if named.is_none() && error.kind() == io::ErrorKind::NotFound => Ok(Self::default()),
            Err(error) => Err(unreadable(&error)),
        }
    }

    fn parse(text: &str) -> Result<Self, toml::de::Error> {
        toml::from_str(text)
    }
}

fn usual_path() -> Option<PathBuf> {
    if rootless::owns_system() {
        return Some(PathBuf::from("/etc/kiln/config.toml"));
    }
    let variable = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let config = variable("XDG_CONFIG_HOME").or_else(|| Some(variable("HOME")?.join(".config")))?;
    Some(config.join("kiln/config.toml"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_policy_is_read_and_makes_collection_automatic() {
        let config = Config::parse("[gc]\nmax-store = \"2GB\"\nkeep-duration = \"1d\"\n").unwrap();
        assert!(config.gc.is_automatic());
        let policy = config.gc.policy(Path::new("/"));
        assert_eq!(policy.max_store_bytes, Some(2_000_000_000));
        assert_eq!(policy.keep, Some(Duration::from_secs(86_400)));
        assert_eq!(policy.min_free_bytes, None);
        let off = Config::parse("[gc]\nmin-free = \"10%\"\nafter-builds = false\n").unwrap();
        assert!(!off.gc.is_automatic() && off.gc.policy(Path::new("/")).min_free_bytes > Some(0));
        assert!(!Config::parse("").unwrap().gc.is_automatic());
    }

    #[test]
    fn a_limit_stands_beside_the_policy() {
        let config = Config::parse("max-layer = \"2GiB\"\n[gc]\nmin-free = \"1%\"\n").unwrap();
        assert_eq!(config.max_layer, Some(Size::Bytes(2 << 30)));
        let named = limits(config.max_layer, Path::new("/"));
        assert!(named.is_ok_and(|limits| limits == Limits::vouched(2 << 30)));
    }

    #[test]
    fn mirrors_are_listed_for_each_registry() {
        let text =
            "[registries]\nstall-timeout = \"5s\"\nmirrors = { \"docker.io\" = [\"http://m/hub\", \"n\"] }\n";
        let config = Config::parse(text).unwrap().registries;
        assert_eq!(config.stall_timeout, Some(Duration::from_secs(5)));
        let hosts: Vec<_> =
            config.mirrors["docker.io"].iter().map(|m| (m.host.as_str(), m.insecure)).collect();
        assert_eq!(hosts, [("m", true), ("n", false)]);
        let error = Config::parse("[registries]\nmirrors = { \"x\" = [\"ftp://m\"] }\n").unwrap_err();
        assert!(error.to_string().contains("is no mirror"), "{error}");
    }

    #[test]
    fn what_is_wrong_is_said_with_its_line() {
        let files = Config::parse("ca-certificates = [\"/a.pem\"]\n").unwrap().ca_certificates;
        assert_eq!(files, [Path::new("/a.pem")]);
        for (text, said) in [
            ("ca-certificates = \"/a.pem\"\n", "line 1"),
            ("[gc]\n\nmax-stor = \"1GB\"\n", "line 3"),
            ("[gc]\nmax-store = \"much\"\n", "much"),
            ("[gc]\nkeep-duration = 7\n", "line 2"),
            ("[registries]\ntransfer-timeout = \"0s\"\n", "line 2"),
            ("[gc\n", "line 1"),
            ("[registries.aliases]\n\"debian:12\" = \"r.example/x\"\n", "\"debian:12\" is no short name"),
            ("[registries.aliases]\ndebian = \"team/debian\"\n", "says not where an image is"),
        ] {
            let error = Config::parse(text).unwrap_err().to_string();
            assert!(error.contains(said), "{error}");
        }
    }
}
