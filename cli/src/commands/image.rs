//! `kiln image …`: the commands about images under one name.

use kiln_content::ImageRecord;
use kiln_oci::{Reference, SnapshotId};

use super::{attestations, history, human_size, images, inspect, load, print, prune, rmi, save, tag};
use crate::args::images::{ImageArgs, ImageCommand};
use crate::errors::Failure;
use crate::session::Session;

pub(crate) fn run(session: &Session, args: &ImageArgs) -> Result<u8, Failure> {
    match &args.command {
        ImageCommand::Ls(args) => images::run(session, args),
        ImageCommand::Inspect(args) => inspect::run(session, args),
        ImageCommand::History(args) => history::run(session, args),
        ImageCommand::Tag(args) => tag::run(session, args),
        ImageCommand::Rm(args) => rmi::run(session, args),
        ImageCommand::Prune(args) => prune::run(session, args),
        ImageCommand::Save(args) => save::run(session, args),
        ImageCommand::Load(args) => load::run(session, args),
        ImageCommand::Attestations(args) => attestations::run(session, args),
        ImageCommand::Tree => {
            print(&tree(session)?)?;
            Ok(0)
        }
    }
}

struct Node {
    title: String,
    chain: Vec<SnapshotId>,
    size_bytes: u64,
}

/// Every image below the one whose layers it begins with.
fn tree(session: &Session) -> Result<String, Failure> {
    let mut nodes = Vec::new();
    for image in session.engine.store.images()? {
        nodes.push(node(session, &image)?);
    }
    // A parent has fewer layers, so it stands in front of its children.
    nodes.sort_by(|a, b| (a.chain.len(), &a.title).cmp(&(b.chain.len(), &b.title)));
    let parents: Vec<Option<usize>> = nodes.iter().enumerate().map(|(at, _)| parent(&nodes, at)).collect();
    let mut out = String::new();
    for root in (0..nodes.len()).filter(|at| parents[*at].is_none()) {
        draw(&nodes, &parents, root, "", "", &mut out);
    }
    Ok(out)
}

fn node(session: &Session, image: &ImageRecord) -> Result<Node, Failure> {
    let names = session.engine.store.names_of(&image.config)?;
    let names: Vec<String> = names.iter().map(Reference::familiar).collect();
    let id = image.config.short();
    let title = if names.is_empty() { id } else { format!("{} ({id})", names.join(", ")) };
    let chain = image.snapshot.as_ref();
    let chain = chain.map_or(Ok(Vec::new()), |top| session.engine.snapshots.chain(top))?;
    Ok(Node { title, chain, size_bytes: image.size_bytes })
}

/// The image with the most layers of those that `nodes[at]` begins with. Of images with the same
/// layers the first one stands above the others.
fn parent(nodes: &[Node], at: usize) -> Option<usize> {
    let child = &nodes[at].chain;
    let above = |other: &usize| !nodes[*other].chain.is_empty() && child.starts_with(&nodes[*other].chain);
    (0..at).filter(above).max_by_key(|other| (nodes[*other].chain.len(), std::cmp::Reverse(*other)))
}

fn draw(nodes: &[Node], parents: &[Option<usize>], at: usize, branch: &str, indent: &str, out: &mut String) {
    let node = &nodes[at];
    let (own_layers, own_bytes) = match parents[at].map(|parent| &nodes[parent]) {
        Some(parent) => {
            (node.chain.len() - parent.chain.len(), node.size_bytes.saturating_sub(parent.size_bytes))
        }
        None => (node.chain.len(), node.size_bytes),
    };
    let plus = if parents[at].is_some() { "+" } else { "" };
    let layers = if own_layers == 1 { "layer" } else { "layers" };
    let size = human_size(own_bytes);
    out.push_str(&format!("{branch}{}  {plus}{own_layers} {layers}, {plus}{size}\n", node.title));
    let children: Vec<usize> = (0..nodes.len()).filter(|child| parents[*child] == Some(at)).collect();
    for (nth, child) in children.iter().enumerate() {
        let (mark, more) = if nth + 1 == children.len() { ("└─ ", "   ") } else { ("├─ ", "│  ") };
        draw(nodes, parents, *child, &format!("{indent}{mark}"), &format!("{indent}{more}"), out);
    }
}
