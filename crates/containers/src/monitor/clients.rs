//! Those who are connected to a monitor.

use std::collections::VecDeque;
use std::os::fd::BorrowedFd;

use rustix::event::PollFlags;
use rustix::io::Errno;

use super::Monitor;
use crate::wire::{CONTROL, Connection, Reply, accept};

pub(super) type ClientId = u64;

/// So much may wait for a client before the container's output waits for it.
const FULL_BYTES: usize = 256 << 10;

/// A connection, and what it is there for.
pub(super) struct Client {
    pub(super) id: ClientId,
    pub(super) connection: Connection,
    /// Gets output.
    pub(super) output: bool,
    /// Its input is the container's.
    pub(super) stdin: bool,
    /// Waits for the process to start.
    pub(super) starter: bool,
    /// Waits for the end that it asked for.
    pub(super) stopper: bool,
    /// Waits for the end.
    pub(super) waiter: bool,
    pending: VecDeque<(u8, Vec<u8>)>,
    pending_bytes: usize,
    pub(super) gone: bool,
}

impl Client {
    pub(super) fn has_pending(&self) -> bool {
        !self.pending.is_empty() && !self.gone
    }

    pub(super) fn is_full(&self) -> bool {
        self.pending_bytes > FULL_BYTES && !self.gone
    }

    /// Sends when the client reads; in order.
    pub(super) fn queue(&mut self, tag: u8, bytes: Vec<u8>) {
        self.pending_bytes += bytes.len();
        self.pending.push_back((tag, bytes));
    }

    pub(super) fn reply(&mut self, reply: &Reply) {
        if let Ok(bytes) = serde_json::to_vec(reply) {
            self.queue(CONTROL, bytes);
        }
    }

    /// Replies with a descriptor, at once: it is the first word to that client.
    pub(super) fn reply_with(&mut self, reply: &Reply, fds: &[BorrowedFd<'_>]) {
        self.gone |= self.connection.say(reply, fds).is_err();
    }

    fn flush(&mut self) {
        while let Some((tag, bytes)) = self.pending.front() {
            match self.connection.try_send(*tag, bytes, &[]) {
                Ok(()) => {
                    self.pending_bytes -= bytes.len();
                    self.pending.pop_front();
                }
                Err(Errno::AGAIN) => return,
                Err(_) => {
                    self.gone = true;
                    return;
                }
            }
        }
    }
}

impl Monitor {
    pub(super) fn welcome(&mut self) {
        while let Some(connection) = accept(&self.listener) {
            let id = self.next_client;
            self.next_client += 1;
            self.clients.push(Client {
                id,
                connection,
                output: false,
                stdin: false,
                starter: false,
                stopper: false,
                waiter: false,
                pending: VecDeque::new(),
                pending_bytes: 0,
                gone: false,
            });
        }
    }

    pub(super) fn client(&mut self, id: ClientId) -> Option<&mut Client> {
        self.clients.iter_mut().find(|client| client.id == id)
    }

    pub(super) fn hear(&mut self, id: ClientId, ready: PollFlags) {
        if !ready.intersects(PollFlags::IN | PollFlags::HUP | PollFlags::ERR) {
            return;
        }
        let Some(client) = self.client(id) else { return };
        match client.connection.receive() {
            Ok(Some(message)) => self.obey(id, message),
            Ok(None) | Err(_) => client.gone = true,
        }
    }

    pub(super) fn flush_clients(&mut self) {
        self.clients.iter_mut().for_each(Client::flush);
        // docker's StdinOnce: with the client that runs it, the input ends.
        let once = self.config.stdin_once && self.clients.iter().any(|client| client.gone && client.stdin);
        if let Some(run) = self.run.as_mut().filter(|run| once && run.master.is_none()) {
            run.input_ends = true;
        }
        self.clients.retain(|client| !client.gone);
    }

    /// Answers all whom `wants` says, who do not wait any longer then.
    pub(super) fn reply_to(&mut self, wants: fn(&mut Client) -> &mut bool, reply: &Reply) {
        for client in &mut self.clients {
            if std::mem::take(wants(client)) {
                client.reply(reply);
            }
        }
    }

    /// Tells those who wait for the end.
    pub(super) fn tell_end(&mut self, code: i32) {
        let ended = Reply::Exited { code, oom_killed: self.state.oom_killed };
        self.reply_to(|client| &mut client.output, &ended);
        self.reply_to(|client| &mut client.stdin, &ended);
        self.reply_to(|client| &mut client.waiter, &ended);
        self.reply_to(|client| &mut client.stopper, &Reply::Done);
        let failed = Reply::Failed { message: "the container has ended".to_owned(), code: 125, unfit: None };
        self.reply_to(|client| &mut client.starter, &failed);
    }
}
