"""A real kiln process for the tests, with previews, on a free port."""

from __future__ import annotations

import os
import re
import subprocess
import threading
from pathlib import Path
from typing import Any, Callable, Iterator

import pytest

from comfyui_client import ComfyUIClient, Workflow

ROOT = Path(__file__).resolve().parents[2]
KILN = os.environ.get("KILN_BIN", str(ROOT / "target/release/kiln"))
MODEL = "demo-sd.safetensors"


@pytest.fixture(scope="session")
def port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    base = tmp_path_factory.mktemp("kiln")
    command = [KILN, "serve", "--cpu", "--port", "0", "--threads", "2", "--preview-method", "latent2rgb"]
    server = subprocess.Popen([*command, "--base-directory", str(base)], stderr=subprocess.PIPE, text=True)
    log: list[str] = []
    assert server.stderr is not None
    found = None
    for line in server.stderr:
        log.append(line)
        found = re.search(r"listening on http://127\.0\.0\.1:(\d+)", line)
        if found:
            break
    assert found, "".join(log)
    # The pipe must be read on, or the server blocks once it is full.
    threading.Thread(target=server.stderr.read, daemon=True).start()
    yield int(found[1])
    server.terminate()
    assert server.wait(90) == 0


@pytest.fixture
def client(port: int) -> ComfyUIClient:
    return ComfyUIClient("127.0.0.1", port)


@pytest.fixture
def graph() -> Callable[..., Workflow]:
    seeds = iter(range(int.from_bytes(os.urandom(4), "big"), 2**40))

    def make(**sampler: Any) -> Workflow:
        size = sampler.pop("size", 64)
        inputs = {
            "seed": next(seeds), "steps": 3, "cfg": 7.0, "sampler_name": "euler", "scheduler": "normal",
            "denoise": 1.0, "model": ["4", 0], "positive": ["6", 0], "negative": ["7", 0], "latent_image": ["5", 0],
        }  # fmt: skip
        latent = {"width": size, "height": size, "batch_size": 1}
        nodes = {
            "3": ("KSampler", "Sampler", {**inputs, **sampler}),
            "4": ("CheckpointLoaderSimple", "Load Checkpoint", {"ckpt_name": MODEL}),
            "5": ("EmptyLatentImage", "Size", latent),
            "6": ("CLIPTextEncode", "Positive", {"text": "a red circle", "clip": ["4", 1]}),
            "7": ("CLIPTextEncode", "Negative", {"text": "", "clip": ["4", 1]}),
            "8": ("VAEDecode", "Decode", {"samples": ["3", 0], "vae": ["4", 2]}),
            "9": ("SaveImage", "Save", {"filename_prefix": "sdk", "images": ["8", 0]}),
        }
        return Workflow(
            {i: {"class_type": c, "inputs": v, "_meta": {"title": t}} for i, (c, t, v) in nodes.items()}
        )

    return make
