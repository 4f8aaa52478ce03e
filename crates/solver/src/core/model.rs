//! What a build of toys must do, worked out one step after the other: lookups by provisional keys,
//! then runs, then lookups by final keys. It knows no events, no demand and no marks.

use std::collections::{BTreeMap, BTreeSet};

use super::toy::{Made, Toy, World, part, value};
use super::*;
use crate::Identity;
use crate::key::KeyKind;

/// It, or something it needs, fails.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Failed;

/// How a lookup ended.
#[derive(Debug, Clone)]
enum Looked {
    Hit {
        cached: Cached<Made>,
        fast: Option<CacheKey>,
        slow: Option<CacheKey>,
    },
    Missed {
        fast: Option<CacheKey>,
        slow: Option<CacheKey>,
    },
    /// It stands on something without a key.
    Unnamed,
}

/// A run: by key, or by vertex where there is none.
pub(super) type Ran = (Option<(CacheKey, bool)>, Option<usize>);

type Final = Result<(u64, Option<CacheKey>), Failed>;

pub(super) struct Model<'a> {
    toys: &'a [Toy],
    pub(super) world: World,
    first: BTreeMap<usize, Result<Looked, Failed>>,
    outputs: BTreeMap<usize, Final>,
    runs: BTreeMap<(CacheKey, bool), Result<Cached<Made>, Failed>>,
    /// What ran that has no key.
    unnamed: BTreeSet<usize>,
    /// Whose result was too old, and those of them of which nobody had seen a key then.
    outdated: BTreeSet<usize>,
    outdated_at_first: BTreeSet<usize>,
}

impl<'a> Model<'a> {
    pub(super) fn new(toys: &'a [Toy], world: World) -> Self {
        let (first, outputs, runs) = (BTreeMap::new(), BTreeMap::new(), BTreeMap::new());
        let (outdated, outdated_at_first) = (BTreeSet::new(), BTreeSet::new());
        Self { toys, world, first, outputs, runs, unnamed: BTreeSet::new(), outdated, outdated_at_first }
    }

    /// The target's value.
    pub(super) fn solve(&mut self, target: usize) -> Result<u64, Failed> {
        self.output(target).map(|(value, _)| value)
    }

    /// What ran: by key, and by vertex where there is none.
    pub(super) fn ran(&self) -> BTreeSet<Ran> {
        let named = self.runs.keys().map(|key| (Some(*key), None));
        named.chain(self.unnamed.iter().map(|vertex| (None, Some(*vertex)))).collect()
    }

    /// The key its users see first.
    fn provisional(&mut self, vertex: usize) -> Result<Option<CacheKey>, Failed> {
        match &self.toys[vertex].plan.identity {
            Identity::Source(digest) => return Ok(Some(CacheKey::derive(KeyKind::Definition, digest, &[]))),
            Identity::Unknown => return Ok(None),
            Identity::Cached(_) if self.toys[vertex].plan.refresh => return Ok(self.output(vertex)?.1),
            Identity::Cached(_) => {}
        }
        let first = self.first(vertex)?;
        if self.outdated_at_first.contains(&vertex) {
            return Ok(self.output(vertex)?.1);
        }
        Ok(match first {
            Looked::Hit { cached, .. } => Some(cached.canonical),
            Looked::Missed { fast, slow } => slow.or(fast),
            Looked::Unnamed => None,
        })
    }

    fn first(&mut self, vertex: usize) -> Result<Looked, Failed> {
        if let Some(known) = self.first.get(&vertex) {
            return known.clone();
        }
        let keys = self.all(vertex, Self::provisional);
        let looked = keys.and_then(|keys| self.look_up(vertex, &keys));
        if self.outdated.contains(&vertex) {
            self.outdated_at_first.insert(vertex);
        }
        self.first.insert(vertex, looked.clone());
        looked
    }

    /// The same of all inputs: all are tried, even if one fails.
    fn all<T>(
        &mut self,
        vertex: usize,
        mut of: impl FnMut(&mut Self, usize) -> Result<T, Failed>,
    ) -> Result<Vec<T>, Failed> {
        let toys = self.toys;
        let tried: Vec<_> = toys[vertex].plan.inputs.iter().map(|input| of(self, input.vertex)).collect();
        tried.into_iter().collect()
    }

    fn look_up(&mut self, vertex: usize, keys: &[Option<CacheKey>]) -> Result<Looked, Failed> {
        let plan = &self.toys[vertex].plan;
        let whole = |at: usize| plan.inputs[at].usage == InputUse::Definition;
        if keys.iter().enumerate().any(|(at, key)| key.is_none() && whole(at)) {
            return Ok(Looked::Unnamed);
        }
        let all: Option<Vec<Digest>> = keys.iter().map(|key| key.map(|key| key.0)).collect();
        let fast = all.map(|all| CacheKey::derive(KeyKind::Definition, &self.op(vertex), &all));
        if let Some(cached) = fast.and_then(|fast| self.find(vertex, &fast)) {
            return Ok(Looked::Hit { cached, fast, slow: None });
        }
        self.look_up_content(vertex, keys, fast)
    }

    fn look_up_content(
        &mut self,
        vertex: usize,
        keys: &[Option<CacheKey>],
        fast: Option<CacheKey>,
    ) -> Result<Looked, Failed> {
        let toys = self.toys;
        let inputs = &toys[vertex].plan.inputs;
        if inputs.iter().all(|input| input.usage == InputUse::Definition) {
            return Ok(Looked::Missed { fast, slow: None });
        }
        let mut parts = Vec::new();
        for (input, key) in inputs.iter().zip(keys) {
            parts.push(match input.usage {
                InputUse::Definition => Ok(key.expect("looked at before").0),
                InputUse::Content => {
                    self.output(input.vertex).map(|(value, _)| Digest::of(&part(value).to_le_bytes()))
                }
            });
        }
        let parts: Vec<Digest> = parts.into_iter().collect::<Result<_, _>>()?;
        let op = toys[vertex].plan.by_content.unwrap_or_else(|| self.op(vertex));
        let slow = CacheKey::derive(KeyKind::Content, &op, &parts);
        if let Some(cached) = self.find(vertex, &slow) {
            if fast.is_some() {
                self.link(vertex, keys, &cached)?;
            }
            return Ok(Looked::Hit { cached, fast, slow: Some(slow) });
        }
        Ok(Looked::Missed { fast, slow: Some(slow) })
    }

    /// Next time nothing has to be read.
    fn link(
        &mut self,
        vertex: usize,
        keys: &[Option<CacheKey>],
        cached: &Cached<Made>,
    ) -> Result<(), Failed> {
        let mut real = Vec::new();
        for (input, key) in self.toys[vertex].plan.inputs.iter().zip(keys) {
            real.push(match input.usage {
                InputUse::Definition => *key,
                InputUse::Content => self.output(input.vertex)?.1,
            });
        }
        if let Some(real) = real.into_iter().map(|key| key.map(|key| key.0)).collect::<Option<Vec<_>>>() {
            let key = CacheKey::derive(KeyKind::Definition, &self.op(vertex), &real);
            self.world.put(key, cached, false);
        }
        Ok(())
    }

    fn op(&self, vertex: usize) -> Digest {
        match self.toys[vertex].plan.identity {
            Identity::Cached(op) => op,
            Identity::Source(_) | Identity::Unknown => unreachable!("has no lookups"),
        }
    }

    fn find(&mut self, vertex: usize, key: &CacheKey) -> Option<Cached<Made>> {
        let found = self.world.records.get(key).filter(|_| !self.is_made_again(vertex)).cloned()?;
        if self.toys[vertex].ages && self.world.old.contains(&found.output.name) {
            self.outdated.insert(vertex);
            return None;
        }
        Some(found)
    }

    fn is_made_again(&self, vertex: usize) -> bool {
        self.toys[vertex].plan.refresh || self.outdated.contains(&vertex)
    }

    fn output(&mut self, vertex: usize) -> Final {
        if let Some(known) = self.outputs.get(&vertex) {
            return *known;
        }
        let output = self.make(vertex);
        self.outputs.insert(vertex, output);
        output
    }

    fn make(&mut self, vertex: usize) -> Final {
        let toys = self.toys;
        let Toy { plan, .. } = &toys[vertex];
        let is_cached = matches!(plan.identity, Identity::Cached(_));
        let mut looked = None;
        if is_cached && !plan.refresh {
            let keys = self.all(vertex, Self::provisional)?;
            let first = self.first(vertex)?;
            match self.load(vertex, &keys, first)? {
                Ok(done) => return Ok(done),
                Err(missed) => looked = Some(missed),
            }
        }
        let is_made_again = self.is_made_again(vertex);
        let below = self.all(vertex, Self::output)?;
        let keys: Vec<Option<CacheKey>> = below.iter().map(|(_, key)| *key).collect();
        let differs = is_cached && keys != self.all(vertex, Self::provisional)?;
        let again = is_made_again || (differs && !matches!(looked, Some(Looked::Unnamed)));
        if is_cached && again {
            let last = self.look_up(vertex, &keys)?;
            match self.load(vertex, &keys, last)? {
                Ok(done) => return Ok(done),
                Err(missed) => looked = Some(missed),
            }
        }
        match looked {
            Some(Looked::Missed { fast, slow }) => self.run(vertex, &below, fast, slow),
            _ => {
                self.unnamed.insert(vertex);
                let key = if is_cached { None } else { self.provisional(vertex)? };
                Ok((self.value(vertex, &below)?, key))
            }
        }
    }

    /// The result, or what follows from its being gone.
    fn load(
        &mut self,
        vertex: usize,
        keys: &[Option<CacheKey>],
        mut looked: Looked,
    ) -> Result<Result<(u64, Option<CacheKey>), Looked>, Failed> {
        while let Looked::Hit { cached, fast, slow } = looked {
            if !self.world.gone.contains(&cached.output.name) {
                return Ok(Ok((cached.output.value, Some(cached.canonical))));
            }
            looked = match slow {
                None => self.look_up_content(vertex, keys, fast)?,
                Some(_) => Looked::Missed { fast, slow },
            };
        }
        Ok(Err(looked))
    }

    fn value(&self, vertex: usize, below: &[(u64, Option<CacheKey>)]) -> Result<u64, Failed> {
        let Toy { plan, effect, fails, ages: _ } = &self.toys[vertex];
        let uses = plan.inputs.iter().map(|input| input.usage);
        let value = value(*effect, uses.zip(below.iter().map(|(value, _)| *value)));
        if *fails { Err(Failed) } else { Ok(value) }
    }

    fn run(
        &mut self,
        vertex: usize,
        below: &[(u64, Option<CacheKey>)],
        fast: Option<CacheKey>,
        slow: Option<CacheKey>,
    ) -> Final {
        let plan = &self.toys[vertex].plan;
        let main = slow.or(fast).expect("it has a key");
        let refresh = self.is_made_again(vertex);
        if let Some(known) = self.runs.get(&(main, refresh)) {
            let known = known.clone()?;
            if slow.is_some() {
                fast.into_iter().for_each(|fast| self.world.put(fast, &known, false));
            }
            return Ok((known.output.value, Some(known.canonical)));
        }
        let whole = plan.inputs.iter().zip(below).filter(|(input, _)| input.usage == InputUse::Definition);
        let whole: Vec<Digest> = whole.map(|(_, (_, key))| key.expect("it is named").0).collect();
        let slot = plan.lineage.map(|step| CacheKey::derive(KeyKind::Slot, &step, &whole));
        let made = self.value(vertex, below).map(|value| {
            let keys = slow.into_iter().chain(fast).collect();
            // In its world nobody says anything but what was made.
            let save = Save { canonical: main, keys, marks: Vec::new(), slot, refresh, is_borrowed: false };
            self.world.keep(value, &save)
        });
        self.runs.insert((main, refresh), made.clone());
        made.map(|made| (made.output.value, Some(made.canonical)))
    }
}
