//! libFuzzer's way into [`longhaul_fuzz::wire`]; what is checked stands there.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| longhaul_fuzz::wire::run(data));
