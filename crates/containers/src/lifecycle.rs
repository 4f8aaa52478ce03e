//! A container from start to end.

use kiln_content::Lease;
use kiln_executor::{Cancel, ExecError, Executor, Finished, ProcessSpec, Stdio};
use kiln_oci::image::RunConfig;
use kiln_oci::{ActiveKey, Mount, SnapshotId};
use kiln_snapshotter::{OpenOptions, Snapshotter};

/// What to run, on top of what the image says.
#[derive(Debug, Clone, Default)]
pub struct RunRequest {
    /// The image's files; `None`: an image without layers.
    pub snapshot: Option<SnapshotId>,
    /// The image's own settings.
    pub config: RunConfig,
    /// Replaces the image's command.
    pub command: Vec<String>,
    /// Replaces the image's entrypoint and drops its command; an empty text clears it.
    pub entrypoint: Option<String>,
    /// Added to the image's environment, later names win.
    pub env: Vec<(String, String)>,
    /// Replaces the image's user.
    pub user: Option<String>,
    /// Replaces the image's working directory.
    pub workdir: Option<String>,
    /// Host paths made visible.
    pub mounts: Vec<Mount>,
    /// Host name inside; `None`: the container's name.
    pub hostname: Option<String>,
    /// Network, and what it is held back by and held to: all that no other field here says.
    pub settings: ProcessSpec,
    /// Standard streams.
    pub tty: Tty,
}

/// What the process's standard streams are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Tty {
    /// Those of this process, standard input closed.
    #[default]
    Output,
    /// Those of this process.
    Streams,
    /// A terminal of its own, joined to this process's terminal.
    Terminal,
}

/// Why a container did not run.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RunError {
    /// Neither the image nor the user says what to run.
    #[error("the image has no command and none was given")]
    NoCommand,
    /// Snapshots.
    #[error(transparent)]
    Snapshots(#[from] kiln_snapshotter::Error),
    /// The process could not be started.
    #[error(transparent)]
    Exec(#[from] ExecError),
}

/// Runs a container in the foreground and removes its layer at the end.
///
/// # Errors
/// [`RunError`]; nothing is left behind then either.
pub fn run(
    snapshots: &dyn Snapshotter,
    executor: &dyn Executor,
    lease: &Lease,
    request: &RunRequest,
    cancel: &Cancel,
) -> Result<Finished, RunError> {
    let args = arguments(request).ok_or(RunError::NoCommand)?;
    let key = lease.new_key();
    snapshots.prepare(&key, request.snapshot.as_ref())?;
    let layer = WritableLayer { snapshots, key: &key };
    let stubs = vec![executor.stub_dir().to_owned()];
    let root = snapshots.open_active(layer.key, &OpenOptions { extra_lower: stubs })?;
    let spec = ProcessSpec {
        args,
        env: environment(request),
        cwd: request.workdir.clone().unwrap_or_else(|| match request.config.working_dir.as_str() {
            "" => "/".to_owned(),
            dir => dir.to_owned(),
        }),
        create_cwd: true,
        user: request
            .user
            .clone()
            .or_else(|| Some(request.config.user.clone()).filter(|user| !user.is_empty())),
        hostname: request.hostname.clone().unwrap_or_else(|| key.as_str().chars().take(12).collect()),
        mounts: request.mounts.clone(),
        ..request.settings.clone()
    };
    let stdio = match request.tty {
        Tty::Output => Stdio::Output,
        Tty::Streams => Stdio::Inherit,
        Tty::Terminal => Stdio::Terminal,
    };
    Ok(executor.run(root.into(), &spec, stdio, cancel)?)
}

/// The container's writable layer; gone with the container.
struct WritableLayer<'a> {
    snapshots: &'a dyn Snapshotter,
    key: &'a ActiveKey,
}

impl Drop for WritableLayer<'_> {
    fn drop(&mut self) {
        // The next command sweeps what cannot be removed now.
        let _ = self.snapshots.remove_active(self.key);
    }
}

/// Entrypoint and command as docker combines them.
fn arguments(request: &RunRequest) -> Option<Vec<String>> {
    let mut args: Vec<String> = match &request.entrypoint {
        Some(program) if program.is_empty() => Vec::new(),
        Some(program) => vec![program.clone()],
        None => request.config.entrypoint.clone().unwrap_or_default(),
    };
    if !request.command.is_empty() {
        args.extend(request.command.iter().cloned());
    } else if request.entrypoint.is_none() {
        args.extend(request.config.cmd.iter().flatten().cloned());
    }
    (!args.is_empty()).then_some(args)
}

/// The search path of an image that names none.
const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

fn environment(request: &RunRequest) -> Vec<(String, String)> {
    let mut env: Vec<(String, String)> = Vec::new();
    let mut set = |name: &str, value: &str| match env.iter_mut().find(|(known, _)| known == name) {
        Some((_, old)) => *old = value.to_owned(),
        None => env.push((name.to_owned(), value.to_owned())),
    };
    set("PATH", DEFAULT_PATH);
    if request.tty == Tty::Terminal {
        set("TERM", "xterm");
    }
    for entry in &request.config.env {
        let (name, value) = entry.split_once('=').unwrap_or((entry, ""));
        set(name, value);
    }
    for (name, value) in &request.env {
        set(name, value);
    }
    env
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(entrypoint: &[&str], cmd: &[&str]) -> RunRequest {
        let words = |words: &[&str]| Some(words.iter().map(|word| (*word).to_owned()).collect());
        let config = RunConfig { entrypoint: words(entrypoint), cmd: words(cmd), ..RunConfig::default() };
        RunRequest { config, ..RunRequest::default() }
    }

    #[test]
    fn command_replaces_cmd_and_keeps_the_entrypoint() {
        let mut request = request(&["/bin/app"], &["serve"]);
        assert_eq!(arguments(&request).unwrap(), ["/bin/app", "serve"]);
        request.command = vec!["check".to_owned()];
        assert_eq!(arguments(&request).unwrap(), ["/bin/app", "check"]);
    }

    #[test]
    fn own_entrypoint_drops_the_image_command() {
        let mut request = request(&["/bin/app"], &["serve"]);
        request.entrypoint = Some("sh".to_owned());
        assert_eq!(arguments(&request).unwrap(), ["sh"]);
        request.entrypoint = Some(String::new());
        assert_eq!(arguments(&request), None);
    }

    #[test]
    fn own_environment_wins_over_the_image() {
        let mut request = request(&[], &["x"]);
        request.config.env = vec!["A=1".to_owned(), "PATH=/x".to_owned()];
        request.env = vec![("A".to_owned(), "2".to_owned())];
        let expected = [("PATH", "/x"), ("A", "2")].map(|(name, value)| (name.to_owned(), value.to_owned()));
        assert_eq!(environment(&request), expected);
    }
}
