//! A registry of a test's own.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use kiln_registry_server::{Collected, Collection, Content, Control, Limits, Server, Settings};
use tempfile::TempDir;
use tokio::runtime::Runtime;
use tokio::sync::oneshot;

use crate::client::Client;

/// It ends with this value.
pub(crate) struct Lab {
    dir: Arc<TempDir>,
    pub(crate) address: SocketAddr,
    pub(crate) control: Control,
    /// What it said without being asked.
    pub(crate) said: Arc<Mutex<Vec<String>>>,
    runtime: Option<Runtime>,
    end: Option<oneshot::Sender<()>>,
    ended: Option<oneshot::Receiver<()>>,
}

impl Lab {
    /// One that lets everybody do everything.
    pub(crate) fn new() -> Self {
        Self::with(|_| {})
    }

    pub(crate) fn with(change: impl FnOnce(&mut Settings)) -> Self {
        Self::on(Arc::new(tempfile::tempdir().expect("temporary directories can be made")), change)
    }

    /// On the directory of another one, which ended.
    pub(crate) fn on(dir: Arc<TempDir>, change: impl FnOnce(&mut Settings)) -> Self {
        let mut settings = settings(&dir.path().join("registry"));
        change(&mut settings);
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .max_blocking_threads(16)
            .enable_all()
            .build()
            .expect("threads can be started");
        let server = runtime.block_on(Server::bind(settings)).expect("it starts");
        let (address, control) = (server.address(), server.control());
        let said = Arc::new(Mutex::new(Vec::new()));
        let to = said.clone();
        let (end, stop) = oneshot::channel::<()>();
        let (say, ended) = oneshot::channel();
        runtime.spawn(async move {
            let stop = async move { drop(stop.await) };
            let report = move |problem| to.lock().expect("nobody panics there").push(problem);
            server.run(stop, report).await;
            let _ = say.send(());
        });
        let (runtime, end, ended) = (Some(runtime), Some(end), Some(ended));
        Self { dir, address, control, said, runtime, end, ended }
    }

    pub(crate) fn client(&self) -> Client {
        Client::new(self.address)
    }

    /// What is below its directory.
    pub(crate) fn at(&self, path: &str) -> PathBuf {
        self.dir.path().join("registry").join(path)
    }

    pub(crate) fn dir(&self) -> Arc<TempDir> {
        self.dir.clone()
    }

    /// Tells it to end, and goes on.
    pub(crate) fn tell(&mut self) {
        drop(self.end.take());
    }

    /// Waits until it has ended.
    pub(crate) fn wait(&mut self) {
        let (runtime, ended) = (self.runtime.as_ref(), self.ended.take());
        if let (Some(runtime), Some(ended)) = (runtime, ended) {
            let _ = runtime.block_on(ended);
        }
    }

    /// What a collection on this directory removes; the registry ends for it.
    pub(crate) fn collect(mut self, policy: &Collection) -> (Collected, Arc<TempDir>) {
        self.tell();
        self.wait();
        let dir = self.dir.clone();
        drop(self);
        let runtime = Runtime::new().expect("threads can be started");
        let collected = runtime.block_on(async {
            let server = Server::bind(settings(&dir.path().join("registry"))).await.expect("it starts");
            server.control().collect(policy).await.expect("nothing is damaged")
        });
        (collected, dir)
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        self.tell();
        self.wait();
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_timeout(Duration::from_secs(10));
        }
    }
}

pub(crate) fn settings(directory: &Path) -> Settings {
    Settings {
        content: Content::Directory(directory.to_owned()),
        listen: "127.0.0.1:0".parse().expect("an address"),
        tls: None,
        accounts: None,
        rights: Vec::new(),
        read_only: false,
        mirror: None,
        limits: Limits { drain: Duration::from_secs(1), ..Limits::default() },
        collection: Collection { every: None, ..Collection::default() },
    }
}

/// A file beside the directory.
pub(crate) fn beside(settings: &Settings, name: &str) -> PathBuf {
    match &settings.content {
        Content::Directory(directory) => directory.with_file_name(name),
        Content::Pushed { directory, .. } => directory.with_file_name(name),
        Content::Images(_) => panic!("images have no directory"),
    }
}

/// A file below a directory, with everything above it.
pub(crate) fn files(dir: &Path) -> Vec<String> {
    let mut found = Vec::new();
    let mut open = vec![dir.to_owned()];
    while let Some(dir) = open.pop() {
        for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
            match entry.path() {
                path if path.is_dir() => open.push(path),
                path => found.push(path.to_string_lossy().into_owned()),
            }
        }
    }
    found.sort();
    found
}
