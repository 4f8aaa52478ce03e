//! apk's `installed`: a block for each package, of lines with a letter in front.

use super::{Described, word};

#[derive(Default)]
struct Record {
    name: Option<String>,
    version: Option<String>,
    arch: Option<String>,
    license: Option<String>,
    maintainer: Option<String>,
}

/// The blocks one by one; `None` for one that is no package.
pub(crate) fn apk(bytes: &[u8]) -> impl Iterator<Item = Option<Described>> + '_ {
    let mut lines = bytes.split(|&byte| byte == b'\n').peekable();
    std::iter::from_fn(move || {
        lines.peek()?;
        let mut record = Record::default();
        for line in lines.by_ref().take_while(|line| !line.is_empty()) {
            record.take(line);
        }
        Some(record.described())
    })
}

impl Record {
    fn take(&mut self, line: &[u8]) {
        let [letter, b':', value @ ..] = line else { return };
        let place = match letter {
            b'P' => &mut self.name,
            b'V' => &mut self.version,
            b'A' => &mut self.arch,
            b'L' => &mut self.license,
            b'm' => &mut self.maintainer,
            _ => return,
        };
        *place = word(&String::from_utf8_lossy(value));
    }

    fn described(self) -> Option<Described> {
        let (namespace, arch) = (String::new(), self.arch.unwrap_or_default());
        let Self { license, maintainer, .. } = self;
        Some(Described { namespace, name: self.name?, version: self.version?, arch, license, maintainer })
    }
}
