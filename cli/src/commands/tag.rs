//! `kiln tag`

use crate::args::TagArgs;
use crate::errors::Failure;
use crate::session::Session;

pub(crate) fn run(session: &Session, args: &TagArgs) -> Result<u8, Failure> {
    let image = session.find(&args.source)?;
    session.engine.store.set_name(&args.target, &image)?;
    session.engine.store.barrier()?;
    Ok(0)
}
