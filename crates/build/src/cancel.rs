//! One way to stop a build, whatever it is doing.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use kiln_executor::{Cancel, ExecError};

/// Stops a build: file work looks at the flag, processes are killed through the executor's event.
#[derive(Clone)]
pub struct BuildCancel {
    flag: Arc<AtomicBool>,
    processes: Cancel,
}

impl BuildCancel {
    /// A build nobody stopped yet.
    ///
    /// # Errors
    /// When the kernel gives no event descriptor.
    pub fn new() -> Result<Self, ExecError> {
        Ok(Self { flag: Arc::default(), processes: Cancel::new()? })
    }

    /// Set once it was stopped; what looks at it ends soon.
    pub fn flag(&self) -> &AtomicBool {
        &self.flag
    }

    /// The event that kills processes; for a container outside a build.
    pub fn processes(&self) -> &Cancel {
        &self.processes
    }
}

impl kiln_solver::Cancellation for BuildCancel {
    fn cancel(&self) {
        self.flag.store(true, Ordering::SeqCst);
        self.processes.cancel();
    }

    fn is_cancelled(&self) -> bool {
        self.flag.load(Ordering::SeqCst)
    }
}
