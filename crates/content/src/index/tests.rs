//! Every kind of damage to the index and its journal, and what is known afterwards.

use kiln_oci::{Digest, Reference};

use super::*;
use crate::store::tests::new_store;
use crate::{CacheRecord, ImageRecord, LayerRecord, Store};

const NAMES: [&str; 3] = ["app:1", "app:2", "base:latest"];

/// A store with a few hundred records, some replaced and some removed.
fn fill(root: &Path) {
    let store = Store::open(root).unwrap();
    for number in 0..200 {
        let digest = Digest::of(format!("{number}").as_bytes());
        let snapshot: kiln_oci::SnapshotId = format!("s-{number}").parse().unwrap();
        let cached = CacheRecord {
            canonical: digest,
            snapshot: snapshot.clone(),
            created_unix: 1,
            description: format!("RUN step {number} \"with\\quotes\" and 'ümläuts'"),
        };
        store.cache_put(&[digest], &cached, false).unwrap();
        if number % 7 == 0 {
            store.cache_forget_snapshot(&snapshot).unwrap();
        }
        let diff_id = kiln_oci::DiffId(digest);
        store.put_layer(&LayerRecord { snapshot, diff_id, size_bytes: number, blob: None }).unwrap();
    }
    for (at, name) in NAMES.iter().enumerate() {
        let config = Digest::of(name.as_bytes());
        let snapshot = Some(format!("s-{at}").parse().unwrap());
        let image = ImageRecord { config, manifest: config, snapshot, size_bytes: 5, created_unix: 6 };
        store.put_image(&image).unwrap();
        store.set_name(&name.parse().unwrap(), &image).unwrap();
        if at == 0 {
            store.set_name(&"gone:1".parse().unwrap(), &image).unwrap();
        }
    }
    let first = Digest::of(NAMES[0].as_bytes());
    assert!(store.remove_name(&"gone:1".parse().unwrap(), &first).unwrap());
    store.barrier().unwrap();
}

/// Index and journal in a place of their own; the index's log is left out.
fn copy_of(root: &Path) -> tempfile::TempDir {
    let copy = tempfile::tempdir().unwrap();
    for sub in ["db", "locks", "ingest"] {
        fs::create_dir(copy.path().join(sub)).unwrap();
    }
    for file in ["db/meta.sqlite", "db/journal"] {
        fs::copy(root.join(file), copy.path().join(file)).unwrap();
    }
    copy
}

/// Opens the store and checks that it knows what [`fill`] told it.
#[track_caller]
fn check(root: &Path) -> Option<Rebuilt> {
    let store = Store::open(root).unwrap();
    for name in NAMES {
        let reference: Reference = name.parse().unwrap();
        assert_eq!(store.resolve(&reference).unwrap().unwrap().config, Digest::of(name.as_bytes()));
    }
    assert_eq!(store.resolve(&"gone:1".parse().unwrap()).unwrap(), None);
    for number in 0..200 {
        let digest = Digest::of(format!("{number}").as_bytes());
        let snapshot = format!("s-{number}").parse().unwrap();
        assert_eq!(store.cache_get(&digest).unwrap().is_some(), number % 7 != 0, "{number}");
        assert_eq!(store.layer(&snapshot).unwrap().unwrap().size_bytes, number);
    }
    assert_eq!(store.find_index_damage().unwrap(), None);
    store.rebuilt().cloned()
}

#[test]
fn index_is_made_anew_after_any_damage_and_once() {
    let pages = |bytes: &mut Vec<u8>, one: usize, other: usize| {
        let (one, other) = (one * 4096, other * 4096);
        for at in 0..4096 {
            bytes.swap(one + at, other + at);
        }
    };
    let noise = |seed: u64| {
        let mut state = seed;
        std::iter::repeat_with(move || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 56) as u8
        })
    };
    type Damage = Box<dyn Fn(&mut Vec<u8>)>;
    let mut damages: Vec<(String, Damage)> = vec![
        ("empty".into(), Box::new(|bytes| bytes.clear())),
        ("a few bytes".into(), Box::new(|bytes| bytes.truncate(50))),
        ("one page".into(), Box::new(|bytes| bytes.truncate(4096))),
        ("half of it".into(), Box::new(|bytes| bytes.truncate(bytes.len() / 2))),
        ("half a page less".into(), Box::new(|bytes| bytes.truncate(bytes.len() - 2048))),
        (
            "random bytes".into(),
            Box::new(move |bytes| bytes.iter_mut().zip(noise(1)).for_each(|(b, n)| *b = n)),
        ),
        ("zeros".into(), Box::new(|bytes| bytes.fill(0))),
        ("text".into(), Box::new(|bytes| *bytes = b"SQLite format 3, honestly".to_vec())),
        (
            "a random page".into(),
            Box::new(move |bytes| bytes[8192..12288].iter_mut().zip(noise(2)).for_each(|(b, n)| *b = n)),
        ),
    ];
    for (one, other) in [(1, 2), (2, 5), (3, 9)] {
        damages.push((format!("pages {one} and {other}"), Box::new(move |bytes| pages(bytes, one, other))));
    }
    let whole = tempfile::tempdir().unwrap();
    fill(whole.path());
    for (what, damage) in damages {
        let dir = copy_of(whole.path());
        let index = dir.path().join("db/meta.sqlite");
        let mut bytes = fs::read(&index).unwrap();
        damage(&mut bytes);
        fs::write(&index, bytes).unwrap();
        let rebuilt = check(dir.path());
        assert!(rebuilt.as_ref().is_some_and(|rebuilt| rebuilt.lost_lines == 0), "{what}: {rebuilt:?}");
        assert_eq!(check(dir.path()), None, "{what}: once is enough");
    }
}

#[test]
fn missing_index_is_made_anew() {
    let dir = tempfile::tempdir().unwrap();
    fill(dir.path());
    fs::remove_file(dir.path().join("db/meta.sqlite")).unwrap();
    let rebuilt = check(dir.path()).unwrap();
    assert_eq!(rebuilt.to_string().split(';').next(), Some("the store's index is missing"));
}

#[test]
fn flipped_bits_in_the_index_are_noticed() {
    let dir = tempfile::tempdir().unwrap();
    fill(dir.path());
    let index = dir.path().join("db/meta.sqlite");
    let whole = fs::read(&index).unwrap();
    let step = whole.len() / 60;
    for at in (100..whole.len()).step_by(step) {
        let mut bytes = whole.clone();
        bytes[at] ^= 0x10;
        fs::write(&index, bytes).unwrap();
        // It may be in a part that means nothing.
        check(dir.path());
    }
}

#[test]
fn damaged_or_missing_journal_is_written_anew() {
    let whole = tempfile::tempdir().unwrap();
    fill(whole.path());
    for keep in [None, Some(0), Some(10), Some(1000)] {
        let dir = copy_of(whole.path());
        let journal = dir.path().join("db/journal");
        let mut bytes = fs::read(&journal).unwrap();
        match keep {
            None => fs::remove_file(&journal).unwrap(),
            Some(keep) => {
                bytes.truncate(keep);
                fs::write(&journal, &bytes).unwrap();
            }
        }
        assert_eq!(check(dir.path()), None, "{keep:?}");
        // And it is a whole one again.
        fs::remove_file(dir.path().join("db/meta.sqlite")).unwrap();
        assert_eq!(check(dir.path()).unwrap().lost_lines, 0, "{keep:?}");
    }
}

#[test]
fn damaged_line_costs_that_line_only() {
    let dir = tempfile::tempdir().unwrap();
    fill(dir.path());
    fs::remove_file(dir.path().join("db/meta.sqlite")).unwrap();
    let journal = dir.path().join("db/journal");
    let mut bytes = fs::read(&journal).unwrap();
    // The removal of a name.
    let at = bytes.windows(9).rposition(|bytes| bytes == b"\"delete\":").unwrap();
    bytes[at + 2] ^= 1;
    fs::write(&journal, bytes).unwrap();
    let store = Store::open(dir.path()).unwrap();
    assert_eq!(store.rebuilt().unwrap().lost_lines, 1);
    assert!(store.resolve(&"gone:1".parse().unwrap()).unwrap().is_some());
    assert!(store.resolve(&"app:1".parse().unwrap()).unwrap().is_some());
}

#[test]
fn lost_log_of_the_index_is_made_up_for() {
    let dir = tempfile::tempdir().unwrap();
    // Never closed, as by kill -9: all of it is in the log still.
    let store = Store::open(dir.path()).unwrap();
    let digest = Digest::of(b"x");
    let image =
        ImageRecord { config: digest, manifest: digest, snapshot: None, size_bytes: 5, created_unix: 6 };
    store.put_image(&image).unwrap();
    let copy = copy_of(dir.path());
    let store = Store::open(copy.path()).unwrap();
    assert_eq!(store.image(&digest).unwrap(), Some(image));
}

#[test]
fn torn_last_line_is_cut_off() {
    let dir = tempfile::tempdir().unwrap();
    fill(dir.path());
    let journal = dir.path().join("db/journal");
    let mut bytes = fs::read(&journal).unwrap();
    bytes.extend_from_slice(b"0123456789abcdef {\"put\":\"na");
    fs::write(&journal, &bytes).unwrap();
    assert_eq!(check(dir.path()), None);
    let store = Store::open(dir.path()).unwrap();
    let name = "app:2".parse().unwrap();
    let image = store.resolve(&name).unwrap().unwrap();
    assert!(store.remove_name(&name, &image.config).unwrap());
    drop(store);
    fs::remove_file(dir.path().join("db/meta.sqlite")).unwrap();
    let store = Store::open(dir.path()).unwrap();
    assert_eq!(store.rebuilt().unwrap().lost_lines, 0);
    assert_eq!(store.resolve(&"app:2".parse().unwrap()).unwrap(), None);
}

#[test]
fn newer_journal_is_refused_and_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    fill(dir.path());
    fs::remove_file(dir.path().join("db/meta.sqlite")).unwrap();
    let journal = dir.path().join("db/journal");
    let text = fs::read_to_string(&journal).unwrap().replacen("kiln-journal 1 ", "kiln-journal 2 ", 1);
    fs::write(&journal, &text).unwrap();
    assert!(matches!(Store::open(dir.path()), Err(Error::NewerStore { found: 2, .. })));
    assert_eq!(fs::read_to_string(&journal).unwrap(), text);
    assert!(!dir.path().join("db/meta.sqlite").exists());
}

#[test]
fn journal_is_rewritten_when_most_of_it_is_history() {
    let (dir, store) = new_store();
    let key = Digest::of(b"key");
    let record = |number: usize| CacheRecord {
        canonical: key,
        snapshot: "s".parse().unwrap(),
        created_unix: 1,
        description: format!("{number} {}", "x".repeat(8000)),
    };
    let journal = dir.path().join("db/journal");
    let (mut largest, mut rewritten) = (0, false);
    for number in 0..1000 {
        store.cache_put(&[key], &record(number), true).unwrap();
        let size = fs::metadata(&journal).unwrap().len();
        rewritten |= size < largest;
        largest = size.max(largest);
    }
    assert!(rewritten, "{largest} bytes");
    assert!(largest < 5 << 20, "{largest} bytes");
    drop(store);
    fs::remove_file(dir.path().join("db/meta.sqlite")).unwrap();
    let store = Store::open(dir.path()).unwrap();
    assert_eq!(store.cache_get(&key).unwrap(), Some(record(999)));
    assert_eq!(store.rebuilt().unwrap().records, 1);
}

#[test]
fn two_handles_append_to_one_journal_across_its_rewriting() {
    let dir = tempfile::tempdir().unwrap();
    let (one, other) = (Store::open(dir.path()).unwrap(), Store::open(dir.path()).unwrap());
    let put = |store: &Store, text: &str| {
        let config = Digest::of(text.as_bytes());
        let image = ImageRecord { config, manifest: config, snapshot: None, size_bytes: 5, created_unix: 6 };
        store.put_image(&image).unwrap();
    };
    put(&one, "a");
    put(&other, "b");
    // The first who writes finds it gone.
    fs::remove_file(dir.path().join("db/journal")).unwrap();
    put(&one, "c");
    put(&other, "d");
    drop((one, other));
    fs::remove_file(dir.path().join("db/meta.sqlite")).unwrap();
    let store = Store::open(dir.path()).unwrap();
    assert_eq!(store.images().unwrap().len(), 4);
    assert_eq!(store.rebuilt().unwrap().lost_lines, 0);
}

#[test]
fn index_made_anew_is_quick() {
    let (dir, store) = new_store();
    let keys: Vec<Digest> = (0..10_000).map(|number: u32| Digest::of(&number.to_le_bytes())).collect();
    let record = CacheRecord {
        canonical: keys[0],
        snapshot: "s".parse().unwrap(),
        created_unix: 1,
        description: "RUN true".into(),
    };
    store.cache_put(&keys, &record, false).unwrap();
    drop(store);
    fs::remove_file(dir.path().join("db/meta.sqlite")).unwrap();
    let started = std::time::Instant::now();
    let store = Store::open(dir.path()).unwrap();
    assert_eq!(store.rebuilt().unwrap().records, 10_000);
    // Each for itself would take minutes.
    assert!(started.elapsed() < Duration::from_secs(30), "{:?}", started.elapsed());
}
