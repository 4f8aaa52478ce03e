//! `kiln save`

use std::fs::{self, File};
use std::io::{self, BufWriter, IsTerminal};
use std::path::{Path, PathBuf};

use kiln_build::export::{ArchiveFormat, SavedImage, save};
use kiln_oci::Reference;

use crate::args::{SaveArgs, SaveFormat};
use crate::errors::Failure;
use crate::session::Session;

pub(crate) fn run(session: &Session, args: &SaveArgs) -> Result<u8, Failure> {
    let mut images = Vec::new();
    for name in &args.names {
        let image = session.find(name)?;
        let reference = name.parse::<Reference>().ok();
        let name = match reference {
            Some(reference) if session.engine.store.resolve(&reference)?.is_some() => Some(reference),
            _ => None,
        };
        images.push(SavedImage { image, name });
    }
    let format = match args.format {
        SaveFormat::Docker => ArchiveFormat::Docker,
        SaveFormat::Oci => ArchiveFormat::Oci,
    };
    let Some(path) = &args.output else {
        if io::stdout().is_terminal() {
            return Err(Failure::usage("an archive does not go to a terminal; name a file with -o"));
        }
        let mut out = BufWriter::with_capacity(256 << 10, io::stdout().lock());
        save(&session.engine, &images, format, Path::new("standard output"), &mut out)?;
        return Ok(0);
    };
    // The name appears only when the archive is whole.
    let partial = Partial::create(path)?;
    let mut out = BufWriter::with_capacity(256 << 10, &partial.file);
    save(&session.engine, &images, format, path, &mut out)?;
    drop(out);
    partial.finish(path)?;
    Ok(0)
}

struct Partial {
    file: File,
    path: PathBuf,
}

impl Partial {
    fn create(path: &Path) -> Result<Self, Failure> {
        let mut name = path.as_os_str().to_owned();
        name.push(format!(".{}.partial", std::process::id()));
        let partial = PathBuf::from(name);
        let file = File::create(&partial)
            .map_err(|error| Failure::source(format!("cannot write {}: {error}", path.display())))?;
        Ok(Self { file, path: partial })
    }

    fn finish(&self, path: &Path) -> Result<(), Failure> {
        let done = self.file.sync_all().and_then(|()| fs::rename(&self.path, path));
        done.map_err(|error| Failure::source(format!("cannot write {}: {error}", path.display())))
    }
}

impl Drop for Partial {
    fn drop(&mut self) {
        // Renamed away when all went well.
        let _ = fs::remove_file(&self.path);
    }
}
