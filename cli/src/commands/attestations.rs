//! `kiln image attestations`

use std::io::{BufWriter, ErrorKind, Write};

use kiln_build::registry::{Place, Said, StoredAttestation, said_at, said_of};
use kiln_oci::Platform;
use kiln_oci::document::JsonText;
use serde_json::{Value, json};

use super::copy::End;
use super::inspect::attestation;
use super::{human_size, print, table};
use crate::args::images::{AttestationsArgs, StatementPart};
use crate::args::store::Format;
use crate::config::Config;
use crate::errors::Failure;
use crate::escape;
use crate::registries::{registries, tell_notes};
use crate::session::Session;

pub(crate) fn run(session: &Session, args: &AttestationsArgs) -> Result<u8, Failure> {
    let found = find(session, args)?;
    let all = found.as_ref().map_or(&[][..], |said| said.all.as_slice());
    let chosen = choose(args, all);
    match (args.show, args.format) {
        (Some(part), _) => {
            let (said, one) = (found.as_ref(), only(args, all, &chosen)?);
            let Some(statement) = said.map(|said| said.statement(one)).transpose()? else { return Ok(0) };
            let json = statement.json(part == StatementPart::Statement);
            json.map_or(Ok(()), write)?;
        }
        (None, Format::Json) => {
            let listed: Vec<Value> = chosen.into_iter().map(attestation).collect();
            print(&format!("{:#}\n", json!(listed)))?;
        }
        (None, Format::Table) if all.is_empty() => print(&format!("nothing is said of {}\n", args.image))?,
        (None, Format::Table) => print(&list(&chosen))?,
    }
    Ok(0)
}

/// `None`: no index stands beside the image.
fn find(session: &Session, args: &AttestationsArgs) -> Result<Option<Said>, Failure> {
    match End::parse(&args.image)? {
        End::Store(name) => Ok(said_of(&session.engine, &session.find(&name)?)?),
        End::Outside(Place::Docker(..)) => {
            Err(Failure::usage("a docker archive holds nothing that is said of its images"))
        }
        End::Outside(place) => {
            let registries = registries(&Config::read()?, &args.registries);
            let found = said_at(&session.engine, &registries, &place, &session.cancel);
            tell_notes(&registries);
            Ok(Some(found?))
        }
    }
}

/// Those that were asked for.
fn choose<'s>(args: &AttestationsArgs, all: &'s [StoredAttestation]) -> Vec<&'s StoredAttestation> {
    let is_asked =
        |said: &&StoredAttestation| args.kind.as_ref().is_none_or(|kind| is_kind(kind, &said.predicate_type));
    let mut chosen: Vec<&StoredAttestation> = all.iter().filter(is_asked).collect();
    let has_several = chosen.iter().any(|said| said.manifest != chosen[0].manifest);
    let own = (args.show.is_some() && has_several).then(Platform::host);
    let distance = |said: &StoredAttestation, wanted: &Platform| wanted.distance(said.platform.as_ref()?);
    if let Some(wanted) = args.platform.as_ref().or(own.as_ref()) {
        let nearest = chosen.iter().filter_map(|said| distance(said, wanted)).min();
        // Who has not asked for a platform is told that there are several.
        if nearest.is_some() || args.platform.is_some() {
            chosen.retain(|said| nearest.is_some() && distance(said, wanted) == nearest);
        }
    }
    chosen
}

/// Whether `predicate_type` is what users call `asked`.
fn is_kind(asked: &str, predicate_type: &str) -> bool {
    let begins: &[&str] = match asked {
        "provenance" => &["https://slsa.dev/provenance/"],
        "sbom" => &["https://spdx.dev/Document", "https://cyclonedx.org/bom"],
        _ => return asked == predicate_type,
    };
    begins.iter().any(|begin| predicate_type.starts_with(begin))
}

/// The one that is to be shown.
fn only<'s>(
    args: &AttestationsArgs,
    all: &[StoredAttestation],
    chosen: &[&'s StoredAttestation],
) -> Result<&'s StoredAttestation, Failure> {
    match chosen {
        [one] => Ok(*one),
        [] if all.is_empty() => Err(Failure::source(format!("nothing is said of {}", args.image))
            .hint("`kiln build --provenance --sbom` says something")),
        [] => Err(Failure::source(format!("nothing of that is said of {}", args.image))
            .hint(format!("there is:\n{}", list(&all.iter().collect::<Vec<_>>()).trim_end()))),
        several => {
            Err(Failure::usage(format!("{} statements are meant, and one can be shown", several.len()))
                .hint(format!("choose by `--type` and `--platform`:\n{}", list(several).trim_end())))
        }
    }
}

fn list(chosen: &[&StoredAttestation]) -> String {
    let row = |said: &&StoredAttestation| {
        let platform = said.platform.as_ref().map_or_else(|| "-".to_owned(), ToString::to_string);
        vec![
            escape::line(&platform, 40),
            escape::line(&said.predicate_type, 80),
            human_size(said.statement.size),
            said.statement.digest.to_string(),
        ]
    };
    let head = ["PLATFORM", "TYPE", "SIZE", "STATEMENT"].map(str::to_owned).to_vec();
    table(&[head].into_iter().chain(chosen.iter().map(row)).collect::<Vec<_>>())
}

/// Writes it to standard output; a reader that went away is no error.
fn write(json: JsonText<'_>) -> Result<(), Failure> {
    let mut out = BufWriter::with_capacity(64 << 10, std::io::stdout().lock());
    match json.write_pretty(&mut out).and_then(|()| out.flush()) {
        Err(error) if error.kind() != ErrorKind::BrokenPipe => Err(Failure::output(&error)),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kinds_have_the_names_that_options_of_builds_have() {
        for (asked, kind, expected) in [
            ("provenance", "https://slsa.dev/provenance/v1", true),
            ("provenance", "https://slsa.dev/provenance/v0.2", true),
            ("sbom", "https://spdx.dev/Document", true),
            ("sbom", "https://cyclonedx.org/bom/v1.4", true),
            ("sbom", "https://slsa.dev/provenance/v1", false),
            ("https://example/x", "https://example/x", true),
            ("https://example/", "https://example/x", false),
        ] {
            assert_eq!(is_kind(asked, kind), expected, "{asked} {kind}");
        }
    }
}
