//! Frames on a byte stream: a big-endian `u32` length, then that many bytes.
//!
//! The decoder takes pieces of any size and gives whole bodies. A length is checked before anything
//! is reserved for it. It does not look inside the body, and it reads from nothing itself.

/// The longest frame body in bytes: what the connections of a busy machine take that is handed over
/// ([`crate::migration::message::MAX_HANDED_FLOWS`]). Larger things are bulk data.
pub const MAX_FRAME_BYTES: usize = 4 << 20;

/// The length before a body, in bytes.
pub const FRAME_PREFIX_BYTES: usize = 4;

/// A frame that was refused. The stream cannot be used any further.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// Longer than [`MAX_FRAME_BYTES`].
    #[error("A frame of {length_bytes} bytes is longer than the allowed {MAX_FRAME_BYTES}")]
    TooLong {
        /// The length it claims.
        length_bytes: u64,
    },
    /// A frame without a body.
    #[error("A frame is empty")]
    Empty,
}

/// `body` behind its length.
pub fn encode_frame(body: &[u8]) -> Result<Vec<u8>, FrameError> {
    check_length(body.len() as u64)?;
    let mut frame = Vec::with_capacity(FRAME_PREFIX_BYTES + body.len());
    frame.extend_from_slice(&(body.len() as u32).to_be_bytes());
    frame.extend_from_slice(body);
    Ok(frame)
}

/// Collects pieces of a stream and gives out whole frame bodies.
///
/// It holds at most one unfinished frame and the piece that was pushed last, provided that the caller
/// empties it with [`FrameDecoder::next_frame`] before it pushes more.
#[derive(Debug, Default)]
pub struct FrameDecoder {
    buffer: Vec<u8>,
    consumed: usize,
}

impl FrameDecoder {
    /// An empty decoder.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds what was read from the stream.
    pub fn push(&mut self, piece: &[u8]) {
        self.buffer.drain(..self.consumed);
        self.consumed = 0;
        self.buffer.extend_from_slice(piece);
    }

    /// The next whole body; `None` while it is incomplete.
    pub fn next_frame(&mut self) -> Result<Option<Vec<u8>>, FrameError> {
        let pending = &self.buffer[self.consumed..];
        let Some((prefix, rest)) = pending.split_first_chunk::<FRAME_PREFIX_BYTES>() else {
            return Ok(None);
        };
        let length = u32::from_be_bytes(*prefix);
        check_length(u64::from(length))?;
        let Some(body) = rest.get(..length as usize) else {
            return Ok(None);
        };
        let body = body.to_vec();
        self.consumed += FRAME_PREFIX_BYTES + body.len();
        Ok(Some(body))
    }

    /// Bytes that were pushed and not given out yet.
    pub fn buffered_bytes(&self) -> usize {
        self.buffer.len() - self.consumed
    }
}

fn check_length(length_bytes: u64) -> Result<(), FrameError> {
    match length_bytes {
        0 => Err(FrameError::Empty),
        _ if length_bytes > MAX_FRAME_BYTES as u64 => Err(FrameError::TooLong { length_bytes }),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_truncated_frame_waits() {
        let frame = encode_frame(b"hello").unwrap();
        let mut decoder = FrameDecoder::new();
        for byte in &frame[..frame.len() - 1] {
            decoder.push(&[*byte]);
            assert_eq!(decoder.next_frame(), Ok(None));
        }
        decoder.push(&frame[frame.len() - 1..]);
        assert_eq!(decoder.next_frame(), Ok(Some(b"hello".to_vec())));
    }

    #[test]
    fn the_longest_frame_passes_and_one_byte_more_is_refused_by_its_prefix_alone() {
        let longest = encode_frame(&vec![1; MAX_FRAME_BYTES]).unwrap();
        let mut decoder = FrameDecoder::new();
        decoder.push(&longest);
        assert_eq!(decoder.next_frame().unwrap().unwrap().len(), MAX_FRAME_BYTES);

        let length_bytes = MAX_FRAME_BYTES as u64 + 1;
        decoder.push(&(length_bytes as u32).to_be_bytes());
        assert_eq!(decoder.next_frame(), Err(FrameError::TooLong { length_bytes }));
        assert!(decoder.buffer.capacity() < 2 * MAX_FRAME_BYTES + 16);
        assert_eq!(encode_frame(&vec![1; MAX_FRAME_BYTES + 1]), Err(FrameError::TooLong { length_bytes }));
    }

    #[test]
    fn an_empty_frame_is_refused() {
        let mut decoder = FrameDecoder::new();
        decoder.push(&[0; 4]);
        assert_eq!(decoder.next_frame(), Err(FrameError::Empty));
        assert_eq!(encode_frame(b""), Err(FrameError::Empty));
    }
}
