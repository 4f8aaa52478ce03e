//! What to build.

use std::collections::{BTreeMap, BTreeSet};
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use kiln_executor::Authorities;
use kiln_llb::Network;
use kiln_oci::{Platform, Reference};

use crate::export::Output;
use crate::lock::LockMode;
use crate::registry::Bases;
use crate::{
    Attestations, BuildOrigin, CacheSource, CacheTarget, ContextSource, DockerfileSource, Entitlement,
    NamedContext, NoCache, SecretStore, SourceOptions, SshAgents, StandardInput,
};

/// What to build.
#[derive(Debug, Clone)]
pub struct BuildRequest {
    /// The context.
    pub context: ContextSource,
    /// `-f`
    pub dockerfile: DockerfileSource,
    /// `--build-context`
    pub contexts: Vec<NamedContext>,
    /// What `-` stands for.
    pub stdin: StandardInput,
    /// Names for the result, where there are no `outputs`.
    pub tags: Vec<Reference>,
    /// What the build leaves; none: an image in the store.
    pub outputs: Vec<Output>,
    /// `--attest`, `--provenance`, `--sbom`: what is said of the images.
    pub attestations: Attestations,
    /// The image ID is wanted, whatever the outputs are.
    pub wants_id: bool,
    /// `--build-arg`.
    pub build_args: BTreeMap<String, String>,
    /// `--label`.
    pub labels: BTreeMap<String, String>,
    /// `--platform`: what to build for, each once; none: this machine.
    pub platforms: Vec<Platform>,
    /// `--target`; `None`: the last stage.
    pub target: Option<String>,
    /// `--no-cache`, `--no-cache-filter`: what to run again.
    pub no_cache: NoCache,
    /// `--cache-from`: where to look for results that are not in the store.
    pub cache_from: Vec<CacheSource>,
    /// `--cache-to`: where to leave results.
    pub cache_to: Vec<CacheTarget>,
    /// `--jobs`: steps that run at once; `None`: as many as there are, within what memory allows.
    pub jobs: Option<NonZeroUsize>,
    /// `--add-host`: name and address, or `host-gateway`.
    pub extra_hosts: Vec<(String, String)>,
    /// `--network`: of the steps that choose none.
    pub network: Network,
    /// `--secret`
    pub secrets: SecretStore,
    /// `--ssh`
    pub ssh: SshAgents,
    /// `--ca-cert`: certificates that steps trust beside those of their image, and downloads beside the system's; no
    /// part of the result.
    pub authorities: Authorities,
    /// `--allow`; [`Network::Host`] in `network` allows that to all steps as well.
    pub allow: BTreeSet<Entitlement>,
    /// Where images come from that the build stands on, and go to that it pushes.
    pub bases: Bases,
    /// `--lock`, `--locked`: what `kiln.lock` has to do with it.
    pub lock: LockMode,
    /// How it was asked for; noted down, with what a step that fails has written, for
    /// [`shell`](crate::shell()). `None`: nothing is noted.
    pub origin: Option<BuildOrigin>,
}

impl BuildRequest {
    /// A build of the directory `context` without any choice.
    pub fn new(context: PathBuf) -> Self {
        Self {
            context: ContextSource::Directory(context),
            dockerfile: DockerfileSource::default(),
            contexts: Vec::new(),
            stdin: StandardInput::default(),
            tags: Vec::new(),
            outputs: Vec::new(),
            attestations: Attestations::default(),
            wants_id: false,
            build_args: BTreeMap::new(),
            labels: BTreeMap::new(),
            platforms: Vec::new(),
            target: None,
            no_cache: NoCache::default(),
            cache_from: Vec::new(),
            cache_to: Vec::new(),
            jobs: None,
            extra_hosts: Vec::new(),
            network: Network::Default,
            secrets: SecretStore::default(),
            ssh: SshAgents::default(),
            authorities: Authorities::default(),
            allow: BTreeSet::new(),
            bases: Bases::default(),
            lock: LockMode::default(),
            origin: None,
        }
    }

    /// How trees from outside are fetched: with this request's secrets and agent.
    pub(crate) fn source_options(&self) -> SourceOptions {
        SourceOptions {
            secrets: Arc::new(self.secrets.clone()),
            authorities: self.authorities.pem(),
            ssh_agent: self.ssh.socket("default").map(Path::to_owned),
            ..SourceOptions::default()
        }
    }

    /// What is built for, in order; one at least.
    pub fn targets(&self) -> Vec<Platform> {
        if self.platforms.is_empty() { vec![Platform::host()] } else { self.platforms.clone() }
    }
}
