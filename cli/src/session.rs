//! What every command starts with: the store, signals, names.

use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use kiln_build::{BuildCancel, Engine};
use kiln_containers::Containers;
use kiln_content::{ImageRecord, Store};
use kiln_executor::Linux;
use kiln_oci::Reference;
use kiln_oci::image::ImageConfig;
use kiln_snapshotter::Backend;
use kiln_solver::Cancellation;
use nix::sys::signal::{SigSet, Signal};

use crate::config;
use crate::errors::{Failure, exit, say};
use crate::rootless;

/// An open store and the way to stop.
pub(crate) struct Session {
    pub(crate) engine: Engine,
    pub(crate) cancel: BuildCancel,
    /// The containers of the store.
    pub(crate) containers: Containers,
    /// Runs processes, as this kiln does it itself.
    pub(crate) linux: Arc<Linux>,
    /// Who keeps snapshots, as it was asked for.
    pub(crate) backend: Backend,
}

/// Gets the signals that would end the command; false when one shall end it.
type Proxy = Box<dyn Fn(Signal) -> bool + Send + Sync>;

static PROXY: OnceLock<Proxy> = OnceLock::new();

/// Image configs are read whole; larger ones are refused.
const MAX_CONFIG_BYTES: u64 = 8 << 20;

impl Session {
    /// Opens the store at `root`, or at its usual place; with `anew`, its index is made anew first.
    pub(crate) fn open(root: Option<PathBuf>, snapshotter: Backend, anew: bool) -> Result<Self, Failure> {
        let cancel = BuildCancel::new()?;
        // Before any thread starts, so that all of them leave these signals to the one that waits.
        watch_signals(cancel.clone());
        let root = root_of(root)?;
        let store = Arc::new(if anew { Store::open_anew(&root)? } else { Store::open(&root)? });
        if let Some(rebuilt) = store.rebuilt() {
            say(&format!("warning: {rebuilt}\n"));
        }
        let snapshots = kiln_snapshotter::open(&root.join("snapshots"), snapshotter)?;
        let linux = Arc::new(Linux::open(&root.join("state/executor"))?);
        let engine = Engine::new(store, snapshots, linux.clone())?;
        let containers = Containers::open(&root);
        kiln_containers::sweep(&containers, &*engine.snapshots);
        for id in &engine.nameless {
            eprintln!("warning: image {id} was found; its names are lost");
        }
        Ok(Self { engine, cancel, containers, linux, backend: snapshotter })
    }

    /// The image a user means: a name, or the first digits of an ID.
    pub(crate) fn find(&self, text: &str) -> Result<ImageRecord, Failure> {
        let store = &self.engine.store;
        let reference = text.parse::<Reference>();
        if let Ok(reference) = &reference
            && let Some(image) = store.resolve(reference)?
        {
            return Ok(image);
        }
        match store.find_by_prefix(id_digits(text))?.as_slice() {
            [image] => Ok(image.clone()),
            [] => Err(Failure::no_image(text)),
            several => {
                Err(Failure::usage(format!("{text:?} is the beginning of {} image IDs", several.len())))
            }
        }
    }

    /// Runs processes with an OCI runtime.
    pub(crate) fn linux_with(&self, runtime: PathBuf) -> Result<Arc<Linux>, Failure> {
        let state = self.engine.store.root().join("state/executor");
        Ok(Arc::new(Linux::open(&state)?.with_runtime(runtime)))
    }

    /// The containers, for starting some: they trust the certificates of these files and of those that the
    /// configuration names.
    ///
    /// # Errors
    /// For a file that holds none.
    pub(crate) fn trusting(&self, named: &[PathBuf]) -> Result<Containers, Failure> {
        let files = config::certificates(named)?;
        self.containers.clone().trust(&files).map_err(|(path, error)| Failure::certificates(&path, &error))
    }

    /// Lets `proxy` have the signals that would end this command; the first one counts.
    pub(crate) fn proxy_signals(&self, proxy: impl Fn(Signal) -> bool + Send + Sync + 'static) {
        let _ = PROXY.set(Box::new(proxy));
    }

    /// An image's config.
    pub(crate) fn config(&self, image: &ImageRecord) -> Result<ImageConfig, Failure> {
        let json = self.engine.store.read_blob(&image.config, MAX_CONFIG_BYTES)?;
        serde_json::from_slice(&json)
            .map_err(|error| Failure::store(format!("image config {}: {error}", image.config)))
    }
}

/// Where the store is: as it was said, or at its usual place.
pub(crate) fn root_of(said: Option<PathBuf>) -> Result<PathBuf, Failure> {
    match said {
        Some(root) => Ok(std::path::absolute(&root).unwrap_or(root)),
        None => default_root(),
    }
}

fn default_root() -> Result<PathBuf, Failure> {
    if rootless::owns_system() {
        return Ok(PathBuf::from("/var/lib/kiln"));
    }
    let variable = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty());
    let data = variable("XDG_DATA_HOME").map(PathBuf::from);
    let home = variable("HOME").map(|home| Path::new(&home).join(".local/share"));
    let data =
        data.or(home).ok_or_else(|| Failure::usage("HOME is not set; say where the store is with --root"))?;
    Ok(data.join("kiln"))
}

/// How long whatever is under way has to end by itself: less than the two seconds within which an
/// interrupted command is gone.
const GRACE: Duration = Duration::from_millis(1500);

/// What programs in containers are told things with, and nothing that kiln itself ends tidily at.
const OTHERS: [Signal; 4] = [Signal::SIGQUIT, Signal::SIGUSR1, Signal::SIGUSR2, Signal::SIGALRM];

/// As if kiln had not waited for it.
fn die_of(signal: Signal) {
    let mut mask = SigSet::empty();
    mask.add(signal);
    if mask.thread_unblock().is_ok() {
        let _ = nix::sys::signal::raise(signal);
    }
}

/// One thread waits for Ctrl-C and its kin and stops the work; SIGWINCH is left to the terminal.
///
/// What does not look at the flag, as a write to a pipe that nobody reads, is left where it is: the store is
/// whole whenever a process dies. A second signal does not wait for that.
fn watch_signals(cancel: BuildCancel) {
    let mut mask = SigSet::empty();
    for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP].iter().chain(&OTHERS) {
        mask.add(*signal);
    }
    let mut blocked = mask;
    blocked.add(Signal::SIGWINCH);
    if blocked.thread_block().is_err() {
        return;
    }
    std::thread::spawn(move || {
        loop {
            match mask.wait() {
                Err(_) => return,
                Ok(signal) if PROXY.get().is_some_and(|proxy| proxy(signal)) => {}
                Ok(signal) if OTHERS.contains(&signal) => die_of(signal),
                Ok(_) => break,
            }
        }
        cancel.cancel();
        std::thread::spawn(|| {
            std::thread::sleep(GRACE);
            interrupted();
        });
        if mask.wait().is_ok() {
            interrupted();
        }
    });
}

/// The digits of an image ID, or the first of them, as they may be written with or without `sha256:`.
pub(crate) fn id_digits(text: &str) -> &str {
    text.strip_prefix("sha256:").unwrap_or(text)
}

/// Ends the process, whatever its other threads do.
fn interrupted() -> ! {
    // Standard error may be what holds one of them.
    std::thread::spawn(|| say("error: interrupted\n"));
    std::thread::sleep(Duration::from_millis(20));
    std::process::exit(exit::INTERRUPTED.number().into())
}
