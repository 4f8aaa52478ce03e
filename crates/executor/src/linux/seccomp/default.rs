//! The profile of a sandbox that asks for no other: what docker and BuildKit allow, by purpose.
//!
//! What is not named here answers EPERM. Left out on purpose, whatever the capabilities: io_uring
//! and userfaultfd (their own kernel attack surface), key management (keys are not namespaced),
//! kexec, swap, NFS, `ustat` and other remains.

use rustix::thread::CapabilitySet;

use super::profile::{Action, Argument, Comparison, Profile, Rule};

/// Files by path: looking, making, renaming, removing, their attributes.
const PATHS: &[&str] = &[
    "access",
    "chdir",
    "chmod",
    "chown",
    "chown32",
    "creat",
    "faccessat",
    "faccessat2",
    "fchmodat",
    "fchmodat2",
    "fchownat",
    "fstatat64",
    "futimesat",
    "getcwd",
    "lchown",
    "lchown32",
    "link",
    "linkat",
    "lstat",
    "lstat64",
    "mkdir",
    "mkdirat",
    "mknod",
    "mknodat",
    "name_to_handle_at",
    "newfstatat",
    "open",
    "openat",
    "openat2",
    "readlink",
    "readlinkat",
    "rename",
    "renameat",
    "renameat2",
    "rmdir",
    "stat",
    "stat64",
    "statfs",
    "statfs64",
    "statx",
    "symlink",
    "symlinkat",
    "truncate",
    "truncate64",
    "umask",
    "unlink",
    "unlinkat",
    "utime",
    "utimensat",
    "utimensat_time64",
    "utimes",
];

/// Open files.
const DESCRIPTORS: &[&str] = &[
    "_llseek",
    "close",
    "close_range",
    "copy_file_range",
    "dup",
    "dup2",
    "dup3",
    "fadvise64",
    "fadvise64_64",
    "fallocate",
    "fchdir",
    "fchmod",
    "fchown",
    "fchown32",
    "fcntl",
    "fcntl64",
    "fdatasync",
    "flock",
    "fstat",
    "fstat64",
    "fstatfs",
    "fstatfs64",
    "fsync",
    "ftruncate",
    "ftruncate64",
    "getdents",
    "getdents64",
    "ioctl",
    "lseek",
    "pipe",
    "pipe2",
    "pread64",
    "preadv",
    "preadv2",
    "pwrite64",
    "pwritev",
    "pwritev2",
    "read",
    "readahead",
    "readv",
    "sendfile",
    "sendfile64",
    "splice",
    "sync",
    "sync_file_range",
    "syncfs",
    "tee",
    "vmsplice",
    "write",
    "writev",
];

const EXTENDED_ATTRIBUTES: &[&str] = &[
    "fgetxattr",
    "flistxattr",
    "fremovexattr",
    "fsetxattr",
    "getxattr",
    "getxattrat",
    "lgetxattr",
    "listxattr",
    "listxattrat",
    "llistxattr",
    "lremovexattr",
    "lsetxattr",
    "removexattr",
    "removexattrat",
    "setxattr",
    "setxattrat",
];

/// Waiting for files, and being told of changes to them.
const EVENTS: &[&str] = &[
    "_newselect",
    "epoll_create",
    "epoll_create1",
    "epoll_ctl",
    "epoll_ctl_old",
    "epoll_pwait",
    "epoll_pwait2",
    "epoll_wait",
    "epoll_wait_old",
    "eventfd",
    "eventfd2",
    "fanotify_mark",
    "inotify_add_watch",
    "inotify_init",
    "inotify_init1",
    "inotify_rm_watch",
    "poll",
    "ppoll",
    "ppoll_time64",
    "pselect6",
    "pselect6_time64",
    "select",
    "signalfd",
    "signalfd4",
];

/// The older asynchronous input and output; the newer one is not allowed.
const ASYNCHRONOUS: &[&str] = &[
    "io_cancel",
    "io_destroy",
    "io_getevents",
    "io_pgetevents",
    "io_pgetevents_time64",
    "io_setup",
    "io_submit",
    "ioprio_get",
    "ioprio_set",
];

/// Networking, `socket` apart. `socketcall` is how 32-bit C libraries do all of it, and a filter
/// cannot look at the address family behind its pointer.
const NETWORK: &[&str] = &[
    "accept",
    "accept4",
    "bind",
    "connect",
    "getpeername",
    "getsockname",
    "getsockopt",
    "listen",
    "recv",
    "recvfrom",
    "recvmmsg",
    "recvmmsg_time64",
    "recvmsg",
    "send",
    "sendmmsg",
    "sendmsg",
    "sendto",
    "setsockopt",
    "shutdown",
    "socketcall",
    "socketpair",
];

const MEMORY: &[&str] = &[
    "brk",
    "cachestat",
    "madvise",
    "map_shadow_stack",
    "membarrier",
    "memfd_create",
    "memfd_secret",
    "mincore",
    "mlock",
    "mlock2",
    "mlockall",
    "mmap",
    "mmap2",
    "mprotect",
    "mremap",
    "mseal",
    "msync",
    "munlock",
    "munlockall",
    "munmap",
    "pkey_alloc",
    "pkey_free",
    "pkey_mprotect",
    "remap_file_pages",
];

/// Starting, ending and watching processes and threads; `clone` apart.
const PROCESSES: &[&str] = &[
    "execve",
    "execveat",
    "exit",
    "exit_group",
    "fork",
    "getpgid",
    "getpgrp",
    "getpid",
    "getppid",
    "getsid",
    "gettid",
    "kill",
    "pause",
    "pidfd_open",
    "pidfd_send_signal",
    "prctl",
    "process_mrelease",
    "restart_syscall",
    "setpgid",
    "setsid",
    "tgkill",
    "tkill",
    "vfork",
    "wait4",
    "waitid",
    "waitpid",
];

const SIGNALS: &[&str] = &[
    "rt_sigaction",
    "rt_sigpending",
    "rt_sigprocmask",
    "rt_sigqueueinfo",
    "rt_sigreturn",
    "rt_sigsuspend",
    "rt_sigtimedwait",
    "rt_sigtimedwait_time64",
    "rt_tgsigqueueinfo",
    "sigaltstack",
    "sigprocmask",
    "sigreturn",
];

/// Threads' locks, local storage and restartable sequences.
const THREADS: &[&str] = &[
    "futex",
    "futex_requeue",
    "futex_time64",
    "futex_wait",
    "futex_waitv",
    "futex_wake",
    "get_robust_list",
    "get_thread_area",
    "rseq",
    "set_robust_list",
    "set_thread_area",
    "set_tid_address",
    "uretprobe",
];

const SCHEDULING: &[&str] = &[
    "getcpu",
    "getpriority",
    "sched_get_priority_max",
    "sched_get_priority_min",
    "sched_getaffinity",
    "sched_getattr",
    "sched_getparam",
    "sched_getscheduler",
    "sched_rr_get_interval",
    "sched_rr_get_interval_time64",
    "sched_setaffinity",
    "sched_setattr",
    "sched_setparam",
    "sched_setscheduler",
    "sched_yield",
    "setpriority",
];

/// Users, groups and capabilities: the kernel checks these against the capabilities that are left.
const IDENTITY: &[&str] = &[
    "capget",
    "capset",
    "getegid",
    "getegid32",
    "geteuid",
    "geteuid32",
    "getgid",
    "getgid32",
    "getgroups",
    "getgroups32",
    "getresgid",
    "getresgid32",
    "getresuid",
    "getresuid32",
    "getuid",
    "getuid32",
    "setfsgid",
    "setfsgid32",
    "setfsuid",
    "setfsuid32",
    "setgid",
    "setgid32",
    "setgroups",
    "setgroups32",
    "setregid",
    "setregid32",
    "setresgid",
    "setresgid32",
    "setresuid",
    "setresuid32",
    "setreuid",
    "setreuid32",
    "setuid",
    "setuid32",
];

/// Reading clocks, waiting on them. The kernel lets nobody set one without CAP_SYS_TIME:
/// `adjtimex` and its kin only tell, then.
const TIME: &[&str] = &[
    "adjtimex",
    "alarm",
    "clock_adjtime",
    "clock_adjtime64",
    "clock_getres",
    "clock_getres_time64",
    "clock_gettime",
    "clock_gettime64",
    "clock_nanosleep",
    "clock_nanosleep_time64",
    "getitimer",
    "gettimeofday",
    "nanosleep",
    "setitimer",
    "time",
    "timer_create",
    "timer_delete",
    "timer_getoverrun",
    "timer_gettime",
    "timer_gettime64",
    "timer_settime",
    "timer_settime64",
    "timerfd_create",
    "timerfd_gettime",
    "timerfd_gettime64",
    "timerfd_settime",
    "timerfd_settime64",
    "times",
];

/// System V and POSIX message queues, semaphores, shared memory: in an IPC namespace of their own.
const IPC: &[&str] = &[
    "ipc",
    "mq_getsetattr",
    "mq_notify",
    "mq_open",
    "mq_timedreceive",
    "mq_timedreceive_time64",
    "mq_timedsend",
    "mq_timedsend_time64",
    "mq_unlink",
    "msgctl",
    "msgget",
    "msgrcv",
    "msgsnd",
    "semctl",
    "semget",
    "semop",
    "semtimedop",
    "semtimedop_time64",
    "shmat",
    "shmctl",
    "shmdt",
    "shmget",
];

/// Limits of the process, and what it may know of the machine.
const INFORMATION: &[&str] = &[
    "getrandom",
    "getrlimit",
    "getrusage",
    "listmount",
    "prlimit64",
    "setrlimit",
    "statmount",
    "sysinfo",
    "ugetrlimit",
    "uname",
];

/// What a process may hold itself back with.
const SELF_RESTRAINT: &[&str] =
    &["landlock_add_rule", "landlock_create_ruleset", "landlock_restrict_self", "seccomp"];

/// Debuggers. Before Linux 4.8 a tracer could step around its tracee's filter.
const TRACING: &[&str] = &["process_vm_readv", "process_vm_writev", "ptrace"];

/// Needed on some architectures; the others have no such number.
const ARCHITECTURE: &[&str] = &[
    "arch_prctl",
    "arm_fadvise64_64",
    "arm_sync_file_range",
    "breakpoint",
    "cacheflush",
    "modify_ldt",
    "set_tls",
];

pub(super) const UNCONDITIONAL: [&[&str]; 16] = [
    PATHS,
    DESCRIPTORS,
    EXTENDED_ATTRIBUTES,
    EVENTS,
    ASYNCHRONOUS,
    NETWORK,
    MEMORY,
    PROCESSES,
    SIGNALS,
    THREADS,
    SCHEDULING,
    IDENTITY,
    TIME,
    IPC,
    INFORMATION,
    SELF_RESTRAINT,
];

/// Allowed to a sandbox whose capabilities hold one of the first.
const WITH_CAPABILITY: &[(CapabilitySet, &[&str])] = &[
    (
        CapabilitySet::SYS_ADMIN,
        &[
            "clone",
            "clone3",
            "fanotify_init",
            "fsconfig",
            "fsmount",
            "fsopen",
            "fspick",
            "lookup_dcookie",
            "lsm_get_self_attr",
            "lsm_list_modules",
            "lsm_set_self_attr",
            "mount",
            "mount_setattr",
            "move_mount",
            "open_tree",
            "quotactl",
            "quotactl_fd",
            "setdomainname",
            "sethostname",
            "setns",
            "umount",
            "umount2",
            "unshare",
        ],
    ),
    (CapabilitySet::SYS_ADMIN.union(CapabilitySet::BPF), &["bpf"]),
    (CapabilitySet::SYS_ADMIN.union(CapabilitySet::PERFMON), &["perf_event_open"]),
    (CapabilitySet::SYS_ADMIN.union(CapabilitySet::SYSLOG), &["syslog"]),
    (CapabilitySet::DAC_READ_SEARCH, &["open_by_handle_at"]),
    (CapabilitySet::SYS_BOOT, &["reboot"]),
    (CapabilitySet::SYS_CHROOT, &["chroot"]),
    (CapabilitySet::SYS_MODULE, &["delete_module", "finit_module", "init_module"]),
    (CapabilitySet::SYS_NICE, &["get_mempolicy", "mbind", "set_mempolicy", "set_mempolicy_home_node"]),
    (CapabilitySet::SYS_PACCT, &["acct"]),
    (CapabilitySet::SYS_PTRACE, &["kcmp", "pidfd_getfd", "process_madvise"]),
    (CapabilitySet::SYS_PTRACE, TRACING),
    (CapabilitySet::SYS_RAWIO, &["ioperm", "iopl"]),
    (CapabilitySet::SYS_TIME, &["clock_settime", "clock_settime64", "settimeofday", "stime"]),
    (CapabilitySet::SYS_TTY_CONFIG, &["vhangup"]),
];

/// The `CLONE_NEW…` flags (linux/sched.h), the one of time apart, which `clone` has no room for.
const NEW_NAMESPACES: u64 = 0x7e02_0000;

/// Address families of `socket`, up to the last that exists. Left out: what no container needs and
/// what kernels had holes in: AF_ALG (38), AF_VSOCK (40, the way to the hypervisor), DECnet (12),
/// and others that few have ever used.
const FAMILIES: &[(u64, u64)] =
    &[(0, 11), (13, 18), (21, 22), (24, 24), (26, 33), (35, 36), (39, 39), (41, 45)];

/// `personality(2)`: ask (-1), Linux, 32-bit Linux, both with old `uname` numbers. Never the ones
/// that switch off address randomization or map page zero.
const PERSONALITIES: [u64; 5] = [0x0, 0x8, 0x2_0000, 0x2_0008, 0xffff_ffff];

/// The default profile for a sandbox with these capabilities on this kernel (major, minor).
pub(super) fn profile(capabilities: CapabilitySet, kernel: (u32, u32)) -> Profile {
    let mut rules = Vec::with_capacity(64);
    let mut allow = |names: &[&'static str], arguments: Vec<Argument>| {
        rules.extend(names.iter().map(|&name| Rule {
            name: name.into(),
            action: Action::Allow,
            arguments: arguments.clone(),
        }));
    };
    UNCONDITIONAL.iter().for_each(|names| allow(names, Vec::new()));
    allow(ARCHITECTURE, Vec::new());
    if kernel >= (4, 8) {
        allow(TRACING, Vec::new());
    }
    for (any, names) in WITH_CAPABILITY {
        if capabilities.intersects(*any) {
            allow(names, Vec::new());
        }
    }
    let first = |comparison, value| Argument { index: 0, comparison, value };
    for &(low, high) in FAMILIES {
        let bounds = vec![first(Comparison::AtLeast, low), first(Comparison::AtMost, high)];
        allow(&["socket"], bounds);
    }
    for value in PERSONALITIES {
        allow(&["personality"], vec![first(Comparison::Equal, value)]);
    }
    if !capabilities.contains(CapabilitySet::SYS_ADMIN) {
        // A pointer hides the flags of clone3 from a filter: C libraries fall back to clone.
        allow(&["clone"], vec![first(Comparison::Masked(NEW_NAMESPACES), 0)]);
        rules.push(Rule {
            name: "clone3".into(),
            action: Action::Errno(libc::ENOSYS as u16),
            arguments: vec![],
        });
    }
    Profile { default: Action::Errno(libc::EPERM as u16), rules, ..Profile::native() }
}
