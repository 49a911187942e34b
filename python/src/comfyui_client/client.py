"""The client."""

from __future__ import annotations

import io
import os
import ssl
import threading
import time
import uuid
from contextlib import suppress
from typing import Any, Iterable, Mapping, Union
from urllib.parse import urlsplit

from PIL import Image

from .errors import ComfyUIError, NotFound, TimedOut
from .result import ImageRef, Result, images_of
from .transport import NoAnswer, Transport, backoff, multipart
from .watch import ProgressCallback, Watch, failure_of
from .workflow import Workflow

Graph = Union[Workflow, Mapping[str, Any]]
Picture = Union[str, "os.PathLike[str]", bytes, Image.Image]


class ComfyUIClient:
    """A server that speaks ComfyUI's API.

    ``tls`` is true for the system's certificates, or an ``ssl.SSLContext``. ``api_key`` is sent as a
    bearer token. ``timeout`` is for one HTTP request, ``retries`` for what the server did not take.
    Methods may be called from several threads.
    """

    def __init__(
        self,
        host: str = "localhost",
        port: int = 8188,
        *,
        api_key: str | None = None,
        tls: bool | ssl.SSLContext = False,
        timeout: float = 30.0,
        retries: int = 4,
        client_id: str | None = None,
        path_prefix: str = "",
        headers: Mapping[str, str] | None = None,
    ) -> None:
        context = ssl.create_default_context() if tls is True else tls or None
        self.transport = Transport(
            host, port, context, api_key, timeout, retries, path_prefix.rstrip("/"), dict(headers or {})
        )
        #: The id under which all runs listen; without it each run takes one of its own, which is safer:
        #: ComfyUI forgets a new socket when an older one with the same id closes.
        self.client_id = client_id

    @classmethod
    def from_url(cls, url: str, **options: Any) -> ComfyUIClient:
        """A client for ``http://host:port`` or ``https://host/prefix``."""
        parts = urlsplit(url if "://" in url else f"http://{url}")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"{url!r} is no http:// or https:// address")
        is_tls = parts.scheme == "https"
        options.setdefault("tls", is_tls)
        return cls(parts.hostname, parts.port or (443 if is_tls else 80), path_prefix=parts.path, **options)

    # Workflows

    def load_workflow(self, path: str | os.PathLike[str]) -> Workflow:
        """Reads a workflow in API format from a JSON file, or from a picture that carries it."""
        return Workflow.load(path)

    def execute_workflow(
        self,
        workflow: Graph,
        *,
        timeout: float | None = None,
        on_progress: ProgressCallback | None = None,
        extra_data: Mapping[str, Any] | None = None,
        front: bool = False,
        interrupt_on_timeout: bool = True,
        stop: threading.Event | None = None,
    ) -> Result:
        """Queues a workflow and waits for its end.

        Raises ``ValidationError`` if the server refuses it, ``ExecutionError`` if a node fails,
        ``Cancelled`` if it is interrupted or taken out of the queue, and ``TimedOut`` after ``timeout``
        seconds; the prompt is then stopped unless ``interrupt_on_timeout`` is false. Setting ``stop``
        from another thread ends the wait likewise.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        watch = Watch(self, Workflow.parse(dict(workflow)), on_progress, stop)
        prompt_id = ""
        try:
            watch.connect()
            prompt_id = self.queue_prompt(
                workflow, extra_data=extra_data, front=front, client_id=watch.client_id
            )
            return watch.follow(prompt_id, deadline)
        except BaseException as error:
            is_ours = isinstance(error, (TimedOut, KeyboardInterrupt)) or watch.stop.is_set()
            if prompt_id and is_ours and interrupt_on_timeout:
                with suppress(ComfyUIError):
                    self.cancel(prompt_id)
            raise
        finally:
            watch.close()

    def queue_prompt(
        self,
        workflow: Graph,
        *,
        extra_data: Mapping[str, Any] | None = None,
        front: bool = False,
        prompt_id: str | None = None,
        client_id: str | None = None,
    ) -> str:
        """Queues a workflow without waiting; its prompt id.

        The id is chosen here, so that a request whose answer got lost is not queued twice.
        """
        prompt_id = prompt_id or str(uuid.uuid4())
        client_id = client_id or self.client_id or uuid.uuid4().hex
        body: dict[str, Any] = {"prompt": workflow, "client_id": client_id, "prompt_id": prompt_id}
        if extra_data:
            body["extra_data"] = dict(extra_data)
        if front:
            body["front"] = True
        pauses = backoff(self.transport.retries)
        while True:
            try:
                return str(self.transport.request("POST", "/prompt", json_body=body).json()["prompt_id"])
            except NoAnswer:
                pause = next(pauses, None)
                if pause is None:
                    raise
                time.sleep(pause)
                if self._is_known(prompt_id):
                    return prompt_id

    def _is_known(self, prompt_id: str) -> bool:
        queued = any(row[1] == prompt_id for rows in self.get_queue().values() for row in rows)
        return queued or prompt_id in self.get_history(prompt_id)

    def wait(self, prompt_id: str, *, timeout: float | None = None, poll_interval: float = 0.5) -> Result:
        """Waits for a prompt that was queued before, by asking for it again and again."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            entry = self.get_history(prompt_id).get(prompt_id)
            if entry is not None:
                failure = failure_of(entry, prompt_id)
                if failure is not None:
                    raise failure
                return Result(prompt_id, entry)
            if not self._is_known(prompt_id):
                raise NotFound(404, f"prompt {prompt_id} is neither in the queue nor in the history")
            if deadline is not None and time.monotonic() >= deadline:
                raise TimedOut(f"prompt {prompt_id} is not done in time")
            time.sleep(poll_interval)

    # Pictures

    def get_images(self, result: Mapping[str, Any] | str) -> list[Image.Image]:
        """The pictures of a result (or of a history entry, or of a prompt id), loaded."""
        if isinstance(result, str):
            result = Result(result, self.get_history(result).get(result) or {})
        pictures = [self.get_image_data(image) for image in images_of(result)]
        pictures += result.frames if isinstance(result, Result) else []
        return [_open(data) for data in pictures]

    def get_image_data(self, image: ImageRef | Mapping[str, Any], *, preview: str | None = None) -> bytes:
        """A picture's file; with ``preview="webp;80"`` a smaller form of it."""
        if not isinstance(image, ImageRef):
            image = ImageRef(image["filename"], image.get("subfolder") or "", image.get("type") or "output")
        query = {"filename": image.filename, "subfolder": image.subfolder, "type": image.type, "preview": preview}
        return self.transport.request("GET", "/view", query=query).body

    def upload_image(
        self,
        image: Picture,
        *,
        name: str | None = None,
        subfolder: str = "",
        overwrite: bool = False,
        type: str = "input",
    ) -> str:
        """Uploads a picture (path, bytes or Pillow image); the name to give to ``LoadImage``."""
        if isinstance(image, Image.Image):
            buffer = io.BytesIO()
            image.save(buffer, "PNG")
            data, name = buffer.getvalue(), name or f"{uuid.uuid4().hex}.png"
        elif isinstance(image, bytes):
            data, name = image, name or f"{uuid.uuid4().hex}.png"
        else:
            with open(image, "rb") as file:
                data, name = file.read(), name or os.path.basename(os.fspath(image))
        fields = {"type": type, "subfolder": subfolder, "overwrite": "true" if overwrite else "false"}
        body, kind = multipart(fields, name, data)
        answer = self.transport.request("POST", "/upload/image", body=body, headers={"Content-Type": kind}).json()
        return f"{answer['subfolder']}/{answer['name']}" if answer.get("subfolder") else str(answer["name"])

    # Queue, history, server

    def get_queue(self) -> dict[str, list[Any]]:
        """``{"queue_running": rows, "queue_pending": rows}``; a row's second item is the prompt id."""
        queue: dict[str, list[Any]] = self.transport.request("GET", "/queue").json()
        return queue

    def get_history(self, prompt_id: str | None = None, *, max_items: int | None = None) -> dict[str, Any]:
        """Finished prompts by id; empty for one that is not done."""
        path = "/history" if prompt_id is None else f"/history/{prompt_id}"
        history: dict[str, Any] = self.transport.request("GET", path, query={"max_items": max_items}).json()
        return history

    def delete_history(self, prompt_ids: Iterable[str] | None = None) -> None:
        """Forgets prompts; all of them without ids."""
        self.transport.request("POST", "/history", json_body=_selection(prompt_ids))

    def delete_queued(self, prompt_ids: Iterable[str] | None = None) -> None:
        """Takes waiting prompts out of the queue; all of them without ids."""
        self.transport.request("POST", "/queue", json_body=_selection(prompt_ids))

    def interrupt(self, prompt_id: str | None = None) -> None:
        """Stops what runs; with an id only if it is that prompt."""
        body = {} if prompt_id is None else {"prompt_id": prompt_id}
        self.transport.request("POST", "/interrupt", json_body=body)

    def cancel(self, prompt_id: str) -> None:
        """Takes a prompt out of the queue, or stops it if it runs already."""
        self.delete_queued([prompt_id])
        if any(row[1] == prompt_id for row in self.get_queue()["queue_running"]):
            self.interrupt(prompt_id)

    def free(self, *, unload_models: bool = True, free_memory: bool = True) -> None:
        """Gives models' memory back."""
        body = {"unload_models": unload_models, "free_memory": free_memory}
        self.transport.request("POST", "/free", json_body=body)

    def get_system_stats(self) -> dict[str, Any]:
        """Versions, memory and devices."""
        stats: dict[str, Any] = self.transport.request("GET", "/system_stats").json()
        return stats

    def get_object_info(self, node_class: str | None = None) -> dict[str, Any]:
        """The node classes, or one of them."""
        path = "/object_info" if node_class is None else f"/object_info/{node_class}"
        info: dict[str, Any] = self.transport.request("GET", path).json()
        return info

    def get_models(self, folder: str = "checkpoints") -> list[str]:
        """The files of a model folder."""
        models: list[str] = self.transport.request("GET", f"/models/{folder}").json()
        return models


def _selection(prompt_ids: Iterable[str] | None) -> dict[str, Any]:
    return {"clear": True} if prompt_ids is None else {"delete": list(prompt_ids)}


def _open(data: bytes) -> Image.Image:
    picture = Image.open(io.BytesIO(data))
    picture.load()
    return picture
