//! `kiln history`

use super::{human_size, print, table};
use crate::args::HistoryArgs;
use crate::errors::Failure;
use crate::session::Session;

pub(crate) fn run(session: &Session, args: &HistoryArgs) -> Result<u8, Failure> {
    let image = session.find(&args.name)?;
    let config = session.config(&image)?;
    let chain = match &image.snapshot {
        Some(top) => session.engine.snapshots.chain(top)?,
        None => Vec::new(),
    };
    let mut layers = chain.iter();
    let mut rows = Vec::new();
    for entry in &config.history {
        let size_bytes = if entry.empty_layer {
            0
        } else {
            match layers.next() {
                Some(snapshot) => session.engine.store.layer(snapshot)?.map_or(0, |layer| layer.size_bytes),
                None => 0,
            }
        };
        let created = entry.created.clone().unwrap_or_default();
        let text: String = entry.created_by.clone().unwrap_or_default().replace(['\n', '\t'], " ");
        let is_long = !args.no_trunc && text.chars().count() > 80;
        let text = if is_long { text.chars().take(79).chain(['…']).collect() } else { text };
        rows.push(vec![created, text, human_size(size_bytes)]);
    }
    rows.push(["CREATED", "CREATED BY", "SIZE"].map(str::to_owned).to_vec());
    // Newest first, as docker shows it.
    rows.reverse();
    print(&table(&rows))?;
    Ok(0)
}
