//! Instructions to a definition: stages, variables, vertices, config, history.

use std::collections::BTreeMap;

use kiln_llb::{
    Copy, Definition, Exec, File, FileAction, InputIndex, Local, Location, Mkdir, Network, Op, Owner, Source,
    SourceImage, SourceMap, Vertex, VertexId,
};
use kiln_oci::image::{History, ImageConfig};
use kiln_oci::{Digest, Platform, Reference};

use crate::ast::{Ast, Instruction, Kind};
use crate::changes::{COMMENT, apply, command, entry, join, lookup_env, set_env, with_shell};
use crate::suggest::did_you_mean;
use crate::words::{expand, split};
use crate::{Diagnostic, Severity, Span};

/// What the caller chose.
#[derive(Debug, Clone)]
pub struct Options {
    /// `--build-arg`.
    pub build_args: BTreeMap<String, String>,
    /// `--target`; `None`: the last stage.
    pub target: Option<String>,
    /// What to build for.
    pub platform: Platform,
    /// `--label`.
    pub labels: BTreeMap<String, String>,
    /// Lines of the context's ignore file.
    pub ignore: Vec<String>,
}

/// A base image as the caller found it.
#[derive(Debug, Clone)]
pub struct BaseImage {
    /// Digest of the config.
    pub config_digest: Digest,
    /// The config.
    pub config: ImageConfig,
}

/// What came of lowering.
#[derive(Debug)]
pub enum Lowering {
    /// Everything was there.
    Done(Box<Lowered>),
    /// These images' configs are needed first, each named at this place.
    Needs(Vec<(Reference, Span)>),
}

/// A build as data.
#[derive(Debug)]
pub struct Lowered {
    /// The graph.
    pub definition: Definition,
    /// The target's tree; `None`: no file at all.
    pub result: Option<VertexId>,
    /// The target's config with the base's history; the new entries stand in `history`, and diff
    /// IDs are still the base's.
    pub config: ImageConfig,
    /// The new history entries in order, without times.
    pub history: Vec<HistoryEntry>,
    /// Titles and lines.
    pub source_map: SourceMap,
    /// What deserves a look.
    pub warnings: Vec<Diagnostic>,
}

/// A history entry, and the vertex whose snapshot is its layer.
#[derive(Debug, Clone)]
pub struct HistoryEntry {
    /// The entry.
    pub history: History,
    /// `None` for an instruction without a layer.
    pub vertex: Option<VertexId>,
}

const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
const PROXIES: [&str; 5] = ["HTTP_PROXY", "HTTPS_PROXY", "FTP_PROXY", "NO_PROXY", "ALL_PROXY"];

/// Lowers `ast`. Ask again with the images it needs, until it is done.
///
/// # Errors
/// What is wrong with the Dockerfile or the options, each at its place.
pub fn lower(
    ast: &Ast,
    options: &Options,
    images: &BTreeMap<Reference, BaseImage>,
) -> Result<Lowering, Vec<Diagnostic>> {
    Lower::new(ast, options, images).run().map_err(|diagnostic| vec![*diagnostic])
}

type Result<T, E = Box<Diagnostic>> = std::result::Result<T, E>;

fn wrong<T>(span: Span, message: impl Into<String>) -> Result<T> {
    Err(Box::new(Diagnostic::error(span, message)))
}

/// A `FROM` and what follows it.
struct Stage<'a> {
    name: Option<String>,
    from: &'a Instruction,
    base: String,
    body: &'a [Instruction],
}

/// A stage that was lowered.
#[derive(Clone)]
struct Built {
    tree: Option<VertexId>,
    config: ImageConfig,
    history: Vec<HistoryEntry>,
    /// Declared ARGs with their values.
    args: Vec<(String, Option<String>)>,
}

struct Lower<'a> {
    ast: &'a Ast,
    options: &'a Options,
    images: &'a BTreeMap<Reference, BaseImage>,
    definition: Definition,
    source_map: SourceMap,
    needs: Vec<(Reference, Span)>,
    context: Option<VertexId>,
    global: Vec<(String, Option<String>)>,
    done: BTreeMap<usize, Option<Built>>,
    used_args: Vec<String>,
}

impl<'a> Lower<'a> {
    fn new(ast: &'a Ast, options: &'a Options, images: &'a BTreeMap<Reference, BaseImage>) -> Self {
        Self {
            ast,
            options,
            images,
            definition: Definition::default(),
            source_map: SourceMap::default(),
            needs: Vec::new(),
            context: None,
            global: platform_args(&options.platform),
            done: BTreeMap::new(),
            used_args: Vec::new(),
        }
    }

    fn run(mut self) -> Result<Lowering> {
        let stages = self.stages()?;
        let target = self.target(&stages)?;
        let built = self.stage(&stages, target)?;
        let Some(built) = built.filter(|_| self.needs.is_empty()) else {
            return Ok(Lowering::Needs(self.needs));
        };
        let mut config = built.config;
        config.config.labels.extend(self.options.labels.clone());
        let unused: Vec<&str> = self
            .options
            .build_args
            .keys()
            .map(String::as_str)
            .filter(|name| !self.used_args.iter().any(|used| used == name) && !is_proxy(name))
            .collect();
        let mut warnings = Vec::new();
        if !unused.is_empty() {
            let message =
                format!("--build-arg {} is declared by no ARG that the build reached", unused.join(", "));
            let span = Span { start: 0, end: 0 };
            let hint = did_you_mean(unused[0], self.global.iter().map(|(name, _)| name.as_str()));
            warnings.push(Diagnostic { severity: Severity::Warning, span, message, hint });
        }
        Ok(Lowering::Done(Box::new(Lowered {
            definition: self.definition,
            result: built.tree,
            config,
            history: built.history,
            source_map: self.source_map,
            warnings,
        })))
    }

    /// Global ARGs, then one entry a FROM.
    fn stages(&mut self) -> Result<Vec<Stage<'a>>> {
        let instructions = &self.ast.instructions;
        let first = instructions.iter().position(|instruction| instruction.kind == Kind::From);
        let head = &instructions[..first.unwrap_or(instructions.len())];
        for instruction in head {
            if instruction.kind != Kind::Arg {
                let hint = Some("begin with `FROM image`".to_owned());
                let message = "only ARG may stand in front of the first FROM";
                return Err(Box::new(Diagnostic::error(instruction.span, message).with_hint(hint)));
            }
            self.global_arg(instruction)?;
        }
        let Some(first) = first else {
            return wrong(instructions[0].span, "the Dockerfile has no FROM, so there is no stage to build");
        };
        let mut stages = Vec::new();
        let mut at = first;
        while at < instructions.len() {
            let end = instructions[at + 1..]
                .iter()
                .position(|instruction| instruction.kind == Kind::From)
                .map_or(instructions.len(), |next| at + 1 + next);
            stages.push(self.from(&instructions[at], &instructions[at + 1..end])?);
            at = end;
        }
        Ok(stages)
    }

    fn global_arg(&mut self, instruction: &Instruction) -> Result<()> {
        for word in split(&instruction.rest.value, self.ast.escape) {
            let (name, default) = match word.split_once('=') {
                Some((name, default)) => (name, Some(default)),
                None => (word.as_str(), None),
            };
            let value = match self.build_arg(name) {
                Some(value) => Some(value),
                None => default.map(|text| self.expand_global(text, instruction.rest.span)).transpose()?,
            };
            let value = value.or_else(|| find(&self.global, name));
            self.global.push((name.to_owned(), value));
        }
        Ok(())
    }

    fn build_arg(&mut self, name: &str) -> Option<String> {
        let value = self.options.build_args.get(name)?.clone();
        self.used_args.push(name.to_owned());
        Some(value)
    }

    fn expand_global(&self, text: &str, span: Span) -> Result<String> {
        expand(text, self.ast.escape, &|name| find(&self.global, name))
            .or_else(|message| wrong(span, message))
    }

    fn from(&self, from: &'a Instruction, body: &'a [Instruction]) -> Result<Stage<'a>> {
        let span = from.rest.span;
        let words: Vec<&str> = from.rest.value.split_ascii_whitespace().collect();
        let (image, name) = match words.as_slice() {
            [image] => (*image, None),
            [image, word, name] if word.eq_ignore_ascii_case("AS") => {
                (*image, Some(name.to_ascii_lowercase()))
            }
            _ => return wrong(span, "FROM takes an image and, if wanted, `AS name`"),
        };
        if let Some(name) = &name {
            let valid = name.starts_with(|c: char| c.is_ascii_lowercase())
                && name.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || "-_.".contains(c));
            if !valid || name == "scratch" || name == "context" {
                return wrong(
                    span,
                    format!(
                        "{name:?} is no stage name (letters, digits, `-`, `_`, `.`; not scratch or context)"
                    ),
                );
            }
        }
        if let Some(flag) = from.flags.iter().find(|flag| flag.name == "platform") {
            let text = self.expand_global(flag.value.as_deref().unwrap_or_default(), flag.span)?;
            let host = &self.options.platform;
            match text.parse::<Platform>() {
                Ok(platform) if platform.os == host.os && platform.architecture == host.architecture => {}
                Ok(platform) => {
                    return wrong(
                        flag.span,
                        format!("platform {platform} is not supported yet; this machine is {host}"),
                    );
                }
                Err(error) => return wrong(flag.span, error.to_string()),
            }
        }
        let base = self.expand_global(image, span)?;
        if base.is_empty() {
            return wrong(
                span,
                format!("the base image {image:?} is empty after its variables were replaced"),
            );
        }
        Ok(Stage { name, from, base, body })
    }

    fn target(&self, stages: &[Stage<'_>]) -> Result<usize> {
        let Some(target) = &self.options.target else { return Ok(stages.len() - 1) };
        let wanted = target.to_ascii_lowercase();
        let named = stages.iter().rposition(|stage| stage.name.as_deref() == Some(wanted.as_str()));
        let numbered = target.parse().ok().filter(|&number: &usize| number < stages.len());
        named.or(numbered).ok_or_else(|| {
            let hint = did_you_mean(&wanted, stages.iter().filter_map(|stage| stage.name.as_deref()));
            Box::new(
                Diagnostic::error(stages[0].from.span, format!("there is no stage {target:?} to build"))
                    .with_hint(hint),
            )
        })
    }

    /// Lowers a stage once; `None` while a base image is missing.
    fn stage(&mut self, stages: &[Stage<'a>], index: usize) -> Result<Option<Built>> {
        if let Some(built) = self.done.get(&index) {
            return Ok(built.clone());
        }
        let stage = &stages[index];
        let label = stage.name.clone().unwrap_or_else(|| format!("stage-{index}"));
        let makes_layer = |kind| matches!(kind, Kind::Run | Kind::Copy | Kind::Add | Kind::Workdir);
        let total = 1 + stage.body.iter().filter(|instruction| makes_layer(instruction.kind)).count();
        let earlier = stages[..index]
            .iter()
            .rposition(|other| other.name.as_deref() == Some(&stage.base.to_ascii_lowercase()));
        let built = match earlier {
            Some(earlier) => self.stage(stages, earlier)?,
            None if stage.base == "scratch" => Some(self.scratch()),
            None => {
                self.image(&stage.base, stage.from, &format!("[{label} 1/{total}] {}", stage.from.title))?
            }
        };
        let Some(mut built) = built else {
            self.done.insert(index, None);
            return Ok(None);
        };
        if lookup_env(&built.config.config.env, "PATH").is_none() {
            set_env(&mut built.config.config.env, "PATH", DEFAULT_PATH);
        }
        if !built.config.config.on_build.is_empty() {
            return wrong(
                stage.from.rest.span,
                "the base image has ONBUILD instructions, which are not supported yet",
            );
        }
        let mut step = 1;
        let mut own_command = false;
        let mut complete = true;
        for instruction in stage.body {
            if makes_layer(instruction.kind) {
                step += 1;
            }
            let title = format!("[{label} {step}/{total}] {}", instruction.title);
            complete &= self.instruction(stages, index, &mut built, instruction, title, &mut own_command)?;
        }
        let built = complete.then_some(built);
        self.done.insert(index, built.clone());
        Ok(built)
    }

    fn scratch(&self) -> Built {
        let mut config = ImageConfig::empty(&self.options.platform);
        config.config.working_dir = "/".to_owned();
        Built { tree: None, config, history: Vec::new(), args: Vec::new() }
    }

    /// A vertex for an image's files; `None`, and a need, while its config is missing.
    fn image(&mut self, name: &str, at: &Instruction, title: &str) -> Result<Option<Built>> {
        let reference: Reference = match name.parse() {
            Ok(reference) => reference,
            Err(error) => return wrong(at.rest.span, error.to_string()),
        };
        let Some(image) = self.images.get(&reference) else {
            if !self.needs.iter().any(|(known, _)| *known == reference) {
                self.needs.push((reference, at.rest.span));
            }
            return Ok(None);
        };
        let source = SourceImage { reference, config: image.config_digest };
        let tree = if image.config.rootfs.diff_ids.is_empty() {
            None
        } else {
            let vertex = Vertex { op: Op::Source(Source::Image(source)), inputs: Vec::new() };
            let id = self.definition.push(vertex);
            self.source_map.insert(id, title.to_owned(), Some(location(at)));
            Some(id)
        };
        Ok(Some(Built { tree, config: image.config.clone(), history: Vec::new(), args: Vec::new() }))
    }

    /// Applies one instruction; false while a base image is missing.
    fn instruction(
        &mut self,
        stages: &[Stage<'a>],
        index: usize,
        built: &mut Built,
        instruction: &Instruction,
        title: String,
        own_command: &mut bool,
    ) -> Result<bool> {
        let span = instruction.rest.span;
        match instruction.kind {
            Kind::From => {}
            Kind::Arg => self.arg(built, instruction)?,
            Kind::Maintainer => {
                built.config.author = Some(instruction.rest.value.clone());
                built.push_empty(format!("MAINTAINER {}", instruction.rest.value));
            }
            Kind::Onbuild => return wrong(instruction.span, "ONBUILD is not supported yet"),
            Kind::Run => self.exec(built, instruction, title)?,
            Kind::Copy | Kind::Add => return self.copy(stages, index, built, instruction, title),
            Kind::Workdir => {
                let created_by = self.apply(built, instruction)?;
                let path = built.config.config.working_dir.clone();
                if path == "/" {
                    built.push_empty(created_by);
                } else {
                    let owner = Some(built.config.config.user.clone()).filter(|user| !user.is_empty());
                    let action = FileAction::Mkdir(Mkdir { path, mode: 0o755, owner });
                    self.file(built, instruction, title, vec![action], None, created_by);
                }
            }
            kind => {
                let created_by = self.apply(built, instruction)?;
                // docker: an own ENTRYPOINT drops the command that came with the base image.
                if kind == Kind::Entrypoint && !*own_command {
                    built.config.config.cmd = None;
                }
                *own_command |= kind == Kind::Cmd;
                if kind == Kind::User && built.config.config.user.is_empty() {
                    return wrong(span, "USER needs a name or a number");
                }
                built.push_empty(created_by);
            }
        }
        Ok(true)
    }

    fn apply(&self, built: &mut Built, instruction: &Instruction) -> Result<String> {
        let variables = built.variables();
        let lookup = |name: &str| find(&variables, name);
        let applied = apply(&mut built.config.config, instruction, self.ast.escape, &lookup)?;
        Ok(applied.unwrap_or_default())
    }

    fn expand(&self, built: &Built, text: &str, span: Span) -> Result<String> {
        let variables = built.variables();
        expand(text, self.ast.escape, &|name| find(&variables, name)).or_else(|message| wrong(span, message))
    }

    fn arg(&mut self, built: &mut Built, instruction: &Instruction) -> Result<()> {
        for word in split(&instruction.rest.value, self.ast.escape) {
            let (name, default) = match word.split_once('=') {
                Some((name, default)) => (name, Some(default)),
                None => (word.as_str(), None),
            };
            let name = self.expand(built, name, instruction.rest.span)?;
            if name.is_empty() {
                return wrong(instruction.rest.span, "ARG needs a name");
            }
            let value = match (self.build_arg(&name), default) {
                (Some(value), _) => Some(value),
                (None, Some(default)) => Some(self.expand(built, default, instruction.rest.span)?),
                (None, None) => find(&self.global, &name),
            };
            built.args.retain(|(known, _)| *known != name);
            built.args.push((name, value));
        }
        built.push_empty(format!("ARG {}", instruction.rest.value));
        Ok(())
    }

    fn exec(&mut self, built: &mut Built, instruction: &Instruction, title: String) -> Result<()> {
        let config = &built.config.config;
        let args = match instruction.heredocs.as_slice() {
            [] => command(instruction, config),
            [only] if instruction.rest.value == only.opener => with_shell(config, &only.body),
            several => {
                // The shell reads the heredocs itself: give it the text as it was written.
                let mut text = format!("{}\n", instruction.rest.value);
                for heredoc in several {
                    let tabs = if heredoc.strip_tabs { "\t" } else { "" };
                    text.push_str(&heredoc.body);
                    text.push_str(&format!("{tabs}{}\n", heredoc.name));
                }
                with_shell(config, &text)
            }
        };
        if args.first().is_none_or(String::is_empty) {
            return wrong(instruction.rest.span, "RUN needs a command");
        }
        let flag = instruction.flags.iter().find(|flag| flag.name == "network");
        let network = match flag.and_then(|flag| flag.value.as_deref()) {
            None | Some("default") => Network::Default,
            Some("none") => Network::None,
            Some("host") => Network::Host,
            Some(other) => {
                return wrong(
                    instruction.span,
                    format!("--network={other}: default, none or host is expected"),
                );
            }
        };
        let set: Vec<(String, String)> =
            built.args.iter().filter_map(|(name, value)| Some((name.clone(), value.clone()?))).collect();
        let shown: Vec<String> = set.iter().map(|(name, value)| format!("{name}={value}")).collect();
        let prefix =
            if shown.is_empty() { String::new() } else { format!("|{} {} ", shown.len(), shown.join(" ")) };
        let created_by = format!("RUN {prefix}{} # buildkit", args.join(" "));
        let mut env: Vec<(String, String)> = config
            .env
            .iter()
            .map(|entry| entry.split_once('=').unwrap_or((entry, "")))
            .map(|(name, value)| (name.to_owned(), value.to_owned()))
            .collect();
        for (name, value) in set {
            match env.iter_mut().find(|(known, _)| *known == name) {
                Some((_, old)) => *old = value,
                None => env.push((name, value)),
            }
        }
        let cwd = if config.working_dir.is_empty() { "/".to_owned() } else { config.working_dir.clone() };
        let user = Some(config.user.clone()).filter(|user| !user.is_empty());
        let base = built.tree.map(|_| InputIndex(0));
        let vertex = Vertex {
            op: Op::Exec(Exec {
                base,
                args,
                env,
                unkeyed_env: Vec::new(),
                cwd,
                user,
                hostname: "buildkitsandbox".to_owned(),
                network,
                security: kiln_llb::Security::Sandbox,
                mounts: Vec::new(),
                secret_env: Vec::new(),
            }),
            inputs: built.tree.into_iter().collect(),
        };
        self.push(built, instruction, title, vertex, created_by);
        Ok(())
    }

    fn copy(
        &mut self,
        stages: &[Stage<'a>],
        index: usize,
        built: &mut Built,
        instruction: &Instruction,
        title: String,
    ) -> Result<bool> {
        let span = instruction.rest.span;
        let add = instruction.kind == Kind::Add;
        let word = if add { "ADD" } else { "COPY" };
        if !instruction.heredocs.is_empty() {
            return wrong(span, format!("a heredoc in {word} is not supported yet"));
        }
        let words = match &instruction.json {
            Some(words) => words.clone(),
            None => instruction.rest.value.split_ascii_whitespace().map(str::to_owned).collect(),
        };
        let words: Vec<String> =
            words.iter().map(|word| self.expand(built, word, span)).collect::<Result<_>>()?;
        let Some((to, sources)) = words.split_last().filter(|(_, sources)| !sources.is_empty()) else {
            return wrong(span, format!("{word} needs a source and a destination"));
        };
        if add
            && let Some(url) =
                sources.iter().find(|source| source.contains("://") || source.starts_with("git@"))
        {
            return wrong(span, format!("ADD of {url:?} is not supported yet; fetch it in a RUN"));
        }
        let destination_is_dir = to.ends_with('/') || to == "." || to.ends_with("/.") || sources.len() > 1;
        if sources.len() > 1 && !(to.ends_with('/') || to == "." || to.ends_with("/.")) {
            let hint = Some(format!("write `{to}/`"));
            let message = format!(
                "with several sources the destination must be a directory and end with `/`, but it is {to:?}"
            );
            return Err(Box::new(Diagnostic::error(span, message).with_hint(hint)));
        }
        let flag = |name: &str| instruction.flags.iter().find(|flag| flag.name == name);
        let mut owner = Owner::Root;
        let source = match flag("from") {
            None => self.context(),
            Some(flag) => {
                owner = Owner::Keep;
                let from = flag.value.clone().unwrap_or_default();
                if from.contains('$') {
                    return wrong(
                        flag.span,
                        "variables are not expanded in --from; name a stage and use `FROM $IMAGE AS name`",
                    );
                }
                match self.copy_source(stages, index, &from, flag.span, instruction)? {
                    None => return Ok(false),
                    Some(Built { tree: None, .. }) => {
                        return wrong(flag.span, format!("{from:?} has no files to copy from"));
                    }
                    Some(Built { tree: Some(tree), .. }) => tree,
                }
            }
        };
        if let Some(flag) = flag("chown") {
            owner = Owner::Named(self.expand(built, flag.value.as_deref().unwrap_or_default(), flag.span)?);
        }
        let from = InputIndex(usize::from(built.tree.is_some()));
        let action = FileAction::Copy(Copy {
            from,
            sources: sources.iter().map(|source| join("/", source)[1..].to_owned()).collect(),
            destination: join(&built.config.config.working_dir, to),
            destination_is_dir,
            owner,
            mode: None,
            parents: false,
            exclude: Vec::new(),
            unpack: if add { kiln_llb::Unpack::Archives } else { kiln_llb::Unpack::Never },
        });
        let flags: String = instruction
            .flags
            .iter()
            .map(|flag| format!("--{}={} ", flag.name, flag.value.as_deref().unwrap_or_default()))
            .collect();
        let created_by = format!("{word} {flags}{} # buildkit", words.join(" "));
        self.file(built, instruction, title, vec![action], Some(source), created_by);
        Ok(true)
    }

    /// The stage (by name or number) or image behind `--from`; `None` while an image is missing.
    fn copy_source(
        &mut self,
        stages: &[Stage<'a>],
        index: usize,
        from: &str,
        span: Span,
        instruction: &Instruction,
    ) -> Result<Option<Built>> {
        let name = from.to_ascii_lowercase();
        let named = stages.iter().rposition(|stage| stage.name.as_deref() == Some(name.as_str()));
        let earlier = stages[..index].iter().rposition(|stage| stage.name.as_deref() == Some(name.as_str()));
        match (earlier, named, from.parse::<usize>()) {
            (Some(stage), _, _) => self.stage(stages, stage),
            (None, Some(_), _) => {
                wrong(span, format!("stage {from:?} must stand in front of the stage that copies from it"))
            }
            (None, None, Ok(number)) if number < index => self.stage(stages, number),
            (None, None, Ok(number)) => wrong(span, format!("there is no earlier stage number {number}")),
            (None, None, Err(_)) => {
                let title = format!("[internal] load files of {from}");
                let reference = from.parse::<Reference>();
                if let Err(error) = reference {
                    let hint =
                        did_you_mean(from, stages[..index].iter().filter_map(|stage| stage.name.as_deref()));
                    return Err(Box::new(Diagnostic::error(span, error.to_string()).with_hint(hint)));
                }
                let mut at = instruction.clone();
                at.rest.span = span;
                self.image(from, &at, &title)
            }
        }
    }

    /// The one vertex for the build context.
    fn context(&mut self) -> VertexId {
        if let Some(context) = self.context {
            return context;
        }
        let local = Local { name: "context".to_owned(), ignore: self.options.ignore.clone() };
        let id = self.definition.push(Vertex { op: Op::Source(Source::Local(local)), inputs: Vec::new() });
        self.source_map.insert(id, "[internal] load build context".to_owned(), None);
        self.context = Some(id);
        id
    }

    fn file(
        &mut self,
        built: &mut Built,
        instruction: &Instruction,
        title: String,
        actions: Vec<FileAction>,
        source: Option<VertexId>,
        created_by: String,
    ) {
        let base = built.tree.map(|_| InputIndex(0));
        let inputs = built.tree.into_iter().chain(source).collect();
        let vertex = Vertex { op: Op::File(File { base, actions }), inputs };
        self.push(built, instruction, title, vertex, created_by);
    }

    fn push(
        &mut self,
        built: &mut Built,
        at: &Instruction,
        title: String,
        vertex: Vertex,
        created_by: String,
    ) {
        let id = self.definition.push(vertex);
        self.source_map.insert(id, title, Some(location(at)));
        built.tree = Some(id);
        let history =
            History { created_by: Some(created_by), comment: Some(COMMENT.to_owned()), ..History::default() };
        built.history.push(HistoryEntry { history, vertex: Some(id) });
    }
}

impl Built {
    fn push_empty(&mut self, created_by: String) {
        self.history.push(HistoryEntry { history: entry(created_by), vertex: None });
    }

    /// What `$NAME` means here; ARG wins over ENV where it was declared (measured on BuildKit).
    fn variables(&self) -> Vec<(String, Option<String>)> {
        let env = self.config.config.env.iter().filter_map(|entry| entry.split_once('='));
        let env = env.map(|(name, value)| (name.to_owned(), Some(value.to_owned())));
        env.chain(self.args.iter().filter(|(_, value)| value.is_some()).cloned()).collect()
    }
}

fn location(instruction: &Instruction) -> Location {
    Location { first_line: instruction.first_line, last_line: instruction.last_line }
}

fn find(variables: &[(String, Option<String>)], name: &str) -> Option<String> {
    variables.iter().rev().find(|(known, _)| known == name).and_then(|(_, value)| value.clone())
}

fn is_proxy(name: &str) -> bool {
    PROXIES.iter().any(|proxy| proxy.eq_ignore_ascii_case(name))
}

/// Platform arguments every FROM can use; `ARG NAME` brings one into a stage.
fn platform_args(platform: &Platform) -> Vec<(String, Option<String>)> {
    let mut args = Vec::new();
    for prefix in ["TARGET", "BUILD"] {
        let mut add = |name: &str, value: String| args.push((format!("{prefix}{name}"), Some(value)));
        add("PLATFORM", platform.to_string());
        add("OS", platform.os.clone());
        add("ARCH", platform.architecture.clone());
        add("VARIANT", platform.variant.clone().unwrap_or_default());
    }
    args
}
