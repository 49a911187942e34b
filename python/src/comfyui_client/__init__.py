"""A typed client for ComfyUI's API; works with kiln and with ComfyUI.

    from comfyui_client import ComfyUIClient

    client = ComfyUIClient(host="localhost", port=8188)
    workflow = client.load_workflow("workflow_api.json")
    result = client.execute_workflow(workflow)
    client.get_images(result)[0].save("picture.png")
"""

from ._version import __version__
from .aio import AsyncComfyUIClient
from .client import ComfyUIClient
from .errors import (
    Busy,
    Cancelled,
    ComfyUIError,
    ConnectionFailed,
    ExecutionError,
    NotFound,
    ServerError,
    TimedOut,
    Unauthorized,
    ValidationError,
    WorkflowError,
)
from .result import ImageRef, Progress, Result
from .workflow import Workflow

__all__ = [
    "AsyncComfyUIClient",
    "Busy",
    "Cancelled",
    "ComfyUIClient",
    "ComfyUIError",
    "ConnectionFailed",
    "ExecutionError",
    "ImageRef",
    "NotFound",
    "Progress",
    "Result",
    "ServerError",
    "TimedOut",
    "Unauthorized",
    "ValidationError",
    "Workflow",
    "WorkflowError",
    "__version__",
]
