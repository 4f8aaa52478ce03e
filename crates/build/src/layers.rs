//! Diff IDs of snapshots: computed beside the build, never as a file.

use std::collections::HashMap;
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, PoisonError};

use kiln_content::{LayerRecord, Store};
use kiln_layer::{DiffOptions, Following, TreeForm, Written};
use kiln_oci::SnapshotId;
use kiln_snapshotter::{Form, Snapshotter};
use tokio::task::JoinHandle;

use crate::BuildError;
use crate::ops::StatesFile;

/// Hashes committed snapshots in the background.
pub(crate) struct Layers {
    store: Arc<Store>,
    snapshots: Arc<dyn Snapshotter>,
    pending: Mutex<HashMap<SnapshotId, JoinHandle<Result<LayerRecord, BuildError>>>>,
}

/// The hash of a snapshot that began with its files.
pub(crate) struct UnderWay {
    pub(crate) following: Following,
    /// Where to keep the states that it had on the way; `None`: nowhere.
    pub(crate) states_file: Option<StatesFile>,
}

impl Layers {
    pub(crate) fn new(store: Arc<Store>, snapshots: Arc<dyn Snapshotter>) -> Self {
        Self { store, snapshots, pending: Mutex::default() }
    }

    /// Starts hashing `snapshot`, or waits for what began with its files. Must be called within the
    /// runtime.
    pub(crate) fn start(&self, snapshot: &SnapshotId, under_way: Option<UnderWay>) {
        let (store, snapshots, id) = (self.store.clone(), self.snapshots.clone(), snapshot.clone());
        let task = tokio::task::spawn_blocking(move || {
            let followed = under_way.and_then(|UnderWay { following, states_file }| {
                let followed = following.wait()?;
                if let (Some(file), Some(states)) = (states_file, &followed.states) {
                    file.save(&id, states);
                }
                Some(followed)
            });
            match followed {
                Some(followed) => save(&store, &id, &followed.written),
                None => describe(&store, &*snapshots, &id),
            }
        });
        self.pending.lock().unwrap_or_else(PoisonError::into_inner).insert(snapshot.clone(), task);
    }

    /// Takes for `snapshot` what is or will be known of the layer of `same`, whose changes are the
    /// same. Must be called within the runtime.
    pub(crate) fn start_as(&self, snapshot: &SnapshotId, same: &SnapshotId) {
        let mut pending = self.pending.lock().unwrap_or_else(PoisonError::into_inner);
        let (hashing, store, snapshots) = (pending.remove(same), self.store.clone(), self.snapshots.clone());
        let (id, same) = (snapshot.clone(), same.clone());
        let task = tokio::spawn(async move {
            let bug = |_| BuildError::Bug { what: "hashing a layer panicked".to_owned() };
            if let Some(hashing) = hashing {
                hashing.await.map_err(bug)??;
            }
            let work = move || {
                let record = LayerRecord { snapshot: id, ..describe(&store, &*snapshots, &same)? };
                store.put_layer(&record)?;
                Ok(record)
            };
            tokio::task::spawn_blocking(work).await.map_err(bug)?
        });
        pending.insert(snapshot.clone(), task);
    }

    /// What is known of `snapshot`'s layer; waits for, or does, what is not known yet.
    pub(crate) async fn record(&self, snapshot: &SnapshotId) -> Result<LayerRecord, BuildError> {
        let task = self.pending.lock().unwrap_or_else(PoisonError::into_inner).remove(snapshot);
        let task = match task {
            Some(task) => task,
            None => {
                if let Some(record) = self.store.layer(snapshot)? {
                    return Ok(record);
                }
                let (store, snapshots, id) = (self.store.clone(), self.snapshots.clone(), snapshot.clone());
                tokio::task::spawn_blocking(move || describe(&store, &*snapshots, &id))
            }
        };
        task.await.map_err(|_| BuildError::Bug { what: "hashing a layer panicked".to_owned() })?
    }
}

/// The layer record of `snapshot`, made and saved when there is none.
pub(crate) fn describe(
    store: &Store,
    snapshots: &dyn Snapshotter,
    snapshot: &SnapshotId,
) -> Result<LayerRecord, BuildError> {
    if let Some(record) = store.layer(snapshot)? {
        return Ok(record);
    }
    save(store, snapshot, &write_tar(snapshots, snapshot, io::sink())?)
}

fn save(store: &Store, snapshot: &SnapshotId, written: &Written) -> Result<LayerRecord, BuildError> {
    let record = LayerRecord {
        snapshot: snapshot.clone(),
        diff_id: written.diff_id,
        size_bytes: written.tar_size_bytes,
        blob: None,
    };
    store.put_layer(&record)?;
    Ok(record)
}

/// Writes the layer tar of `snapshot`: a pure function of the snapshot. No state of an earlier hash counts.
pub(crate) fn write_tar(
    snapshots: &dyn Snapshotter,
    snapshot: &SnapshotId,
    out: impl Write,
) -> Result<Written, BuildError> {
    let changes = snapshots.open_changes(snapshot)?;
    let never = AtomicBool::new(false);
    let (form, parent) = match changes.form {
        Form::OverlayUpper => (TreeForm::OverlayUpper, None),
        Form::Tree { parent } => (TreeForm::Plain, parent),
    };
    let options = DiffOptions { form, root_entry: false, cancel: &never };
    Ok(match parent {
        Some(parent) => kiln_layer::diff_trees(parent.as_fd(), changes.dir.as_fd(), out, &options)?,
        None => kiln_layer::diff(changes.dir.as_fd(), out, &options)?,
    })
}
