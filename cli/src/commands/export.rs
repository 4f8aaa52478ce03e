//! `kiln export`

use kiln_build::export::{Dest, export_tree};

use super::save::write_to;
use crate::args::images::ExportArgs;
use crate::errors::Failure;
use crate::session::Session;

pub(crate) fn run(session: &Session, args: &ExportArgs) -> Result<u8, Failure> {
    let image = session.find(&args.image)?;
    let dest = args.output.as_deref().map(|path| Dest::parse(&path.to_string_lossy()));
    write_to(dest, args.output.as_deref(), "a file system", &mut |path, out| {
        export_tree(&session.engine, &image, path, out, &session.cancel)
    })
}
