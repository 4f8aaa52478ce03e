//! `RUN`: a process on a tree.

use kiln_executor::{Exit, Network, ProcessSpec, Security, Stdio};
use kiln_llb as llb;
use kiln_snapshotter::OpenOptions;
use kiln_solver::{Scope, Stream};

use super::BuildOp;
use crate::OpError;
use crate::tree::Tree;

/// The host name of build steps, as BuildKit sets it.
const HOSTNAME: &str = "buildkitsandbox";

impl BuildOp {
    pub(super) fn run_exec(
        &self,
        exec: &llb::Exec,
        inputs: &[Tree],
        scope: &Scope<'_>,
    ) -> Result<Tree, OpError> {
        let engine = &self.shared.engine;
        let base = exec.base.and_then(|index| inputs[index.0].snapshot());
        let active = engine.prepare(base)?;
        let stubs = vec![engine.executor.stub_dir().to_owned()];
        let root = engine.snapshots.open_active(active.key(), &OpenOptions { extra_lower: stubs })?;
        let spec = ProcessSpec {
            args: exec.args.clone(),
            env: exec.env.clone(),
            cwd: exec.cwd.clone(),
            create_cwd: true,
            user: exec.user.clone(),
            hostname: HOSTNAME.to_owned(),
            network: match exec.network {
                llb::Network::Default => Network::Default,
                llb::Network::None => Network::None,
                llb::Network::Host => Network::Host,
            },
            security: Security::Sandbox,
            mounts: Vec::new(),
            extra_hosts: Vec::new(),
            no_new_privileges: false,
        };
        let mut log = |stream: kiln_executor::Stream, bytes: &[u8]| {
            let stream = match stream {
                kiln_executor::Stream::Stdout => Stream::Stdout,
                kiln_executor::Stream::Stderr => Stream::Stderr,
            };
            scope.log(stream, bytes);
        };
        let exit = engine.executor.run(
            root.into(),
            &spec,
            Stdio::Captured(&mut log),
            self.shared.cancel.processes(),
        )?;
        match exit {
            Exit::Code(0) => Ok(self.commit(active)?),
            exit => Err(OpError::Exit { exit }),
        }
    }
}
