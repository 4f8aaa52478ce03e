//! The graph of a build.

use std::collections::HashMap;
use std::fmt;

use kiln_oci::Digest;
use sha2::{Digest as _, Sha256};

use crate::op::{Component, MountKind, Op, Source};

/// Position in [`Definition::vertices`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct VertexId(pub usize);

/// A step of the DAG.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Vertex {
    /// What it does.
    pub op: Op,
    /// Whose outputs it uses; the op refers to them by position.
    pub inputs: Vec<VertexId>,
}

/// The graph of a build, inputs before their users.
#[derive(Debug, Clone, Default)]
pub struct Definition {
    vertices: Vec<Vertex>,
    digests: Vec<Digest>,
    known: HashMap<Digest, VertexId>,
}

impl Definition {
    /// Adds a vertex and returns its place; an equal vertex that is already there is used again.
    ///
    /// # Panics
    /// When an input does not stand in the definition yet: that is how cycles would come in.
    pub fn push(&mut self, vertex: Vertex) -> VertexId {
        assert!(
            vertex.inputs.iter().all(|input| input.0 < self.vertices.len()),
            "a vertex's inputs are pushed before it"
        );
        let mut hash = Sha256::new();
        hash_components(&mut hash, &vertex.op.components());
        for input in &vertex.inputs {
            hash.update(self.digests[input.0].as_bytes());
        }
        let digest = Digest::from_bytes(hash.finalize().into());
        if let Some(known) = self.known.get(&digest) {
            if let (Op::Exec(known), Op::Exec(other)) = (&mut self.vertices[known.0].op, &vertex.op) {
                // Whoever wants it newer gets it newer.
                let ttls = known.cache_ttl.into_iter().chain(other.cache_ttl);
                known.cache_ttl = ttls.min();
            }
            return *known;
        }
        let id = VertexId(self.vertices.len());
        self.vertices.push(vertex);
        self.digests.push(digest);
        self.known.insert(digest, id);
        id
    }

    /// All vertices, inputs before their users.
    pub fn vertices(&self) -> &[Vertex] {
        &self.vertices
    }

    /// The vertex at `id`.
    pub fn vertex(&self, id: VertexId) -> &Vertex {
        &self.vertices[id.0]
    }

    /// Digests of all vertices in order: the op's components and the inputs' digests.
    ///
    /// Equal within this solve means equal work; across builds only cache keys say that.
    pub fn digests(&self) -> &[Digest] {
        &self.digests
    }
}

impl fmt::Display for Definition {
    /// A line a vertex with its inputs, and one a component below it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (id, vertex) in self.vertices.iter().enumerate() {
            let inputs: Vec<String> = vertex.inputs.iter().map(|input| input.0.to_string()).collect();
            writeln!(f, "{id} [{}]", inputs.join(" "))?;
            if let Op::Source(Source::Image(image)) = &vertex.op {
                writeln!(f, "    image {}", image.reference)?;
            }
            for Component { name, value } in vertex.op.components() {
                writeln!(f, "    {name} {value:?}")?;
            }
            if let Op::Exec(exec) = &vertex.op {
                for (name, value) in &exec.unkeyed_env {
                    writeln!(f, "    not in the key: env {name} {value:?}")?;
                }
                if let Some(ttl) = exec.cache_ttl {
                    writeln!(f, "    not in the key: cache ttl {ttl:?}")?;
                }
                for (name, address) in &exec.extra_hosts {
                    writeln!(f, "    not in the key: host {name} {address:?}")?;
                }
                for mount in &exec.mounts {
                    if let MountKind::Cache(cache) = &mount.kind {
                        writeln!(f, "    not in the key: cache {:?} {}", cache.id, cache.sharing.name())?;
                    }
                }
            }
        }
        Ok(())
    }
}

impl Op {
    /// Digest of [`Op::components`]: what this op is, whatever its inputs hold.
    pub fn digest(&self) -> Digest {
        digest_of(&self.components())
    }

    /// Digest of [`Op::components_by_content`].
    pub fn digest_by_content(&self) -> Option<Digest> {
        self.components_by_content().map(|components| digest_of(&components))
    }
}

fn digest_of(components: &[Component]) -> Digest {
    let mut hash = Sha256::new();
    hash_components(&mut hash, components);
    Digest::from_bytes(hash.finalize().into())
}

/// Lengths go in front of texts, so that no two lists of components hash alike.
fn hash_components(hash: &mut Sha256, components: &[Component]) {
    hash.update((components.len() as u64).to_le_bytes());
    for Component { name, value } in components {
        for text in [name, value] {
            hash.update((text.len() as u64).to_le_bytes());
            hash.update(text.as_bytes());
        }
    }
}
