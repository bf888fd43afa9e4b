//! libFuzzer's way into [`longhaul_fuzz::map`]; what is checked stands there.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| longhaul_fuzz::map::run(data));
