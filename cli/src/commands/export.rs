//! `kiln export`

use kiln_build::container::export_files;
use kiln_build::export::{Dest, export_tree};

use super::save::write_to;
use crate::args::images::ExportArgs;
use crate::errors::Failure;
use crate::session::Session;

pub(crate) fn run(session: &Session, args: &ExportArgs) -> Result<u8, Failure> {
    let dest = args.output.as_deref().map(|path| Dest::parse(&path.to_string_lossy()));
    if let Ok(container) = session.containers.find(&args.image) {
        let key = container.id().key();
        return write_to(session, dest, args.output.as_deref(), "a file system", &mut |target| {
            export_files(&session.engine, &key, target.path, target.out, &session.cancel)
        });
    }
    let image = session.find(&args.image)?;
    write_to(session, dest, args.output.as_deref(), "a file system", &mut |target| {
        export_tree(&session.engine, &image, target.path, target.out, &session.cancel)
    })
}
