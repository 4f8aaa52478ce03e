//! `kiln update`

use kiln_containers::{Config, Container};
use kiln_executor::Resources;

use super::each;
use super::life::reload;
use crate::args::containers::UpdateArgs;
use crate::errors::{Failure, exit};
use crate::session::Session;

pub(super) fn run(session: &Session, args: &UpdateArgs) -> Result<u8, Failure> {
    if args.restart.is_none() && args.limits.is_empty() {
        return Err(Failure::usage("there is nothing to change; `kiln update --help` lists what can be"));
    }
    each(&args.containers, |name| change(&session.containers.find(name)?, args))
}

/// Changes the record first: a monitor reads what there is. What it refuses is put back.
fn change(container: &Container, args: &UpdateArgs) -> Result<(), Failure> {
    let _lock = container.lock()?;
    let before = container.config()?;
    let mut config = before.clone();
    if let Some(restart) = args.restart {
        if config.auto_remove {
            return Err(Failure::usage("a container that goes with its end (--rm) does not start again"));
        }
        config.restart = restart;
    }
    set_limits(&mut config, args)?;
    container.write_config(&config)?;
    reload(container).map_err(|failure| {
        let _ = container.write_config(&before);
        failure.with_code(exit::RUN)
    })
}

fn set_limits(config: &mut Config, args: &UpdateArgs) -> Result<(), Failure> {
    let known = config.process.resources.clone().unwrap_or_default();
    let changed = args.limits.over(&known)?;
    config.process.resources = (changed != Resources::default()).then_some(changed);
    Ok(())
}
