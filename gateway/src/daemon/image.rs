//! Whether an image can be a volume of a definition: its kind and its size, before a QEMU is asked.
//!
//! Reads the length of a raw image and the header of a qcow2 one; the content is the guest's.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

use longhaul_core::machine::MachineDefinition;

use super::machines::format_of;
use crate::hypervisor::DiskFormat;

/// One image for each volume, each as large as the volume; the text says which is not.
pub(super) fn check(definition: &MachineDefinition, images: &[PathBuf]) -> Result<(), String> {
    let volumes = definition.volumes().count();
    if images.len() != volumes {
        return Err(format!("The definition has {volumes} volumes, {} images were given", images.len()));
    }
    for (volume, image) in definition.volumes().zip(images) {
        let size_bytes = size_of(image).map_err(|error| format!("Image {}: {error}", image.display()))?;
        if size_bytes != volume.size_bytes {
            return Err(format!(
                "Image {} has {size_bytes} bytes, volume {} is defined with {}",
                image.display(),
                volume.name,
                volume.size_bytes
            ));
        }
    }
    Ok(())
}

/// The size that a guest would see.
fn size_of(image: &Path) -> io::Result<u64> {
    let kind = std::fs::metadata(image)?.file_type();
    if !kind.is_file() && !kind.is_block_device() {
        return Err(io::Error::other("it is neither a file nor a block device"));
    }
    let mut file = File::open(image)?;
    match format_of(image) {
        DiskFormat::Raw => file.seek(SeekFrom::End(0)),
        DiskFormat::Qcow2 => qcow2_size(&mut file),
    }
}

/// QEMU, docs/interop/qcow2.txt: magic, and the virtual size at byte 24.
fn qcow2_size(file: &mut File) -> io::Result<u64> {
    let mut header = [0; 32];
    file.read_exact(&mut header)?;
    let (magic, size) = (header.first_chunk(), header.last_chunk());
    match (magic, size) {
        (Some(b"QFI\xfb"), Some(size)) => Ok(u64::from_be_bytes(*size)),
        (_, _) => Err(io::Error::other("it is called .qcow2 and is none")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn definition() -> MachineDefinition {
        let text = "name = \"web1\"\nmachine = \"pc-q35-7.2\"\nvcpus = 1\nmemory_mib = 64\n\
            [[disks]]\nname = \"root\"\nsize_bytes = 1048576\npci = \"03.0\"\n";
        toml::from_str(text).unwrap()
    }

    #[test]
    fn an_image_of_another_kind_or_size_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let refused = |name: &str| check(&definition(), &[folder.path().join(name)]).unwrap_err();
        assert!(check(&definition(), &[]).unwrap_err().contains("0 images were given"));
        assert!(refused("none.raw").contains("none.raw: No such file"));
        std::fs::create_dir(folder.path().join("folder")).unwrap();
        assert!(refused("folder").contains("neither a file nor a block device"));
        let raw = File::create(folder.path().join("root.raw")).unwrap();
        raw.set_len(1_048_575).unwrap();
        assert!(
            refused("root.raw").contains("root.raw has 1048575 bytes, volume root is defined with 1048576")
        );
        raw.set_len(1_048_576).unwrap();
        check(&definition(), &[folder.path().join("root.raw")]).unwrap();
    }

    #[test]
    fn the_size_of_a_qcow2_image_is_the_guests() {
        let folder = tempfile::tempdir().unwrap();
        let image = folder.path().join("root.qcow2");
        std::fs::write(&image, [0; 4096]).unwrap();
        assert!(check(&definition(), std::slice::from_ref(&image)).unwrap_err().contains("is none"));
        let mut header = [0; 4096];
        header[..4].copy_from_slice(b"QFI\xfb");
        header[24..32].copy_from_slice(&1_048_576u64.to_be_bytes());
        std::fs::write(&image, header).unwrap();
        check(&definition(), &[image]).unwrap();
    }
}
