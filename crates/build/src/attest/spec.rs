//! What `--attest`, `--provenance` and `--sbom` ask for, taken apart as docker does.

use crate::export::{Attributes, OutputError};

/// What a build shall say of its images; by default nothing.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Attestations {
    /// Where they come from.
    pub provenance: Option<ProvenanceSpec>,
    /// What is in them.
    pub sbom: Option<SbomSpec>,
}

/// `type=provenance`
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProvenanceSpec {
    /// How much is said.
    pub mode: ProvenanceMode,
    /// `builder-id`: the URI of who builds. `None`: nobody says.
    pub builder_id: Option<String>,
    /// `reproducible`: whoever asks vouches that the build is.
    pub is_reproducible: bool,
    /// Where it goes.
    pub place: Place,
}

/// How much provenance says.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum ProvenanceMode {
    /// No values of build arguments and labels, no names of secrets, not the Dockerfile.
    #[default]
    Min,
    /// All of that, and the steps.
    Max,
}

/// `type=sbom`
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct SbomSpec {
    /// Where it goes.
    pub place: Place,
}

/// Where a statement goes besides an image's index.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Place {
    /// `inline-only`: not into the files of `type=local` and `type=tar`.
    pub is_inline_only: bool,
    /// `filename`: what it is called there; `None`: as usual.
    pub file: Option<String>,
}

impl Place {
    /// The same with this file name, if it has none.
    pub(crate) fn or(&self, usual: &str) -> Self {
        Self { file: Some(self.file.clone().unwrap_or_else(|| usual.to_owned())), ..self.clone() }
    }
}

impl Attestations {
    /// What the options say: all of `--attest`, and the last `--provenance` and `--sbom`.
    ///
    /// # Errors
    /// [`OutputError`] for an attribute that is wrong, and for a kind that is asked for twice.
    pub fn of_flags(
        attest: &[String],
        provenance: Option<&str>,
        sbom: Option<&str>,
    ) -> Result<Self, OutputError> {
        let mut asked = Self::default();
        let mut seen: Vec<&str> = Vec::new();
        let mut add = |kind: &'static str, attributes: Attributes| {
            if seen.contains(&kind) {
                return Err(OutputError::new(format!("type={kind} is asked for twice")));
            }
            seen.push(kind);
            asked.add(kind, attributes)
        };
        for text in attest {
            let mut attributes = Attributes::parse(text)?;
            match attributes.kind()?.as_str() {
                "provenance" => add("provenance", attributes)?,
                "sbom" => add("sbom", attributes)?,
                other => {
                    return Err(OutputError::new(format!("type={other} is none of provenance, sbom")));
                }
            }
        }
        for (kind, text) in [("provenance", provenance), ("sbom", sbom)] {
            match text.map(|text| (text, truth(text))) {
                None => {}
                Some((_, Some(true))) => add(kind, Attributes::default())?,
                // Said, if only to say no.
                Some((_, Some(false))) => add(kind, Attributes::parse("disabled=true")?)?,
                Some((text, None)) => add(kind, Attributes::parse(text)?)?,
            }
        }
        Ok(asked)
    }

    fn add(&mut self, kind: &'static str, mut attributes: Attributes) -> Result<(), OutputError> {
        let is_disabled = attributes.flag("disabled")?.unwrap_or(false);
        let place = place(&mut attributes)?;
        if kind == "sbom" {
            if let Some(generator) = attributes.take("generator") {
                return Err(OutputError::new(format!(
                    "generator={generator}: kiln looks into images by itself, and runs no image for it"
                )));
            }
            attributes.finish(kind, &[])?;
            self.sbom = (!is_disabled).then_some(SbomSpec { place });
            return Ok(());
        }
        let mode = match attributes.take("mode").as_deref() {
            None | Some("min") => ProvenanceMode::Min,
            Some("max" | "full") => ProvenanceMode::Max,
            Some(other) => return Err(OutputError::new(format!("mode={other} is none of min, max"))),
        };
        if let Some(version) = attributes.take("version").filter(|version| version != "v1") {
            return Err(OutputError::new(format!("version={version}: kiln writes SLSA provenance v1 only")));
        }
        let builder_id = attributes.take("builder-id").filter(|id| !id.is_empty());
        let is_reproducible = attributes.flag("reproducible")?.unwrap_or(false);
        attributes.finish(kind, &[])?;
        let spec = ProvenanceSpec { mode, builder_id, is_reproducible, place };
        self.provenance = (!is_disabled).then_some(spec);
        Ok(())
    }

    /// Whether nothing is asked for.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

fn truth(text: &str) -> Option<bool> {
    match text {
        "1" | "t" | "T" | "true" | "TRUE" | "True" => Some(true),
        "0" | "f" | "F" | "false" | "FALSE" | "False" => Some(false),
        _ => None,
    }
}

fn place(attributes: &mut Attributes) -> Result<Place, OutputError> {
    let is_inline_only = attributes.flag("inline-only")?.unwrap_or(false);
    let file = attributes.take("filename");
    if let Some(file) = file.as_ref().filter(|file| !is_file_name(file)) {
        return Err(OutputError::new(format!("filename={file:?} is not the name of a file")));
    }
    Ok(Place { is_inline_only, file })
}

/// One component that is a name.
pub(crate) fn is_file_name(name: &str) -> bool {
    !matches!(name, "" | "." | "..")
        && name.len() <= 200
        && !name.contains('/')
        && !name.chars().any(char::is_control)
        // In a layer it would delete something.
        && !name.starts_with(".wh.")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asked(attest: &[&str], provenance: Option<&str>, sbom: Option<&str>) -> Result<Attestations, String> {
        let attest: Vec<String> = attest.iter().map(|text| (*text).to_owned()).collect();
        Attestations::of_flags(&attest, provenance, sbom).map_err(|error| error.to_string())
    }

    fn provenance(text: &str) -> ProvenanceSpec {
        asked(&[], Some(text), None).unwrap().provenance.unwrap()
    }

    #[test]
    fn nothing_is_asked_for_unless_somebody_asks() {
        assert!(asked(&[], None, None).unwrap().is_empty());
        assert!(asked(&[], Some("false"), Some("0")).unwrap().is_empty());
        assert!(asked(&["type=sbom,disabled=true"], None, None).unwrap().is_empty());
        assert!(!asked(&[], None, Some("true")).unwrap().is_empty());
    }

    #[test]
    fn attributes_are_those_of_docker() {
        assert_eq!(provenance("true").mode, ProvenanceMode::Min);
        assert_eq!(provenance("mode=max,version=v1").mode, ProvenanceMode::Max);
        let long = asked(&["type=provenance,mode=max,builder-id=https://ci/1,reproducible=true"], None, None);
        let long = long.unwrap().provenance.unwrap();
        assert_eq!(long.builder_id.as_deref(), Some("https://ci/1"));
        assert!(long.is_reproducible && long.mode == ProvenanceMode::Max);
        let both = asked(&["type=sbom,inline-only=true,filename=s.json"], Some("mode=min"), None).unwrap();
        assert_eq!(both.sbom.unwrap().place, Place { is_inline_only: true, file: Some("s.json".into()) });
        assert_eq!(both.provenance.unwrap().place.or("provenance.json").file.unwrap(), "provenance.json");
    }

    #[test]
    fn what_is_wrong_is_told() {
        let check = |attest: &[&str], provenance, sbom, said: &str| {
            assert_eq!(asked(attest, provenance, sbom).unwrap_err(), said);
        };
        check(&["mode=max"], None, None, "the type is missing");
        check(&["type=vex"], None, None, "type=vex is none of provenance, sbom");
        check(&["type=sbom"], None, Some("true"), "type=sbom is asked for twice");
        check(&["type=sbom"], None, Some("false"), "type=sbom is asked for twice");
        check(&[], Some("mode=all"), None, "mode=all is none of min, max");
        check(&[], Some("max"), None, "\"max\" is not NAME=VALUE");
        check(&[], Some("level=3"), None, "type=provenance has no attribute \"level\"");
        check(&[], Some("version=v0.2"), None, "version=v0.2: kiln writes SLSA provenance v1 only");
        check(&[], Some("filename=../x"), None, "filename=\"../x\" is not the name of a file");
        check(
            &[],
            None,
            Some("generator=x/y"),
            "generator=x/y: kiln looks into images by itself, and runs no image for it",
        );
    }
}
