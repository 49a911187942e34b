"""Following one prompt over ``/ws``, with ``/history`` as the judge.

The WebSocket gives progress; whether a prompt is done, failed or gone is read from
``/history`` and ``/queue``. So a broken or silent WebSocket costs progress, never the result.
"""

from __future__ import annotations

import io
import json
import threading
import time
import uuid
from typing import TYPE_CHECKING, Any, Callable, Mapping

from PIL import Image

from .errors import Cancelled, ComfyUIError, ConnectionFailed, ExecutionError, TimedOut
from .result import Progress, Result
from .transport import backoff
from .workflow import Workflow

if TYPE_CHECKING:
    from .client import ComfyUIClient
    from .websocket import WebSocket

ProgressCallback = Callable[[Progress], Any]

#: How often the stop flag and the deadline are looked at, in seconds.
_TICK = 0.25
#: After so long without a message, ``/queue`` and ``/history`` are asked.
_SILENCE = 2.0
#: How long a finished prompt may take to appear in ``/history``.
_HISTORY_WAIT = 15.0
_ENDS = ("execution_success", "execution_error", "execution_interrupted")


class Watch:
    """One prompt from its submission to its end."""

    def __init__(
        self,
        client: ComfyUIClient,
        workflow: Workflow,
        on_progress: ProgressCallback | None,
        stop: threading.Event | None,
    ) -> None:
        self.client = client
        self.workflow = workflow
        self.on_progress = on_progress
        self.stop = stop or threading.Event()
        self.client_id = client.client_id or uuid.uuid4().hex
        self.prompt_id = ""
        self.frames: list[bytes] = []
        self.done: set[str] = set()
        self.queue_remaining = 0
        self.node: str | None = None
        self.step, self.steps = 0, 0
        self.is_over = False
        self.failure: ComfyUIError | None = None
        self.socket: WebSocket | None = None

    def connect(self) -> None:
        """Opens the WebSocket; must come before the submission, or the first messages are missed."""
        pauses = backoff(self.client.transport.retries)
        while True:
            try:
                self.socket = self.client.transport.web_socket(self.client_id)
                flags = {"type": "feature_flags", "data": {"supports_preview_metadata": True}}
                self.socket.send(json.dumps(flags))
                return
            except ConnectionFailed:
                pause = next(pauses, None)
                if pause is None or self.stop.wait(pause):
                    raise

    def close(self) -> None:
        """Closes the WebSocket."""
        if self.socket:
            self.socket.close()

    def follow(self, prompt_id: str, deadline: float | None) -> Result:
        """Waits for the end of a prompt."""
        self.prompt_id = prompt_id
        self._tell("queued")
        last_heard = time.monotonic()
        while not self.is_over:
            if self.stop.is_set():
                raise Cancelled("the wait was given up", prompt_id)
            if deadline is not None and time.monotonic() >= deadline:
                raise TimedOut(f"prompt {prompt_id} is not done in time")
            message = self._receive()
            if message is not None:
                last_heard = time.monotonic()
                self._take(message)
            elif time.monotonic() - last_heard > _SILENCE:
                last_heard = time.monotonic()
                if self._is_gone():
                    break
        return self._finish()

    def _receive(self) -> str | bytes | None:
        """The next message. A lost connection is set up again; a server that stays away fails in ``_is_gone``."""
        if self.socket is None:
            self.stop.wait(_TICK)
            try:
                self.connect()
            except ConnectionFailed:
                return None
        try:
            return self.socket.receive(_TICK) if self.socket else None
        except ConnectionFailed:
            self.close()
            self.socket = None
            return None

    def _is_gone(self) -> bool:
        """Whether the prompt neither waits nor runs. The queue is asked first: prompts move from it to history."""
        queue = self.client.get_queue()
        return all(row[1] != self.prompt_id for rows in queue.values() for row in rows)

    def _finish(self) -> Result:
        entry: Mapping[str, Any] | None = None
        until = time.monotonic() + (_HISTORY_WAIT if self.is_over else 1.0)
        while entry is None and self.failure is None:
            entry = self.client.get_history(self.prompt_id).get(self.prompt_id)
            if entry is None:
                if time.monotonic() > until:
                    raise Cancelled("the prompt is neither in the queue nor in the history", self.prompt_id)
                time.sleep(0.05)
        if self.failure is None and entry is not None:
            self.failure = failure_of(entry, self.prompt_id)
        if self.failure is not None:
            raise self.failure
        self._tell("done")
        return Result(self.prompt_id, entry or {}, self.frames)

    def _take(self, message: str | bytes) -> None:
        if isinstance(message, bytes):
            self._take_frame(message)
            return
        try:
            event = json.loads(message)
            kind, data = event["type"], event.get("data") or {}
        except (ValueError, KeyError, TypeError):
            return
        if kind == "status":
            info = (data.get("status") or {}).get("exec_info") or {}
            self.queue_remaining = int(info.get("queue_remaining") or 0)
            if self.node is None and not self.done:
                self._tell("queued")
            return
        if data.get("prompt_id") != self.prompt_id:
            return
        if kind == "execution_cached":
            self.done.update(map(str, data.get("nodes") or []))
            self._tell("running")
        elif kind == "executing":
            self._enter(data.get("node"))
        elif kind == "progress":
            self.step, self.steps = int(data.get("value") or 0), int(data.get("max") or 0)
            self._tell("running")
        elif kind == "executed":
            self.done.add(str(data.get("node")))
            self._tell("running")
        elif kind in _ENDS:
            self.is_over = True
            if kind != "execution_success":
                self.failure = failure_of_event(kind, data, self.prompt_id)

    def _enter(self, node: Any) -> None:
        if self.node is not None:
            self.done.add(self.node)
        self.node = None if node is None else str(node)
        self.step, self.steps = 0, 0
        if self.node is None:
            self.is_over = True
        else:
            self._tell("running")

    def _take_frame(self, frame: bytes) -> None:
        """Event 1: a picture. Event 4: a picture after a JSON header. Others are not for us."""
        kind, size = int.from_bytes(frame[:4], "big"), int.from_bytes(frame[4:8], "big")
        if kind == 4:
            try:
                header = json.loads(frame[8 : 8 + size])
            except ValueError:
                return
            if header.get("prompt_id") == self.prompt_id:
                self._tell("running", frame[8 + size :])
        elif kind == 1 and self.node is not None:
            if (self.workflow.get(self.node) or {}).get("class_type") == "SaveImageWebsocket":
                self.frames.append(frame[8:])
            else:
                self._tell("running", frame[8:])

    def _tell(self, state: str, preview: bytes | None = None) -> None:
        if self.on_progress is None:
            return
        picture: Image.Image | None = None
        if preview:
            try:
                picture = Image.open(io.BytesIO(preview))
                picture.load()
            except (OSError, ValueError):
                picture = None
        title = self.workflow.title(self.node) if self.node and self.node in self.workflow else None
        nodes_done = len(self.workflow) if state == "done" else len(self.done & set(self.workflow))
        self.on_progress(
            Progress(
                prompt_id=self.prompt_id,
                state=state,
                node_id=self.node,
                title=title,
                step=self.step,
                steps=self.steps,
                nodes_done=nodes_done,
                nodes=len(self.workflow),
                queue_remaining=self.queue_remaining,
                preview=picture,
            )
        )


def failure_of_event(kind: str, data: Mapping[str, Any], prompt_id: str) -> ComfyUIError:
    """The error that ``execution_error`` or ``execution_interrupted`` stands for."""
    if kind == "execution_interrupted":
        return Cancelled(f"prompt {prompt_id} was interrupted", prompt_id)
    return ExecutionError(data)


def failure_of(entry: Mapping[str, Any], prompt_id: str) -> ComfyUIError | None:
    """The error in a history entry, if the prompt failed."""
    status = entry.get("status") or {}
    if status.get("status_str") != "error":
        return None
    for kind, data in status.get("messages") or []:
        if kind in ("execution_error", "execution_interrupted"):
            return failure_of_event(kind, data, prompt_id)
    return ExecutionError({"prompt_id": prompt_id})
