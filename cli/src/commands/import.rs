//! `kiln import`

use kiln_build::{ImportRequest, import};

use super::print;
use crate::args::ImportArgs;
use crate::errors::Failure;
use crate::session::Session;

pub(crate) fn run(session: &Session, args: ImportArgs) -> Result<u8, Failure> {
    let request = ImportRequest { source: args.source, name: args.name, changes: args.change };
    let image = import(&session.engine, &request, &session.cancel)?;
    print(&format!("{}\n", image.config))?;
    Ok(0)
}
