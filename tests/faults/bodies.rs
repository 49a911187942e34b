//! Row 4, huge bodies: 101 MB declared is refused before a byte of it is read; 101 MB undeclared
//! is refused; an upload of 90 MB raises memory by at most 8 MiB.

use std::io::Write;

use super::process::Server;
use super::wire::{Answer, connect, memory_kib, reset_peak, rest};

const MEGABYTE: usize = 1024 * 1024;

#[test]
fn huge_bodies_are_refused_and_uploads_stream() {
    let _alone = super::alone();
    let base = tempfile::tempdir().unwrap();
    let server = Server::start(base.path(), &[]);
    let head = |path: &str, more: &str| {
        format!(
            "POST {path} HTTP/1.1\r\nHost: {}\r\nConnection: close\r\n\
             Content-Type: multipart/form-data; boundary=b\r\n{more}\r\n\r\n",
            server.address()
        )
    };
    for path in ["/prompt", "/upload/image", "/api/v2/assets", "/api/v2/jobs"] {
        let mut declared = connect(&server);
        declared.write_all(head(path, &format!("Content-Length: {}", 101 * MEGABYTE)).as_bytes()).unwrap();
        // no byte of the body is sent, and the answer comes all the same
        assert_eq!(Answer::parse(&rest(&mut declared)).status, 413, "{path}, declared");
        let mut chunked = connect(&server);
        chunked.write_all(head(path, "Transfer-Encoding: chunked").as_bytes()).unwrap();
        let part = b"--b\r\nContent-Disposition: form-data; name=\"file\"; filename=\"a.png\"\r\n\r\n";
        let _ = chunked.write_all(format!("{:x}\r\n", part.len()).as_bytes());
        let _ = chunked.write_all(&[&part[..], b"\r\n"].concat());
        let chunk =
            [format!("{MEGABYTE:x}\r\n").into_bytes(), vec![b'x'; MEGABYTE], b"\r\n".to_vec()].concat();
        // the server may close while more is on its way
        let sent = (0..101).take_while(|_| chunked.write_all(&chunk).is_ok()).count();
        let answer = Answer::parse(&rest(&mut chunked));
        assert_eq!(answer.status, 413, "{path}, undeclared: {answer:?} after {sent} MB");
    }

    let before = memory_kib(&server).0;
    reset_peak(&server);
    let form = b"--b\r\nContent-Disposition: form-data; name=\"image\"; filename=\"big.bin\"\r\n\r\n";
    let end = b"\r\n--b--\r\n";
    let length = form.len() + 90 * MEGABYTE + end.len();
    let mut upload = connect(&server);
    upload.write_all(head("/upload/image", &format!("Content-Length: {length}")).as_bytes()).unwrap();
    upload.write_all(form).unwrap();
    for _ in 0..90 {
        upload.write_all(&vec![b'y'; MEGABYTE]).unwrap();
    }
    upload.write_all(end).unwrap();
    assert_eq!(Answer::parse(&rest(&mut upload)).status, 200);
    assert_eq!(std::fs::metadata(base.path().join("input/big.bin")).unwrap().len(), 90 * MEGABYTE as u64);
    let (_, peak) = memory_kib(&server);
    eprintln!("before the upload {before} KiB, peak {peak} KiB");
    assert!(peak <= before + 8 * 1024, "an upload of 90 MB raised memory from {before} to {peak} KiB");
}
