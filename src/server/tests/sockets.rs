//! The WebSocket: handshake, targets, order, binary frames, slow and rude clients.

use std::time::Duration;

use futures_util::{SinkExt, StreamExt};
use serde_json::{Value as Json, json};
use tokio::net::TcpStream;
use tokio::time::{Instant, sleep, timeout};
use tokio_tungstenite::tungstenite::client::IntoClientRequest;
use tokio_tungstenite::tungstenite::protocol::frame::coding::CloseCode;
use tokio_tungstenite::tungstenite::{Error, Message};
use tokio_tungstenite::{WebSocketStream, client_async};

use super::{PATIENCE, Server};

struct Client(WebSocketStream<TcpStream>);

/// A message, binary ones as `{"bin": kind, "bytes": n}`.
fn brief(message: &Message) -> Option<Json> {
    match message {
        Message::Text(text) => Some(serde_json::from_str(text).unwrap()),
        Message::Binary(bytes) => {
            let kind = u32::from_be_bytes(bytes[..4].try_into().unwrap());
            Some(json!({"bin": kind, "bytes": bytes.len()}))
        }
        _ => None,
    }
}

/// `type:node`, or `bin:kind`.
fn name(message: &Json) -> String {
    match message.get("bin") {
        Some(kind) => format!("bin:{kind}"),
        None => match &message["data"]["node"] {
            Json::String(node) => format!("{}:{node}", message["type"].as_str().unwrap()),
            _ => message["type"].as_str().unwrap().to_owned(),
        },
    }
}

impl Client {
    async fn connect(server: &Server, path: &str) -> Self {
        let stream = server.connect().await;
        let (socket, _) = client_async(format!("ws://{}{path}", server.addr), stream).await.unwrap();
        Self(socket)
    }

    /// Connects with a `User-Agent`.
    async fn connect_as(server: &Server, path: &str, agent: &str) -> Self {
        let mut request = format!("ws://{}{path}", server.addr).into_client_request().unwrap();
        request.headers_mut().insert("user-agent", agent.parse().unwrap());
        let (socket, _) = client_async(request, server.connect().await).await.unwrap();
        Self(socket)
    }

    async fn next(&mut self) -> Json {
        loop {
            let message = timeout(PATIENCE, self.0.next()).await.unwrap().unwrap().unwrap();
            if let Some(found) = brief(&message) {
                return found;
            }
        }
    }

    /// Messages up to the closing `executing` of a prompt.
    async fn until_done(&mut self, prompt: &str) -> Vec<Json> {
        let mut seen = Vec::new();
        loop {
            seen.push(self.next().await);
            let last = &seen[seen.len() - 1];
            if last["type"] == "executing" && last["data"] == json!({"node": null, "prompt_id": prompt}) {
                return seen;
            }
        }
    }

    /// Messages until nothing comes for a while.
    async fn drain(&mut self) -> Vec<Json> {
        let mut seen = Vec::new();
        while let Ok(Some(Ok(message))) = timeout(Duration::from_millis(300), self.0.next()).await {
            seen.extend(brief(&message));
        }
        seen
    }

    async fn send(&mut self, message: Json) {
        self.0.send(Message::text(message.to_string())).await.unwrap();
    }
}

fn show(value: u64) -> Json {
    json!({"1": {"class_type": "Number", "inputs": {"value": value}},
           "2": {"class_type": "Show", "inputs": {"value": ["1", 0]}}})
}

fn slow(steps: u64, salt: u64) -> Json {
    json!({"1": {"class_type": "Slow", "inputs": {"steps": steps, "salt": salt}}})
}

fn idle(sid: &str) -> Json {
    json!({"type": "status", "data": {"status": {"exec_info": {"queue_remaining": 0}}, "sid": sid}})
}

#[tokio::test]
async fn the_first_message_carries_the_id() {
    let server = Server::start().await;
    assert_eq!(Client::connect(&server, "/ws?clientId=me%20too").await.next().await, idle("me too"));
    assert_eq!(Client::connect(&server, "/api/ws?clientId=me").await.next().await, idle("me"));
    for path in ["/ws", "/ws?clientId="] {
        let first = Client::connect(&server, path).await.next().await;
        let sid = first["data"]["sid"].as_str().unwrap();
        assert!(sid.len() == 32 && sid.bytes().all(|b| b.is_ascii_hexdigit()), "{sid}");
    }
    let plain = server.get("/ws").await;
    assert_eq!(plain.status, 400, "no handshake");
    server.stop().await;
}

#[tokio::test]
async fn events_go_to_the_owner_or_to_everybody() {
    let server = Server::start().await;
    let mut owner = Client::connect(&server, "/ws?clientId=owner").await;
    let mut other = Client::connect(&server, "/ws?clientId=other").await;
    assert_eq!((owner.next().await, other.next().await), (idle("owner"), idle("other")));
    let prompt = server.queue(show(5), Some("owner")).await;
    let seen: Vec<String> =
        owner.until_done(&prompt).await.iter().map(name).filter(|n| n != "progress_state").collect();
    assert_eq!(
        seen,
        [
            "status",
            "status",
            "execution_start",
            "execution_cached",
            "executing:1",
            "executing:2",
            "executed:2",
            "execution_success",
            "status",
            "executing"
        ]
    );
    let counts: Vec<Json> = other
        .drain()
        .await
        .iter()
        .map(|m| m["data"]["status"]["exec_info"]["queue_remaining"].clone())
        .collect();
    assert_eq!(counts, [json!(1), json!(1), json!(0)], "the other one sees only the queue");
    let nobodys = server.queue(show(6), None).await;
    for client in [&mut owner, &mut other] {
        let seen = client.until_done(&nobodys).await;
        assert!(seen.iter().any(|m| m["type"] == "executed" && m["data"]["output"] == json!({"text": [6]})));
    }
    server.stop().await;
}

#[tokio::test]
async fn a_second_connection_takes_over_and_is_told_what_runs() {
    let server = Server::start().await;
    let mut old = Client::connect(&server, "/ws?clientId=me").await;
    old.next().await;
    let prompt = server.queue(slow(1_000_000, 1), Some("me")).await;
    while old.next().await["type"] != "progress" {}
    let mut new = Client::connect(&server, "/ws?clientId=me").await;
    let first = new.next().await;
    assert_eq!(first["data"]["status"]["exec_info"]["queue_remaining"], 1);
    let told: Vec<Json> = [new.next().await, new.next().await, new.next().await, new.next().await].into();
    assert_eq!(
        told.iter().map(name).collect::<Vec<_>>(),
        ["execution_start", "progress_state", "executing:1", "progress:1"]
    );
    assert_eq!(told[2]["data"], json!({"node": "1", "display_node": "1", "prompt_id": prompt}));
    assert_eq!(told[1]["data"]["nodes"]["1"]["state"], "running");
    old.drain().await;
    server.post("/interrupt", &json!({})).await;
    let seen = new.until_done(&prompt).await;
    assert!(seen.iter().any(|m| m["type"] == "execution_interrupted"));
    assert_eq!(old.drain().await, Vec::<Json>::new(), "the old connection is silent");
    drop(old);
    sleep(Duration::from_millis(50)).await;
    let again = server.queue(show(1), Some("me")).await;
    assert!(!new.until_done(&again).await.is_empty(), "closing the old connection leaves the new one");
    server.stop().await;
}

#[tokio::test]
async fn two_programs_with_one_id_both_hear_and_an_old_socket_hears_again() {
    let server = Server::start().await;
    let mut script = Client::connect(&server, "/ws?clientId=me").await;
    script.next().await;
    let mut other = Client::connect_as(&server, "/ws?clientId=me", "another program/1.0").await;
    other.next().await;
    let prompt = server.queue(show(3), Some("me")).await;
    let (one, two) = (script.until_done(&prompt).await.len(), other.until_done(&prompt).await.len());
    assert!(one >= 8 && one == two, "{one} {two}");
    let mut again = Client::connect(&server, "/ws?clientId=me").await;
    again.next().await;
    let prompt = server.queue(show(4), Some("me")).await;
    assert_eq!(again.until_done(&prompt).await.len(), other.until_done(&prompt).await.len());
    assert_eq!(script.drain().await, Vec::<Json>::new(), "the same program again: the older one is silent");
    drop(again);
    sleep(Duration::from_millis(50)).await;
    let prompt = server.queue(show(5), Some("me")).await;
    assert!(script.until_done(&prompt).await.len() >= 8, "the newer one is gone, so the older one hears");
    assert!(other.until_done(&prompt).await.len() >= 8);
    server.stop().await;
}

#[tokio::test]
async fn sockets_that_announce_themselves_share_an_id() {
    let server = Server::start().await;
    let mut tab = Client::connect(&server, "/ws?clientId=me").await;
    tab.next().await;
    tab.send(json!({"type": "feature_flags", "data": {}})).await;
    assert_eq!(tab.next().await["type"], "feature_flags");
    let mut asked = Client::connect(&server, "/ws?clientId=me&shared=1").await;
    asked.next().await;
    let mut plain = Client::connect(&server, "/ws?clientId=me").await;
    plain.next().await;
    let prompt = server.queue(show(3), Some("me")).await;
    let counts: Vec<usize> = [
        tab.until_done(&prompt).await.len(),
        asked.until_done(&prompt).await.len(),
        plain.until_done(&prompt).await.len(),
    ]
    .into();
    assert!(counts[0] >= 8 && counts.iter().all(|c| *c == counts[0]), "{counts:?}");
    drop(tab);
    sleep(Duration::from_millis(50)).await;
    let again = server.queue(show(4), Some("me")).await;
    assert!(asked.until_done(&again).await.len() >= 8, "closing one takes nothing from the others");
    server.stop().await;
}

#[tokio::test]
async fn preview_frames_depend_on_the_feature_flags() {
    let server = Server::start().await;
    let flags = |on: bool| json!({"type": "feature_flags", "data": {"supports_preview_metadata": on}});
    let mut plain = Client::connect(&server, "/ws?clientId=plain").await;
    plain.next().await;
    let mut modern = Client::connect(&server, "/ws?clientId=modern").await;
    modern.next().await;
    modern.send(flags(true)).await;
    let features = server.get("/features").await.json();
    assert_eq!(modern.next().await, json!({"type": "feature_flags", "data": features}));
    let mut late = Client::connect(&server, "/ws?clientId=late").await;
    late.next().await;
    late.0.send(Message::text("this is no JSON")).await.unwrap();
    late.send(flags(true)).await;
    for (client, owner, wanted) in [
        (&mut plain, "plain", ["progress:1", "bin:1", "progress:1", "bin:1"]),
        (&mut modern, "modern", ["bin:4", "progress:1", "bin:4", "progress:1"]),
        (&mut late, "late", ["progress:1", "bin:1", "progress:1", "bin:1"]),
    ] {
        let prompt = server.queue(slow(2, owner.len() as u64), Some(owner)).await;
        let seen = client.until_done(&prompt).await;
        assert!(seen.iter().all(|m| m["type"] != "feature_flags"), "{owner}");
        let order: Vec<String> =
            seen.iter().map(name).filter(|n| n.starts_with("progress:") || n.starts_with("bin")).collect();
        assert_eq!(order, wanted, "{owner}");
    }
    server.stop().await;
}

#[tokio::test]
async fn previews_have_the_size_asked_for() {
    for (size, wanted) in [(None, (64, 32)), (Some(256), (256, 128))] {
        let server = Server::with(|config| config.preview_size = size).await;
        let mut client = Client::connect(&server, "/ws?clientId=me").await;
        client.next().await;
        server.queue(slow(1, 0), Some("me")).await;
        let frame = loop {
            if let Message::Binary(frame) =
                timeout(PATIENCE, client.0.next()).await.unwrap().unwrap().unwrap()
            {
                break frame;
            }
        };
        assert_eq!(&frame[..8], b"\x00\x00\x00\x01\x00\x00\x00\x01", "an image, JPEG");
        let picture = image::load_from_memory(&frame[8..]).unwrap().to_rgb8();
        assert_eq!(picture.dimensions(), wanted);
        assert!(picture.get_pixel(5, 5).0.iter().all(|v| (126..=129).contains(v)), "half grey");
        server.stop().await;
    }
}

#[tokio::test]
async fn pictures_arrive_as_png() {
    let server = Server::start().await;
    let mut client = Client::connect(&server, "/ws?clientId=me").await;
    client.next().await;
    server.queue(json!({"7": {"class_type": "Picture", "inputs": {"side": 3}}}), Some("me")).await;
    let frame = loop {
        if let Message::Binary(frame) = timeout(PATIENCE, client.0.next()).await.unwrap().unwrap().unwrap() {
            break frame;
        }
    };
    assert_eq!(&frame[..8], b"\x00\x00\x00\x01\x00\x00\x00\x02", "an image, PNG");
    let picture = image::load_from_memory(&frame[8..]).unwrap().to_rgb8();
    assert_eq!((picture.dimensions(), picture.get_pixel(1, 1).0), ((3, 3), [63, 63, 63]));
    server.stop().await;
}

#[tokio::test]
async fn lines_of_the_log_go_to_those_who_asked() {
    use std::io::Write as _;
    use tracing_subscriber::fmt::MakeWriter as _;
    let log = super::super::LogTail::default();
    let tail = log.clone();
    let server = Server::with(|config| config.log = tail).await;
    let mut reader = Client::connect(&server, "/ws?clientId=reader").await;
    let mut other = Client::connect(&server, "/ws?clientId=other").await;
    reader.next().await;
    other.next().await;
    let subscribe = |on: bool| json!({"clientId": "reader", "enabled": on}).to_string();
    let patch = async |body: String| {
        let answer = server.send("PATCH", "/internal/logs/subscribe", &[], body.as_bytes()).await;
        assert_eq!((answer.status, answer.body.len()), (200, 0));
    };
    writeln!(log.make_writer(), "before").unwrap();
    patch(subscribe(true)).await;
    sleep(Duration::from_millis(300)).await;
    reader.drain().await;
    writeln!(log.make_writer(), "one").unwrap();
    writeln!(log.make_writer(), "two").unwrap();
    let message = reader.next().await;
    assert_eq!((&message["type"], &message["data"]["size"]["cols"]), (&json!("logs"), &json!(80)));
    let texts: Vec<&Json> = message["data"]["entries"].as_array().unwrap().iter().map(|e| &e["m"]).collect();
    assert_eq!(texts, [&json!("one\n"), &json!("two\n")]);
    patch(subscribe(false)).await;
    writeln!(log.make_writer(), "three").unwrap();
    assert_eq!((reader.drain().await, other.drain().await), (vec![], vec![]));
    server.stop().await;
}

/// Queues ten prompts and reads to the end of the last: `(prompt, type)` of what it was sent.
async fn queue_ten(server: &Server, id: usize) -> (Vec<String>, Vec<(String, String)>) {
    let client_id = format!("client{id}");
    let mut client = Client::connect(server, &format!("/ws?clientId={client_id}")).await;
    client.next().await;
    let mut prompts = Vec::new();
    for i in 0..10 {
        prompts.push(server.queue(show((id * 10 + i) as u64), Some(&client_id)).await);
    }
    let mut seen = Vec::new();
    for prompt in &prompts {
        seen.extend(client.until_done(prompt).await);
    }
    seen.extend(client.drain().await);
    let own = seen.iter().filter(|m| !matches!(m["type"].as_str(), Some("status" | "progress_state")));
    let own = own.map(|m| (m["data"]["prompt_id"].as_str().unwrap().to_owned(), name(m)));
    (prompts, own.collect())
}

#[tokio::test]
async fn five_clients_with_ten_prompts_each_get_exactly_their_own() {
    let server = Server::start().await;
    let all = futures_util::future::join_all((0..5).map(|id| queue_ten(&server, id))).await;
    let events = [
        "execution_start",
        "execution_cached",
        "executing:1",
        "executing:2",
        "executed:2",
        "execution_success",
        "executing",
    ];
    for (id, (prompts, seen)) in all.into_iter().enumerate() {
        let wanted: Vec<(String, String)> = prompts
            .iter()
            .flat_map(|prompt| events.iter().map(move |event| (prompt.clone(), (*event).to_owned())))
            .collect();
        assert_eq!(seen, wanted, "client {id}");
    }
    let history = server.get("/history").await.json();
    assert_eq!(history.as_object().unwrap().len(), 50);
    server.stop().await;
}

#[tokio::test]
async fn rude_clients_are_closed_and_nobody_else_notices() {
    let server = Server::start().await;
    let mut honest = Client::connect(&server, "/ws?clientId=honest").await;
    honest.next().await;
    let mut rude = Client::connect(&server, "/ws?clientId=rude").await;
    rude.next().await;
    let too_long = "x".repeat(2 * 1024 * 1024);
    // the server may close while the message is still on its way
    let _ = rude.0.send(Message::text(too_long)).await;
    let end = timeout(PATIENCE, async {
        loop {
            match rude.0.next().await {
                None | Some(Err(_) | Ok(Message::Close(_))) => break,
                Some(Ok(_)) => {}
            }
        }
    });
    assert!(end.await.is_ok(), "a message over 1 MiB ends the connection");
    let mut pinging = Client::connect(&server, "/ws?clientId=pings").await;
    for _ in 0..10_000 {
        pinging.0.feed(Message::Ping(vec![1_u8; 10].into())).await.unwrap();
    }
    pinging.0.flush().await.unwrap();
    let prompt = server.queue(show(77), Some("honest")).await;
    assert!(honest.until_done(&prompt).await.len() >= 8);
    server.stop().await;
}

#[tokio::test]
async fn silent_clients_delay_nobody() {
    let server = Server::start().await;
    let mut silent = Vec::new();
    for i in 0..50 {
        silent.push(Client::connect(&server, &format!("/ws?clientId=silent{i}")).await);
    }
    let mut honest = Client::connect(&server, "/ws?clientId=honest").await;
    honest.next().await;
    let broadcast = server.queue(slow(100, 9), None).await;
    let began = Instant::now();
    let seen = honest.until_done(&broadcast).await;
    let frames = seen.iter().filter(|m| m.get("bin").is_some()).count();
    assert_eq!(frames, 100, "who reads gets every preview");
    assert!(began.elapsed() < Duration::from_secs(10), "{:?}", began.elapsed());
    drop(silent);
    server.stop().await;
}

#[tokio::test]
async fn sockets_are_counted_and_closed_with_1001() {
    let server = Server::with(|config| config.limits.web_sockets = 2).await;
    let mut one = Client::connect(&server, "/ws").await;
    let two = Client::connect(&server, "/ws").await;
    one.next().await;
    let refused = client_async(format!("ws://{}/ws", server.addr), server.connect().await).await;
    assert!(matches!(&refused, Err(Error::Http(answer)) if answer.status() == 503), "{refused:?}");
    drop(two);
    let end = Instant::now() + PATIENCE;
    while client_async(format!("ws://{}/ws", server.addr), server.connect().await).await.is_err() {
        assert!(Instant::now() < end, "the place of a closed socket becomes free");
        sleep(Duration::from_millis(10)).await;
    }
    let stopping = tokio::spawn(server.stop());
    let code = loop {
        match timeout(PATIENCE, one.0.next()).await.unwrap() {
            Some(Ok(Message::Close(Some(frame)))) => break Some(frame.code),
            None | Some(Ok(Message::Close(None)) | Err(_)) => break None,
            Some(Ok(_)) => {}
        }
    };
    assert_eq!(code, Some(CloseCode::Away));
    drop(one);
    stopping.await.unwrap();
}
