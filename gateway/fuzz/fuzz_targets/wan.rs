//! libFuzzer's way into [`longhaul_fuzz::wan`]; what is checked stands there.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| longhaul_fuzz::wan::run(data));
