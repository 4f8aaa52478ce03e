//! `kiln search`

use kiln_registry::Found;

use super::print;
use crate::args::registry::SearchArgs;
use crate::config::Config;
use crate::errors::Failure;
use crate::registries::registries;
use crate::session::Session;

/// Descriptions are cut here; the terminal has other columns, too.
const WIDEST: usize = 60;

pub(crate) fn run(session: &Session, args: &SearchArgs) -> Result<u8, Failure> {
    // As in references: what could be a host is one.
    let (domain, term) = match args.term.split_once('/') {
        Some((host, term)) if host.contains(['.', ':']) || host == "localhost" => (host, term),
        _ => ("docker.io", args.term.as_str()),
    };
    let registries = registries(&Config::read()?, &args.registries);
    let found = registries.wait(&session.cancel, registries.client().search(domain, term, args.limit))?;
    let shown = |found: &Found| match domain {
        "docker.io" => found.name.clone(),
        domain => format!("{domain}/{}", found.name),
    };
    if args.quiet {
        return print(&found.iter().map(|found| shown(found) + "\n").collect::<String>()).map(|()| 0);
    }
    let width = found.iter().map(|found| shown(found).len()).max().unwrap_or(0).max("NAME".len());
    let mut text = format!("{:width$}  {:>6}  {:8}  DESCRIPTION\n", "NAME", "STARS", "OFFICIAL");
    for found in &found {
        let official = if found.official { "yes" } else { "" };
        let about: String = found.description.chars().take(WIDEST).collect();
        let line = format!("{:width$}  {:>6}  {official:8}  {about}", shown(found), found.stars);
        text.push_str(line.trim_end());
        text.push('\n');
    }
    print(&text)?;
    Ok(0)
}
