//! `kiln prune`

use std::io::{self, BufRead, Write};

use kiln_build::gc::{Policy, Verdict, collect};

use super::gc::{forget_pushed, name};
use super::{human_size, print};
use crate::args::store::PruneArgs;
use crate::errors::Failure;
use crate::session::Session;

pub(crate) fn run(session: &Session, args: &PruneArgs) -> Result<u8, Failure> {
    if !args.force && !ask(args.all)? {
        print("nothing was removed\n")?;
        return Ok(0);
    }
    let pushed_bytes = forget_pushed(session);
    let collected = collect(&session.engine, &Policy::prune(args.all), false, &session.cancel)?;
    for object in collected.objects.iter().filter(|object| object.verdict == Verdict::Remove) {
        print(&format!("removed {} {}\n", object.kind.name(), name(object)))?;
    }
    print(&format!("Total reclaimed space: {}\n", human_size(collected.removed_bytes + pushed_bytes)))?;
    Ok(0)
}

fn ask(all: bool) -> Result<bool, Failure> {
    let mut out = io::stdout();
    let images = if all { "all images that no container uses" } else { "all images without a name" };
    let cache = if all { "all of the build cache" } else { "the build cache that no image needs" };
    let question = format!(
        "WARNING! This will remove:\n  - {images}\n  - {cache}, cache mounts included\n\nAre you sure you want to continue? [y/N] "
    );
    let _ = out.write_all(question.as_bytes()).and_then(|()| out.flush());
    let mut answer = String::new();
    match io::stdin().lock().read_line(&mut answer) {
        Ok(0) | Err(_) => {
            Err(Failure::usage("nobody answers on standard input; use --force not to be asked"))
        }
        Ok(_) => Ok(matches!(answer.trim().to_ascii_lowercase().as_str(), "y" | "yes")),
    }
}
