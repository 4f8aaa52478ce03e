//! The handles every command works with: store, snapshots, processes.

use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use kiln_content::{Lease, Store};
use kiln_executor::Executor;
use kiln_layer::{Limits, TreeForm};
use kiln_oci::{ActiveKey, Digest, SnapshotId};
use kiln_snapshotter::{LayerForm, Snapshotter};

use crate::BuildError;

/// Store, snapshots and processes of one kiln process, and the lease that protects its work.
#[derive(Clone)]
pub struct Engine {
    /// Blobs and metadata.
    pub store: Arc<Store>,
    /// File trees.
    pub snapshots: Arc<dyn Snapshotter>,
    /// Runs processes.
    pub executor: Arc<dyn Executor>,
    /// How much layers and archives may ask for.
    pub limits: Limits,
    /// Images that were found when the index and its journal were lost, and whose names are lost.
    pub nameless: Vec<Digest>,
    lease: Arc<Lease>,
}

impl Engine {
    /// Takes a lease in `store` and clears what dead processes left behind.
    ///
    /// Costs two directory listings when there is nothing to clear.
    ///
    /// # Errors
    /// When the store cannot be written.
    pub fn new(
        store: Arc<Store>,
        snapshots: Arc<dyn Snapshotter>,
        executor: Arc<dyn Executor>,
    ) -> Result<Self, BuildError> {
        let lease = Arc::new(store.lease()?);
        let (limits, nameless) = (Limits::default(), Vec::new());
        let mut engine = Self { store, snapshots, executor, limits, nameless, lease };
        engine.sweep()?;
        if engine.store.unproven()?.is_some() {
            engine.prove()?;
        }
        Ok(engine)
    }

    /// The same store for another job, whose pins go with the value: for processes that live long.
    ///
    /// # Errors
    /// As [`Store::open`].
    pub fn for_job(&self) -> Result<Self, BuildError> {
        let store = Arc::new(Store::open(self.store.root())?);
        Ok(Self { store, ..self.clone() })
    }

    /// Compares the records of an index that was made anew with the data, whoever made it: a process
    /// that was killed, or could not see everything, leaves it to the next.
    fn prove(&mut self) -> Result<(), BuildError> {
        let _turn = self.store.prove_turn()?;
        // Another process may have come first.
        let Some(salvaged) = self.store.unproven()? else { return Ok(()) };
        // The journal says what was put there, not what is there still.
        crate::fsck::drop_dangling(self)?;
        if salvaged {
            crate::fsck::drop_unproven(self)?;
            self.nameless = crate::fsck::find_nameless(self)?;
            self.store.barrier()?;
        }
        Ok(self.store.mark_proven()?)
    }

    /// Removes active snapshots and half-written blobs whose owner is dead: what `kill -9` left.
    fn sweep(&self) -> Result<(), BuildError> {
        for key in self.snapshots.active()? {
            if self.store.is_key_live(&key) {
                continue;
            }
            match self.snapshots.remove_active(&key) {
                // Another command sweeps, too.
                Ok(()) | Err(kiln_snapshotter::Error::NoActive(_)) => {}
                Err(error) => return Err(error.into()),
            }
        }
        self.store.sweep_ingest()?;
        Ok(())
    }

    /// Prepares an active snapshot that is removed again unless it is committed.
    pub fn prepare(&self, parent: Option<&SnapshotId>) -> Result<Active, BuildError> {
        parent.map(|parent| self.store.hold_snapshot(parent)).transpose()?;
        let key = self.lease.new_key();
        self.snapshots.prepare(&key, parent)?;
        Ok(Active { key: Some(key), engine: self.clone() })
    }
}

/// An active snapshot of this process; dropping it removes it.
pub struct Active {
    key: Option<ActiveKey>,
    engine: Engine,
}

impl Active {
    /// Its name.
    pub fn key(&self) -> &ActiveKey {
        self.key.as_ref().expect("the key is taken only by commit, which consumes the value")
    }

    /// Lets it stand on `parent`, as [`Snapshotter::set_parent`] does.
    ///
    /// # Errors
    /// Those of [`Snapshotter::set_parent`].
    pub fn set_parent(&self, parent: &SnapshotId, inherit_root: bool) -> Result<(), BuildError> {
        Ok(self.engine.snapshots.set_parent(self.key(), parent, inherit_root)?)
    }

    /// Takes out of it what a process on it had copied up and left as it is in `parent`, and returns
    /// how many files. Nobody may have it mounted any more.
    ///
    /// # Errors
    /// When its files or those of `parent` cannot be read.
    pub fn drop_unchanged(&self, parent: &SnapshotId, cancel: &AtomicBool) -> Result<usize, BuildError> {
        let snapshots = &self.engine.snapshots;
        // A backend of whole trees compares them anyhow.
        if snapshots.form() != LayerForm::Changes {
            return Ok(0);
        }
        let upper = snapshots.open_layer(self.key())?;
        let copied = kiln_layer::copied_up(upper.as_fd(), cancel)?;
        if copied.is_empty() {
            return Ok(0);
        }
        let lower = snapshots.open_view(parent)?;
        Ok(kiln_layer::drop_unchanged(upper.as_fd(), lower.as_fd(), &copied, cancel)?)
    }

    /// Records what is new in it, and has no owner on record, as `owner`'s; see
    /// [`kiln_layer::record_owner`]. Nobody may have it mounted any more.
    ///
    /// # Errors
    /// When its files cannot be read.
    pub fn record_owner(
        &self,
        parent: Option<&SnapshotId>,
        owner: (u32, u32),
        cancel: &AtomicBool,
    ) -> Result<(), BuildError> {
        let snapshots = &self.engine.snapshots;
        let upper = snapshots.open_layer(self.key())?;
        let form = match snapshots.form() {
            LayerForm::Changes => TreeForm::OverlayUpper,
            LayerForm::Tree => TreeForm::Plain,
        };
        let before = parent.map(|parent| snapshots.open_view(parent)).transpose()?;
        Ok(kiln_layer::record_owner(upper.as_fd(), form, before.as_ref().map(AsFd::as_fd), owner, cancel)?)
    }

    /// Commits it under a name of its own.
    ///
    /// # Errors
    /// When the file system refuses; the active snapshot is removed then.
    pub fn commit(mut self) -> Result<SnapshotId, BuildError> {
        let id = self.id()?;
        self.engine.snapshots.commit(self.key(), &id)?;
        self.key = None;
        Ok(id)
    }

    /// Commits it, untouched as it is, with the changes of `layer`.
    ///
    /// # Errors
    /// As [`Snapshotter::commit_layer`].
    pub fn commit_layer(mut self, layer: &SnapshotId) -> Result<SnapshotId, BuildError> {
        let id = self.id()?;
        self.engine.snapshots.commit_layer(self.key(), &id, layer)?;
        self.key = None;
        Ok(id)
    }

    /// Commits it in front of the changes of `full`.
    ///
    /// # Errors
    /// As [`Snapshotter::commit_delta`].
    pub fn commit_delta(mut self, full: &SnapshotId) -> Result<SnapshotId, BuildError> {
        let id = self.id()?;
        self.engine.snapshots.commit_delta(self.key(), &id, full)?;
        self.key = None;
        Ok(id)
    }

    /// Its name once it is committed, pinned before anybody can find it: garbage collection must not
    /// come before the first record.
    fn id(&self) -> Result<SnapshotId, BuildError> {
        let id = self.key().as_str().parse().expect("active keys and snapshot names share an alphabet");
        self.engine.store.hold_snapshot(&id)?;
        Ok(id)
    }
}

impl Drop for Active {
    fn drop(&mut self) {
        if let Some(key) = &self.key {
            // The next command sweeps what cannot be removed now.
            let _ = self.engine.snapshots.remove_active(key);
        }
    }
}

/// Seconds since 1970; 0 on a machine whose clock stands before that.
pub(crate) fn now_unix() -> i64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_secs()).unwrap_or(i64::MAX)
}

/// RFC 3339, as image configs carry it.
pub(crate) fn rfc3339(unix: i64) -> String {
    jiff::Timestamp::from_second(unix).unwrap_or(jiff::Timestamp::UNIX_EPOCH).to_string()
}
