"""The client against a real kiln process."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from pathlib import Path
from typing import Callable

import pytest
from PIL import Image

from comfyui_client import (
    AsyncComfyUIClient,
    Cancelled,
    ComfyUIClient,
    ExecutionError,
    NotFound,
    Progress,
    Result,
    TimedOut,
    ValidationError,
    Workflow,
)

Graph = Callable[..., Workflow]


def is_idle(client: ComfyUIClient) -> bool:
    return client.get_queue() == {"queue_running": [], "queue_pending": []}


def settle(client: ComfyUIClient) -> None:
    until = time.monotonic() + 30
    while not is_idle(client):
        assert time.monotonic() < until, client.get_queue()
        time.sleep(0.05)


def test_the_documented_lines(port: int, graph: Graph, tmp_path: Path) -> None:
    path = tmp_path / "workflow.json"
    path.write_text(json.dumps(graph()))

    client = ComfyUIClient(host="localhost", port=port)
    workflow = client.load_workflow(path)
    result = client.execute_workflow(workflow)
    images = client.get_images(result)

    assert [(i.size, i.mode, i.format) for i in images] == [((64, 64), "RGB", "PNG")]
    assert result["status"]["status_str"] == "success" and list(result.outputs) == ["9"]
    assert result.images[0].filename.startswith("sdk_") and result.images[0].node_id == "9"
    assert client.get_images(result.prompt_id)[0].tobytes() == images[0].tobytes()


def test_progress_is_real(client: ComfyUIClient, graph: Graph) -> None:
    seen: list[Progress] = []
    client.execute_workflow(graph(steps=5), on_progress=seen.append)
    steps = [p.step for p in seen if p.title == "Sampler" and p.step and p.preview is None]
    assert sorted(set(steps)) == [1, 2, 3, 4, 5] and steps == sorted(steps)
    assert {p.steps for p in seen if p.step} == {5}
    fractions = [p.fraction for p in seen]
    assert fractions == sorted(fractions) and fractions[-1] == 1.0 and len(set(fractions)) >= 8
    assert (seen[0].state, seen[-1].state) == ("queued", "done")
    previews = [p.preview for p in seen if p.preview]
    # as large as --preview-size says, like ComfyUI's
    assert [p.size for p in previews] == [(512, 512)] * 5


def test_a_cached_run_gives_the_picture_again(client: ComfyUIClient, graph: Graph) -> None:
    workflow = graph()
    first = client.execute_workflow(workflow)
    again = client.execute_workflow(workflow)
    assert again.prompt_id != first.prompt_id and again.images == first.images


def test_a_picture_carries_its_workflow(client: ComfyUIClient, graph: Graph, tmp_path: Path) -> None:
    workflow = graph()
    result = client.execute_workflow(workflow)
    path = tmp_path / "picture.png"
    path.write_bytes(client.get_image_data(result.images[0]))
    assert client.load_workflow(path) == workflow


def test_refusals_name_node_and_input(client: ComfyUIClient, graph: Graph) -> None:
    workflow = graph().set_input("Load Checkpoint", "ckpt_name", "missing.safetensors")
    with pytest.raises(ValidationError, match=r"node 4 \(CheckpointLoaderSimple\).*missing\.safetensors") as error:
        client.execute_workflow(workflow)
    assert error.value.status == 400 and error.value.type == "prompt_outputs_failed_validation"
    assert error.value.node_errors["4"]["errors"][0]["type"] == "value_not_in_list"


def test_failures_name_the_node(client: ComfyUIClient) -> None:
    name = client.upload_image(b"this is no picture", name="broken.png")
    workflow = {
        "1": {"class_type": "LoadImage", "inputs": {"image": name}},
        "2": {"class_type": "PreviewImage", "inputs": {"images": ["1", 0]}},
    }
    with pytest.raises(ExecutionError) as error:
        client.execute_workflow(workflow)
    assert (error.value.node_id, error.value.node_type) == ("1", "LoadImage")
    assert error.value.message and error.value.traceback
    with pytest.raises(ExecutionError):
        client.wait(error.value.prompt_id)


def test_uploads_come_back(client: ComfyUIClient) -> None:
    picture = Image.new("RGB", (19, 7), (250, 120, 3))
    name = client.upload_image(picture, name="orange.png", subfolder="sdk", overwrite=True)
    assert name == "sdk/orange.png"
    workflow = {
        "1": {"class_type": "LoadImage", "inputs": {"image": name}},
        "2": {"class_type": "PreviewImage", "inputs": {"images": ["1", 0]}},
    }
    result = client.execute_workflow(workflow)
    assert result.images[0].type == "temp"
    assert client.get_images(result)[0].tobytes() == picture.tobytes()


def test_a_timeout_stops_the_prompt(client: ComfyUIClient, graph: Graph) -> None:
    with pytest.raises(TimedOut):
        client.execute_workflow(graph(steps=10_000), timeout=1.0)
    settle(client)


def test_interrupt_and_cancel(client: ComfyUIClient, graph: Graph) -> None:
    outcomes: list[BaseException] = []

    def run() -> None:
        try:
            client.execute_workflow(graph(steps=10_000))
        except BaseException as error:
            outcomes.append(error)

    runner = threading.Thread(target=run)
    runner.start()
    while not client.get_queue()["queue_running"]:
        time.sleep(0.02)
    waiting = threading.Thread(target=run)
    waiting.start()
    while not client.get_queue()["queue_pending"]:
        time.sleep(0.02)
    client.delete_queued([client.get_queue()["queue_pending"][0][1]])
    waiting.join(30)
    assert [type(e) for e in outcomes] == [Cancelled]
    client.interrupt()
    runner.join(30)
    assert [type(e) for e in outcomes] == [Cancelled, Cancelled]
    settle(client)


def test_queue_wait_history(client: ComfyUIClient, graph: Graph) -> None:
    prompt_id = client.queue_prompt(graph())
    result = client.wait(prompt_id, timeout=60)
    assert isinstance(result, Result) and len(client.get_images(result)) == 1
    assert list(client.get_history(prompt_id)) == [prompt_id]
    client.delete_history([prompt_id])
    assert client.get_history(prompt_id) == {}
    with pytest.raises(NotFound):
        client.wait(prompt_id)


def test_the_server_is_described(client: ComfyUIClient) -> None:
    assert "demo-sd.safetensors" in client.get_models("checkpoints")
    assert "required" in client.get_object_info("KSampler")["KSampler"]["input"]
    assert client.get_system_stats()["devices"][0]["type"] == "cpu"
    client.free()
    with pytest.raises(NotFound):
        client.get_models("no-such-folder")


def test_five_at_once(port: int, graph: Graph) -> None:
    async def main() -> list[Result]:
        async with AsyncComfyUIClient("127.0.0.1", port) as client:
            seen: dict[int, list[Progress]] = {i: [] for i in range(5)}
            runs = [client.execute_workflow(graph(), on_progress=seen[i].append) for i in range(5)]
            results = await asyncio.gather(*runs)
            for run, result in zip(seen.values(), results):
                assert {p.prompt_id for p in run} == {result.prompt_id} and run[-1].state == "done"
            pictures = [await client.get_images(result) for result in results]
            assert [len(p) for p in pictures] == [1] * 5
            assert len({p[0].tobytes() for p in pictures}) == 5
            return results

    assert len({r.prompt_id for r in asyncio.run(main())}) == 5


def test_streaming_and_cancelling_a_task(port: int, graph: Graph, client: ComfyUIClient) -> None:
    async def main() -> None:
        async with AsyncComfyUIClient("127.0.0.1", port) as server:
            items = [item async for item in server.stream(graph())]
            assert isinstance(items[-1], Result) and all(isinstance(i, Progress) for i in items[:-1])
            started = asyncio.Event()
            task = asyncio.ensure_future(
                server.execute_workflow(graph(steps=10_000), on_progress=lambda p: p.step and started.set())
            )
            await asyncio.wait_for(started.wait(), 30)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    asyncio.run(main())
    settle(client)
