"""The client for asyncio: the same methods, awaited.

Each call runs on a thread of its own pool (the work is waiting, so threads are as good as
streams and the protocol code exists once). Cancelling a task stops its prompt.
"""

from __future__ import annotations

import asyncio
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, AsyncIterator, Callable, Iterable, Mapping, TypeVar

from PIL import Image

from .client import ComfyUIClient, Graph, Picture
from .result import Progress, Result
from .watch import ProgressCallback
from .workflow import Workflow

T = TypeVar("T")


class AsyncComfyUIClient:
    """See :class:`ComfyUIClient`; takes the same arguments, and how many prompts may be awaited at once."""

    def __init__(self, host: str = "localhost", port: int = 8188, *, max_waiting: int = 64, **options: Any) -> None:
        self.client = ComfyUIClient(host, port, **options)
        self._pool = ThreadPoolExecutor(max_waiting, "comfyui_client")

    async def __aenter__(self) -> AsyncComfyUIClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the threads that have nothing to do."""
        self._pool.shutdown(wait=False)

    async def _call(self, method: Callable[..., T], *args: Any, **named: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._pool, partial(method, *args, **named))

    async def load_workflow(self, path: str | os.PathLike[str]) -> Workflow:
        """See :meth:`ComfyUIClient.load_workflow`."""
        return await self._call(self.client.load_workflow, path)

    async def execute_workflow(
        self, workflow: Graph, *, on_progress: ProgressCallback | None = None, **options: Any
    ) -> Result:
        """See :meth:`ComfyUIClient.execute_workflow`. The callback runs on the event loop."""
        loop, stop = asyncio.get_running_loop(), threading.Event()

        def tell(progress: Progress) -> None:
            if on_progress is not None:
                loop.call_soon_threadsafe(on_progress, progress)

        callback = None if on_progress is None else tell
        try:
            return await self._call(
                self.client.execute_workflow, workflow, on_progress=callback, stop=stop, **options
            )
        except asyncio.CancelledError:
            stop.set()
            raise

    async def stream(self, workflow: Graph, **options: Any) -> AsyncIterator[Progress | Result]:
        """Progress as it comes and, last, the result."""
        queue: asyncio.Queue[Progress | None] = asyncio.Queue()
        task = asyncio.ensure_future(self.execute_workflow(workflow, on_progress=queue.put_nowait, **options))
        task.add_done_callback(lambda _: queue.put_nowait(None))
        try:
            while (progress := await queue.get()) is not None:
                yield progress
            yield await task
        finally:
            task.cancel()

    async def queue_prompt(self, workflow: Graph, **options: Any) -> str:
        """See :meth:`ComfyUIClient.queue_prompt`."""
        return await self._call(self.client.queue_prompt, workflow, **options)

    async def wait(self, prompt_id: str, **options: Any) -> Result:
        """See :meth:`ComfyUIClient.wait`."""
        return await self._call(self.client.wait, prompt_id, **options)

    async def get_images(self, result: Mapping[str, Any] | str) -> list[Image.Image]:
        """See :meth:`ComfyUIClient.get_images`."""
        return await self._call(self.client.get_images, result)

    async def upload_image(self, image: Picture, **options: Any) -> str:
        """See :meth:`ComfyUIClient.upload_image`."""
        return await self._call(self.client.upload_image, image, **options)

    async def get_queue(self) -> dict[str, list[Any]]:
        """See :meth:`ComfyUIClient.get_queue`."""
        return await self._call(self.client.get_queue)

    async def get_history(self, prompt_id: str | None = None, *, max_items: int | None = None) -> dict[str, Any]:
        """See :meth:`ComfyUIClient.get_history`."""
        return await self._call(self.client.get_history, prompt_id, max_items=max_items)

    async def delete_history(self, prompt_ids: Iterable[str] | None = None) -> None:
        """See :meth:`ComfyUIClient.delete_history`."""
        await self._call(self.client.delete_history, prompt_ids)

    async def delete_queued(self, prompt_ids: Iterable[str] | None = None) -> None:
        """See :meth:`ComfyUIClient.delete_queued`."""
        await self._call(self.client.delete_queued, prompt_ids)

    async def interrupt(self, prompt_id: str | None = None) -> None:
        """See :meth:`ComfyUIClient.interrupt`."""
        await self._call(self.client.interrupt, prompt_id)

    async def cancel(self, prompt_id: str) -> None:
        """See :meth:`ComfyUIClient.cancel`."""
        await self._call(self.client.cancel, prompt_id)

    async def free(self, *, unload_models: bool = True, free_memory: bool = True) -> None:
        """See :meth:`ComfyUIClient.free`."""
        await self._call(self.client.free, unload_models=unload_models, free_memory=free_memory)

    async def get_system_stats(self) -> dict[str, Any]:
        """See :meth:`ComfyUIClient.get_system_stats`."""
        return await self._call(self.client.get_system_stats)

    async def get_object_info(self, node_class: str | None = None) -> dict[str, Any]:
        """See :meth:`ComfyUIClient.get_object_info`."""
        return await self._call(self.client.get_object_info, node_class)

    async def get_models(self, folder: str = "checkpoints") -> list[str]:
        """See :meth:`ComfyUIClient.get_models`."""
        return await self._call(self.client.get_models, folder)
