//! A build as text: one fact a line, so that a case can name it.

use std::fmt::Write;

use kiln_frontend::Lowered;
use kiln_llb::{
    CacheMount, Copy, Exec, File, FileAction, InputIndex, Mkdir, Mkfile, Mount, MountKind, Op, Owner,
    SecretEnv, SecretMount, Source, Unpack, Vertex,
};
use kiln_oci::image::ImageConfig;

/// Vertices, config and history of `lowered`.
pub(crate) fn lowered(lowered: &Lowered) -> String {
    let mut out = String::new();
    for (id, found) in lowered.definition.vertices().iter().enumerate() {
        vertex(&mut out, id, found);
    }
    line(
        &mut out,
        &format!("result {}", lowered.result.map_or("none".to_owned(), |id| format!("#{}", id.0))),
    );
    if let Some(epoch) = lowered.epoch {
        line(&mut out, &format!("epoch {epoch}"));
    }
    if lowered.warnings_are_errors {
        line(&mut out, "warnings are errors");
    }
    config(&mut out, &lowered.config);
    let mut comments: Vec<&str> = Vec::new();
    for entry in &lowered.history {
        let kind = if entry.vertex.is_some() { "layer" } else { "empty" };
        line(
            &mut out,
            &format!("history {kind} {}", entry.history.created_by.as_deref().unwrap_or_default()),
        );
        comments.extend(entry.history.comment.as_deref());
    }
    comments.dedup();
    if !comments.is_empty() {
        line(&mut out, &format!("history comments {}", comments.join(", ")));
    }
    out
}

/// Control characters are escaped, so that a fact stays on its line.
fn line(out: &mut String, text: &str) {
    for c in text.chars() {
        if c.is_control() { out.extend(c.escape_default()) } else { out.push(c) }
    }
    out.push('\n');
}

fn json(words: &[String]) -> String {
    serde_json::to_string(words).expect("strings are JSON")
}

fn vertex(out: &mut String, id: usize, vertex: &Vertex) {
    let input = |InputIndex(index): InputIndex| format!("#{}", vertex.inputs[index].0);
    let maybe = |index: Option<InputIndex>| index.map_or("nothing".to_owned(), input);
    match &vertex.op {
        Op::Source(source) => self::source(out, id, source),
        Op::Exec(exec) => self::exec(out, id, exec, &maybe),
        Op::File(File { base, actions }) => {
            line(out, &format!("#{id} file on {}", maybe(*base)));
            for action in actions {
                match action {
                    FileAction::Copy(copy) => self::copy(out, copy, &input(copy.from)),
                    FileAction::Mkdir(Mkdir { path, mode, owner, created }) => {
                        let owner = owner.as_deref().unwrap_or("root");
                        let created = created.map(|at| format!(" created={at}")).unwrap_or_default();
                        line(out, &format!("  mkdir {path} mode={mode:o} owner={owner}{created}"));
                    }
                    FileAction::Mkfile(Mkfile { path, mode, data }) => {
                        line(out, &format!("  mkfile {path} mode={mode:o} {}", serde_json::json!(data)));
                    }
                }
            }
        }
        Op::Merge(merge) => {
            line(out, &format!("#{id} merge {} on {}", input(merge.layer), maybe(merge.base)));
        }
    }
}

fn source(out: &mut String, id: usize, source: &Source) {
    match source {
        Source::Image(image) => line(out, &format!("#{id} image {}", image.reference.familiar())),
        Source::Local(local) => {
            line(out, &format!("#{id} local {}", local.name));
            for rule in &local.ignore {
                line(out, &format!("  ignore {rule}"));
            }
        }
        Source::Http(http) => {
            line(out, &format!("#{id} http {}", http.url));
            let checksum = http.checksum.as_ref().map_or("none".to_owned(), ToString::to_string);
            line(out, &format!("  filename={} checksum={checksum} mode={:o}", http.filename, http.mode));
        }
        Source::Git(git) => {
            line(out, &format!("#{id} git {}", git.remote));
            line(out, &format!("  reference={} subdir={}", git.reference, git.subdir));
            line(out, &format!("  checksum={}", git.checksum.as_deref().unwrap_or("none")));
            line(out, &format!("  keep-git-dir={} submodules={}", git.keep_git_dir, git.submodules));
            let mtime = format!("{:?}", git.mtime).to_lowercase();
            line(out, &format!("  mtime={mtime} fetch-by-commit={}", git.fetch_by_commit));
        }
    }
}

fn exec(out: &mut String, id: usize, exec: &Exec, input: &dyn Fn(Option<InputIndex>) -> String) {
    line(out, &format!("#{id} exec on {}", input(exec.base)));
    line(out, &format!("  args {}", json(&exec.args)));
    for (name, value) in &exec.env {
        line(out, &format!("  env {name}={value}"));
    }
    for (name, value) in &exec.unkeyed_env {
        line(out, &format!("  unkeyed {name}={value}"));
    }
    line(out, &format!("  cwd {}", exec.cwd));
    line(out, &format!("  user {}", exec.user.as_deref().unwrap_or("root (not said)")));
    line(out, &format!("  hostname {}", exec.hostname));
    for (name, address) in &exec.extra_hosts {
        line(out, &format!("  host {name} {address}"));
    }
    line(out, &format!("  network {}", exec.network.name()));
    line(out, &format!("  security {}", exec.security.name()));
    for Mount { target, kind } in &exec.mounts {
        line(out, &format!("  mount {}", mount(target, kind, input)));
    }
    for SecretEnv { name, id, required } in &exec.secret_env {
        line(out, &format!("  secret env {name} id={id} required={required}"));
    }
}

fn mount(target: &str, kind: &MountKind, input: &dyn Fn(Option<InputIndex>) -> String) -> String {
    let mut out = String::new();
    let access = |read_only: bool| if read_only { "ro" } else { "rw" };
    let written = match kind {
        MountKind::Bind(bind) => {
            let (from, access) = (input(bind.from), access(!bind.writable));
            write!(out, "bind {target} from={from} source={:?} {access}", bind.source)
        }
        MountKind::Cache(cache) => {
            let CacheMount { id, sharing, from, source, mode, uid, gid, read_only } = cache;
            let (sharing, from, access) = (sharing.name(), input(*from), access(*read_only));
            write!(
                out,
                "cache {target} id={id} sharing={sharing} mode={mode:o} uid={uid} gid={gid} \
                 from={from} source={source:?} {access}"
            )
        }
        MountKind::Tmpfs { size_bytes } => {
            let size = size_bytes.map_or("none".to_owned(), |size| size.to_string());
            write!(out, "tmpfs {target} size={size}")
        }
        MountKind::Secret(secret) => write!(out, "secret {target} {}", self::secret(secret)),
        MountKind::Ssh(agent) => write!(out, "ssh {target} {}", self::secret(agent)),
    };
    written.expect("a string can be written to");
    out
}

fn secret(SecretMount { id, mode, uid, gid, required }: &SecretMount) -> String {
    format!("id={id} mode={mode:o} uid={uid} gid={gid} required={required}")
}

fn copy(out: &mut String, copy: &Copy, from: &str) {
    let Copy { from: _, sources, destination, destination_is_dir, owner, mode, parents, exclude, unpack } =
        copy;
    let owner = match owner {
        Owner::Keep => "keep",
        Owner::Root => "root",
        Owner::Named(name) => name,
    };
    let mut text =
        format!("  copy {} to {destination} into={destination_is_dir} owner={owner}", json(sources));
    if let Some(mode) = mode {
        text.push_str(&format!(" mode={mode}"));
    }
    if *parents {
        text.push_str(" parents");
    }
    if !exclude.is_empty() {
        text.push_str(&format!(" exclude={}", json(exclude)));
    }
    text.push_str(match unpack {
        Unpack::Never => " unpack=never",
        Unpack::Archives => " unpack=archives",
    });
    line(out, &format!("{text} from={from}"));
}

fn config(out: &mut String, image: &ImageConfig) {
    line(out, &format!("config platform {}/{}", image.os, image.architecture));
    if let Some(author) = &image.author {
        line(out, &format!("config author {author}"));
    }
    let config = &image.config;
    let mut say = |name: &str, value: &str| line(out, &format!("config {name} {value}"));
    if !config.user.is_empty() {
        say("user", &config.user);
    }
    config.exposed_ports.keys().for_each(|port| say("port", port));
    config.env.iter().for_each(|entry| say("env", entry));
    for (name, words) in [("entrypoint", &config.entrypoint), ("cmd", &config.cmd)] {
        if let Some(words) = words {
            say(name, &json(words));
        }
    }
    if !config.shell.is_empty() {
        say("shell", &json(&config.shell));
    }
    if let Some(healthcheck) = &config.healthcheck {
        say("healthcheck", &healthcheck.to_string());
    }
    if config.args_escaped {
        say("args-escaped", "true");
    }
    config.volumes.keys().for_each(|volume| say("volume", volume));
    if !config.working_dir.is_empty() {
        say("workdir", &config.working_dir);
    }
    config.on_build.iter().for_each(|trigger| say("onbuild", trigger));
    config.labels.iter().for_each(|(name, value)| say("label", &format!("{name}={value}")));
    if let Some(signal) = &config.stop_signal {
        say("stopsignal", signal);
    }
}
