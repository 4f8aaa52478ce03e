//! Operating system and processor an image is for.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// `os/architecture[/variant]`, with Go's names for both (OCI image-spec, image-index.md).
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Platform {
    /// Processor: `amd64`, `arm64`, …
    pub architecture: String,
    /// Operating system: `linux`.
    pub os: String,
    /// Required operating system version; Windows images set it.
    #[serde(rename = "os.version", default, skip_serializing_if = "Option::is_none")]
    pub os_version: Option<String>,
    /// Required operating system features.
    #[serde(rename = "os.features", default, skip_serializing_if = "Vec::is_empty")]
    pub os_features: Vec<String>,
    /// Processor variant: `v7`, `v8`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub variant: Option<String>,
}

/// The text is no platform.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a platform like linux/amd64 or linux/arm/v7")]
pub struct PlatformError(String);

/// Operating systems that go by Go's names.
const SYSTEMS: [&str; 14] = [
    "aix",
    "android",
    "darwin",
    "dragonfly",
    "freebsd",
    "illumos",
    "ios",
    "js",
    "linux",
    "netbsd",
    "openbsd",
    "plan9",
    "solaris",
    "windows",
];

/// Processors that do, as far as there are images for them.
const ARCHITECTURES: [&str; 21] = [
    "386", "amd64", "arm", "arm64", "loong64", "mips", "mips64", "mips64le", "mipsle", "ppc", "ppc64",
    "ppc64le", "riscv", "riscv64", "s390", "s390x", "sparc", "sparc64", "wasm", "wasm32", "wasm64",
];

impl Platform {
    /// Those that most images are for.
    pub const USUAL: [&'static str; 8] = [
        "linux/amd64",
        "linux/arm64",
        "linux/arm/v7",
        "linux/arm/v6",
        "linux/386",
        "linux/ppc64le",
        "linux/riscv64",
        "linux/s390x",
    ];

    /// The platform of this machine.
    pub fn host() -> Self {
        let (architecture, variant) = match std::env::consts::ARCH {
            "x86_64" => ("amd64", None),
            "aarch64" => ("arm64", None),
            "x86" => ("386", None),
            "arm" => ("arm", Some("v7".to_owned())),
            "powerpc64" => ("ppc64le", None),
            "loongarch64" => ("loong64", None),
            other => (other, None),
        };
        Self { variant, ..Self::new("linux", architecture) }
    }

    /// A platform without a variant.
    pub fn new(os: &str, architecture: &str) -> Self {
        Self {
            architecture: architecture.to_owned(),
            os: os.to_owned(),
            os_version: None,
            os_features: Vec::new(),
            variant: None,
        }
    }

    /// The same platform under the names that it has everywhere: `linux/aarch64/v8` is `linux/arm64`, and
    /// `linux/arm` is `linux/arm/v7`.
    pub fn normalized(&self) -> Self {
        let os = match self.os.to_ascii_lowercase().as_str() {
            "macos" => "darwin".to_owned(),
            other => other.to_owned(),
        };
        let given = self.variant.as_deref().unwrap_or_default().to_ascii_lowercase();
        let (architecture, variant) = match (self.architecture.to_ascii_lowercase().as_str(), given.as_str())
        {
            ("i386" | "386", _) => ("386", ""),
            ("x86_64" | "amd64", "v1" | "") => ("amd64", ""),
            ("x86_64", other) => ("amd64", other),
            ("aarch64" | "arm64", "8" | "v8" | "") => ("arm64", ""),
            ("aarch64", other) => ("arm64", other),
            ("armhf", _) => ("arm", "v7"),
            ("armel", _) => ("arm", "v6"),
            ("arm", "" | "7") => ("arm", "v7"),
            ("arm", "5") => ("arm", "v5"),
            ("arm", "6") => ("arm", "v6"),
            ("arm", "8") => ("arm", "v8"),
            _ => (self.architecture.as_str(), given.as_str()),
        };
        Self {
            architecture: architecture.to_ascii_lowercase(),
            variant: Some(variant.to_owned()).filter(|variant| !variant.is_empty()),
            os,
            ..self.clone()
        }
    }

    /// How far an image for `has` is from what somebody wants who wants this platform: 0 is the very same.
    /// `None`: it is of no use.
    ///
    /// Processors run programs of those before them, as containerd has it: amd64 those of 386, `arm/v7`
    /// those of `arm/v6`, arm64 those of arm.
    pub fn distance(&self, has: &Self) -> Option<usize> {
        let (wanted, has) = (self.normalized(), has.normalized());
        if wanted.os != has.os {
            return None;
        }
        let has_variant = has.variant.as_deref().unwrap_or_default();
        let line = wanted.line();
        if line.is_empty() {
            let both = wanted.variant.is_some() && has.variant.is_some();
            let is_other = wanted.architecture != has.architecture || (both && wanted.variant != has.variant);
            return (!is_other).then_some(usize::from(wanted.variant != has.variant));
        }
        line.iter().position(|(architecture, variant)| {
            *architecture == has.architecture && variant.as_str() == has_variant
        })
    }

    /// What a processor runs whose line is known, the best first.
    fn line(&self) -> Vec<(&'static str, String)> {
        let variant = self.variant.as_deref().unwrap_or_default();
        let number = |text: &str| text.strip_prefix('v').and_then(|text| text.parse::<u8>().ok());
        let arm = |from: u8| (5..=from.min(9)).rev().map(|number| ("arm", format!("v{number}")));
        match self.architecture.as_str() {
            "amd64" => {
                let levels = (2..=number(variant).unwrap_or(1).min(9)).rev();
                let mut line: Vec<_> = levels.map(|level| ("amd64", format!("v{level}"))).collect();
                line.extend([("amd64", String::new()), ("386", String::new())]);
                line
            }
            "arm" if number(variant).is_some() => arm(number(variant).unwrap_or(7)).collect(),
            "arm64" => {
                let mut line = vec![("arm64", variant.to_owned()), ("arm64", String::new())];
                line.dedup();
                line.extend(arm(8));
                line
            }
            _ => Vec::new(),
        }
    }

    /// Whether a machine of this platform starts programs of `other` by itself, as far as one can tell
    /// without looking at its processor.
    pub fn runs(&self, other: &Self) -> bool {
        let (own, other) = (self.normalized(), other.normalized());
        own.os == other.os && (own.architecture == other.architecture || own.distance(&other).is_some())
    }
}

impl fmt::Display for Platform {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.os, self.architecture)?;
        match &self.variant {
            Some(variant) => write!(f, "/{variant}"),
            None => Ok(()),
        }
    }
}

impl FromStr for Platform {
    type Err = PlatformError;

    /// `os/architecture[/variant]`, or a processor alone, of Linux; by any name that is usual.
    fn from_str(text: &str) -> Result<Self, PlatformError> {
        let wrong = || PlatformError(text.chars().take(80).collect());
        let word = |s: &str| {
            !s.is_empty() && s.len() <= 32 && s.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_')
        };
        let parts: Vec<&str> = text.split('/').collect();
        if !parts.iter().all(|part| word(part)) {
            return Err(wrong());
        }
        let (os, architecture, variant) = match parts.as_slice() {
            [architecture] => ("linux", *architecture, None),
            [os, architecture] => (*os, *architecture, None),
            [os, architecture, variant] => (*os, *architecture, Some((*variant).to_owned())),
            _ => return Err(wrong()),
        };
        let platform = Self { variant, ..Self::new(os, architecture) }.normalized();
        let is_known = SYSTEMS.contains(&platform.os.as_str())
            && ARCHITECTURES.contains(&platform.architecture.as_str());
        if is_known { Ok(platform) } else { Err(wrong()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn platform(text: &str) -> Platform {
        text.parse().unwrap_or_else(|error| panic!("{error}"))
    }

    #[test]
    fn a_platform_has_one_name() {
        for (text, name) in [
            ("linux/amd64", "linux/amd64"),
            ("linux/x86_64", "linux/amd64"),
            ("linux/amd64/v1", "linux/amd64"),
            ("Linux/AMD64/V2", "linux/amd64/v2"),
            ("aarch64", "linux/arm64"),
            ("linux/arm64/v8", "linux/arm64"),
            ("linux/arm64/8", "linux/arm64"),
            ("linux/arm", "linux/arm/v7"),
            ("linux/arm/6", "linux/arm/v6"),
            ("linux/armhf", "linux/arm/v7"),
            ("linux/armel", "linux/arm/v6"),
            ("i386", "linux/386"),
            ("macos/arm64", "darwin/arm64"),
            ("linux/riscv64", "linux/riscv64"),
        ] {
            assert_eq!(platform(text).to_string(), name, "{text}");
            assert_eq!(platform(name).to_string(), name);
        }
        for wrong in
            ["", "/", "foo", "foo/bar", "linux/foo", "foo/amd64", "linux", "a/b/c/d", "../x", "linux/"]
        {
            assert!(wrong.parse::<Platform>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn processors_take_what_is_for_those_before_them_and_the_nearest_first() {
        let order = |wanted: &str, all: &[&str]| -> Vec<String> {
            let mut found: Vec<(usize, String)> = all
                .iter()
                .filter_map(|has| Some((platform(wanted).distance(&platform(has))?, (*has).to_owned())))
                .collect();
            found.sort();
            found.into_iter().map(|(_, has)| has).collect()
        };
        let all = [
            "linux/386",
            "linux/amd64",
            "linux/amd64/v2",
            "linux/amd64/v3",
            "linux/arm/v5",
            "linux/arm/v6",
            "linux/arm/v7",
            "linux/arm64",
            "linux/riscv64",
            "windows/amd64",
        ];
        for (wanted, expected) in [
            ("linux/amd64", &["linux/amd64", "linux/386"][..]),
            ("linux/amd64/v3", &["linux/amd64/v3", "linux/amd64/v2", "linux/amd64", "linux/386"]),
            ("linux/386", &["linux/386"]),
            ("linux/arm/v7", &["linux/arm/v7", "linux/arm/v6", "linux/arm/v5"]),
            ("linux/arm/v6", &["linux/arm/v6", "linux/arm/v5"]),
            ("linux/arm64", &["linux/arm64", "linux/arm/v7", "linux/arm/v6", "linux/arm/v5"]),
            ("linux/riscv64", &["linux/riscv64"]),
            ("linux/s390x", &[]),
            ("windows/amd64", &["windows/amd64"]),
        ] {
            assert_eq!(order(wanted, &all), expected, "{wanted}");
        }
    }

    #[test]
    fn a_config_without_the_usual_variant_is_for_the_usual_one() {
        let bare = |architecture: &str| Platform::new("linux", architecture);
        assert_eq!(platform("linux/arm/v7").distance(&bare("arm")), Some(0));
        assert_eq!(
            platform("linux/arm64").distance(&Platform { variant: Some("v8".into()), ..bare("arm64") }),
            Some(0)
        );
        // What nobody gave an order is the same, unless both say what they are.
        let variant = |text: &str| Platform { variant: Some(text.into()), ..bare("ppc64le") };
        assert_eq!(bare("ppc64le").distance(&variant("power9")), Some(1));
        assert_eq!(variant("power8").distance(&variant("power9")), None);
    }

    #[test]
    fn a_machine_starts_programs_of_its_own_line() {
        let runs = |own: &str, other: &str| platform(own).runs(&platform(other));
        assert!(runs("linux/amd64", "linux/386") && runs("linux/amd64", "linux/amd64/v3"));
        assert!(runs("linux/arm64", "linux/arm/v7") && runs("linux/arm/v6", "linux/arm/v7"));
        assert!(!runs("linux/386", "linux/amd64") && !runs("linux/amd64", "linux/arm64"));
        assert!(!runs("linux/amd64", "darwin/amd64"));
    }
}
