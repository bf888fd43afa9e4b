//! The guest, its service, the traffic against it, and the report: each on its own, without a gateway.
#![allow(clippy::unwrap_used)]

use netns_tests::guest::{GuestImage, ImageSpec};

const AGENT: &str = env!("CARGO_BIN_EXE_guest-agent");

#[test]
fn the_image_is_built_once_and_then_found_in_the_cache() {
    let spec = ImageSpec::new(AGENT);
    let first = GuestImage::ensure(&spec).unwrap();
    let second = GuestImage::ensure(&spec).unwrap();
    println!("first {:?} (cached: {}), second {:?}", first.took, first.cached, second.took);
    assert!(second.cached);
    assert_eq!(first.kernel_sha256, second.kernel_sha256);
}
