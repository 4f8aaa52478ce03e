//! The filter as the kernel applies it: every system call of the machine, made inside.

use std::collections::BTreeMap;

use kiln_executor::{Cancel, Capabilities, Exit, ProcessSpec, Seccomp, SeccompProfile, Security};

use crate::harness::{Sandbox, shell};

const EPERM: i32 = 1;
const ENOSYS: i32 = 38;

/// What each call answered, by kind and number (or by its first argument).
type Answers = BTreeMap<(String, u64), i32>;

/// `None`, said aloud, where the program cannot be made.
fn sandbox() -> Option<Sandbox> {
    if std::env::consts::ARCH != "x86_64" {
        eprintln!("SKIPPED ALOUD: the table is x86-64's");
        return None;
    }
    let sandbox = Sandbox::new()?;
    sandbox.compile("every_call", include_str!("every_call.c")).then_some(sandbox)
}

fn answers(sandbox: &Sandbox, change: impl FnOnce(&mut ProcessSpec)) -> Answers {
    let mut spec = shell("exec every_call");
    change(&mut spec);
    let (result, out, err) = sandbox.run_spec(&spec, &Cancel::new().unwrap());
    assert_eq!(result.unwrap(), Exit::Code(0), "{err}");
    let line = |line: &str| {
        let mut words = line.split(' ');
        let (kind, number, errno) = (words.next()?, words.next()?.parse().ok()?, words.next()?.parse().ok()?);
        Some(((kind.to_owned(), number), errno))
    };
    out.lines().map(|text| line(text).unwrap_or_else(|| panic!("{text:?}"))).collect()
}

/// The calls of x86-64 that answer EPERM to a process with the default capabilities.
const DENIED: &[(&str, &[u64])] = &[
    ("128-bit remains: uselib, ustat, sysfs, _sysctl", &[134, 136, 139, 156]),
    ("pivot_root, acct, mount, umount2, swapon, swapoff, reboot", &[155, 163, 165, 166, 167, 168, 169]),
    ("settimeofday", &[164]),
    ("sethostname, setdomainname, iopl, ioperm, syslog, vhangup", &[170, 171, 172, 173, 103, 153]),
    ("modules: create, init, delete, get_kernel_syms, query", &[174, 175, 176, 177, 178]),
    (
        "quotactl, nfsservctl, getpmsg, putpmsg, afs_syscall, tuxcall, security",
        &[179, 180, 181, 182, 183, 184, 185],
    ),
    ("lookup_dcookie, vserver, clock_settime", &[212, 236, 227]),
    ("mbind, set_mempolicy, get_mempolicy, migrate_pages, move_pages", &[237, 238, 239, 256, 279]),
    ("mq ends; kexec_load, add_key, request_key, keyctl", &[246, 248, 249, 250]),
    ("unshare, perf_event_open, fanotify_init, open_by_handle_at, setns", &[272, 298, 300, 304, 308]),
    ("kcmp, finit_module, kexec_file_load, bpf, userfaultfd", &[312, 313, 320, 321, 323]),
    ("io_uring_setup, io_uring_enter, io_uring_register", &[425, 426, 427]),
    ("open_tree, move_mount, fsopen, fsconfig, fsmount, fspick", &[428, 429, 430, 431, 432, 433]),
    ("pidfd_getfd, process_madvise, mount_setattr, quotactl_fd", &[438, 440, 442, 443]),
    (
        "set_mempolicy_home_node, lsm_get_self_attr, lsm_set_self_attr, lsm_list_modules",
        &[450, 459, 460, 461],
    ),
];

/// Numbers that x86-64 never had, up to the last one: nothing is behind them. 335 and 336 belong to
/// probes in user space, which the kernel answers before it asks a filter.
fn is_hole(number: u64) -> bool {
    (337..424).contains(&number)
}

#[test]
fn every_system_call_answers_as_the_table_says() {
    let Some(sandbox) = sandbox() else { return };
    let (filtered, free) =
        (answers(&sandbox, |_| {}), answers(&sandbox, |spec| spec.seccomp = Seccomp::Unconfined));
    let denied: Vec<u64> = DENIED.iter().flat_map(|(_, numbers)| numbers.iter().copied()).collect();
    let mut wrong = Vec::new();
    for ((kind, number), &answer) in filtered.iter().filter(|((kind, _), _)| kind == "native") {
        let without = free[&(kind.clone(), *number)];
        let right = match *number {
            435 => answer == ENOSYS,
            number if denied.contains(&number) || is_hole(number) => answer == EPERM,
            // Newer than the profile.
            467.. => answer == ENOSYS,
            // One that waits, as for the disk, may come back or not.
            _ => answer == without || (answer.min(without) < 0 && answer.max(without) <= 0),
        };
        if !right {
            wrong.push(format!("{number}: {answer}, without the filter {without}"));
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
    assert_eq!(filtered.keys().filter(|(kind, _)| kind == "native").count(), 478);
    // The other direction: had the filter not been there, few of those would have answered EPERM.
    let really = denied.iter().filter(|number| free[&("native".to_owned(), **number)] != EPERM).count();
    assert!(really > 40, "{really}");
}

#[test]
fn arguments_decide_over_socket_personality_and_clone() {
    let Some(sandbox) = sandbox() else { return };
    let of = |kind: &str, answers: &Answers| -> Vec<u64> {
        let refused = answers.iter().filter(|((known, _), errno)| known == kind && **errno == EPERM);
        // CLONE_SETTLS: the kernel's own answer to thread storage at an address that is none.
        refused.map(|((_, value), _)| *value).filter(|value| kind != "clone" || *value != 0x8_0000).collect()
    };
    let default = answers(&sandbox, |_| {});
    assert_eq!(of("socket", &default), [12, 19, 20, 23, 25, 34, 37, 38, 40, 46, 47, 0x1_0000_0001]);
    assert_eq!(of("personality", &default), [0x1, 0x4_0000, 0x1_0000_0000]);
    let namespaces = [0x2_0000, 0x200_0000, 0x400_0000, 0x800_0000, 0x1000_0000, 0x2000_0000, 0x4000_0000];
    assert_eq!(of("clone", &default), namespaces);
    let admin = answers(&sandbox, |spec| {
        spec.capabilities = Capabilities::changed(&[Capabilities::parse("SYS_ADMIN").unwrap()], &[]);
    });
    assert_eq!(of("clone", &admin), [0; 0]);
    assert_ne!(admin[&("native".to_owned(), 435)], ENOSYS, "clone3");
    assert_ne!(admin[&("native".to_owned(), 272)], EPERM, "unshare");
    assert_eq!(admin[&("native".to_owned(), 250)], EPERM, "keyctl");
}

#[test]
fn the_other_gates_into_the_kernel_are_guarded_too() {
    let Some(sandbox) = sandbox() else { return };
    let (filtered, free) =
        (answers(&sandbox, |_| {}), answers(&sandbox, |spec| spec.seccomp = Seccomp::Unconfined));
    let refused = |kind: &str| -> Vec<u64> {
        let these = filtered.iter().filter(|((known, _), errno)| known == kind && **errno == EPERM);
        these.map(|((_, number), _)| *number).collect()
    };
    let answered = |answers: &Answers, kind: &str, number| answers[&(kind.to_owned(), number)];
    // mount, umount, umount2, clone with all flags, init_module, add_key, request_key, keyctl,
    // unshare, setns, bpf, socket(AF_ALG), io_uring_setup
    let expected = [21, 22, 52, 120, 128, 286, 287, 288, 310, 346, 357, 359, 425];
    if answered(&free, "x86", 20) == 0 {
        assert_eq!(refused("x86"), expected);
        assert_eq!((answered(&filtered, "x86", 20), answered(&filtered, "x86", 435)), (0, ENOSYS));
        assert_eq!(answered(&filtered, "x86", 600), ENOSYS);
    } else {
        eprintln!("SKIPPED ALOUD: this kernel has no 32-bit gate");
    }
    // mount, keyctl, unshare, bpf, and kexec_load by the number that only x86-64 has: none of x32's.
    assert_eq!(refused("x32"), [165, 246, 250, 272, 321]);
    assert_eq!(answered(&filtered, "x32", 39), answered(&free, "x32", 39));
    assert_eq!((answered(&filtered, "x32", 435), answered(&filtered, "x32", 600)), (ENOSYS, ENOSYS));
}

#[test]
fn the_filter_is_there_unless_it_was_asked_away() {
    let Some(sandbox) = Sandbox::new() else { return };
    let status = |change: &dyn Fn(&mut ProcessSpec)| {
        let mut spec = shell(
            "while read -r k v; do case $k in Seccomp:*|NoNewPrivs:*) echo $v;; esac; done < /proc/self/status",
        );
        change(&mut spec);
        let (result, out, err) = sandbox.run_spec(&spec, &Cancel::new().unwrap());
        assert_eq!(result.unwrap(), Exit::Code(0), "{err}");
        out
    };
    assert_eq!(status(&|_| {}), "0\n2\n");
    assert_eq!(status(&|spec| spec.user = Some("app".to_owned())), "0\n2\n");
    assert_eq!(status(&|spec| spec.no_new_privileges = true), "1\n2\n");
    assert_eq!(status(&|spec| spec.seccomp = Seccomp::Unconfined), "0\n0\n");
    assert_eq!(status(&|spec| spec.security = Security::Insecure), "0\n0\n");
}

#[test]
fn a_profile_of_ones_own_replaces_the_default() {
    let Some(sandbox) = Sandbox::new() else { return };
    let mut spec = shell("mkdir /tmp/x; echo $?; mount -t tmpfs none /tmp 2>&1; true");
    let text = r#"{"defaultAction": "SCMP_ACT_ALLOW", "syscalls":
        [{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 28}]}"#;
    spec.seccomp = Seccomp::Profile(SeccompProfile::parse(text).unwrap());
    let (result, out, err) = sandbox.run_spec(&spec, &Cancel::new().unwrap());
    assert_eq!(result.unwrap(), Exit::Code(0), "{err}");
    assert!(out.starts_with("1\n") && err.contains("No space left on device"), "{out}{err}");
}

#[test]
fn setuid_programs_still_work_under_the_filter() {
    let Some(sandbox) = Sandbox::new() else { return };
    use std::os::unix::fs::PermissionsExt;
    let source = r#"
        #include <stdio.h>
        #include <unistd.h>
        int main(void) { printf("%d\n", (int)geteuid()); }"#;
    if !sandbox.compile("effective", source) {
        return;
    }
    std::fs::set_permissions(sandbox.path("bin/effective"), PermissionsExt::from_mode(0o4755)).unwrap();
    let run = |no_new_privileges| {
        let spec = ProcessSpec { user: Some("app".to_owned()), no_new_privileges, ..shell("effective") };
        sandbox.run_spec(&spec, &Cancel::new().unwrap()).1
    };
    assert_eq!((run(false).as_str(), run(true).as_str()), ("0\n", "1000\n"));
}
