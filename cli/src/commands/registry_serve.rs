//! `kiln registry`

mod collect;
mod images;
mod settings;

use std::io::IsTerminal;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use kiln_registry_server::{Collected, Collection, Content, Control, DirectoryError, Server};
use kiln_solver::Cancellation;
use nix::sys::signal::Signal;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio::sync::oneshot;

use super::{human_size, print};
use crate::args::registry_serve::{RegistryCommand, ServeArgs};
use crate::config::Config;
use crate::errors::{Failure, say};
use crate::session::Session;
use images::StoreImages;
pub(crate) use images::follow_names;

/// Each waits for the disk; more at once would not make it faster.
const DISK_THREADS: usize = 32;

/// Whether the command is about images of the store.
pub(crate) fn needs_store(command: &RegistryCommand) -> Result<bool, Failure> {
    Ok(match command {
        RegistryCommand::Serve(args) => args.store || settings::read(args.config.as_deref())?.store,
        RegistryCommand::Gc(_) => false,
    })
}

/// Runs the command; `session` is the store that it [`needs_store`] for.
pub(crate) fn run(session: Option<&Session>, command: &RegistryCommand) -> Result<u8, Failure> {
    match command {
        RegistryCommand::Serve(args) => serve(session, args),
        RegistryCommand::Gc(args) => collect::run(args),
    }
}

fn serve(session: Option<&Session>, args: &ServeArgs) -> Result<u8, Failure> {
    let file = settings::read(args.config.as_deref())?;
    let is_pushed_to = args.push || file.push;
    let of_store = |session: &Session| {
        let images = StoreImages::new(session.engine.clone(), session.cancel.clone());
        let images = if is_pushed_to { images.collecting(session, &Config::read()?.gc) } else { images };
        let directory = images::pushed_directory(session);
        Ok::<_, Failure>(settings::OfStore { images: Arc::new(images), directory })
    };
    let store = session.map(of_store).transpose()?;
    let mut settings = settings::settings(args, file, store)?;
    let files = raise_files();
    // Each holds one open, and others need some as well.
    settings.limits.uploads = settings.limits.uploads.min(usize::try_from(files / 4).unwrap_or(usize::MAX));
    let scheme = if settings.tls.is_some() { "https" } else { "http" };
    let place = match (&settings.content, session) {
        (Content::Directory(directory), _) => format!("in {}", directory.display()),
        (_, Some(session)) => format!("of the images in {}", session.engine.store.root().display()),
        (_, None) => "of images".to_owned(),
    };
    let (has_accounts, policy) = (settings.accounts.is_some(), settings.collection.clone());
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .max_blocking_threads(DISK_THREADS)
        .build()
        .map_err(|error| Failure::store(format!("threads cannot be started: {error}")))?;
    runtime.block_on(async {
        let told = listen(session)?;
        let server = Server::bind(settings).await?;
        print(&format!("registry at {scheme}://{}, {place}\n", server.address()))?;
        let (end, ended) = oneshot::channel::<()>();
        let config = args.config.clone();
        let control = server.control();
        tokio::spawn(async move {
            obey(told, &control, config.as_deref(), has_accounts, &policy).await;
            drop(end);
        });
        server.run(async { drop(ended.await) }, |problem| say(&format!("warning: {problem}\n"))).await;
        Ok::<_, Failure>(())
    })?;
    if let Some(session) = session {
        // Nobody waits for what is still being packed.
        session.cancel.cancel();
    }
    // Not for whoever still reads a slow disk.
    runtime.shutdown_timeout(Duration::from_secs(1));
    Ok(0)
}

/// Lets this process open as many files as it may; how many.
fn raise_files() -> u64 {
    let now = getrlimit(Resource::Nofile);
    let _ = setrlimit(Resource::Nofile, Rlimit { current: now.maximum, maximum: now.maximum });
    getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX)
}

/// What signals tell a registry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Told {
    End,
    /// Read files again that may have changed.
    Look,
    /// Collect garbage now.
    Collect,
}

impl Told {
    /// `None`: nothing that a registry knows.
    fn of(signal: Signal) -> Option<Self> {
        match signal {
            Signal::SIGTERM | Signal::SIGINT => Some(Self::End),
            // Somebody closed the terminal that it was started in.
            Signal::SIGHUP if std::io::stdin().is_terminal() => Some(Self::End),
            Signal::SIGHUP => Some(Self::Look),
            Signal::SIGUSR1 => Some(Self::Collect),
            _ => None,
        }
    }
}

/// What signals tell from now on.
fn listen(session: Option<&Session>) -> Result<UnboundedReceiver<Told>, Failure> {
    let (teller, told) = unbounded_channel();
    let Some(session) = session else {
        for (kind, known) in [
            (SignalKind::terminate(), Signal::SIGTERM),
            (SignalKind::interrupt(), Signal::SIGINT),
            (SignalKind::hangup(), Signal::SIGHUP),
            (SignalKind::user_defined1(), Signal::SIGUSR1),
        ] {
            forward(kind, known, teller.clone())?;
        }
        return Ok(told);
    };
    // There one thread waits for all signals.
    session.proxy_signals(move |signal| match Told::of(signal) {
        Some(told) => teller.send(told).is_ok(),
        None => false,
    });
    Ok(told)
}

fn forward(kind: SignalKind, known: Signal, teller: UnboundedSender<Told>) -> Result<(), Failure> {
    let mut signals =
        signal(kind).map_err(|error| Failure::store(format!("signals cannot be waited for: {error}")))?;
    tokio::spawn(async move {
        while signals.recv().await.is_some() {
            if let Some(told) = Told::of(known)
                && teller.send(told).is_err()
            {
                return;
            }
        }
    });
    Ok(())
}

/// Does what it is told until that is to end.
async fn obey(
    mut told: UnboundedReceiver<Told>,
    control: &Control,
    config: Option<&Path>,
    has_accounts: bool,
    policy: &Collection,
) {
    while let Some(what) = told.recv().await {
        match what {
            Told::End => return,
            Told::Look => look(control, config, has_accounts),
            Told::Collect => {
                let (control, policy) = (control.clone(), policy.clone());
                // It may take long, and does not keep this from ending.
                tokio::spawn(async move { say(&collected(control.collect(&policy).await)) });
            }
        }
    }
}

/// Reads again what can change while it runs. What is of no use changes nothing.
fn look(control: &Control, config: Option<&Path>, has_accounts: bool) {
    control.look_at_files();
    if config.is_some() {
        match settings::read(config).and_then(|file| file.rights(has_accounts)) {
            Ok(rights) => control.set_rights(rights),
            Err(failure) => {
                say(&format!("warning: the rights from before stay in use\n{}", failure.render()));
            }
        }
    }
    say("accounts, certificates and rights were read again\n");
}

fn collected(done: Result<Collected, DirectoryError>) -> String {
    match done {
        Ok(Collected { manifests, blobs, bytes, damaged }) => {
            let done = format!(
                "garbage collection removed {manifests} manifests and {blobs} blobs, {}\n",
                human_size(bytes)
            );
            if damaged == 0 { done } else { format!("{done}warning: {}: {damaged}\n", collect::LEFT) }
        }
        Err(error) => format!("warning: garbage was not collected\n{}", Failure::from(error).render()),
    }
}
