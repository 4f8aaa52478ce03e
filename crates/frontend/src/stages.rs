//! FROM by FROM: what each stage stands on and copies from.

use std::collections::{BTreeMap, BTreeSet};

use kiln_oci::{Platform, Reference};

use crate::ast::{Ast, Body, Instruction, Kind, Text};
use crate::lint::{Lint, description};
use crate::scope::Scope;
use crate::suggest::{did_you_mean, nearest};
use crate::words::{Expanded, Quotes, expand};
use crate::{Diagnostic, NamedContext, Options, Rule, Span, mount};

pub(crate) type Result<T, E = Box<Diagnostic>> = std::result::Result<T, E>;

pub(crate) fn wrong<T>(span: Span, message: impl Into<String>) -> Result<T> {
    Err(Box::new(Diagnostic::error(span, message)))
}

/// A `FROM` and what follows it.
pub(crate) struct Stage<'a> {
    pub(crate) from: &'a Instruction,
    /// In lower case.
    pub(crate) name: Option<String>,
    /// For titles: its name, or `stage-N`; empty when it is the only one.
    pub(crate) label: String,
    pub(crate) base: Base,
    pub(crate) platform: Platform,
    pub(crate) body: &'a [Instruction],
    /// From the comment above it.
    pub(crate) description: Option<String>,
}

/// What a stage stands on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Base {
    /// Nothing.
    Scratch,
    /// An earlier stage.
    Stage(usize),
    /// An image, by the text of FROM.
    Image(String),
    /// The stage is replaced by the named context of its name.
    Context(String),
}

/// What a `from` names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Origin {
    /// A stage.
    Stage(usize),
    /// An image or a named context.
    Outside(String),
}

/// All stages with their global variables.
pub(crate) struct Stages<'a> {
    pub(crate) list: Vec<Stage<'a>>,
    /// The last stage of each name.
    by_name: BTreeMap<String, usize>,
    /// Global ARGs and predefined ones, for FROM and for ARGs without a default.
    pub(crate) globals: Scope<String>,
    /// Global ARG instructions with the values they got.
    pub(crate) global_args: Vec<(&'a Instruction, String, Option<String>)>,
    /// Their names.
    pub(crate) declared: BTreeSet<String>,
}

/// Proxies reach RUN without being declared.
pub(crate) const PROXIES: [&str; 5] = ["HTTP_PROXY", "HTTPS_PROXY", "FTP_PROXY", "NO_PROXY", "ALL_PROXY"];

impl<'a> Stages<'a> {
    /// Finds the stages of `ast`, expands what FROM says, and checks who copies from whom.
    pub(crate) fn find(ast: &'a Ast, options: &Options, lint: &mut Lint) -> Result<Self> {
        let instructions = &ast.instructions;
        let first = instructions.iter().position(|instruction| instruction.kind == Kind::From);
        let head = &instructions[..first.unwrap_or(instructions.len())];
        if let Some(stray) = head.iter().find(|instruction| instruction.kind != Kind::Arg) {
            let hint = Some("begin with `FROM image`".to_owned());
            let message = format!("only ARG may stand in front of the first FROM, not {}", stray.kind.name());
            return Err(Box::new(Diagnostic::error(stray.keyword_span(), message).with_hint(hint)));
        }
        let Some(first) = first else {
            let span = instructions.last().map_or(Span { start: 0, end: 0 }, Instruction::span);
            let hint = Some("begin a stage with `FROM image`".to_owned());
            let message = "the Dockerfile has no FROM, so there is no stage to build";
            return Err(Box::new(Diagnostic::error(span, message).with_hint(hint)));
        };
        let predefined = predefined(ast, options);
        let defaults = global_args(ast, head, predefined.clone(), &BTreeMap::new())?.0;
        let (globals, global_args) = global_args(ast, head, predefined, &options.build_args)?;
        let declared = global_args.iter().map(|(_, name, _)| name.clone()).collect();
        let mut stages = Self { list: Vec::new(), by_name: BTreeMap::new(), globals, global_args, declared };
        let starts: Vec<usize> =
            (first..instructions.len()).filter(|&at| instructions[at].kind == Kind::From).collect();
        for (number, &at) in starts.iter().enumerate() {
            let end = starts.get(number + 1).copied().unwrap_or(instructions.len());
            let stage =
                stages.stage(ast, options, &instructions[at], &instructions[at + 1..end], &defaults, lint)?;
            if let Some(name) = &stage.name {
                stages.by_name.insert(name.clone(), number);
            }
            stages.list.push(stage);
        }
        if let [only] = stages.list.as_mut_slice() {
            only.label.clear();
        }
        stages.check_circles()?;
        Ok(stages)
    }

    fn stage(
        &self,
        ast: &Ast,
        options: &Options,
        from: &'a Instruction,
        body: &'a [Instruction],
        defaults: &Scope<String>,
        lint: &mut Lint,
    ) -> Result<Stage<'a>> {
        let Body::From(parts) = &from.body else {
            return wrong(from.span(), "a stage begins with FROM");
        };
        let name = parts.name.as_ref().map(|(_, name)| name.value.to_lowercase());
        let number = self.list.len();
        let label = name.clone().unwrap_or_else(|| format!("stage-{number}"));
        let platform = self.platform(ast, options, from, name.as_deref(), lint)?;
        let image = self.expand(ast, from, &parts.image, lint)?;
        if image.is_empty() {
            let span = from.text_span(&parts.image);
            let hint = Some("give its ARG a default, or pass --build-arg".to_owned());
            let message =
                format!("the base image {:?} is empty after its variables were replaced", parts.image.value);
            return Err(Box::new(Diagnostic::error(span, message).with_hint(hint)));
        }
        // Without build arguments as well the Dockerfile should name an image.
        let by_default = expand(&parts.image.value, ast.directives.escape, Quotes::Remove, &|name| {
            defaults.get(name).cloned()
        });
        if parts.image.value.contains('$')
            && let Ok(Expanded { text, .. }) = by_default
            && text.parse::<Reference>().is_err()
        {
            let message = format!("without --build-arg, {:?} names no image", parts.image.value);
            let hint = Some("give its ARG a default".to_owned());
            let span = from.text_span(&parts.image);
            lint.warn(Rule::InvalidDefaultArgInFrom, from, span, message, hint);
        }
        let earlier = self.by_name.get(&image).copied();
        let base = match (&name, earlier) {
            (Some(name), _) if options.context(name, &platform).is_some() => Base::Context(name.clone()),
            (_, Some(earlier)) => Base::Stage(earlier),
            _ if image == "scratch" => Base::Scratch,
            _ => Base::Image(image),
        };
        // What stands on a stage is for what that is for, whatever its own flag says (BuildKit).
        let platform = match base {
            Base::Stage(earlier) => self.list[earlier].platform.clone(),
            _ => platform,
        };
        let comments = &from.line.comments;
        let description = name.as_ref().and_then(|name| description(comments, name));
        Ok(Stage { from, name, label, base, platform, body, description })
    }

    fn platform(
        &self,
        ast: &Ast,
        options: &Options,
        from: &Instruction,
        stage: Option<&str>,
        lint: &mut Lint,
    ) -> Result<Platform> {
        let Some(flag) = from.flag("platform") else { return Ok(options.platform.clone()) };
        let Some(text) = &flag.value else { return Ok(options.platform.clone()) };
        let span = from.text_span(text);
        let value = self.expand(ast, from, text, lint)?;
        if value.is_empty() {
            return wrong(
                span,
                format!("the platform {:?} is empty after its variables were replaced", text.value),
            );
        }
        let platform: Platform = match value.parse() {
            Ok(platform) => platform,
            Err(_) if matches!(value.as_str(), "linux" | "local") => options.build_platform.clone(),
            Err(error) => {
                let hint = did_you_mean(&value, Platform::USUAL);
                return Err(Box::new(Diagnostic::error(span, error.to_string()).with_hint(hint)));
            }
        };
        if matches!(text.value.as_str(), "$TARGETPLATFORM" | "${TARGETPLATFORM}") {
            let message = "--platform=$TARGETPLATFORM is the default";
            let hint = Some("leave it out".to_owned());
            lint.warn(Rule::RedundantTargetPlatform, from, span, message, hint);
        }
        let fits_name =
            stage.is_some_and(|name| name.contains(&platform.os) || name.contains(&platform.architecture));
        if !text.value.contains('$') && !fits_name {
            let message = format!("--platform={value} builds this stage for {value} whatever is asked for");
            let hint = Some("use $BUILDPLATFORM or $TARGETPLATFORM".to_owned());
            lint.warn(Rule::FromPlatformFlagConstDisallowed, from, span, message, hint);
        }
        Ok(platform)
    }

    /// Expands a word of FROM: only global ARGs count there.
    fn expand(&self, ast: &Ast, from: &Instruction, text: &Text, lint: &mut Lint) -> Result<String> {
        let expanded = expand_global(ast, from, text, &self.globals)?;
        for name in &expanded.unset {
            if self.declared.contains(name) {
                continue;
            }
            let message = format!("FROM uses ${name}, which no ARG in front of the first FROM declares");
            let hint = did_you_mean(name, self.globals.names());
            let span = from.text_span(text);
            lint.warn(Rule::UndefinedArgInFrom, from, span, message, hint);
        }
        Ok(expanded.text)
    }

    /// The stage to build; without a name the last one.
    pub(crate) fn target(&self, name: Option<&str>) -> Result<usize> {
        let Some(name) = name else { return Ok(self.list.len() - 1) };
        self.by_name.get(&name.to_lowercase()).copied().ok_or_else(|| {
            let names = self.list.iter().filter_map(|stage| stage.name.as_deref());
            let known: Vec<&str> = names.clone().collect();
            let hint = nearest(name, names)
                .map(|near| format!("did you mean `{near}`?"))
                .or_else(|| (!known.is_empty()).then(|| format!("stages are {}", known.join(", "))));
            let span = self.list[0].from.span();
            let message = format!("there is no stage {name:?} to build");
            Box::new(Diagnostic::error(span, message).with_hint(hint))
        })
    }

    /// The stage of this name.
    pub(crate) fn named(&self, name: &str) -> Option<usize> {
        self.by_name.get(&name.to_lowercase()).copied()
    }

    /// What `--from=text` names.
    ///
    /// # Errors
    /// A number without a stage; a variable.
    pub(crate) fn origin(&self, text: &str, span: Span, numbers: bool) -> Result<Origin> {
        if text.contains('$') {
            let hint = "name a stage by `FROM $IMAGE AS name` and copy from it".to_owned();
            let message = "variables are not expanded in --from";
            return Err(Box::new(Diagnostic::error(span, message).with_hint(Some(hint))));
        }
        if numbers && let Ok(number) = text.parse::<usize>() {
            if number < self.list.len() {
                return Ok(Origin::Stage(number));
            }
            let message = format!("there is no stage number {number}; they count from 0");
            return wrong(span, message);
        }
        Ok(match self.by_name.get(&text.to_lowercase()) {
            Some(stage) => Origin::Stage(*stage),
            None => Origin::Outside(text.to_owned()),
        })
    }

    /// The stages that instructions of a stage read files from, with the place that says so.
    pub(crate) fn reads(&self, instructions: &[Instruction]) -> Result<Vec<(usize, Span)>> {
        let mut found = Vec::new();
        for instruction in instructions {
            for flag in &instruction.flags {
                let Some(value) = &flag.value else { continue };
                let (from, span, numbers) = match (instruction.kind, flag.name.as_str()) {
                    (Kind::Copy, "from") => (value.value.clone(), instruction.text_span(value), true),
                    (Kind::Run, "mount") => {
                        let fields =
                            mount::fields(&value.value).map_err(|error| error.at(instruction, value))?;
                        let field = fields.into_iter().find(|field| field.key == "from");
                        let Some(field) = field else { continue };
                        let span = instruction.part_span(value, field.start, field.end);
                        (field.value.unwrap_or_default(), span, false)
                    }
                    _ => continue,
                };
                if let Origin::Stage(stage) = self.origin(&from, span, numbers)? {
                    found.push((stage, span));
                }
            }
        }
        Ok(found)
    }

    /// No stage may wait for itself, reached or not.
    fn check_circles(&self) -> Result<()> {
        let mut reads = Vec::with_capacity(self.list.len());
        for stage in &self.list {
            let mut needs = self.reads(stage.body)?;
            if let Base::Stage(base) = stage.base {
                needs.push((base, stage.from.span()));
            }
            reads.push(needs);
        }
        // Depth first with a stack of our own: chains of stages may be thousands long.
        let mut state = vec![Visit::New; reads.len()];
        for start in 0..reads.len() {
            let mut stack = vec![(start, 0)];
            while let Some((stage, next)) = stack.pop() {
                if next == 0 {
                    if state[stage] == Visit::Done {
                        continue;
                    }
                    state[stage] = Visit::Open;
                }
                let Some((needed, span)) = reads[stage].get(next) else {
                    state[stage] = Visit::Done;
                    continue;
                };
                stack.push((stage, next + 1));
                match state[*needed] {
                    Visit::Open => {
                        let label =
                            |at: usize| self.list[at].name.clone().unwrap_or_else(|| format!("number {at}"));
                        let message =
                            format!("stage {} needs itself: the stages form a circle", label(*needed));
                        return wrong(*span, message);
                    }
                    Visit::New => stack.push((*needed, 0)),
                    Visit::Done => {}
                }
            }
        }
        Ok(())
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Visit {
    New,
    Open,
    Done,
}

fn expand_global(ast: &Ast, at: &Instruction, text: &Text, globals: &Scope<String>) -> Result<Expanded> {
    let lookup = |name: &str| globals.get(name).cloned();
    expand(&text.value, ast.directives.escape, Quotes::Remove, &lookup)
        .or_else(|error| wrong(at.part_span(text, error.start, error.end), error.message))
}

type GlobalArgs<'a> = Vec<(&'a Instruction, String, Option<String>)>;

/// ARGs in front of the first FROM: each sees the ones before it.
fn global_args<'a>(
    ast: &'a Ast,
    head: &'a [Instruction],
    mut globals: Scope<String>,
    build_args: &BTreeMap<String, String>,
) -> Result<(Scope<String>, GlobalArgs<'a>)> {
    let mut declared = Vec::new();
    for instruction in head {
        let Body::Arg(definitions) = &instruction.body else { continue };
        for definition in definitions {
            let name = &definition.name.value;
            let value = match (build_args.get(name), &definition.default) {
                (Some(value), _) => Some(value.clone()),
                (None, Some(default)) => Some(expand_global(ast, instruction, default, &globals)?.text),
                (None, None) => None,
            };
            if let Some(value) = &value {
                globals.set(name, value.clone());
            }
            declared.push((instruction, name.clone(), value));
        }
    }
    Ok((globals, declared))
}

/// ARGs that nobody has to declare for FROM.
fn predefined(ast: &Ast, options: &Options) -> Scope<String> {
    let mut scope = Scope::default();
    let sides = [("BUILD", &options.build_platform), ("TARGET", &options.platform)];
    for (side, platform) in sides {
        let values = [
            ("PLATFORM", platform.to_string()),
            ("OS", platform.os.clone()),
            ("OSVERSION", platform.os_version.clone().unwrap_or_default()),
            ("ARCH", platform.architecture.clone()),
            ("VARIANT", platform.variant.clone().unwrap_or_default()),
        ];
        for (name, value) in values {
            scope.set(&format!("{side}{name}"), value);
        }
    }
    let last = ast.instructions.iter().rev().find_map(|instruction| match &instruction.body {
        Body::From(from) => Some(from.name.as_ref().map(|(_, name)| name.value.to_lowercase())),
        _ => None,
    });
    let target = options.target.clone().or(last.flatten()).unwrap_or_else(|| "default".to_owned());
    scope.set("TARGETSTAGE", target);
    let known: Vec<String> = scope.names().map(str::to_owned).collect();
    for name in known {
        if let Some(value) = options.build_args.get(&name) {
            scope.set(&name, value.clone());
        }
    }
    scope
}

/// Proxy variables in either case.
pub fn is_proxy(name: &str) -> bool {
    PROXIES.iter().any(|proxy| name.eq_ignore_ascii_case(proxy))
}

impl Options {
    /// The named context that stands in for a stage or an image of this name, with its own name;
    /// one for `platform` goes before one for all.
    pub(crate) fn context(&self, name: &str, platform: &Platform) -> Option<(&str, &NamedContext)> {
        let reference = name.parse::<Reference>().ok();
        let same = |known: &str| {
            known == name || (reference.is_some() && known.parse::<Reference>().ok() == reference)
        };
        let find = |wanted: Option<&Platform>| {
            let fits = |known: &str| match known.split_once("::") {
                Some((known, of)) => wanted.is_some() && of.parse().ok().as_ref() == wanted && same(known),
                None => wanted.is_none() && same(known),
            };
            self.contexts.iter().find(|(known, _)| fits(known))
        };
        find(Some(platform)).or_else(|| find(None)).map(|(known, context)| (known.as_str(), context))
    }
}
