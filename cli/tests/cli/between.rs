//! Stands before a server: hears what it is asked, and is the server that dies, or says nothing more, in the middle of
//! it.

use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;

/// Who speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Side {
    Client,
    Server,
}

/// How it ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum How {
    /// All connections are closed, and nobody listens any more.
    Dies,
    /// All connections stay, new ones are taken, and nothing is said on them.
    FallsSilent,
}

/// The end: half of this piece of what `side` says is passed on, counted from 0, and then nothing.
#[derive(Debug, Clone, Copy)]
pub(crate) struct End {
    pub(crate) how: How,
    pub(crate) side: Side,
    pub(crate) piece: usize,
}

pub(crate) struct Between {
    pub(crate) address: SocketAddr,
    inside: Arc<Inside>,
}

struct Inside {
    address: SocketAddr,
    end: Option<End>,
    has_ended: AtomicBool,
    /// Pieces of the client's, and of the server's.
    pieces: [AtomicUsize; 2],
    open: Mutex<Vec<TcpStream>>,
    requests: Mutex<Vec<String>>,
}

impl Between {
    /// One that passes everything on.
    pub(crate) fn new(server: SocketAddr) -> Self {
        Self::until(server, None)
    }

    pub(crate) fn until(server: SocketAddr, end: Option<End>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("there are ports");
        let address = listener.local_addr().expect("it is bound");
        let inside = Arc::new(Inside {
            address,
            end,
            has_ended: AtomicBool::new(false),
            pieces: Default::default(),
            open: Mutex::default(),
            requests: Mutex::default(),
        });
        let of_thread = inside.clone();
        // The listener is closed when the thread ends: nobody listens then.
        thread::spawn(move || of_thread.serve(&listener, server));
        Self { address, inside }
    }

    /// Whether the end has come.
    pub(crate) fn has_ended(&self) -> bool {
        self.inside.has_ended.load(Ordering::SeqCst)
    }

    /// How many pieces `side` has said.
    pub(crate) fn pieces(&self, side: Side) -> usize {
        self.inside.pieces[side as usize].load(Ordering::SeqCst)
    }

    /// Method and target of what was asked.
    pub(crate) fn requests(&self) -> Vec<String> {
        self.inside.requests.lock().expect("nobody panics").clone()
    }
}

impl Inside {
    fn serve(self: Arc<Self>, listener: &TcpListener, server: SocketAddr) {
        for client in listener.incoming().map_while(Result::ok) {
            let keep = |stream: &TcpStream| {
                self.open.lock().expect("nobody panics").extend(stream.try_clone().ok());
            };
            match (self.has_ended.load(Ordering::SeqCst), self.end) {
                (true, Some(End { how: How::FallsSilent, .. })) => {
                    keep(&client);
                    continue;
                }
                (true, _) => return,
                (false, _) => {}
            }
            let Ok(behind) = TcpStream::connect(server) else { return };
            keep(&client);
            keep(&behind);
            let (Ok(from), Ok(to)) = (behind.try_clone(), client.try_clone()) else { return };
            let (here, there) = (self.clone(), self.clone());
            thread::spawn(move || here.pass(Side::Server, from, to));
            thread::spawn(move || there.pass(Side::Client, client, behind));
        }
    }

    fn pass(&self, side: Side, mut from: TcpStream, mut to: TcpStream) {
        let mut piece = [0; 16 << 10];
        while let Ok(length @ 1..) = from.read(&mut piece) {
            let piece = &piece[..length];
            if side == Side::Client {
                self.requests.lock().expect("nobody panics").extend(request(piece));
            }
            let nth = self.pieces[side as usize].fetch_add(1, Ordering::SeqCst);
            let end = self.end.filter(|end| end.side == side && end.piece == nth);
            if let Some(End { how, .. }) = end {
                let _ = to.write_all(&piece[..length / 2]);
                self.has_ended.store(true, Ordering::SeqCst);
                match how {
                    How::Dies => self.die(),
                    // What is kept in `open` stays open.
                    How::FallsSilent => return,
                }
            }
            if self.has_ended.load(Ordering::SeqCst) || to.write_all(piece).is_err() {
                break;
            }
        }
        if self.end.is_some_and(|end| end.how == How::FallsSilent) && self.has_ended.load(Ordering::SeqCst) {
            return;
        }
        for stream in [from, to] {
            let _: io::Result<()> = stream.shutdown(Shutdown::Both);
        }
    }

    fn die(&self) {
        for stream in self.open.lock().expect("nobody panics").drain(..) {
            let _ = stream.shutdown(Shutdown::Both);
        }
        // The listener waits for one more.
        let _ = TcpStream::connect(self.address);
    }
}

/// Method and target, if a piece is the beginning of a request.
fn request(piece: &[u8]) -> Option<String> {
    let line = piece.split(|byte| *byte == b'\r').next()?;
    let line = std::str::from_utf8(line).ok()?.strip_suffix(" HTTP/1.1")?;
    let method = line.split(' ').next()?;
    method.bytes().all(|byte| byte.is_ascii_uppercase()).then(|| line.to_owned())
}

/// A server that takes connections and never says anything.
pub(crate) struct Silent {
    pub(crate) address: SocketAddr,
    listener: TcpListener,
}

impl Silent {
    pub(crate) fn new() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("there are ports");
        Self { address: listener.local_addr().expect("it is bound"), listener }
    }

    /// Waits until somebody has asked something.
    pub(crate) fn is_asked(&self) -> TcpStream {
        let (mut client, _) = self.listener.accept().expect("it listens");
        client.read_exact(&mut [0]).expect("whoever connects asks something");
        client
    }
}
