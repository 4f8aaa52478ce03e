//! What tests of several crates share. Nothing here ships.
//!
//! [`faults`] runs a program under ptrace(2) and lets its system calls fail; [`recorder`] only looks on
//! and writes down what they do to a directory; [`disk`] says what a power cut could leave of that; [`reads`]
//! changes a file while it is read.
//!
//! # Invariants
//! - Faults are made from outside, through ptrace(2): the program under test is the one that ships,
//!   without hooks.

#![forbid(unsafe_code)]

pub mod disk;
pub mod faults;
pub mod machine;
pub mod random;
pub mod reads;
pub mod recorder;
