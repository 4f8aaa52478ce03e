//! Keys and lookups: from "somebody asks" to "there is a result" or "it has to run".

use std::sync::Arc;

use kiln_oci::Digest;

use super::node::{Keys, Provisional, Round, Save, State};
use super::{Command, Core};
use crate::key::KeyKind;
use crate::{CacheKey, Cached, Identity, InputUse};

impl<O: Clone> Core<O> {
    /// Goes on from `Idle` as far as the inputs' keys allow.
    pub(super) fn identify(&mut self, vertex: usize) {
        let node = self.node_mut(vertex);
        let key = match &node.identity {
            Identity::Source(digest) => Some(CacheKey::derive(KeyKind::Definition, digest, &[])),
            Identity::Unknown => None,
            Identity::Cached(_) if node.refresh => {
                // Nothing stands on an earlier result of it: it has no key until it has run.
                node.state = State::Missed { keys: None };
                return self.want(vertex);
            }
            Identity::Cached(_) => {
                if node.missing_keys == 0 {
                    return self.derive(vertex);
                }
                for (position, &(input, _)) in self.inputs(vertex).iter().enumerate() {
                    self.ask(input);
                    self.doubt(vertex, position);
                }
                return;
            }
        };
        node.state = State::Missed { keys: None };
        self.work.push(vertex);
        self.identified(vertex, key);
    }

    /// What stands for an input in this vertex's keys.
    fn key_of(&self, vertex: usize, input: usize) -> Option<CacheKey> {
        match self.node(vertex).round {
            Round::First => self.node(input).provisional.key(),
            Round::Last => self.node(input).canonical(),
        }
    }

    fn op(&self, vertex: usize) -> Digest {
        match &self.node(vertex).identity {
            Identity::Cached(op) | Identity::Source(op) => *op,
            Identity::Unknown => unreachable!("only what is looked up has keys"),
        }
    }

    /// The op where inputs that are read count by their content.
    fn op_by_content(&self, vertex: usize) -> Digest {
        self.node(vertex).by_content.unwrap_or_else(|| self.op(vertex))
    }

    /// Starts a round: the key by definition, and its lookup.
    fn derive(&mut self, vertex: usize) {
        let inputs = self.inputs(vertex);
        let keys: Vec<Option<CacheKey>> =
            inputs.iter().map(|&(input, _)| self.key_of(vertex, input)).collect();
        let mut whole = inputs.iter().zip(&keys).filter(|((_, usage), _)| *usage == InputUse::Definition);
        if whole.any(|(_, key)| key.is_none()) {
            // It stands on something that cannot be named.
            self.node_mut(vertex).state = State::Missed { keys: None };
            self.work.push(vertex);
            return self.identified(vertex, None);
        }
        let digests: Option<Vec<Digest>> = keys.into_iter().map(|key| key.map(|key| key.0)).collect();
        let fast = digests.map(|digests| CacheKey::derive(KeyKind::Definition, &self.op(vertex), &digests));
        match fast {
            Some(key) if !self.node(vertex).refresh => {
                self.node_mut(vertex).state = State::Fast { key };
                self.command(vertex, Command::Lookup { vertex, key });
            }
            _ => self.after_fast_miss(vertex, fast),
        }
    }

    /// No result by definition: ask by content where content is read, else it is a miss.
    fn after_fast_miss(&mut self, vertex: usize, fast: Option<CacheKey>) {
        let inputs = self.inputs(vertex);
        if inputs.iter().all(|(_, usage)| *usage == InputUse::Definition) {
            return self.missed(vertex, Keys { fast, slow: None });
        }
        self.node_mut(vertex).state = State::Content { fast };
        self.work.push(vertex);
        self.want_reads(vertex);
        for position in 0..inputs.len() {
            self.read(vertex, position);
            self.doubt(vertex, position);
        }
    }

    /// Asks for the digest of what is read from an input that is there, once.
    pub(super) fn read(&mut self, vertex: usize, position: usize) {
        let node = self.node(vertex);
        let (input, usage) = node.inputs[position];
        if usage != InputUse::Content
            || node.digest_asked[position]
            || !node.asked
            || !matches!(node.state, State::Content { .. })
        {
            return;
        }
        if let Some(output) = self.node(input).output().cloned() {
            self.node_mut(vertex).digest_asked[position] = true;
            self.command(vertex, Command::Digest { vertex, input: position, output });
        }
    }

    /// The digest of what `vertex` reads from an input is known.
    pub(super) fn digested(&mut self, vertex: usize, position: usize, digest: Digest) {
        let node = self.node_mut(vertex);
        if node.digests[position].replace(digest).is_none() {
            node.undigested -= 1;
        }
        self.work.push(vertex);
    }

    /// Goes on from `Content` when every digest is there.
    pub(super) fn know_content(&mut self, vertex: usize) {
        let State::Content { fast } = self.node(vertex).state else { return };
        let inputs = self.inputs(vertex);
        let part = |(position, &(input, usage)): (usize, &(usize, InputUse))| match usage {
            InputUse::Content => self.node(vertex).digests[position],
            InputUse::Definition => self.key_of(vertex, input).map(|key| key.0),
        };
        let parts: Option<Vec<Digest>> = inputs.iter().enumerate().map(part).collect();
        let parts = parts.expect("whoever gathers digests has the other inputs' keys");
        let key = CacheKey::derive(KeyKind::Content, &self.op_by_content(vertex), &parts);
        let keys = Keys { fast, slow: Some(key) };
        if self.node(vertex).refresh {
            return self.missed(vertex, keys);
        }
        self.node_mut(vertex).state = State::Slow { keys };
        self.command(vertex, Command::Lookup { vertex, key });
    }

    /// The cache answered a lookup.
    pub(super) fn found(&mut self, vertex: usize, hit: Option<Cached<O>>) {
        let keys = match &self.node(vertex).state {
            State::Fast { key } => Keys { fast: Some(*key), slow: None },
            State::Slow { keys } => *keys,
            _ => return,
        };
        match hit {
            Some(cached) => {
                let canonical = cached.canonical;
                if let Keys { fast: Some(_), slow: Some(_) } = keys {
                    self.link(vertex, cached.clone());
                }
                self.node_mut(vertex).state = State::Hit { cached, keys };
                self.work.push(vertex);
                self.identified(vertex, Some(canonical));
            }
            None if keys.slow.is_none() => self.after_fast_miss(vertex, keys.fast),
            None => self.missed(vertex, keys),
        }
    }

    /// A result was found by content: next time nothing has to be read. It is linked to what was read, not to
    /// what that seemed to be: of keys that nothing was ever saved under there are no marks.
    ///
    /// Such a link says that what was read has this content. Of what is borrowed that is hearsay. The other inputs
    /// have the same keys in both.
    fn link(&mut self, vertex: usize, mut cached: Cached<O>) {
        let inputs = self.inputs(vertex);
        let is_read = |&&(_, usage): &&(usize, InputUse)| usage == InputUse::Content;
        cached.is_borrowed |= inputs.iter().filter(is_read).any(|&(input, _)| self.node(input).is_borrowed());
        let key = |&(input, usage): &(usize, InputUse)| match usage {
            InputUse::Content => self.node(input).canonical(),
            InputUse::Definition => self.key_of(vertex, input),
        };
        let keys: Option<Vec<CacheKey>> = inputs.iter().map(key).collect();
        let Some(keys) = keys else { return };
        let marks = self.marks_of(vertex, |at, _| Some(keys[at]));
        let digests: Vec<Digest> = keys.iter().map(|key| key.0).collect();
        let keys = vec![CacheKey::derive(KeyKind::Definition, &self.op(vertex), &digests)];
        self.commands.push(Command::Link { vertex, keys, marks, cached });
    }

    /// There is a result that does not count any more: from here on it is as if somebody wanted it made again.
    pub(super) fn outdated(&mut self, vertex: usize) {
        self.node_mut(vertex).refresh = true;
        if self.is_identified(vertex) {
            // Its users have seen a key. They look again once it has another one.
            return self.found(vertex, None);
        }
        self.node_mut(vertex).state = State::Missed { keys: None };
        self.want(vertex);
        self.work.push(vertex);
    }

    /// Somebody wants what was found.
    pub(super) fn load(&mut self, vertex: usize) {
        let node = self.node_mut(vertex);
        let State::Hit { cached, keys } = &node.state else { return };
        let (cached, keys) = (cached.clone(), *keys);
        node.state = State::Loading { cached: cached.clone(), keys };
        self.command(vertex, Command::Load { vertex, cached });
    }

    /// The result that was found is at hand, or is gone.
    pub(super) fn loaded(&mut self, vertex: usize, output: Option<O>) {
        let State::Loading { cached, keys } = &self.node(vertex).state else { return };
        let (canonical, is_borrowed, keys) = (cached.canonical, cached.is_borrowed, *keys);
        if let Some(output) = output {
            return self.done(vertex, Some(canonical), output, is_borrowed);
        }
        match keys.slow {
            None => self.after_fast_miss(vertex, keys.fast),
            Some(_) => self.missed(vertex, keys),
        }
    }

    fn missed(&mut self, vertex: usize, keys: Keys) {
        let node = self.node_mut(vertex);
        node.state = State::Missed { keys: Some(keys) };
        let is_pending = node.refresh;
        self.work.push(vertex);
        if !is_pending {
            self.identified(vertex, keys.main());
        }
    }

    /// Wanted, not found, and all inputs are there: looks it up again if they are not what they
    /// seemed to be, and else queues it.
    pub(super) fn settle(&mut self, vertex: usize) {
        let State::Missed { keys } = self.node(vertex).state else { return };
        let is_cached = matches!(self.node(vertex).identity, Identity::Cached(_));
        if is_cached && std::mem::replace(&mut self.node_mut(vertex).round, Round::Last) == Round::First {
            let inputs = self.inputs(vertex);
            let differs = |&(input, _): &(usize, InputUse)| {
                let node = self.node(input);
                node.provisional.key() != node.canonical()
            };
            if self.node(vertex).refresh || (keys.is_some() && inputs.iter().any(differs)) {
                return self.derive(vertex);
            }
        }
        self.enqueue(vertex, keys);
    }

    /// Marks of the inputs' present keys; see [`KeyKind::Mark`]. Only where they may be asked for.
    pub(super) fn marks(&self, vertex: usize) -> Vec<CacheKey> {
        self.marks_of(vertex, |_, input| self.key_of(vertex, input))
    }

    fn marks_of(&self, vertex: usize, key: impl Fn(usize, usize) -> Option<CacheKey>) -> Vec<CacheKey> {
        let inputs = self.inputs(vertex);
        let has_mark = |&(_, &(input, _)): &(usize, &(usize, InputUse))| {
            inputs.len() > 1 && matches!(self.node(input).identity, Identity::Cached(_))
        };
        let marked = inputs.iter().enumerate().filter(has_mark);
        marked.filter_map(|(at, &(input, _))| Some(self.mark(vertex, at, key(at, input)?))).collect()
    }

    pub(super) fn mark(&self, vertex: usize, position: usize, key: CacheKey) -> CacheKey {
        let op = match self.node(vertex).inputs[position].1 {
            // Where it is missing, the lookup by definition fails.
            InputUse::Content => self.op(vertex),
            // The one by content as well.
            InputUse::Definition => self.op_by_content(vertex),
        };
        CacheKey::derive(KeyKind::Mark(position), &op, &[key.0])
    }

    /// How to remember the result of a run under `keys`.
    fn save(&self, vertex: usize, keys: Keys) -> Option<Arc<Save>> {
        let main = keys.main()?;
        let node = self.node(vertex);
        let whole = node.inputs.iter().filter(|(_, usage)| *usage == InputUse::Definition);
        let below: Option<Vec<Digest>> =
            whole.map(|&(input, _)| self.node(input).canonical().map(|key| key.0)).collect();
        let is_borrowed = self.reads_borrowed(vertex);
        let kind = if is_borrowed { KeyKind::BorrowedSlot } else { KeyKind::Slot };
        let slot = node.lineage.zip(below).map(|(step, below)| CacheKey::derive(kind, &step, &below));
        Some(Arc::new(Save {
            canonical: main,
            keys: keys.slow.into_iter().chain(keys.fast).collect(),
            marks: self.marks(vertex),
            slot,
            refresh: node.refresh,
            is_borrowed,
        }))
    }

    /// Whether something that `vertex` is made from is borrowed; all of that is there.
    pub(super) fn reads_borrowed(&self, vertex: usize) -> bool {
        self.node(vertex).inputs.iter().any(|&(input, _)| self.node(input).is_borrowed())
    }

    /// Queues it, or lets it share the run of another vertex with the same key.
    fn enqueue(&mut self, vertex: usize, keys: Option<Keys>) {
        let save = keys.and_then(|keys| self.save(vertex, keys));
        if let Some(key) = keys.and_then(|keys| keys.main()) {
            let key = (key, self.node(vertex).refresh, self.reads_borrowed(vertex));
            match self.runners.get(&key) {
                Some(&runner) if runner != vertex => return self.follow(vertex, runner, keys),
                _ => {}
            }
            self.runners.insert(key, vertex);
            self.node_mut(vertex).runs_as = Some(key);
        }
        let outputs =
            self.inputs(vertex).iter().filter_map(|&(input, _)| self.node(input).output().cloned()).collect();
        let node = self.node_mut(vertex);
        node.state = State::Ready { save, keys, inputs: outputs };
        let (priority, cost) = (node.priority, node.cost);
        self.ready.push(vertex, priority, cost);
    }

    fn follow(&mut self, vertex: usize, runner: usize, keys: Option<Keys>) {
        self.commands.push(Command::Merged { vertex, with: runner });
        self.node_mut(vertex).state = State::Follows { runner, keys };
        match &self.node(runner).state {
            State::Done { canonical, output, is_borrowed } => {
                let (canonical, output, is_borrowed) = (*canonical, output.clone(), *is_borrowed);
                self.share(vertex, canonical, output, is_borrowed);
            }
            State::Failed => self.failed(vertex),
            _ => {
                self.node_mut(runner).followers.push(vertex);
                self.want(runner);
            }
        }
    }

    /// A follower gets the result; it may be known by another definition.
    pub(super) fn share(&mut self, vertex: usize, canonical: Option<CacheKey>, output: O, is_borrowed: bool) {
        if let State::Follows { keys: Some(Keys { fast: Some(fast), slow: Some(_) }), .. } =
            self.node(vertex).state
            && let Some(canonical) = canonical
        {
            let (keys, marks) = (vec![fast], self.marks(vertex));
            let cached = Cached { canonical, output: output.clone(), is_borrowed };
            self.commands.push(Command::Link { vertex, keys, marks, cached });
        }
        self.done(vertex, canonical, output, is_borrowed);
    }

    /// Queued, running or following: back to having no result.
    pub(super) fn back_to_missed(&mut self, vertex: usize, keys: Option<Keys>) {
        if let Some(key) = self.node_mut(vertex).runs_as.take() {
            self.runners.remove(&key);
        }
        self.node_mut(vertex).state = State::Missed { keys };
        for follower in std::mem::take(&mut self.node_mut(vertex).followers) {
            self.back_to_missed(follower, keys);
        }
        self.work.push(vertex);
    }

    /// A command ended without result.
    pub(super) fn stopped(&mut self, vertex: usize, digesting: Option<usize>) {
        if let Some(position) = digesting {
            self.node_mut(vertex).digest_asked[position] = false;
            return self.read(vertex, position);
        }
        if let State::Running { keys } = self.node(vertex).state {
            self.back_to_missed(vertex, keys);
            self.disown(vertex);
        }
    }

    /// Nobody gets this vertex.
    pub(super) fn failed(&mut self, vertex: usize) {
        self.node_mut(vertex).state = State::Failed;
        self.work.push(vertex);
        for follower in std::mem::take(&mut self.node_mut(vertex).followers) {
            self.failed(follower);
        }
    }

    /// Whether the first key is known, or will not be.
    pub(super) fn is_identified(&self, vertex: usize) -> bool {
        self.node(vertex).provisional != Provisional::Open
    }
}
