//! `kiln rmi`

use kiln_oci::Reference;

use super::print;
use crate::args::RmiArgs;
use crate::errors::Failure;
use crate::session::Session;

pub(crate) fn run(session: &Session, args: &RmiArgs) -> Result<u8, Failure> {
    let store = &session.engine.store;
    for name in &args.names {
        let image = match session.find(name) {
            Err(_) if args.force => continue,
            other => other?,
        };
        let named = name.parse::<Reference>().ok();
        let names = store.names_of(&image.config)?;
        let doomed: Vec<&Reference> = match named.as_ref().filter(|named| names.contains(named)) {
            Some(named) => vec![named],
            None if names.len() > 1 && !args.force => {
                return Err(Failure::usage(format!(
                    "image {name} has {} names; remove them, or use --force",
                    names.len()
                )));
            }
            None => names.iter().collect(),
        };
        if doomed.len() == names.len() && !args.force {
            let users = store.container_uses()?;
            if let Some(user) = users.iter().find(|user| user.image == Some(image.config)) {
                let message = format!("container {} was made of image {name}", user.name);
                return Err(Failure::usage(message).hint("remove the container, or use --force"));
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
    }
    Ok(0)
}
