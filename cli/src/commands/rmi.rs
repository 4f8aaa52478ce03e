//! `kiln rmi`

use kiln_oci::Reference;

use super::print;
use crate::args::RmiArgs;
use crate::errors::{Failure, exit, say};
use crate::session::{Session, id_digits};

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

/// Of several at once each goes by what it finds: it looks again when a name came to lead elsewhere.
fn remove(session: &Session, name: &str, force: bool) -> Result<(), Failure> {
    while !remove_found(session, name, force)? {}
    Ok(())
}

/// Whether it is done; not if `name` led elsewhere before it could be removed.
fn remove_found(session: &Session, name: &str, force: bool) -> Result<bool, Failure> {
    let store = &session.engine.store;
    let image = match session.find(name) {
        Err(_) if force => return Ok(true),
        other => other?,
    };
    let named = name.parse::<Reference>().ok();
    let names = store.names_of(&image.config)?;
    let named = named.filter(|named| names.contains(named));
    if named.is_none() && !image.config.hex().starts_with(id_digits(name)) {
        return Ok(false);
    }
    let doomed: Vec<&Reference> = match &named {
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
        if store.remove_name(name, &image.config)? {
            print(&format!("removed name {}\n", name.familiar()))?;
        } else if named.is_some() {
            return Ok(false);
        }
    }
    // Somebody may have named it meanwhile.
    if doomed.len() == names.len() && store.forget_image(&image.config)? {
        print(&format!("removed image {}\n", image.config))?;
    }
    Ok(true)
}
