//! Programs of other processors: whether the kernel has an emulator for them (binfmt_misc(5)).
//!
//! Each file of the directory is a rule: bytes that a program begins with, and what is started for it. Which
//! processor a rule is for is in no field of its own; so a program of the platform is held against it.

use std::fs;
use std::os::fd::BorrowedFd;
use std::path::Path;

use kiln_oci::Platform;
use rustix::fs::{Mode, OFlags, ResolveFlags, openat2};
use rustix::io::Errno;

use super::program_file::header;
use crate::{ExecError, Foreign, Unfit};

/// Where the kernel shows its rules, when it is mounted.
const RULES: &str = "/proc/sys/fs/binfmt_misc";

/// What becomes of a program of another platform.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Emulation {
    /// An emulator is started.
    Ready,
    /// It is refused, because of this.
    Missing(String),
    /// The rules are not to be seen here: the kernel may have some all the same, as it has in containers.
    Unknown,
}

/// Whether an emulator starts programs of `platform` on the tree `root`, as far as one can tell before they are
/// started.
///
/// # Errors
/// [`Foreign`] when it is certain that none does.
pub fn check_emulator(platform: &Platform, root: BorrowedFd<'_>) -> Result<(), Box<Foreign>> {
    let is_there = |interpreter: &str| {
        let flags = OFlags::PATH | OFlags::CLOEXEC;
        openat2(root, interpreter, flags, Mode::empty(), ResolveFlags::IN_ROOT).is_ok()
    };
    match by_rules(Path::new(RULES), platform, &is_there) {
        Emulation::Ready | Emulation::Unknown => Ok(()),
        Emulation::Missing(reason) => {
            Err(Box::new(Foreign { platform: platform.clone(), image: Some(platform.clone()), reason }))
        }
    }
}

/// What it means that a program did not start, for who sees the kernel's rules, which its container does not.
/// `image`: what the image says that it is for.
pub(super) fn explain(error: ExecError, image: Option<&Platform>) -> ExecError {
    let ExecError::NotExecutable { program, why } = error else { return error };
    let (foreign, is_seen) = match why {
        Unfit::Foreign(foreign) => (foreign, true),
        // Nobody could read the program: what may be executed need not be readable, and another runtime tells no more.
        Unfit::Refused { errno } if errno == Errno::NOEXEC.raw_os_error() => {
            match image.filter(|image| !Platform::host().runs(image)) {
                Some(platform) => (not_started(platform.clone(), Errno::NOEXEC), false),
                None => return ExecError::NotExecutable { program, why },
            }
        }
        why => return ExecError::NotExecutable { program, why },
    };
    let reason = match by_rules(Path::new(RULES), &foreign.platform, &|_| false) {
        Emulation::Missing(reason) => reason,
        // Whatever it was, it was not the emulator.
        Emulation::Ready if !is_seen => {
            let errno = Errno::NOEXEC.raw_os_error();
            return ExecError::NotExecutable { program, why: Unfit::Refused { errno } };
        }
        Emulation::Ready => {
            "an emulator for them is registered, but it is not static, and the image lacks what it is linked with"
                .to_owned()
        }
        Emulation::Unknown => foreign.reason,
    };
    let foreign = Foreign { image: image.cloned(), reason, ..*foreign };
    ExecError::NotExecutable { program, why: Unfit::Foreign(Box::new(foreign)) }
}

/// A program that the kernel did not start, for one who does not see its rules.
pub(super) fn not_started(platform: Platform, errno: Errno) -> Box<Foreign> {
    let reason = match errno {
        // The program is there. So it is the emulator that is not.
        Errno::NOENT => {
            "the kernel's emulator for them was registered without the flag F, and the image does not have it"
        }
        _ => "the kernel has started no emulator for them",
    };
    Box::new(Foreign { platform, image: None, reason: reason.to_owned() })
}

fn by_rules(rules: &Path, platform: &Platform, is_in_tree: &dyn Fn(&str) -> bool) -> Emulation {
    let nothing = "no emulator for them is registered with the kernel";
    let Some(program) = program(platform) else {
        return Emulation::Missing(
            "they are no programs of Linux, or of no processor that can be emulated".to_owned(),
        );
    };
    let Ok(status) = fs::read_to_string(rules.join("status")) else { return Emulation::Unknown };
    if status.trim() != "enabled" {
        return Emulation::Missing("binfmt_misc is switched off".to_owned());
    }
    let mut why_not = nothing.to_owned();
    for file in fs::read_dir(rules).into_iter().flatten().flatten() {
        let Ok(text) = fs::read_to_string(file.path()) else { continue };
        let Some(rule) = Rule::parse(&text).filter(|rule| rule.fits(&program)) else { continue };
        if !rule.enabled {
            why_not = format!("the emulator {} is switched off", rule.interpreter);
        } else if rule.is_open || is_in_tree(&rule.interpreter) {
            return Emulation::Ready;
        } else {
            why_not = format!(
                "the emulator {} was registered without the flag F, and the image does not have it",
                rule.interpreter
            );
        }
    }
    Emulation::Missing(why_not)
}

/// A rule for the first bytes of programs.
struct Rule {
    enabled: bool,
    interpreter: String,
    /// Flag F: the kernel has the interpreter open since the rule was made.
    is_open: bool,
    offset: usize,
    magic: Vec<u8>,
    mask: Vec<u8>,
}

impl Rule {
    /// `None` for `register`, `status` and rules for the ends of file names.
    fn parse(text: &str) -> Option<Self> {
        let field = |name: &str| {
            text.lines().find_map(|line| line.strip_prefix(name).filter(|rest| rest.starts_with([' ', ':'])))
        };
        let word = |name: &str| field(name).map(|rest| rest.trim_start_matches(':').trim());
        let magic = bytes(word("magic")?)?;
        let mask = word("mask").map_or_else(|| Some(vec![0xff; magic.len()]), bytes)?;
        Some(Self {
            enabled: text.lines().next() == Some("enabled"),
            interpreter: word("interpreter")?.to_owned(),
            is_open: word("flags").is_some_and(|flags| flags.contains('F')),
            offset: word("offset")?.parse().ok()?,
            magic,
            mask,
        })
    }

    fn fits(&self, program: &Program) -> bool {
        let begins = |header: &[u8]| {
            self.magic.iter().zip(&self.mask).enumerate().all(|(at, (magic, mask))| {
                header.get(self.offset + at).is_some_and(|byte| (byte ^ magic) & mask == 0)
            })
        };
        program.headers.iter().any(|header| begins(header))
    }
}

fn bytes(hex: &str) -> Option<Vec<u8>> {
    let digits = hex.as_bytes();
    if digits.is_empty() || !digits.len().is_multiple_of(2) || !hex.is_ascii() {
        return None;
    }
    (0..digits.len()).step_by(2).map(|at| u8::from_str_radix(&hex[at..at + 2], 16).ok()).collect()
}

/// What programs of a platform begin with: linked to one place in memory, or to any.
struct Program {
    headers: [[u8; 64]; 2],
}

/// `None`: it has no programs that Linux starts.
fn program(platform: &Platform) -> Option<Program> {
    Some(Program { headers: [header(platform, 2)?, header(platform, 3)?] })
}

#[cfg(test)]
mod tests {
    use super::*;

    const ARM64: &str = "magic 7f454c460201010000000000000000000200b700\n\
                         mask ffffffffffffff00fffffffffffffffffeffffff\n";

    fn rules(files: &[(&str, &str)]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        for (name, text) in files {
            fs::write(dir.path().join(name), text).unwrap();
        }
        dir
    }

    fn found(files: &[(&str, &str)], platform: &str) -> Emulation {
        let dir = rules(files);
        let is_in_tree = |path: &str| path == "/usr/bin/in-tree";
        by_rules(dir.path(), &platform.parse().unwrap(), &is_in_tree)
    }

    #[track_caller]
    fn check_missing(files: &[(&str, &str)], platform: &str, says: &str) {
        let Emulation::Missing(why) = found(files, platform) else { panic!("it is not missing") };
        assert!(why.contains(says), "{why}");
    }

    #[test]
    fn a_rule_for_the_platforms_programs_makes_them_run() {
        let rule = |interpreter: &str, flags: &str| {
            format!("enabled\ninterpreter {interpreter}\nflags: {flags}\noffset 0\n{ARM64}")
        };
        let status = ("status", "enabled\n");
        let open = rule("/usr/bin/qemu", "POCF");
        assert_eq!(found(&[status, ("any-name", &open)], "linux/arm64"), Emulation::Ready);
        assert_eq!(found(&[status, ("x", &rule("/usr/bin/in-tree", ""))], "linux/arm64"), Emulation::Ready);
        let closed = rule("/usr/bin/qemu", "OC");
        check_missing(&[status, ("x", &closed)], "linux/arm64", "/usr/bin/qemu was registered without");
        check_missing(&[status, ("x", &open)], "linux/riscv64", "no emulator");
        let off = open.replace("enabled", "disabled");
        check_missing(&[status, ("x", &off)], "linux/arm64", "/usr/bin/qemu is switched off");
        check_missing(
            &[("status", "disabled\n"), ("x", &open)],
            "linux/arm64",
            "binfmt_misc is switched off",
        );
    }

    #[test]
    fn without_the_list_of_rules_nobody_knows() {
        assert_eq!(found(&[], "linux/arm64"), Emulation::Unknown);
        check_missing(&[], "darwin/arm64", "no programs of Linux");
        check_missing(&[], "linux/wasm", "no programs of Linux");
    }

    #[test]
    fn rules_for_names_and_broken_ones_are_for_no_platform() {
        let status = ("status", "enabled\n");
        let extension = "enabled\ninterpreter /usr/bin/java\nflags: F\nextension .jar\n";
        let odd = "enabled\ninterpreter /x\nflags: F\noffset 0\nmagic 7f4\n";
        let far = "enabled\ninterpreter /x\nflags: F\noffset 4000000000\nmagic 7f\n";
        check_missing(&[status, ("a", extension), ("b", odd), ("c", far)], "linux/arm64", "no emulator");
        // Without a mask every bit counts: this one is for programs that are linked to one place.
        let exact =
            "enabled\ninterpreter /x\nflags: F\noffset 0\nmagic 7f454c46020101000000000000000000020016\n";
        check_missing(&[status, ("a", exact)], "linux/s390x", "no emulator");
        let exact = exact.replace("020101000000000000000000020016", "0202010000000000000000000002");
        assert_eq!(found(&[status, ("a", &exact)], "linux/s390x"), Emulation::Ready);
    }
}
