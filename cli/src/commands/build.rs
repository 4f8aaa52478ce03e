//! `kiln build`

use std::fmt::Display;
use std::io::IsTerminal;
use std::str::FromStr;
use std::sync::Arc;

use kiln_build::export::Output;
use kiln_build::registry::PullPolicy;
use kiln_build::{
    BuildCancel, BuildError, BuildRequest, Built, ContextSource, DockerfileSource, LockMode, NamedContext,
    NoCache, Progress, SecretStore, SshAgents, build,
};
use kiln_llb::Network;

use super::call::{check, outline, targets};
use super::containers::join::host;
use super::outputs::{forget_id, outputs, write_results};
use super::push::told;
use super::{pair, print};
use crate::args::{BuildArgs, Call, LockWhat, Method, NetworkMode, NoCacheOf, OnError, ProgressMode};
use crate::config::{self, Config};
use crate::errors::{Failure, say};
use crate::platforms;
use crate::progress::{Live, Plain, Quiet, Shown};
use crate::registries::bases;
use crate::session::Session;

/// What a command line asks for.
pub(super) fn request(
    args: &BuildArgs,
    outputs: Vec<Output>,
    config: &Config,
) -> Result<BuildRequest, Failure> {
    let pushes = outputs.iter().any(|output| matches!(output, Output::Image(image) if image.push));
    let context = ContextSource::parse(&args.context).map_err(BuildError::from)?;
    let contexts = args
        .build_context
        .iter()
        .map(|text| NamedContext::parse(text).map_err(|error| Failure::named_context(&error)));
    let contexts = contexts.collect::<Result<Vec<_>, _>>()?;
    let mut request = BuildRequest {
        context,
        dockerfile: args.file.as_deref().map(DockerfileSource::parse).unwrap_or_default(),
        contexts,
        tags: args.tag.clone(),
        outputs,
        attestations: args.attest.asked().map_err(|error| Failure::usage(format!("--attest: {error}")))?,
        wants_id: args.iidfile.is_some() || args.metadata_file.is_some(),
        platforms: platforms::asked(&args.platform)?,
        target: args.target.clone(),
        no_cache: no_cache(args),
        cache_from: caches(&args.cache_from, "--cache-from")?,
        cache_to: caches(&args.cache_to, "--cache-to")?,
        jobs: args.jobs,
        network: match args.network {
            NetworkMode::Default => Network::Default,
            NetworkMode::None => Network::None,
            NetworkMode::Host => Network::Host,
        },
        secrets: SecretStore::new(args.secret.clone())?,
        ssh: SshAgents::new(args.ssh.clone()).map_err(|error| Failure::usage(format!("--ssh {error}")))?,
        authorities: config::authorities(&args.ca_cert)?,
        allow: args.allow.iter().copied().collect(),
        bases: bases(&args.bases, config, &args.ca_cert, pushes)?,
        lock: lock(args)?,
        ..BuildRequest::new(Default::default())
    };
    if args.bases.offline {
        let is_near = |away: Option<String>| {
            if let Some(label) = &away {
                say(&format!("warning: --offline: {label} is not asked\n"));
            }
            away.is_none()
        };
        // What came from them before is here.
        for source in &mut request.cache_from {
            if !is_near(source.away()) {
                source.silence();
            }
        }
        request.cache_to.retain(|target| is_near(target.away()));
    }
    for text in &args.build_arg {
        request.build_args.extend(pair(text, "--build-arg")?);
    }
    for text in &args.add_host {
        request.extra_hosts.push(host(text)?);
    }
    // Steps that run get them; neither keys nor images know them, unless a Dockerfile declares them.
    for (name, value) in super::proxies::of_environment() {
        request.build_args.entry(name).or_insert(value);
    }
    // As docker does: reproducible builds set it for every tool.
    if let Some(epoch) = std::env::var("SOURCE_DATE_EPOCH").ok().filter(|epoch| !epoch.is_empty()) {
        request.build_args.entry("SOURCE_DATE_EPOCH".to_owned()).or_insert(epoch);
    }
    for text in &args.label {
        let (name, value) = text.split_once('=').unwrap_or((text, ""));
        request.labels.insert(name.to_owned(), value.to_owned());
    }
    Ok(request)
}

/// What the lock file has to do with it.
fn lock(args: &BuildArgs) -> Result<LockMode, Failure> {
    Ok(match args.lock {
        None if args.locked => LockMode::Strict,
        None => LockMode::Read,
        Some(LockWhat::Add) => LockMode::Add,
        Some(LockWhat::Off) => LockMode::Off,
        Some(LockWhat::Update) if args.bases.offline || args.bases.pull == Some(PullPolicy::Never) => {
            return Err(Failure::usage(
                "--lock=update asks registries, and --offline and --pull=never do not",
            ));
        }
        Some(LockWhat::Update) => LockMode::Update,
    })
}

/// What `--cache-from` or `--cache-to` say. There may be passwords in it, so no message repeats it.
fn caches<T: FromStr<Err: Display>>(texts: &[String], flag: &str) -> Result<Vec<T>, Failure> {
    let parse = |text: &String| text.parse().map_err(|error| Failure::usage(format!("{flag}: {error}")));
    texts.iter().map(parse).collect()
}

/// What all the options together say; the last of `--no-cache=true` and `=false` counts.
fn no_cache(args: &BuildArgs) -> NoCache {
    let mut no_cache = NoCache { stages: args.no_cache_filter.clone(), ..NoCache::default() };
    for of in &args.no_cache {
        match of {
            NoCacheOf::All => no_cache.all = true,
            NoCacheOf::Nothing => no_cache.all = false,
            NoCacheOf::Step(step) => no_cache.steps.push(step.clone()),
        }
    }
    no_cache
}

pub(crate) fn run(session: &Session, args: BuildArgs) -> Result<u8, Failure> {
    crate::rootless::warn_of_network(matches!(args.network, NetworkMode::Default));
    let config = Config::read()?;
    let outputs = outputs(&args)?;
    let mut request = request(&args, outputs, &config)?;
    let is_for_several = request.platforms.len() > 1;
    let is_attested = !request.attestations.is_empty();
    for output in &request.outputs {
        output.check(is_for_several, is_attested).map_err(|error| Failure::usage(error.to_string()))?;
    }
    let call = if args.check { Call { method: Method::Check, json: false } } else { args.call };
    match call.method {
        Method::Build => {}
        Method::Check => return check(session, &request, call.json),
        Method::Outline => return outline(session, &request, call.json),
        Method::Targets => return targets(session, &request, call.json),
    }
    request.origin = super::shell::origin();
    if args.watch {
        if to_stdout(&request) {
            return Err(Failure::usage("--watch cannot write one file after the other to standard output"));
        }
        return super::watch::run(session, &args, &request, &config);
    }
    once(session, &args, &request, &config, &session.cancel)
}

fn to_stdout(request: &BuildRequest) -> bool {
    request.outputs.iter().any(Output::is_stdout)
}

/// One build, and what it prints.
pub(super) fn once(
    session: &Session,
    args: &BuildArgs,
    request: &BuildRequest,
    config: &Config,
    cancel: &BuildCancel,
) -> Result<u8, Failure> {
    forget_id(args)?;
    let live = args.progress == ProgressMode::Auto && std::io::stderr().is_terminal();
    let quiet = args.quiet || args.progress == ProgressMode::Quiet;
    let shown = Arc::new(match args.progress {
        _ if quiet => Shown::new(Quiet),
        ProgressMode::Auto if live => Shown::new(Live::new()),
        _ => Shown::new(Plain::default()),
    });
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_time().build();
    let runtime = runtime.map_err(|error| Failure::store(format!("threads cannot be started: {error}")))?;
    let progress = Arc::clone(&shown) as Arc<dyn Progress>;
    let mut engine = session.engine.clone();
    if let Some(name) = &args.runtime {
        engine.executor = session.linux_with(super::runtime(name)?)?;
    }
    let built = runtime.block_on(build(&engine, request, progress, cancel));
    if !quiet {
        shown.finish();
    }
    let built = match built {
        Err(error @ BuildError::Step { .. }) if args.on_error == OnError::Shell => {
            return super::shell::after(session, error);
        }
        other => other?,
    };
    let made_something = built.steps_run > 0;
    write_results(args, &built)?;
    for note in &built.notes {
        say(&format!("warning: {note}\n"));
    }
    let text =
        if args.quiet { built.id.map(|id| format!("{id}\n")).unwrap_or_default() } else { report(&built) };
    if to_stdout(request) {
        // The output itself is there.
        say(&text);
    } else {
        print(&text)?;
    }
    if built.is_export_interrupted {
        // No fault of the cache's, which would be a warning: it is what the user said.
        return Err(Failure::interrupted(
            "interrupted while the cache was exported; everything else of the build is done",
        ));
    }
    if made_something {
        super::gc::after_build(session, &config.gc);
    }
    Ok(0)
}

/// What was made, a line each.
fn report(built: &Built) -> String {
    let cached = if built.steps_run == 0 { ", everything from the cache" } else { "" };
    let platforms: Vec<String> = built.platforms.iter().map(ToString::to_string).collect();
    let of = if platforms.len() > 1 { format!(" for {}", platforms.join(", ")) } else { String::new() };
    let mut text = match built.id {
        Some(id) => format!("image {id}{of}{cached}\n"),
        None => format!("built{cached}\n"),
    };
    for name in &built.names {
        text.push_str(&format!("named {}\n", name.familiar()));
    }
    for pushed in &built.pushed {
        text.push_str(&told(pushed));
    }
    for file in &built.files {
        text.push_str(&format!("wrote {}\n", file.display()));
    }
    text
}
