//! What to build.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

use kiln_llb::Network;
use kiln_oci::{Platform, Reference};

use crate::{Entitlement, SecretStore, SshAgents};

/// What to build.
#[derive(Debug, Clone)]
pub struct BuildRequest {
    /// The context directory.
    pub context: PathBuf,
    /// `-f`; `None`: `Dockerfile`, `dockerfile` or `Containerfile` in the context.
    pub dockerfile: Option<PathBuf>,
    /// Names for the result.
    pub tags: Vec<Reference>,
    /// `--build-arg`.
    pub build_args: BTreeMap<String, String>,
    /// `--label`.
    pub labels: BTreeMap<String, String>,
    /// `--target`; `None`: the last stage.
    pub target: Option<String>,
    /// Run every step again.
    pub no_cache: bool,
    /// `--network`: of the steps that choose none.
    pub network: Network,
    /// `--secret`
    pub secrets: SecretStore,
    /// `--ssh`
    pub ssh: SshAgents,
    /// `--allow`; [`Network::Host`] in `network` allows that to all steps as well.
    pub allow: BTreeSet<Entitlement>,
}

impl BuildRequest {
    /// A build of the directory `context` without any choice.
    pub fn new(context: PathBuf) -> Self {
        Self {
            context,
            dockerfile: None,
            tags: Vec::new(),
            build_args: BTreeMap::new(),
            labels: BTreeMap::new(),
            target: None,
            no_cache: false,
            network: Network::Default,
            secrets: SecretStore::default(),
            ssh: SshAgents::default(),
            allow: BTreeSet::new(),
        }
    }

    /// What is built for: this machine.
    pub fn platform(&self) -> Platform {
        Platform::host()
    }
}
