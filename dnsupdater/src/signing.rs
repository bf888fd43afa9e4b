//! Sealing requests with TSIG and opening replies (RFC 8945): what is believed of an answer, and why.
//!
//! A reply is believed if it answers this request (id, opcode, question) and carries a MAC over the request's own
//! MAC. Everything else is at most a reason to stop or to ask again, never a result. No sockets here.

use std::time::{SystemTime, UNIX_EPOCH};

use hickory_proto::op::{Message, MessageType, OpCode, ResponseCode};
use hickory_proto::rr::TSigner;
use hickory_proto::rr::rdata::tsig::{TSIG, TsigError};

use crate::error::{Error, Failure, TsigFault};

/// A request ready to be sent, and what its reply must match.
pub(crate) struct Sealed {
    pub(crate) bytes: Vec<u8>,
    pub(crate) id: u16,
    request: Message,
    mac: Option<Vec<u8>>,
}

/// A reply that was accepted.
#[derive(Debug)]
pub(crate) struct Reply {
    pub(crate) message: Message,
    /// The server's time when it signed, in seconds since 1970; none if the reply was not signed.
    pub(crate) signed_at_s: Option<u64>,
}

/// Why a received message is not (yet) the reply.
#[derive(Debug)]
pub(crate) enum Rejected {
    /// Not the answer to this request: a late one, or forged. Over UDP the real one may still come.
    Stray(&'static str),
    /// The answer did not fit; ask over TCP.
    Truncated,
    /// An answer that ends the exchange.
    Final(Failure),
}

/// The key, the clock and how far they may be apart.
#[derive(Clone)]
pub(crate) struct Seal {
    pub(crate) signer: TSigner,
    pub(crate) clock_offset_s: i64,
}

impl Seal {
    /// Gives a message a fresh id and signs it, unless it is a query that may go unsigned.
    pub(crate) fn seal(&self, mut message: Message, sign: bool) -> Result<Sealed, Error> {
        message.metadata.id = rand::random();
        let request = message.clone();
        let encode = |error| Error::Config(format!("The message cannot be encoded: {error}"));
        let mac = if sign {
            message.finalize(&self.signer, self.now_s()).map_err(encode)?;
            message.signature().map(|record| record.data.mac.clone())
        } else {
            None
        };
        let bytes = message.to_vec().map_err(encode)?;
        Ok(Sealed { bytes, id: request.id, request, mac })
    }

    /// Decides what a received message is worth.
    pub(crate) fn open(&self, sealed: &Sealed, bytes: &[u8]) -> Result<Reply, Rejected> {
        let message = Message::from_vec(bytes).map_err(|_| Rejected::Stray("it is not a DNS message"))?;
        answers(&sealed.request, &message)?;
        if message.truncation {
            return Err(Rejected::Truncated);
        }
        let Some(mac) = &sealed.mac else {
            return Ok(Reply { message, signed_at_s: None });
        };
        let Some(tsig) = message.signature().map(|record| record.data.clone()) else {
            return Err(unsigned(message.response_code, None));
        };
        let fault = match tsig.error {
            Some(TsigError::BadKey) => Some(TsigFault::BadKey),
            Some(TsigError::BadSig) => Some(TsigFault::BadSig),
            Some(TsigError::BadTrunc) => Some(TsigFault::Other(22)),
            Some(TsigError::Unknown(code)) => Some(TsigFault::Other(code)),
            Some(TsigError::BadTime) | None => None,
        };
        if fault.is_some() || tsig.mac.is_empty() {
            return Err(unsigned(message.response_code, fault));
        }
        self.signer
            .verify_message_byte(bytes, Some(mac), true)
            .map_err(|_| Rejected::Stray("its signature does not match"))?;
        self.in_time(&tsig)?;
        Ok(Reply { message, signed_at_s: Some(tsig.time) })
    }

    /// The time here, in seconds since 1970.
    pub(crate) fn now_s(&self) -> u64 {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
        now.saturating_add_signed(self.clock_offset_s)
    }

    /// RFC 8945 section 5.2.3: with BADTIME the server's time is the 48-bit number in Other Data; a server that leaves
    /// it out (hickory) has signed with its own time instead.
    fn in_time(&self, tsig: &TSIG) -> Result<(), Rejected> {
        let here_s = self.now_s();
        let told = <[u8; 6]>::try_from(tsig.other.as_slice())
            .map(|[a, b, c, d, e, f]| u64::from_be_bytes([0, 0, a, b, c, d, e, f]));
        let there_s = told.unwrap_or(tsig.time);
        let apart = here_s.abs_diff(there_s) > u64::from(self.signer.fudge());
        if tsig.error == Some(TsigError::BadTime) || apart {
            return Err(Rejected::Final(Failure::Clock { here_s, there_s: Some(there_s) }));
        }
        Ok(())
    }
}

/// Whether `reply` is the answer to `request`, as far as an unsigned header can tell.
fn answers(request: &Message, reply: &Message) -> Result<(), Rejected> {
    if reply.id != request.id {
        return Err(Rejected::Stray("its id is another"));
    }
    if reply.message_type != MessageType::Response || reply.op_code != request.op_code {
        return Err(Rejected::Stray("it is no answer to this kind of request"));
    }
    let failed = reply.response_code != ResponseCode::NoError;
    let may_be_empty = request.op_code == OpCode::Update || failed;
    if reply.queries != request.queries && !(reply.queries.is_empty() && may_be_empty) {
        return Err(Rejected::Stray("it answers another question"));
    }
    Ok(())
}

/// An unsigned reply to a signed request: never a success, and an error only of those a server sends when it cannot
/// or may not sign.
fn unsigned(rcode: ResponseCode, tsig: Option<TsigFault>) -> Rejected {
    let deniable = [
        ResponseCode::Refused,
        ResponseCode::NotAuth,
        ResponseCode::NotImp,
        ResponseCode::FormErr,
        ResponseCode::ServFail,
    ];
    if deniable.contains(&rcode) {
        Rejected::Final(Failure::Denied { rcode, tsig })
    } else {
        Rejected::Stray("it is not signed")
    }
}
