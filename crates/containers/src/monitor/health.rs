//! Health checks.

use std::thread;
use std::time::{Duration, Instant};

use kiln_executor::{Cancel, ExecError, Exit, Stdio, Stream};

use super::{Event, Monitor};
use crate::Time;
use crate::config::HealthCheck;
use crate::state::{Health, HealthResult, State, Status};

/// So much of what a check prints is kept.
const OUTPUT_BYTES: usize = 4096;
/// So many results are kept.
const RESULTS: usize = 5;

/// Where the checking stands.
pub(super) struct Checking {
    enabled: bool,
    /// When the next check begins.
    pub(super) next: Option<Instant>,
    /// When the one under way has taken too long.
    until: Option<Instant>,
    cancel: Option<Cancel>,
    /// It has been told to end, whatever it says of itself then.
    late: bool,
    began: Instant,
    began_at: Time,
    /// When failures begin to count.
    grace_until: Instant,
}

impl Checking {
    pub(super) fn new(check: Option<&HealthCheck>) -> Self {
        let now = Instant::now();
        Self {
            enabled: check.is_some(),
            next: None,
            until: None,
            cancel: None,
            late: false,
            began: now,
            began_at: Time::NEVER,
            grace_until: now,
        }
    }

    /// No check is under way.
    pub(super) fn is_idle(&self) -> bool {
        self.cancel.is_none()
    }

    pub(super) fn deadline(&self) -> Option<Instant> {
        [self.next, self.until].into_iter().flatten().min()
    }

    /// A run has begun.
    pub(super) fn begin(&mut self, state: &mut State) {
        if self.enabled {
            state.health = Some(Health { status: "starting".to_owned(), failing: 0, log: Vec::new() });
            // `check_health` sets the real time.
            (self.began, self.next) = (Instant::now(), None);
            self.until = None;
            self.cancel = None;
            self.grace_until = self.began;
        }
    }
}

impl Monitor {
    /// Begins what is due, and ends what takes too long.
    pub(super) fn check_health(&mut self, now: Instant) {
        let Some(check) = self.config.health.clone() else { return };
        if self.checking.until.is_some_and(|until| until <= now) {
            (self.checking.until, self.checking.late) = (None, true);
            if let Some(cancel) = &self.checking.cancel {
                cancel.cancel();
            }
        }
        if self.state.status != Status::Running || self.checking.cancel.is_some() {
            return;
        }
        match self.checking.next {
            None if self.state.pid != 0 => {
                self.checking.grace_until = self.checking.began + check.start_period;
                self.checking.next = Some(now + self.interval(&check, now));
            }
            Some(next) if next <= now => self.begin_check(&check, now),
            _ => {}
        }
    }

    fn interval(&self, check: &HealthCheck, now: Instant) -> Duration {
        let starting = self.state.health.as_ref().is_some_and(|health| health.status == "starting");
        if starting && now < self.checking.grace_until { check.start_interval } else { check.interval }
    }

    fn begin_check(&mut self, check: &HealthCheck, now: Instant) {
        let Ok(process) = self.process_fd() else { return };
        let Ok(container) = rustix::io::fcntl_dupfd_cloexec(process, 3) else { return };
        let Ok(cancel) = Cancel::new() else { return };
        let mut spec = self.config.process.clone();
        spec.args.clone_from(&check.args);
        let (linux, reporter, stop) = (self.tools.linux.clone(), self.reporter.clone(), cancel.clone());
        let work = move || {
            let mut output = Vec::new();
            let mut collect = |_: Stream, bytes: &[u8]| {
                let room = OUTPUT_BYTES.saturating_sub(output.len());
                output.extend_from_slice(&bytes[..bytes.len().min(room)]);
            };
            let result = linux.join(container, &spec, Stdio::Captured(&mut collect), &stop);
            drop(linux);
            reporter.report(Event::Checked(result, output));
        };
        if thread::Builder::new().name("health".to_owned()).spawn(work).is_ok() {
            (self.checking.cancel, self.checking.until) = (Some(cancel), Some(now + check.timeout));
            self.checking.began_at = Time::now();
        }
        self.checking.next = None;
    }

    pub(super) fn has_checked(&mut self, result: &Result<Exit, ExecError>, output: &[u8]) {
        (self.checking.cancel, self.checking.until) = (None, None);
        let late = std::mem::take(&mut self.checking.late);
        let (Some(check), Some(health)) = (self.config.health.clone(), &mut self.state.health) else {
            return;
        };
        if !matches!(self.state.status, Status::Running | Status::Paused) {
            return;
        }
        let now = Instant::now();
        let mut text = String::from_utf8_lossy(output).into_owned();
        let code = match result {
            _ if late => {
                text = format!("Health check exceeded timeout ({:?})", check.timeout);
                -1
            }
            Ok(exit) => exit.shell_code(),
            Err(error) => {
                text = error.to_string();
                1
            }
        };
        judge(health, code, check.retries, now < self.checking.grace_until);
        let result =
            HealthResult { start: self.checking.began_at, end: Time::now(), exit_code: code, output: text };
        health.log.push(result);
        let excess = health.log.len().saturating_sub(RESULTS);
        health.log.drain(..excess);
        let interval = self.interval(&check, now);
        self.checking.next = Some(now + interval);
        self.note();
    }
}

/// What a result makes of a container's health; in the `grace` of its start failures do not count.
fn judge(health: &mut Health, code: i32, retries: u32, grace: bool) {
    if code == 0 {
        health.failing = 0;
        "healthy".clone_into(&mut health.status);
        return;
    }
    if grace && health.status == "starting" {
        return;
    }
    health.failing += 1;
    if health.failing >= retries.max(1) {
        "unhealthy".clone_into(&mut health.status);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn so_many_failures_in_a_row_make_it_unhealthy() {
        let mut health = Health { status: "starting".to_owned(), failing: 0, log: Vec::new() };
        let mut after = |code, grace| {
            judge(&mut health, code, 2, grace);
            health.status.clone()
        };
        assert_eq!(after(1, true), "starting");
        assert_eq!(after(1, true), "starting");
        assert_eq!(after(1, false), "starting");
        assert_eq!(after(0, false), "healthy");
        assert_eq!(after(1, false), "healthy");
        assert_eq!(after(1, false), "unhealthy");
        assert_eq!(after(0, false), "healthy");
    }
}
