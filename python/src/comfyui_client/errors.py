"""What can go wrong, each with the server's own words.

``ComfyUIError`` is the root of all of them. Errors that have a counterpart among
Python's own (a timeout, a broken connection) are also of that type.
"""

from __future__ import annotations

from typing import Any, Mapping


class ComfyUIError(Exception):
    """Root of this package's errors."""


class WorkflowError(ComfyUIError, ValueError):
    """A workflow that can't be sent: wrong format, no such node, no such input."""


class ConnectionFailed(ComfyUIError, ConnectionError):
    """The server can't be reached, or the connection broke and could not be set up again."""


class TimedOut(ComfyUIError, TimeoutError):
    """The server, or a prompt, took longer than allowed."""


class Cancelled(ComfyUIError):
    """The prompt was taken out of the queue, or interrupted while it ran."""

    def __init__(self, message: str, prompt_id: str) -> None:
        super().__init__(message)
        self.prompt_id = prompt_id


class ExecutionError(ComfyUIError):
    """A node failed while the prompt ran."""

    def __init__(self, data: Mapping[str, Any]) -> None:
        self.prompt_id: str = str(data.get("prompt_id", ""))
        self.node_id: str = str(data.get("node_id", ""))
        self.node_type: str = str(data.get("node_type", ""))
        self.exception_type: str = str(data.get("exception_type", ""))
        self.message: str = str(data.get("exception_message", "")).strip()
        self.traceback: list[str] = [str(line) for line in data.get("traceback") or []]
        where = f"node {self.node_id} ({self.node_type}): " if self.node_id else ""
        super().__init__(where + (self.message or "the prompt failed without a message"))


class ServerError(ComfyUIError):
    """The server answered with an error status."""

    def __init__(self, status: int, message: str, body: Any = None) -> None:
        super().__init__(f"HTTP {status}: {message}" if message else f"HTTP {status}")
        self.status = status
        self.message = message
        self.body = body


class Unauthorized(ServerError):
    """401 or 403: the key is missing or wrong, or the server doesn't talk to this client."""


class NotFound(ServerError):
    """404."""


class Busy(ServerError):
    """429 or 503, still after all retries."""


class ValidationError(ServerError):
    """400 to a prompt: the server says which node and which input it refuses.

    ``node_errors`` is the server's table: node id to ``{"class_type": ..., "errors": [...]}``.
    """

    def __init__(self, status: int, body: Mapping[str, Any]) -> None:
        error = body.get("error")
        details: Mapping[str, Any] = error if isinstance(error, Mapping) else {"message": str(error)}
        self.type: str = str(details.get("type", ""))
        self.details: str = str(details.get("details", ""))
        found = body.get("node_errors")
        self.node_errors: dict[str, Any] = dict(found) if isinstance(found, Mapping) else {}
        lines = [str(details.get("message", "the prompt was refused"))]
        for node, what in self.node_errors.items():
            for fault in what.get("errors", []):
                lines.append(f"node {node} ({what.get('class_type')}): {fault.get('message')}: {fault.get('details')}")
        super().__init__(status, "; ".join(lines), body)
