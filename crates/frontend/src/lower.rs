//! Stages to a definition: what the target needs becomes vertices, config and history.

mod command;
mod config;
mod copy;
mod epoch;
mod onbuild;
mod outside;
mod run;

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};

use kiln_llb::{Definition, Git, Location, SourceMap, Vertex, VertexId};
use kiln_oci::image::{History, ImageConfig};
use kiln_oci::{Digest, Platform, Reference};

use crate::ast::{Ast, Body, Instruction, Kind, Text};
use crate::directive::check_frontend;
use crate::ignore::Patterns;
use crate::lint::Lint;
use crate::outline::{Outline, Wish};
use crate::redact::without_credentials;
use crate::scope::Scope;
use crate::stages::{Base, Result, Stage, Stages, is_proxy, wrong};
use crate::suggest::did_you_mean;
use crate::words::{Expanded, Quotes, expand};
use crate::{CheckOptions, Diagnostic, Rule, Span};

use epoch::Epoch;

pub use config::{ChangeError, apply_changes};
pub use epoch::{EpochTime, NeedsTime, TimeOf};

/// What the caller chose.
#[derive(Debug, Clone)]
pub struct Options {
    /// `--build-arg`.
    pub build_args: BTreeMap<String, String>,
    /// `--target`; `None`: the last stage.
    pub target: Option<String>,
    /// What to build for.
    pub platform: Platform,
    /// What builds.
    pub build_platform: Platform,
    /// It is one of several that are built for at once: titles say which.
    pub names_platform: bool,
    /// `--label`.
    pub labels: BTreeMap<String, String>,
    /// The context's ignore file.
    pub ignore: Patterns,
    /// `--build-context`, by name; `name::platform` counts for that platform only.
    pub contexts: BTreeMap<String, NamedContext>,
    /// `--add-host`: name and address.
    pub extra_hosts: Vec<(String, String)>,
    /// The network of steps that choose none.
    pub network: kiln_llb::Network,
    /// The context came as an archive: a copy keeps its files' owners.
    pub keep_owners: bool,
    /// Look at every stage, not only at what the target needs (`--check`).
    pub all_stages: bool,
    /// The time that `SOURCE_DATE_EPOCH` names, where it names something.
    pub epoch: EpochTime,
}

impl Options {
    /// No choices at all, for `platform`.
    pub fn new(platform: Platform) -> Self {
        Self {
            build_args: BTreeMap::new(),
            target: None,
            build_platform: platform.clone(),
            names_platform: false,
            platform,
            labels: BTreeMap::new(),
            ignore: Patterns::default(),
            contexts: BTreeMap::new(),
            extra_hosts: Vec::new(),
            network: kiln_llb::Network::Default,
            keep_owners: false,
            all_stages: false,
            epoch: EpochTime::default(),
        }
    }
}

/// A context with a name of its own; it stands in for a stage or an image of that name.
#[derive(Debug, Clone)]
pub enum NamedContext {
    /// A directory, with the lines of its ignore file.
    Local { ignore: Vec<String> },
    /// `docker-image://`.
    Image(Reference),
    /// An image of a layout that the caller reads, and what to call it: `oci-layout://`.
    Layout(Reference),
    /// A git repository.
    Git(Git),
    /// A file or an archive on a web server.
    Http(String),
}

/// A base image as the caller found it.
#[derive(Debug, Clone)]
pub struct BaseImage {
    /// Digest of the config.
    pub config_digest: Digest,
    /// The config.
    pub config: ImageConfig,
    /// Nothing is known of it: it is only there so that a check can go on without the image.
    pub unknown: bool,
}

/// What came of lowering.
#[derive(Debug)]
pub enum Lowering {
    /// Everything was there.
    Done(Box<Lowered>),
    /// These images' configs are needed first.
    Needs(Vec<Need>),
    /// The time of this is needed first, in [`Options::epoch`].
    NeedsTime(Box<NeedsTime>),
}

/// What tells base images apart: one name may stand for an image of each platform.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct ImageKey {
    /// The image.
    pub reference: Reference,
    /// What it shall be for.
    pub platform: Platform,
    /// The named context that is a layout with it; `None`: it is known by its name.
    pub layout: Option<String>,
}

/// An image whose config is needed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Need {
    /// The image.
    pub image: ImageKey,
    /// Where it is named.
    pub span: Span,
    /// It is named by a `from` that might have meant one of these stages; `None`: by FROM.
    pub stages: Option<Vec<String>>,
}

/// A build as data. Its `Display` is a dump for tests and for the curious.
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
    /// What deserves a look, in file order.
    pub warnings: Vec<Diagnostic>,
    /// Whether `# check=error=true` makes warnings end the build.
    pub warnings_are_errors: bool,
    /// The value of `SOURCE_DATE_EPOCH`, if it is set: seconds since 1970.
    pub epoch: Option<i64>,
    /// What can be passed to this build.
    pub outline: Outline,
    /// Names of variables that `ARG` declares and `ENV` does not, in whatever stage.
    pub args: BTreeSet<String>,
    /// All stages of the Dockerfile as titles call them, whether they are built or not.
    pub stages: Vec<String>,
}

/// Names that are only ever arguments: what a step sees of another name may come from `ENV`.
fn declared_args(ast: &Ast) -> BTreeSet<String> {
    let (mut args, mut env) = (BTreeSet::new(), BTreeSet::new());
    for instruction in &ast.instructions {
        match &instruction.body {
            Body::Arg(definitions) => args.extend(definitions.iter().map(|arg| arg.name.value.clone())),
            Body::Env(pairs) => env.extend(pairs.iter().map(|pair| pair.name.value.clone())),
            _ => {}
        }
    }
    args.retain(|name| !env.contains(name));
    args
}

/// A history entry, and the vertex whose snapshot is its layer.
#[derive(Debug, Clone)]
pub struct HistoryEntry {
    /// The entry.
    pub history: History,
    /// `None` for an instruction without a layer.
    pub vertex: Option<VertexId>,
}

/// What BuildKit writes beside each history entry; readers take it as a mark of its format.
const COMMENT: &str = "buildkit.dockerfile.v0";
const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Warnings of unknown variables beyond this many suggest no name.
const MOST_SUGGESTIONS: usize = 200;

/// Lowers `ast`. Ask again with what it needs, until it is done.
///
/// # Errors
/// What is wrong with the Dockerfile or the options, each at its place.
pub fn lower(
    ast: &Ast,
    options: &Options,
    images: &BTreeMap<ImageKey, BaseImage>,
) -> std::result::Result<Lowering, Vec<Diagnostic>> {
    let check = directives_of_arguments(ast, options).map_err(|error| vec![error])?;
    let mut lint = Lint::new(check);
    lint.whole_file(ast);
    let run = |lint: &mut Lint| {
        let mut stages = Stages::find(ast, options, lint)?;
        let mut options = Cow::Borrowed(options);
        match epoch::find(ast, &mut options, images, &mut stages)? {
            Epoch::Known(epoch) => Lower::new(ast, &options, images, stages, lint).run(epoch),
            Epoch::Needs(time) => Ok(Lowering::NeedsTime(Box::new(time))),
        }
    };
    match run(&mut lint) {
        Ok(Lowering::Done(mut lowered)) => {
            lowered.warnings_are_errors = lint.is_error();
            lowered.warnings.extend(lint.finish());
            Ok(Lowering::Done(lowered))
        }
        Ok(needs) => Ok(needs),
        Err(error) => {
            let mut all = vec![*error];
            all.extend(lint.finish());
            Err(all)
        }
    }
}

/// `BUILDKIT_DOCKERFILE_CHECK` takes the place of `# check=`, `BUILDKIT_SYNTAX` that of `# syntax=`.
fn directives_of_arguments(ast: &Ast, options: &Options) -> std::result::Result<CheckOptions, Diagnostic> {
    let nowhere = Span { start: 0, end: 0 };
    if let Some(frontend) = options.build_args.get("BUILDKIT_SYNTAX").filter(|value| !value.is_empty()) {
        let hint = "leave BUILDKIT_SYNTAX out, or use docker/dockerfile:1, which kiln has built in";
        check_frontend(frontend, nowhere).map_err(|error| error.with_hint(Some(hint.to_owned())))?;
    }
    match options.build_args.get("BUILDKIT_DOCKERFILE_CHECK") {
        None => Ok(ast.directives.check.clone()),
        Some(text) => CheckOptions::parse(text)
            .map_err(|message| Diagnostic::error(nowhere, format!("BUILDKIT_DOCKERFILE_CHECK: {message}"))),
    }
}

/// A stage that was lowered.
#[derive(Debug, Clone)]
struct Built {
    tree: Option<VertexId>,
    config: ImageConfig,
    history: Vec<HistoryEntry>,
    /// Declared ARGs with their values, in order.
    args: Scope<Option<String>>,
    /// What `$NAME` means, and what RUN gets: ENV and ARG, the later one wins.
    env: Scope<String>,
    /// What the image keeps of it: ENV. The config gets it at the end.
    image_env: Scope<String>,
    /// A WORKDIR of the Dockerfile was seen.
    workdir_set: bool,
    /// The base's environment is not known.
    unknown: bool,
}

struct Lower<'a> {
    ast: &'a Ast,
    options: &'a Options,
    images: &'a BTreeMap<ImageKey, BaseImage>,
    lint: &'a mut Lint,
    stages: Stages<'a>,
    definition: Definition,
    source_map: SourceMap,
    needs: Vec<Need>,
    needed: BTreeSet<ImageKey>,
    /// Stages that were lowered, until nobody stands on them any more.
    done: BTreeMap<usize, Option<Built>>,
    /// The trees of stages that were lowered; `None` while an image is missing.
    trees: BTreeMap<usize, Option<Option<VertexId>>>,
    /// How many stages stand on each, and the target on itself.
    uses: Vec<usize>,
    used_args: BTreeSet<String>,
    /// What the target would like to be given, and the stages it stands on or copies from.
    wishes: Vec<Wish>,
    ignore: Option<&'a Patterns>,
    /// `SOURCE_DATE_EPOCH`.
    epoch: Option<i64>,
}

/// Where in its stage an instruction stands, and what the stage has seen.
struct Step {
    stage: usize,
    label: String,
    number: usize,
    total: usize,
    cmd: Option<Instruction>,
    entrypoint: Option<Instruction>,
    healthcheck: Option<Instruction>,
}

impl Step {
    /// `[build 2/5] RUN make`.
    fn title(&self, text: &str) -> String {
        let width = self.total.to_string().len();
        let label = if self.label.is_empty() { String::new() } else { format!("{} ", self.label) };
        format!("[{label}{:>width$}/{}] {}", self.number, self.total, without_credentials(text))
    }
}

impl<'a> Lower<'a> {
    fn new(
        ast: &'a Ast,
        options: &'a Options,
        images: &'a BTreeMap<ImageKey, BaseImage>,
        stages: Stages<'a>,
        lint: &'a mut Lint,
    ) -> Self {
        // Rules with `!` may take files back, so that nothing certain can be said of a path.
        let plain = !options.ignore.lines().iter().any(|line| line.trim_start().starts_with('!'));
        let mut uses = vec![0; stages.list.len()];
        for stage in &stages.list {
            if let Base::Stage(base) = stage.base {
                uses[base] += 1;
            }
        }
        Self {
            ast,
            options,
            images,
            lint,
            stages,
            definition: Definition::default(),
            source_map: SourceMap::default(),
            needs: Vec::new(),
            needed: BTreeSet::new(),
            done: BTreeMap::new(),
            trees: BTreeMap::new(),
            uses,
            used_args: BTreeSet::new(),
            wishes: Vec::new(),
            ignore: plain.then_some(&options.ignore),
            epoch: None,
        }
    }

    fn run(mut self, epoch: Option<i64>) -> Result<Lowering> {
        self.epoch = epoch;
        let target = self.stages.target(self.options.target.as_deref())?;
        self.uses[target] += 1;
        self.ensure(target)?;
        if self.options.all_stages {
            for stage in 0..self.stages.list.len() {
                self.ensure(stage)?;
            }
        }
        let built = self.take(target);
        let Some(mut built) = built.filter(|_| self.needs.is_empty()) else {
            return Ok(Lowering::Needs(self.needs));
        };
        self.based_on_files(&mut built, self.stages.list[target].from);
        let mut config = built.config;
        config.config.env = built.image_env.to_entries();
        config.config.labels.extend(self.options.labels.clone());
        let warnings = self.unused_args();
        let outline = Outline::new(&self.stages, target, &self.wishes);
        Ok(Lowering::Done(Box::new(Lowered {
            definition: self.definition,
            result: built.tree,
            config,
            history: built.history,
            source_map: self.source_map,
            warnings,
            args: declared_args(self.ast),
            stages: self.stages.list.iter().map(|stage| stage.label.clone()).collect(),
            warnings_are_errors: false,
            epoch,
            outline,
        })))
    }

    /// `--build-arg`s that nothing declares: a typing mistake, most of the time.
    fn unused_args(&self) -> Vec<Diagnostic> {
        let globals = &self.stages.declared;
        let declared = |name: &String| self.used_args.contains(name) || globals.contains(name);
        let predefined = |name: &str| {
            is_proxy(name)
                || name == "SOURCE_DATE_EPOCH"
                || name.starts_with("BUILDKIT_")
                || self.stages.globals.get(name).is_some()
        };
        let unused = self.options.build_args.keys().filter(|name| !declared(name) && !predefined(name));
        let known = || self.used_args.iter().chain(globals).map(String::as_str);
        unused
            .map(|name| {
                let message = format!("--build-arg {name} is declared by no ARG that the build reached");
                // It stands in no file.
                let span = Span { start: 0, end: 0 };
                let hint = did_you_mean(name, known().chain(self.stages.globals.names()));
                Diagnostic::warning(span, None, message).with_hint(hint)
            })
            .collect()
    }

    /// Lowers a stage and what it needs, each once, in the order of the file.
    fn ensure(&mut self, target: usize) -> Result<()> {
        let (mut wanted, mut open) = (BTreeSet::new(), vec![target]);
        while let Some(stage) = open.pop() {
            if self.trees.contains_key(&stage) || !wanted.insert(stage) {
                continue;
            }
            let Stage { base, body, .. } = &self.stages.list[stage];
            if matches!(base, Base::Context(_)) {
                continue;
            }
            if let Base::Stage(base) = base {
                open.push(*base);
            }
            for (read, span) in self.stages.reads(body)? {
                if read > stage {
                    return Err(self.too_late(read, span));
                }
                open.push(read);
            }
        }
        for stage in wanted {
            if !self.trees.contains_key(&stage) {
                let built = self.stage(stage)?;
                self.trees.insert(stage, built.as_ref().map(|built| built.tree));
                self.done.insert(stage, built);
            }
        }
        Ok(())
    }

    /// A stage to stand on. The last one to ask gets it without a copy, so that a chain of
    /// thousands of stages does not copy what it inherits thousands of times.
    fn take(&mut self, stage: usize) -> Option<Built> {
        self.uses[stage] = self.uses[stage].saturating_sub(1);
        if self.uses[stage] == 0 {
            self.done.remove(&stage).flatten()
        } else {
            self.done.get(&stage).cloned().flatten()
        }
    }

    fn too_late(&self, stage: usize, span: Span) -> Box<Diagnostic> {
        let name = self.stages.list[stage].name.clone().unwrap_or_else(|| format!("number {stage}"));
        let hint = format!("move stage {name} in front of this one");
        let message = format!("stage {name} must be defined before it is copied from");
        Box::new(Diagnostic::error(span, message).with_hint(Some(hint)))
    }

    /// Lowers one stage; `None` while an image is missing.
    fn stage(&mut self, index: usize) -> Result<Option<Built>> {
        let stage = &self.stages.list[index];
        let (from, body, platform) = (stage.from, stage.body, stage.platform.clone());
        let base = stage.base.clone();
        let label = match self.options.names_platform {
            true => format!("{platform} {}", stage.label).trim_end().to_owned(),
            false => stage.label.clone(),
        };
        let mut step = Step {
            stage: index,
            label,
            number: 0,
            total: body.iter().filter(|instruction| makes_layer(instruction.kind)).count(),
            cmd: None,
            entrypoint: None,
            healthcheck: None,
        };
        let built = match &base {
            Base::Context(name) => return self.replaced(index, name, from),
            Base::Stage(earlier) => self.take(*earlier),
            Base::Scratch => Some(scratch(&platform)),
            Base::Image(name) => {
                step.total += 1;
                step.number += 1;
                self.outside(name, from, from.rest_span(), &platform, None, Some(&step))?
            }
        };
        let Some(mut built) = built else { return Ok(None) };
        self.based_on_files(&mut built, from);
        // What an image or a stage asks of its children is done here, and not handed on.
        let triggers = std::mem::take(&mut built.config.config.on_build);
        if built.env.get("PATH").is_none() {
            built.image_env.set("PATH", DEFAULT_PATH.to_owned());
            built.env.set("PATH", DEFAULT_PATH.to_owned());
        }
        let mut complete = true;
        let triggers = self.triggers(&triggers, from)?;
        step.total += triggers.iter().filter(|instruction| makes_layer(instruction.kind)).count();
        for (read, span) in self.stages.reads(&triggers)? {
            if read >= index {
                return Err(self.too_late(read, span));
            }
            self.ensure(read)?;
        }
        for (instruction, is_trigger) in
            triggers.iter().map(|trigger| (trigger, true)).chain(body.iter().map(|own| (own, false)))
        {
            if makes_layer(instruction.kind) {
                step.number += 1;
            }
            let title =
                if is_trigger { format!("ONBUILD {}", instruction.title()) } else { instruction.title() };
            complete &= self.instruction(&mut step, &mut built, instruction, &title)?;
        }
        Ok(complete.then_some(built))
    }

    /// Expands a word where `built` stands; unknown variables are reported.
    fn expand(&mut self, built: &Built, at: &Instruction, text: &Text) -> Result<String> {
        self.expand_text(built, at, text, &text.value, Quotes::Remove)
    }

    /// The same of a part of `text`, or with quotes kept.
    fn expand_text(
        &mut self,
        built: &Built,
        at: &Instruction,
        text: &Text,
        value: &str,
        quotes: Quotes,
    ) -> Result<String> {
        let lookup = |name: &str| built.env.get(name).cloned();
        let escape = if quotes == Quotes::Text { '\\' } else { self.ast.directives.escape };
        let Expanded { text: expanded, unset, .. } = expand(value, escape, quotes, &lookup)
            .or_else(|error| wrong(at.part_span(text, error.start, error.end), error.message))?;
        for name in unset {
            // A declared ARG without a value is nobody's mistake.
            if built.unknown || built.args.contains(&name) {
                continue;
            }
            let known = built.env.names().chain(built.args.names());
            // Thousands of them are no typing mistakes.
            let is_few = self.lint.found.len() < MOST_SUGGESTIONS;
            let hint = is_few.then(|| did_you_mean(&name, known)).flatten();
            let hint = hint.map(|hint| hint.replacen('`', "`$", 1));
            let message = format!("${name} is not set here");
            self.lint.warn(Rule::UndefinedVar, at, at.text_span(text), message, hint);
        }
        Ok(expanded)
    }

    /// Adds a vertex that makes a layer.
    fn layer(
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
        built.history.push(history_entry(created_by, id));
    }
}

/// A layer as image histories tell it.
fn history_entry(created_by: String, layer: VertexId) -> HistoryEntry {
    let (created_by, comment) = (Some(shown(created_by)), Some(COMMENT.to_owned()));
    HistoryEntry { history: History { created_by, comment, ..History::default() }, vertex: Some(layer) }
}

fn makes_layer(kind: Kind) -> bool {
    matches!(kind, Kind::Run | Kind::Copy | Kind::Add | Kind::Workdir)
}

fn scratch(platform: &Platform) -> Built {
    let mut config = ImageConfig::empty(platform);
    config.config.working_dir = "/".to_owned();
    bare(config)
}

fn bare(config: ImageConfig) -> Built {
    Built {
        tree: None,
        config,
        history: Vec::new(),
        args: Scope::default(),
        env: Scope::default(),
        image_env: Scope::default(),
        workdir_set: false,
        unknown: false,
    }
}

impl Built {
    /// A history entry without a layer.
    fn note(&mut self, created_by: String) {
        self.history.push(HistoryEntry { history: entry(created_by), vertex: None });
    }
}

/// A history is for everybody who has the image.
fn shown(created_by: String) -> String {
    without_credentials(&created_by).into_owned()
}

fn entry(created_by: String) -> History {
    History {
        created_by: Some(shown(created_by)),
        comment: Some(COMMENT.to_owned()),
        empty_layer: true,
        ..History::default()
    }
}

fn location(instruction: &Instruction) -> Location {
    Location { first_line: instruction.line.first_line, last_line: instruction.line.last_line }
}

/// An absolute, clean path: `path` seen from `base`.
fn join(base: &str, path: &str) -> String {
    let mut parts: Vec<&str> = Vec::new();
    let base = if path.starts_with('/') { "" } else { base };
    for part in base.split('/').chain(path.split('/')) {
        match part {
            "" | "." => {}
            ".." => {
                parts.pop();
            }
            part => parts.push(part),
        }
    }
    format!("/{}", parts.join("/"))
}
