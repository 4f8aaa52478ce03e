//! Who goes first, who stays, and the reasons given.

use std::time::Duration;

use kiln_content::{BlobFile, CacheRecord, ContainerUse, ImageRecord, LayerBlob, LayerRecord, Survey, Usage};

use super::*;
use crate::cache_mounts::CacheMountInfo;
use crate::world::{Node, Repository};

const NOW: i64 = 1_000_000;

/// A world of snapshots of 100 bytes each.
struct Sketch {
    world: World,
    used: Vec<Pinnable>,
}

fn id(name: &str) -> SnapshotId {
    name.parse().unwrap()
}

fn digest(name: &str) -> Digest {
    Digest::of(name.as_bytes())
}

impl Sketch {
    fn new() -> Self {
        let world = World {
            survey: Survey::default(),
            nodes: BTreeMap::new(),
            blobs: BTreeMap::new(),
            cache_mounts: Vec::new(),
            repositories: Vec::new(),
            active: Vec::new(),
            containers: Vec::new(),
            rest_bytes: 0,
        };
        Self { world, used: Vec::new() }
    }

    fn snapshot(&mut self, name: &str, parent: Option<&str>) {
        let node = Node { parent: parent.map(id), full: None, damaged: false, disk_bytes: 100 };
        self.world.nodes.insert(id(name), node);
    }

    /// A result of builds, last used so many seconds ago.
    fn cached(&mut self, name: &str, parent: Option<&str>, seconds_ago: i64) {
        self.snapshot(name, parent);
        let record = CacheRecord {
            canonical: digest(name),
            snapshot: id(name),
            created_unix: 1,
            description: format!("RUN {name}"),
        };
        self.world.survey.cache.push((digest(name), record));
        let last_used_unix = Some(NOW - seconds_ago);
        self.world.survey.usage.insert(id(name), Usage { last_used_unix, ..Usage::default() });
    }

    fn image(&mut self, name: &str, snapshot: &str, named: bool) {
        let config = digest(name);
        let image = ImageRecord {
            config,
            manifest: digest(&format!("{name} manifest")),
            snapshot: Some(id(snapshot)),
            size_bytes: 1,
            created_unix: NOW - 50,
        };
        for blob in [image.config, image.manifest] {
            self.world.blobs.insert(blob, BlobFile { size_bytes: 1, disk_bytes: 1 });
        }
        self.world.survey.images.push(image);
        if named {
            self.world.survey.names.push((name.parse().unwrap(), config));
        }
    }

    /// `kind title-or-id: reason` of what goes, in order.
    fn removed(&self, policy: &Policy) -> Vec<String> {
        self.judged(policy)
            .0
            .into_iter()
            .filter_map(|line| line.strip_prefix("- ").map(str::to_owned))
            .collect()
    }

    fn judged(&self, policy: &Policy) -> (Vec<String>, bool) {
        let in_use = |what: &Pinnable| Ok(self.used.contains(what));
        let plan = plan(&self.world, policy, NOW, Some(1000), &in_use).unwrap();
        let line = |object: &Object| {
            let mark = if object.verdict == Verdict::Remove { "-" } else { "+" };
            let name = if matches!(object.kind, Kind::Blob(_)) { "" } else { &object.id };
            let name = if matches!(object.kind, Kind::Image { .. }) { &object.title } else { name };
            format!("{mark} {} {name}: {}", object.kind.name(), object.reason)
        };
        (plan.objects.iter().map(line).collect(), plan.over_limit)
    }
}

fn kept_for(seconds: u64) -> Policy {
    Policy { keep: Some(Duration::from_secs(seconds)), ..Policy::default() }
}

#[test]
fn without_a_policy_only_the_unreachable_goes() {
    let mut sketch = Sketch::new();
    sketch.snapshot("lost", None);
    sketch.snapshot("lost-too", Some("lost"));
    sketch.cached("cached", None, 999_000);
    sketch.snapshot("base", None);
    sketch.image("app:1", "base", true);
    sketch.image("nameless", "base", false);
    sketch.world.blobs.insert(digest("stray"), BlobFile { size_bytes: 1, disk_bytes: 1 });
    let gone = [
        "layer lost-too: nothing refers to it",
        "layer lost: nothing refers to it",
        "blob : nothing refers to it",
    ];
    assert_eq!(sketch.removed(&Policy::default()), gone);
    let (judged, over) = sketch.judged(&Policy::default());
    assert!(!over);
    for line in [
        "+ image app:1: it has a name",
        "+ image <none>: it has no name, last used 50 seconds ago",
        "+ layer base: app:1 needs it",
        "+ result cached: cache, last used 11 days ago",
        "+ blob : an image or layer needs it",
    ] {
        assert!(judged.iter().any(|judged| judged == line), "{line} is not in {judged:#?}");
    }
}

#[test]
fn old_cache_goes_and_what_stands_on_it_goes_first() {
    let mut sketch = Sketch::new();
    sketch.cached("one", None, 500);
    sketch.cached("two", Some("one"), 400);
    sketch.cached("young", None, 10);
    // Older itself, but it was used with what stands on it.
    sketch.cached("below", None, 900);
    sketch.cached("above", Some("below"), 20);
    let gone = ["result two: cache, last used 6 minutes ago", "result one: cache, last used 6 minutes ago"];
    assert_eq!(sketch.removed(&kept_for(300)), gone);
    assert_eq!(sketch.removed(&kept_for(0)).len(), 5);
}

#[test]
fn a_limit_takes_the_least_recently_used_until_it_holds() {
    let mut sketch = Sketch::new();
    for (name, ago) in [("c", 300), ("a", 500), ("b", 400), ("d", 200)] {
        sketch.cached(name, None, ago);
    }
    let limit = |max| Policy { max_store_bytes: Some(max), ..Policy::default() };
    let names = |policy: &Policy| -> Vec<String> {
        let words =
            sketch.removed(policy).into_iter().map(|line| line.split([' ', ':']).nth(1).unwrap().to_owned());
        words.collect()
    };
    assert!(names(&limit(400)).is_empty());
    assert_eq!(names(&limit(399)), ["a"]);
    assert_eq!(names(&limit(150)), ["a", "b", "c"]);
    // 1000 bytes are free.
    let free = |min| Policy { min_free_bytes: Some(min), ..Policy::default() };
    assert_eq!(names(&free(1150)), ["a", "b"]);
    // What is kept for its age stays, whatever the limit is.
    let both = Policy { keep: Some(Duration::from_secs(450)), ..limit(0) };
    assert_eq!(names(&both), ["a"]);
    assert!(sketch.judged(&both).1, "the limit does not hold");
    assert!(!sketch.judged(&limit(150)).1);
}

#[test]
fn what_is_in_use_stays_with_what_it_stands_on() {
    let mut sketch = Sketch::new();
    sketch.cached("one", None, 500);
    sketch.cached("two", Some("one"), 500);
    sketch.cached("three", Some("two"), 500);
    sketch.used = vec![Pinnable::Snapshot(id("two"))];
    assert_eq!(sketch.removed(&kept_for(0)), ["result three: cache, last used 8 minutes ago"]);
    let (judged, _) = sketch.judged(&kept_for(0));
    assert!(judged.contains(&"+ result one: layer two stands on it".to_owned()), "{judged:#?}");
}

#[test]
fn images_without_a_name_go_before_their_files_and_names_only_when_asked() {
    let mut sketch = Sketch::new();
    sketch.snapshot("base", None);
    sketch.cached("step", Some("base"), 70);
    sketch.image("app:1", "base", true);
    sketch.image("nameless", "step", false);
    let gone = [
        "image <none>: it has no name, last used 50 seconds ago",
        "result step: cache, last used 50 seconds ago",
        "blob : nothing refers to it",
        "blob : nothing refers to it",
    ];
    assert_eq!(sketch.removed(&Policy::prune(false)), gone);
    let all = sketch.removed(&Policy::prune(true));
    assert!(all.contains(&"image app:1: no container uses it".to_owned()), "{all:?}");
    assert!(all.contains(&"layer base: nothing refers to it".to_owned()), "{all:?}");
    sketch.used = vec![Pinnable::Snapshot(id("base"))];
    assert_eq!(sketch.removed(&Policy::prune(true)), gone);
}

#[test]
fn what_a_delta_shows_stays_as_long_as_the_delta_and_goes_with_it() {
    let mut sketch = Sketch::new();
    sketch.cached("base", None, 5000);
    sketch.cached("full", Some("base"), 5000);
    sketch.cached("delta", Some("base"), 50);
    sketch.world.nodes.get_mut(&id("delta")).unwrap().full = Some(id("full"));
    assert_eq!(sketch.world.needs(&id("delta")), [&id("delta"), &id("base"), &id("full")]);
    // It was used when the delta was.
    assert!(sketch.removed(&kept_for(100)).is_empty());
    let gone = ["delta", "full", "base"];
    let ids: Vec<String> = sketch
        .removed(&kept_for(0))
        .iter()
        .map(|line| line.split([' ', ':']).nth(1).unwrap().to_owned())
        .collect();
    assert_eq!(ids, gone, "each before what it needs");
    sketch.image("app:1", "delta", true);
    assert!(sketch.removed(&kept_for(0)).is_empty());
    let judged = sketch.judged(&kept_for(0)).0;
    assert!(judged.contains(&"+ result full: app:1 needs it".to_owned()), "{judged:?}");
    sketch.world.survey.names.clear();
    sketch.used.push(Pinnable::Snapshot(id("delta")));
    let judged = sketch.judged(&kept_for(0)).0;
    assert!(judged.contains(&"+ result full: layer delta shows its files".to_owned()), "{judged:?}");
}

#[test]
fn nothing_is_removed_that_a_damaged_snapshot_may_stand_on() {
    let mut sketch = Sketch::new();
    sketch.cached("one", None, 500);
    sketch.cached("damaged", None, 500);
    sketch.world.nodes.get_mut(&id("damaged")).unwrap().damaged = true;
    assert_eq!(sketch.removed(&kept_for(0)), ["result damaged: cache, last used 8 minutes ago"]);
}

#[test]
fn mounts_and_repositories_are_judged_with_the_cache() {
    let mut sketch = Sketch::new();
    let record = |id: &str, last_used_unix: i64| {
        let json = serde_json::json!({
            "version": 1, "id": id, "created_unix": 1, "last_used_unix": last_used_unix
        });
        serde_json::from_value(json).unwrap()
    };
    for (name, ago, in_use) in [("a", 400, false), ("b", 500, true), ("c", 100, false)] {
        let info = CacheMountInfo { name: name.to_owned(), record: record(name, NOW - ago), in_use };
        sketch.world.cache_mounts.push((info, 100));
    }
    for (name, ago, in_use) in [("r", 450, false), ("s", 600, true)] {
        let repository =
            Repository { name: name.to_owned(), disk_bytes: 100, last_used_unix: NOW - ago, in_use };
        sketch.world.repositories.push(repository);
    }
    let gone = ["repository r: last used 7 minutes ago", "cache mount a: last used 6 minutes ago"];
    assert_eq!(sketch.removed(&kept_for(300)), gone);
}

#[test]
fn a_layers_blob_goes_with_its_layer() {
    let mut sketch = Sketch::new();
    sketch.snapshot("loaded", None);
    let blob = LayerBlob { digest: digest("blob"), media_type: "x".to_owned(), size_bytes: 1 };
    let record = LayerRecord {
        snapshot: id("loaded"),
        diff_id: kiln_oci::DiffId(digest("d")),
        size_bytes: 1,
        blob: Some(blob),
    };
    sketch.world.survey.layers.push(record);
    sketch.world.blobs.insert(digest("blob"), BlobFile { size_bytes: 1, disk_bytes: 1 });
    assert_eq!(sketch.removed(&Policy::default()).len(), 2);
    sketch.image("app:1", "loaded", true);
    assert!(sketch.removed(&Policy::default()).is_empty());
}

#[test]
fn what_a_container_needs_stays_though_its_image_is_forgotten() {
    let mut sketch = Sketch::new();
    sketch.snapshot("base", None);
    sketch.snapshot("top", Some("base"));
    sketch.snapshot("other", None);
    sketch.image("app:1", "top", true);
    sketch.image("nameless", "other", false);
    let container = |name: &str, image: &str, snapshot: &str| ContainerUse {
        id: name.to_owned(),
        name: name.to_owned(),
        image: Some(digest(image)),
        snapshot: Some(id(snapshot)),
    };
    sketch.world.containers = vec![container("web", "app:1", "top"), container("old", "nameless", "other")];
    assert!(sketch.removed(&Policy::prune(true)).is_empty());
    sketch.world.survey.images.clear();
    sketch.world.survey.names.clear();
    let removed = sketch.removed(&Policy::prune(true));
    assert!(removed.iter().all(|line| line.starts_with("blob")), "{removed:?}");
    sketch.world.containers.pop();
    assert!(sketch.removed(&Policy::prune(true)).contains(&"layer other: nothing refers to it".to_owned()));
}
