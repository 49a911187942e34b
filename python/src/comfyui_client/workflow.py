"""Workflows in API format, as dictionaries that know their nodes by id and by title."""

from __future__ import annotations

import copy
import json
import os
from typing import Any, Union

from .errors import WorkflowError

NodeKey = Union[str, int]


class Workflow(dict[str, Any]):
    """A graph in API format: node id to ``{"class_type", "inputs", "_meta"}``.

    It is a plain ``dict`` in every other respect, so ``workflow["6"]["inputs"]["text"] = "..."``
    works as well.
    """

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Workflow:
        """Reads a JSON file, or a PNG that carries the prompt it was made from."""
        with open(path, "rb") as file:
            data = file.read()
        text: str | bytes = _prompt_of_png(path) if data.startswith(b"\x89PNG") else data
        try:
            return cls.parse(json.loads(text))
        except (ValueError, WorkflowError) as error:
            raise WorkflowError(f"{os.fspath(path)}: {error}") from error

    @classmethod
    def parse(cls, value: Any) -> Workflow:
        """Checks a decoded JSON value; the body of a ``POST /prompt`` will do too."""
        if isinstance(value, dict) and isinstance(value.get("prompt"), dict) and "class_type" not in value["prompt"]:
            value = value["prompt"]
        if not isinstance(value, dict):
            raise WorkflowError(f"a workflow is a JSON object, not {type(value).__name__}")
        if isinstance(value.get("nodes"), list):
            raise WorkflowError("this is the web page's own format; export it with 'Export (API)'")
        for node_id, node in value.items():
            if not isinstance(node, dict) or "class_type" not in node:
                raise WorkflowError(f"node {node_id!r} has no class_type")
        return cls(value)

    def copy(self) -> Workflow:
        """A deep copy: changes to it don't touch this workflow."""
        return Workflow(copy.deepcopy(dict(self)))

    def title(self, node_id: str) -> str:
        """A node's title, or its class if it has none."""
        node = self[node_id]
        return str((node.get("_meta") or {}).get("title") or node.get("class_type"))

    def find(self, node: NodeKey) -> str:
        """The id of a node by id, by title, or by class; title and class must be unambiguous."""
        key = str(node)
        if key in self:
            return key
        for names in (self.title, lambda i: str(self[i].get("class_type"))):
            found = [node_id for node_id in self if names(node_id) == key]
            if len(found) == 1:
                return found[0]
            if found:
                raise WorkflowError(f"{key!r} names {len(found)} nodes: {', '.join(found)}; use the id")
        known = ", ".join(f"{node_id} ({self.title(node_id)})" for node_id in self)
        raise WorkflowError(f"no node has the id, title or class {key!r}; there are {known}")

    def get_input(self, node: NodeKey, name: str) -> Any:
        """The value of a node's input."""
        inputs = self[self.find(node)].get("inputs", {})
        if name not in inputs:
            raise WorkflowError(f"node {node} has no input {name!r}; it has {', '.join(inputs)}")
        return inputs[name]

    def set_input(self, node: NodeKey, name: str, value: Any, *, add: bool = False) -> Workflow:
        """Sets a node's input, found by node id or title; returns the workflow, for chains.

        A name that the node doesn't have yet is taken for a mistake unless ``add`` is true.
        """
        if not add:
            self.get_input(node, name)
        self[self.find(node)].setdefault("inputs", {})[name] = value
        return self


def _prompt_of_png(path: str | os.PathLike[str]) -> str:
    from PIL import Image

    with Image.open(path) as image:
        text = image.info.get("prompt")
    if not isinstance(text, str):
        raise WorkflowError(f"{os.fspath(path)}: the picture carries no prompt")
    return text
