//! Row 11, a server that is open to others: one loud warning without a key, none with key and TLS;
//! with a key 401 everywhere but `/health`; keys are in no log.

use super::process::Server;
use super::wire::{get, send};

#[test]
fn opening_the_server_is_warned_of_and_keys_close_it() {
    let _alone = super::alone();
    let base = tempfile::tempdir().unwrap();
    let open = Server::start(base.path(), &["--listen", "0.0.0.0"]);
    assert_eq!(open.count_lines("EVERYBODY who can reach"), 1, "one loud warning");
    drop(open);
    let closed = Server::start(base.path(), &[]);
    assert_eq!(closed.count_lines("EVERYBODY who can reach"), 0);
    drop(closed);

    let keys = base.path().join("keys");
    std::fs::write(&keys, "alice very-secret-key-of-alice\n").unwrap();
    let server =
        Server::start(base.path(), &["--listen", "0.0.0.0", "--api-key-file", keys.to_str().unwrap()]);
    assert_eq!(server.count_lines("EVERYBODY who can reach"), 0);
    assert_eq!(server.count_lines("in plain text"), 1);
    for path in
        ["/", "/queue", "/api/queue", "/ws", "/view?filename=a.png", "/object_info", "/api/v2/jobs", "/none"]
    {
        let answer = get(&server, path);
        assert_eq!(answer.status, 401, "{path}");
        assert!(answer.json()["error"].is_object(), "{path}: {answer:?}");
    }
    assert_eq!(get(&server, "/health").status, 200);
    let bearer = [("Authorization", "Bearer very-secret-key-of-alice")];
    assert_eq!(send(&server, "GET", "/queue", &bearer, b"").status, 200);
    assert_eq!(get(&server, "/view?filename=a.png&token=very-secret-key-of-alice").status, 404);
    assert_eq!(server.count_lines("very-secret-key"), 0, "keys are in no log");
}
