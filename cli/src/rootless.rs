//! What is different for a user: who he is in his namespace, and where his things are.

use std::os::unix::fs::MetadataExt;
use std::path::Path;

use kiln_executor::{ExecError, Ids, UserNetwork};

use crate::errors::{Failure, say};
use crate::session::root_of;

/// Makes this process root of a namespace, unless it is root: of its own, or of that which the running
/// containers of the store at `root` are in. Before the first thread.
pub(crate) fn enter(root: Option<&Path>) -> Result<(), Failure> {
    if !rustix::process::geteuid().is_root()
        && let Ok(root) = root_of(root.map(Path::to_owned))
    {
        // Here one still sees whose links lead there.
        kiln_content::check_place(&root)?;
        let monitor = kiln_containers::monitor_process(&root);
        if monitor.is_some_and(|monitor| kiln_executor::join_root(monitor).is_ok()) {
            return Ok(());
        }
    }
    enter_own()
}

/// Makes this process root of its own namespace, unless it is root. Before the first thread.
pub(crate) fn enter_own() -> Result<(), Failure> {
    let fell_short = kiln_executor::become_root().map_err(|error| {
        let ExecError::Start { step, source } = &error else { return Failure::from(error) };
        Failure::store(format!("a user cannot have a namespace of his own here ({step}: {source})"))
            .hint("`kiln doctor` shows what is in the way and how to lift it")
    })?;
    if fell_short {
        say(
            "warning: newuidmap or newgidmap gave no range of ids: files of other owners in the store may be \
             out of reach; `kiln doctor` tells more\n",
        );
    }
    Ok(())
}

/// Whether the system's directories are this process's: it is root, and not only of a namespace that a
/// user made, whose root finds `/var/lib` to be nobody's.
pub(crate) fn owns_system() -> bool {
    rustix::process::geteuid().is_root()
        && (kiln_executor::ids() == Ids::Host
            || std::fs::metadata("/var/lib").is_ok_and(|stat| stat.uid() == 0))
}

/// Says that processes which want a network of their own will have none, if that is so.
pub(crate) fn warn_of_network(wanted: bool) {
    if wanted
        && kiln_executor::ids() != Ids::Host
        && let Err(reason) = UserNetwork::find()
    {
        say(&format!(
            "warning: processes have no network but loopback: {reason}; or give them the host's with \
             --network host\n"
        ));
    }
}
