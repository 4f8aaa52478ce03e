//! `kiln pull`

use kiln_build::registry::pull;
use kiln_oci::Platform;

use super::print;
use crate::args::registry::PullArgs;
use crate::config::Config;
use crate::errors::{Failure, say};
use crate::platforms::asked_one;
use crate::registries::{registries, tell_notes};
use crate::session::Session;

pub(crate) fn run(session: &Session, args: &PullArgs) -> Result<u8, Failure> {
    let registries = registries(&Config::read()?, &args.registries);
    let platform = asked_one(args.platform.as_ref())?.unwrap_or_else(Platform::host);
    let note = |line: &str| {
        if !args.quiet {
            say(&format!("{line}\n"));
        }
    };
    for name in &args.names {
        let pulled = pull(&session.engine, &registries, name, &platform, &session.cancel, &note)?;
        tell_notes(&registries);
        if args.quiet {
            print(&format!("{name}\n"))?;
            continue;
        }
        let what = if pulled.known { "Up to date" } else { "Pulled" };
        print(&format!(
            "{what}: {} (image {})\ndigest {}\n",
            name.familiar(),
            pulled.image.config,
            pulled.digest
        ))?;
    }
    Ok(0)
}
