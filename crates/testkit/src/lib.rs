//! What tests of several crates share. Nothing here ships.
//!
//! # Invariants
//! - Faults are made from outside, through ptrace(2): the program under test is the one that ships,
//!   without hooks.

#![forbid(unsafe_code)]

pub mod faults;
