//! Layouts as texts, version 2 on a directory that is none, and this machine's own groups.

use super::layout::Controller;
use super::*;

fn layout(mounts: &str, own: &str) -> Layout {
    Layout::parse(mounts, own)
}

const HYBRID: &str = "\
30 1 0:26 / /sys/fs/cgroup rw - tmpfs tmpfs rw
31 30 0:27 / /sys/fs/cgroup/cpu,cpuacct rw shared:9 - cgroup cgroup rw,cpu,cpuacct
32 30 0:28 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory
33 30 0:29 /outer /sys/fs/cgroup/pids rw - cgroup cgroup rw,pids
34 30 0:30 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,name=systemd
35 30 0:31 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw
";
const OWN: &str = "4:cpu,cpuacct:/\n3:memory:/a/b\n2:pids:/outer/c\n1:name=systemd:/\n0::/user.slice\n";

#[test]
fn each_controller_is_found_in_its_hierarchy() {
    let layout = layout(HYBRID, OWN);
    let parent = |controller| layout.with(controller).map(|found| found.own_parent().display().to_string());
    assert_eq!(parent(Controller::Memory).unwrap(), "/sys/fs/cgroup/memory/a/b/kiln");
    assert_eq!(parent(Controller::CpuTime).unwrap(), "/sys/fs/cgroup/cpu,cpuacct/kiln");
    assert_eq!(parent(Controller::Pids).unwrap(), "/sys/fs/cgroup/pids/c/kiln");
    assert_eq!(parent(Controller::Io), None);
}

#[test]
fn a_limit_without_its_controller_is_an_error_that_names_it() {
    let layout = layout(HYBRID, OWN);
    let wanted = Resources { io_weight: Some(100), ..Resources::default() };
    let error = Wanted { limits: &wanted, freezable: false }.assign(&layout).err().unwrap().to_string();
    assert!(error.contains("--blkio-weight") && error.contains("blkio"), "{error}");
}

fn settings(layout: &Layout, wanted: &Resources) -> String {
    let mut lines = String::new();
    for (hierarchy, settings) in (Wanted { limits: wanted, freezable: false }).assign(layout).unwrap() {
        for setting in settings {
            let place = hierarchy.mount.file_name().unwrap().to_string_lossy();
            lines.push_str(&format!("{place} {} {}\n", setting.file, setting.value));
        }
    }
    lines
}

fn all_limits() -> Resources {
    Resources {
        parent: None,
        memory_bytes: Some(64 << 20),
        swap_bytes: None,
        memory_reservation_bytes: None,
        cpu_millionths: Some(1_500_000),
        cpu_period_micros: None,
        cpu_shares: Some(512),
        cpus: Some("0".to_owned()),
        memory_nodes: None,
        pids: Some(50),
        io_weight: None,
    }
}

#[test]
fn version_1_is_written_its_way() {
    let mounts = format!("{HYBRID}36 30 0:32 / /sys/fs/cgroup/cpuset rw - cgroup cgroup rw,cpuset\n");
    let own = format!("{OWN}9:cpuset:/\n");
    assert_eq!(
        settings(&layout(&mounts, &own), &all_limits()),
        "memory memory.limit_in_bytes 67108864\nmemory memory.memsw.limit_in_bytes 134217728\n\
         cpu,cpuacct cpu.cfs_period_us 100000\ncpu,cpuacct cpu.cfs_quota_us 150000\n\
         cpu,cpuacct cpu.shares 512\ncpuset cpuset.cpus 0\npids pids.max 50\n"
    );
}

/// A directory with the files of a version 2 hierarchy.
fn fake_unified(dir: &Path) -> Layout {
    fs::create_dir_all(dir.join("kiln")).unwrap();
    for at in [dir.to_owned(), dir.join("kiln")] {
        fs::write(at.join("cgroup.controllers"), "cpuset cpu io memory hugetlb pids\n").unwrap();
        fs::write(at.join("cgroup.subtree_control"), "memory\n").unwrap();
    }
    layout(&format!("35 30 0:31 / {} rw - cgroup2 cgroup2 rw\n", dir.display()), "0::/own.scope\n")
}

#[test]
fn version_2_is_written_its_way() {
    let dir = tempfile::tempdir().unwrap();
    let layout = fake_unified(&dir.path().join("unified"));
    let wanted = Resources { io_weight: Some(500), swap_bytes: Some(0), ..all_limits() };
    assert_eq!(
        settings(&layout, &wanted),
        "unified memory.max 67108864\nunified memory.swap.max 0\nunified cpu.max 150000 100000\n\
         unified cpu.weight 20\nunified cpuset.cpus 0\nunified pids.max 50\nunified io.weight 4950\n"
    );
    let groups = Groups::new(dir.path());
    let group = groups.make_in(&layout, &Wanted { limits: &wanted, freezable: true }).unwrap();
    let doors = group.doors();
    let unified = dir.path().join("unified");
    assert!(
        doors.len() == 1 && doors[0].starts_with(&*unified.join("kiln/kiln-").to_string_lossy()),
        "{doors:?}"
    );
    // One by one, the last here; memory was there.
    for at in [unified.clone(), unified.join("kiln")] {
        assert_eq!(fs::read_to_string(at.join("cgroup.subtree_control")).unwrap(), "+io");
    }
    let inside = &group.places[0].dir;
    assert_eq!(fs::read_to_string(inside.join("pids.max")).unwrap(), "50");
    fs::write(inside.join("memory.peak"), "4096\n").unwrap();
    fs::write(inside.join("memory.events"), "low 0\noom 1\noom_kill 2\noom_group_kill 0\n").unwrap();
    fs::write(inside.join("cpu.stat"), "usage_usec 1500\nuser_usec 1000\n").unwrap();
    let usage = group.usage(Usage { peak_memory_bytes: 1, ..Usage::default() });
    let expected = Usage { cpu: Duration::from_micros(1500), peak_memory_bytes: 4096, oom_kills: 2 };
    assert_eq!(usage, expected);
}

#[test]
fn a_controller_that_was_not_handed_down_is_missed_only_by_who_needs_it() {
    let dir = tempfile::tempdir().unwrap();
    let layout = fake_unified(&dir.path().join("unified"));
    fs::write(dir.path().join("unified/kiln/cgroup.controllers"), "memory pids\n").unwrap();
    let groups = Groups::new(dir.path());
    let limited =
        |wanted: Resources| groups.make_in(&layout, &Wanted { limits: &wanted, freezable: false }).map(drop);
    limited(Resources { pids: Some(5), ..Resources::default() }).unwrap();
    let error = limited(Resources { cpu_millionths: Some(5), ..Resources::default() }).unwrap_err();
    assert!(error.to_string().contains("no controller cpu from"), "{error}");
}

#[test]
fn a_group_is_entered_only_when_it_was_made_for_a_container() {
    let mounts = "35 30 0:31 / /g rw - cgroup2 cgroup2 rw\n";
    let doors = |theirs: &str| {
        let (theirs, own) = (layout(mounts, theirs), layout(mounts, "0::/user.slice/2.scope\n"));
        let made = theirs.differing(&own).filter(|(hierarchy, _)| hierarchy.is_made());
        made.map(|(_, dir)| dir).collect::<Vec<_>>()
    };
    let made = "user.slice/kiln/kiln-1-2-3-0";
    assert_eq!(doors(&format!("0::/{made}\n")), [Path::new("/g").join(made)]);
    assert_eq!(doors("0::/user.slice/1.scope\n"), [""; 0].map(PathBuf::from));
    assert_eq!(doors("0::/a/kiln-5.scope/kiln-itself\n"), [""; 0].map(PathBuf::from));
}

#[test]
fn what_others_use_is_not_counted_and_what_cannot_be_told_is_left_as_it_was() {
    // This process is in its own groups only.
    let own = Counted::of_process(std::process::id().try_into().unwrap());
    let otherwise = Usage { peak_memory_bytes: 7, oom_kills: 0, ..Usage::default() };
    assert_eq!(own.usage(otherwise), otherwise);
    assert_eq!(Counted::of_process(i32::MAX).usage(otherwise), otherwise);
    // Version 1, where the runtime put its process.
    let dir = tempfile::tempdir().unwrap();
    let mount = dir.path().display();
    let mounts = format!("36 30 0:32 / {mount} rw - cgroup cgroup rw,memory\n");
    let theirs = layout(&mounts, "5:memory:/kiln/x\n");
    let inside = dir.path().join("kiln/x");
    fs::create_dir_all(&inside).unwrap();
    fs::write(inside.join("memory.oom_control"), "oom_kill_disable 0\nunder_oom 0\noom_kill 1\n").unwrap();
    let differing = |other: &str| theirs.differing(&layout(&mounts, other)).count();
    assert_eq!((differing("5:memory:/\n"), differing("5:memory:/kiln/x\n")), (1, 0));
    let hierarchy = theirs.with(Controller::Memory).unwrap().clone();
    let counted = Counted { places: vec![Place { hierarchy, dir: inside }] };
    assert_eq!(counted.usage(otherwise).oom_kills, 1);
}

#[test]
fn limits_of_a_running_container_change_in_its_group_or_in_a_new_one() {
    let dir = tempfile::tempdir().unwrap();
    let unified = dir.path().join("unified");
    let own = fake_unified(&unified);
    let mounts = format!("35 30 0:31 / {} rw - cgroup2 cgroup2 rw\n", unified.display());
    let theirs = layout(&mounts, "0::/kiln/kiln-theirs\n");
    fs::create_dir(unified.join("kiln/kiln-theirs")).unwrap();
    let groups = Groups::new(dir.path());
    let before = Resources { memory_bytes: Some(64 << 20), pids: Some(50), ..Resources::default() };
    let wanted = Resources {
        memory_bytes: Some(128 << 20),
        memory_reservation_bytes: Some(16 << 20),
        cpu_millionths: Some(500_000),
        cpu_period_micros: Some(20_000),
        ..Resources::default()
    };
    let made = groups.change((&own, &theirs), &before, &wanted).unwrap();
    assert!(made.places.is_empty());
    let read = |dir: &Path, file: &str| fs::read_to_string(dir.join(file)).unwrap();
    let at = unified.join("kiln/kiln-theirs");
    assert_eq!(read(&at, "memory.max"), "134217728");
    assert_eq!(read(&at, "memory.swap.max"), "134217728");
    assert_eq!(read(&at, "memory.low"), "16777216");
    assert_eq!(read(&at, "cpu.max"), "10000 20000");
    assert_eq!(read(&at, "pids.max"), "max");
    // Nothing is written that stays as it is.
    fs::remove_file(at.join("memory.max")).unwrap();
    assert!(groups.change((&own, &theirs), &wanted, &wanted).unwrap().places.is_empty());
    assert!(!at.join("memory.max").exists());
    // One that has no group of its own gets one.
    let made = groups.change((&own, &own), &Resources::default(), &wanted).unwrap();
    assert_eq!(made.places.len(), 1);
    assert_eq!(read(&made.places[0].dir, "memory.max"), "134217728");
}

#[test]
fn a_parent_is_a_name_and_nothing_else() {
    let layout = layout(HYBRID, OWN);
    let memory = layout.with(Controller::Memory).unwrap();
    assert_eq!(memory.below("/jobs/ci").unwrap(), Path::new("/sys/fs/cgroup/memory/jobs/ci"));
    for parent in ["", "/", "..", "a/../../b", "a//b"] {
        assert!(memory.below(parent).is_err(), "{parent:?}");
    }
}

#[test]
fn groups_of_a_dead_kiln_are_swept_and_those_of_a_living_one_are_not() {
    let dir = tempfile::tempdir().unwrap();
    let groups = Groups::new(dir.path());
    let parent = dir.path().join("parent");
    let own = own_name().unwrap();
    let namespace = own.split('-').nth(1).unwrap();
    let start: u64 = own.rsplit('-').next().unwrap().parse().unwrap();
    let pid = std::process::id();
    let names = [
        format!("{own}-0"),
        // The same number in an earlier life, and in another namespace.
        format!("kiln-{namespace}-{pid}-{}-0", start + 1),
        format!("kiln-1-{pid}-{}-0", start + 1),
        "somebody-elses".to_owned(),
    ];
    names.iter().for_each(|name| fs::create_dir_all(parent.join(name)).unwrap());
    groups.note(&parent);
    groups.note(&parent);
    assert_eq!(fs::read_to_string(dir.path().join("cgroups")).unwrap().lines().count(), 1);
    groups.sweep();
    let left: Vec<bool> = names.iter().map(|name| parent.join(name).exists()).collect();
    assert_eq!(left, [true, false, true, true]);
}

/// Both ways to end what is in a group, on this machine's own hierarchies.
#[test]
fn a_group_goes_with_whoever_is_still_in_it() {
    let Ok(machine) = Layout::of_machine() else {
        eprintln!("SKIPPED ALOUD: this machine has no control groups");
        return;
    };
    let parents = [
        machine.with(Controller::Pids).map(|found| (found.own_parent(), "pids")),
        machine.with(Controller::Freezer).map(|found| (found.own_parent(), "freezer")),
        machine.unified().map(|found| (found.own_parent(), "unified")),
    ];
    for (parent, kind) in parents.into_iter().flatten() {
        let dir = parent.join(format!("{}-left", own_name().unwrap()));
        if let Err(error) = fs::create_dir_all(&dir) {
            eprintln!("SKIPPED ALOUD: no group can be made at {}: {error}", parent.display());
            continue;
        }
        let mut left = std::process::Command::new("sleep").arg("1000").spawn().unwrap();
        fs::write(dir.join("cgroup.procs"), left.id().to_string()).unwrap();
        for (file, frozen) in [("freezer.state", "FROZEN"), ("cgroup.freeze", "1")] {
            if dir.join(file).exists() {
                fs::write(dir.join(file), frozen).unwrap();
            }
        }
        remove(&dir);
        assert!(!dir.exists(), "{kind}");
        let signal = std::os::unix::process::ExitStatusExt::signal(&left.wait().unwrap());
        assert_eq!(signal, Some(9), "{kind}");
        remove_own_parent(&parent);
    }
}
