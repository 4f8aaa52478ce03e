//! How much memory a container's processes have together, where no control group counts it.
//!
//! A group made for that alone would cost each container more than all the rest of its start (`cgroup.rs`), and counts
//! what the kernel keeps of files beside what processes need. So the helper, which waits anyway, wakes up now and then
//! and adds up what `/proc` says. Decided in `docs/adr/0042-memory-of-a-step-is-looked-at.md`.

use std::fs;
use std::time::{Duration, Instant};

use rustix::process::Pid;

/// From one look to the next at least. What ends before the first costs nothing.
const PERIOD: Duration = Duration::from_millis(100);
/// Looking takes no more than this part of the time.
const PART: u32 = 100;
/// More processes are not looked at.
const MAX_PROCESSES: usize = 10_000;

/// Looks at a container, and the most that was seen.
pub(super) struct Looks {
    /// The container's process 1, as this process's namespace numbers it.
    process: i32,
    next: Instant,
    peak_bytes: u64,
}

impl Looks {
    pub(super) fn at(process: Pid) -> Self {
        Self { process: process.as_raw_nonzero().get(), next: Instant::now() + PERIOD, peak_bytes: 0 }
    }

    /// How long until the next look.
    pub(super) fn wait(&self) -> Duration {
        self.next.saturating_duration_since(Instant::now())
    }

    /// Looks, if it is time.
    pub(super) fn look_if_due(&mut self) {
        let begun = Instant::now();
        if begun < self.next {
            return;
        }
        self.peak_bytes = self.peak_bytes.max(together_bytes(self.process));
        let now = Instant::now();
        self.next = now + PERIOD.max((now - begun) * PART);
    }

    /// The most that was seen; 0: it was over too soon, or `/proc` does not say.
    pub(super) fn peak_bytes(&self) -> u64 {
        self.peak_bytes
    }
}

/// The memory of a process and all that it has started, as far as that is theirs alone: neither files nor what they
/// share on purpose. What a fork has not written to yet counts twice.
///
/// Whoever comes and goes meanwhile may be missed.
fn together_bytes(process: i32) -> u64 {
    let mut found = vec![process];
    let (mut at, mut pages) = (0, 0_u64);
    while let Some(process) = found.get(at).copied() {
        at += 1;
        pages = pages.saturating_add(own_pages(process).unwrap_or(0));
        if found.len() < MAX_PROCESSES {
            add_children(process, &mut found);
        }
    }
    pages.saturating_mul(rustix::param::page_size() as u64)
}

/// proc_pid_statm(5): size, resident, of that shared.
fn own_pages(process: i32) -> Option<u64> {
    let text = fs::read_to_string(format!("/proc/{process}/statm")).ok()?;
    let mut numbers = text.split(' ').skip(1).map_while(|word| word.trim().parse::<u64>().ok());
    let (resident, shared) = (numbers.next()?, numbers.next()?);
    Some(resident.saturating_sub(shared))
}

/// proc_tid_children(5): each thread has its own. An orphan is a child of process 1.
fn add_children(process: i32, found: &mut Vec<i32>) {
    let threads = fs::read_dir(format!("/proc/{process}/task")).into_iter().flatten().flatten();
    for thread in threads {
        let text = fs::read_to_string(thread.path().join("children")).unwrap_or_default();
        found.extend(text.split_whitespace().filter_map(|child| child.parse::<i32>().ok()));
    }
}

#[cfg(test)]
mod tests {
    use std::process::{Child, Command, Stdio};

    use super::*;

    /// A shell with two processes below it, the lower one's memory being so large.
    fn family(mib: usize) -> Child {
        let script =
            format!("sh -c 'dd if=/dev/zero bs={mib}M count=1 2>/dev/null | (echo; sleep 60)'; true");
        let mut command = Command::new("sh");
        command.args(["-c", &script]).stdin(Stdio::null()).stdout(Stdio::piped());
        command.spawn().expect("there is a shell")
    }

    fn pid(child: &Child) -> Pid {
        Pid::from_child(child)
    }

    #[test]
    fn what_processes_have_is_added_up() {
        let mut family = family(32);
        let own = i32::try_from(std::process::id()).unwrap();
        // The memory is filled a moment after the process has begun.
        let begun = Instant::now();
        let mut looks = Looks::at(pid(&family));
        looks.look_if_due();
        assert_eq!(looks.peak_bytes(), 0, "it is not time yet");
        while looks.peak_bytes() < 32 << 20 {
            assert!(begun.elapsed() < Duration::from_secs(30), "{} bytes", looks.peak_bytes());
            std::thread::sleep(looks.wait());
            looks.look_if_due();
        }
        assert!(looks.peak_bytes() < 64 << 20, "{} bytes", looks.peak_bytes());
        let (all, alone) = (together_bytes(own), own_pages(own).unwrap() * rustix::param::page_size() as u64);
        assert!(all >= alone + (32 << 20), "{all} with children, {alone} without");
        // Its children go with it: they are asked first who they are.
        let mut below = vec![looks.process];
        let mut at = 0;
        while let Some(process) = below.get(at).copied() {
            add_children(process, &mut below);
            at += 1;
        }
        assert!(below.len() >= 4, "{below:?}");
        for process in &below[1..] {
            let _ = rustix::process::kill_process(
                Pid::from_raw(*process).expect("no process is 0"),
                rustix::process::Signal::KILL,
            );
        }
        family.wait().unwrap();
    }

    #[test]
    fn what_is_gone_has_nothing() {
        assert_eq!((together_bytes(i32::MAX), own_pages(i32::MAX)), (0, None));
    }

    #[test]
    fn whoever_takes_long_to_look_at_is_looked_at_less_often() {
        let begun = Instant::now();
        let mut looks = Looks { process: i32::MAX, next: begun, peak_bytes: 7 };
        looks.look_if_due();
        assert!(looks.next >= begun + PERIOD, "{:?}", looks.next - begun);
        assert_eq!(looks.peak_bytes(), 7);
    }
}
