//! What is done on threads: taking digests and running ops.

use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::Instant;

use kiln_oci::Digest;

use super::Message;
use super::shared::{AtomicBool, Ordering, Sender};
use crate::core::Save;
use crate::{CacheKey, CacheStore, Cached, Cancellation, Event, Op, Places, Scope, Stream};

/// How a task ended.
pub(super) enum Ended<O: Op, S> {
    Digested { input: usize, digest: Digest },
    Asked { question: Question, hit: Option<Cached<O::Output>> },
    Fetched { output: Option<O::Output> },
    Ran { canonical: Option<CacheKey>, output: O::Output },
    Stopped { digesting: Option<usize> },
    Failed { error: TaskError<O::Error, S>, message: String },
}

/// What a cache that is far is asked.
#[derive(Debug, Clone, Copy)]
pub(super) enum Question {
    /// The result under this key.
    Result { key: CacheKey },
    /// Whether there is a mark of this input.
    Mark { input: usize },
}

/// Why it did not work.
pub(super) enum TaskError<E, S> {
    Op(E),
    Cache(S),
    Panicked,
}

/// Stops the work for one vertex: flags that are only ever set, and stand for themselves.
pub(super) struct VertexCancel {
    stopped: AtomicBool,
    /// Another job waits for it: its own job has no say any more.
    adopted: AtomicBool,
    /// Somebody asked and was told to stop: that stays so, whoever adopts it then.
    told: AtomicBool,
    job: Arc<dyn Cancellation>,
}

impl VertexCancel {
    pub(super) fn new(job: Arc<dyn Cancellation>) -> Self {
        let [stopped, adopted, told] = [false; 3].map(AtomicBool::new);
        Self { stopped, adopted, told, job }
    }

    pub(super) fn stop(&self) {
        self.stopped.store(true, Ordering::SeqCst);
    }

    pub(super) fn adopt(&self) {
        self.adopted.store(true, Ordering::SeqCst);
    }

    pub(super) fn is_adopted(&self) -> bool {
        self.adopted.load(Ordering::SeqCst) && !self.stopped.load(Ordering::SeqCst)
    }
}

impl Cancellation for VertexCancel {
    fn cancel(&self) {
        self.stop();
    }

    fn is_cancelled(&self) -> bool {
        let is_set = |flag: &AtomicBool| flag.load(Ordering::SeqCst);
        let tells = is_set(&self.told)
            || is_set(&self.stopped)
            || (self.job.is_cancelled() && !is_set(&self.adopted));
        if tells {
            self.told.store(true, Ordering::SeqCst);
        }
        tells
    }
}

/// What a thread knows of the solve: where to answer to, and whether to stop.
pub(super) struct Task<O: Op, C: CacheStore<O::Output>> {
    pub(super) number: usize,
    pub(super) position: usize,
    pub(super) cancel: Arc<VertexCancel>,
    pub(super) inbox: Sender<Message<O, C>>,
}

impl<O: Op, C: CacheStore<O::Output>> Task<O, C> {
    pub(super) fn digest(self, op: &O, input: usize, output: &O::Output) {
        let result = self.guarded(|scope| op.content(input, output, scope).map_err(TaskError::Op));
        self.end(match result {
            Ok(digest) => Ended::Digested { input, digest },
            Err(error) => self.failed(error, Some(input)),
        });
    }

    /// Answers a question that a cache was asked.
    pub(super) fn answer(self, question: Question, hit: Option<Cached<O::Output>>) {
        self.end(Ended::Asked { question, hit });
    }

    /// Makes a result near.
    pub(super) fn fetch(self, cache: &C, found: &Cached<O::Output>) {
        let result = self.guarded(|scope| cache.fetch(found, scope).map_err(TaskError::Cache));
        self.end(match result {
            Ok(output) => Ended::Fetched { output },
            // What was given up is as good as gone.
            Err(_) if self.cancel.is_cancelled() => Ended::Fetched { output: None },
            Err(error) => self.failed(error, None),
        });
    }

    pub(super) fn run(self, op: &O, cache: &C, title: &str, inputs: &[O::Output], save: Option<&Save>) {
        let result = self.guarded(|scope| self.make(op, cache, title, inputs, save, scope));
        self.end(match result {
            Ok(Some((canonical, output))) => Ended::Ran { canonical, output },
            Ok(None) => Ended::Stopped { digesting: None },
            Err(error) => self.failed(error, None),
        });
    }

    /// The result, made and saved; `None`: given up before it began.
    #[expect(clippy::type_complexity, reason = "a pair that is taken apart at once")]
    fn make(
        &self,
        op: &O,
        cache: &C,
        title: &str,
        inputs: &[O::Output],
        save: Option<&Save>,
        scope: &Scope<'_>,
    ) -> Result<Option<(Option<CacheKey>, O::Output)>, TaskError<O::Error, C::Error>> {
        self.tell(Event::Started { vertex: self.position });
        let Some(save) = save else {
            return Ok(Some((None, self.run_op(op, inputs, scope)?)));
        };
        let started = Instant::now();
        // Whoever wants it made again does not want what somebody else makes.
        let key = save.keys.first().filter(|_| !save.refresh);
        let _claim = match key.map(|key| cache.claim(key, scope)).transpose().map_err(TaskError::Cache)? {
            Some(None) => return Ok(None),
            claim => claim.flatten(),
        };
        if let Some(key) = key
            && let Some(found) = cache.lookup(key).map_err(TaskError::Cache)?
            // Of what is borrowed it may be the answer to another step.
            && (save.is_borrowed || !found.is_borrowed)
            && cache.load(&found).map_err(TaskError::Cache)?
        {
            // Somebody else made it since it was looked up.
            self.tell(Event::Completed { vertex: self.position, took: started.elapsed() });
            return Ok(Some((Some(found.canonical), found.output)));
        }
        let output = self.run_op(op, inputs, scope)?;
        let earlier = match &save.slot {
            Some(slot) => cache.lookup(slot).map_err(TaskError::Cache)?,
            None => None,
        };
        if let Some(earlier) = earlier.filter(|earlier| earlier.is_borrowed == save.is_borrowed)
            && cache.load(&earlier).map_err(TaskError::Cache)?
            && op.is_same(&earlier.output, &output, scope).map_err(TaskError::Op)?
        {
            let places = Places { keys: &save.keys, replace: save.refresh, marks: &save.marks, slot: None };
            cache.link(&places, &earlier, title).map_err(TaskError::Cache)?;
            return Ok(Some((Some(earlier.canonical), earlier.output)));
        }
        let canonical = save.canonical(&op.name(&output));
        let places = Places { keys: &save.keys, replace: save.refresh, marks: &save.marks, slot: save.slot };
        let result = Cached { canonical, output, is_borrowed: save.is_borrowed };
        cache.save(&places, &result, title).map_err(TaskError::Cache)?;
        Ok(Some((Some(canonical), result.output)))
    }

    fn run_op(
        &self,
        op: &O,
        inputs: &[O::Output],
        scope: &Scope<'_>,
    ) -> Result<O::Output, TaskError<O::Error, C::Error>> {
        let vertex = self.position;
        let started = Instant::now();
        let result = op.run(inputs, scope);
        self.tell(match &result {
            Ok(_) => Event::Completed { vertex, took: started.elapsed() },
            Err(_) if scope.is_cancelled() => Event::Cancelled { vertex },
            Err(error) => Event::Failed { vertex, message: chain(error) },
        });
        result.map_err(TaskError::Op)
    }

    fn guarded<T>(
        &self,
        work: impl FnOnce(&Scope<'_>) -> Result<T, TaskError<O::Error, C::Error>>,
    ) -> Result<T, TaskError<O::Error, C::Error>> {
        let vertex = self.position;
        let log = |stream: Stream, bytes: &[u8]| {
            self.tell(Event::Log { vertex, stream, bytes: bytes.to_vec() });
        };
        let scope = Scope { cancel: &*self.cancel, log: &log };
        // Nothing of what the work held is used again.
        std::panic::catch_unwind(AssertUnwindSafe(|| work(&scope))).unwrap_or(Err(TaskError::Panicked))
    }

    fn failed(&self, error: TaskError<O::Error, C::Error>, digesting: Option<usize>) -> Ended<O, C::Error> {
        let message = match &error {
            // Whatever it says, it was told to.
            TaskError::Op(_) if self.cancel.is_cancelled() => return Ended::Stopped { digesting },
            TaskError::Op(error) => chain(error),
            TaskError::Cache(error) => chain(error),
            TaskError::Panicked => "it panicked".to_owned(),
        };
        Ended::Failed { error, message }
    }

    fn tell(&self, event: Event) {
        // The driver ends after its last task.
        let _ = self.inbox.blocking_send(Message::Told { number: self.number, event });
    }

    fn end(&self, ended: Ended<O, C::Error>) {
        let _ = self.inbox.blocking_send(Message::Ended { number: self.number, ended });
    }
}

/// An error and its causes in one line.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}
