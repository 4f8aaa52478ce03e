//! Names, IDs, and what a crash leaves.

use super::*;
use crate::testing::config;

struct Bench {
    dir: tempfile::TempDir,
    containers: Containers,
}

impl Bench {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let containers = Containers::open(dir.path());
        Self { dir, containers }
    }

    fn make(&self, name: &str) -> Container {
        self.containers.create(&config(name)).unwrap().0
    }

    fn found(&self, text: &str) -> Result<String, Error> {
        Ok(self.containers.find(text)?.config()?.name)
    }
}

#[test]
fn containers_are_found_by_name_id_and_its_beginning() {
    let bench = Bench::new();
    assert!(bench.containers.list().unwrap().is_empty());
    let (web, db) = (bench.make("web"), bench.make("db"));
    assert_eq!(bench.found("web").unwrap(), "web");
    assert_eq!(bench.found("/web").unwrap(), "web");
    assert_eq!(bench.found(db.id().as_str()).unwrap(), "db");
    assert_eq!(bench.found(web.id().short()).unwrap(), "web");
    assert!(matches!(bench.found("absent"), Err(Error::NotFound { .. })));
    assert!(matches!(bench.found("../web"), Err(Error::NotFound { .. })));
    let names: Vec<String> =
        bench.containers.list().unwrap().iter().map(|found| found.config().unwrap().name).collect();
    assert_eq!(names, ["db", "web"]);
}

#[test]
fn names_are_taken_once_until_they_are_free_again() {
    let bench = Bench::new();
    let web = bench.make("web");
    assert!(matches!(bench.containers.create(&config("web")), Err(Error::NameTaken { .. })));
    assert_eq!(bench.containers.list().unwrap().len(), 1);
    let db = bench.make("db");
    assert!(matches!(bench.containers.rename(&db, "web"), Err(Error::NameTaken { .. })));
    bench.containers.rename(&web, "old").unwrap();
    bench.containers.rename(&db, "web").unwrap();
    assert_eq!((bench.found("old").unwrap(), bench.found("web").unwrap()), ("old".into(), "web".into()));
    assert!(bench.found("db").is_err());
    bench.containers.remove(&db).unwrap();
    assert!(bench.found("web").is_err());
    bench.make("web");
}

#[test]
fn what_a_killed_command_left_is_in_nobodys_way() {
    let bench = Bench::new();
    bench.make("web");
    let names = bench.dir.path().join("containers/.names");
    // Named, and killed before the directory came.
    symlink("ab".repeat(32), names.join("lost")).unwrap();
    assert!(bench.found("lost").is_err());
    bench.make("lost");
    // Renamed, and killed before the old name went.
    symlink(fs::read_link(names.join("web")).unwrap(), names.join("older")).unwrap();
    assert!(bench.found("older").is_err());
    bench.make("older");
    fs::create_dir(bench.dir.path().join("containers/.new-x")).unwrap();
    assert_eq!(bench.containers.list().unwrap().len(), 3);
}

#[test]
fn a_container_without_its_monitor_has_ended() {
    let bench = Bench::new();
    let web = bench.make("web");
    assert_eq!(web.state().unwrap().status, Status::Created);
    let monitor = web.lock_monitor().unwrap();
    let running = State { status: Status::Running, pid: 1, ..State::created() };
    web.write_state(&running).unwrap();
    assert_eq!(web.state().unwrap(), running);
    drop(monitor);
    let ended = web.state().unwrap();
    assert_eq!((ended.status, ended.exit_code, ended.pid), (Status::Exited, 137, 0));
    assert_eq!(ended.error, "its monitor died");
    assert_eq!(web.state().unwrap(), ended);
}

#[test]
fn records_of_a_newer_kiln_and_damaged_ones_are_said() {
    let bench = Bench::new();
    let web = bench.make("web");
    fs::write(web.dir().join("config.json"), "{").unwrap();
    assert!(matches!(web.config(), Err(Error::Record { .. })));
    // It is listed, and can be removed.
    assert_eq!(bench.containers.list().unwrap().len(), 1);
    bench.containers.remove(&bench.containers.find(web.id().short()).unwrap()).unwrap();
    assert!(bench.containers.list().unwrap().is_empty());
    assert!(matches!(web.config(), Err(Error::Gone { .. })));
    assert!(matches!(web.lock(), Err(Error::Gone { .. })));
}
