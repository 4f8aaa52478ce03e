//! A case's file: lines `key: value`.

use std::collections::BTreeMap;

use kiln_frontend::{BaseImage, NamedContext, Options};
use kiln_oci::image::ImageConfig;
use kiln_oci::{DiffId, Digest, Platform, Reference};
use serde_json::Value;

/// What `expected` holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Shows {
    Ast,
    Dag,
    Error,
    Warnings,
}

/// What the specification says of the Dockerfile.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    Accepts,
    /// One error says all of these, in any case of letters.
    Rejects(Vec<String>),
}

/// A judgement, and what the build is asked for.
#[derive(Debug)]
pub(crate) struct Case {
    pub(crate) rows: Vec<String>,
    pub(crate) shows: Shows,
    pub(crate) options: Options,
    /// Lines of the ignore file.
    pub(crate) ignore: Vec<String>,
    pub(crate) images: BTreeMap<Reference, BaseImage>,
    /// What the caller answers when it is asked for the time of something.
    pub(crate) time: Option<i64>,
    pub(crate) verdict: Verdict,
    /// Line and column of the error, or the line of the warnings in `warns`; counted from 1.
    pub(crate) at: Option<(usize, Option<usize>)>,
    /// Rules that fire.
    pub(crate) warns: Vec<String>,
    /// Rules that do not; `all`: none does.
    pub(crate) quiet: Vec<String>,
    /// Paths that the ignore rules leave out.
    pub(crate) ignored: Vec<String>,
    /// Paths that they do not.
    pub(crate) kept: Vec<String>,
    /// Stands in the output; ` ⏎ ` is the end of a line.
    pub(crate) contains: Vec<String>,
    /// Does not.
    pub(crate) lacks: Vec<String>,
}

impl Case {
    /// Reads a case's file.
    pub(crate) fn parse(text: &str) -> Result<Self, String> {
        let platform: Platform = "linux/amd64".parse().map_err(|error| format!("{error}"))?;
        let mut case = Case {
            rows: Vec::new(),
            shows: Shows::Dag,
            options: Options::new(platform),
            ignore: Vec::new(),
            images: BTreeMap::new(),
            time: None,
            verdict: Verdict::Accepts,
            at: None,
            warns: Vec::new(),
            quiet: Vec::new(),
            ignored: Vec::new(),
            kept: Vec::new(),
            contains: Vec::new(),
            lacks: Vec::new(),
        };
        let mut judged = false;
        for line in text.lines() {
            let (key, value) = line.split_once(':').ok_or_else(|| format!("{line:?} is not `key: value`"))?;
            let value = value.strip_prefix(' ').unwrap_or(value);
            let text = value.replace(" ⏎ ", "\n");
            match key {
                "row" => case.rows.push(text),
                "shows" => case.shows = shows(value)?,
                "arg" => {
                    let (name, value) = pair(value, '=')?;
                    case.options.build_args.insert(name, value);
                }
                "target" => case.options.target = Some(text),
                "ignore" => case.ignore.push(text),
                "image" => {
                    let (name, config) = pair(value, ' ')?;
                    let reference: Reference = name.parse().map_err(|error| format!("{name}: {error}"))?;
                    let config = serde_json::from_str(&config).map_err(|error| format!("{name}: {error}"))?;
                    let image = base_image(&reference, config);
                    case.images.insert(reference, image);
                }
                "context" => {
                    let (name, text) = pair(value, '=')?;
                    case.options.contexts.insert(name, context(&text)?);
                }
                "time" => {
                    case.time = Some(value.parse().map_err(|_| format!("{value:?} is no time"))?);
                }
                "accepts" => judged = true,
                "rejects" => {
                    judged = true;
                    match &mut case.verdict {
                        Verdict::Rejects(parts) => parts.push(text),
                        verdict => *verdict = Verdict::Rejects(vec![text]),
                    }
                }
                "at" => case.at = Some(place(value)?),
                "warns" => case.warns.push(text),
                "quiet" => case.quiet.push(text),
                "ignored" => case.ignored.push(text),
                "kept" => case.kept.push(text),
                "contains" => case.contains.push(text),
                "lacks" => case.lacks.push(text),
                _ => return Err(format!("unknown key {key:?}")),
            }
        }
        match (judged, case.rows.is_empty()) {
            (false, _) => Err("neither `accepts` nor `rejects`".to_owned()),
            (_, true) => Err("no `row`".to_owned()),
            _ => Ok(case),
        }
    }
}

fn shows(value: &str) -> Result<Shows, String> {
    match value {
        "ast" => Ok(Shows::Ast),
        "dag" => Ok(Shows::Dag),
        "error" => Ok(Shows::Error),
        "warnings" => Ok(Shows::Warnings),
        _ => Err(format!("nothing is shown as {value:?}")),
    }
}

fn pair(value: &str, separator: char) -> Result<(String, String), String> {
    let (first, second) =
        value.split_once(separator).ok_or_else(|| format!("{value:?} has no {separator:?}"))?;
    Ok((first.to_owned(), second.to_owned()))
}

fn place(value: &str) -> Result<(usize, Option<usize>), String> {
    let number = |text: &str| text.parse::<usize>().map_err(|_| format!("{value:?} is no place"));
    match value.split_once(':') {
        None => Ok((number(value)?, None)),
        Some((line, column)) => Ok((number(line)?, Some(number(column)?))),
    }
}

fn context(text: &str) -> Result<NamedContext, String> {
    match pair(text, ':')? {
        (kind, _) if kind == "local" => Ok(NamedContext::Local { ignore: Vec::new() }),
        (kind, name) if kind == "image" => {
            Ok(NamedContext::Image(name.parse().map_err(|error| format!("{name}: {error}"))?))
        }
        (kind, url) if kind == "git" => match kiln_frontend::git_url::parse(&url) {
            Some(git) => Ok(NamedContext::Git(git.map_err(|error| error.to_string())?)),
            None => Err(format!("{url:?} is no repository")),
        },
        (kind, url) if kind == "http" => Ok(NamedContext::Http(url)),
        (kind, _) => Err(format!("no context is of the kind {kind:?}")),
    }
}

/// A base image of one layer for linux/amd64 whose `config` is `config`; `architecture` in it is
/// the image's. Without an environment it has docker's PATH.
pub(crate) fn base_image(reference: &Reference, mut config: Value) -> BaseImage {
    let name = reference.to_string();
    let platform: Platform = "linux/amd64".parse().expect("it is a platform");
    let mut image = ImageConfig::empty(&platform);
    if let Some(Value::String(architecture)) =
        config.as_object_mut().and_then(|config| config.remove("architecture"))
    {
        image.architecture = architecture;
    }
    image.config = serde_json::from_value(config).expect("a case's image has a config");
    if image.config.env.is_empty() {
        let path = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
        image.config.env.push(format!("PATH={path}"));
    }
    image.rootfs.diff_ids.push(DiffId(Digest::of(name.as_bytes())));
    BaseImage { config_digest: Digest::of(name.as_bytes()), config: image, unknown: false }
}
