//! Records that are damaged in every way.

use kiln_snapshotter::Copying;

use super::*;
use crate::MountPoint;
use crate::testing::config;

struct Bench {
    dir: tempfile::TempDir,
    containers: Containers,
    snapshots: Copying,
}

impl Bench {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let containers = Containers::open(dir.path());
        let snapshots = Copying::open(&dir.path().join("snapshots")).unwrap();
        Self { dir, containers, snapshots }
    }

    /// A container with its layer, made long ago.
    fn make(&self, name: &str) -> Container {
        let config = Config { created: Time::from_nanos(1), ..config(name) };
        self.snapshots.prepare(&config.id.key(), None).unwrap();
        self.containers.create(&config).unwrap().0
    }

    fn look(&self, repair: bool) -> Report {
        fsck(&self.containers, &self.snapshots, repair).unwrap()
    }

    /// The only problem, found and then mended; and that nothing is wrong afterwards.
    #[track_caller]
    fn check(&self, kind: &str, what: &str, harmless: bool) {
        let found = self.look(false).problems;
        assert_eq!(found.len(), 1, "{found:?}");
        assert!(found[0].kind == kind && found[0].what.contains(what), "{found:?}");
        assert_eq!(found[0].repaired.is_some(), harmless, "{found:?}");
        if !harmless {
            let mended = self.look(true).problems;
            assert!(mended.len() == 1 && mended[0].repaired.is_some(), "{mended:?}");
        }
        assert_eq!(self.look(false).problems, []);
    }
}

#[test]
fn what_is_in_order_is_said_to_be() {
    let bench = Bench::new();
    assert_eq!(bench.look(true).problems, []);
    bench.make("web");
    Volumes::open(bench.dir.path()).create("data", &BTreeMap::new(), false).unwrap();
    let report = bench.look(false);
    assert_eq!((report.containers, report.volumes), (1, 1));
    assert!(report.problems.is_empty() && report.notes.is_empty(), "{report:?}");
}

#[test]
fn a_state_that_is_lost_is_one_that_ended() {
    for damage in [Some("{"), Some("{\"version\":0}"), None] {
        let bench = Bench::new();
        let web = bench.make("web");
        let path = web.dir().join("state.json");
        match damage {
            Some(text) => fs::write(path, text).unwrap(),
            None => fs::remove_file(path).unwrap(),
        }
        bench.check("container", "state.json", false);
        let state = web.state().unwrap();
        assert_eq!((state.status, state.exit_code), (Status::Exited, 255));
    }
}

#[test]
fn a_state_that_a_monitor_looks_after_is_let_be() {
    let bench = Bench::new();
    let web = bench.make("web");
    let path = web.dir().join("state.json");
    fs::write(&path, "{").unwrap();
    let monitor = web.try_monitor().unwrap().unwrap();
    let problems = bench.look(true).problems;
    assert!(problems.len() == 1 && problems[0].repaired.is_none(), "{problems:?}");
    assert_eq!(fs::read_to_string(&path).unwrap(), "{");
    drop(monitor);
    assert!(bench.look(true).problems[0].repaired.is_some());
}

#[test]
fn a_config_or_layer_that_is_lost_is_told_and_nothing_is_removed() {
    for damage in ["{", ""] {
        let bench = Bench::new();
        let web = bench.make("web");
        fs::write(web.dir().join("config.json"), damage).unwrap();
        for repair in [false, true] {
            let problems = bench.look(repair).problems;
            assert!(problems.len() == 1 && problems[0].what.contains("only be removed"), "{problems:?}");
            assert_eq!(problems[0].repaired, None);
        }
        assert!(web.dir().join("state.json").exists());
    }
    let bench = Bench::new();
    let (web, other) = (bench.make("web"), bench.make("other"));
    bench.snapshots.remove_active(&web.id().key()).unwrap();
    let problems = bench.look(true).problems;
    assert!(problems.len() == 1 && problems[0].what.contains("its layer is gone"), "{problems:?}");
    fs::copy(web.dir().join("config.json"), other.dir().join("config.json")).unwrap();
    let problems = bench.look(true).problems;
    assert!(problems.iter().any(|found| found.what.contains("that of container")), "{problems:?}");
}

#[test]
fn what_a_newer_kiln_wrote_is_no_damage() {
    for file in ["config.json", "state.json"] {
        let bench = Bench::new();
        let web = bench.make("web");
        fs::write(web.dir().join(file), "{\"version\":99,\"new\":true}").unwrap();
        let report = bench.look(true);
        assert_eq!(report.problems, [], "{file}");
        assert!(report.notes.len() == 1 && report.notes[0].contains("newer kiln"), "{:?}", report.notes);
        assert!(fs::read_to_string(web.dir().join(file)).unwrap().contains("99"));
    }
}

#[test]
fn names_are_put_right() {
    let bench = Bench::new();
    let (web, names) = (bench.make("web"), bench.containers.names());
    std::os::unix::fs::symlink(ContainerId::random().unwrap().as_str(), names.join("gone")).unwrap();
    bench.check("container name", "is gone", true);
    std::os::unix::fs::symlink(web.id().as_str(), names.join("former")).unwrap();
    bench.check("container name", "is called web", true);
    fs::write(names.join("file"), "").unwrap();
    bench.check("container name", "leads to no container", true);
    fs::remove_file(names.join("web")).unwrap();
    bench.check("container name", "did not lead", true);
    assert_eq!(bench.containers.find("web").unwrap().id(), web.id());
    // Two containers of one name: the link says which one has it.
    let other = bench.make("other");
    other.write_config(&Config { name: "web".to_owned(), ..other.config().unwrap() }).unwrap();
    fs::remove_file(names.join("other")).unwrap();
    bench.check("container name", "both have it", false);
    assert_eq!(bench.containers.find("web").unwrap().id(), web.id());
    let name = other.config().unwrap().name;
    assert!(name.starts_with("web-"), "{name}");
    assert_eq!(bench.containers.find(&name).unwrap().id(), other.id());
}

#[test]
fn what_is_no_containers_is_named_and_marks_of_the_gone_are_removed() {
    let bench = Bench::new();
    bench.make("web");
    fs::create_dir(bench.containers.dir().join("something")).unwrap();
    let passing = bench.containers.passing();
    fs::create_dir_all(&passing).unwrap();
    fs::write(passing.join(ContainerId::random().unwrap().as_str()), "").unwrap();
    let report = bench.look(false);
    assert_eq!((report.problems.len(), report.notes.len()), (0, 1), "{report:?}");
    assert!(report.notes[0].contains("containers/something"), "{report:?}");
    assert_eq!(fs::read_dir(passing).unwrap().count(), 0);
}

#[test]
fn a_monitor_that_died_is_told_and_its_container_has_ended() {
    let bench = Bench::new();
    let web = bench.make("web");
    web.write_state(&State { status: Status::Running, pid: 1, ..State::created() }).unwrap();
    let report = bench.look(false);
    assert!(report.problems.is_empty() && report.notes[0].contains("its monitor died"), "{report:?}");
    assert_eq!(web.state().unwrap().status, Status::Exited);
    assert!(bench.look(false).notes.is_empty());
}

#[test]
fn volumes_have_records_and_containers_their_volumes() {
    let bench = Bench::new();
    let volumes = Volumes::open(bench.dir.path());
    volumes.create("data", &BTreeMap::new(), false).unwrap();
    let data = volumes.data("data").unwrap();
    fs::write(data.join("x"), "kept").unwrap();
    for damage in [None, Some("{")] {
        let record = volumes.dir().join("data/volume.json");
        match damage {
            Some(text) => fs::write(record, text).unwrap(),
            None => fs::remove_file(record).unwrap(),
        }
        bench.check("volume", "volume.json", false);
        assert_eq!(fs::read_to_string(volumes.data("data").unwrap().join("x")).unwrap(), "kept");
    }
    let web = bench.make("web");
    let mount = MountPoint {
        kind: MountKind::Volume { name: "other".to_owned(), anonymous: false, fill: true },
        target: "/data".to_owned(),
        read_only: false,
    };
    web.write_config(&Config { mounts: vec![mount], ..web.config().unwrap() }).unwrap();
    let problems = bench.look(true).problems;
    assert!(problems.len() == 1 && problems[0].what.contains("container web needs it"), "{problems:?}");
    fs::remove_dir_all(data).unwrap();
    assert!(bench.look(true).problems.iter().any(|found| found.what.contains("_data is gone")));
}

#[test]
fn a_network_without_record_can_be_made_again() {
    let bench = Bench::new();
    let networks = Networks::open(bench.dir.path());
    let wanted = || crate::NewNetwork {
        subnet: Some("203.0.113.0/25".parse().unwrap()),
        ..crate::NewNetwork::default()
    };
    networks.create("mine", wanted()).unwrap();
    fs::write(networks.dir().join("mine/network.json"), "{").unwrap();
    bench.check("network", "network.json", false);
    networks.create("mine", wanted()).unwrap();
}
