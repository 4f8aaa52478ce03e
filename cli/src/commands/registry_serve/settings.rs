//! What a registry is told by flags and by its file.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use kiln_registry_server::{Collection, Content, Limits, MirrorOf, Rule, Settings, Takes, TlsFiles};
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

/// What is pushed to a store and belongs to no image is kept so long: who pushes comes with the manifest soon.
pub(super) const PUSHED_GRACE: Duration = Duration::from_secs(3600);
/// It is looked for so often.
const PUSHED_EVERY: Duration = Duration::from_secs(600);
/// So many bytes of it may wait at once.
const PUSHED_WAITING_BYTES: u64 = 64 << 30;

/// What a registry needs of a store.
pub(super) struct OfStore {
    pub(super) images: Arc<dyn Takes>,
    /// Where it keeps what was pushed.
    pub(super) directory: PathBuf,
}

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
    pub(super) push: bool,
    mirror: Option<String>,
    mirror_tag_ttl: Option<String>,
    anyone: bool,
    plain_http: bool,
    max_blob: Option<String>,
    max_waiting: Option<String>,
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

/// All of it; `store` has the images that it gives out, if it shall have no directory of its own.
pub(super) fn settings(args: &ServeArgs, file: File, store: Option<OfStore>) -> Result<Settings, Failure> {
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
    if store.is_some() && (args.dir.is_some() || file.dir.is_some()) {
        return Err(Failure::usage("store and dir: a registry gives out what is in one of them"));
    }
    if store.is_some() && (args.mirror.is_some() || file.mirror.is_some()) {
        return Err(Failure::usage(
            "store and mirror: what is fetched needs a directory of the registry's own",
        ));
    }
    let read_only = args.read_only || file.read_only;
    let push = args.push || file.push;
    if push && store.is_none() {
        return Err(Failure::usage(
            "push is for a store's registry; one with a directory takes pushes anyway",
        )
        .hint("`--read-only` is what keeps others from pushing to a directory"));
    }
    if push && read_only {
        return Err(Failure::usage("push and read-only: it is one or the other"));
    }
    let mirror = match args.mirror.clone().or(file.mirror) {
        None => None,
        Some(domain) => Some(MirrorOf {
            client: registries::client(&Config::read()?, &RegistryArgs::default()),
            domain: login::domain(&domain)?,
            tag_life: time("mirror-tag-ttl", file.mirror_tag_ttl.as_deref())?.unwrap_or(TAG_LIFE),
        }),
    };
    let blob_bytes = size("max-blob", file.max_blob.as_deref())?.unwrap_or(defaults.0.blob_bytes);
    let waiting_bytes = size("max-waiting", file.max_waiting.as_deref())?;
    let limits = Limits {
        blob_bytes,
        waiting_bytes: waiting_bytes.or(store.is_some().then_some(PUSHED_WAITING_BYTES)),
        connections: file.max_connections.unwrap_or(defaults.0.connections).clamp(1, 1 << 16),
        uploads: file.max_uploads.unwrap_or(defaults.0.uploads),
        upload_life: time("upload-life", file.upload_life.as_deref())?.unwrap_or(defaults.0.upload_life),
        ..defaults.0
    };
    let collection = Collection {
        every: match file.gc_every.as_deref() {
            Some("never") => None,
            other => {
                time("gc-every", other)?.or(store.is_some().then_some(PUSHED_EVERY)).or(defaults.1.every)
            }
        },
        grace: grace.unwrap_or(if store.is_some() { PUSHED_GRACE } else { defaults.1.grace }),
        // What no name leads to any more is of no use to a store.
        untagged: file.gc_untagged || store.is_some(),
    };
    if collection.grace < MIN_GRACE {
        return Err(Failure::usage("gc-grace: within less than 2m what is being pushed would be removed"));
    }
    if limits.upload_life < MIN_UPLOAD_LIFE {
        return Err(Failure::usage("upload-life: less than 1s is no time to go on in"));
    }
    // Who pushes to a store decides what builds on this machine stand on: that has to be meant.
    let read_only = read_only || (store.is_some() && !push);
    let content = match store {
        Some(OfStore { images, directory }) => Content::Pushed { images, directory },
        None => Content::Directory(directory(args.dir.clone().or(file.dir))?),
    };
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

fn size(name: &str, text: Option<&str>) -> Result<Option<u64>, Failure> {
    match text.map(|text| (text, text.parse::<Size>())) {
        None => Ok(None),
        Some((_, Ok(Size::Bytes(bytes)))) => Ok(Some(bytes)),
        Some((text, _)) => Err(Failure::usage(format!("{name}: {text:?} is no size"))),
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
    use std::collections::HashMap;

    use kiln_oci::Digest;
    use kiln_registry_server::route::{Name, Tag, Which};
    use kiln_registry_server::{Found, Images, ImagesError, NotTaken, Pushed};

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

    impl Takes for Nothing {
        fn take(&self, _: &Name, _: &Tag, _: Pushed) -> Result<(), NotTaken> {
            Ok(())
        }

        fn names(&self) -> Result<HashMap<Name, HashMap<Tag, Digest>>, ImagesError> {
            Ok(HashMap::new())
        }

        fn can_forget(&self, _: &Name, _: &[Tag]) -> Result<(), NotTaken> {
            Ok(())
        }

        fn called(&self, name: &Name) -> Name {
            name.clone()
        }

        fn image(&self, _: &Name, _: &Tag) -> Result<Option<Digest>, ImagesError> {
            Ok(None)
        }

        fn forget(&self, _: &Name, _: &Tag) -> Result<bool, NotTaken> {
            Ok(false)
        }
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
            push: false,
            mirror: None,
            anyone: false,
            plain_http: false,
        };
        let store =
            file.store.then(|| OfStore { images: Arc::new(Nothing), directory: "/store/registry".into() });
        settings(&args, file, store).map_err(|failure| failure.render())
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
    }

    #[test]
    fn pushes_to_a_store_have_to_be_meant_and_are_bounded() {
        let without = check("store = true").unwrap();
        assert!(without.read_only && matches!(without.content, Content::Pushed { .. }));
        let with = check("store = true\npush = true").unwrap();
        assert!(!with.read_only && with.collection.untagged);
        assert_eq!((with.collection.grace, with.collection.every), (PUSHED_GRACE, Some(PUSHED_EVERY)));
        assert_eq!(with.limits.waiting_bytes, Some(PUSHED_WAITING_BYTES));
        let bounded = check("store = true\npush = true\nmax-waiting = \"1MB\"").unwrap();
        assert_eq!(bounded.limits.waiting_bytes, Some(1_000_000));
        assert_eq!(check("").unwrap().limits.waiting_bytes, None);
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
            ("push = true", "push is for a store"),
            ("store = true\npush = true\nread-only = true", "push and read-only"),
            ("max-waiting = \"much\"", "max-waiting"),
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
