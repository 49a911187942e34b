//! The example's node is like a built-in one: listed, checked, cached, run.

#[path = "../examples/custom_node.rs"]
#[allow(dead_code, reason = "the example's own main")]
mod custom_node;

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};

use serde_json::{Value as Json, json};

fn ask(address: SocketAddr, method: &str, path: &str, body: &Json) -> (u16, Vec<u8>) {
    let body = if body.is_null() { String::new() } else { body.to_string() };
    let mut stream = TcpStream::connect(address).unwrap();
    write!(
        stream,
        "{method} {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    )
    .unwrap();
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).unwrap();
    let end = answer.windows(4).position(|w| w == b"\r\n\r\n").unwrap();
    let status = String::from_utf8_lossy(&answer[9..12]).parse().unwrap();
    (status, answer[end + 4..].to_vec())
}

#[test]
fn a_custom_node_is_like_a_built_in_one() {
    let source = include_str!("../examples/custom_node.rs");
    assert!(source.lines().count() < 60, "the example has {} lines", source.lines().count());
    let base = tempfile::tempdir().unwrap();
    let server = kiln::Server::builder()
        .node(custom_node::Stripes)
        .base_directory(base.path())
        .listen("127.0.0.1:0")
        .start()
        .unwrap();
    let address = server.address();
    let json = |(_, body): (u16, Vec<u8>)| serde_json::from_slice::<Json>(&body).unwrap();

    let info = json(ask(address, "GET", "/object_info/Stripes", &Json::Null));
    assert_eq!(info["Stripes"]["display_name"], "Draw Stripes");
    assert_eq!(info["Stripes"]["input"]["required"]["direction"][0], json!(["horizontal", "vertical"]));
    let all = json(ask(address, "GET", "/object_info", &Json::Null));
    assert!(
        all.get("KSampler").is_some() && all.as_object().unwrap().keys().next_back().unwrap() == "Stripes"
    );

    let graph = |width: u64| {
        json!({
            "1": {"class_type": "Stripes", "inputs": {"size": 32, "width": width, "direction": "vertical"}},
            "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "stripes"}},
        })
    };
    let refused = ask(address, "POST", "/prompt", &json!({"prompt": graph(0)}));
    assert_eq!(refused.0, 400);
    assert_eq!(json(refused)["node_errors"]["1"]["errors"][0]["type"], "value_smaller_than_min");

    let run = |width| json(ask(address, "POST", "/prompt", &json!({"prompt": graph(width), "wait": true})));
    let first = run(8);
    assert_eq!(first["status"], "completed", "{first}");
    let url = first["files"][0]["url"].as_str().unwrap().to_owned();
    let path = url.split_once(&address.to_string()).unwrap().1;
    let picture = image::load_from_memory(&ask(address, "GET", path, &Json::Null).1).unwrap().to_rgb8();
    assert_eq!(picture.dimensions(), (32, 32));
    assert_eq!([0, 7, 8, 15, 16].map(|x| picture.get_pixel(x, 5).0[0]), [0, 0, 255, 255, 0]);
    let again = run(8);
    assert_eq!(again["outputs"], first["outputs"], "the second time from the cache");
    server.stop();
}
