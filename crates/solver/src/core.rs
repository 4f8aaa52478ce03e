//! The solver's state machine: events in, commands out, no waiting.
//!
//! Demand runs from the target to the sources: a vertex is *identified* when a user needs its key,
//! and *wanted* when a user needs its output. What nobody identifies or wants is never touched.

use kiln_oci::Digest;
use petgraph::Direction;
use petgraph::stable_graph::{NodeIndex, StableDiGraph};
use petgraph::visit::EdgeRef;

use crate::key::KeyKind;
use crate::{CacheKey, Cached, Identity, InputUse, VertexInput};

/// What the driver shall do.
#[derive(Debug)]
pub(crate) enum Command<O> {
    /// Ask the cache; answer with [`Core::found`].
    Lookup { vertex: usize, key: CacheKey },
    /// Take the digest of what `vertex` reads from its input; answer with [`Core::digested`].
    Digest { vertex: usize, input: usize, output: O },
    /// Run it; answer with [`Core::ran`].
    Run { vertex: usize, inputs: Vec<O>, save: Option<Save> },
}

/// How to remember what a run makes.
#[derive(Debug, Clone)]
pub(crate) struct Save {
    pub(crate) canonical: CacheKey,
    pub(crate) keys: Vec<CacheKey>,
}

/// One question, one field: how far a vertex is.
#[derive(Debug)]
enum State<O> {
    /// Nobody asked yet, or inputs are not identified.
    Idle { asked: bool },
    /// The lookup by definition key is under way.
    Fast { key: CacheKey },
    /// Digests of what is read are being gathered; `None` for inputs that enter by their key.
    Content { fast: Option<CacheKey>, digests: Vec<Option<Digest>> },
    /// The lookup by content key is under way.
    Slow { fast: Option<CacheKey>, key: CacheKey },
    /// Identified, but there is no result.
    Missed { save: Option<Save>, canonical: Option<CacheKey> },
    /// Being run.
    Running { canonical: Option<CacheKey> },
    /// There is a result.
    Done { canonical: Option<CacheKey>, output: O },
}

/// What is known of a lookup that cannot be made yet, because an input it stands on has no key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Outlook {
    /// Nothing.
    Open,
    /// It waits until a step below has run.
    Late,
    /// It will miss: a step below has a new key.
    Lost,
}

struct Node<O> {
    identity: Identity,
    state: State<O>,
    wanted: bool,
    outlook: Outlook,
}

/// The graph with every vertex's state.
pub(crate) struct Core<O> {
    graph: StableDiGraph<Node<O>, (usize, InputUse)>,
    target: usize,
    use_cache: bool,
}

impl<O: Clone> Core<O> {
    /// A graph of `vertices`; inputs stand before their users.
    pub(crate) fn new(vertices: &[(Identity, Vec<VertexInput>)], target: usize, use_cache: bool) -> Self {
        let mut graph = StableDiGraph::with_capacity(vertices.len(), vertices.len());
        for (identity, inputs) in vertices {
            let state = State::Idle { asked: false };
            let at = graph.add_node(Node {
                identity: identity.clone(),
                state,
                wanted: false,
                outlook: Outlook::Open,
            });
            for (position, input) in inputs.iter().enumerate() {
                graph.add_edge(NodeIndex::new(input.vertex), at, (position, input.usage));
            }
        }
        Self { graph, target, use_cache }
    }

    /// Starts with the target.
    pub(crate) fn start(&mut self) -> Vec<Command<O>> {
        let mut commands = Vec::new();
        self.want(self.target, &mut commands);
        commands
    }

    /// The target's output, once it is there.
    pub(crate) fn result(&self) -> Option<&O> {
        self.output(self.target)
    }

    /// The cache answered a lookup.
    pub(crate) fn found(&mut self, vertex: usize, hit: Option<Cached<O>>) -> Vec<Command<O>> {
        let mut commands = Vec::new();
        if let Some(Cached { canonical, output }) = hit {
            self.node(vertex).state = State::Done { canonical: Some(canonical), output };
            self.advance_users(vertex, &mut commands);
            return commands;
        }
        match &self.node(vertex).state {
            State::Fast { key } => {
                let fast = *key;
                self.after_fast_miss(vertex, Some(fast), &mut commands);
            }
            State::Slow { fast, key } => {
                let (fast, key) = (*fast, *key);
                self.missed(vertex, fast, key, &mut commands);
            }
            _ => {}
        }
        commands
    }

    /// The digest of what `vertex` reads from `input` is known.
    pub(crate) fn digested(&mut self, vertex: usize, input: usize, digest: Digest) -> Vec<Command<O>> {
        let mut commands = Vec::new();
        if let State::Content { digests, .. } = &mut self.node(vertex).state {
            digests[input] = Some(digest);
        }
        self.advance_content(vertex, &mut commands);
        commands
    }

    /// `vertex` was run.
    pub(crate) fn ran(&mut self, vertex: usize, output: O) -> Vec<Command<O>> {
        let mut commands = Vec::new();
        let canonical = self.canonical(vertex);
        self.node(vertex).state = State::Done { canonical, output };
        self.advance_users(vertex, &mut commands);
        commands
    }

    fn node(&mut self, vertex: usize) -> &mut Node<O> {
        &mut self.graph[NodeIndex::new(vertex)]
    }

    /// Inputs in their order.
    fn inputs(&self, vertex: usize) -> Vec<VertexInput> {
        let mut inputs: Vec<(usize, VertexInput)> = self
            .graph
            .edges_directed(NodeIndex::new(vertex), Direction::Incoming)
            .map(|edge| {
                let (position, usage) = *edge.weight();
                (position, VertexInput { vertex: edge.source().index(), usage })
            })
            .collect();
        inputs.sort_unstable_by_key(|(position, _)| *position);
        inputs.into_iter().map(|(_, input)| input).collect()
    }

    fn output(&self, vertex: usize) -> Option<&O> {
        match &self.graph[NodeIndex::new(vertex)].state {
            State::Done { output, .. } => Some(output),
            _ => None,
        }
    }

    fn is_identified(&self, vertex: usize) -> bool {
        let state = &self.graph[NodeIndex::new(vertex)].state;
        matches!(state, State::Missed { .. } | State::Running { .. } | State::Done { .. })
    }

    fn canonical(&self, vertex: usize) -> Option<CacheKey> {
        match &self.graph[NodeIndex::new(vertex)].state {
            State::Missed { canonical, .. }
            | State::Running { canonical }
            | State::Done { canonical, .. } => *canonical,
            _ => None,
        }
    }

    /// Somebody needs this vertex's output.
    fn want(&mut self, vertex: usize, commands: &mut Vec<Command<O>>) {
        if !self.node(vertex).wanted {
            self.node(vertex).wanted = true;
            self.identify(vertex, commands);
            self.hasten(vertex, commands);
            self.try_run(vertex, commands);
        }
    }

    /// Wants inputs before the vertex's own turn, so that independent stages run side by side
    /// although their copies stand on each other.
    ///
    /// What is read by content and has to be made will be needed, once the lookup by definition
    /// waits for a run anyway. Where the lookup is lost, all inputs of a wanted vertex will be.
    fn hasten(&mut self, vertex: usize, commands: &mut Vec<Command<O>>) {
        let Node { outlook, wanted, .. } = self.graph[NodeIndex::new(vertex)];
        if outlook == Outlook::Open || self.is_identified(vertex) {
            return;
        }
        for input in self.inputs(vertex) {
            let is_read = input.usage == InputUse::Content && self.has_to_run(input.vertex);
            if is_read || (wanted && outlook == Outlook::Lost) {
                self.want(input.vertex, commands);
            }
        }
    }

    /// It was looked up in vain, or is being run.
    fn has_to_run(&self, vertex: usize) -> bool {
        let state = &self.graph[NodeIndex::new(vertex)].state;
        matches!(state, State::Missed { save: Some(_), .. } | State::Running { .. })
    }

    /// Tells everything that stands on `vertex`, directly or not.
    fn warn_users(&mut self, vertex: usize, outlook: Outlook, commands: &mut Vec<Command<O>>) {
        let mut open = vec![vertex];
        while let Some(vertex) = open.pop() {
            let edges = self.graph.edges_directed(NodeIndex::new(vertex), Direction::Outgoing);
            let standing = edges.filter(|edge| edge.weight().1 == InputUse::Definition);
            let users: Vec<usize> = standing.map(|edge| edge.target().index()).collect();
            for user in users {
                if self.node(user).outlook < outlook {
                    self.node(user).outlook = outlook;
                    self.hasten(user, commands);
                    open.push(user);
                }
            }
        }
    }

    /// Somebody needs this vertex's key.
    fn identify(&mut self, vertex: usize, commands: &mut Vec<Command<O>>) {
        match &mut self.node(vertex).state {
            State::Idle { asked } if !*asked => *asked = true,
            _ => return,
        }
        for input in self.inputs(vertex) {
            self.identify(input.vertex, commands);
        }
        self.advance_identity(vertex, commands);
    }

    /// Goes on from `Idle` when all inputs are identified.
    fn advance_identity(&mut self, vertex: usize, commands: &mut Vec<Command<O>>) {
        if !matches!(self.node(vertex).state, State::Idle { asked: true }) {
            return;
        }
        let inputs = self.inputs(vertex);
        if !inputs.iter().all(|input| self.is_identified(input.vertex)) {
            return;
        }
        let op = match self.node(vertex).identity.clone() {
            Identity::Cached(op) => op,
            Identity::Source(digest) => {
                let canonical = Some(CacheKey::derive(KeyKind::Definition, &digest, &[]));
                self.node(vertex).state = State::Missed { save: None, canonical };
                return self.after_identified(vertex, commands);
            }
            Identity::Unknown => {
                self.node(vertex).state = State::Missed { save: None, canonical: None };
                return self.after_identified(vertex, commands);
            }
        };
        let keys: Option<Vec<Digest>> =
            inputs.iter().map(|input| self.canonical(input.vertex).map(|key| key.0)).collect();
        let Some(keys) = keys else {
            return self.after_fast_miss(vertex, None, commands);
        };
        let key = CacheKey::derive(KeyKind::Definition, &op, &keys);
        if self.use_cache {
            self.node(vertex).state = State::Fast { key };
            commands.push(Command::Lookup { vertex, key });
        } else {
            self.after_fast_miss(vertex, Some(key), commands);
        }
    }

    /// No result by definition: ask by content where content is read, else it is a miss.
    fn after_fast_miss(&mut self, vertex: usize, fast: Option<CacheKey>, commands: &mut Vec<Command<O>>) {
        let inputs = self.inputs(vertex);
        let reads = inputs.iter().any(|input| input.usage == InputUse::Content);
        match fast {
            Some(key) if !reads => self.missed(vertex, None, key, commands),
            _ => {
                self.node(vertex).state = State::Content { fast, digests: vec![None; inputs.len()] };
                let is_read = |input: &&VertexInput| input.usage == InputUse::Content;
                if inputs.iter().filter(is_read).any(|input| self.has_to_run(input.vertex)) {
                    self.warn_users(vertex, Outlook::Late, commands);
                }
                for input in inputs.iter().filter(is_read) {
                    self.want(input.vertex, commands);
                }
                self.ask_content(vertex, commands);
            }
        }
    }

    /// Asks for the digests of all inputs that are ready and not asked yet.
    fn ask_content(&mut self, vertex: usize, commands: &mut Vec<Command<O>>) {
        for (position, input) in self.inputs(vertex).into_iter().enumerate() {
            if input.usage == InputUse::Content
                && let Some(output) = self.output(input.vertex)
            {
                commands.push(Command::Digest { vertex, input: position, output: output.clone() });
            }
        }
    }

    /// Goes on from `Content` when every digest is there.
    fn advance_content(&mut self, vertex: usize, commands: &mut Vec<Command<O>>) {
        let inputs = self.inputs(vertex);
        let node = &self.graph[NodeIndex::new(vertex)];
        let (State::Content { fast, digests }, Identity::Cached(op)) = (&node.state, &node.identity) else {
            return;
        };
        let known: Option<Vec<Digest>> = inputs
            .iter()
            .zip(digests)
            .map(|(input, digest)| match input.usage {
                InputUse::Content => *digest,
                InputUse::Definition => self.canonical(input.vertex).map(|key| key.0),
            })
            .collect();
        let Some(known) = known else { return };
        let (fast, key) = (*fast, CacheKey::derive(KeyKind::Content, op, &known));
        if self.use_cache {
            self.node(vertex).state = State::Slow { fast, key };
            commands.push(Command::Lookup { vertex, key });
        } else {
            self.missed(vertex, fast, key, commands);
        }
    }

    fn missed(
        &mut self,
        vertex: usize,
        fast: Option<CacheKey>,
        canonical: CacheKey,
        commands: &mut Vec<Command<O>>,
    ) {
        let keys = std::iter::once(canonical).chain(fast).collect();
        let save = Some(Save { canonical, keys });
        self.node(vertex).state = State::Missed { save, canonical: Some(canonical) };
        self.warn_users(vertex, Outlook::Lost, commands);
        self.after_identified(vertex, commands);
    }

    fn after_identified(&mut self, vertex: usize, commands: &mut Vec<Command<O>>) {
        self.try_run(vertex, commands);
        self.advance_users(vertex, commands);
    }

    /// Runs a wanted vertex without result as soon as its inputs have outputs.
    fn try_run(&mut self, vertex: usize, commands: &mut Vec<Command<O>>) {
        if !self.node(vertex).wanted || !matches!(self.node(vertex).state, State::Missed { .. }) {
            return;
        }
        let inputs = self.inputs(vertex);
        for input in &inputs {
            self.want(input.vertex, commands);
        }
        // Wanting an input may have finished this very vertex's turn.
        let State::Missed { save, canonical } = &self.node(vertex).state else { return };
        let (save, canonical) = (save.clone(), *canonical);
        let outputs: Option<Vec<O>> = inputs.iter().map(|input| self.output(input.vertex).cloned()).collect();
        if let Some(inputs) = outputs {
            self.node(vertex).state = State::Running { canonical };
            commands.push(Command::Run { vertex, inputs, save });
        }
    }

    /// A vertex was identified or got its output: its users may go on.
    fn advance_users(&mut self, vertex: usize, commands: &mut Vec<Command<O>>) {
        let mut users: Vec<(usize, usize, InputUse)> = self
            .graph
            .edges_directed(NodeIndex::new(vertex), Direction::Outgoing)
            .map(|edge| (edge.target().index(), edge.weight().0, edge.weight().1))
            .collect();
        users.sort_unstable_by_key(|(user, position, _)| (*user, *position));
        for (user, position, usage) in users {
            if let Some(output) = self.output(vertex).cloned()
                && usage == InputUse::Content
                && let State::Content { digests, .. } = &self.graph[NodeIndex::new(user)].state
                && digests[position].is_none()
            {
                commands.push(Command::Digest { vertex: user, input: position, output });
            }
            self.advance_identity(user, commands);
            self.hasten(user, commands);
            self.try_run(user, commands);
        }
    }
}

#[cfg(test)]
#[path = "core/tests.rs"]
mod tests;
