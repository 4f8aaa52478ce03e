//! `--call=outline` and `--call=targets`: what a Dockerfile takes and what it can build.

use crate::ast::{Ast, Body, Instruction, Text};
use crate::lint::description;
use crate::redact::without_credentials;
use crate::scope::Scope;
use crate::stages::Stages;

/// What can be passed to the build of one target.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Outline {
    /// The target's name; `None`: it has none.
    pub name: Option<String>,
    /// From the comment above its FROM.
    pub description: Option<String>,
    /// Build arguments that count for it.
    pub args: Vec<OutlineArg>,
    /// Secrets that its steps ask for, and whether they must be there.
    pub secrets: Vec<(String, bool)>,
    /// Agents that its steps ask for, and whether they must be there.
    pub ssh: Vec<(String, bool)>,
    /// Caches that its steps use.
    pub caches: Vec<String>,
}

/// A build argument.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OutlineArg {
    /// Its name.
    pub name: String,
    /// From the comment above it.
    pub description: Option<String>,
    /// The value it has in this build; URLs in it without what logs in.
    pub value: Option<String>,
    /// Line of its ARG, counted from 1.
    pub line: usize,
}

/// Something that an instruction would like to be given.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Wish {
    Arg(OutlineArg),
    Secret(String, bool),
    Ssh(String, bool),
    Cache(String),
}

impl Wish {
    pub(crate) fn arg(at: &Instruction, name: &Text, value: Option<&str>) -> Self {
        Self::Arg(OutlineArg {
            name: name.value.clone(),
            description: description(&at.line.comments, &name.value),
            value: value.map(shown),
            line: at.line.first_line,
        })
    }

    pub(crate) fn secret(id: &str, required: bool) -> Self {
        Self::Secret(id.to_owned(), required)
    }

    pub(crate) fn ssh(id: &str, required: bool) -> Self {
        Self::Ssh(id.to_owned(), required)
    }

    pub(crate) fn cache(id: &str) -> Self {
        Self::Cache(id.to_owned())
    }
}

impl Outline {
    pub(crate) fn new(stages: &Stages<'_>, target: usize, wishes: &[Wish]) -> Self {
        let stage = &stages.list[target];
        let mut outline =
            Self { name: stage.name.clone(), description: stage.description.clone(), ..Self::default() };
        let mut args: Scope<OutlineArg> = Scope::default();
        for (at, name, value) in &stages.global_args {
            let (name, description) = (name.clone(), description(&at.line.comments, name));
            let value = value.as_deref().map(shown);
            let arg = OutlineArg { name, description, value, line: at.line.first_line };
            args.replace(&arg.name.clone(), arg);
        }
        for wish in wishes {
            match wish {
                Wish::Arg(arg) => args.replace(&arg.name, arg.clone()),
                Wish::Secret(id, required) => add(&mut outline.secrets, id, *required),
                Wish::Ssh(id, required) => add(&mut outline.ssh, id, *required),
                Wish::Cache(id) if !outline.caches.contains(id) => outline.caches.push(id.clone()),
                Wish::Cache(_) => {}
            }
        }
        outline.args = args.iter().map(|(_, arg)| arg.clone()).collect();
        outline
    }
}

fn shown(value: &str) -> String {
    without_credentials(value).into_owned()
}

fn add(list: &mut Vec<(String, bool)>, id: &str, required: bool) {
    match list.iter_mut().find(|(known, _)| known == id) {
        Some((_, known)) => *known |= required,
        None => list.push((id.to_owned(), required)),
    }
}

/// A stage that can be built by `--target`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Target {
    /// Its name; `None`: it has none.
    pub name: Option<String>,
    /// From the comment above its FROM.
    pub description: Option<String>,
    /// What it stands on, as written.
    pub base: String,
    /// `--platform` as written.
    pub platform: Option<String>,
    /// Built when nobody asks for another.
    pub is_default: bool,
    /// Line of its FROM, counted from 1.
    pub line: usize,
}

/// The stages of a Dockerfile in file order.
pub fn targets(ast: &Ast) -> Vec<Target> {
    let mut found: Vec<Target> = Vec::new();
    for instruction in &ast.instructions {
        let Body::From(from) = &instruction.body else { continue };
        let name = from.name.as_ref().map(|(_, name)| name.value.to_lowercase());
        let comments = &instruction.line.comments;
        found.push(Target {
            description: name.as_ref().and_then(|name| description(comments, name)),
            name,
            base: from.image.value.clone(),
            platform: instruction
                .flag("platform")
                .and_then(|flag| flag.value.as_ref())
                .map(|text| text.value.clone()),
            is_default: false,
            line: instruction.line.first_line,
        });
    }
    if let Some(last) = found.last_mut() {
        last.is_default = true;
    }
    found
}
