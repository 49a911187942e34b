//! `/upload/*`, `/view`, `/models`: names, types, ranges, and 200 ways out of a folder.

use serde_json::json;

use super::{Answer, Server};

/// A red PNG of 2 × 1 pixels.
fn png(color: [u8; 4]) -> Vec<u8> {
    let mut bytes = std::io::Cursor::new(Vec::new());
    image::RgbaImage::from_pixel(2, 1, image::Rgba(color))
        .write_to(&mut bytes, image::ImageFormat::Png)
        .unwrap();
    bytes.into_inner()
}

/// One part of a form: header parameters after `form-data`, and content.
type Part<'a> = (&'a str, &'a [u8]);

async fn upload(server: &Server, path: &str, parts: &[Part<'_>]) -> Answer {
    let mut body = Vec::new();
    for (head, content) in parts {
        body.extend_from_slice(
            format!("--limit\r\nContent-Disposition: form-data; {head}\r\n\r\n").as_bytes(),
        );
        body.extend_from_slice(content);
        body.extend_from_slice(b"\r\n");
    }
    body.extend_from_slice(b"--limit--\r\n");
    server.send("POST", path, &[("Content-Type", "multipart/form-data; boundary=limit")], &body).await
}

async fn upload_image(server: &Server, filename: &str, content: &[u8], fields: &[Part<'_>]) -> Answer {
    let head = format!("name=\"image\"; filename=\"{filename}\"");
    let mut parts = vec![(head.as_str(), content)];
    parts.extend_from_slice(fields);
    upload(server, "/upload/image", &parts).await
}

#[tokio::test]
async fn uploads_are_named_like_comfyuis() {
    let server = Server::start().await;
    let name = |answer: Answer| {
        assert_eq!(answer.status, 200, "{answer:?}");
        answer.json()["name"].as_str().unwrap().to_owned()
    };
    let first = upload_image(&server, "a.png", b"one", &[]).await;
    assert_eq!(first.json(), json!({"name": "a.png", "subfolder": "", "type": "input"}));
    assert_eq!(name(upload_image(&server, "a.png", b"two", &[]).await), "a (1).png");
    assert_eq!(name(upload_image(&server, "a.png", b"three", &[]).await), "a (2).png");
    assert_eq!(
        name(upload_image(&server, "a.png", b"two", &[]).await),
        "a (1).png",
        "same content, same file"
    );
    for (value, wanted) in [("false", "a (3).png"), ("yes", "a (3).png"), ("true", "a.png"), ("1", "a.png")] {
        let field = ("name=\"overwrite\"", value.as_bytes());
        assert_eq!(name(upload_image(&server, "a.png", b"four", &[field]).await), wanted, "{value}");
    }
    let input = server.dir.path().join("input");
    assert_eq!(std::fs::read(input.join("a.png")).unwrap(), b"four");
    assert_eq!(std::fs::read(input.join("a (2).png")).unwrap(), b"three");
    let elsewhere = [("name=\"type\"", b"temp".as_slice()), ("name=\"subfolder\"", b"x/y".as_slice())];
    let answer = upload_image(&server, "b.png", b"b", &elsewhere).await;
    assert_eq!(answer.json(), json!({"name": "b.png", "subfolder": "x/y", "type": "temp"}));
    assert_eq!(std::fs::read(server.dir.path().join("temp/x/y/b.png")).unwrap(), b"b");
    let extended = "name=\"image\"; filename=\"x\"; filename*=utf-8''b%C3%A4%20c.png";
    assert_eq!(name(upload(&server, "/upload/image", &[(extended, b"x".as_slice())]).await), "bä c.png");
    #[cfg(unix)]
    {
        let mode = std::os::unix::fs::PermissionsExt::mode(
            &std::fs::metadata(input.join("a.png")).unwrap().permissions(),
        );
        assert_ne!(mode & 0o044, 0, "others may read uploads, as far as the umask lets them: {mode:o}");
    }
    server.stop().await;
}

#[tokio::test]
async fn unusable_forms_are_400_without_a_file() {
    let server = Server::start().await;
    let bad: [&[Part<'_>]; 5] = [
        &[("name=\"other\"; filename=\"x.png\"", b"x")],
        &[("name=\"overwrite\"", b"true")],
        &[("name=\"image\"", b"text, no file")],
        &[("name=\"image\"; filename=\"\"", b"x")],
        &[("name=\"image\"; filename=\"x.png\"", b"x"), ("name=\"type\"", b"models")],
    ];
    for parts in bad {
        assert_eq!(upload(&server, "/upload/image", parts).await.status, 400, "{parts:?}");
    }
    let long = vec![b'a'; 100_000];
    assert_eq!(upload_image(&server, "x.png", b"x", &[("name=\"subfolder\"", &long)]).await.status, 400);
    assert_eq!(server.send("POST", "/upload/image", &[], b"no form").await.status, 400);
    let cut = [("Content-Type", "multipart/form-data; boundary=limit")];
    assert_eq!(server.send("POST", "/upload/image", &cut, b"--limit\r\nContent-Disp").await.status, 400);
    for folder in ["input", "temp"] {
        assert_eq!(std::fs::read_dir(server.dir.path().join(folder)).unwrap().count(), 0, "{folder}");
    }
    server.stop().await;
}

#[tokio::test]
async fn masks_replace_alpha() {
    let server = Server::start().await;
    upload_image(&server, "a.png", &png([200, 100, 50, 255]), &[]).await;
    let mask = png([0, 0, 0, 7]);
    let reference = br#"{"filename": "a.png", "type": "input", "subfolder": ""}"#.as_slice();
    let parts =
        [("name=\"image\"; filename=\"m.png\"", mask.as_slice()), ("name=\"original_ref\"", reference)];
    let answer = upload(&server, "/upload/mask", &parts).await;
    assert_eq!(answer.json(), json!({"name": "m.png", "subfolder": "", "type": "input"}));
    let made = image::load_from_memory(&server.get("/view?filename=m.png&type=input").await.body)
        .unwrap()
        .to_rgba8();
    assert_eq!(made.get_pixel(1, 0).0, [200, 100, 50, 7]);
    for (reference, status) in [
        (r#"{"filename": "../a.png", "type": "input"}"#, 400),
        (r#"{"filename": "a.png", "type": "input", "subfolder": "../input"}"#, 403),
        (r#"{"filename": "none.png", "type": "input"}"#, 404),
        (r#"{"filename": "a.png", "type": "models"}"#, 400),
        (r#"{"filename": 5}"#, 400),
        ("no json", 400),
    ] {
        let parts = [
            ("name=\"image\"; filename=\"n.png\"", mask.as_slice()),
            ("name=\"original_ref\"", reference.as_bytes()),
        ];
        assert_eq!(upload(&server, "/upload/mask", &parts).await.status, status, "{reference}");
    }
    assert_eq!(upload(&server, "/upload/mask", &parts[..1]).await.status, 400, "no reference");
    server.stop().await;
}

#[tokio::test]
async fn view_serves_files_and_other_forms() {
    let server = Server::start().await;
    let picture = png([10, 20, 30, 40]);
    upload_image(&server, "p.png", &picture, &[]).await;
    let plain = server.get("/view?filename=p.png&type=input&rand=0.5").await;
    assert_eq!((plain.status, plain.header("content-type")), (200, Some("image/png")));
    assert_eq!(plain.header("content-disposition"), Some("filename=\"p.png\""));
    assert_eq!(plain.header("content-length"), Some(picture.len().to_string().as_str()));
    assert_eq!(
        (plain.header("x-content-type-options"), plain.header("cache-control")),
        (Some("nosniff"), None)
    );
    assert_eq!(plain.body, picture);
    for (query, status) in [
        ("filename=p.png", 404),
        ("filename=none.png&type=input", 404),
        ("type=input", 404),
        ("filename=&type=input", 400),
        ("filename=p.png&type=models", 400),
        ("filename=p.png%20%5Binput%5D&type=output", 200),
        ("filename=some/folder/p.png&type=input", 200),
        ("filename=../input/p.png&type=input", 400),
        ("filename=/etc/passwd&type=input", 400),
        ("filename=p.png&type=output&subfolder=../input", 403),
        ("filename=passwd&type=input&subfolder=../../../../../etc", 403),
        ("filename=passwd&type=input&subfolder=/etc", 403),
        ("filename=x&type=input&subfolder=p.png", 404),
        ("filename=p.png&type=input&subfolder=a/..", 200),
        ("filename=p.png&type=input&subfolder=./a/b/../../.", 200),
        ("filename=p.png&type=input&subfolder=a/../../input", 403),
        ("filename=p.png&type=input&subfolder=/..", 403),
    ] {
        let answer = server.get(&format!("/view?{query}")).await;
        assert_eq!(answer.status, status, "{query}");
    }
    let form = |query: &'static str| server.get(query);
    let alpha = form("/view?filename=p.png&type=input&channel=a").await;
    assert_eq!(image::load_from_memory(&alpha.body).unwrap().to_rgba8().get_pixel(0, 0).0, [0, 0, 0, 40]);
    let rgb =
        image::load_from_memory(&form("/view?filename=p.png&type=input&channel=rgb").await.body).unwrap();
    assert_eq!((rgb.color(), rgb.to_rgb8().get_pixel(0, 0).0), (image::ColorType::Rgb8, [10, 20, 30]));
    let webp = form("/view?filename=p.png&type=input&preview=webp;90").await;
    assert_eq!((webp.header("content-type"), &webp.body[8..12]), (Some("image/webp"), b"WEBP".as_slice()));
    let jpeg = form("/view?filename=p.png&type=input&preview=jpeg;50").await;
    assert_eq!(
        (jpeg.header("content-type"), &jpeg.body[..3]),
        (Some("image/jpeg"), b"\xff\xd8\xff".as_slice())
    );
    assert_eq!(jpeg.header("content-disposition"), Some("filename=\"p.png\""));
    upload_image(&server, "junk.png", b"no picture", &[]).await;
    assert_eq!(form("/view?filename=junk.png&type=input&channel=rgb").await.status, 400);
    server.stop().await;
}

#[tokio::test]
async fn view_knows_ranges_and_tags() {
    let server = Server::start().await;
    upload_image(&server, "v.mp4", b"0123456789", &[]).await;
    let path = "/view?filename=v.mp4&type=input";
    let whole = server.get(path).await;
    assert_eq!(
        (whole.header("content-type"), whole.header("accept-ranges")),
        (Some("video/mp4"), Some("bytes"))
    );
    let tag = whole.header("etag").unwrap().to_owned();
    let part = server.send("GET", path, &[("Range", "bytes=2-4")], b"").await;
    assert_eq!(
        (part.status, part.header("content-range"), part.body.as_slice()),
        (206, Some("bytes 2-4/10"), b"234".as_slice())
    );
    let beyond = server.send("GET", path, &[("Range", "bytes=10-")], b"").await;
    assert_eq!((beyond.status, beyond.header("content-range")), (416, Some("bytes */10")));
    let modified = whole.header("last-modified").unwrap().to_owned();
    for (name, value) in [("If-None-Match", &tag), ("If-Modified-Since", &modified)] {
        let known = server.send("GET", path, &[(name, value)], b"").await;
        assert_eq!((known.status, known.body.len(), known.header("etag")), (304, 0, Some(&*tag)), "{name}");
    }
    assert_eq!(server.send("GET", path, &[("If-Match", "\"other\"")], b"").await.status, 412);
    let changed = server.send("GET", path, &[("Range", "bytes=2-4"), ("If-Range", "\"other\"")], b"").await;
    assert_eq!((changed.status, changed.body.len()), (200, 10));
    let head = server.send("HEAD", path, &[], b"").await;
    assert_eq!((head.status, head.header("content-length"), head.body.len()), (200, Some("10"), 0));
    server.stop().await;
}

#[tokio::test]
async fn uploads_can_not_run_in_the_servers_origin() {
    let server = Server::start().await;
    for name in ["x.html", "x.svg", "x.js", "x.xml", "x.css", "x.txt"] {
        upload_image(&server, name, b"<script>alert(1)</script>", &[]).await;
        let answer = server.get(&format!("/view?filename={name}&type=input")).await;
        assert_eq!(answer.header("content-type"), Some("application/octet-stream"), "{name}");
        assert!(answer.header("content-disposition").is_some_and(|d| d.starts_with("attachment;")), "{name}");
        assert_eq!(answer.header("content-security-policy"), Some("default-src 'none'; sandbox"), "{name}");
    }
    let in_page = [("Sec-Fetch-Dest", "image")];
    let svg = server.send("GET", "/view?filename=x.svg&type=input", &in_page, b"").await;
    assert_eq!(
        (svg.header("content-type"), svg.header("vary")),
        (Some("image/svg+xml"), Some("Sec-Fetch-Dest"))
    );
    server.stop().await;
}

#[tokio::test]
async fn model_lists_and_metadata() {
    let server = Server::start().await;
    let loras = server.dir.path().join("models/loras/sub");
    std::fs::create_dir_all(&loras).unwrap();
    let header = br#"{"__metadata__":{"note":"made for tests","a":"1"}}"#;
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend_from_slice(header);
    std::fs::write(loras.join("l.safetensors"), &file).unwrap();
    std::fs::write(loras.join("notes.txt"), b"x").unwrap();
    std::fs::write(loras.join("broken.safetensors"), b"\xff\xff\xff\xff\xff\xff\xff\xff").unwrap();
    let types = server.get("/models").await.json();
    assert_eq!((&types[0], &types[8]), (&json!("checkpoints"), &json!("embeddings")));
    let names = server.get("/models/loras").await.json();
    assert_eq!(names, json!(["sub/broken.safetensors", "sub/l.safetensors"]));
    for unknown in ["no_such_folder", "unet", "clip", "..", "%2e%2e%2f"] {
        assert_eq!(server.get(&format!("/models/{unknown}")).await.status, 404, "{unknown}");
    }
    let places = server.get("/experiment/models").await.json();
    let places = places.as_array().unwrap();
    assert!(places.iter().all(|p| p["name"] != "configs" && p["name"] != "custom_nodes"));
    let lora_folders = &places.iter().find(|p| p["name"] == "loras").unwrap()["folders"];
    assert!(lora_folders[0].as_str().is_some_and(|f| f.ends_with("models/loras")), "{lora_folders}");
    let entries = server.get("/experiment/models/loras").await.json();
    assert_eq!((&entries[1]["name"], &entries[1]["pathIndex"]), (&json!("sub/l.safetensors"), &json!(0)));
    assert_eq!(entries[1]["size"], json!(file.len()));
    assert!(entries[1]["modified"].as_f64().is_some_and(|t| t > 1.7e9));
    assert_eq!(server.get("/experiment/models/none").await.status, 404);
    std::fs::write(loras.join("l.png"), png([1, 2, 3, 255])).unwrap();
    let preview = "/experiment/models/preview/loras/0/sub/l.safetensors";
    assert_eq!(server.get(preview).await.header("content-type"), Some("image/webp"));
    for missing in [
        "loras/1/sub/l.safetensors",
        "loras/x/sub/l.safetensors",
        "loras/0/sub/broken.safetensors",
        "none/0/a",
        "loras/0/..%2floras/sub/l.safetensors",
    ] {
        assert_eq!(
            server.get(&format!("/experiment/models/preview/{missing}")).await.status,
            404,
            "{missing}"
        );
    }
    let metadata = server.get("/view_metadata/loras?filename=sub/l.safetensors").await;
    assert_eq!(metadata.json(), json!({"note": "made for tests", "a": "1"}));
    for query in [
        "",
        "?filename=",
        "?filename=sub/notes.txt",
        "?filename=sub/none.safetensors",
        "?filename=sub/broken.safetensors",
        "?filename=../loras/sub/l.safetensors",
    ] {
        assert_eq!(server.get(&format!("/view_metadata/loras{query}")).await.status, 404, "{query}");
    }
    assert_eq!(server.get("/embeddings").await.json(), json!([]));
    server.stop().await;
}

/// Ways to say "one folder up", in the spellings that servers have fallen for.
fn escapes() -> Vec<String> {
    let ups = [
        "..",
        "%2e%2e",
        "..%00",
        "%252e%252e",
        "..%c0%af",
        "%c0%ae%c0%ae",
        "....",
        ".%00.",
        "..%09",
        "%EF%BC%8E%EF%BC%8E",
    ];
    let slashes = ["/", "%2f", "%5c", "\\", "%252f", "//", "/./", "%ef%bc%8f", "%00/"];
    let mut all = Vec::new();
    for up in ups {
        for slash in slashes {
            all.push(format!("{up}{slash}canary.json"));
            all.push(format!("a{slash}{up}{slash}{up}{slash}canary.json"));
        }
    }
    all.extend(
        [
            "file:///canary.json",
            "C:%5ccanary.json",
            "%5c%5chost%5ccanary.json",
            "~/canary.json",
            "canary.json%00.png",
        ]
        .map(str::to_owned),
    );
    all.extend(["", "/", ".", "./", "a/.."].map(str::to_owned));
    all
}

#[tokio::test]
async fn no_name_leads_out_of_its_folder() {
    let server = Server::start().await;
    let canary = br#"{"canary": "secret"}"#;
    std::fs::write(server.dir.path().join("canary.json"), canary).unwrap();
    std::fs::create_dir_all(server.dir.path().join("input/a")).unwrap();
    let outside = server.dir.path().join("canary.json");
    #[cfg(unix)]
    std::os::unix::fs::symlink(&outside, server.dir.path().join("input/link.json")).unwrap();
    let escapes = escapes();
    let mut tried = 0;
    let mut paths = vec!["/view?filename=link.json&type=input".to_owned()];
    for escape in &escapes {
        paths.push(format!("/view?filename={escape}&type=input"));
        paths.push(format!("/view?filename=canary.json&type=input&subfolder={escape}"));
        let folder = escape.strip_suffix("canary.json").unwrap_or(escape);
        paths.push(format!("/view?filename=canary.json&type=input&subfolder={folder}"));
        paths.push(format!("/view_metadata/loras?filename={escape}.safetensors"));
        paths.push(format!("/models/{}", escape.replace('/', "%2f")));
    }
    for path in &paths {
        let answer = server.get(&path.replace('\\', "%5c")).await;
        assert!((400..500).contains(&answer.status), "{path}: {}", answer.status);
        assert!(!answer.body.windows(6).any(|w| w == b"secret"), "{path}");
        tried += 1;
    }
    assert!(tried >= 200, "{tried} names");
    for escape in &escapes {
        let folder = super::super::http::decode(escape.strip_suffix("canary.json").unwrap_or(escape));
        upload_image(
            &server,
            "canary.json",
            b"overwritten",
            &[("name=\"subfolder\"", folder.as_bytes()), ("name=\"overwrite\"", b"true")],
        )
        .await;
        let name = super::super::http::decode(escape);
        upload_image(&server, &name, b"overwritten", &[("name=\"overwrite\"", b"true")]).await;
    }
    assert_eq!(std::fs::read(&outside).unwrap(), canary);
    upload_image(&server, "link.json", b"overwritten", &[("name=\"overwrite\"", b"true")]).await;
    assert_eq!(std::fs::read(&outside).unwrap(), canary, "through a link");
    let mut top: Vec<String> = std::fs::read_dir(server.dir.path())
        .unwrap()
        .map(|e| e.unwrap().file_name().into_string().unwrap())
        .collect();
    top.sort_unstable();
    assert_eq!(top, ["canary.json", "input", "output", "temp", "user"], "nothing new beside the folders");
    assert_eq!(server.get("/view?filename=a..b.png&type=input").await.status, 404, "an odd name is a name");
    server.stop().await;
}
