use std::fs::File;
use std::os::fd::AsFd;
use std::sync::atomic::AtomicBool;

use kiln_content::LayerRecord;
use kiln_layer::{CopyRequest, Follower, LookedAt, ScanOptions, TopDir, copy, scan};
use kiln_oci::{DiffId, Digest};

use super::*;

/// The states of a small layer.
fn states() -> HashStates {
    let (from, to) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    fs::write(from.path().join("file"), "content").unwrap();
    let cancel = AtomicBool::new(false);
    let (source, target) = (File::open(from.path()).unwrap(), File::open(to.path()).unwrap());
    let options = ScanOptions { hash: true, filter: None, stat_cache: None, cancel: &cancel };
    let entries = scan(source.as_fd(), b"", &options).unwrap();
    let follower = Follower::start(target.try_clone().unwrap().into(), None).unwrap();
    copy(&CopyRequest {
        looked_at: Some(LookedAt::now()),
        follower: Some(&follower),
        top: TopDir::Contents,
        ..CopyRequest::tree(source.as_fd(), &entries, target.as_fd(), &cancel)
    })
    .unwrap();
    follower.complete().wait().unwrap().states.unwrap()
}

#[test]
fn states_come_back_for_their_layer_and_damaged_ones_do_not() {
    let dir = tempfile::tempdir().unwrap();
    let file = StatesFile(dir.path().join("hash-states/name"));
    let store = Store::open(&dir.path().join("store")).unwrap();
    let [id, other]: [SnapshotId; 2] = ["snapshot-1", "snapshot-2"].map(|id| id.parse().unwrap());
    let states = states();
    let record = |snapshot: &SnapshotId, diff_id| {
        let record = LayerRecord { snapshot: snapshot.clone(), diff_id, size_bytes: 1, blob: None };
        store.put_layer(&record).unwrap();
    };
    let read = |id| file.read(&store, id);
    record(&other, states.diff_id());
    file.save(&id, &states);
    assert_eq!((read(&id), read(&other)), (None, None), "the layer has no record");
    record(&id, DiffId(Digest::of(b"another")));
    assert_eq!((read(&id), read(&other)), (None, None), "the layer is another");
    record(&id, states.diff_id());
    assert_eq!((read(&id), read(&other)), (Some(states.clone()), None));
    let whole = encode(&id, &states);
    for at in 0..whole.len() {
        let mut damaged = whole.clone();
        damaged[at] ^= 1;
        assert_eq!(decode(&damaged), None, "byte {at}");
        assert_eq!(decode(&whole[..at]), None, "cut at {at}");
    }
    file.save(&other, &states);
    assert_eq!((read(&id), read(&other)), (None, Some(states)));
    fs::remove_file(&file.0).unwrap();
    assert_eq!(read(&other), None);
}

#[test]
fn a_sum_that_is_right_does_not_make_states_of_other_bytes() {
    let id: SnapshotId = "snapshot-1".parse().unwrap();
    let whole = encode(&id, &states());
    let body = whole.len() - DIGEST;
    // What stands in the record of the last state is that of the hash; the diff ID in front tells.
    for at in [0, body - 1, body - 40, body - 100, MAGIC.len() + 8 + id.as_str().len() + 4] {
        let mut lying = whole[..body].to_vec();
        lying[at] ^= 1;
        let checksum = blake3::hash(&lying);
        lying.extend_from_slice(checksum.as_bytes());
        assert_eq!(decode(&lying), None, "byte {at}");
    }
}
