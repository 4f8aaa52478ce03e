//! Provenance: where an image comes from (SLSA provenance v1, in the form that BuildKit gives it).

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use kiln_frontend::{is_proxy, looks_like_secret};
use kiln_llb::{Definition, Exec, MountKind, Network, Op, SecretMount, Source, VertexId};
use kiln_oci::Platform;
use serde::Serialize;
use serde_json::Value;

use super::mask::{MASKED, Mask};
use super::materials::{Digests, Found, Material, Stood, git_uri, materials, needed};
use super::{ProvenanceMode, ProvenanceSpec};
use crate::build::Plan;
use crate::platforms::Target;
use crate::{BuildRequest, ContextSource, DockerfileSource, NamedSource};

/// What the predicate is.
pub(super) const KIND: &str = "https://slsa.dev/provenance/v1";

/// Says what the parameters mean: those of BuildKit.
const BUILD_TYPE: &str = "https://github.com/moby/buildkit/blob/master/docs/attestations/slsa-definitions.md";

/// What is known of a build for one platform.
pub(super) struct Facts<'a> {
    pub(super) request: &'a BuildRequest,
    pub(super) plan: &'a Plan,
    pub(super) definition: &'a Definition,
    pub(super) target: &'a Target,
    pub(super) stood: &'a [Stood],
    pub(super) found: &'a Found,
    pub(super) mask: &'a Mask,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Provenance {
    build_definition: BuildDefinition,
    run_details: RunDetails,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct BuildDefinition {
    build_type: &'static str,
    external_parameters: ExternalParameters,
    internal_parameters: InternalParameters,
    resolved_dependencies: Vec<Material>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct ExternalParameters {
    config_source: ConfigSource,
    request: Request,
}

#[derive(Default, Serialize)]
struct ConfigSource {
    #[serde(skip_serializing_if = "Option::is_none")]
    uri: Option<String>,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    digest: Digests,
    #[serde(skip_serializing_if = "Option::is_none")]
    path: Option<String>,
}

#[derive(Serialize)]
struct Request {
    frontend: &'static str,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    args: BTreeMap<String, String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    secrets: Vec<NamedSecret>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    ssh: Vec<NamedSecret>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    locals: Vec<Named>,
}

#[derive(Serialize, PartialEq, Eq, PartialOrd, Ord)]
struct NamedSecret {
    id: String,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    optional: bool,
}

#[derive(Serialize, PartialEq, Eq, PartialOrd, Ord)]
struct Named {
    name: String,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct InternalParameters {
    builder_platform: String,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    steps: Vec<Step>,
}

/// A vertex: its op's parts as they are in its key.
#[derive(Serialize)]
struct Step {
    id: String,
    name: String,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    inputs: Vec<String>,
    op: Vec<Part>,
}

#[derive(Serialize)]
struct Part {
    name: String,
    value: String,
}

#[derive(Serialize)]
struct RunDetails {
    builder: Builder,
    metadata: Metadata,
}

#[derive(Serialize)]
struct Builder {
    id: String,
    version: BTreeMap<&'static str, &'static str>,
}

/// No times and no number of this run: the same build says the same.
#[derive(Serialize)]
struct Metadata {
    buildkit_completeness: Completeness,
    buildkit_hermetic: bool,
    buildkit_reproducible: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    buildkit_metadata: Option<BuildMetadata>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Completeness {
    request: bool,
    resolved_dependencies: bool,
}

#[derive(Serialize)]
struct BuildMetadata {
    source: SourceInfos,
}

#[derive(Serialize)]
struct SourceInfos {
    locations: BTreeMap<String, Locations>,
    infos: Vec<SourceInfo>,
}

#[derive(Serialize)]
struct Locations {
    locations: Vec<Ranges>,
}

#[derive(Serialize)]
struct Ranges {
    ranges: Vec<Range>,
}

#[derive(Serialize)]
struct Range {
    start: Position,
    end: Position,
}

#[derive(Serialize)]
struct Position {
    line: usize,
}

#[derive(Serialize)]
struct SourceInfo {
    filename: String,
    language: &'static str,
    /// Base64.
    data: String,
}

/// What is to be said of the build that `facts` tell of; masked.
pub(super) fn provenance(spec: &ProvenanceSpec, facts: &Facts<'_>) -> Value {
    let Facts { definition, target, stood, found, .. } = *facts;
    let is_max = spec.mode == ProvenanceMode::Max;
    let needed = needed(definition, target.result);
    let execs = || needed.iter().filter_map(|id| exec(definition, *id));
    let (args, is_whole) = arguments(facts, is_max);
    let (secrets, ssh) = if is_max { secrets(execs()) } else { Default::default() };
    let said_secrets = is_max || self::secrets(execs()) == Default::default();
    let config_source = config_source(facts);
    let mut resolved_dependencies = materials(definition, &needed, stood, found);
    if let Some(uri) = config_source.uri.clone().filter(|_| !config_source.digest.is_empty()) {
        let main = Material { uri, digest: config_source.digest.clone(), media_type: None };
        if !resolved_dependencies.contains(&main) {
            resolved_dependencies.insert(0, main);
        }
    }
    let locals = locals(facts, &needed);
    let is_known = |material: &Material| !material.digest.is_empty();
    let is_complete = locals.is_empty() && resolved_dependencies.iter().all(is_known);
    let is_offline = execs().all(|exec| exec.network == Network::None);
    let provenance = Provenance {
        build_definition: BuildDefinition {
            build_type: BUILD_TYPE,
            external_parameters: ExternalParameters {
                config_source,
                request: Request { frontend: "dockerfile.v0", args, secrets, ssh, locals },
            },
            internal_parameters: InternalParameters {
                builder_platform: Platform::host().to_string(),
                steps: if is_max { steps(facts, &needed) } else { Vec::new() },
            },
            resolved_dependencies,
        },
        run_details: RunDetails {
            builder: Builder {
                id: spec.builder_id.clone().unwrap_or_default(),
                version: [("kiln", env!("CARGO_PKG_VERSION"))].into(),
            },
            metadata: Metadata {
                buildkit_completeness: Completeness {
                    request: is_whole && said_secrets,
                    resolved_dependencies: is_complete,
                },
                buildkit_hermetic: is_complete && is_offline,
                buildkit_reproducible: spec.is_reproducible,
                buildkit_metadata: is_max.then(|| BuildMetadata { source: source_infos(facts, &needed) }),
            },
        },
    };
    let plain = serde_json::to_value(&provenance).expect("provenance has string keys and no failing fields");
    let mut masked = plain.clone();
    facts.mask.apply(&mut masked);
    // What is masked is not told.
    let request = |value: &Value| value["buildDefinition"]["externalParameters"].clone();
    if request(&plain) != request(&masked) {
        masked["runDetails"]["metadata"]["buildkit_completeness"]["request"] = Value::Bool(false);
    }
    masked
}

fn exec(definition: &Definition, id: VertexId) -> Option<&Exec> {
    match &definition.vertex(id).op {
        Op::Exec(exec) => Some(exec),
        Op::Source(_) | Op::File(_) | Op::Merge(_) => None,
    }
}

/// What the builder was asked for, and whether all of that is said.
fn arguments(facts: &Facts<'_>, is_max: bool) -> (BTreeMap<String, String>, bool) {
    let Facts { request, target, .. } = *facts;
    let mut args: BTreeMap<String, String> = BTreeMap::new();
    let mut set = |name: String, value: &str| args.insert(name, value.to_owned());
    // Proxies are where the build happens to run, and no part of the result.
    let build_args = || request.build_args.iter().filter(|(name, _)| !is_proxy(name));
    if is_max {
        for (name, value) in build_args() {
            let value = if looks_like_secret(name) { MASKED } else { value.as_str() };
            set(format!("build-arg:{name}"), value);
        }
        for (name, value) in &request.labels {
            set(format!("label:{name}"), value);
        }
    }
    if let Some(stage) = &request.target {
        set("target".to_owned(), stage);
    }
    set("platform".to_owned(), &target.platform.to_string());
    if request.network != Network::Default {
        set("force-network-mode".to_owned(), request.network.name());
    }
    if !request.extra_hosts.is_empty() {
        let hosts = request.extra_hosts.iter().map(|(name, address)| format!("{name}={address}"));
        set("add-hosts".to_owned(), &hosts.collect::<Vec<_>>().join(","));
    }
    for context in &request.contexts {
        let place = match &context.source {
            NamedSource::Image(reference) => format!("docker-image://{reference}"),
            NamedSource::Files(ContextSource::Git(git)) => git_uri(git),
            NamedSource::Files(ContextSource::Http(url)) => url.clone(),
            // Where they are on this machine is its own affair.
            NamedSource::Layout { .. } => format!("oci-layout:{}", context.name),
            NamedSource::Files(ContextSource::Directory(_) | ContextSource::Stdin) => {
                format!("local:{}", context.name)
            }
        };
        set(format!("context:{}", context.name), &place);
    }
    let is_whole = match is_max {
        true => !build_args().any(|(name, _)| looks_like_secret(name)),
        false => build_args().next().is_none() && request.labels.is_empty(),
    };
    (args, is_whole)
}

/// The secrets and ssh agents that steps ask for.
fn secrets<'a>(execs: impl Iterator<Item = &'a Exec>) -> (Vec<NamedSecret>, Vec<NamedSecret>) {
    let (mut secrets, mut ssh) = (BTreeSet::new(), BTreeSet::new());
    let named = |mount: &SecretMount| NamedSecret { id: mount.id.clone(), optional: !mount.required };
    for exec in execs {
        for mount in &exec.mounts {
            let (all, mount) = match &mount.kind {
                MountKind::Secret(secret) => (&mut secrets, secret),
                MountKind::Ssh(agent) => (&mut ssh, agent),
                MountKind::Bind(_) | MountKind::Cache(_) | MountKind::Tmpfs { .. } => continue,
            };
            all.insert(named(mount));
        }
        let variables = exec.secret_env.iter();
        secrets.extend(variables.map(|it| NamedSecret { id: it.id.clone(), optional: !it.required }));
    }
    (secrets.into_iter().collect(), ssh.into_iter().collect())
}

/// Where the Dockerfile is.
fn config_source(facts: &Facts<'_>) -> ConfigSource {
    let Facts { request, plan, .. } = *facts;
    let path = dockerfile_path(facts);
    if let DockerfileSource::Url(url) = &request.dockerfile {
        return ConfigSource { uri: Some(url.clone()), ..ConfigSource::default() };
    }
    let digest: Digests = plan.revision.clone().into_iter().collect();
    let uri = match &request.context {
        ContextSource::Git(git) => Some(git_uri(git)),
        ContextSource::Http(url) => Some(url.clone()),
        ContextSource::Directory(_) | ContextSource::Stdin => None,
    };
    ConfigSource { uri, digest, path }
}

/// The Dockerfile's path in its context, or its name: the rest is this machine's affair. `None`: it is no file.
fn dockerfile_path(facts: &Facts<'_>) -> Option<String> {
    let Facts { request, plan, .. } = *facts;
    let text = |path: &Path| path.to_string_lossy().into_owned();
    let name = |path: &Path| path.file_name().map(|name| text(Path::new(name)));
    match (&request.dockerfile, &request.context) {
        (DockerfileSource::Stdin | DockerfileSource::Url(_), _) => None,
        (DockerfileSource::Usual, _) => name(Path::new(&plan.dockerfile.name)),
        (DockerfileSource::File(path), ContextSource::Directory(context)) => {
            let inside = path.strip_prefix(context).ok().map(text);
            inside.filter(|inside| !inside.contains("..")).or_else(|| name(path))
        }
        (DockerfileSource::File(path), _) => Some(text(path)),
    }
}

/// Directories of the client that were read.
fn locals(facts: &Facts<'_>, needed: &BTreeSet<VertexId>) -> Vec<Named> {
    let Facts { request, definition, .. } = *facts;
    let is_local = matches!(request.context, ContextSource::Directory(_) | ContextSource::Stdin);
    let mut names: BTreeSet<Named> = BTreeSet::new();
    for id in needed {
        if let Op::Source(Source::Local(local)) = &definition.vertex(*id).op
            && (is_local || local.name != "context")
        {
            names.insert(Named { name: local.name.clone() });
        }
    }
    if is_local && !matches!(request.dockerfile, DockerfileSource::Url(_)) {
        names.insert(Named { name: "dockerfile".to_owned() });
    }
    names.into_iter().collect()
}

fn step_id(needed: &BTreeSet<VertexId>, id: VertexId) -> String {
    format!("step{}", needed.range(..id).count())
}

fn steps(facts: &Facts<'_>, needed: &BTreeSet<VertexId>) -> Vec<Step> {
    let Facts { plan, definition, .. } = *facts;
    let step = |id: &VertexId| {
        let vertex = definition.vertex(*id);
        let parts = vertex.op.components().into_iter().map(|part| {
            let is_secret = part.name.strip_prefix("env ").is_some_and(looks_like_secret);
            let value = if is_secret { MASKED.to_owned() } else { part.value };
            Part { name: part.name, value }
        });
        Step {
            id: step_id(needed, *id),
            name: plan.lowered.source_map.title(*id).to_owned(),
            inputs: vertex.inputs.iter().map(|input| step_id(needed, *input)).collect(),
            op: parts.collect(),
        }
    };
    needed.iter().map(step).collect()
}

/// The Dockerfile, and which lines of it each step is.
fn source_infos(facts: &Facts<'_>, needed: &BTreeSet<VertexId>) -> SourceInfos {
    let Facts { plan, mask, .. } = *facts;
    let location = |id: &VertexId| {
        let at = plan.lowered.source_map.location(*id)?;
        let line = |line| Position { line };
        let range = Range { start: line(at.first_line), end: line(at.last_line) };
        let locations = Locations { locations: vec![Ranges { ranges: vec![range] }] };
        Some((step_id(needed, *id), locations))
    };
    let info = SourceInfo {
        filename: dockerfile_path(facts).unwrap_or_else(|| "Dockerfile".to_owned()),
        language: "Dockerfile",
        // Inside of it nothing is found any more.
        data: STANDARD.encode(mask.text(&plan.dockerfile.text)),
    };
    SourceInfos { locations: needed.iter().filter_map(location).collect(), infos: vec![info] }
}
