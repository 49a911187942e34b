"""comfy-api-simplified: posts before it connects, and takes any binary frame for the result."""

import json
import sys
from pathlib import Path

from comfy_api_simplified import ComfyApiWrapper, ComfyWorkflowWrapper

url, workflow, out = sys.argv[1], sys.argv[2], Path(sys.argv[3])
server = ComfyApiWrapper(url)
graph = ComfyWorkflowWrapper(json.loads(Path(workflow).read_text()))
graph.set_node_param("KSampler", "seed", 11)
for name, data in server.queue_and_wait_images(graph, "Save Image").items():
    (out / name).write_bytes(data)
