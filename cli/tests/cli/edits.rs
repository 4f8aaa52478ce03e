//! No lie and no needless step: after random edits of a context, a build on what earlier ones left is the
//! build in an empty store, and the steps that ran are those that a model of the Dockerfile says.
//!
//! `KILN_EDITS=2000` sets the number of edit sequences and compares after each; `KILN_SEED` repeats a run.

mod model;
mod world;

use std::panic::resume_unwind;
use std::thread;

use kiln_testkit::random::Random;

use self::world::{Depth, World};
use crate::harness::needs_root;

/// Sequences in the test command.
const SEQUENCES: usize = 40;
/// Sequences on one context and one store.
const ON_ONE: usize = 15;
/// In the test command the empty store builds after so many: what was wrong is wrong still, most often.
const COLD: usize = 3;
/// A tree is compared file by file this often; by the layers' digests it is every time.
const COMPARED: usize = 10;
/// Worlds side by side.
const THREADS: u64 = 2;

#[test]
fn no_edit_is_missed_and_no_step_runs_without_need() {
    needs_root!();
    let campaign = std::env::var("KILN_EDITS").ok().map(|n| n.parse().expect("a number"));
    let (sequences, cold) = campaign.map_or((SEQUENCES, COLD), |sequences| (sequences, 1));
    let seed = Random::new().seed();
    eprintln!("KILN_SEED={seed} repeats this run of {sequences} sequences");
    let parts = (0..THREADS).map(|nth| {
        let share = sequences / THREADS as usize + usize::from(nth == 0) * (sequences % THREADS as usize);
        thread::spawn(move || run(Random::of(seed.wrapping_add(nth)), share, cold))
    });
    let parts: Vec<_> = parts.collect();
    let tally =
        parts.into_iter().map(|part| part.join().unwrap_or_else(|why| resume_unwind(why))).fold((0, 0), add);
    eprintln!("{} steps ran, {} were cached", tally.0, tally.1);
    assert!(sequences < 10 || (tally.0 > sequences && tally.1 > sequences), "a test that tells little");
}

fn add(one: (usize, usize), other: (usize, usize)) -> (usize, usize) {
    (one.0 + other.0, one.1 + other.1)
}

/// How many steps ran and how many did not.
fn run(mut random: Random, sequences: usize, cold: usize) -> (usize, usize) {
    let mut tally = (0, 0);
    let mut world = World::new(&mut random);
    for nth in 0..sequences {
        if nth > 0 && nth % 100 == 0 {
            eprintln!("{nth} of {sequences}");
        }
        if nth > 0 && nth % ON_ONE == 0 {
            world = World::new(&mut random);
        }
        let edits: Vec<String> = (0..1 + random.below(4)).map(|_| world.edit(&mut random)).collect();
        let edits = edits.join("\n  ");
        let depth = match nth {
            _ if nth % COMPARED == 0 => Depth::Trees,
            _ if nth % cold == 0 => Depth::Image,
            _ => Depth::Steps,
        };
        let ran = world.check(depth, &format!("sequence {nth}:\n  {edits}"));
        tally = add(tally, ran);
    }
    tally
}
