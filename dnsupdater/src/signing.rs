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
        let refused = tsig.error == Some(TsigError::BadTime);
        if refused || apart {
            return Err(Rejected::Final(Failure::Clock { here_s, there_s: Some(there_s), refused }));
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

#[cfg(test)]
mod tests {
    use hickory_proto::rr::{Name, Record, RecordType, TSigResponseContext};
    use proptest::prelude::*;

    use super::*;
    use crate::change::query;
    use crate::key::{Algorithm, Key};

    fn seal() -> Seal {
        let name = "site-a".parse().expect("a name");
        let key = Key::new(name, Algorithm::HmacSha256, vec![7; 32]).expect("long enough");
        Seal { signer: key.signer(300).expect("usable"), clock_offset_s: 0 }
    }

    fn question() -> Message {
        query(&Name::from_ascii("app.vm.example.").expect("a name"), RecordType::A)
    }

    /// A reply signed as a server signs it, `late_s` seconds after now.
    fn reply(seal: &Seal, sealed: &Sealed, late_s: i64, error: Option<TsigError>) -> Vec<u8> {
        let mut message = Message::response(sealed.id, OpCode::Query);
        message.queries.clone_from(&sealed.request.queries);
        let name = sealed.request.queries[0].name().clone();
        message.add_answer(Record::from_rdata(name, 30, std::net::IpAddr::from([192, 0, 2, 1]).into()));
        let bare = message.to_vec().expect("encodable");
        let at_s = seal.now_s().saturating_add_signed(late_s);
        let mac = sealed.mac.clone().expect("signed");
        let context = TSigResponseContext::new(sealed.id, at_s, seal.signer.clone(), mac, error);
        message.set_signature(context.sign(&bare).expect("signable"));
        message.to_vec().expect("encodable")
    }

    #[test]
    fn a_signed_reply_is_opened_and_tells_the_servers_time() {
        let seal = seal();
        let sealed = seal.seal(question(), true).expect("sealed");
        let opened = seal.open(&sealed, &reply(&seal, &sealed, 100, None)).expect("genuine");
        assert!(opened.signed_at_s.expect("signed").abs_diff(seal.now_s() + 100) <= 1);
    }

    #[test]
    fn a_reply_outside_the_fudge_is_a_matter_of_clocks() {
        let seal = seal();
        let sealed = seal.seal(question(), true).expect("sealed");
        for (late_s, error) in [(-302, None), (302, None), (0, Some(TsigError::BadTime))] {
            let opened = seal.open(&sealed, &reply(&seal, &sealed, late_s, error));
            assert!(matches!(opened, Err(Rejected::Final(Failure::Clock { .. }))), "{late_s} {opened:?}");
        }
        seal.open(&sealed, &reply(&seal, &sealed, 299, None)).expect("within the fudge");
    }

    #[test]
    fn a_reply_to_another_request_is_a_stray_even_with_the_right_id() {
        let seal = seal();
        let sealed = seal.seal(question(), true).expect("sealed");
        let mut other = seal.seal(question(), true).expect("sealed");
        other.id = sealed.id;
        other.mac = Some(vec![1; 32]);
        let opened = seal.open(&sealed, &reply(&seal, &other, 0, None));
        assert!(matches!(opened, Err(Rejected::Stray(_))), "{opened:?}");
    }

    proptest! {
        #[test]
        fn no_bytes_make_opening_panic(bytes in prop::collection::vec(any::<u8>(), 0..600)) {
            let seal = seal();
            let sealed = seal.seal(question(), true).expect("sealed");
            prop_assert!(seal.open(&sealed, &bytes).is_err());
        }

        /// Case of names and the id are outside the MAC's canonical form only where the parser has checked them.
        #[test]
        fn no_changed_byte_passes_for_another_answer(at: prop::sample::Index, flip in 1_u8..) {
            let seal = seal();
            let sealed = seal.seal(question(), true).expect("sealed");
            let mut bytes = reply(&seal, &sealed, 0, None);
            let genuine = Message::from_vec(&bytes).expect("genuine");
            let at = at.index(bytes.len());
            bytes[at] ^= flip;
            if let Ok(opened) = seal.open(&sealed, &bytes) {
                prop_assert_eq!(&opened.message.answers, &genuine.answers);
                prop_assert_eq!(opened.message.metadata, genuine.metadata);
            }
        }

        #[test]
        fn a_cut_reply_is_never_believed(keep: prop::sample::Index) {
            let seal = seal();
            let sealed = seal.seal(question(), true).expect("sealed");
            let bytes = reply(&seal, &sealed, 0, None);
            prop_assert!(seal.open(&sealed, &bytes[..keep.index(bytes.len())]).is_err());
        }
    }
}
