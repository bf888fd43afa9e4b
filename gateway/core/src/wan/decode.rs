//! The destination's half: chunks in, the stream's bytes out, proven batch by batch and as a whole at the end.
//!
//! A chunk comes from a peer and is not trusted: every length is checked before memory is taken for
//! it, a batch is unpacked one at a time, and after the first error nothing more comes out.

use bytes::{Buf, Bytes};
use zstd::bulk::Decompressor;

use super::ops::{Sources, places, replay};
use super::pages::ToldPages;
use super::places::Place;
use super::shadow::{Blocks, Remembered, Shadow};
use super::{
    BATCH_HEADER_BYTES, ENCODING_STORED, ENCODING_ZSTD, END_FRAME_BYTES, FRAME_BATCH, FRAME_DISKS, FRAME_END,
    FRAME_SHADOW, MAX_CONTENTS, MAX_OPS, SHADOW_FRAME_BYTES, StreamDigest, StreamEnd,
};
use crate::memory::PAGE_BYTES;
use crate::proof::Proof;
use crate::units::Bytes as ByteCount;

/// Why the stream cannot be made of the chunks. The copy that was being built must not run.
#[derive(Debug, thiserror::Error)]
pub enum DecodeError {
    /// A frame is of a type that this version does not know.
    #[error("Frame type {0:#04x} is unknown; the peer speaks another version")]
    UnknownFrame(u8),
    /// A batch is encoded in a way that this version does not know.
    #[error("Encoding {0:#04x} is unknown; the peer speaks another version")]
    UnknownEncoding(u8),
    /// A frame is longer than its chunk.
    #[error("A frame is cut short")]
    Truncated,
    /// A batch announces more than a batch may hold.
    #[error("A batch announces {0} bytes, more than is allowed")]
    TooLong(u64),
    /// A batch stands for more records than a batch may.
    #[error("A batch stands for too many memory records")]
    TooManyRecords,
    /// The compressed data is damaged or of another length than announced.
    #[error("A batch does not decompress to what it announces")]
    Compressed(#[source] Option<std::io::Error>),
    /// A batch's program does not fit its contents.
    #[error("A batch's program is damaged")]
    Program,
    /// A page is told by one that is not remembered.
    #[error("A page is told by another one that is not remembered here")]
    NotRemembered,
    /// A page is named by a place on a disk that the stream does not name pages by, or that was not read.
    #[error("A page is named by a place on a disk that was not read here")]
    NotFound,
    /// The source wants more pages remembered than this site said that it allows, or says so too late.
    #[error(
        "The source wants {asked} pages remembered; this site allows {allowed}, from the stream's beginning on"
    )]
    Shadow {
        /// Pages it asks for.
        asked: u32,
        /// Pages allowed here.
        allowed: u32,
    },
    /// The source begins with what this site does not remember.
    #[error("The source begins with pages that are not remembered here")]
    OtherBase,
    /// Something follows the end of the stream.
    #[error("Data follows the end of the stream, or an earlier error")]
    AfterEnd,
    /// A batch does not become what the source read from QEMU.
    #[error(
        "Bytes {} to {} of the stream ({pages}) are not what the source sent: move the machine again, and test the memory of \
         both hosts if that fails too",
        .start.0,
        .end.0
    )]
    Damaged {
        /// So much of the stream was proven.
        start: ByteCount,
        /// Where the batch ends in the stream that was made.
        end: ByteCount,
        /// The machine's pages that it tells.
        pages: ToldPages,
        /// What its proof would have to be.
        made: Proof,
    },
    /// The rebuilt stream is not what the source read from QEMU.
    #[error("The rebuilt stream ({made:?}) is not the one that the source sent ({sent:?})")]
    NotProven {
        /// What the source says it was.
        sent: StreamEnd,
        /// What it became here.
        made: StreamEnd,
    },
}

/// What comes out of a decoder.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Decoded {
    /// The stream's next bytes, never empty.
    Bytes(Bytes),
    /// Pages may be named by the machine's disks, in their order: read them once each has applied so many records.
    Disks(Vec<u64>),
    /// The next batch names pages at these places: answer with [`StreamDecoder::handle_found`].
    Wanted(Vec<Place>),
    /// The stream is complete and proven.
    End(StreamEnd),
}

/// Makes a migration stream again of the chunks of a [`StreamEncoder`](super::StreamEncoder).
pub struct StreamDecoder {
    chunk: Bytes,
    rebuilt: Rebuilt,
    decompressor: Decompressor<'static>,
    scratch: Vec<u8>,
    max_shadow_pages: u32,
    base: Option<Remembered>,
    /// How many disks pages are named by.
    disks: u8,
    /// A batch that waits for what it names.
    waiting: Option<Waiting>,
    begun: bool,
    closed: bool,
}

/// The stream as far as it was made again, and what is remembered of it.
struct Rebuilt {
    hasher: blake3::Hasher,
    bytes: u64,
    blocks: Blocks,
    shadow: Shadow,
}

struct Waiting {
    contents: Vec<u8>,
    ops: Vec<u8>,
    proof: Proof,
    wanted: usize,
    found: Option<Vec<Bytes>>,
}

impl StreamDecoder {
    /// A decoder at the beginning of a stream that remembers up to so many pages, if the source wants it.
    ///
    /// # Errors
    ///
    /// When zstd has no memory for its state.
    pub fn new(max_shadow_pages: u32) -> std::io::Result<Self> {
        Ok(Self {
            chunk: Bytes::new(),
            rebuilt: Rebuilt {
                hasher: blake3::Hasher::new(),
                bytes: 0,
                blocks: Blocks::default(),
                shadow: Shadow::new(0),
            },
            decompressor: Decompressor::new()?,
            scratch: Vec::new(),
            max_shadow_pages,
            base: None,
            disks: 0,
            waiting: None,
            begun: false,
            closed: false,
        })
    }

    /// The same where the source may begin with what is remembered of an earlier stream.
    pub fn with_base(self, base: Option<Remembered>) -> Self {
        Self { base, ..self }
    }

    /// What is remembered at the end.
    pub fn into_remembered(self) -> Remembered {
        Remembered::new(self.rebuilt.blocks, self.rebuilt.shadow)
    }

    /// Takes the next chunk. Call [`Self::poll_decoded`] until it returns `None` or an error before the next.
    pub fn handle_chunk(&mut self, chunk: Bytes) {
        debug_assert!(self.closed || self.chunk.is_empty(), "the previous chunk is still being decoded");
        self.chunk = chunk;
    }

    /// What the disks hold at the places that [`Decoded::Wanted`] named, in their order: [`PAGE_BYTES`] bytes each.
    pub fn handle_found(&mut self, pages: Vec<Bytes>) {
        if let Some(waiting) = &mut self.waiting {
            waiting.found = Some(pages);
        }
    }

    /// What comes next; `None` until the next chunk. Holds one batch at a time, with what it names at most 12 MiB, and what is
    /// remembered.
    ///
    /// # Errors
    ///
    /// When a chunk is damaged or the stream is not the one that was sent; for good.
    pub fn poll_decoded(&mut self) -> Result<Option<Decoded>, DecodeError> {
        if let Some(waiting) = self.waiting.take() {
            let decoded = self.replay_waiting(waiting);
            self.closed |= decoded.is_err();
            return decoded.map(Some);
        }
        if self.chunk.is_empty() {
            return Ok(None);
        }
        if self.closed {
            return Err(DecodeError::AfterEnd);
        }
        if self.chunk[0] == FRAME_SHADOW {
            let agreed = self.agree();
            self.closed |= agreed.is_err();
            agreed?;
            return self.poll_decoded();
        }
        self.begun = true;
        let decoded = match self.chunk[0] {
            FRAME_BATCH => self.batch(),
            FRAME_DISKS => self.name_disks(),
            FRAME_END => self.end(),
            other => Err(DecodeError::UnknownFrame(other)),
        };
        self.closed |= matches!(decoded, Ok(Decoded::End(_)) | Err(_));
        decoded.map(Some)
    }

    #[cfg(test)]
    pub(super) fn shadow(&self) -> &Shadow {
        &self.rebuilt.shadow
    }

    /// Of a page of the present block something else is remembered than came.
    #[cfg(test)]
    pub(super) fn misremember(&mut self, page: u64, content: &[u8]) {
        if let Some(key) = self.rebuilt.blocks.key(page) {
            self.rebuilt.shadow.put(key, content);
        }
    }

    /// How many bytes of the stream were made and proven so far.
    pub fn made(&self) -> ByteCount {
        ByteCount(self.rebuilt.bytes)
    }

    /// Once, and first: so that it cannot recurse for long either.
    fn agree(&mut self) -> Result<(), DecodeError> {
        if self.chunk.len() < SHADOW_FRAME_BYTES {
            return Err(DecodeError::Truncated);
        }
        let mut frame = self.chunk.split_to(SHADOW_FRAME_BYTES);
        frame.advance(1);
        let (asked, allowed) = (frame.get_u32(), self.max_shadow_pages);
        if asked > allowed || std::mem::replace(&mut self.begun, true) {
            return Err(DecodeError::Shadow { asked, allowed });
        }
        let mut digest = [0; 32];
        let is_based = frame.get_u8() != 0;
        frame.copy_to_slice(&mut digest);
        let base = self.base.take();
        if !is_based {
            self.rebuilt.shadow = Shadow::new(asked);
            return Ok(());
        }
        let base = base.filter(|base| base.digest() == digest).ok_or(DecodeError::OtherBase)?;
        (self.rebuilt.blocks, self.rebuilt.shadow) = base.begin(asked);
        Ok(())
    }

    /// Once, wherever it stands: what was decoded before did not name any.
    fn name_disks(&mut self) -> Result<Decoded, DecodeError> {
        let mut frame = self.chunk.split_off(1);
        let disks = frame.try_get_u8().map_err(|_| DecodeError::Truncated)?;
        let records = (0..disks).map(|_| frame.try_get_u64().map_err(|_| DecodeError::Truncated));
        let records: Vec<u64> = records.collect::<Result<_, _>>()?;
        self.chunk = frame;
        if disks == 0 || std::mem::replace(&mut self.disks, disks) != 0 {
            return Err(DecodeError::Program);
        }
        Ok(Decoded::Disks(records))
    }

    fn batch(&mut self) -> Result<Decoded, DecodeError> {
        let BatchHeader { encoding, data_len, contents_len, ops_len, proof } =
            BatchHeader::take(&mut self.chunk)?;
        let data = self.chunk.split_to(data_len);
        let unpacked = match encoding {
            ENCODING_STORED if data_len == contents_len + ops_len => &data[..],
            ENCODING_STORED => return Err(DecodeError::Truncated),
            ENCODING_ZSTD => {
                decompress(&mut self.decompressor, &data, contents_len + ops_len, &mut self.scratch)?
            }
            other => return Err(DecodeError::UnknownEncoding(other)),
        };
        let (contents, ops) = unpacked.split_at(contents_len);
        let wanted = if self.disks == 0 { Vec::new() } else { places(ops, contents)? };
        if !wanted.is_empty() {
            if wanted.iter().any(|place| place.disk >= self.disks) {
                return Err(DecodeError::NotFound);
            }
            let (contents, ops) = (contents.to_vec(), ops.to_vec());
            self.waiting = Some(Waiting { contents, ops, proof, wanted: wanted.len(), found: None });
            return Ok(Decoded::Wanted(wanted));
        }
        self.rebuilt.replay(ops, Sources { contents, found: &[] }, proof)
    }

    fn replay_waiting(&mut self, waiting: Waiting) -> Result<Decoded, DecodeError> {
        let found = waiting.found.filter(|found| {
            found.len() == waiting.wanted && found.iter().all(|page| page.len() == PAGE_BYTES)
        });
        let found = found.ok_or(DecodeError::NotFound)?;
        let sources = Sources { contents: &waiting.contents, found: &found };
        self.rebuilt.replay(&waiting.ops, sources, waiting.proof)
    }

    fn end(&mut self) -> Result<Decoded, DecodeError> {
        if self.chunk.len() != END_FRAME_BYTES {
            return Err(DecodeError::Truncated);
        }
        let mut frame = self.chunk.split_to(END_FRAME_BYTES);
        frame.advance(1);
        let bytes = ByteCount(frame.get_u64());
        let mut digest = [0; 32];
        frame.copy_to_slice(&mut digest);
        let sent = StreamEnd { bytes, digest: StreamDigest(digest) };
        let made = StreamEnd {
            bytes: ByteCount(self.rebuilt.bytes),
            digest: StreamDigest(*self.rebuilt.hasher.finalize().as_bytes()),
        };
        if sent == made { Ok(Decoded::End(made)) } else { Err(DecodeError::NotProven { sent, made }) }
    }
}

impl Rebuilt {
    /// Makes the stream's next bytes of a batch, and gives them if they are what was sent.
    fn replay(&mut self, ops: &[u8], sources: Sources<'_>, proof: Proof) -> Result<Decoded, DecodeError> {
        let block = self.blocks.current().map(<[u8]>::to_vec);
        let made = replay(ops, sources, &mut self.blocks, &mut self.shadow)?.freeze();
        if made.is_empty() {
            return Err(DecodeError::Program);
        }
        self.hasher.update(&made);
        let end = self.bytes + made.len() as u64;
        let made_proof = Proof::of(&self.hasher);
        if made_proof != proof {
            let (start, end, pages) =
                (ByteCount(self.bytes), ByteCount(end), ToldPages::of(ops, block.as_deref()));
            return Err(DecodeError::Damaged { start, end, pages, made: made_proof });
        }
        self.bytes = end;
        Ok(Decoded::Bytes(made))
    }
}

/// What stands before a batch's data.
struct BatchHeader {
    encoding: u8,
    data_len: usize,
    contents_len: usize,
    ops_len: usize,
    proof: Proof,
}

impl BatchHeader {
    /// Takes it from a chunk that holds the data, too, and no more than is allowed.
    fn take(chunk: &mut Bytes) -> Result<Self, DecodeError> {
        if chunk.len() < BATCH_HEADER_BYTES {
            return Err(DecodeError::Truncated);
        }
        let mut header = chunk.split_to(BATCH_HEADER_BYTES);
        header.advance(1);
        let encoding = header.get_u8();
        let (data_len, contents_len, ops_len) =
            (header.get_u32() as usize, header.get_u32() as usize, header.get_u32() as usize);
        if contents_len > MAX_CONTENTS || ops_len > MAX_OPS {
            return Err(DecodeError::TooLong(contents_len.max(ops_len) as u64));
        }
        if data_len > chunk.len() {
            return Err(DecodeError::Truncated);
        }
        let mut proof = [0; Proof::BYTES];
        header.copy_to_slice(&mut proof);
        Ok(Self { encoding, data_len, contents_len, ops_len, proof: Proof::from_bytes(proof) })
    }
}

fn decompress<'a>(
    decompressor: &mut Decompressor<'static>,
    data: &[u8],
    len: usize,
    scratch: &'a mut Vec<u8>,
) -> Result<&'a [u8], DecodeError> {
    scratch.clear();
    // zstd may write up to the capacity, which can be larger than what was asked for; hence the comparison.
    scratch.reserve_exact(len);
    match decompressor.decompress_to_buffer(data, scratch) {
        Ok(made) if made == len => Ok(&scratch[..]),
        Ok(_) => Err(DecodeError::Compressed(None)),
        Err(error) => Err(DecodeError::Compressed(Some(error))),
    }
}
