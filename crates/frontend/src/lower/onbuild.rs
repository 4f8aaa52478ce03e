//! Triggers that came with a base.

use super::Lower;
use crate::Diagnostic;
use crate::ast::{Instruction, Kind};
use crate::parser::parse_as;
use crate::stages::{Result, wrong};

impl Lower<'_> {
    /// Parses the ONBUILD triggers of a base; everything about them is said at `from`.
    pub(super) fn triggers(&self, triggers: &[String], from: &Instruction) -> Result<Vec<Instruction>> {
        let span = from.rest_span();
        let mut found = Vec::new();
        for text in triggers {
            let (ast, diagnostics) = parse_as(text, Some(span));
            if let Some(error) = diagnostics.into_iter().find(Diagnostic::is_error) {
                let message = format!("the base has the ONBUILD trigger {text:?}: {}", error.message);
                return Err(Box::new(Diagnostic { message, ..error }));
            }
            let [instruction] = ast.instructions.as_slice() else {
                return wrong(
                    span,
                    format!("the base has the ONBUILD trigger {text:?}, which is not one instruction"),
                );
            };
            if matches!(instruction.kind, Kind::From | Kind::Onbuild | Kind::Maintainer) {
                return wrong(
                    span,
                    format!(
                        "the base has the ONBUILD trigger {text:?}: {} is no trigger",
                        instruction.kind.name()
                    ),
                );
            }
            found.push(instruction.clone());
        }
        Ok(found)
    }
}
