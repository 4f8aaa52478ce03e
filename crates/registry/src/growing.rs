//! Blobs that are sent while they are made.
//!
//! An upload can begin before anybody knows what it will be: the digest stands in the request that ends it.
//! It goes in pieces of a length that is known, each sent when all of it is there, so that a registry has
//! never to wait for whoever makes the blob, nor the other way round. See `docs/adr/0031-sent-while-packed.md`.

use std::io;
use std::pin::Pin;

use kiln_oci::Digest;
use kiln_oci::image::Descriptor;

use crate::sending::Sending;
use crate::{BlobSource, Error, Pushed, Repository};

/// A blob that is whole before it has so many bytes is not begun with; later pieces have at least as many.
const LEAST_BYTES: u64 = 8 << 20;
/// However much is there, a piece has no more: what a registry turns out to have is noticed between pieces.
const MOST_BYTES: u64 = 64 << 20;

/// A blob that is still being made, and can be read as far as it is.
pub trait Growing: BlobSource {
    /// Waits until there are `wanted_bytes` or the blob is whole.
    ///
    /// # Errors
    /// When it will never be.
    fn grown(&self, wanted_bytes: u64) -> Pin<Box<dyn Future<Output = io::Result<Grown>> + Send + '_>>;
}

/// How far a [`Growing`] blob is.
#[allow(clippy::large_enum_variant, reason = "one of them is there at a time")]
#[derive(Debug, Clone, PartialEq)]
pub enum Grown {
    /// So many bytes are there, and there will be more.
    Part(u64),
    /// That is what it has become.
    Whole(Descriptor),
}

fn failed(source: io::Error) -> Error {
    Error::Local { what: "packing a blob", source }
}

async fn grown(source: &dyn Growing, wanted_bytes: u64) -> Result<Grown, Error> {
    source.grown(wanted_bytes).await.map_err(failed)
}

async fn whole(source: &dyn Growing) -> Result<Descriptor, Error> {
    match grown(source, u64::MAX).await? {
        Grown::Whole(blob) => Ok(blob),
        Grown::Part(_) => Err(failed(io::ErrorKind::UnexpectedEof.into())),
    }
}

impl Repository {
    /// Makes sure that the repository has a blob that is still being made, by sending it meanwhile.
    /// `elsewhere` tells repositories of the same registry that may have it, once it is known what it is.
    ///
    /// A small one is treated as [`Repository::push_blob`] does, and so is one that the registry takes no
    /// pieces of.
    ///
    /// # Errors
    /// Those of every request; [`Error::Local`] when the blob comes to nothing: the upload is given back then.
    pub async fn push_growing(
        &self,
        source: &dyn Growing,
        elsewhere: &(dyn Fn(&Digest) -> Vec<String> + Send + Sync),
    ) -> Result<(Descriptor, Pushed), Error> {
        if let Grown::Whole(blob) = grown(source, self.least_bytes()).await? {
            let pushed = self.push_blob(&blob, source, &elsewhere(&blob.digest)).await?;
            return Ok((blob, pushed));
        }
        let mut sending = Sending::new(self).await?;
        let mut looked = false;
        loop {
            let before = sending.arrived_bytes();
            let error = match self.follow(&mut sending, source, elsewhere, &mut looked).await {
                Ok((blob, pushed)) => {
                    if pushed != Pushed::Sent {
                        sending.give_back().await;
                    }
                    return Ok((blob, pushed));
                }
                Err(error) => error,
            };
            if matches!(error, Error::Local { .. }) {
                sending.give_back().await;
                return Err(error);
            }
            let had_begun = sending.has_begun();
            match sending.recover(before, error).await {
                Ok(()) if sending.is_in_one() => break,
                Ok(()) => {}
                Err(error) if had_begun && error.is_piece_refused() => break,
                Err(error) => return Err(error),
            }
        }
        // It takes no pieces, or not these.
        let blob = match whole(source).await {
            Ok(blob) => blob,
            Err(error) => {
                sending.give_back().await;
                return Err(error);
            }
        };
        if let Some(there) = self.find_blob(&blob, &elsewhere(&blob.digest)).await? {
            sending.give_back().await;
            return Ok((blob, there));
        }
        if sending.is_in_one() {
            sending.run(&blob, source).await?;
        } else {
            sending.give_back().await;
            self.send_blob(&blob, source).await?;
        }
        Ok((blob, Pushed::Sent))
    }

    /// Sends pieces as they come, and ends the upload.
    async fn follow(
        &self,
        sending: &mut Sending<'_>,
        source: &dyn Growing,
        elsewhere: &(dyn Fn(&Digest) -> Vec<String> + Send + Sync),
        looked: &mut bool,
    ) -> Result<(Descriptor, Pushed), Error> {
        sending.begin().await?;
        loop {
            let least = self.least_bytes().max(sending.least_bytes());
            let from = sending.arrived_bytes();
            match grown(source, from.saturating_add(least)).await? {
                Grown::Part(bytes) => {
                    sending.piece(source, bytes.saturating_sub(from).min(MOST_BYTES.max(least))).await?;
                }
                Grown::Whole(blob) => {
                    // To ask costs one request, and may save the greater part.
                    if blob.size.saturating_sub(from) > least && !std::mem::replace(looked, true) {
                        let there = self.find_blob(&blob, &elsewhere(&blob.digest)).await?;
                        if let Some(there) = there {
                            return Ok((blob, there));
                        }
                    }
                    sending.finish(&blob, source).await?;
                    return Ok((blob, Pushed::Sent));
                }
            }
        }
    }

    fn least_bytes(&self) -> u64 {
        self.client.inner.settings.chunk_bytes.map_or(LEAST_BYTES, |most| most.min(LEAST_BYTES))
    }
}
