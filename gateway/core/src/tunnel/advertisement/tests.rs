//! What is kept of an advertisement, with the bytes written out here by hand.

use proptest::prelude::*;

use super::*;

const MAC: Mac = Mac([0x52, 0x54, 0, 0xaa, 0, 1]);

fn router() -> Ipv6Addr {
    "fe80::1".parse().unwrap()
}

/// Hop limit 64, managed, lifetime 1800 s.
fn header() -> Vec<u8> {
    vec![134, 0, 0xbe, 0xef, 64, 0x80, 7, 8, 0, 0, 0, 0, 0, 0, 0, 0]
}

fn prefix(valid_s: u32, preferred_s: u32) -> Vec<u8> {
    let mut option = vec![3, 4, 64, 0xc0];
    option.extend(valid_s.to_be_bytes());
    option.extend(preferred_s.to_be_bytes());
    option.extend([0; 4]);
    option.extend("2001:db8:a::".parse::<Ipv6Addr>().unwrap().octets());
    option
}

fn name_server(lifetime_s: u32) -> Vec<u8> {
    let mut option = vec![25, 3, 0, 0];
    option.extend(lifetime_s.to_be_bytes());
    option.extend("2001:db8:a::53".parse::<Ipv6Addr>().unwrap().octets());
    option
}

fn search_list(names: &[u8]) -> Vec<u8> {
    let units = (8 + names.len()).div_ceil(8);
    let mut option = vec![31, units as u8, 0, 0, 0, 0, 14, 16];
    option.extend(names);
    option.resize(units * 8, 0);
    option
}

fn route() -> Vec<u8> {
    vec![24, 2, 32, 0x08, 0, 0, 14, 16, 0x20, 1, 0x0d, 0xb8, 0, 0, 0, 0]
}

fn message(options: &[Vec<u8>]) -> Vec<u8> {
    [header(), options.concat()].concat()
}

fn received(message: &[u8]) -> Received<'_> {
    Received { device: 3, source: router(), hop_limit: 255, message }
}

fn kept(option: Vec<u8>) -> Vec<u8> {
    let bytes: Vec<u8> = Advertisement::parse(&message(&[option])).unwrap().into();
    bytes[16..].to_vec()
}

#[test]
fn what_a_host_needs_is_kept_and_the_routers_link_layer_address_is_told_apart() {
    let source = vec![1, 1, 0x52, 0x54, 0, 0xaa, 0, 1];
    let mtu = vec![5, 1, 0, 0, 0, 0, 5, 0xdc];
    let names = search_list(b"\x07example\x03net\0\x01b\0");
    let needed = [prefix(86400, 14400), mtu, name_server(1200), names, route()];
    let heard = message(&[vec![source], needed.to_vec()].concat());

    let (advertisement, link_layer) = Advertisement::received(&received(&heard)).unwrap();

    assert_eq!(link_layer, Some(MAC));
    assert_eq!(advertisement.router_lifetime(), Duration::from_secs(1800));
    assert_eq!(advertisement.shortest_lifetime(), Some(Duration::from_secs(1200)));
    let bytes: Vec<u8> = advertisement.into();
    assert_eq!(bytes[16..], needed.concat());
    assert_eq!(bytes[2..4], [0, 0], "no checksum");
}

#[test]
fn the_name_servers_that_a_router_names_are_those_it_does_not_take_back() {
    let mut two = name_server(1200);
    two[1] = 5;
    two.extend("fd00::53".parse::<Ipv6Addr>().unwrap().octets());
    let named = |options: &[Vec<u8>]| Advertisement::parse(&message(options)).unwrap().name_servers();
    let expected = ["2001:db8:a::53", "fd00::53"].map(|address| address.parse::<Ipv6Addr>().unwrap());
    assert_eq!(named(&[prefix(86400, 14400), two]), expected);
    assert!(named(&[name_server(0), prefix(86400, 14400)]).is_empty());
}

#[test]
fn what_does_not_come_from_a_router_of_the_link_is_refused() {
    let heard = message(&[]);
    let refused = |change: fn(&mut Received<'_>)| {
        let mut received = received(&heard);
        change(&mut received);
        Advertisement::received(&received).unwrap_err()
    };
    assert_eq!(refused(|it| it.hop_limit = 254), InvalidAdvertisement::HopLimit);
    assert_eq!(refused(|it| it.source = Ipv6Addr::LOCALHOST), InvalidAdvertisement::Source);
    assert_eq!(refused(|it| it.message = &it.message[..15]), InvalidAdvertisement::Message);
    let refused = |message: Vec<u8>| Advertisement::received(&received(&message)).unwrap_err();
    let changed = |at: usize| {
        let mut changed = header();
        changed[at] += 1;
        changed
    };
    assert_eq!(refused(changed(0)), InvalidAdvertisement::Message, "another type");
    assert_eq!(refused(changed(1)), InvalidAdvertisement::Message, "another code");
    assert_eq!(refused(message(&[vec![99, 0, 0, 0, 0, 0, 0, 0]])), InvalidAdvertisement::OptionLength);
    assert_eq!(refused(message(&[vec![3, 4, 64, 0xc0]])), InvalidAdvertisement::OptionLength);
    assert_eq!(refused(message(&[vec![3]])), InvalidAdvertisement::OptionLength);
}

#[test]
fn options_that_a_host_would_ignore_and_reserved_bits_are_left_out() {
    let left_out: [(&str, Vec<u8>); 9] = [
        ("unknown", vec![200, 1, 0, 0, 0, 0, 0, 0]),
        ("preferred for longer than valid", prefix(100, 101)),
        ("longer than an address", [vec![3, 4, 129], prefix(2, 1)[3..].to_vec()].concat()),
        ("a link-local prefix", [prefix(2, 1)[..16].to_vec(), router().octets().to_vec()].concat()),
        ("below IPv6's least MTU", vec![5, 1, 0, 0, 0, 0, 4, 0xff]),
        ("half a name server", vec![25, 2, 0, 0, 0, 0, 0, 9, 1, 2, 3, 4, 5, 6, 7, 8]),
        ("a compressed name", search_list(b"\xc0\x0c")),
        ("no name", search_list(b"\0")),
        ("a reserved preference", [vec![24, 2, 32, 0x10], route()[4..].to_vec()].concat()),
    ];
    for (what, option) in left_out {
        assert_eq!(kept(option), Vec::<u8>::new(), "{what}");
    }
    let mut reserved = prefix(2, 1);
    (reserved[3], reserved[13]) = (0xff, 7);
    assert_eq!(kept(reserved), prefix(2, 1));
    let mut flags = header();
    flags[5] = 0xff;
    assert_eq!(Vec::from(Advertisement::parse(&flags).unwrap())[5], 0xd8);
    flags[5] = 0x10;
    assert_eq!(Vec::from(Advertisement::parse(&flags).unwrap())[5], 0, "a reserved preference");
}

#[test]
fn the_longest_fits_and_what_is_beyond_it_is_left_out() {
    let most = (MAX_ADVERTISEMENT_BYTES - HEADER_BYTES) / 8;
    let mtu = || vec![5, 1, 0, 0, 0, 0, 5, 0xdc];
    let bytes: Vec<u8> = Advertisement::parse(&message(&vec![mtu(); most + 1])).unwrap().into();
    assert_eq!(bytes.len(), MAX_ADVERTISEMENT_BYTES);
    let packet = Advertisement::try_from(bytes.clone()).unwrap().packet(router(), MAC);
    assert!(packet.len() <= 1280);
    let longer = [bytes, mtu()].concat();
    assert!(matches!(Advertisement::try_from(longer), Err(InvalidAdvertisement::TooLong { .. })));
}

#[test]
fn nothing_that_runs_out_has_no_shortest_lifetime() {
    let mut ends_never = header();
    ends_never[6..8].fill(0);
    ends_never.extend(prefix(u32::MAX, u32::MAX));
    let advertisement = Advertisement::parse(&ends_never).unwrap();
    assert_eq!(advertisement.shortest_lifetime(), None);
    assert_eq!(advertisement.router_lifetime(), Duration::ZERO);
}

#[test]
fn the_imitation_is_from_the_router_and_names_the_address_the_guest_believes_in() {
    let packet = Advertisement::parse(&message(&[prefix(86400, 14400)])).unwrap().packet(router(), MAC);
    assert_eq!(packet[..8], [0x60, 0, 0, 0, 0, 56, 58, 255]);
    assert_eq!(packet[8..24], router().octets());
    assert_eq!(packet[24..40], "ff02::1".parse::<Ipv6Addr>().unwrap().octets());
    assert_eq!(packet[88..], [1, 1, 0x52, 0x54, 0, 0xaa, 0, 1]);
    let (again, mac) = Advertisement::received(&received(&packet[40..])).unwrap();
    assert_eq!((again.shortest_lifetime(), mac), (Some(Duration::from_secs(1800)), Some(MAC)));
}

#[test]
fn a_solicitation_comes_from_the_link_and_an_unnamed_host_names_no_address() {
    let plain = [133, 0, 0, 0, 0, 0, 0, 0];
    let named = [133, 0, 0, 0, 0, 0, 0, 0, 1, 1, 2, 0, 0, 0, 0, 9];
    let asks = |message: &[u8], source: &str, hop_limit: u8| {
        is_solicitation(&Received { device: 3, source: source.parse().unwrap(), hop_limit, message })
    };
    assert!(asks(&plain, "::", 255) && asks(&named, "fe80::9", 255));
    assert!(!asks(&named, "::", 255));
    assert!(!asks(&plain, "fe80::9", 64));
    assert!(!asks(&plain[..7], "fe80::9", 255));
    assert!(!asks(&named[..15], "fe80::9", 255));
    assert!(!asks(&header(), "fe80::9", 255));
}

fn option() -> impl Strategy<Value = Vec<u8>> {
    let kinds = prop::sample::select(vec![1u8, 3, 5, 24, 25, 31, 77]);
    (kinds, 1u8..5, prop::collection::vec(any::<u8>(), 40)).prop_map(|(kind, units, bytes)| {
        let mut option = vec![kind, units];
        option.extend(&bytes[..usize::from(units) * 8 - 2]);
        option
    })
}

proptest! {
    #[test]
    fn what_was_taken_over_is_taken_over_again_unchanged(
        flags: u8, options in prop::collection::vec(option(), 0..60),
    ) {
        let mut message = message(&options);
        message[5] = flags;
        let once = Advertisement::parse(&message).unwrap();
        let bytes = Vec::from(once.clone());
        prop_assert!(bytes.len() <= MAX_ADVERTISEMENT_BYTES && bytes.len() % 8 == 0);
        prop_assert_eq!(Advertisement::try_from(bytes).unwrap(), once.clone());
        let packet = once.packet(router(), MAC);
        let covered = pseudo_header(&packet, ICMPV6) + (packet.len() as u64 - 40) + sum(&packet[40..]);
        prop_assert_eq!(fold(covered), 0xffff);
    }

    #[test]
    fn garbage_is_refused_or_bounded(garbage in prop::collection::vec(any::<u8>(), 0..200)) {
        let mut message = garbage;
        if let Some(kind) = message.first_mut() {
            *kind = 134;
        }
        if let Ok(advertisement) = Advertisement::parse(&message) {
            let _ = advertisement.shortest_lifetime();
            prop_assert!(Vec::from(advertisement).len() <= message.len());
        }
        let _ = is_solicitation(&received(&message));
    }
}
