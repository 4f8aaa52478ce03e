//! Names, cached results and trees from outside, by one handle and by many.

use super::*;
use crate::store::tests::new_store;

fn record(text: &str) -> ImageRecord {
    let digest = Digest::of(text.as_bytes());
    let snapshot = Some("s-1".parse().unwrap());
    ImageRecord { config: digest, manifest: digest, snapshot, size_bytes: 7, created_unix: 9 }
}

#[test]
fn names_lead_to_images_and_move() {
    let (_dir, store) = new_store();
    let name: Reference = "app:1".parse().unwrap();
    let (old, new) = (record("old"), record("new"));
    store.put_image(&old).unwrap();
    store.put_image(&new).unwrap();
    store.set_name(&name, &old).unwrap();
    assert_eq!(store.resolve(&name).unwrap(), Some(old.clone()));
    assert_eq!(store.config_of(&name).unwrap(), Some(old.config));
    store.set_name(&name, &new).unwrap();
    assert_eq!(store.names_of(&new.config).unwrap(), std::slice::from_ref(&name));
    assert!(store.names_of(&old.config).unwrap().is_empty());
    assert_eq!(store.find_by_prefix(&old.config.hex()[..8]).unwrap(), std::slice::from_ref(&old));
    assert!(!store.remove_name(&name, &old.config).unwrap(), "it leads elsewhere");
    assert!(store.remove_name(&name, &new.config).unwrap());
    assert!(!store.remove_name(&name, &new.config).unwrap());
    assert_eq!((store.resolve(&name).unwrap(), store.config_of(&name).unwrap()), (None, None));
}

#[test]
fn names_are_listed_without_a_pin() {
    let (_dir, store) = new_store();
    let image = record("image");
    let names: [Reference; 2] = ["b:1", "a:1"].map(|name| name.parse().unwrap());
    for name in &names {
        store.set_name(name, &image).unwrap();
    }
    let [second, first] = names;
    assert_eq!(store.names().unwrap(), [(first, image.clone()), (second, image)]);
    assert!(store.held_snapshots().is_empty());
}

#[test]
fn first_cached_result_stays_unless_replaced() {
    let (_dir, store) = new_store();
    let key = Digest::of(b"key");
    let result = |name: &str| CacheRecord {
        canonical: key,
        snapshot: name.parse().unwrap(),
        created_unix: 1,
        description: "RUN true".to_owned(),
    };
    store.cache_put(&[key], &result("first"), false).unwrap();
    store.cache_put(&[key], &result("second"), false).unwrap();
    assert_eq!(store.cache_get(&key).unwrap(), Some(result("first")));
    store.cache_put(&[key], &result("third"), true).unwrap();
    assert_eq!(store.cache_get(&key).unwrap(), Some(result("third")));
    store.cache_forget_snapshot(&"third".parse().unwrap()).unwrap();
    assert_eq!(store.cache_get(&key).unwrap(), None);
}

#[test]
fn newest_tree_from_outside_replaces_the_older_one() {
    let (_dir, store) = new_store();
    let key = Digest::of(b"https://host/file");
    let record = |etag: Option<&str>| SourceRecord {
        snapshot: "s".parse().unwrap(),
        content: etag.map(|etag| Digest::of(etag.as_bytes())),
        etag: etag.map(str::to_owned),
        last_modified: None,
        created_unix: 3,
    };
    store.put_source(&key, &record(Some("\"1\""))).unwrap();
    assert_eq!(store.source(&key).unwrap(), Some(record(Some("\"1\""))));
    store.put_source(&key, &record(None)).unwrap();
    assert_eq!(store.source(&key).unwrap(), Some(record(None)));
    assert_eq!(store.source(&Digest::of(b"other")).unwrap(), None);
}

#[test]
fn two_processes_worth_of_handles_write_side_by_side() {
    let dir = tempfile::tempdir().unwrap();
    let threads: Vec<_> = (0..4)
        .map(|thread| {
            let root = dir.path().to_owned();
            std::thread::spawn(move || {
                let store = Store::open(&root).unwrap();
                for number in 0..50 {
                    store.put_image(&record(&format!("{thread}-{number}"))).unwrap();
                }
            })
        })
        .collect();
    threads.into_iter().for_each(|thread| thread.join().unwrap());
    assert_eq!(Store::open(dir.path()).unwrap().images().unwrap().len(), 200);
}
