//! `kiln load`

use std::path::PathBuf;

use kiln_build::load;

use super::print;
use crate::args::images::LoadArgs;
use crate::errors::Failure;
use crate::session::Session;

pub(crate) fn run(session: &Session, args: &LoadArgs) -> Result<u8, Failure> {
    let path = args.input.clone().unwrap_or_else(|| PathBuf::from("-"));
    for loaded in load(&session.engine, &path, args.platform.as_ref(), &session.cancel)? {
        if args.quiet {
            continue;
        }
        for name in &loaded.names {
            print(&format!("Loaded image: {}\n", name.familiar()))?;
        }
        if loaded.names.is_empty() {
            print(&format!("Loaded image ID: {}\n", loaded.image.config))?;
        }
    }
    Ok(0)
}
