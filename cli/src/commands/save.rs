//! `kiln save`

use std::io::{self, IsTerminal};
use std::path::Path;

use kiln_build::BuildError;
use kiln_build::export::{Dest, NewFile, SaveOptions, SavedImage, Target, save};
use kiln_build::streams::OutStream;
use kiln_oci::Reference;

use crate::args::images::SaveArgs;
use crate::errors::Failure;
use crate::session::Session;

pub(crate) fn run(session: &Session, args: &SaveArgs) -> Result<u8, Failure> {
    let compress = args.compression.compress(args.format.packing());
    let compress = compress.map_err(|error| Failure::usage(error.to_string()))?;
    let mut images: Vec<SavedImage> = Vec::new();
    for name in &args.names {
        let image = session.find(name)?;
        let reference = name.parse::<Reference>().ok();
        let name = match reference {
            Some(reference) if session.engine.store.resolve(&reference)?.is_some() => Some(reference),
            _ => None,
        };
        match images.iter_mut().find(|known| known.image.config == image.config) {
            Some(known) => known.names.extend(name),
            None => images.push(SavedImage { image, names: name.into_iter().collect() }),
        }
    }
    let options = SaveOptions { format: args.format.archive(), compress, alone: false };
    let dest = args.output.as_deref().map(|path| Dest::parse(&path.to_string_lossy()));
    let path = args.output.as_deref();
    write_to(session, dest, path, "an archive", &mut |target| {
        save(&session.engine, &images, &options, target, &session.cancel).map(drop)
    })
}

/// Lets `write` write to the file that `-o` names, or to standard output when that is no terminal. A
/// file gets its name when it is whole.
pub(super) fn write_to(
    session: &Session,
    dest: Option<Dest>,
    path: Option<&Path>,
    what: &str,
    write: &mut dyn FnMut(&mut Target<'_>) -> Result<(), BuildError>,
) -> Result<u8, Failure> {
    match (dest, path) {
        (Some(Dest::Path(_)), Some(path)) => {
            let new = NewFile::create(path)?;
            new.write_by(write)?;
            new.finish()?;
        }
        (None, _) if io::stdout().is_terminal() => {
            return Err(Failure::usage(format!("{what} does not go to a terminal; name a file with -o")));
        }
        _ => {
            let failed = |error| Failure::output(&error);
            OutStream::written(&session.cancel, failed, |out| {
                Ok(write(&mut Target { path: Path::new("standard output"), out, file: None })?)
            })?;
        }
    }
    Ok(0)
}
