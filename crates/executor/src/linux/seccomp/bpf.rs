//! From a profile to a program for the kernel's classic BPF machine.
//!
//! The numbers of an architecture become ranges with one answer each, and those a search tree: six
//! or seven comparisons decide over any call. Allowed calls cost nothing after the first: the
//! kernel runs the program once a number when it is loaded and remembers where it is always allowed.

use std::collections::BTreeMap;

use super::arch::{Arch, X32_BIT};
use super::profile::{Action, Argument, Comparison, Profile, Rule};
use super::syscalls::{self, Row};

/// A filter that the kernel takes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::linux) struct Program(pub(in crate::linux) Vec<Instruction>);

impl Program {
    /// For the way to the helper: eight bytes an instruction.
    pub(in crate::linux) fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(4 + self.0.len() * 8);
        for Instruction(code, yes, no, constant) in &self.0 {
            bytes.extend(code.to_le_bytes());
            bytes.extend([*yes, *no]);
            bytes.extend(constant.to_le_bytes());
        }
        bytes
    }

    /// What [`Program::to_bytes`] wrote.
    pub(in crate::linux) fn from_bytes(bytes: &[u8]) -> Self {
        let (instructions, _) = bytes.as_chunks::<8>();
        let instruction = |&[c0, c1, yes, no, k0, k1, k2, k3]: &[u8; 8]| {
            Instruction(u16::from_le_bytes([c0, c1]), yes, no, u32::from_le_bytes([k0, k1, k2, k3]))
        };
        Self(instructions.iter().map(instruction).collect())
    }
}

/// `BPF_MAXINSNS`: the kernel takes no longer program.
const MAX_INSTRUCTIONS: usize = 4096;

/// `struct sock_filter`: code, both jumps, constant.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::linux) struct Instruction(
    pub(in crate::linux) u16,
    pub(in crate::linux) u8,
    pub(in crate::linux) u8,
    pub(in crate::linux) u32,
);

// Of linux/bpf_common.h: class, size or operation, source.
pub(super) const LOAD: u16 = 0x20;
pub(super) const AND: u16 = 0x54;
pub(super) const JUMP: u16 = 0x05;
pub(super) const IF_EQUAL: u16 = 0x15;
pub(super) const IF_GREATER: u16 = 0x25;
pub(super) const IF_AT_LEAST: u16 = 0x35;
pub(super) const RETURN: u16 = 0x06;

// Offsets in `struct seccomp_data` (linux/seccomp.h).
pub(super) const NUMBER: u32 = 0;
pub(super) const ARCHITECTURE: u32 = 4;
pub(super) const ARGUMENTS: u32 = 16;

/// What is answered to one number.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Answer {
    Always(Action),
    /// The first case whose arguments match, else the default.
    Cases(Vec<(Vec<Argument>, Action)>),
}

/// The program of a profile; `None` when the kernel would not take one that long.
pub(super) fn compile(profile: &Profile) -> Option<Program> {
    // Looked up once for all architectures: that is most of the work.
    let rows: Vec<_> = profile.rules.iter().map(|rule| (rule, syscalls::row(&rule.name))).collect();
    let mut code = vec![Instruction(LOAD, 0, 0, ARCHITECTURE)];
    let has = |arch| profile.architectures.contains(&arch);
    for &arch in &profile.architectures {
        let Some(token) = arch.token() else { continue };
        // Both have one token; x32 is told apart by its numbers, within the other's part.
        if arch == Arch::X32 && has(Arch::X86_64) {
            continue;
        }
        let other = (arch == Arch::X86_64 && has(Arch::X32)).then_some(Arch::X32);
        let part = architecture(profile.default, &rows, arch, other);
        code.push(Instruction(IF_EQUAL, 1, 0, token));
        code.push(Instruction(JUMP, 0, 0, u32::try_from(part.len()).ok()?));
        code.extend(part);
    }
    code.push(answer(Action::KillProcess));
    (code.len() <= MAX_INSTRUCTIONS).then_some(Program(code))
}

/// A program that has calls with these numbers answered by whoever listens, and allows all others.
/// `None` on a machine whose token is not known.
pub(in crate::linux) fn stop_calls(numbers: &[u32]) -> Option<Program> {
    const ALLOW: u32 = 0x7fff_0000;
    const USER_NOTIFY: u32 = 0x7fc0_0000;
    let mut code = vec![
        Instruction(LOAD, 0, 0, ARCHITECTURE),
        Instruction(IF_EQUAL, 1, 0, Arch::native()?.token()?),
        Instruction(RETURN, 0, 0, ALLOW),
        Instruction(LOAD, 0, 0, NUMBER),
    ];
    for &number in numbers {
        code.extend([Instruction(IF_EQUAL, 0, 1, number), Instruction(RETURN, 0, 0, USER_NOTIFY)]);
    }
    code.push(Instruction(RETURN, 0, 0, ALLOW));
    Some(Program(code))
}

fn answer(action: Action) -> Instruction {
    Instruction(RETURN, 0, 0, action.bits())
}

/// A rule, and the numbers of its call.
type Named<'a> = (&'a Rule, Option<&'static Row>);

fn architecture(default: Action, rows: &[Named<'_>], arch: Arch, x32: Option<Arch>) -> Vec<Instruction> {
    let mut ranges = ranges(default, rows, arch);
    if arch == Arch::X86_64 {
        match x32 {
            Some(x32) => ranges.extend(self::ranges(default, rows, x32)),
            None => ranges.push((X32_BIT, Answer::Always(Action::KillProcess))),
        }
    }
    let mut code = vec![Instruction(LOAD, 0, 0, NUMBER)];
    code.extend(search(&ranges, default));
    code
}

/// Where a new answer begins, by number, the first of them 0.
fn ranges(default: Action, rows: &[Named<'_>], arch: Arch) -> Vec<(u32, Answer)> {
    let mut calls: BTreeMap<u32, Answer> = BTreeMap::new();
    for (Rule { action, arguments, .. }, row) in rows {
        let Some(number) = row.and_then(|row| arch.number_in(row)) else { continue };
        match (calls.get_mut(&number), arguments.is_empty()) {
            (Some(Answer::Always(_)), _) => {}
            (_, true) => drop(calls.insert(number, Answer::Always(*action))),
            (Some(Answer::Cases(cases)), false) => cases.push((arguments.clone(), *action)),
            (None, false) => drop(calls.insert(number, Answer::Cases(vec![(arguments.clone(), *action)]))),
        }
    }
    let first = if arch == Arch::X32 { X32_BIT } else { 0 };
    let mut ranges: Vec<(u32, Answer)> = Vec::new();
    let mut push = |low: u32, answer: Answer| match ranges.last() {
        Some((_, last)) if *last == answer => {}
        _ => ranges.push((low, answer)),
    };
    let mut next = first;
    for (number, answer) in calls {
        if number > next {
            push(next, Answer::Always(default));
        }
        push(number, answer);
        next = number + 1;
    }
    push(next, Answer::Always(beyond(default)));
    ranges
}

/// The answer to calls newer than all that the profile names. A C library that meets EPERM there
/// believes it; at ENOSYS it does without (runc found out the hard way).
fn beyond(default: Action) -> Action {
    match default {
        Action::Errno(_) => Action::Errno(libc::ENOSYS as u16),
        other => other,
    }
}

/// A binary search over `ranges`, the number being loaded.
fn search(ranges: &[(u32, Answer)], default: Action) -> Vec<Instruction> {
    match ranges {
        [] => vec![answer(default)],
        [(_, Answer::Always(action))] => vec![answer(*action)],
        [(_, Answer::Cases(cases))] => {
            let mut code: Vec<Instruction> =
                cases.iter().flat_map(|(all, action)| case(all, *action)).collect();
            code.push(answer(default));
            code
        }
        _ => {
            let (below, above) = ranges.split_at(ranges.len() / 2);
            let low = above.first().map_or(0, |(low, _)| *low);
            let (below, above) = (search(below, default), search(above, default));
            let mut code = match u8::try_from(below.len()) {
                Ok(skipped) => vec![Instruction(IF_AT_LEAST, skipped, 0, low)],
                // Conditional jumps reach 255 instructions, the other kind all of them.
                Err(_) => vec![
                    Instruction(IF_AT_LEAST, 0, 1, low),
                    Instruction(JUMP, 0, 0, u32::try_from(below.len()).unwrap_or(u32::MAX)),
                ],
            };
            code.extend(below);
            code.extend(above);
            code
        }
    }
}

/// Where a comparison goes on.
#[derive(Clone, Copy)]
enum To {
    /// The instruction after it.
    Next,
    /// The argument holds: to the next argument, or the action.
    Holds,
    /// It does not: to the next case.
    Fails,
}

/// Returns `action` when all arguments hold, falls through to what follows otherwise.
fn case(arguments: &[Argument], action: Action) -> Vec<Instruction> {
    let steps: Vec<Vec<(u16, u32, To, To)>> = arguments.iter().map(compare).collect();
    let length = steps.iter().map(Vec::len).sum::<usize>() + 1;
    let mut code = Vec::with_capacity(length);
    for step in steps {
        let end = code.len() + step.len();
        for (operation, constant, yes, no) in step {
            let after = code.len() + 1;
            // Six arguments take 36 instructions at most: every distance fits.
            let distance = |to| match to {
                To::Next => 0,
                To::Holds => u8::try_from(end - after).unwrap_or(u8::MAX),
                To::Fails => u8::try_from(length - after).unwrap_or(u8::MAX),
            };
            code.push(Instruction(operation, distance(yes), distance(no), constant));
        }
    }
    code.push(answer(action));
    code
}

/// The instructions that compare one argument. The machine has 32 bits: first the upper half.
fn compare(argument: &Argument) -> Vec<(u16, u32, To, To)> {
    use To::{Fails, Holds, Next};
    let halves = |value: u64| ((value >> 32) as u32, value as u32);
    let (high, low) = halves(argument.value);
    let at = ARGUMENTS + 8 * u32::from(argument.index);
    // Every architecture of the table is little-endian.
    let (load_high, load_low) = ((LOAD, at + 4, Next, Next), (LOAD, at, Next, Next));
    let ordered = |operation, yes, no| {
        vec![
            load_high,
            (IF_GREATER, high, yes, Next),
            (IF_EQUAL, high, Next, no),
            load_low,
            (operation, low, yes, no),
        ]
    };
    match argument.comparison {
        Comparison::Equal => {
            vec![load_high, (IF_EQUAL, high, Next, Fails), load_low, (IF_EQUAL, low, Holds, Fails)]
        }
        Comparison::NotEqual => {
            vec![load_high, (IF_EQUAL, high, Next, Holds), load_low, (IF_EQUAL, low, Fails, Holds)]
        }
        Comparison::AtLeast => ordered(IF_AT_LEAST, Holds, Fails),
        Comparison::Greater => ordered(IF_GREATER, Holds, Fails),
        Comparison::Less => ordered(IF_AT_LEAST, Fails, Holds),
        Comparison::AtMost => ordered(IF_GREATER, Fails, Holds),
        Comparison::Masked(mask) => {
            let (mask_high, mask_low) = halves(mask);
            vec![
                load_high,
                (AND, mask_high, Next, Next),
                (IF_EQUAL, high, Next, Fails),
                load_low,
                (AND, mask_low, Next, Next),
                (IF_EQUAL, low, Holds, Fails),
            ]
        }
    }
}
