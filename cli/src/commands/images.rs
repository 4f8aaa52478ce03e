//! `kiln images`

use super::{ago, human_size, print, table};
use crate::args::ImagesArgs;
use crate::errors::Failure;
use crate::session::Session;

pub(crate) fn run(session: &Session, args: &ImagesArgs) -> Result<u8, Failure> {
    let store = &session.engine.store;
    let images = store.images()?;
    if args.quiet {
        let ids: String = images.iter().map(|image| format!("{}\n", image.config.short())).collect();
        print(&ids)?;
        return Ok(0);
    }
    let mut rows = vec![["REPOSITORY", "TAG", "IMAGE ID", "CREATED", "SIZE"].map(str::to_owned).to_vec()];
    for image in &images {
        let mut row = |name: String, tag: String| {
            rows.push(vec![
                name,
                tag,
                image.config.short(),
                ago(image.created_unix),
                human_size(image.size_bytes),
            ]);
        };
        let names = store.names_of(&image.config)?;
        if names.is_empty() {
            row("<none>".to_owned(), "<none>".to_owned());
        }
        for name in names {
            row(name.familiar_name(), name.tag().unwrap_or("<none>").to_owned());
        }
    }
    print(&table(&rows))?;
    Ok(0)
}
