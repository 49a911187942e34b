"""comfyui-xy: no client id, no WebSocket; asks /history until the prompt is there."""

import json
import sys
from pathlib import Path

from comfyui_xy import ComfyUiClient

url, workflow, out = sys.argv[1], json.loads(Path(sys.argv[2]).read_text()), Path(sys.argv[3])
workflow["3"]["inputs"]["seed"] = 14
with ComfyUiClient(url, raise_on_error=True, execution_timeout=120) as client:
    outputs = client.wait_for_execution(client.queue_prompt(workflow), check_interval=0.2)
    for image in outputs["9"]["images"]:
        data = client.get_image(image["filename"], image["subfolder"], image["type"])
        (out / image["filename"]).write_bytes(data)
