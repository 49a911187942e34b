//! Names the format of a file that is no weight file, from its first bytes.
//!
//! Only asked after the header failed: it may begin like another format by chance.

/// First bytes, name with article, advice.
type Row = (&'static [u8], &'static str, &'static str);

const DOWNLOAD: &str = "the download saved something else than the model; download the file itself";

const FORMATS: &[Row] = &[
    (b"GGUF", "a GGUF file", "get the model's .safetensors file instead"),
    (b"\x89HDF\r\n", "an HDF5 file", "get the model's .safetensors file instead"),
    (b"\x93NUMPY", "a NumPy array", "write it with safetensors.numpy.save_file"),
    (b"\x1f\x8b", "gzip-compressed", "unpack it first"),
    (b"\x28\xb5\x2f\xfd", "zstd-compressed", "unpack it first"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", "unpack it first"),
    (b"\x89PNG", "a PNG picture", "pictures go into the input folder, models into the models folder"),
    (b"\xff\xd8\xff", "a JPEG picture", "pictures go into the input folder, models into the models folder"),
    (b"version https://git-lfs", "a Git LFS pointer", "fetch the file it stands for with `git lfs pull`"),
    (b"<!doctype", "a web page", DOWNLOAD),
    (b"<html", "a web page", DOWNLOAD),
    (b"<?xml", "an XML document", DOWNLOAD),
    (b"{\"", "a JSON document", DOWNLOAD),
];

/// Name and advice if `bytes` begin like a known format.
pub(super) fn known_format(bytes: &[u8]) -> Option<(&'static str, &'static str)> {
    FORMATS
        .iter()
        .find(|(magic, ..)| bytes.get(..magic.len()).is_some_and(|head| head.eq_ignore_ascii_case(magic)))
        .map(|&(_, format, advice)| (format, advice))
}
