"""Workflows without a server."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Callable

import pytest

import comfyui_client
from comfyui_client import Workflow, WorkflowError


def test_inputs_by_id_title_and_class(graph: Callable[..., Workflow]) -> None:
    workflow = graph()
    other = workflow.copy()
    other.set_input("6", "text", "by id").set_input("Size", "width", 128).set_input("KSampler", "steps", 9)
    other.set_input(7, "text", "by number")
    assert other["6"]["inputs"]["text"] == "by id" and other.get_input("7", "text") == "by number"
    assert other["5"]["inputs"]["width"] == 128 and other["3"]["inputs"]["steps"] == 9
    assert workflow["5"]["inputs"]["width"] == 64, "a copy is deep"


def test_mistakes_are_named(graph: Callable[..., Workflow]) -> None:
    workflow = graph()
    with pytest.raises(WorkflowError, match="'CLIPTextEncode' names 2 nodes: 6, 7"):
        workflow.set_input("CLIPTextEncode", "text", "x")
    with pytest.raises(WorkflowError, match=r"'Prompt'; there are 3 \(Sampler\), 4"):
        workflow.set_input("Prompt", "text", "x")
    with pytest.raises(WorkflowError, match="no input 'step'; it has seed, steps"):
        workflow.set_input("3", "step", 1)
    workflow.set_input("3", "step", 1, add=True)
    assert workflow["3"]["inputs"]["step"] == 1


def test_files(tmp_path: Path) -> None:
    path = tmp_path / "w.json"
    path.write_text('{"prompt": {"1": {"class_type": "A", "inputs": {}}}, "client_id": "x"}')
    assert Workflow.load(path) == {"1": {"class_type": "A", "inputs": {}}}
    for text, message in [
        ('{"nodes": [], "links": []}', "Export"),
        ("[1]", "JSON object, not list"),
        ('{"1": {"inputs": {}}}', "'1' has no class_type"),
        ("{", "w.json"),
    ]:
        path.write_text(text)
        with pytest.raises(WorkflowError, match=re.escape(message)):
            Workflow.load(path)


def test_the_version_is_the_crates() -> None:
    cargo = Path(__file__).resolve().parents[2] / "Cargo.toml"
    found = re.search(r'^version = "([^"]+)"', cargo.read_text(), re.MULTILINE)
    assert found and comfyui_client.__version__ == found[1]
