//! Folders, lists and hostile names on a real file system.

use std::path::{Path, PathBuf};

use super::names::{last_part, split_annotation};
use super::*;

struct Server {
    // Removed when dropped.
    _base: tempfile::TempDir,
    base: PathBuf,
    folders: Folders,
}

fn server() -> Server {
    let outer = tempfile::tempdir().unwrap();
    let base = outer.path().canonicalize().unwrap().join("server");
    std::fs::create_dir(&base).unwrap();
    let folders = Folders::open(&FolderOptions { base: base.clone(), ..Default::default() }).unwrap();
    Server { _base: outer, base, folders }
}

fn put(path: impl AsRef<Path>) {
    std::fs::create_dir_all(path.as_ref().parent().unwrap()).unwrap();
    std::fs::write(path, b"x").unwrap();
}

/// Names that try to reach `canary` next to and above the input folder.
fn hostile_names() -> Vec<String> {
    let steps = [
        "..",
        "../",
        "..\\",
        "../..",
        "....//",
        "..;/",
        ".. /",
        "../.",
        "./..",
        "a/..",
        "a/../..",
        "a/./../..",
        "/",
        "//",
        "\\",
        "\\\\",
        "/.",
        "/..",
        "~",
        "~/",
        "C:",
        "C:/",
        "C:\\",
        "c:..",
        "\\\\?\\C:\\",
        "//server/share/",
        "file:///",
        "%2e%2e/",
        "%2e%2e%2f",
        "..%2f",
        "..%5c",
        "%252e%252e%252f",
        "..%c0%af",
        "..%00/",
        ".\u{2024}/",
        "\u{ff0e}\u{ff0e}/",
        "..\u{2215}",
        "..\u{ff0f}",
        "\u{202e}../",
        "...",
        ".../",
        " ..",
        ".. ",
        "..\t",
        "\0",
        "..\0",
        "\n../",
        "../\n",
    ];
    let targets = ["canary", "canary.png", "../canary", "input/../canary", "canary\0.png", "canary "];
    let mut names: Vec<String> = Vec::new();
    for step in steps {
        names.push(step.to_owned());
        for target in targets {
            names.push(format!("{step}{target}"));
            names.push(format!("{step}/{target}"));
            names.push(format!("sub/{step}/{target}"));
        }
        names.push(format!("{}canary", step.repeat(8)));
        names.push(format!("canary{step}"));
        names.push(format!("{step}canary [input]"));
    }
    names.extend(
        ["etc/passwd", "/etc/passwd", "x".repeat(300).as_str(), "", ".", "link/canary"].map(String::from),
    );
    names
}

#[test]
fn no_hostile_name_reaches_the_canary() {
    let server = server();
    let canaries = [
        server.base.join("canary"),
        server.base.join("canary.png"),
        server.base.parent().unwrap().join("canary"),
        server.base.join("user/canary"),
        server.base.join("models/canary"),
        server.base.join("output/canary"),
    ];
    canaries.iter().for_each(put);
    std::fs::create_dir_all(server.base.join("input/sub/a")).unwrap();
    std::fs::create_dir_all(server.base.join("models/loras/sub")).unwrap();
    #[cfg(unix)]
    std::os::unix::fs::symlink(&server.base, server.base.join("input/link")).unwrap();
    let names = hostile_names();
    assert!(names.len() >= 200, "{}", names.len());
    let folders = &server.folders;
    let mut refused = 0;
    for name in &names {
        let results = [
            folders.resolve(Kind::Input, "", name),
            folders.resolve(Kind::Input, name, "canary"),
            folders.resolve_folder(Kind::Input, name),
            folders.resolve_annotated(name, Kind::Input),
            folders.save_path(Kind::Input, name, 1, 1).map(|t| t.folder.join(t.name)),
            folders.model_path("loras", name).and_then(|p| match p {
                ModelPath::File(path) => Ok(path),
                ModelPath::Embedded { .. } => Err(PathError::UnknownFolder(String::new())),
            }),
        ];
        let roots = ["input", "input", "input", "input", "input", "models/loras"];
        for (result, root) in results.into_iter().zip(roots) {
            let Ok(path) = result else {
                refused += 1;
                continue;
            };
            let root = server.base.join(root);
            assert!(path.starts_with(&root), "{name:?} gave {}", path.display());
            assert!(!path.components().any(|c| c.as_os_str() == ".."), "{name:?} gave {}", path.display());
            if let Ok(real) = path.canonicalize() {
                assert!(real.starts_with(&root), "{name:?} reached {}", real.display());
                assert!(!canaries.contains(&real), "{name:?} reached {}", real.display());
            }
        }
    }
    assert!(refused > names.len() * 3, "{refused} of {} were refused", names.len() * 6);
    for canary in canaries {
        assert_eq!(std::fs::read(canary).unwrap(), b"x");
    }
}

#[test]
fn harmless_names_pass() {
    let server = server();
    let input = server.base.join("input");
    for name in
        ["a..b.png", "bild ä (1).tar.png", "雪.png", ".hidden", "ab:c.png", "..a", "a..", "%2e%2e%2fx", "~"]
    {
        if name == "ab:c.png" && cfg!(windows) {
            continue;
        }
        assert_eq!(server.folders.resolve(Kind::Input, "", name).unwrap(), input.join(name));
    }
    let nested = server.folders.resolve(Kind::Input, "x//./y/", "a.png").unwrap();
    assert_eq!(nested, input.join("x/y/a.png"));
    assert_eq!(server.folders.resolve_folder(Kind::Temp, "").unwrap(), server.base.join("temp"));
}

#[test]
fn errors_tell_file_names_from_folders() {
    let Server { folders, .. } = server();
    let file = |name| folders.resolve(Kind::Input, "", name).unwrap_err();
    assert!(matches!(file("../a.png"), PathError::Invalid { .. }));
    assert!(matches!(file("/etc/passwd"), PathError::Invalid { .. }));
    assert!(matches!(file(""), PathError::Invalid { .. }));
    let folder = |name| folders.resolve(Kind::Output, name, "a.png").unwrap_err();
    for name in ["../input", "/tmp", "../../../../etc", "a/../../b", "..\\x"] {
        assert!(matches!(folder(name), PathError::OutsideRoot { root: "output", .. }), "{name}");
    }
    assert_eq!(last_part("sub/a.png").unwrap(), "a.png");
    for name in ["../a.png", "/a.png", "", "sub/", "."] {
        assert!(matches!(last_part(name), Err(PathError::Invalid { .. })), "{name}");
    }
}

#[test]
fn annotations_choose_the_folder() {
    assert_eq!(split_annotation("a.png [output]"), ("a.png", Some(Kind::Output)));
    assert_eq!(split_annotation("a b.png [temp]"), ("a b.png", Some(Kind::Temp)));
    assert_eq!(split_annotation("s/a.png [input]"), ("s/a.png", Some(Kind::Input)));
    for name in ["a.png", "a [other]", "[output] a", "a [output", "output]"] {
        assert_eq!(split_annotation(name), (name, None));
    }
    let server = server();
    let path = |name| server.folders.resolve_annotated(name, Kind::Input).unwrap();
    assert_eq!(path("s/a.png [output]"), server.base.join("output/s/a.png"));
    assert_eq!(path("s/a.png"), server.base.join("input/s/a.png"));
    assert!(server.folders.resolve_annotated("../a.png [output]", Kind::Input).is_err());
}

#[test]
#[cfg(unix)]
fn links_may_not_lead_outside() {
    use std::os::unix::fs::symlink;
    let server = server();
    let input = server.base.join("input");
    put(server.base.join("secret.png"));
    put(input.join("real/a.png"));
    symlink(server.base.join("secret.png"), input.join("out.png")).unwrap();
    symlink(server.base.join("nowhere.png"), input.join("dangling.png")).unwrap();
    symlink(input.join("real"), input.join("alias")).unwrap();
    symlink(&server.base, input.join("up")).unwrap();
    for name in ["out.png", "dangling.png", "up/secret.png", "up/new.png"] {
        let error = server.folders.resolve_annotated(name, Kind::Input).unwrap_err();
        assert!(matches!(error, PathError::OutsideRoot { .. }), "{name}: {error}");
    }
    assert!(server.folders.resolve(Kind::Input, "alias", "a.png").unwrap().is_file());
    // The root itself may be a link.
    let elsewhere = server.base.join("elsewhere");
    put(elsewhere.join("b.png"));
    let linked = server.base.join("linked");
    symlink(&elsewhere, &linked).unwrap();
    let options = FolderOptions { base: server.base.clone(), input: Some(linked), ..Default::default() };
    let folders = Folders::open(&options).unwrap();
    assert!(folders.resolve(Kind::Input, "", "b.png").unwrap().is_file());
    let open = |folder, name| server.folders.open_file(Kind::Input, folder, name);
    symlink("real", input.join("near")).unwrap();
    assert!(open("", "a.png").is_err() && open("near", "a.png").is_ok() && open("real/", "a.png").is_ok());
    for (folder, name) in
        [("", "out.png"), ("up", "secret.png"), ("up/input/real", "a.png"), ("alias", "a.png")]
    {
        let error = open(folder, name).unwrap_err();
        assert!(matches!(error, PathError::OutsideRoot { .. }), "{folder}/{name}: {error}");
    }
    for name in ["dangling.png", "real", "none.png"] {
        let error = open("", name).unwrap_err();
        assert!(!matches!(error, PathError::Io { .. }), "{name}: {error}");
    }
}

/// Writes a file among a user's data; whether it was kept.
fn store(data: &Sandbox, name: &str, content: &[u8], overwrite: bool) -> Result<bool, PathError> {
    let mut staged = data.stage()?;
    std::io::Write::write_all(staged.file(), content).unwrap();
    staged.keep(name, overwrite)
}

fn content(data: &Sandbox, name: &str) -> Result<String, PathError> {
    data.open(name).map(|file| std::io::read_to_string(file).unwrap())
}

#[test]
fn user_data_is_stored_listed_moved_and_removed() {
    let server = server();
    assert!(!server.folders.has_user_data("default"));
    let data = server.folders.user_data("default").unwrap();
    assert!(server.folders.has_user_data("default") && !server.folders.has_user_data(".."));
    assert!(store(&data, "workflows/a.json", b"one", false).unwrap());
    assert!(!store(&data, "workflows/a.json", b"two", false).unwrap());
    assert_eq!(content(&data, "workflows/a.json").unwrap(), "one");
    assert!(store(&data, "workflows/a.json", b"three", true).unwrap());
    assert_eq!(content(&data, "workflows//./a.json").unwrap(), "three");
    assert!(store(&data, "b.txt", b"12345", true).unwrap() && store(&data, ".hidden", b"", true).unwrap());
    let facts = data.facts("b.txt").unwrap().unwrap();
    assert_eq!(facts.size, 5);
    assert!(facts.modified > 1.7e9 && facts.created > 1.7e9, "{facts:?}");
    assert_eq!((data.facts("workflows").unwrap(), data.facts("").unwrap()), (None, None));
    let names = |folder: &str, recurse, hidden| -> Vec<String> {
        let listed = data.list(folder, ListOptions { recurse, hidden }).unwrap();
        listed.into_iter().map(|l| l.name).collect()
    };
    let unfinished = data.stage().unwrap();
    assert_eq!(names("", false, false), ["b.txt", "workflows"]);
    assert_eq!(names("", true, true), [".hidden", "b.txt", "workflows", "workflows/a.json"]);
    assert_eq!(names("workflows/", true, false), ["a.json"]);
    drop(unfinished);
    assert!(data.rename("b.txt", "deep/er/c.txt", false).unwrap());
    assert!(store(&data, "b.txt", b"b", true).unwrap());
    assert!(!data.rename("b.txt", "deep/er/c.txt", false).unwrap());
    assert!(data.rename("b.txt", "deep/er/c.txt", true).unwrap());
    assert_eq!(content(&data, "deep/er/c.txt").unwrap(), "b");
    assert!(data.rename("deep", "moved", false).unwrap(), "folders too");
    assert_eq!(content(&data, "moved/er/c.txt").unwrap(), "b");
    data.remove("moved/er/c.txt").unwrap();
    for error in [
        content(&data, "moved/er/c.txt").unwrap_err(),
        content(&data, "workflows").unwrap_err(),
        content(&data, "workflows/a.json/x").unwrap_err(),
        data.remove("none").unwrap_err(),
        data.rename("none", "x", true).unwrap_err(),
        data.list("none", ListOptions::default()).unwrap_err(),
        data.list(".hidden", ListOptions::default()).unwrap_err(),
    ] {
        assert!(matches!(error, PathError::NotFound { .. }), "{error}");
    }
    for error in [
        data.remove("moved").unwrap_err(),
        store(&data, "moved", b"x", true).unwrap_err(),
        store(&data, "workflows/a.json/x", b"x", true).unwrap_err(),
        store(&data, "", b"x", true).unwrap_err(),
    ] {
        assert!(matches!(error, PathError::Invalid { .. }), "{error}");
    }
    assert_eq!(names("", true, true), [".hidden", "moved", "workflows", "moved/er", "workflows/a.json"]);
    let left = std::fs::read_dir(server.base.join("user/default")).unwrap().count();
    assert_eq!(left, 3, "no unfinished file stays");
}

#[test]
fn no_name_leads_out_of_user_data() {
    let server = server();
    let canary = server.base.join("user/canary");
    put(&canary);
    put(server.base.join("canary"));
    put(server.base.join("user/ann/secret"));
    let data = server.folders.user_data("default").unwrap();
    assert!(store(&data, "sub/own", b"own", true).unwrap());
    let mut outside = 0;
    for name in hostile_names() {
        assert_ne!(content(&data, &name).ok().as_deref(), Some("x"), "{name:?}");
        let outcomes = [
            store(&data, &name, b"bad", true).map(drop),
            data.rename("sub/own", &name, true).map(drop),
            data.remove(&name),
            data.list(&name, ListOptions { recurse: true, hidden: true }).map(drop),
        ];
        if store(&data, "sub/own", b"own", true).is_err() {
            // A file is where the folder was.
            data.remove("sub").unwrap();
            assert!(store(&data, "sub/own", b"own", true).unwrap());
        }
        outside += usize::from(matches!(outcomes[0], Err(PathError::OutsideRoot { .. })));
        if let Ok(other) = server.folders.user_data(&name) {
            assert!(content(&other, "secret").is_err() && content(&other, "canary").is_err(), "{name:?}");
        }
    }
    assert!(outside > 100, "{outside}");
    for path in [canary, server.base.join("canary"), server.base.join("user/ann/secret")] {
        assert_eq!(std::fs::read(path).unwrap(), b"x");
    }
    let mut roots: Vec<String> = std::fs::read_dir(&server.base)
        .unwrap()
        .map(|e| e.unwrap().file_name().into_string().unwrap())
        .collect();
    roots.sort();
    assert_eq!(roots, ["canary", "input", "output", "temp", "user"]);
}

#[test]
#[cfg(unix)]
fn links_in_user_data_stay_inside() {
    use std::os::unix::fs::symlink;
    let server = server();
    put(server.base.join("user/ann/secret"));
    let user = server.base.join("user/bob");
    let data = server.folders.user_data("bob").unwrap();
    assert!(store(&data, "real/a", b"a", true).unwrap());
    symlink(server.base.join("user/ann"), user.join("ann")).unwrap();
    symlink("real", user.join("alias")).unwrap();
    symlink("../ann/secret", user.join("secret")).unwrap();
    symlink("..", user.join("real/loop")).unwrap();
    assert_eq!(content(&data, "alias/a").unwrap(), "a");
    for outcome in [
        content(&data, "ann/secret").map(drop),
        content(&data, "secret").map(drop),
        store(&data, "ann/new", b"x", true).map(drop),
        data.rename("real/a", "ann/a", true).map(drop),
        data.remove("ann/secret"),
        data.list("ann", ListOptions::default()).map(drop),
    ] {
        assert!(matches!(outcome, Err(PathError::OutsideRoot { .. })), "{outcome:?}");
    }
    assert!(store(&data, "secret", b"own", true).unwrap(), "a link is replaced, not followed");
    assert_eq!(std::fs::read(server.base.join("user/ann/secret")).unwrap(), b"x");
    let listed = data.list("", ListOptions { recurse: true, hidden: true }).unwrap();
    let listed: Vec<&str> = listed.iter().map(|l| l.name.as_str()).collect();
    assert_eq!(listed, ["alias", "real", "secret", "real/a"], "a link upwards is not shown, nor gone into");
    // A user's folder that is itself a link to elsewhere is not entered.
    symlink(server.base.join("user/ann"), server.base.join("user/eve")).unwrap();
    symlink(&server.base, server.base.join("user/mallory")).unwrap();
    assert!(matches!(server.folders.user_data("mallory"), Err(PathError::OutsideRoot { .. })));
}

#[test]
fn model_lists() {
    let server = server();
    let models = server.base.join("models");
    for file in [
        "loras/conformance/tiny-lora.safetensors",
        "loras/conformance/broken.safetensors",
        "loras/conformance/notes.txt",
        "loras/conformance/tiny-lora.png",
        "loras/.git/x.safetensors",
        "loras/Z.SAFETENSORS",
        "checkpoints/b.safetensors",
        "checkpoints/a.ckpt",
        "clip/c.safetensors",
        "text_encoders/c.safetensors",
        "unet/u.sft",
        "embeddings/e.pt",
        "embeddings/sub/f.safetensors",
    ] {
        put(models.join(file));
    }
    put(server.base.join("output/loras/made.safetensors"));
    let folders = &server.folders;
    let list = |folder| folders.list_models(folder);
    assert_eq!(
        list("loras"),
        [
            "Z.SAFETENSORS",
            "conformance/broken.safetensors",
            "conformance/tiny-lora.safetensors",
            "made.safetensors"
        ]
    );
    assert_eq!(list("checkpoints"), ["a.ckpt", "b.safetensors", "demo-sd.safetensors"]);
    assert_eq!(list("text_encoders"), ["c.safetensors"]);
    assert_eq!((list("clip"), list("unet")), (vec!["c.safetensors".to_owned()], vec!["u.sft".to_owned()]));
    assert_eq!(list("no_such_folder"), [""; 0]);
    assert!(folders.model_roots("unet").is_none() && folders.model_roots("diffusion_models").is_some());
    let names: Vec<&str> = folders.model_folders().map(|(name, _)| name).collect();
    assert_eq!(names.len(), 20);
    assert_eq!((names[0], names[4], names[19]), ("checkpoints", "text_encoders", "audio_encoders"));
    let entries = folders.model_entries("loras");
    assert_eq!(entries.iter().map(|e| e.root).collect::<Vec<_>>(), [0, 0, 0, 1]);
    assert_eq!(folders.embedding_names(), ["e", "sub/f"]);
    assert_eq!(folders.embedding("e"), Some(models.join("embeddings/e.pt")));
    assert_eq!(folders.embedding("../loras/Z"), None);
    let preview = folders.model_preview("loras", 0, "conformance/tiny-lora.safetensors");
    assert_eq!(preview, Some(models.join("loras/conformance/tiny-lora.png")));
    assert_eq!(folders.model_preview("loras", 0, "conformance/broken.safetensors"), None);
}

#[test]
fn model_paths() {
    let server = server();
    let demo = server.folders.model_path("checkpoints", DEMO_CHECKPOINT).unwrap();
    assert!(matches!(demo, ModelPath::Embedded { bytes, .. } if bytes.len() > 1_000_000));
    let own = server.base.join("models/checkpoints").join(DEMO_CHECKPOINT);
    put(&own);
    assert_eq!(server.folders.model_path("checkpoints", DEMO_CHECKPOINT).unwrap(), ModelPath::File(own));
    assert_eq!(server.folders.list_models("checkpoints"), [DEMO_CHECKPOINT]);
    let error = |folder, name| server.folders.model_path(folder, name).unwrap_err();
    assert!(matches!(error("vae", "none"), PathError::NotFound { .. }));
    assert!(matches!(error("nope", "x"), PathError::UnknownFolder(_)));
    assert!(matches!(error("vae", "../checkpoints/demo-sd.safetensors"), PathError::OutsideRoot { .. }));
    assert!(matches!(error("vae", ""), PathError::Invalid { .. }));
    #[cfg(unix)]
    {
        // Links inside model folders are the operator's; a loop ends.
        let vae = server.base.join("models/vae");
        put(server.base.join("disk/v.safetensors"));
        std::fs::create_dir_all(&vae).unwrap();
        std::os::unix::fs::symlink(server.base.join("disk"), vae.join("disk")).unwrap();
        std::os::unix::fs::symlink(&vae, vae.join("loop")).unwrap();
        assert_eq!(server.folders.list_models("vae"), ["disk/v.safetensors"]);
        assert!(server.folders.model_path("vae", "disk/v.safetensors").is_ok());
    }
}

#[test]
fn input_lists() {
    let server = server();
    for file in ["b.PNG", "a.jpeg", "c.txt", "d.latent", "e.webp", "noext", ".png", "sub/f.png"] {
        put(server.base.join("input").join(file));
    }
    assert_eq!(server.folders.input_images(), ["a.jpeg", "b.PNG", "e.webp"]);
    assert_eq!(server.folders.input_latents(), ["d.latent"]);
    let output = server.base.join("output");
    for (age, name) in ["new.png", "older.png", "oldest.png"].into_iter().enumerate() {
        put(output.join(name));
        let time = std::time::SystemTime::now() - std::time::Duration::from_secs(60 * age as u64);
        std::fs::File::open(output.join(name)).unwrap().set_modified(time).unwrap();
    }
    put(output.join(".hidden"));
    assert_eq!(server.folders.newest_files(Kind::Output), ["new.png", "older.png", "oldest.png"]);
}

#[test]
fn extra_model_paths() {
    let server = server();
    let yaml = "\
# comment
a111:
    base_path: webui/../webui
    is_default: true
    checkpoints: models/Stable-diffusion
    loras: |
        models/Lora
        models/LyCORIS
    unet: models/unets
    my_type: things
other:
    vae: /srv/vae
empty:
";
    std::fs::write(server.base.join("extra_model_paths.yaml"), yaml).unwrap();
    put(server.base.join("webui/models/Stable-diffusion/z.safetensors"));
    put(server.base.join("webui/models/LyCORIS/l.pt"));
    put(server.base.join("webui/things/t.anything"));
    let options = FolderOptions { base: server.base.clone(), ..Default::default() };
    let folders = Folders::open(&options).unwrap();
    let webui = server.base.join("webui");
    let roots = |name| folders.model_roots(name).unwrap().to_vec();
    assert_eq!(roots("checkpoints")[0], webui.join("models/Stable-diffusion"));
    // Each default path goes to the front, so the last one named comes first.
    assert_eq!(roots("loras")[..2], [webui.join("models/LyCORIS"), webui.join("models/Lora")]);
    assert_eq!(roots("diffusion_models")[0], webui.join("models/unets"));
    assert_eq!(roots("vae").last().unwrap(), Path::new("/srv/vae"));
    assert_eq!(folders.list_models("my_type"), ["t.anything"]);
    assert_eq!(folders.list_models("loras"), ["l.pt"]);
    assert_eq!(folders.list_models("checkpoints"), [DEMO_CHECKPOINT, "z.safetensors"]);

    let with = |text: &str| {
        let file = server.base.join("more.yaml");
        std::fs::write(&file, text).unwrap();
        Folders::open(&FolderOptions { extra_model_paths: vec![file], ..options.clone() })
    };
    for good in ["", "# nothing\n", "a:\n  vae: ~/v\n", "a:\n  base_path: $HOME/x\n  vae: v\n"] {
        assert!(with(good).is_ok(), "{good:?}: {:?}", with(good).err());
    }
    for bad in ["a: 3\n", "a:\n  vae: [1]\n", "a:\n  is_default: maybe\n  vae: x\n", "- x\n", "a: {\n"] {
        let error = with(bad).unwrap_err();
        assert!(matches!(error, FoldersError::ExtraPaths { .. }), "{bad:?}: {error}");
    }
    let missing = FolderOptions { extra_model_paths: vec![server.base.join("none.yaml")], ..options.clone() };
    assert!(matches!(Folders::open(&missing), Err(FoldersError::Read { .. })));
}

#[test]
fn options_move_the_folders() {
    let server = server();
    let at = |name: &str| Some(server.base.join("moved").join(name));
    let options = FolderOptions {
        base: server.base.clone(),
        input: at("in"),
        output: at("out"),
        temp: at("tmp"),
        user: at("users"),
        extra_model_paths: Vec::new(),
    };
    let folders = Folders::open(&options).unwrap();
    assert_eq!(folders.root(Kind::Input), server.base.join("moved/in"));
    assert_eq!(folders.root(Kind::Temp), server.base.join("moved/tmp/temp"));
    assert_eq!(folders.user(), server.base.join("moved/users"));
    assert_eq!(folders.model_roots("vae").unwrap()[1], server.base.join("moved/out/vae"));
    assert!(folders.root(Kind::Output).is_dir());
    assert!(Folders::default().resolve(Kind::Input, "", "a.png").is_err());
    assert_eq!(Folders::default().list_models("checkpoints"), [DEMO_CHECKPOINT]);
}
