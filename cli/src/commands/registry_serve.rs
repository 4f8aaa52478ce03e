//! `kiln registry serve`

use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use kiln_registry_server::{Collection, Limits, MirrorOf, Rule, Server, Settings, TlsFiles};
use serde::Deserialize;
use tokio::signal::unix::{SignalKind, signal};

use super::print;
use crate::args::registry::RegistryArgs;
use crate::args::registry_serve::{RegistryCommand, ServeArgs};
use crate::args::store::{Size, parse_duration};
use crate::config::Config;
use crate::errors::{Failure, say};
use crate::{registries, rootless};

const PORT: u16 = 5000;
/// A tag of the registry behind a mirror is good for so long.
const TAG_LIFE: Duration = Duration::from_secs(300);
/// Each waits for the disk; more at once would not make it faster.
const DISK_THREADS: usize = 32;
/// A push takes longer than less, between its first blob and its manifest.
const MIN_GRACE: Duration = Duration::from_secs(120);

/// The file with the settings.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default, rename_all = "kebab-case")]
struct File {
    dir: Option<PathBuf>,
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
    gc_untagged: bool,
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

pub(crate) fn run(command: &RegistryCommand) -> Result<u8, Failure> {
    let RegistryCommand::Serve(args) = command;
    let file = match &args.config {
        Some(path) => read(path)?,
        None => File::default(),
    };
    let settings = settings(args, file)?;
    let scheme = if settings.tls.is_some() { "https" } else { "http" };
    let place = settings.directory.display().to_string();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .max_blocking_threads(DISK_THREADS)
        .build()
        .map_err(|error| Failure::store(format!("threads cannot be started: {error}")))?;
    runtime.block_on(async {
        let waited = |error| Failure::store(format!("signals cannot be waited for: {error}"));
        let mut ends = [SignalKind::terminate(), SignalKind::interrupt()].map(signal).into_iter();
        let (Some(term), Some(int)) = (ends.next(), ends.next()) else { return Ok(()) };
        let (mut term, mut int) = (term.map_err(waited)?, int.map_err(waited)?);
        let server = Server::bind(settings).await?;
        print(&format!("registry at {scheme}://{}, in {place}\n", server.address()))?;
        let end = async move {
            tokio::select! {
                _ = term.recv() => {}
                _ = int.recv() => {}
            }
        };
        server.run(end, |problem| say(&format!("warning: {problem}\n"))).await;
        Ok::<_, Failure>(())
    })?;
    // Not for whoever still reads a slow disk.
    runtime.shutdown_timeout(Duration::from_secs(1));
    Ok(0)
}

fn read(path: &Path) -> Result<File, Failure> {
    let text = std::fs::read_to_string(path)
        .map_err(|error| Failure::source(format!("{}: {error}", path.display())))?;
    toml::from_str(&text).map_err(|error| Failure::usage(format!("{}: {error}", path.display())))
}

fn settings(args: &ServeArgs, file: File) -> Result<Settings, Failure> {
    let defaults = (Limits::default(), Collection::default());
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
    let rule = |rule: &FileRule| {
        Rule::parse(&rule.repositories, &rule.users, &rule.allow)
            .map_err(|error| Failure::usage(format!("rights: {error}")))
    };
    let rights = file.rights.iter().map(rule).collect::<Result<Vec<_>, _>>()?;
    if !rights.is_empty() && accounts.is_none() {
        return Err(Failure::usage("rights are for accounts, and there are none")
            .hint("name a file of them with `--htpasswd` or as htpasswd in the file"));
    }
    let mirror = match args.mirror.clone().or(file.mirror) {
        None => None,
        Some(domain) => Some(MirrorOf {
            client: registries::client(&Config::read()?, &RegistryArgs::default()),
            domain: super::login::domain(&domain)?,
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
        grace: time("gc-grace", file.gc_grace.as_deref())?.unwrap_or(defaults.1.grace),
        untagged: file.gc_untagged,
    };
    if collection.grace < MIN_GRACE {
        return Err(Failure::usage("gc-grace: within less than 2m what is being pushed would be removed"));
    }
    let directory = match args.dir.clone().or(file.dir) {
        Some(dir) => std::path::absolute(&dir).unwrap_or(dir),
        None => usual_directory()?,
    };
    let read_only = args.read_only || file.read_only;
    Ok(Settings { directory, listen, tls, accounts, rights, read_only, mirror, limits, collection })
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
    use super::*;

    fn check(text: &str) -> Result<Settings, String> {
        let file: File = toml::from_str(text).map_err(|error| error.to_string())?;
        let args = ServeArgs {
            config: None,
            dir: Some("/d".into()),
            listen: None,
            tls_cert: None,
            tls_key: None,
            htpasswd: None,
            read_only: false,
            mirror: None,
            anyone: false,
            plain_http: false,
        };
        settings(&args, file).map_err(|failure| failure.render())
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
