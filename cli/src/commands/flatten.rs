//! `kiln flatten`

use kiln_build::toolkit::flatten;

use super::mutate::told;
use crate::args::toolkit::FlattenArgs;
use crate::errors::Failure;
use crate::session::Session;

pub(crate) fn run(session: &Session, args: &FlattenArgs) -> Result<u8, Failure> {
    let image = session.find(&args.image)?;
    told(&flatten(&session.engine, &image, &args.tag, &session.cancel)?)
}
