//! libFuzzer's way into [`longhaul_fuzz::kept`]; what is checked stands there.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| longhaul_fuzz::kept::run(data));
