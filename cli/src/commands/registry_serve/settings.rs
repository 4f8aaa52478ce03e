//! What a registry is told by flags and by its file.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use kiln_registry_server::{Collection, Content, Images, Limits, MirrorOf, Rule, Settings, TlsFiles};
use serde::Deserialize;

use crate::args::registry::RegistryArgs;
use crate::args::registry_serve::ServeArgs;
use crate::args::store::{Size, parse_duration};
use crate::commands::login;
use crate::config::Config;
use crate::errors::Failure;
use crate::{registries, rootless};

const PORT: u16 = 5000;
/// A tag of the registry behind a mirror is good for so long.
const TAG_LIFE: Duration = Duration::from_secs(300);
/// A push takes longer than less, between its first blob and its manifest.
const MIN_GRACE: Duration = Duration::from_secs(120);
/// A client whose connection broke takes a moment to come back.
const MIN_UPLOAD_LIFE: Duration = Duration::from_secs(1);

/// The file with the settings.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default, rename_all = "kebab-case")]
pub(super) struct File {
    pub(super) dir: Option<PathBuf>,
    pub(super) store: bool,
    listen: Option<SocketAddr>,
    tls_cert: Option<PathBuf>,
    tls_key: Option<PathBuf>,
    htpasswd: Option<PathBuf>,
    read_only: bool,
    mirror: Option<String>,
    mirror_tag_ttl: Option<String>,
    anyone: bool,
    plain_http: bool,
    max_blob: Option<String>,
    max_connections: Option<usize>,
    max_uploads: Option<usize>,
    upload_life: Option<String>,
    gc_every: Option<String>,
    gc_grace: Option<String>,
    pub(super) gc_untagged: bool,
    rights: Vec<FileRule>,
}

/// `[[rights]]`
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct FileRule {
    repositories: Vec<String>,
    users: Vec<String>,
    allow: Vec<String>,
}

/// The file, if one is named.
pub(super) fn read(path: Option<&Path>) -> Result<File, Failure> {
    let Some(path) = path else { return Ok(File::default()) };
    let text = std::fs::read_to_string(path)
        .map_err(|error| Failure::source(format!("{}: {error}", path.display())))?;
    toml::from_str(&text).map_err(|error| Failure::usage(format!("{}: {error}", path.display())))
}

impl File {
    /// `gc-grace`
    pub(super) fn grace(&self) -> Result<Option<Duration>, Failure> {
        time("gc-grace", self.gc_grace.as_deref())
    }

    /// `[[rights]]`, for those who have accounts.
    pub(super) fn rights(&self, has_accounts: bool) -> Result<Vec<Rule>, Failure> {
        let rule = |rule: &FileRule| {
            Rule::parse(&rule.repositories, &rule.users, &rule.allow)
                .map_err(|error| Failure::usage(format!("rights: {error}")))
        };
        let rights = self.rights.iter().map(rule).collect::<Result<Vec<_>, _>>()?;
        if !rights.is_empty() && !has_accounts {
            return Err(Failure::usage("rights are for accounts, and there are none")
                .hint("name a file of them with `--htpasswd` or as htpasswd in the file"));
        }
        Ok(rights)
    }
}

/// All of it; `images` are those that it gives out, if it shall have no directory of its own.
pub(super) fn settings(
    args: &ServeArgs,
    file: File,
    images: Option<Arc<dyn Images>>,
) -> Result<Settings, Failure> {
    let defaults = (Limits::default(), Collection::default());
    let rights = file.rights(args.htpasswd.is_some() || file.htpasswd.is_some())?;
    let grace = file.grace()?;
    let listen = args.listen.or(file.listen).unwrap_or((Ipv4Addr::LOCALHOST, PORT).into());
    let tls = match (args.tls_cert.clone().or(file.tls_cert), args.tls_key.clone().or(file.tls_key)) {
        (Some(certificates), Some(key)) => Some(TlsFiles { certificates, key }),
        (None, None) => None,
        _ => return Err(Failure::usage("tls-cert and tls-key: one without the other is no use")),
    };
    let accounts = args.htpasswd.clone().or(file.htpasswd);
    let reach = Reach {
        others: !listen.ip().is_loopback(),
        tls: tls.is_some() || args.plain_http || file.plain_http,
        asks: accounts.is_some(),
        anyone: args.anyone || file.anyone,
    };
    reach.check()?;
    if images.is_some() && (args.dir.is_some() || file.dir.is_some()) {
        return Err(Failure::usage("store and dir: a registry gives out what is in one of them"));
    }
    if images.is_some() && (args.mirror.is_some() || file.mirror.is_some()) {
        return Err(Failure::usage(
            "store and mirror: what is fetched needs a directory of the registry's own",
        ));
    }
    let mirror = match args.mirror.clone().or(file.mirror) {
        None => None,
        Some(domain) => Some(MirrorOf {
            client: registries::client(&Config::read()?, &RegistryArgs::default()),
            domain: login::domain(&domain)?,
            tag_life: time("mirror-tag-ttl", file.mirror_tag_ttl.as_deref())?.unwrap_or(TAG_LIFE),
        }),
    };
    let blob_bytes = match file.max_blob.as_deref() {
        None => defaults.0.blob_bytes,
        Some(text) => match text.parse::<Size>() {
            Ok(Size::Bytes(bytes)) => bytes,
            _ => return Err(Failure::usage(format!("max-blob: {text:?} is no size"))),
        },
    };
    let limits = Limits {
        blob_bytes,
        connections: file.max_connections.unwrap_or(defaults.0.connections).clamp(1, 1 << 16),
        uploads: file.max_uploads.unwrap_or(defaults.0.uploads),
        upload_life: time("upload-life", file.upload_life.as_deref())?.unwrap_or(defaults.0.upload_life),
        ..defaults.0
    };
    let collection = Collection {
        every: match file.gc_every.as_deref() {
            Some("never") => None,
            other => time("gc-every", other)?.or(defaults.1.every),
        },
        grace: grace.unwrap_or(defaults.1.grace),
        untagged: file.gc_untagged,
    };
    if collection.grace < MIN_GRACE {
        return Err(Failure::usage("gc-grace: within less than 2m what is being pushed would be removed"));
    }
    if limits.upload_life < MIN_UPLOAD_LIFE {
        return Err(Failure::usage("upload-life: less than 1s is no time to go on in"));
    }
    let content = match images {
        Some(images) => Content::Images(images),
        None => Content::Directory(directory(args.dir.clone().or(file.dir))?),
    };
    let read_only = args.read_only || file.read_only;
    Ok(Settings { content, listen, tls, accounts, rights, read_only, mirror, limits, collection })
}

/// Who can reach the registry, and what they have to show.
struct Reach {
    /// Others than this machine.
    others: bool,
    tls: bool,
    asks: bool,
    anyone: bool,
}

impl Reach {
    fn check(&self) -> Result<(), Failure> {
        if self.others && !self.asks && !self.anyone {
            return Err(Failure::usage("other machines could push and pull here without a password")
                .hint("`--htpasswd FILE` asks for one; `--anyone` says that it is meant so"));
        }
        if self.others && self.asks && !self.tls {
            return Err(Failure::usage("passwords would cross the network for everybody to read").hint(
                "`--tls-cert FILE --tls-key FILE` make it https; `--plain-http` says that something in front does",
            ));
        }
        Ok(())
    }
}

fn time(name: &str, text: Option<&str>) -> Result<Option<Duration>, Failure> {
    let read = text.map(parse_duration).transpose();
    read.map_err(|error| Failure::usage(format!("{name}: {error}")))
}

/// The registry's directory: as it was said, or its usual place.
pub(super) fn directory(said: Option<PathBuf>) -> Result<PathBuf, Failure> {
    match said {
        Some(dir) => Ok(std::path::absolute(&dir).unwrap_or(dir)),
        None => usual_directory(),
    }
}

fn usual_directory() -> Result<PathBuf, Failure> {
    if rootless::owns_system() {
        return Ok(PathBuf::from("/var/lib/kiln-registry"));
    }
    let variable = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let data = variable("XDG_DATA_HOME").or_else(|| Some(variable("HOME")?.join(".local/share")));
    let data = data.ok_or_else(|| Failure::usage("HOME is not set; say where the registry is with --dir"))?;
    Ok(data.join("kiln-registry"))
}

#[cfg(test)]
mod tests {
    use kiln_oci::Digest;
    use kiln_registry_server::route::{Name, Tag, Which};
    use kiln_registry_server::{Found, ImagesError};

    use super::*;

    /// Images of which there are none.
    struct Nothing;

    impl Images for Nothing {
        fn repositories(&self) -> Result<Vec<Name>, ImagesError> {
            Ok(Vec::new())
        }

        fn tags(&self, _: &Name) -> Result<Vec<Tag>, ImagesError> {
            Ok(Vec::new())
        }

        fn manifest(&self, _: &Name, _: &Which) -> Result<Found, ImagesError> {
            Ok(Found::Missing)
        }

        fn make_ready(&self, _: &Name, _: &Tag) -> Result<Found, ImagesError> {
            Ok(Found::Missing)
        }

        fn blob(&self, _: &Name, _: &Digest) -> Result<Option<(std::fs::File, u64)>, ImagesError> {
            Ok(None)
        }

        fn tidy(&self) {}
    }

    fn check(text: &str) -> Result<Settings, String> {
        let file: File = toml::from_str(text).map_err(|error| error.to_string())?;
        let args = ServeArgs {
            config: None,
            dir: None,
            store: false,
            listen: None,
            tls_cert: None,
            tls_key: None,
            htpasswd: None,
            read_only: false,
            mirror: None,
            anyone: false,
            plain_http: false,
        };
        let images = file.store.then(|| Arc::new(Nothing) as Arc<dyn Images>);
        settings(&args, file, images).map_err(|failure| failure.render())
    }

    #[test]
    fn nothing_at_all_is_a_registry_on_loopback() {
        let settings = check("").unwrap();
        assert_eq!(settings.listen, "127.0.0.1:5000".parse().unwrap());
        assert!(settings.accounts.is_none() && settings.tls.is_none() && !settings.read_only);
    }

    #[test]
    fn a_file_says_everything() {
        let settings = check(
            "listen = \"0.0.0.0:443\"\ntls-cert = \"/c\"\ntls-key = \"/k\"\nhtpasswd = \"/h\"\n\
             max-blob = \"2GB\"\nupload-life = \"2h\"\ngc-every = \"never\"\ngc-grace = \"2m\"\n\
             [[rights]]\nrepositories = [\"team/*\"]\nusers = [\"ann\"]\nallow = [\"pull\"]\n",
        )
        .unwrap();
        assert_eq!(settings.limits.blob_bytes, 2_000_000_000);
        assert_eq!(settings.limits.upload_life, Duration::from_secs(7200));
        assert_eq!((settings.collection.every, settings.collection.grace), (None, MIN_GRACE));
        assert_eq!(settings.rights.len(), 1);
        assert!(
            matches!(check("dir = \"/d\"").unwrap().content, Content::Directory(dir) if dir == Path::new("/d"))
        );
        assert!(matches!(check("store = true").unwrap().content, Content::Images(_)));
    }

    #[test]
    fn what_would_be_open_to_others_has_to_be_meant() {
        for (text, said) in [
            ("listen = \"0.0.0.0:1\"", "--anyone"),
            ("listen = \"[::]:1\"\nhtpasswd = \"/h\"", "--plain-http"),
            ("tls-cert = \"/c\"", "one without the other"),
            ("[[rights]]\nrepositories=[\"a\"]\nusers=[\"b\"]\nallow=[\"pull\"]", "--htpasswd"),
            ("htpasswd=\"/h\"\n[[rights]]\nrepositories=[\"A\"]\nusers=[\"b\"]\nallow=[\"pull\"]", "\"A\""),
            ("max-blob = \"much\"", "much"),
            ("gc-every = \"x\"", "gc-every"),
            ("gc-grace = \"119s\"", "gc-grace"),
            ("upload-life = \"0s\"", "upload-life"),
            ("store = true\ndir = \"/d\"", "store and dir"),
            ("store = true\nmirror = \"docker.io\"", "store and mirror"),
            ("unknown = 1", "unknown"),
        ] {
            let error = check(text).err().unwrap();
            assert!(error.contains(said), "{text}: {error}");
        }
        assert!(check("listen = \"0.0.0.0:1\"\nanyone = true").is_ok());
        assert!(check("listen = \"0.0.0.0:1\"\nhtpasswd = \"/h\"\nplain-http = true").is_ok());
        assert!(check("listen = \"127.0.0.2:1\"\nhtpasswd = \"/h\"").is_ok());
    }
}
