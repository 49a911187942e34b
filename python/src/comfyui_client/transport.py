"""HTTP on the standard library: keys, TLS, retries with backoff, and errors with the server's words."""

from __future__ import annotations

import http.client
import json
import mimetypes
import random
import socket
import ssl
import time
import uuid
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Iterator, Mapping
from urllib.parse import quote, urlencode

from .errors import Busy, ComfyUIError, ConnectionFailed, NotFound, ServerError, TimedOut, Unauthorized, ValidationError
from .websocket import WebSocket

#: Answers that say "not now": the server did not take the request.
_NOT_TAKEN = {429, 503}
#: Answers of a proxy whose server is away; a request that changes nothing may be sent again.
_AWAY = {502, 504}


class NotSent(ConnectionFailed):
    """The connection could not be set up, so the server saw nothing of the request."""


class NoAnswer(ConnectionFailed):
    """The request went out and the connection broke: it may have been taken."""


def backoff(retries: int, first: float = 0.25, longest: float = 8.0) -> Iterator[float]:
    """``retries`` growing pauses in seconds, with jitter so that many clients don't come back at once."""
    for attempt in range(retries):
        yield min(longest, first * 2.0**attempt) * random.uniform(0.5, 1.0)


@dataclass
class Answer:
    """A finished HTTP exchange."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    def json(self) -> Any:
        """The body as JSON; ``None`` if it is empty."""
        if not self.body:
            return None
        try:
            return json.loads(self.body)
        except ValueError as error:
            raise ServerError(self.status, f"the answer is not JSON: {self.body[:200]!r}") from error


@dataclass
class Transport:
    """Where the server is and how to speak to it. Safe to share between threads."""

    host: str
    port: int
    tls: ssl.SSLContext | None = None
    api_key: str | None = None
    timeout: float = 30.0
    retries: int = 4
    prefix: str = ""
    headers: dict[str, str] = field(default_factory=dict)

    @property
    def url(self) -> str:
        """The server's address."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'https' if self.tls else 'http'}://{host}:{self.port}{self.prefix}"

    def _headers(self) -> dict[str, str]:
        headers = {"User-Agent": "comfyui_client", **self.headers}
        if self.api_key:
            headers["Authorization"] = f"Bearer {self.api_key}"
        return headers

    def target(self, path: str, query: Mapping[str, Any] | None = None) -> str:
        """Path and query of a request; ``None`` values are left out."""
        given = {key: value for key, value in (query or {}).items() if value is not None}
        return self.prefix + quote(path) + (f"?{urlencode(given)}" if given else "")

    def web_socket(self, client_id: str) -> WebSocket:
        """Opens ``/ws`` under a client id."""
        target = self.target("/ws", {"clientId": client_id})
        return WebSocket(self.host, self.port, target, headers=self._headers(), tls=self.tls, timeout=self.timeout)

    def _exchange(self, method: str, target: str, body: bytes | None, headers: Mapping[str, str]) -> Answer:
        connection: http.client.HTTPConnection
        if self.tls:
            connection = http.client.HTTPSConnection(self.host, self.port, timeout=self.timeout, context=self.tls)
        else:
            connection = http.client.HTTPConnection(self.host, self.port, timeout=self.timeout)
        try:
            try:
                connection.connect()
            except socket.timeout as error:
                raise TimedOut(f"{self.url}: no connection within {self.timeout:g} s") from error
            except ssl.SSLError as error:
                raise ConnectionFailed(f"{self.url}: {error}") from error
            except OSError as error:
                raise NotSent(f"{self.url}: {error}") from error
            try:
                # A server that refuses a large body answers before it has read it.
                with suppress(BrokenPipeError, ConnectionResetError):
                    connection.request(method, target, body, {**self._headers(), "Connection": "close", **headers})
                response = connection.getresponse()
                answer = Answer(response.status, {k.lower(): v for k, v in response.getheaders()}, response.read())
            except socket.timeout as error:
                raise TimedOut(f"{method} {self.url}{target}: no answer within {self.timeout:g} s") from error
            except (OSError, http.client.HTTPException) as error:
                raise NoAnswer(f"{method} {self.url}{target}: {error or type(error).__name__}") from error
            return answer
        finally:
            connection.close()

    def request(
        self,
        method: str,
        path: str,
        *,
        query: Mapping[str, Any] | None = None,
        json_body: Any = None,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Answer:
        """One request; raises unless the answer is a success.

        A request that the server can't have taken is sent again; a ``GET`` also after a broken answer.
        """
        target, sent = self.target(path, query), dict(headers or {})
        if json_body is not None:
            body, sent["Content-Type"] = json.dumps(json_body).encode(), "application/json"
        pauses, is_safe = backoff(self.retries), method == "GET"
        while True:
            pause = next(pauses, None)
            try:
                answer = self._exchange(method, target, body, sent)
            except NotSent:
                if pause is None:
                    raise
            except NoAnswer:
                if pause is None or not is_safe:
                    raise
            else:
                if answer.status < 400:
                    return answer
                if pause is None or not (answer.status in _NOT_TAKEN or (is_safe and answer.status in _AWAY)):
                    raise error_of(answer, path)
                pause = max(pause, min(_retry_after(answer), 60.0))
            time.sleep(pause)


def _retry_after(answer: Answer) -> float:
    try:
        return float(answer.headers.get("retry-after", 0))
    except ValueError:
        return 0.0


def error_of(answer: Answer, path: str) -> ComfyUIError:
    """The error that an answer stands for."""
    try:
        body: Any = json.loads(answer.body)
    except ValueError:
        body = answer.body.decode("utf-8", "replace").strip()
    if isinstance(body, dict):
        if answer.status == 400 and ("node_errors" in body or "error" in body):
            return ValidationError(answer.status, body)
        error = body.get("error", body)
        message = str(error.get("message") or error.get("detail") or body) if isinstance(error, dict) else str(error)
    else:
        message = str(body)[:500] if "<html" not in str(body)[:500].lower() else ""
    message = message or f"{path}: {http.client.responses.get(answer.status, 'error')}"
    kinds: dict[int, type[ServerError]] = {401: Unauthorized, 403: Unauthorized, 404: NotFound, 429: Busy, 503: Busy}
    return kinds.get(answer.status, ServerError)(answer.status, message, body)


def multipart(fields: Mapping[str, str], file_name: str, data: bytes) -> tuple[bytes, str]:
    """A form with one file named ``image``: the body and its content type."""
    boundary = uuid.uuid4().hex
    kind = mimetypes.guess_type(file_name)[0] or "application/octet-stream"
    name = file_name.replace("\\", "\\\\").replace('"', "%22").replace("\r", "").replace("\n", "")
    parts = [f'Content-Disposition: form-data; name="{k}"\r\n\r\n{v}'.encode() for k, v in fields.items()]
    head = f'Content-Disposition: form-data; name="image"; filename="{name}"\r\nContent-Type: {kind}\r\n\r\n'
    parts.append(head.encode() + data)
    body = b"".join(f"--{boundary}\r\n".encode() + part + b"\r\n" for part in parts)
    return body + f"--{boundary}--\r\n".encode(), f"multipart/form-data; boundary={boundary}"
