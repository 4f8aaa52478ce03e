//! `SOURCE_DATE_EPOCH`: seconds, or the name of something that has a time.

use std::borrow::Cow;
use std::collections::BTreeMap;

use kiln_llb::{Op, Source, Vertex};

use super::{BaseImage, ImageKey, Lower, NamedContext, Options, makes_layer};
use crate::ast::{Ast, Kind};
use crate::lint::Lint;
use crate::stages::{Base, Result, Stages, wrong};
use crate::{Diagnostic, Span, nearest};

const NAME: &str = "SOURCE_DATE_EPOCH";
/// Four-digit years: what image configs can hold (RFC 3339).
const END: i64 = 253_402_300_800;

/// What the caller knows of the time that `SOURCE_DATE_EPOCH` names.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum EpochTime {
    /// Nothing yet: it is asked for by [`super::Lowering::NeedsTime`].
    #[default]
    Unasked,
    /// Seconds since 1970.
    At(i64),
    /// Nothing, and it does not matter: nothing will be built.
    Unknown,
}

/// Something whose time `SOURCE_DATE_EPOCH` asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NeedsTime {
    /// What it is.
    pub of: TimeOf,
    /// What it was called.
    pub name: String,
    /// Where; empty for a build argument.
    pub span: Span,
}

/// What has a time.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TimeOf {
    /// The main context: a repository or a file of a web server.
    Context,
    /// A repository (the commit's time) or a file of a web server (its `Last-Modified`).
    Source(Box<Source>),
}

/// What became of the value.
pub(super) enum Epoch {
    /// Seconds since 1970, or not set.
    Known(Option<i64>),
    Needs(NeedsTime),
}

/// Finds the time. A name is replaced by its number, so that an ARG sees that.
///
/// # Errors
/// A value that is neither a time nor the name of something that can have one.
pub(super) fn find(
    ast: &Ast,
    options: &mut Cow<'_, Options>,
    images: &BTreeMap<ImageKey, BaseImage>,
    stages: &mut Stages<'_>,
) -> Result<Epoch> {
    let declared = stages.global_args.iter().rev().find(|(_, name, _)| name == NAME);
    let span = declared.map_or(Span { start: 0, end: 0 }, |(at, _, _)| at.span());
    let passed = options.build_args.get(NAME);
    let value = passed.or_else(|| stages.globals.get(NAME)).filter(|value| !value.is_empty()).cloned();
    let Some(value) = value else { return Ok(Epoch::Known(None)) };
    let number = |seconds: i64| (0..END).contains(&seconds).then_some(seconds);
    if let Ok(seconds) = value.parse::<i64>() {
        return match number(seconds) {
            Some(seconds) => Ok(Epoch::Known(Some(seconds))),
            None => wrong(span, format!("{NAME} takes seconds since 1970, not {value:?}")),
        };
    }
    let of = time_of(ast, options, images, stages, &value, span)?;
    match options.epoch {
        EpochTime::Unasked => Ok(Epoch::Needs(NeedsTime { of, name: value, span })),
        EpochTime::Unknown => Ok(Epoch::Known(None)),
        EpochTime::At(seconds) => {
            let Some(seconds) = number(seconds) else {
                return wrong(span, format!("{NAME}={value}: no image can be as old or new as {seconds}"));
            };
            if passed.is_some() {
                options.to_mut().build_args.insert(NAME.to_owned(), seconds.to_string());
            } else {
                stages.globals.replace(NAME, seconds.to_string());
            }
            Ok(Epoch::Known(Some(seconds)))
        }
    }
}

fn time_of(
    ast: &Ast,
    options: &Options,
    images: &BTreeMap<ImageKey, BaseImage>,
    stages: &Stages<'_>,
    name: &str,
    span: Span,
) -> Result<TimeOf> {
    let source = |source| Ok(TimeOf::Source(Box::new(source)));
    match options.context(name, &options.platform).map(|(_, context)| context) {
        Some(NamedContext::Git(git)) => return source(Source::Git(git.clone())),
        Some(NamedContext::Http(url)) => return source(Source::Http(super::outside::named_download(url))),
        Some(NamedContext::Local { .. } | NamedContext::Image(_) | NamedContext::Layout(..)) => {
            let what = "it is neither a repository nor a file of a web server";
            return wrong(span, format!("{NAME}: the context {name} has no time: {what}"));
        }
        None => {}
    }
    if let Some(stage) = stages.named(name) {
        return match only_source(ast, options, images, stage)? {
            Some(found) => source(found),
            None => {
                let message = format!("{NAME}: stage {name} has no time");
                let hint = "it has one if it is `FROM scratch` and one ADD of a URL or a repository";
                Err(Box::new(Diagnostic::error(span, message).with_hint(Some(hint.to_owned()))))
            }
        };
    }
    if name == "context" {
        return Ok(TimeOf::Context);
    }
    let known = stages.list.iter().filter_map(|stage| stage.name.as_deref());
    let known = known.chain(options.contexts.keys().map(String::as_str)).chain(["context"]);
    let hint = nearest(name, known).map(|near| format!("did you mean `{near}`?"));
    let message = format!(
        "{NAME} takes seconds since 1970, `context`, or the name of a context or a stage, not {name:?}"
    );
    Err(Box::new(Diagnostic::error(span, message).with_hint(hint)))
}

/// The repository or file that is all there is in a stage.
fn only_source(
    ast: &Ast,
    options: &Options,
    images: &BTreeMap<ImageKey, BaseImage>,
    stage: usize,
) -> Result<Option<Source>> {
    // A run of its own: what it lowers and warns about is lowered again, with the time.
    let mut lint = Lint::new(ast.directives.check.clone());
    let stages = Stages::find(ast, options, &mut lint)?;
    let found = &stages.list[stage];
    let mut layers = found.body.iter().filter(|instruction| makes_layer(instruction.kind));
    let one_add = layers.next().is_some_and(|first| first.kind == Kind::Add) && layers.next().is_none();
    if found.base != Base::Scratch || !one_add {
        return Ok(None);
    }
    let mut lower = Lower::new(ast, options, images, stages, &mut lint);
    lower.ensure(stage)?;
    let sources = lower.definition.vertices().iter().filter_map(|Vertex { op, .. }| match op {
        Op::Source(source) => Some(source),
        _ => None,
    });
    let sources: Vec<&Source> = sources.collect();
    Ok(match sources.as_slice() {
        [source @ (Source::Git(_) | Source::Http(_))] => Some((*source).clone()),
        _ => None,
    })
}
