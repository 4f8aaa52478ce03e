//! `kiln mutate`

use std::collections::BTreeMap;

use kiln_build::toolkit::{Mutated, Mutation, Squash, mutate};

use super::{pair, print};
use crate::args::toolkit::{MutateArgs, SquashWhat};
use crate::errors::{Failure, say};
use crate::session::Session;

pub(crate) fn run(session: &Session, args: MutateArgs) -> Result<u8, Failure> {
    let image = session.find(&args.image)?;
    let mut env = Vec::new();
    for text in &args.env {
        let set = pair(text, "--env")?;
        env.push(
            set.ok_or_else(|| Failure::usage(format!("--env {text}: the environment has no such variable")))?,
        );
    }
    let mut labels = BTreeMap::new();
    for text in &args.label {
        let label = text.split_once('=').filter(|(name, _)| !name.is_empty());
        let (name, value) =
            label.ok_or_else(|| Failure::usage(format!("--label {text:?} is not NAME=VALUE")))?;
        labels.insert(name.to_owned(), value.to_owned());
    }
    let base = args.base.as_deref().map(|name| session.find(name)).transpose()?;
    let squash = match args.squash {
        None => None,
        Some(SquashWhat::Own) => Some(Squash::Own { base }),
        Some(SquashWhat::All) if base.is_some() => {
            return Err(Failure::usage("--squash=all leaves no base; leave away --base"));
        }
        Some(SquashWhat::All) => Some(Squash::All),
    };
    let mutation = Mutation {
        append: args.append,
        unset_env: args.unset_env,
        env,
        unset_labels: args.unset_label,
        labels,
        entrypoint: args.entrypoint.as_deref().map(|text| words("--entrypoint", text)).transpose()?,
        cmd: args.cmd.as_deref().map(|text| words("--cmd", text)).transpose()?,
        user: args.user,
        workdir: args.workdir,
        expose: args.expose,
        volumes: args.volume,
        stop_signal: args.stop_signal,
        healthcheck: args.healthcheck,
        squash,
    };
    if mutation.reads_stdin_twice() {
        return Err(Failure::usage("standard input can be one layer only"));
    }
    if mutation.is_empty() {
        return Err(Failure::usage("nothing to change").hint(format!(
            "`kiln tag {} {}` gives an image another name",
            args.image,
            args.tag[0].familiar()
        )));
    }
    let mutated = mutate(&session.engine, &image, &mutation, &args.tag, &session.cancel)?;
    told(&mutated)
}

/// Says what was squashed, and the new image's ID.
pub(super) fn told(mutated: &Mutated) -> Result<u8, Failure> {
    if let Some(count) = mutated.squashed {
        let layers = if count == 1 { "1 layer".to_owned() } else { format!("{count} layers") };
        let above = mutated.base.as_ref().map(|base| format!(" above {base}")).unwrap_or_default();
        say(&format!("{layers}{above} became one\n"));
    }
    print(&format!("{}\n", mutated.image.config))?;
    Ok(0)
}

/// A JSON list, one word, or none.
fn words(flag: &str, text: &str) -> Result<Vec<String>, Failure> {
    match text.trim_start().chars().next() {
        None => Ok(Vec::new()),
        Some('[') => serde_json::from_str(text)
            .map_err(|error| Failure::usage(format!("{flag} is no JSON list of words: {error}"))),
        Some(_) => Ok(vec![text.to_owned()]),
    }
}
