//! No lie and no needless step: after random edits of a context, a build on what earlier ones left is the
//! build in an empty store, and the steps that ran are those that a model of the Dockerfile says.
//!
//! `KILN_EDITS=2000` sets the number of edit sequences and compares after each; `KILN_SEED` repeats a run.

mod model;
mod world;

use std::panic::resume_unwind;
use std::thread;

use kiln_testkit::random::Random;

use self::world::{Depth, KINDS, World};
use crate::harness::{needs_root, test_as};

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
    let parts = parts.into_iter().map(|part| part.join().unwrap_or_else(|why| resume_unwind(why)));
    let tally = parts.fold(Tally::default(), Tally::add);
    let Tally { ran, cached, deltas, with_deltas, kinds } = tally;
    eprintln!(
        "{ran} steps ran, {cached} were cached; {deltas} copies were deltas, in {with_deltas} sequences"
    );
    eprintln!("edits of each kind: {kinds:?}");
    // A backend of whole trees has no deltas.
    let has_deltas = |least: usize| with_deltas > least || test_as().is_some();
    let tells = ran > sequences && cached > sequences && has_deltas(0);
    assert!(sequences < SEQUENCES || tells, "a test that tells little");
    // Few sequences may miss a kind of edit.
    let tells_all = kinds.iter().all(|edits| *edits > 0) && has_deltas(sequences / 5);
    assert!(sequences < 10 * SEQUENCES || tells_all, "a campaign that tells little");
}

/// What was seen.
#[derive(Default)]
struct Tally {
    ran: usize,
    cached: usize,
    /// Copies with few changed files that stand in front of earlier ones.
    deltas: usize,
    /// Sequences with such copies.
    with_deltas: usize,
    /// Edits of each kind.
    kinds: [usize; KINDS],
}

impl Tally {
    fn add(self, other: Self) -> Self {
        Self {
            ran: self.ran + other.ran,
            cached: self.cached + other.cached,
            deltas: self.deltas + other.deltas,
            with_deltas: self.with_deltas + other.with_deltas,
            kinds: std::array::from_fn(|kind| self.kinds[kind] + other.kinds[kind]),
        }
    }
}

fn run(mut random: Random, sequences: usize, cold: usize) -> Tally {
    let mut tally = Tally::default();
    let mut world = World::new(&mut random);
    for nth in 0..sequences {
        if nth > 0 && nth % 100 == 0 {
            eprintln!("{nth} of {sequences}");
        }
        if nth > 0 && nth % ON_ONE == 0 {
            world = World::new(&mut random);
        }
        let (kinds, edits): (Vec<usize>, Vec<String>) =
            (0..1 + random.below(4)).map(|_| world.edit(&mut random)).unzip();
        kinds.into_iter().for_each(|kind| tally.kinds[kind] += 1);
        let edits = edits.join("\n  ");
        let depth = match nth {
            _ if nth % COMPARED == 0 => Depth::Trees,
            _ if nth % cold == 0 => Depth::Image,
            _ => Depth::Steps,
        };
        let done = world.check(depth, &format!("sequence {nth}:\n  {edits}"));
        tally.ran += done.ran;
        tally.cached += done.cached;
        tally.deltas += done.deltas;
        tally.with_deltas += usize::from(done.deltas > 0);
    }
    tally
}
