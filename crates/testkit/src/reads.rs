//! A program that reads a file which somebody changes meanwhile.

use std::path::{Path, PathBuf};
use std::process::Command;

use libc::c_long;
use nix::unistd::Pid;

use crate::faults::{SystemCall, TraceError, Traced, Watch, file_of, observe};

struct Reads<F> {
    file: PathBuf,
    then: F,
}

impl<F: FnMut()> Watch for Reads<F> {
    fn wants(&self, number: c_long) -> bool {
        [libc::SYS_read, libc::SYS_pread64].contains(&number)
    }

    fn enters(&mut self, _: Pid, _: &SystemCall) {}

    fn leaves(&mut self, thread: Pid, call: &SystemCall, _: i64) {
        if file_of(thread, call.args[0]).is_some_and(|file| file == self.file) {
            (self.then)();
        }
    }
}

/// Runs `command` to its end, and does `then` after each of its reads from `file`: before it knows what it has
/// read, however busy the machine is.
///
/// # Errors
/// [`TraceError`]; also when there is no such file.
pub fn after_each_read(command: &Command, file: &Path, then: impl FnMut()) -> Result<Traced, TraceError> {
    let file = file.canonicalize()?;
    observe(command, &mut Reads { file, then })
}
