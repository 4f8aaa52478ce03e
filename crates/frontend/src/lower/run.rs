//! RUN: its process, mounts, network.

use std::time::Duration;

use kiln_llb::{
    BindMount, CacheMount, Exec, File, FileAction, InputIndex, Mkfile, Mount, MountKind, Network, Op,
    SecretEnv, SecretMount, Security, Vertex, VertexId,
};

use super::command::{with_shell, words};
use super::{Built, Lower, Step, join};
use crate::ast::{Command, Flag, Instruction, Text};
use crate::healthcheck::parse_interval;
use crate::heredoc::Heredoc;
use crate::mount::{self, MountSpec, Type};
use crate::outline::Wish;
use crate::stages::{Origin, Result, is_proxy, wrong};
use crate::words::Quotes;

/// The host name of build steps, unless `BUILDKIT_SANDBOX_HOSTNAME` says otherwise.
const HOSTNAME: &str = "buildkitsandbox";
/// Where a heredoc that begins with `#!` is found.
const SCRIPTS: &str = "/dev/pipes";

/// Inputs and mounts of a step as they are collected.
struct Parts {
    inputs: Vec<VertexId>,
    mounts: Vec<Mount>,
    secret_env: Vec<SecretEnv>,
    ssh: Vec<String>,
}

impl Parts {
    fn input(&mut self, vertex: VertexId) -> InputIndex {
        let at = self.inputs.iter().position(|known| *known == vertex).unwrap_or(self.inputs.len());
        if at == self.inputs.len() {
            self.inputs.push(vertex);
        }
        InputIndex(at)
    }
}

impl Lower<'_> {
    pub(super) fn run_step(
        &mut self,
        step: &mut Step,
        built: &mut Built,
        at: &Instruction,
        command: &Command,
        title: &str,
    ) -> Result<bool> {
        let mut parts = Parts {
            inputs: built.tree.into_iter().collect(),
            mounts: Vec::new(),
            secret_env: Vec::new(),
            ssh: Vec::new(),
        };
        let (args, summary) = self.args(built, at, command, &mut parts)?;
        let mut complete = true;
        for flag in at.flags.iter().filter(|flag| flag.name == "mount") {
            complete &= self.mount(step, built, at, flag, &mut parts)?;
        }
        if !complete {
            return Ok(false);
        }
        let created_by = format!("RUN {}{} # buildkit", self.declared_args(built), args.join(" "));
        let mut env: Vec<(String, String)> =
            built.env.iter().map(|(name, value)| (name.to_owned(), value.clone())).collect();
        if let Some(socket) = parts.ssh.first()
            && built.env.get("SSH_AUTH_SOCK").is_none()
        {
            env.push(("SSH_AUTH_SOCK".to_owned(), socket.clone()));
        }
        let declared = |name: &str| built.args.contains(name);
        let proxies = self.options.build_args.iter().filter(|(name, _)| is_proxy(name) && !declared(name));
        let unkeyed_env = proxies.map(|(name, value)| (name.clone(), value.clone())).collect();
        let choice =
            |name: &str| at.flag(name).and_then(|flag| flag.value.as_ref()).map(|text| text.value.as_str());
        let network = match choice("network") {
            Some("none") => Network::None,
            Some("host") => Network::Host,
            Some(_) => Network::Default,
            None => self.options.network,
        };
        let security =
            if choice("security") == Some("insecure") { Security::Insecure } else { Security::Sandbox };
        self.refuse_devices(at)?;
        let cache_ttl = at.flag("cache-ttl").and_then(|flag| flag.value.as_ref());
        let cache_ttl = cache_ttl.map(|text| ttl(at, text)).transpose()?;
        let config = &built.config.config;
        let platform = &self.stages.list[step.stage].platform;
        let foreign = (!self.options.build_platform.runs(platform)).then(|| platform.clone());
        let op = Op::Exec(Exec {
            base: built.tree.map(|_| InputIndex(0)),
            args,
            env,
            unkeyed_env,
            cwd: join("/", &config.working_dir),
            user: Some(config.user.clone()).filter(|user| !user.is_empty()),
            hostname: self.sandbox_hostname(at)?,
            extra_hosts: self.options.extra_hosts.clone(),
            network,
            security,
            mounts: parts.mounts,
            secret_env: parts.secret_env,
            cache_ttl,
            foreign,
        });
        let title = step.title(&format!("{title}{summary}"));
        self.layer(built, at, title, Vertex { op, inputs: parts.inputs }, created_by);
        Ok(true)
    }

    /// What is started, and for heredocs what to show of them.
    fn args(
        &mut self,
        built: &Built,
        at: &Instruction,
        command: &Command,
        parts: &mut Parts,
    ) -> Result<(Vec<String>, String)> {
        let config = &built.config.config;
        let (Command::Shell(text), Some(first)) = (command, at.line.heredocs.first()) else {
            return Ok((words(command, config), String::new()));
        };
        let summary = summary(first);
        // A heredoc alone is the script itself, so that shells without heredocs can run it.
        if at.line.heredocs.len() == 1 && text.piece == first.word {
            let script = first.content();
            if !script.starts_with("#!") {
                return Ok((with_shell(config, &script), summary));
            }
            if first.name.contains('/') {
                let message = format!("a script cannot be called {:?}", first.name);
                return wrong(at.line.span(first.word.start, first.word.end), message);
            }
            let file = Mkfile { path: format!("/{}", first.name), mode: 0o755, data: script };
            let op = Op::File(File { base: None, actions: vec![FileAction::Mkfile(file)] });
            let vertex = self.definition.push(Vertex { op, inputs: Vec::new() });
            self.source_map.insert(vertex, "[internal] preparing inline document".to_owned(), None);
            let from = Some(parts.input(vertex));
            let kind = MountKind::Bind(BindMount { from, source: String::new(), writable: false });
            parts.mounts.push(Mount { target: SCRIPTS.to_owned(), kind });
            return Ok((with_shell(config, &format!("{SCRIPTS}/{}", first.name)), summary));
        }
        // The shell reads the heredocs itself: it gets the text as it was written.
        let mut whole = text.value.clone();
        for heredoc in &at.line.heredocs {
            whole.push('\n');
            whole.push_str(&heredoc.body);
            whole.push_str(&heredoc.name);
        }
        Ok((with_shell(config, &whole), summary))
    }

    /// `|2 A=1 B=2 `: what the history tells of declared ARGs.
    fn declared_args(&self, built: &Built) -> String {
        let value = |name: &str, own: &Option<String>| {
            built.env.get(name).or(own.as_ref()).cloned().unwrap_or_default()
        };
        let shown: Vec<String> =
            built.args.iter().map(|(name, own)| format!("{name}={}", value(name, own))).collect();
        if shown.is_empty() { String::new() } else { format!("|{} {} ", shown.len(), shown.join(" ")) }
    }

    fn sandbox_hostname(&self, at: &Instruction) -> Result<String> {
        let Some(name) = self.options.build_args.get("BUILDKIT_SANDBOX_HOSTNAME") else {
            return Ok(HOSTNAME.to_owned());
        };
        let valid = (1..=64).contains(&name.len())
            && name.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b));
        if valid { Ok(name.clone()) } else { wrong(at.span(), format!("{name:?} is no host name")) }
    }

    /// Devices that are not required are left out where they are not known, as in BuildKit.
    fn refuse_devices(&self, at: &Instruction) -> Result<()> {
        for flag in at.flags.iter().filter(|flag| flag.name == "device") {
            let Some(value) = &flag.value else { continue };
            let mut fields = value.value.split(',');
            let name = fields.next().unwrap_or_default();
            let name = name.strip_prefix("name=").unwrap_or(name);
            if name.is_empty() {
                return wrong(at.text_span(value), "--device needs a name like vendor.com/class=device");
            }
            let required = fields.any(|field| matches!(field, "required" | "required=true"));
            if required {
                let message = format!("device {name} is not available: kiln knows no CDI devices");
                return wrong(at.text_span(value), message);
            }
        }
        Ok(())
    }

    /// Adds one mount; false while an image is missing.
    fn mount(
        &mut self,
        step: &Step,
        built: &mut Built,
        at: &Instruction,
        flag: &Flag,
        parts: &mut Parts,
    ) -> Result<bool> {
        let Some(text) = &flag.value else { return Ok(true) };
        let mut fields = mount::fields(&text.value).map_err(|error| error.at(at, text))?;
        for field in &mut fields {
            if let Some(value) = &mut field.value
                && field.key != "from"
            {
                *value = self.expand_text(built, at, text, value, Quotes::Remove)?;
            }
        }
        let spec = mount::mount(&fields).map_err(|error| error.at(at, text))?;
        let cwd = &built.config.config.working_dir;
        let default = default_target(&spec, parts.ssh.len());
        let target = join(cwd, spec.target.as_deref().unwrap_or(&default));
        let only_env = spec.kind == Type::Secret && spec.env.is_some() && spec.target.is_none();
        if !only_env {
            mount::check_target(&target, &fields).map_err(|error| error.at(at, text))?;
            if parts.mounts.iter().any(|known| known.target == target) {
                return wrong(at.text_span(text), format!("two mounts have the target {target}"));
            }
        }
        let kind = match spec.kind {
            Type::Tmpfs => MountKind::Tmpfs { size_bytes: spec.size_bytes },
            Type::Secret => {
                let secret = secret(&spec, 0o400);
                self.wishes.push(Wish::secret(&secret.id, secret.required));
                if let Some(name) = &spec.env {
                    let (id, required) = (secret.id.clone(), secret.required);
                    parts.secret_env.push(SecretEnv { name: name.clone(), id, required });
                }
                if only_env {
                    return Ok(true);
                }
                MountKind::Secret(secret)
            }
            Type::Ssh => {
                let agent = SecretMount {
                    id: spec.id.clone().or(spec.source.clone()).unwrap_or_else(|| "default".to_owned()),
                    ..secret(&spec, 0o600)
                };
                self.wishes.push(Wish::ssh(&agent.id, agent.required));
                parts.ssh.push(target.clone());
                MountKind::Ssh(agent)
            }
            Type::Bind | Type::Cache => {
                let Some(from) = self.mount_source(step, at, text, &spec, &fields, parts)? else {
                    return Ok(false);
                };
                let source = join("/", spec.source.as_deref().unwrap_or_default())[1..].to_owned();
                if spec.kind == Type::Bind {
                    MountKind::Bind(BindMount { from, source, writable: !spec.read_only })
                } else {
                    let id = self.cache_id(spec.id.as_deref().unwrap_or(&target));
                    self.wishes.push(Wish::cache(&id));
                    MountKind::Cache(CacheMount {
                        id,
                        sharing: spec.sharing,
                        from,
                        source,
                        mode: spec.mode.unwrap_or(0o755),
                        uid: spec.uid.unwrap_or(0),
                        gid: spec.gid.unwrap_or(0),
                        read_only: spec.read_only,
                    })
                }
            }
        };
        parts.mounts.push(Mount { target, kind });
        Ok(true)
    }

    fn cache_id(&self, id: &str) -> String {
        match self.options.build_args.get("BUILDKIT_CACHE_MOUNT_NS") {
            Some(namespace) => format!("{namespace}/{id}"),
            None => id.to_owned(),
        }
    }

    /// The tree that a bind or cache mount starts from; the outer `None` while an image is missing.
    fn mount_source(
        &mut self,
        step: &Step,
        at: &Instruction,
        text: &Text,
        spec: &MountSpec,
        fields: &[mount::Field],
        parts: &mut Parts,
    ) -> Result<Option<Option<InputIndex>>> {
        let Some(name) = &spec.from else {
            // A cache starts empty, a bind mount shows the build context.
            if spec.kind == Type::Cache {
                return Ok(Some(None));
            }
            let context = self.context();
            return Ok(Some(Some(parts.input(context))));
        };
        let field = fields.iter().find(|field| field.key == "from");
        let span = field.map_or(at.text_span(text), |field| at.part_span(text, field.start, field.end));
        let tree = match self.stages.origin(name, span, false)? {
            Origin::Stage(stage) => self.trees.get(&stage).copied().flatten(),
            Origin::Outside(name) => {
                let platform = self.stages.list[step.stage].platform.clone();
                let stages = self.stage_names();
                self.outside(&name, at, span, &platform, Some(stages), None)?.map(|built| built.tree)
            }
        };
        Ok(tree.map(|tree| tree.map(|tree| parts.input(tree))))
    }
}

/// `--cache-ttl=24h`
fn ttl(at: &Instruction, text: &Text) -> Result<Duration> {
    match parse_interval(&text.value) {
        Ok(nanoseconds @ 1..) => Ok(Duration::from_nanos(nanoseconds.unsigned_abs())),
        Ok(_) => wrong(
            at.text_span(text),
            "--cache-ttl=0 would never count; `kiln build --no-cache=STEP` runs a step again",
        ),
        Err(message) => wrong(at.text_span(text), message),
    }
}

fn default_target(spec: &MountSpec, number: usize) -> String {
    match spec.kind {
        Type::Ssh => format!("/run/buildkit/ssh_agent.{number}"),
        _ => format!(
            "/run/secrets/{}",
            base_name(spec.id.as_deref().or(spec.source.as_deref()).unwrap_or_default())
        ),
    }
}

fn base_name(path: &str) -> &str {
    path.trim_end_matches('/').rsplit('/').next().unwrap_or_default()
}

fn secret(spec: &MountSpec, mode: u32) -> SecretMount {
    let named = spec.id.as_deref().or(spec.source.as_deref());
    let id = named.unwrap_or_else(|| base_name(spec.target.as_deref().unwrap_or_default()));
    SecretMount {
        id: id.to_owned(),
        mode: spec.mode.unwrap_or(mode),
        uid: spec.uid.unwrap_or(0),
        gid: spec.gid.unwrap_or(0),
        required: spec.required,
    }
}

/// ` (first line...)` for a step's title.
fn summary(heredoc: &Heredoc) -> String {
    let content = heredoc.content();
    let mut lines = content.trim().lines();
    let first: String = lines.next().unwrap_or_default().trim().chars().take(80).collect();
    let more = if lines.next().is_some() { "..." } else { "" };
    format!(" ({first}{more})")
}
