"""Faults that a well-behaved server never shows: played by small servers of our own."""

from __future__ import annotations

import json
import shutil
import socket
import ssl
import struct
import subprocess
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Callable, Iterator

import pytest

from comfyui_client import Busy, ComfyUIClient, ConnectionFailed, Progress, ServerError, TimedOut, Unauthorized, Workflow
from comfyui_client.websocket import WebSocket


class Scripted(ThreadingHTTPServer):
    """Answers with what ``script`` says, and notes what was asked."""

    def __init__(self, script: Callable[["Scripted", str, str, Any, Any], "tuple[int, Any, dict[str, str]] | None"]):
        self.asked: list[tuple[str, str, Any]] = []
        server = self

        class Handler(BaseHTTPRequestHandler):
            def _answer(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or b"null")
                server.asked.append((self.command, self.path, body))
                answer = script(server, self.command, self.path, body, self.headers)
                if answer is None:
                    self.connection.shutdown(socket.SHUT_RDWR)
                    return
                status, value, headers = answer
                text = json.dumps(value).encode()
                self.send_response(status)
                for name, content in {**headers, "Content-Length": str(len(text))}.items():
                    self.send_header(name, content)
                self.end_headers()
                self.wfile.write(text)

            do_GET = do_POST = _answer

            def log_message(self, *_: Any) -> None:
                pass

        super().__init__(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def port(self) -> int:
        return int(self.server_address[1])


def test_busy_servers_are_asked_again() -> None:
    def script(server: Scripted, *_: Any) -> Any:
        return (503, {}, {"Retry-After": "0"}) if len(server.asked) < 3 else (200, {"prompt_id": "x"}, {})

    server = Scripted(script)
    assert ComfyUIClient("127.0.0.1", server.port).queue_prompt({}) == "x"
    assert len(server.asked) == 3 and len({json.dumps(a) for a in server.asked}) == 1


def test_a_full_queue_is_told_in_the_servers_words() -> None:
    error = {"error": {"type": "queue_full", "message": "the queue is full"}, "node_errors": {}}
    server = Scripted(lambda *_: (429, error, {}))
    with pytest.raises(Busy, match="the queue is full") as caught:
        ComfyUIClient("127.0.0.1", server.port, retries=2).queue_prompt({})
    assert caught.value.status == 429 and len(server.asked) == 3


def test_a_lost_answer_does_not_queue_twice() -> None:
    def script(server: Scripted, method: str, path: str, body: Any, headers: Any) -> Any:
        if path == "/prompt":
            return None
        if path == "/queue":
            prompt_id = next(b["prompt_id"] for m, p, b in server.asked if p == "/prompt")
            return 200, {"queue_running": [], "queue_pending": [[0, prompt_id, {}, {}, []]]}, {}
        return 200, {}, {}

    server = Scripted(script)
    ComfyUIClient("127.0.0.1", server.port).queue_prompt({})
    assert [path for _, path, _ in server.asked].count("/prompt") == 1


def test_other_posts_are_never_sent_twice() -> None:
    server = Scripted(lambda *_: None)
    with pytest.raises(ConnectionFailed):
        ComfyUIClient("127.0.0.1", server.port).free()
    assert len(server.asked) == 1
    server = Scripted(lambda *_: (500, {"error": {"message": "broken"}}, {}))
    with pytest.raises(ServerError, match="HTTP 500: broken"):
        ComfyUIClient("127.0.0.1", server.port).free()
    assert len(server.asked) == 1


def test_keys_and_tls(tmp_path: Path) -> None:
    def script(server: Scripted, method: str, path: str, body: Any, headers: Any) -> Any:
        is_known = headers.get("Authorization") == "Bearer secret"
        return (200, {"ok": 1}, {}) if is_known else (401, {"error": {"message": "an API key is needed"}}, {})

    if not shutil.which("openssl"):
        pytest.skip("needs the openssl command")
    key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=localhost",
         "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1", "-keyout", str(key), "-out", str(certificate)],
        check=True, capture_output=True,
    )  # fmt: skip
    server = Scripted(script)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    trusted = ssl.create_default_context(cafile=str(certificate))
    url = f"https://localhost:{server.port}"
    assert ComfyUIClient.from_url(url, tls=trusted, api_key="secret").get_system_stats() == {"ok": 1}
    with pytest.raises(Unauthorized, match="an API key is needed"):
        ComfyUIClient.from_url(url, tls=trusted).get_system_stats()
    with pytest.raises(ConnectionFailed, match="(?i)certificate"):
        ComfyUIClient.from_url(url, api_key="secret").get_system_stats()


def test_nobody_there_and_nobody_answering() -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        port = silent.getsockname()[1]
        with pytest.raises(ConnectionFailed, match=f":{port}"):
            ComfyUIClient("127.0.0.1", port, retries=1).get_queue()
        silent.listen()
        with pytest.raises(TimedOut, match="within 0.2 s"):
            ComfyUIClient("127.0.0.1", port, timeout=0.2).get_queue()


@pytest.fixture
def cutter(port: int) -> Iterator[tuple[int, list[int]]]:
    """A proxy that cuts each WebSocket after the first progress message it has passed on."""
    listener = socket.create_server(("127.0.0.1", 0))
    cuts: list[int] = []

    def copy(source: socket.socket, sink: socket.socket, may_cut: bool) -> None:
        try:
            while data := source.recv(65536):
                sink.sendall(data)
                if may_cut and b'"progress"' in data:
                    cuts.append(len(data))
                    break
        except OSError:
            pass
        for end in (source, sink):
            try:
                end.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass

    def accept() -> None:
        while True:
            try:
                near = listener.accept()[0]
            except OSError:
                return
            far = socket.create_connection(("127.0.0.1", port))
            head = near.recv(65536).replace(f":{listener.getsockname()[1]}".encode(), f":{port}".encode())
            far.sendall(head)
            is_socket = head.startswith(b"GET /ws")
            threading.Thread(target=copy, args=(near, far, False), daemon=True).start()
            threading.Thread(target=copy, args=(far, near, is_socket), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    yield listener.getsockname()[1], cuts
    listener.close()


def test_a_cut_socket_costs_no_result(cutter: tuple[int, list[int]], graph: Callable[..., Workflow]) -> None:
    near_port, cuts = cutter
    seen: list[Progress] = []
    client = ComfyUIClient("127.0.0.1", near_port)
    result = client.execute_workflow(graph(steps=400), on_progress=seen.append, timeout=120)
    assert len(client.get_images(result)) == 1 and seen[-1].state == "done"
    assert len(cuts) >= 2, "the socket was set up again, and cut again"


def test_frames_of_every_size() -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    heard: list[bytes] = []

    def frame(first: int, payload: bytes) -> bytes:
        size = len(payload)
        length = bytes([size]) if size < 126 else b"\x7e" + struct.pack(">H", size) if size < 65536 else b""
        return bytes([first]) + (length or b"\x7f" + struct.pack(">Q", size)) + payload

    def serve() -> None:
        import base64
        import hashlib

        peer = listener.accept()[0]
        head = peer.recv(65536).decode()
        key = head.split("Sec-WebSocket-Key: ")[1].split("\r\n")[0]
        accept = base64.b64encode(hashlib.sha1((key + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11").encode()).digest())
        answer = b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nSec-WebSocket-Accept: " + accept
        stream = b"".join([
            frame(0x81, "größer".encode()), frame(0x01, b"in "), frame(0x89, b"ping"), frame(0x80, b"pieces"),
            frame(0x82, b"x" * 300), frame(0x82, b"y" * 70000), frame(0x88, b"\x03\xe8"),
        ])  # fmt: skip
        peer.sendall(answer + b"\r\n\r\n")
        for at in range(0, len(stream), 777):
            peer.sendall(stream[at : at + 777])
        heard.append(peer.recv(65536))

    server = threading.Thread(target=serve)
    server.start()
    socket_ = WebSocket("127.0.0.1", listener.getsockname()[1], "/ws")
    assert [socket_.receive(5) for _ in range(4)] == ["größer", "in pieces", b"x" * 300, b"y" * 70000]
    with pytest.raises(ConnectionFailed, match="closed"):
        socket_.receive(5)
    server.join(5)
    first, size, mask, body = heard[0][0], heard[0][1], heard[0][2:6], heard[0][6:10]
    assert (first, size) == (0x8A, 0x80 | 4), "a pong, masked"
    assert bytes(b ^ m for b, m in zip(body, mask)) == b"ping"
