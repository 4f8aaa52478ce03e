//! `kiln push`

use kiln_build::export::Packing;
use kiln_build::registry::{PushRequest, PushedName, push};

use super::{human_size, print};
use crate::args::registry::PushArgs;
use crate::config::Config;
use crate::errors::Failure;
use crate::registries::registries;
use crate::session::Session;

pub(crate) fn run(session: &Session, args: &PushArgs) -> Result<u8, Failure> {
    let compress = args.compression.compress(Packing::GZIP);
    let compress = compress.map_err(|error| Failure::usage(error.to_string()))?;
    let registries = registries(&Config::read()?, &args.registries);
    for name in &args.names {
        let found = session.engine.store.resolve(name)?;
        let image = found.ok_or_else(|| Failure::no_image(&name.familiar()))?;
        let request = PushRequest { image, names: vec![name.clone()], compress, alone: false };
        for pushed in push(&session.engine, &registries, &request, &session.cancel)? {
            let text = if args.quiet { format!("{}\n", pushed.digest) } else { told(&pushed) };
            print(&text)?;
        }
    }
    Ok(0)
}

/// What a push has done, and the digest.
pub(super) fn told(pushed: &PushedName) -> String {
    format!("{}digest {}\n", line(pushed), pushed.digest)
}

/// What a push has done, a line.
pub(super) fn line(pushed: &PushedName) -> String {
    let PushedName { name, sent: (blobs, bytes), mounted, .. } = pushed;
    let mounted = if *mounted > 0 { format!(", {mounted} mounted") } else { String::new() };
    let sent = match blobs {
        0 => "nothing to send".to_owned(),
        1 => format!("1 blob sent, {}", human_size(*bytes)),
        blobs => format!("{blobs} blobs sent, {}", human_size(*bytes)),
    };
    format!("pushed {} ({sent}{mounted})\n", name.familiar())
}
