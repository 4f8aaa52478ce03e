//! Arguments about what a build says of its images.

use clap::Args;
use kiln_build::Attestations;
use kiln_build::export::OutputError;

#[derive(Args)]
pub(crate) struct AttestArgs {
    /// Say something of the image, in an index beside it: type=provenance or type=sbom with attributes; may be given
    /// several times
    #[arg(long, value_name = "type=TYPE[,NAME=VALUE…]")]
    attest: Vec<String>,
    /// Say where the image comes from; the same as --attest type=provenance. mode=max tells build arguments, labels
    /// and the Dockerfile, too [default: false]
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    #[arg(value_name = "BOOL|NAME=VALUE[,…]")]
    provenance: Option<String>,
    /// Say which packages are in the image; the same as --attest type=sbom [default: false]
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    #[arg(value_name = "BOOL|NAME=VALUE[,…]")]
    sbom: Option<String>,
}

impl AttestArgs {
    /// What they ask for together.
    pub(crate) fn asked(&self) -> Result<Attestations, OutputError> {
        Attestations::of_flags(&self.attest, self.provenance.as_deref(), self.sbom.as_deref())
    }
}
