//! Arguments of the commands about builds that are over.

use clap::{Args, Subcommand};
use kiln_build::StepNumber;

#[derive(Subcommand)]
pub(crate) enum HistoryCommand {
    /// List the last builds of this store (an image of that name is `builds:latest`)
    Builds(BuildsArgs),
}

#[derive(Args)]
pub(crate) struct BuildsArgs {
    /// For programs: all that is known, steps included
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Args)]
pub(crate) struct WhyArgs {
    /// Only this step, by its number in [STAGE N/M]
    #[arg(value_name = "[STAGE:]N")]
    pub(crate) step: Option<StepNumber>,
    /// The build with this number, as `kiln history builds` shows it [default: the last]
    #[arg(long, value_name = "N")]
    pub(crate) build: Option<u64>,
    /// How the steps of two builds differ
    #[arg(long, num_args = 2, value_names = ["N1", "N2"], conflicts_with_all = ["step", "build"])]
    pub(crate) diff: Option<Vec<u64>>,
    /// For programs
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Args)]
pub(crate) struct LogArgs {
    /// The build's number, as `kiln history builds` shows it
    #[arg(value_name = "BUILD")]
    pub(crate) build: u64,
    /// Only this step, by its number in [STAGE N/M]
    #[arg(value_name = "[STAGE:]N")]
    pub(crate) step: Option<StepNumber>,
}
