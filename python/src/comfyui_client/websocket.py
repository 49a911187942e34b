"""A WebSocket client (RFC 6455) on the standard library: what ``/ws`` needs, and no more.

Blocking, with a deadline on each read. Text and binary messages, fragments, pings; no extensions.
"""

from __future__ import annotations

import base64
import hashlib
import os
import socket
import ssl
import struct
import time
from typing import Mapping

from .errors import ConnectionFailed, NotFound, ServerError, Unauthorized

_GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
_CONTINUATION, _TEXT, _BINARY, _CLOSE, _PING, _PONG = 0, 1, 2, 8, 9, 10
_MAX_MESSAGE = 512 * 1024 * 1024


class WebSocket:
    """One connection. Not thread-safe, but for :meth:`close`."""

    def __init__(
        self,
        host: str,
        port: int,
        target: str,
        *,
        headers: Mapping[str, str] | None = None,
        tls: ssl.SSLContext | None = None,
        timeout: float = 10.0,
    ) -> None:
        self._buffer = bytearray()
        # A message may come in pieces, and a read may run out of time between them.
        self._parts: list[bytes] = []
        self._kind = _TEXT
        try:
            raw = socket.create_connection((host, port), timeout)
            raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._socket: socket.socket = tls.wrap_socket(raw, server_hostname=host) if tls else raw
        except OSError as error:
            raise ConnectionFailed(f"{host}:{port}: {error}") from error
        try:
            self._shake_hands(f"[{host}]:{port}" if ":" in host else f"{host}:{port}", target, headers or {}, timeout)
        except BaseException:
            self._socket.close()
            raise

    def _shake_hands(self, authority: str, target: str, headers: Mapping[str, str], timeout: float) -> None:
        key = base64.b64encode(os.urandom(16))
        lines = [f"GET {target} HTTP/1.1", f"Host: {authority}", "Upgrade: websocket", "Connection: Upgrade"]
        lines += [f"Sec-WebSocket-Key: {key.decode()}", "Sec-WebSocket-Version: 13"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        self._send_all("\r\n".join(lines).encode("latin-1") + b"\r\n\r\n")
        deadline = time.monotonic() + timeout
        while (end := self._buffer.find(b"\r\n\r\n")) < 0:
            if len(self._buffer) > 65536 or not self._fill(deadline):
                raise ConnectionFailed(f"{authority}: no answer to the WebSocket handshake within {timeout:g} s")
        head = bytes(self._buffer[:end]).decode("latin-1").split("\r\n")
        del self._buffer[: end + 4]
        words = head[0].split(" ", 2)
        status = int(words[1]) if len(words) > 1 and words[1].isdigit() else 0
        if status != 101:
            message = f"{target.split('?')[0]}: {words[2] if len(words) > 2 else head[0]}"
            kinds: dict[int, type[ServerError]] = {401: Unauthorized, 403: Unauthorized, 404: NotFound}
            raise kinds.get(status, ServerError)(status, message)
        fields = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:])}
        wanted = base64.b64encode(hashlib.sha1(key + _GUID).digest()).decode()
        if fields.get("sec-websocket-accept") != wanted:
            raise ConnectionFailed(f"{authority}: the answer to the WebSocket handshake is not a server's")

    def _send_all(self, data: bytes) -> None:
        try:
            self._socket.settimeout(30.0)
            self._socket.sendall(data)
        except OSError as error:
            raise ConnectionFailed(f"the WebSocket broke: {error}") from error

    def _fill(self, deadline: float) -> bool:
        """Reads what is there; ``False`` when the deadline passes first."""
        left = deadline - time.monotonic()
        if left <= 0:
            return False
        try:
            self._socket.settimeout(left)
            data = self._socket.recv(65536)
        except (socket.timeout, ssl.SSLWantReadError):
            return False
        except OSError as error:
            raise ConnectionFailed(f"the WebSocket broke: {error}") from error
        if not data:
            raise ConnectionFailed("the server closed the WebSocket")
        self._buffer += data
        return True

    def _frame(self) -> tuple[bool, int, bytes] | None:
        """The next whole frame of the buffer: (is last, opcode, payload)."""
        data = self._buffer
        if len(data) < 2:
            return None
        size, at = data[1] & 0x7F, 2
        if size >= 126:
            width = 2 if size == 126 else 8
            if len(data) < at + width:
                return None
            size, at = int.from_bytes(data[at : at + width], "big"), at + width
        if data[1] & 0x80 or size > _MAX_MESSAGE:
            raise ConnectionFailed(f"the server sent a frame that no server sends ({size} bytes)")
        if len(data) < at + size:
            return None
        frame = bool(data[0] & 0x80), data[0] & 0x0F, bytes(data[at : at + size])
        del data[: at + size]
        return frame

    def _send_frame(self, opcode: int, payload: bytes) -> None:
        size = len(payload)
        if size < 126:
            head = struct.pack(">BB", 0x80 | opcode, 0x80 | size)
        elif size < 65536:
            head = struct.pack(">BBH", 0x80 | opcode, 0x80 | 126, size)
        else:
            head = struct.pack(">BBQ", 0x80 | opcode, 0x80 | 127, size)
        mask = os.urandom(4)
        pad = (mask * (size // 4 + 1))[:size]
        masked = (int.from_bytes(payload, "big") ^ int.from_bytes(pad, "big")).to_bytes(size, "big")
        self._send_all(head + mask + masked)

    def send(self, text: str) -> None:
        """Sends a text message."""
        self._send_frame(_TEXT, text.encode())

    def receive(self, timeout: float) -> str | bytes | None:
        """The next message, or ``None`` when there is none within ``timeout`` seconds."""
        deadline = time.monotonic() + timeout
        while True:
            frame = self._frame()
            if frame is None:
                if not self._fill(deadline):
                    return None
                continue
            is_last, opcode, payload = frame
            if opcode == _PING:
                self._send_frame(_PONG, payload)
            elif opcode == _CLOSE:
                raise ConnectionFailed("the server closed the WebSocket")
            elif opcode in (_CONTINUATION, _TEXT, _BINARY):
                if opcode != _CONTINUATION:
                    self._kind, self._parts = opcode, []
                self._parts.append(payload)
                if sum(map(len, self._parts)) > _MAX_MESSAGE:
                    raise ConnectionFailed("the server sent a message that is too large")
                if is_last:
                    message, self._parts = b"".join(self._parts), []
                    return message.decode("utf-8", "replace") if self._kind == _TEXT else message

    def close(self) -> None:
        """Says goodbye and closes."""
        try:
            self._send_frame(_CLOSE, struct.pack(">H", 1000))
        except ConnectionFailed:
            pass
        self._socket.close()
