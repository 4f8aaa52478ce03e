//! Files that the kernel was asked to execute: what they are for, and why it did not (elf(5), execve(2)).
//!
//! They are an image's, and hostile: what is read of one is bounded, and stands in messages only.

use std::fs::File;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

use kiln_oci::Platform;
use rustix::io::Errno;

use super::emulator::not_started;
use crate::{NoProgram, Unfit};

/// As much as is read of the beginning. The kernel reads 256 bytes of a script.
const HEAD_BYTES: usize = 1024;
const SCRIPT_BYTES: usize = 256;
/// An interpreter may be a script itself; the kernel follows as many.
const MAX_SCRIPTS: usize = 5;
/// Parts of a program that are looked at for its loader, and the longest name of one.
const MAX_PARTS: u64 = 64;
const MAX_NAME_BYTES: u64 = 4096;
/// Characters of a name in a message.
const SHOWN_CHARS: usize = 256;

const NARROW: u8 = 1;
const WIDE: u8 = 2;
const LITTLE: u8 = 1;
const BIG: u8 = 2;

/// Processors, with what the programs of each have in their headers: width, order of bytes, number.
const MACHINES: [(&str, u8, u8, u16); 15] = [
    ("386", NARROW, LITTLE, 3),
    ("amd64", WIDE, LITTLE, 62),
    ("arm", NARROW, LITTLE, 40),
    ("arm64", WIDE, LITTLE, 183),
    ("loong64", WIDE, LITTLE, 258),
    ("mips", NARROW, BIG, 8),
    ("mipsle", NARROW, LITTLE, 8),
    ("mips64", WIDE, BIG, 8),
    ("mips64le", WIDE, LITTLE, 8),
    ("ppc", NARROW, BIG, 20),
    ("ppc64", WIDE, BIG, 21),
    ("ppc64le", WIDE, LITTLE, 21),
    ("riscv64", WIDE, LITTLE, 243),
    ("s390x", WIDE, BIG, 22),
    ("sparc64", WIDE, BIG, 43),
];

/// What a program of `platform` begins with, if it is of this kind: 2 is linked to one place in memory, 3 to any.
/// `None`: the platform has no programs that Linux starts.
pub(super) fn header(platform: &Platform, kind: u16) -> Option<[u8; 64]> {
    let named = |(architecture, ..): &&(&str, u8, u8, u16)| *architecture == platform.architecture;
    let &(_, class, order, machine) = MACHINES.iter().find(named).filter(|_| platform.os == "linux")?;
    let mut header = [0; 64];
    header[..7].copy_from_slice(&[0x7f, b'E', b'L', b'F', class, order, 1]);
    for (at, number) in [(16, kind), (18, machine), (20, 1)] {
        let bytes = if order == BIG { number.to_be_bytes() } else { number.to_le_bytes() };
        header[at..at + 2].copy_from_slice(&bytes);
    }
    Some(header)
}

/// Why the kernel did not start the file at `path`, in the tree of this process.
pub(super) fn why_not(path: &Path, errno: Errno) -> Unfit {
    look(path, errno, 0).unwrap_or(Unfit::Refused { errno: errno.raw_os_error() })
}

fn look(path: &Path, errno: Errno, scripts: usize) -> Option<Unfit> {
    if !matches!(errno, Errno::NOEXEC | Errno::NOENT) {
        return None;
    }
    let program = Program::open(path)?;
    let file = shown(&path.to_string_lossy());
    if let Some(interpreter) = program.interpreter() {
        let next = Path::new(&interpreter);
        return match rustix::fs::access(next, rustix::fs::Access::EXISTS) {
            Ok(()) if scripts < MAX_SCRIPTS => look(next, errno, scripts + 1),
            Ok(()) => None,
            Err(_) => Some(Unfit::NoInterpreter { file, interpreter: shown(&interpreter), script: true }),
        };
    }
    match (program.platform(), errno) {
        (Some(platform), _) if !Platform::host().runs(&platform) => {
            Some(Unfit::Foreign(not_started(platform, errno)))
        }
        (Some(_), Errno::NOENT) => {
            let interpreter = program.loader()?;
            let is_there = rustix::fs::access(Path::new(&interpreter), rustix::fs::Access::EXISTS).is_ok();
            let interpreter = shown(&interpreter);
            (!is_there).then_some(Unfit::NoInterpreter { file, interpreter, script: false })
        }
        (None, Errno::NOEXEC) => program.problem().map(|problem| Unfit::NoProgram { file, problem }),
        _ => None,
    }
}

/// As much of a name as a message needs: it goes through a socket that holds no more than some of them.
fn shown(name: &str) -> String {
    match name.char_indices().nth(SHOWN_CHARS) {
        Some((end, _)) => format!("{}...", &name[..end]),
        None => name.to_owned(),
    }
}

/// A file with its first bytes.
struct Program {
    file: File,
    head: Vec<u8>,
}

impl Program {
    /// `None`: it is no file, or this process may not read it.
    fn open(path: &Path) -> Option<Self> {
        let flags = libc::O_NONBLOCK | libc::O_NOCTTY | libc::O_CLOEXEC;
        let file = File::options().read(true).custom_flags(flags).open(path).ok()?;
        file.metadata().ok().filter(std::fs::Metadata::is_file)?;
        let mut head = vec![0; HEAD_BYTES];
        let mut length = 0;
        while length < head.len() {
            match file.read_at(&mut head[length..], length as u64).ok()? {
                0 => break,
                count => length += count,
            }
        }
        head.truncate(length);
        Some(Self { file, head })
    }

    /// What the first line names, if it is that of a script.
    fn interpreter(&self) -> Option<String> {
        let head = &self.head[..self.head.len().min(SCRIPT_BYTES)];
        let ends = head.contains(&b'\n') || head.len() < SCRIPT_BYTES;
        let line = head.strip_prefix(b"#!")?.split(|&byte| byte == b'\n').next()?;
        let blank = |byte: &u8| matches!(byte, b' ' | b'\t' | 0);
        let line = line.trim_ascii_start();
        let end = line.iter().position(blank);
        // The kernel takes no name that it has not seen the end of.
        let name = &line[..end.or(ends.then_some(line.len()))?];
        if name.is_empty() {
            return None;
        }
        Some(String::from_utf8_lossy(name).into_owned())
    }

    /// What it is a program for.
    fn platform(&self) -> Option<Platform> {
        self.of_linux().or_else(|| self.of_darwin()).or_else(|| self.of_windows())
    }

    fn of_linux(&self) -> Option<Platform> {
        let rest = self.head.strip_prefix(b"\x7fELF")?;
        let (class, order) = (*rest.first()?, *rest.get(1)?);
        let machine = self.number(18, 2)?;
        let fits =
            |known: &&(&str, u8, u8, u16)| (known.1, known.2, u64::from(known.3)) == (class, order, machine);
        MACHINES.iter().find(fits).map(|(architecture, ..)| Platform::new("linux", architecture))
    }

    /// Mach-O, for one processor.
    fn of_darwin(&self) -> Option<Platform> {
        match self.head.strip_prefix(b"\xcf\xfa\xed\xfe")?.first_chunk()? {
            [7, 0, 0, 1] => Some(Platform::new("darwin", "amd64")),
            [12, 0, 0, 1] => Some(Platform::new("darwin", "arm64")),
            _ => None,
        }
    }

    /// PE, which stands behind a program for DOS.
    fn of_windows(&self) -> Option<Platform> {
        self.head.strip_prefix(b"MZ")?;
        let at: &[u8; 4] = self.head.get(0x3c..)?.first_chunk()?;
        let rest = self.head.get(usize::try_from(u32::from_le_bytes(*at)).ok()?..)?;
        match rest.strip_prefix(b"PE\0\0")?.first_chunk()? {
            [0x64, 0x86] => Some(Platform::new("windows", "amd64")),
            [0x64, 0xaa] => Some(Platform::new("windows", "arm64")),
            [0x4c, 0x01] => Some(Platform::new("windows", "386")),
            _ => None,
        }
    }

    /// The loader of a program that is linked with libraries.
    fn loader(&self) -> Option<String> {
        const INTERPRETER: u64 = 3;
        let wide = *self.head.get(4)? == WIDE;
        let (parts, size, count) = match wide {
            true => (self.number(32, 8)?, self.number(54, 2)?, self.number(56, 2)?),
            false => (self.number(28, 4)?, self.number(42, 2)?, self.number(44, 2)?),
        };
        for part in 0..count.min(MAX_PARTS) {
            let at = parts.checked_add(part.checked_mul(size)?)?;
            if self.number(at, 4)? != INTERPRETER {
                continue;
            }
            let (from, length) = match wide {
                true => (self.number(at.checked_add(8)?, 8)?, self.number(at.checked_add(32)?, 8)?),
                false => (self.number(at.checked_add(4)?, 4)?, self.number(at.checked_add(16)?, 4)?),
            };
            let mut name = vec![0; usize::try_from(length.min(MAX_NAME_BYTES)).ok()?];
            self.file.read_exact_at(&mut name, from).ok()?;
            let name = name.split(|&byte| byte == 0).next().filter(|name| !name.is_empty())?;
            return Some(String::from_utf8_lossy(name).into_owned());
        }
        None
    }

    /// A number in the order of the program's machine.
    fn number(&self, at: u64, size: usize) -> Option<u64> {
        let mut bytes = [0; 8];
        let big = *self.head.get(5)? == BIG;
        let place = if big { &mut bytes[8 - size..] } else { &mut bytes[..size] };
        self.file.read_exact_at(place, at).ok()?;
        Some(if big { u64::from_be_bytes(bytes) } else { u64::from_le_bytes(bytes) })
    }

    /// What it is instead; `None`: a program of a machine without a name here.
    fn problem(&self) -> Option<NoProgram> {
        let head = &self.head;
        if head.is_empty() {
            return Some(NoProgram::Empty);
        }
        if head.starts_with(b"\x7fELF") {
            return None;
        }
        if let Some(rest) = head.strip_prefix(b"#!") {
            let line = rest.split(|&byte| byte == b'\n').next().unwrap_or_default();
            return line.trim_ascii().is_empty().then_some(NoProgram::NoInterpreter);
        }
        Some(match head.strip_prefix(b"\xef\xbb\xbf") {
            Some(rest) if rest.starts_with(b"#!") => NoProgram::ByteOrderMark,
            _ if head.contains(&0) => NoProgram::Data,
            _ => NoProgram::NoFirstLine,
        })
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn other() -> Platform {
        let architecture = if Platform::host().architecture == "s390x" { "arm64" } else { "s390x" };
        Platform::new("linux", architecture)
    }

    fn found(bytes: &[u8], errno: Errno) -> Unfit {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        fs::write(&path, bytes).unwrap();
        why_not(&path, errno)
    }

    #[track_caller]
    fn check_no_program(bytes: &[u8], expected: NoProgram) {
        let found = found(bytes, Errno::NOEXEC);
        assert!(matches!(found, Unfit::NoProgram { problem, .. } if problem == expected), "{found:?}");
    }

    #[track_caller]
    fn check_platform(bytes: &[u8], expected: &str) {
        let Unfit::Foreign(found) = found(bytes, Errno::NOEXEC) else { panic!("it is of here") };
        assert_eq!(found.platform.to_string(), expected);
    }

    #[track_caller]
    fn check_unknown(bytes: &[u8], errno: Errno) {
        assert_eq!(found(bytes, errno), Unfit::Refused { errno: errno.raw_os_error() });
    }

    #[test]
    fn headers_tell_the_platform_of_programs() {
        for (architecture, ..) in MACHINES {
            let platform = Platform::new("linux", architecture);
            if !Platform::host().runs(&platform) {
                check_platform(&header(&platform, 2).unwrap(), &platform.to_string());
                check_platform(&header(&platform, 3).unwrap(), &platform.to_string());
            }
        }
        assert_eq!(header(&Platform::new("darwin", "arm64"), 2), None);
        assert_eq!(header(&Platform::new("linux", "wasm"), 2), None);
        check_platform(b"\xcf\xfa\xed\xfe\x0c\0\0\x01", "darwin/arm64");
        check_platform(b"\xcf\xfa\xed\xfe\x07\0\0\x01", "darwin/amd64");
        let mut windows = vec![0; 0x84];
        windows[..2].copy_from_slice(b"MZ");
        windows[0x3c] = 0x80;
        windows.truncate(0x80);
        windows.extend(b"PE\0\0\x64\x86");
        check_platform(&windows, "windows/amd64");
        // The place of the header is the file's to say.
        windows[0x3c..0x40].fill(0xff);
        check_no_program(&windows, NoProgram::Data);
        let mut nameless = header(&other(), 2).unwrap();
        nameless[18..20].fill(0xee);
        check_unknown(&nameless, Errno::NOEXEC);
        check_unknown(b"\x7fELF", Errno::NOEXEC);
    }

    #[test]
    fn a_line_that_the_kernel_does_not_read_to_its_end_names_nothing() {
        let long = |tail: &str| format!("#!{}{tail}", "/nowhere".repeat(32));
        check_unknown(long("\n").as_bytes(), Errno::NOENT);
        check_unknown(long("").as_bytes(), Errno::NOEXEC);
        let arguments = format!("#!/nowhere {}\n", "a".repeat(300));
        let found = found(arguments.as_bytes(), Errno::NOENT);
        assert!(matches!(found, Unfit::NoInterpreter { ref interpreter, .. } if interpreter == "/nowhere"));
    }

    #[test]
    fn a_long_name_is_cut_in_a_message() {
        assert_eq!(shown("/bin/sh"), "/bin/sh");
        assert_eq!(shown(&"\u{1}".repeat(4000)), format!("{}...", "\u{1}".repeat(256)));
        assert_eq!(shown(&"ä".repeat(256)), "ä".repeat(256));
    }

    #[test]
    fn a_file_that_is_no_program_says_what_it_is() {
        check_no_program(b"", NoProgram::Empty);
        check_no_program(b"echo hello\n", NoProgram::NoFirstLine);
        check_no_program(b"\xef\xbb\xbf#!/bin/sh\n", NoProgram::ByteOrderMark);
        check_no_program(b"\xef\xbb\xbfecho\n", NoProgram::NoFirstLine);
        check_no_program(b"#! \t\necho\n", NoProgram::NoInterpreter);
        check_no_program(b"PK\x03\x04\0", NoProgram::Data);
        check_unknown(b"echo", Errno::ACCESS);
    }

    #[test]
    fn the_interpreter_of_a_script_is_looked_at_in_its_place() {
        let dir = tempfile::tempdir().unwrap();
        let place = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
        fs::write(place("program"), header(&other(), 2).unwrap()).unwrap();
        fs::write(place("first"), format!("#! {}\t-e\n", place("program"))).unwrap();
        fs::write(place("second"), format!("#!{}\n", place("first"))).unwrap();
        let found = why_not(Path::new(&place("second")), Errno::NOEXEC);
        assert!(matches!(&found, Unfit::Foreign(found) if found.platform == other()), "{found:?}");
        let found = why_not(Path::new(&place("second")), Errno::NOENT);
        assert!(matches!(&found, Unfit::Foreign(found) if found.reason.contains("flag F")), "{found:?}");

        fs::write(place("first"), format!("#!{}\r\n", place("program"))).unwrap();
        let missing = Unfit::NoInterpreter {
            file: place("first"),
            interpreter: format!("{}\r", place("program")),
            script: true,
        };
        assert_eq!(why_not(Path::new(&place("second")), Errno::NOENT), missing);
        // One that names itself comes to an end.
        fs::write(place("first"), format!("#!{}\n", place("first"))).unwrap();
        let found = why_not(Path::new(&place("first")), Errno::NOEXEC);
        assert_eq!(found, Unfit::Refused { errno: Errno::NOEXEC.raw_os_error() });
    }

    /// A program of this machine with one part, which names its loader.
    fn linked(loader: &[u8]) -> Option<Vec<u8>> {
        let mut bytes = header(&Platform::host(), 3)?.to_vec();
        if bytes[4] != WIDE || bytes[5] != LITTLE {
            return None;
        }
        bytes[32] = 64;
        (bytes[54], bytes[56]) = (56, 1);
        let mut part = [0; 56];
        (part[0], part[8], part[32]) = (3, 120, u8::try_from(loader.len()).unwrap());
        bytes.extend(part);
        bytes.extend(loader);
        Some(bytes)
    }

    #[test]
    fn a_loader_that_is_not_there_is_named() {
        let Some(program) = linked(b"/lib/absent.so.1\0") else {
            eprintln!("SKIPPED ALOUD: needs a machine of 64 bits in little order");
            return;
        };
        let named = found(&program, Errno::NOENT);
        assert!(
            matches!(&named, Unfit::NoInterpreter { interpreter, script: false, .. } if interpreter == "/lib/absent.so.1"),
            "{named:?}"
        );
        // What is there is not what is missing, and what a header promises need not be there.
        check_unknown(&linked(b"/\0").unwrap(), Errno::NOENT);
        check_unknown(&linked(b"\0").unwrap(), Errno::NOENT);
        for end in 0..program.len() - 1 {
            check_unknown(&program[..end], Errno::NOENT);
        }
        let mut far = program.clone();
        far[32..40].fill(0xff);
        check_unknown(&far, Errno::NOENT);
        let mut far = program;
        far[72..80].fill(0xff);
        check_unknown(&far, Errno::NOENT);
    }
}
