//! Carries the container's streams.

use kiln_executor::Stream;
use rustix::io::Errno;

use super::Monitor;
use super::run::Source;
use crate::wire::{CHUNK, STDERR, STDOUT};

/// What one read of a stream gave.
enum Got {
    Bytes(Vec<u8>),
    Nothing,
    End,
}

fn read(fd: impl std::os::fd::AsFd) -> Got {
    let mut buffer = vec![0; CHUNK];
    match rustix::io::read(fd, &mut buffer) {
        Ok(0) => Got::End,
        Ok(count) => {
            buffer.truncate(count);
            Got::Bytes(buffer)
        }
        Err(Errno::INTR | Errno::AGAIN) => Got::Nothing,
        // EIO: nobody has the terminal open any more.
        Err(_) => Got::End,
    }
}

impl Monitor {
    /// One read, or one write, of what is ready.
    pub(super) fn carry(&mut self, source: Source) {
        match source {
            Source::Output(stream) => self.pass_on(stream, Source::Output(stream)),
            Source::Terminal => {
                self.feed(Source::Terminal);
                self.pass_on(Stream::Stdout, Source::Terminal);
            }
            Source::Input => self.feed(Source::Input),
        }
    }

    fn pass_on(&mut self, stream: Stream, source: Source) {
        let Some(run) = &mut self.run else { return };
        let place = match source {
            Source::Terminal => &mut run.master,
            Source::Output(Stream::Stdout) => &mut run.stdout,
            _ => &mut run.stderr,
        };
        let Some(fd) = place else { return };
        match read(&*fd) {
            Got::Nothing => {}
            Got::End => *place = None,
            Got::Bytes(bytes) => self.publish(stream, &bytes),
        }
    }

    /// To the log, and to all who are attached.
    fn publish(&mut self, stream: Stream, bytes: &[u8]) {
        if let Some(log) = &mut self.log {
            log.write(stream, bytes);
        }
        let tag = if stream == Stream::Stderr { STDERR } else { STDOUT };
        for client in self.clients.iter_mut().filter(|client| client.output && !client.gone) {
            client.queue(tag, bytes.to_vec());
        }
    }

    /// Writes what clients have sent.
    fn feed(&mut self, source: Source) {
        let Some(run) = &mut self.run else { return };
        let place = if source == Source::Terminal { &mut run.master } else { &mut run.stdin };
        let Some(fd) = place else { return };
        let (bytes, _) = run.input.as_slices();
        if !bytes.is_empty() {
            match rustix::io::write(&*fd, bytes) {
                Ok(count) => drop(run.input.drain(..count)),
                Err(Errno::INTR | Errno::AGAIN) => return,
                // Nobody reads: what is written is lost, as in a pipe.
                Err(_) => run.input.clear(),
            }
        }
        if run.input.is_empty() && run.input_ends && source == Source::Input {
            run.stdin = None;
        }
    }

    /// Reads what is left after the end.
    pub(super) fn drain(&mut self) {
        for source in [Source::Output(Stream::Stdout), Source::Output(Stream::Stderr), Source::Terminal] {
            let stream = if let Source::Output(stream) = source { stream } else { Stream::Stdout };
            loop {
                let Some(run) = &self.run else { return };
                let place = match source {
                    Source::Terminal => &run.master,
                    Source::Output(Stream::Stdout) => &run.stdout,
                    _ => &run.stderr,
                };
                let Some(fd) = place else { break };
                // A process that was handed the pipe's end by the container, outside of it, may still
                // have it: then this must not wait.
                let _ = rustix::io::ioctl_fionbio(fd, true);
                match read(fd) {
                    Got::Bytes(bytes) => self.publish(stream, &bytes),
                    Got::Nothing | Got::End => break,
                }
            }
        }
        if let Some(log) = &mut self.log {
            log.flush();
        }
    }

    /// Empties the terminal of a process whose client has gone.
    pub(super) fn discard_output(&mut self, id: u64) {
        let Some(exec) = self.execs.get_mut(&id) else { return };
        if let Some(master) = &exec.master
            && let Got::End = read(master)
        {
            exec.master = None;
        }
    }
}
