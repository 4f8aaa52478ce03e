//! Profiles against a machine of our own, and against what they say.

use rustix::thread::CapabilitySet;

use super::arch::{Arch, X32_BIT};
use super::bpf::{
    self, AND, ARCHITECTURE, ARGUMENTS, IF_AT_LEAST, IF_EQUAL, IF_GREATER, JUMP, LOAD, NUMBER, Program,
    RETURN,
};
use super::profile::{Action, Comparison, Profile};
use super::syscalls::NUMBERS;
use super::{SeccompProfile, default, json};
use crate::Capabilities;

const ALLOW: u32 = 0x7fff_0000;
const KILL: u32 = 0x8000_0000;
const EPERM: u32 = 0x5_0001;
const ENOSYS: u32 = 0x5_0026;
const KERNEL: (u32, u32) = (6, 1);

/// What the kernel's machine would answer. Also holds programs to the kernel's own check: jumps
/// lead forward and stay inside.
fn answer(program: &Program, arch: u32, number: u32, arguments: [u64; 6]) -> u32 {
    let mut accumulator = 0;
    let mut at = 0;
    loop {
        let bpf::Instruction(code, yes, no, constant) = program.0[at];
        at += 1;
        let jump = |holds: bool| usize::from(if holds { yes } else { no });
        match code {
            LOAD => {
                accumulator = match constant {
                    NUMBER => number,
                    ARCHITECTURE => arch,
                    offset => {
                        let argument = arguments[usize::try_from((offset - ARGUMENTS) / 8).unwrap()];
                        if offset % 8 == 0 { argument as u32 } else { (argument >> 32) as u32 }
                    }
                }
            }
            AND => accumulator &= constant,
            JUMP => at += usize::try_from(constant).unwrap(),
            IF_EQUAL => at += jump(accumulator == constant),
            IF_GREATER => at += jump(accumulator > constant),
            IF_AT_LEAST => at += jump(accumulator >= constant),
            RETURN => return constant,
            other => panic!("instruction {other:#x}"),
        }
    }
}

/// What the profile says, read without any cleverness; `numbers` are those of its rules.
fn expected(profile: &Profile, numbers: &[Option<u32>], number: u32, arguments: [u64; 6]) -> u32 {
    let of_number = || {
        let rules = profile.rules.iter().zip(numbers);
        rules.filter(|(_, known)| **known == Some(number)).map(|(rule, _)| rule)
    };
    if let Some(rule) = of_number().find(|rule| rule.arguments.is_empty()) {
        return rule.action.bits();
    }
    let holds = |argument: &super::profile::Argument| {
        let (given, value) = (arguments[usize::from(argument.index)], argument.value);
        match argument.comparison {
            Comparison::Equal => given == value,
            Comparison::NotEqual => given != value,
            Comparison::Less => given < value,
            Comparison::AtMost => given <= value,
            Comparison::Greater => given > value,
            Comparison::AtLeast => given >= value,
            Comparison::Masked(mask) => given & mask == value,
        }
    };
    if let Some(rule) = of_number().find(|rule| rule.arguments.iter().all(holds)) {
        return rule.action.bits();
    }
    let last = numbers.iter().flatten().max().copied().unwrap_or(0);
    match profile.default {
        Action::Errno(_) if number > last => ENOSYS,
        other => other.bits(),
    }
}

const VALUES: [u64; 16] = [
    0,
    1,
    2,
    8,
    11,
    12,
    13,
    38,
    40,
    45,
    0x2_0000,
    0x7e02_0000,
    0x1000_0000,
    0xffff_ffff,
    0x1_0000_0001,
    u64::MAX,
];

#[track_caller]
fn agrees(profile: &Profile) {
    let program = bpf::compile(profile).unwrap();
    for &arch in &profile.architectures {
        let named: Vec<Option<u32>> = profile.rules.iter().map(|rule| arch.number(&rule.name)).collect();
        let numbers: Vec<u32> = match arch {
            Arch::X32 => (X32_BIT..X32_BIT + 600).collect(),
            _ => (0..600).chain(0xf_0000..0xf_0008).chain([X32_BIT - 1]).collect(),
        };
        for number in numbers {
            for value in VALUES {
                for arguments in [[value, 0, 0, 0, 0, 0], [2, value, value, 0, 0, value]] {
                    let got = answer(&program, arch.token().unwrap(), number, arguments);
                    let expected = expected(profile, &named, number, arguments);
                    assert_eq!(got, expected, "{arch:?} {number} {arguments:x?}");
                }
            }
        }
    }
}

fn on(architectures: &[Arch], profile: Profile) -> Profile {
    Profile { architectures: architectures.to_vec(), ..profile }
}

#[test]
fn the_program_answers_as_the_profile_says() {
    for capabilities in [Capabilities::default(), Capabilities::ALL] {
        let profile = default::profile(capabilities.set(), KERNEL);
        agrees(&on(&[Arch::X86_64, Arch::X86, Arch::X32], profile.clone()));
        agrees(&on(&[Arch::Aarch64, Arch::Arm], profile));
    }
}

#[test]
fn the_default_program_is_short() {
    let profile = default::profile(Capabilities::default().set(), KERNEL);
    let length = bpf::compile(&on(&[Arch::X86_64, Arch::X86, Arch::X32], profile)).unwrap().0.len();
    assert!(length < 1000, "{length}");
}

/// Every call whose answer depends on a capability, with every single one added to the default.
#[test]
fn one_capability_allows_what_is_its_own() {
    let x86_64 = |set| bpf::compile(&on(&[Arch::X86_64], default::profile(set, KERNEL))).unwrap();
    let allowed = |program: &Program| -> Vec<&str> {
        let number = |name: &str| Arch::X86_64.number(name);
        let calls = NUMBERS.iter().filter_map(|(name, _)| Some((*name, number(name)?)));
        let token = Arch::X86_64.token().unwrap();
        calls
            .filter(|(_, number)| answer(program, token, *number, [99; 6]) == ALLOW)
            .map(|(name, _)| name)
            .collect()
    };
    let base = Capabilities::default().set();
    let without = allowed(&x86_64(base));
    let mut table = String::new();
    for name in [
        "SYS_ADMIN",
        "BPF",
        "PERFMON",
        "SYSLOG",
        "DAC_READ_SEARCH",
        "SYS_BOOT",
        "SYS_MODULE",
        "SYS_NICE",
        "SYS_PACCT",
        "SYS_PTRACE",
        "SYS_RAWIO",
        "SYS_TIME",
        "SYS_TTY_CONFIG",
        "NET_ADMIN",
    ] {
        let with = allowed(&x86_64(base | Capabilities::parse(name).unwrap().set()));
        let more: Vec<&str> = with.into_iter().filter(|name| !without.contains(name)).collect();
        table.push_str(&format!("{name}: {}\n", more.join(" ")));
    }
    assert_eq!(table, "\
SYS_ADMIN: bpf clone3 fanotify_init fsconfig fsmount fsopen fspick lookup_dcookie lsm_get_self_attr lsm_list_modules \
lsm_set_self_attr mount mount_setattr move_mount open_tree perf_event_open quotactl quotactl_fd setdomainname \
sethostname setns syslog umount2 unshare
BPF: bpf
PERFMON: perf_event_open
SYSLOG: syslog
DAC_READ_SEARCH: open_by_handle_at
SYS_BOOT: reboot
SYS_MODULE: delete_module finit_module init_module
SYS_NICE: get_mempolicy mbind set_mempolicy set_mempolicy_home_node
SYS_PACCT: acct
SYS_PTRACE: kcmp pidfd_getfd process_madvise
SYS_RAWIO: ioperm iopl
SYS_TIME: clock_settime settimeofday
SYS_TTY_CONFIG: vhangup
NET_ADMIN: \n");
}

#[test]
fn unknown_architectures_end_the_process() {
    let profile = default::profile(Capabilities::default().set(), KERNEL);
    let program = bpf::compile(&on(&[Arch::X86_64], profile)).unwrap();
    let read = |arch: Arch| answer(&program, arch.token().unwrap(), arch.number("read").unwrap(), [0; 6]);
    assert_eq!(read(Arch::X86_64), ALLOW);
    assert_eq!(read(Arch::X86), KILL);
    assert_eq!(read(Arch::X32), KILL);
}

#[test]
fn a_debugger_needs_a_kernel_that_filters_what_it_does() {
    let of = |kernel| {
        let profile = default::profile(Capabilities::default().set(), kernel);
        let program = bpf::compile(&on(&[Arch::X86_64], profile)).unwrap();
        answer(&program, Arch::X86_64.token().unwrap(), Arch::X86_64.number("ptrace").unwrap(), [0; 6])
    };
    assert_eq!((of((4, 7)), of((4, 8))), (EPERM, ALLOW));
}

fn document(text: &str) -> Profile {
    let document = json::Document::parse(text).unwrap();
    document.decide(Capabilities::default().set() | CapabilitySet::SYS_TIME, KERNEL)
}

#[test]
fn a_profile_of_ones_own_is_read_as_docker_reads_it() {
    let profile = document(
        r#"{
        "defaultAction": "SCMP_ACT_ERRNO", "defaultErrnoRet": 13,
        "archMap": [{"architecture": "SCMP_ARCH_X86_64", "subArchitectures": ["SCMP_ARCH_X86"]},
                    {"architecture": "SCMP_ARCH_S390X", "subArchitectures": null}],
        "syscalls": [
            {"names": ["read", "write"], "action": "SCMP_ACT_ALLOW"},
            {"names": ["mkdir"], "action": "SCMP_ACT_ERRNO", "errnoRet": 5},
            {"names": ["socket"], "action": "SCMP_ACT_ALLOW",
             "args": [{"index": 0, "value": 1, "op": "SCMP_CMP_EQ"}, {"index": 1, "value": 2, "op": "SCMP_CMP_EQ"}]},
            {"names": ["dup3"], "action": "SCMP_ACT_ALLOW",
             "args": [{"index": 0, "value": 3, "op": "SCMP_CMP_EQ"}, {"index": 0, "value": 8, "op": "SCMP_CMP_GT"}]},
            {"names": ["clone"], "action": "SCMP_ACT_ALLOW",
             "args": [{"index": 0, "value": 255, "valueTwo": 17, "op": "SCMP_CMP_MASKED_EQ"}]},
            {"names": ["stime", "settimeofday"], "action": "SCMP_ACT_ALLOW", "includes": {"caps": ["CAP_SYS_TIME"]}},
            {"names": ["reboot"], "action": "SCMP_ACT_ALLOW", "includes": {"caps": ["CAP_SYS_TIME", "CAP_SYS_BOOT"]}},
            {"names": ["sync"], "action": "SCMP_ACT_ALLOW", "excludes": {"minKernel": "4.8"}},
            {"names": ["acct"], "action": "SCMP_ACT_ALLOW", "includes": {"arches": ["s390x"]}},
            {"names": ["getpid"], "action": "SCMP_ACT_KILL_PROCESS"}
        ]}"#,
    );
    if Arch::native() != Some(Arch::X86_64) {
        return;
    }
    assert_eq!(profile.architectures, [Arch::X86_64, Arch::X86]);
    agrees(&profile);
    let program = bpf::compile(&profile).unwrap();
    let call = |name: &str, first: u64, second: u64| {
        let number = Arch::X86_64.number(name).unwrap();
        answer(&program, Arch::X86_64.token().unwrap(), number, [first, second, 0, 0, 0, 0])
    };
    let table = [
        call("read", 0, 0),
        call("mkdir", 0, 0),
        call("socket", 1, 2),
        call("socket", 1, 3),
        call("dup3", 3, 0),
        call("dup3", 9, 0),
        call("dup3", 8, 0),
        call("clone", 0x100 | 17, 0),
        call("clone", 18, 0),
        call("settimeofday", 0, 0),
        call("reboot", 0, 0),
        call("sync", 0, 0),
        call("acct", 0, 0),
        call("getpid", 0, 0),
    ];
    let eacces = 0x5_000d;
    assert_eq!(
        table,
        [
            ALLOW, 0x5_0005, ALLOW, eacces, ALLOW, ALLOW, eacces, ALLOW, eacces, ALLOW, eacces, eacces,
            eacces, KILL,
        ]
    );
}

#[test]
fn profiles_that_say_nothing_sensible_are_refused() {
    for (text, part) in [
        ("{}", "defaultAction"),
        ("nonsense", "expected"),
        (r#"{"defaultAction": "SCMP_ACT_MAYBE"}"#, "SCMP_ACT_MAYBE"),
        (r#"{"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{"action": "SCMP_ACT_ALLOW"}]}"#, "names"),
        (
            r#"{"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{"names": ["x"], "action": "SCMP_ACT_ALLOW",
            "args": [{"index": 6, "value": 0, "op": "SCMP_CMP_EQ"}]}]}"#,
            "argument number 6",
        ),
        (
            r#"{"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{"names": ["x"], "action": "SCMP_ACT_ALLOW",
            "includes": {"caps": ["CAP_NONSENSE"]}}]}"#,
            "CAP_NONSENSE",
        ),
    ] {
        let error = SeccompProfile::parse(text).unwrap_err();
        assert!(error.contains(part), "{text}: {error}");
    }
    let odd = r#"{"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{"names": ["read", "raed"], "action": "SCMP_ACT_LOG"}]}"#;
    assert_eq!(SeccompProfile::parse(odd).unwrap().unknown_names().collect::<Vec<_>>(), ["raed"]);
}

#[test]
fn compiling_the_default_takes_microseconds() {
    let started = std::time::Instant::now();
    let program = bpf::compile(&default::profile(Capabilities::default().set(), KERNEL)).unwrap();
    // Measured, not asserted: a build compiles once, whatever the number of its steps.
    println!("{} instructions in {:?}", program.0.len(), started.elapsed());
}
