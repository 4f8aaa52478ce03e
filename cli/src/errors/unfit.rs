//! What to do about a program that is there and does not run.

use kiln_executor::{Foreign, NoProgram, Unfit};
use kiln_oci::Platform;

use super::Failure;

impl Failure {
    /// The same with what helps, where something does.
    pub(super) fn for_unfit(self, unfit: Option<&Unfit>) -> Self {
        match unfit.and_then(advice) {
            Some(advice) => self.hint(advice),
            None => self,
        }
    }
}

fn advice(unfit: &Unfit) -> Option<String> {
    match unfit {
        Unfit::Foreign(foreign) => Some(for_foreign(foreign)),
        Unfit::NoProgram { problem: NoProgram::NoFirstLine | NoProgram::NoInterpreter, .. } => Some(
            "begin the script with a line such as `#!/bin/sh`, or name a shell in front of it: `/bin/sh SCRIPT`".into(),
        ),
        Unfit::NoProgram { problem: NoProgram::ByteOrderMark, .. } => {
            Some("save the script without a byte order mark: `sed -i '1s/^\\xEF\\xBB\\xBF//' SCRIPT`".into())
        }
        Unfit::NoInterpreter { interpreter, .. } if interpreter.ends_with('\r') => {
            Some("the lines of the script end as on Windows: `sed -i 's/\\r$//' SCRIPT` makes others of them".into())
        }
        Unfit::NoInterpreter { script: false, .. } => {
            Some("link the program statically, or take a base with the C library that it was made for".into())
        }
        _ => None,
    }
}

fn for_foreign(foreign: &Foreign) -> String {
    let Foreign { platform, image, .. } = foreign;
    let host = Platform::host();
    let is_image = image.as_ref().is_some_and(|image| !host.runs(image));
    let or = match is_image {
        true => format!("take the image for this machine, if there is one: `--platform {host}`"),
        false => format!("put a program for {host} into the image"),
    };
    if platform.os != "linux" {
        return or;
    }
    format!("{}; or {or}", register(platform))
}

/// How an emulator comes to be.
pub(super) fn register(platform: &Platform) -> String {
    format!("register an emulator for {platform}: `apt-get install qemu-user-static binfmt-support`")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn foreign(platform: &str, image: Option<Platform>) -> String {
        for_foreign(&Foreign { platform: platform.parse().unwrap(), image, reason: String::new() })
    }

    #[test]
    fn advice_is_what_can_be_done() {
        let other: Platform = "linux/mips".parse().unwrap();
        let both = foreign("linux/mips", Some(other.clone()));
        assert!(both.starts_with("register an emulator for linux/mips: `apt-get"), "{both}");
        assert!(both.ends_with(&format!("`--platform {}`", Platform::host())), "{both}");
        let own = foreign("linux/mips", Some(Platform::host()));
        assert!(
            own.ends_with(&format!("; or put a program for {} into the image", Platform::host())),
            "{own}"
        );
        let darwin = foreign("darwin/arm64", None);
        assert!(darwin.starts_with("put a program for linux/"), "nothing emulates that: {darwin}");
    }
}
