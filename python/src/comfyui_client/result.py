"""What a run gives: progress while it lasts, a result at its end."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Mapping

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class Progress:
    """Where a prompt stands. Told whenever something changes."""

    prompt_id: str
    #: "queued", "running" or "done".
    state: str
    #: The node that runs, and its title.
    node_id: str | None = None
    title: str | None = None
    #: Steps of that node, if it counts any.
    step: int = 0
    steps: int = 0
    #: Nodes of the workflow that are done (run or taken from the cache), and all of them.
    nodes_done: int = 0
    nodes: int = 0
    #: Prompts in the server's queue, the running one included.
    queue_remaining: int = 0
    #: A picture of the current step, if the server makes previews.
    preview: Image | None = field(default=None, repr=False, compare=False)

    @property
    def fraction(self) -> float:
        """How much of the prompt is done, 0 to 1, every node counted alike."""
        if self.state == "done":
            return 1.0
        part = self.step / self.steps if self.steps else 0.0
        return min(1.0, (self.nodes_done + part) / self.nodes) if self.nodes else 0.0


@dataclass(frozen=True)
class ImageRef:
    """A picture on the server."""

    filename: str
    subfolder: str = ""
    type: str = "output"
    node_id: str = ""


class Result(dict[str, Any]):
    """A finished prompt: its history entry, and what is in it by name."""

    def __init__(self, prompt_id: str, entry: Mapping[str, Any], frames: list[bytes] | None = None) -> None:
        super().__init__(entry)
        self["prompt_id"] = prompt_id
        self.prompt_id = prompt_id
        #: Pictures that came over the WebSocket instead of as files (node ``SaveImageWebsocket``).
        self.frames: list[bytes] = frames or []

    @property
    def outputs(self) -> dict[str, dict[str, Any]]:
        """What each output node gave, by node id."""
        return self.get("outputs") or {}

    @property
    def images(self) -> list[ImageRef]:
        """The pictures on the server, in the order of the nodes."""
        return images_of(self)


def images_of(entry: Mapping[str, Any]) -> list[ImageRef]:
    """The pictures of a history entry."""
    return [
        ImageRef(item["filename"], item.get("subfolder") or "", item.get("type") or "output", str(node_id))
        for node_id, output in (entry.get("outputs") or {}).items()
        for item in output.get("images") or []
        if isinstance(item, dict) and "filename" in item
    ]
