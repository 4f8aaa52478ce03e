//! `kiln rmi`

use kiln_oci::Reference;

use super::print;
use crate::args::RmiArgs;
use crate::errors::{Failure, exit, say};
use crate::session::Session;

/// Goes on after an image that cannot be removed, as docker does.
pub(crate) fn run(session: &Session, args: &RmiArgs) -> Result<u8, Failure> {
    let mut failed = false;
    for name in &args.names {
        match remove(session, name, args.force) {
            Ok(()) => {}
            Err(failure) if args.names.len() == 1 => return Err(failure),
            Err(failure) => {
                say(&failure.render());
                failed = true;
            }
        }
    }
    Ok(u8::from(failed))
}

fn remove(session: &Session, name: &str, force: bool) -> Result<(), Failure> {
    let store = &session.engine.store;
    let image = match session.find(name) {
        Err(_) if force => return Ok(()),
        other => other?,
    };
    let named = name.parse::<Reference>().ok();
    let names = store.names_of(&image.config)?;
    let doomed: Vec<&Reference> = match named.as_ref().filter(|named| names.contains(named)) {
        Some(named) => vec![named],
        None if names.len() > 1 && !force => {
            return Err(Failure::usage(format!(
                "image {name} has {} names; remove them, or use --force",
                names.len()
            )));
        }
        None => names.iter().collect(),
    };
    if doomed.len() == names.len() && !force {
        let users = store.container_uses()?;
        if let Some(user) = users.iter().find(|user| user.image == Some(image.config)) {
            let message =
                format!("conflict: image {name} cannot be removed, container {} was made of it", user.name);
            return Err(Failure::usage(message)
                .with_code(exit::RUN)
                .hint("remove the container, or use --force"));
        }
    }
    for name in &doomed {
        store.remove_name(name)?;
        print(&format!("removed name {}\n", name.familiar()))?;
    }
    // Somebody may have named it meanwhile.
    if doomed.len() == names.len() && store.forget_image(&image.config)? {
        print(&format!("removed image {}\n", image.config))?;
    }
    Ok(())
}
