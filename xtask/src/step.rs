//! Steps: a heading that says what and why, the command as a user would type it, its real output.

use std::ffi::OsStr;
use std::fmt;
use std::io::{self, BufRead, BufReader, IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

/// Why a task ended early.
#[derive(Debug)]
pub(crate) enum Failure {
    /// No such task, or a word too many.
    Usage { word: String },
    /// A command ran and did not succeed.
    Exited { line: String, status: ExitStatus, stderr: String },
    /// A command could not be started.
    Spawn { program: String, source: io::Error },
    /// A file or directory of ours.
    Io { what: &'static str, path: PathBuf, source: io::Error },
    /// Programs are missing that only the machine's owner can install.
    Packages { missing: Vec<&'static str>, reason: &'static str },
    /// Output of a command is not what it is documented to be.
    Output { line: String, expected: &'static str },
    /// The rebuild ran these steps although nothing had changed.
    NotCached { steps: Vec<String> },
    /// Of the virtual machine, or of what was done in it.
    Machine { what: String },
    /// The table of tests that a user does not run is wrong about these.
    LeftOut { tests: Vec<String>, problem: &'static str },
    /// Processes that tests have started outlived them.
    LeftRunning { processes: Vec<String> },
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Failure::Usage { word } => write!(f, "no task takes `{word}`; `cargo xtask help` lists them"),
            Failure::Exited { line, status, stderr } => {
                write!(f, "`{line}` failed ({status})")?;
                if stderr.is_empty() { Ok(()) } else { write!(f, ":\n{}", stderr.trim_end()) }
            }
            Failure::Spawn { program, source } => write!(f, "cannot start {program}: {source}"),
            Failure::Io { what, path, source } => write!(f, "cannot {what} {}: {source}", path.display()),
            Failure::Packages { missing, reason } => {
                write!(f, "{reason}; please install: {}", missing.join(" "))
            }
            Failure::Output { line, expected } => write!(f, "`{line}` did not print {expected}"),
            Failure::Machine { what } => f.write_str(what),
            Failure::NotCached { steps } => {
                write!(f, "nothing had changed, yet these steps ran again: {}", steps.join(", "))
            }
            Failure::LeftOut { tests, problem } => {
                write!(f, "xtask/src/users/left_out.rs: {} {problem}", tests.join(", "))
            }
            Failure::LeftRunning { processes } => {
                write!(f, "the tests have left running: {}", processes.join("; "))
            }
        }
    }
}

impl Failure {
    /// Exit code of the task: 2 for the command line, 1 for the rest.
    pub(crate) fn exit_code(&self) -> u8 {
        if matches!(self, Failure::Usage { .. }) { 2 } else { 1 }
    }

    /// For `map_err` on a file operation.
    pub(crate) fn io(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Failure {
        let path = path.to_owned();
        move |source| Failure::Io { what, path, source }
    }
}

/// Prints the last line of a task that failed.
pub(crate) fn complain(failure: &Failure) {
    eprintln!("\n{}: {failure}", paint("31;1", "xtask failed"));
}

/// Prints a headline, and below it the reason when there is one.
pub(crate) fn heading(title: &str, why: &str) {
    println!("\n{}", paint("1", &format!("== {title}")));
    if !why.is_empty() {
        println!("   {why}");
    }
    flush();
}

/// Prints one indented line.
pub(crate) fn note(text: &str) {
    println!("   {text}");
    flush();
}

/// Prints something that must not be overlooked.
pub(crate) fn warn(text: &str) {
    println!("{}", paint("33;1", text));
    flush();
}

/// The command as a user would type it: with the program's bare name, quoted where needed.
pub(crate) fn typed(command: &Command) -> String {
    let program = Path::new(command.get_program());
    let name = program.file_name().unwrap_or(program.as_os_str());
    let words: Vec<String> = [name].into_iter().chain(command.get_args()).map(quoted).collect();
    words.join(" ")
}

/// Prints the command line, lets the command write to our terminal, and times it.
pub(crate) fn show(command: &mut Command) -> Result<Duration, Failure> {
    prompt(command);
    let start = Instant::now();
    let status = command.status().map_err(spawn_failure(command))?;
    succeeded(command, status, String::new())?;
    Ok(start.elapsed())
}

/// As [`show`], and returns what the command wrote to stderr, which is shown as it comes.
pub(crate) fn show_and_keep(command: &mut Command) -> Result<(Duration, String), Failure> {
    prompt(command);
    let start = Instant::now();
    let mut child = command.stderr(Stdio::piped()).spawn().map_err(spawn_failure(command))?;
    let mut kept = String::new();
    if let Some(stderr) = child.stderr.take() {
        for line in BufReader::new(stderr).split(b'\n') {
            let Ok(line) = line else { break };
            let line = String::from_utf8_lossy(&line);
            eprintln!("{line}");
            kept.push_str(&line);
            kept.push('\n');
        }
    }
    let status = child.wait().map_err(spawn_failure(command))?;
    succeeded(command, status, String::new())?;
    Ok((start.elapsed(), kept))
}

/// Runs a command silently and returns its stdout; on failure its stderr is in the error.
pub(crate) fn read(command: &mut Command) -> Result<String, Failure> {
    let output = command.stdin(Stdio::null()).output().map_err(spawn_failure(command))?;
    succeeded(command, output.status, String::from_utf8_lossy(&output.stderr).into_owned())?;
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Whether a command exits with 0; its output is dropped.
pub(crate) fn succeeds(command: &mut Command) -> bool {
    let quiet = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    quiet.status().is_ok_and(|status| status.success())
}

/// Root of the repository.
pub(crate) fn repository() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap_or(Path::new("."))
}

/// A `cargo` command at the repository's root, with the cargo that runs us.
pub(crate) fn cargo() -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(repository());
    command
}

/// `cargo nextest run`, two tests at a time for each processor: for most of its time a test waits, for disks
/// and for the ends of processes.
pub(crate) fn nextest_run() -> Command {
    let processors = std::thread::available_parallelism().map_or(1, std::num::NonZeroUsize::get);
    let mut command = cargo();
    command.args(["nextest", "run", "--test-threads", &(2 * processors).to_string()]);
    command
}

/// Directory that cargo builds into.
pub(crate) fn target_dir() -> Result<PathBuf, Failure> {
    let mut command = cargo();
    let json = read(command.args(["metadata", "--no-deps", "--format-version", "1"]))?;
    let metadata: serde_json::Value = serde_json::from_str(&json)
        .map_err(|_| Failure::Output { line: typed(&command), expected: "JSON" })?;
    let dir = metadata["target_directory"].as_str();
    let missing = || Failure::Output { line: typed(&command), expected: "a target directory" };
    dir.map(PathBuf::from).ok_or_else(missing)
}

/// `$XDG_CACHE_HOME`, by default `~/.cache`.
pub(crate) fn cache_home() -> PathBuf {
    let set = |name| std::env::var_os(name).filter(|value| Path::new(value).is_absolute()).map(PathBuf::from);
    set("XDG_CACHE_HOME").unwrap_or_else(|| set("HOME").unwrap_or_else(|| "/root".into()).join(".cache"))
}

fn prompt(command: &Command) {
    println!("{}", paint("36", &format!("$ {}", typed(command))));
    flush();
}

/// The failure of a command that could not be started.
pub(crate) fn spawn_failure(command: &Command) -> impl FnOnce(io::Error) -> Failure + use<> {
    let program = command.get_program().to_string_lossy().into_owned();
    move |source| Failure::Spawn { program, source }
}

fn succeeded(command: &Command, status: ExitStatus, stderr: String) -> Result<(), Failure> {
    if status.success() { Ok(()) } else { Err(Failure::Exited { line: typed(command), status, stderr }) }
}

/// A word as a shell takes it.
pub(crate) fn quoted(word: &OsStr) -> String {
    let word = word.to_string_lossy();
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_=+./:,@%".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        word.into_owned()
    } else {
        format!("'{}'", word.replace('\'', r"'\''"))
    }
}

fn paint(code: &str, text: &str) -> String {
    if io::stdout().is_terminal() { format!("\x1b[{code}m{text}\x1b[0m") } else { text.to_owned() }
}

// Children write to the same terminal or file: our line has to be out before theirs.
fn flush() {
    let _ = io::stdout().flush();
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_is_shown_as_one_would_type_it() {
        let mut command = Command::new("/opt/somewhere/kiln");
        command.args(["import", "base.tar", "debian:bookworm", "-c", r#"CMD ["bash"]"#, "it's"]);
        assert_eq!(typed(&command), r#"kiln import base.tar debian:bookworm -c 'CMD ["bash"]' 'it'\''s'"#);
    }

    #[test]
    fn a_failed_command_is_named_with_its_status() {
        let failure = read(Command::new("sh").args(["-c", "echo no >&2; exit 3"])).expect_err("exits with 3");
        assert_eq!(failure.to_string(), "`sh -c 'echo no >&2; exit 3'` failed (exit status: 3):\nno");
        assert_eq!(failure.exit_code(), 1);
    }

    #[test]
    fn a_program_that_is_not_there_is_named() {
        let failure = read(&mut Command::new("/nonexistent/tool")).expect_err("there is no such program");
        assert!(failure.to_string().starts_with("cannot start /nonexistent/tool: "), "{failure}");
    }
}
