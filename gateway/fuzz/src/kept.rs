//! Kept memory: a file of this site's that a crash, a disk or another program has damaged.
//!
//! What is accepted has the digest that was wanted and no more pages than there is room for. Where the file is, and what is
//! done without it, is not asked here.

use std::io;

use gateway::memory::kept;
use longhaul_core::wan::Remembered;

/// Where a file says its digest.
const DIGEST: std::ops::Range<usize> = 9..41;
/// In the first byte: another digest is wanted than the file says.
const ANOTHER: u8 = 0x80;

/// Reads `data` behind its first byte as the file.
pub fn run(data: &[u8]) {
    let _ = read(data);
}

/// The same, and what came of it. The lowest three bits of the first byte say for how many pages there is room.
pub fn read(data: &[u8]) -> io::Result<Remembered> {
    let Some((choice, mut file)) = data.split_first() else {
        return Err(io::ErrorKind::UnexpectedEof.into());
    };
    let max_pages = u32::from(choice & 7);
    let mut wanted = [7; 32];
    if let Some(said) = file.get(DIGEST).filter(|_| choice & ANOTHER == 0) {
        wanted.copy_from_slice(said);
    }
    let remembered = kept::read_from(&mut file, wanted, max_pages)?;
    assert_eq!(remembered.digest(), wanted);
    assert!(remembered.pages().count() <= max_pages as usize);
    let mut again = Vec::new();
    kept::write_to(&mut again, &remembered).expect("a vector takes all");
    let reread = kept::read_from(&mut &again[..], wanted, max_pages).expect("what was read reads again");
    assert_eq!(reread.digest(), wanted);
    Ok(remembered)
}

/// A file of two pages: whole, where there is room for one, cut, with its last byte changed, and its beginning where another is
/// wanted.
pub fn seeds() -> Vec<(&'static str, Vec<u8>)> {
    let mut remembered = Remembered::with_room(2);
    for (block, page, byte) in [("pc.ram", 7, 1), ("vga.vram", 1, 2)] {
        assert!(remembered.put(block.as_bytes(), page, &[byte; 4096]), "there is room for it");
    }
    let mut file = Vec::new();
    kept::write_to(&mut file, &remembered).expect("a vector takes all");
    let mut damaged = file.clone();
    if let Some(last) = damaged.last_mut() {
        *last ^= 1;
    }
    let seed = |choice: u8, file: &[u8]| [&[choice][..], file].concat();
    vec![
        ("whole", seed(7, &file)),
        ("too-many", seed(1, &file)),
        ("cut", seed(7, &file[..file.len() - 100])),
        ("damaged", seed(7, &damaged)),
        ("another", seed(ANOTHER | 7, &file[..DIGEST.end])),
    ]
}
