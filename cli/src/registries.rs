//! The registries of the command line: whose configuration, whose credentials, whose certificates.

use std::path::PathBuf;
use std::sync::{Arc, Once};

use kiln_build::registry::{Bases, PullPolicy, Registries, base_image, stored_image};
use kiln_content::ImageRecord;
use kiln_oci::{Platform, Reference};
use kiln_registry::{
    Client, Credential, CredentialError, CredentialSource, DockerConfig, NoCredentials, Settings,
};

use crate::args::registry::{BaseArgs, MirrorOf, RegistryArgs, RunPullArgs};
use crate::config::{Config, limits};
use crate::errors::{Failure, exit, say};
use crate::platforms::asked_one;
use crate::session::Session;

/// docker's file of credentials, if there is a place for one.
pub(crate) fn docker_config() -> Option<DockerConfig> {
    DockerConfig::usual()
}

/// How registries are asked, as the command line and the configuration file say.
pub(crate) fn settings(config: &Config, args: &RegistryArgs) -> Settings {
    let mut settings = Settings {
        insecure: config.registries.insecure.iter().cloned().collect(),
        token_hosts: config.registries.token_hosts.iter().cloned().collect(),
        mirrors: config.registries.mirrors.clone(),
        ca_files: config.ca_certificates.clone(),
        ..Settings::default()
    };
    settings.insecure.extend(args.insecure_registry.iter().cloned());
    // In the order of the command line, before those of the file.
    for MirrorOf { registry, mirror } in args.registry_mirror.iter().rev() {
        settings.mirrors.entry(registry.clone()).or_default().insert(0, mirror.clone());
    }
    if let Some(stall) = config.registries.stall_timeout.filter(|stall| !stall.is_zero()) {
        settings.stall = stall;
        // As much for each second as ever.
        let millis = u64::try_from(stall.as_millis()).unwrap_or(u64::MAX);
        settings.stall_bytes = (millis.saturating_mul(1024) / 1000).clamp(1, 1 << 20);
    }
    if let Some(deadline) = args.transfer_timeout.or(config.registries.transfer_timeout) {
        settings.blob_deadline = deadline;
        settings.document_deadline = settings.document_deadline.min(deadline);
    }
    if let Some(tries) = config.registries.tries {
        settings.tries = tries.get();
    }
    let variable = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    if let Some(dir) = variable("XDG_CONFIG_HOME").or_else(|| Some(variable("HOME")?.join(".config"))) {
        settings.cert_dirs.extend([dir.join("docker/certs.d"), dir.join("containers/certs.d")]);
    }
    settings
}

/// Registries, with the user's credentials. Reads nothing before the first request.
pub(crate) fn registries(config: &Config, args: &RegistryArgs) -> Arc<Registries> {
    by(config, client(config, args))
}

fn by(config: &Config, client: Client) -> Arc<Registries> {
    Arc::new(Registries::new(client).with_aliases(config.registries.aliases.clone()))
}

/// The same without what builds have to do with them.
pub(crate) fn client(config: &Config, args: &RegistryArgs) -> Client {
    Client::new(settings(config, args), credentials())
}

fn credentials() -> Arc<dyn CredentialSource> {
    match docker_config() {
        Some(file) => Arc::new(Watched { file, told: Once::new() }),
        None => Arc::new(NoCredentials),
    }
}

/// Says once that others can read the credentials.
struct Watched {
    file: DockerConfig,
    told: Once,
}

impl CredentialSource for Watched {
    fn credential(&self, key: &str) -> Result<Option<Credential>, CredentialError> {
        let found = self.file.credential(key)?;
        if self.file.is_open_to_others() && self.file.keys().is_ok_and(|keys| !keys.is_empty()) {
            self.told.call_once(|| {
                let path = self.file.path().display();
                say(&format!("warning: others can read the credentials in {path}; `chmod 600` helps\n"));
            });
        }
        Ok(found)
    }
}

/// Where a build takes images from, and pushes to. `trusted`: files with certificates, beside those of the
/// configuration.
pub(crate) fn bases(
    args: &BaseArgs,
    config: &Config,
    trusted: &[PathBuf],
    pushes: bool,
) -> Result<Bases, Failure> {
    if args.offline && pushes {
        return Err(Failure::usage("--offline: nothing can be pushed then"));
    }
    if args.offline && args.pull == Some(PullPolicy::Always) {
        return Err(Failure::usage("--offline and --pull=always: one of them has to go"));
    }
    let policy = if args.offline { PullPolicy::Never } else { args.pull.unwrap_or_default() };
    let registries = (!args.offline).then(|| {
        let mut settings = settings(config, &args.registries);
        settings.ca_files.extend_from_slice(trusted);
        by(config, Client::new(settings, credentials()))
    });
    Ok(Bases { policy, tag_life: config.registries.tag_ttl, registries })
}

/// Says what deserved a look while registries were asked.
pub(crate) fn tell_notes(registries: &Registries) {
    for note in registries.client().take_notes() {
        say(&format!("warning: {note}\n"));
    }
}

/// The image of the store that `text` means for `platform`.
fn image_for(session: &Session, text: &str, platform: &Platform) -> Result<ImageRecord, Failure> {
    let found = session.find(text)?;
    let actual = session.config(&found)?.platform();
    if platform.distance(&actual).is_some() {
        return Ok(found);
    }
    let reference = text.parse::<Reference>().ok();
    let stored = reference.map(|name| stored_image(&session.engine, &name, platform, &session.cancel));
    match stored.transpose()?.flatten() {
        Some(stored) => Ok(stored),
        None => Err(Failure::source(format!("image {text} is for {actual}, not for {platform}"))),
    }
}

/// The image that a container is made of: `text` is a name, or the first digits of an ID.
///
/// Costs what [`Session::find`] does when the image is in the store, unless the registry is to be asked.
pub(crate) fn image_to_run(
    session: &Session,
    text: &str,
    args: &RunPullArgs,
) -> Result<ImageRecord, Failure> {
    let policy = args.pull.unwrap_or_default();
    let asked = asked_one(args.platform.as_ref())?;
    let found = match &asked {
        None => session.find(text),
        Some(platform) => image_for(session, text, platform),
    };
    let Ok(reference) = text.parse::<Reference>() else { return found };
    match (&found, policy) {
        (_, PullPolicy::Never) | (Ok(_), PullPolicy::Missing) => return found,
        (Err(failure), _) if failure.exit_code() != exit::SOURCE => return found,
        // What is found by its ID has no registry.
        (Ok(_), _) if session.engine.store.resolve(&reference)?.is_none() => return found,
        _ => {}
    }
    let config = Config::read()?;
    let registries = registries(&config, &args.registries);
    let platform = asked.unwrap_or_else(Platform::host);
    if found.is_err() {
        say(&format!("{}: pulling, since it is not in the store\n", reference.familiar()));
    }
    let mut engine = session.engine.clone();
    engine.limits = limits(None, engine.store.root())?;
    let bases = Bases { policy, tag_life: None, registries: Some(registries) };
    let mut note = |text: String| say(&format!("warning: {text}\n"));
    let image = base_image(&engine, &bases, &reference, &platform, &session.cancel, &mut note);
    image?.map_or(found, Ok)
}
