//! The registries of the command line: whose configuration, whose credentials, whose certificates.

use std::path::PathBuf;
use std::sync::{Arc, Once};

use kiln_build::registry::{Bases, PullPolicy, Registries};
use kiln_registry::{
    Client, Credential, CredentialError, CredentialSource, DockerConfig, NoCredentials, Settings,
};

use crate::args::registry::BaseArgs;
use crate::config::Config;
use crate::errors::{Failure, say};

/// docker's file of credentials, if there is a place for one.
pub(crate) fn docker_config() -> Option<DockerConfig> {
    DockerConfig::usual()
}

/// How registries are asked, as the configuration file says.
pub(crate) fn settings(config: &Config) -> Settings {
    let mut settings = Settings {
        insecure: config.registries.insecure.iter().cloned().collect(),
        token_hosts: config.registries.token_hosts.iter().cloned().collect(),
        ca_files: config.ca_certificates.clone(),
        ..Settings::default()
    };
    let variable = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    if let Some(dir) = variable("XDG_CONFIG_HOME").or_else(|| Some(variable("HOME")?.join(".config"))) {
        settings.cert_dirs.extend([dir.join("docker/certs.d"), dir.join("containers/certs.d")]);
    }
    settings
}

/// Registries, with the user's credentials. Reads nothing before the first request.
pub(crate) fn registries(config: &Config) -> Arc<Registries> {
    Arc::new(Registries::new(client(config)))
}

/// The same without what builds have to do with them.
pub(crate) fn client(config: &Config) -> Client {
    let credentials: Arc<dyn CredentialSource> = match docker_config() {
        Some(file) => Arc::new(Watched { file, told: Once::new() }),
        None => Arc::new(NoCredentials),
    };
    Client::new(settings(config), credentials)
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

/// Where a build takes images from, and pushes to.
pub(crate) fn bases(args: &BaseArgs, config: &Config, pushes: bool) -> Result<Bases, Failure> {
    if args.offline && pushes {
        return Err(Failure::usage("--offline: nothing can be pushed then"));
    }
    if args.offline && args.pull == Some(PullPolicy::Always) {
        return Err(Failure::usage("--offline and --pull=always: one of them has to go"));
    }
    let policy = if args.offline { PullPolicy::Never } else { args.pull.unwrap_or_default() };
    let registries = (!args.offline).then(|| registries(config));
    Ok(Bases { policy, tag_life: config.registries.tag_ttl, registries })
}
