//! Starts git: without the user's and the machine's configuration, without questions, without
//! hooks, and over no transport but ours.

use std::ffi::OsString;
use std::io::{self, Read};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process_group};

use super::{Fetcher, SourceError};

/// How soon a cancelled build is noticed.
const POLL: Duration = Duration::from_millis(50);
/// Lists of references and files; more is an attack on memory.
const MAX_OUTPUT: u64 = 256 << 20;
/// Servers may talk without end.
const MAX_SAID: u64 = 1 << 20;
/// The transports, for submodules and redirects too. `ext` would run commands, `file` would read
/// repositories of this machine.
const TRANSPORTS: &str = "https:http:git:ssh";

/// Configuration that goes before everything a repository could say.
const CONFIG: [&str; 20] = [
    "core.hooksPath=/dev/null",
    "core.fsmonitor=false",
    "core.attributesFile=/dev/null",
    "core.excludesFile=/dev/null",
    "core.symlinks=true",
    "core.fileMode=true",
    "core.autocrlf=false",
    "core.askPass=",
    "credential.helper=",
    "protocol.allow=never",
    "protocol.https.allow=always",
    "protocol.http.allow=always",
    "protocol.git.allow=always",
    "protocol.ssh.allow=always",
    "protocol.ext.allow=never",
    "protocol.file.allow=never",
    "submodule.recurse=false",
    "fetch.recurseSubmodules=false",
    "gc.auto=0",
    "maintenance.auto=false",
];

/// The environment in which git reaches the network as the user does.
const PASSED: [&str; 11] = [
    "http_proxy",
    "https_proxy",
    "all_proxy",
    "no_proxy",
    "HTTP_PROXY",
    "HTTPS_PROXY",
    "ALL_PROXY",
    "NO_PROXY",
    "SSL_CERT_FILE",
    "SSL_CERT_DIR",
    "GIT_SSL_CAINFO",
];

/// git as this build runs it.
pub(super) struct Git<'a> {
    pub(super) fetcher: &'a Fetcher<'a>,
    /// Name and value of the configuration that logs in.
    credentials: Option<(String, String)>,
    ssh: OsString,
    path: OsString,
}

/// What git printed.
pub(super) struct Output {
    pub(super) success: bool,
    pub(super) stdout: Vec<u8>,
    /// What it said on standard error, without progress and control characters.
    pub(super) said: String,
}

impl<'a> Git<'a> {
    /// `state`: the directory where the keys of ssh hosts are remembered.
    pub(super) fn new(fetcher: &'a Fetcher<'a>, state: &Path, credentials: Option<(String, String)>) -> Self {
        // A program of this name in the tree that is being checked out must never be found.
        let paths = std::env::var_os("PATH").unwrap_or_else(|| "/usr/bin:/bin".into());
        let absolute = std::env::split_paths(&paths).filter(|path| path.is_absolute());
        let path = std::env::join_paths(absolute).unwrap_or_else(|_| "/usr/bin:/bin".into());
        Self { fetcher, credentials, ssh: ssh_command(fetcher, state), path }
    }

    /// git in `directory` (`None`: nowhere in particular).
    pub(super) fn command(&self, directory: Option<BorrowedFd<'_>>) -> Command {
        let mut command = Command::new("git");
        command.env_clear().env("PATH", &self.path).env("LC_ALL", "C");
        for name in PASSED {
            if let Some(value) = std::env::var_os(name) {
                command.env(name, value);
            }
        }
        // HOME as well: older versions do not know GIT_CONFIG_GLOBAL.
        let fixed = [
            ("HOME", "/dev/null"),
            ("XDG_CONFIG_HOME", "/dev/null"),
            ("GIT_CONFIG_NOSYSTEM", "1"),
            ("GIT_CONFIG_GLOBAL", "/dev/null"),
            ("GIT_ATTR_NOSYSTEM", "1"),
            ("GIT_TERMINAL_PROMPT", "0"),
            ("GIT_ASKPASS", "/bin/false"),
            ("GIT_ALLOW_PROTOCOL", TRANSPORTS),
            ("GIT_PROTOCOL_FROM_USER", "0"),
            ("GIT_NO_LAZY_FETCH", "1"),
            ("GIT_NO_REPLACE_OBJECTS", "1"),
            ("GIT_LITERAL_PATHSPECS", "1"),
            ("GIT_SSH_VARIANT", "ssh"),
        ];
        command.envs(fixed).env("GIT_SSH_COMMAND", &self.ssh);
        if let Some(agent) = &self.fetcher.options.ssh_agent {
            command.env("SSH_AUTH_SOCK", agent);
        }
        for setting in CONFIG {
            command.args(["-c", setting]);
        }
        if let Some((name, header)) = &self.credentials {
            // Not as an argument: those are open to every user of the machine.
            command
                .env("GIT_CONFIG_COUNT", "1")
                .env("GIT_CONFIG_KEY_0", name)
                .env("GIT_CONFIG_VALUE_0", header);
        }
        if let Some(directory) = directory {
            // Resolved by the child, before it becomes git.
            command.current_dir(format!("/proc/self/fd/{}", directory.as_raw_fd()));
        } else {
            command.current_dir("/");
        }
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).process_group(0);
        command
    }

    /// Runs `command` to its end, or until the build is cancelled.
    ///
    /// # Errors
    /// [`SourceError::NoGit`], [`SourceError::TooLarge`], [`SourceError::Cancelled`]; a git that
    /// failed is no error here.
    pub(super) fn run(&self, mut command: Command) -> Result<Output, SourceError> {
        let child = command.spawn().map_err(|source| SourceError::NoGit { source })?;
        let mut child = Running { child, ended: false };
        let stdout = reader(child.child.stdout.take(), MAX_OUTPUT);
        let stderr = reader(child.child.stderr.take(), MAX_SAID);
        let stdout = self.collect(&stdout)?;
        let stderr = self.collect(&stderr)?;
        let status = child.child.wait();
        child.ended = true;
        let status = status.map_err(|source| SourceError::Host { what: "waiting for git", source })?;
        let stdout = stdout.map_err(|source| SourceError::Host { what: "reading from git", source })?;
        if stdout.len() as u64 > MAX_OUTPUT {
            return Err(SourceError::TooLarge {
                what: "what git printed".to_owned(),
                limit_bytes: MAX_OUTPUT,
            });
        }
        let said = self.clean(&String::from_utf8_lossy(&stderr.unwrap_or_default()));
        Ok(Output { success: status.success(), stdout, said })
    }

    /// Runs `command`, which must succeed; returns what it printed.
    ///
    /// # Errors
    /// [`SourceError::Git`], and those of [`Git::run`].
    pub(super) fn must(&self, command: Command, action: &str) -> Result<Vec<u8>, SourceError> {
        let output = self.run(command)?;
        if output.success { Ok(output.stdout) } else { Err(output.failure(action)) }
    }

    fn collect(&self, reader: &Receiver<io::Result<Vec<u8>>>) -> Result<io::Result<Vec<u8>>, SourceError> {
        loop {
            match reader.recv_timeout(POLL) {
                Ok(bytes) => return Ok(bytes),
                Err(RecvTimeoutError::Timeout) => self.fetcher.check_cancelled()?,
                Err(RecvTimeoutError::Disconnected) => return Ok(Err(io::ErrorKind::BrokenPipe.into())),
            }
        }
    }

    /// The lines that say what went wrong; a server may have put anything into them.
    fn clean(&self, text: &str) -> String {
        let mut lines: Vec<String> = Vec::new();
        for line in text.split(['\n', '\r']) {
            let line: String = line.chars().filter(|c| !c.is_control()).collect();
            if !line.trim().is_empty() {
                lines.push(line.trim().to_owned());
            }
        }
        let telling = |line: &&String| {
            ["fatal:", "error:", "remote:", "ssh:"].iter().any(|start| line.starts_with(start))
                || line.contains("denied")
        };
        let told: Vec<&String> = lines.iter().filter(telling).collect();
        let told = if told.is_empty() { lines.iter().rev().take(3).rev().collect() } else { told };
        let mut text = told.iter().map(|line| line.as_str()).collect::<Vec<_>>().join("; ");
        if let Some((_, header)) = &self.credentials {
            for secret in header.split(' ').chain([header.as_str()]).filter(|part| part.len() > 3) {
                if secret != "Basic" && secret != "Authorization:" {
                    text = text.replace(secret, "***");
                }
            }
        }
        if text.is_empty() { "nothing about why".to_owned() } else { text }
    }
}

impl Output {
    /// This output as an error.
    pub(super) fn failure(self, action: &str) -> SourceError {
        SourceError::Git { action: action.to_owned(), said: self.said }
    }
}

/// A git that is stopped with everything it started unless it ended by itself.
struct Running {
    child: Child,
    ended: bool,
}

impl Drop for Running {
    fn drop(&mut self) {
        if self.ended {
            return;
        }
        if let Some(group) = i32::try_from(self.child.id()).ok().and_then(Pid::from_raw) {
            // Gone already is as good.
            let _ = kill_process_group(group, Signal::KILL);
        }
        let _ = self.child.wait();
    }
}

/// Reads a pipe to its end on a thread of its own; what is beyond the limit is thrown away.
fn reader(pipe: Option<impl Read + Send + 'static>, limit_bytes: u64) -> Receiver<io::Result<Vec<u8>>> {
    let (sender, receiver) = mpsc::channel();
    std::thread::spawn(move || {
        let read = || -> io::Result<Vec<u8>> {
            let mut bytes = Vec::new();
            if let Some(mut pipe) = pipe {
                pipe.by_ref().take(limit_bytes + 1).read_to_end(&mut bytes)?;
                io::copy(&mut pipe, &mut io::sink())?;
            }
            Ok(bytes)
        };
        // Nobody listens any more once the build was cancelled.
        let _ = sender.send(read());
    });
    receiver
}

/// ssh without questions, without the user's configuration and key files; keys come from the agent
/// that the user named.
fn ssh_command(fetcher: &Fetcher<'_>, state: &Path) -> OsString {
    let mut known = vec![state.join("known_hosts")];
    if let Some(home) = std::env::var_os("HOME") {
        known.push(PathBuf::from(home).join(".ssh/known_hosts"));
    }
    let known: Vec<String> = known.iter().map(|path| format!("\"{}\"", path.display())).collect();
    // A host is trusted the first time it is seen, as BuildKit trusts it every time.
    let options = [
        "BatchMode=yes".to_owned(),
        "StrictHostKeyChecking=accept-new".to_owned(),
        format!("UserKnownHostsFile={}", known.join(" ")),
        "IdentityFile=none".to_owned(),
        match fetcher.options.ssh_agent {
            Some(_) => "IdentityAgent=SSH_AUTH_SOCK".to_owned(),
            None => "IdentityAgent=none".to_owned(),
        },
        "ConnectTimeout=30".to_owned(),
    ];
    let mut command = "ssh -F /dev/null".to_owned();
    for option in options {
        command.push_str(" -o '");
        command.push_str(&option.replace('\'', "'\\''"));
        command.push('\'');
    }
    command.into()
}
