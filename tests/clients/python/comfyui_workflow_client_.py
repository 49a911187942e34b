"""comfyui-workflow-client: its WebSocket flavour, then its polling flavour."""

import asyncio
import sys
from pathlib import Path

from comfyuiclient import ComfyUIClient, ComfyUIClientAsync

url, workflow, out = sys.argv[1].split("//")[1], sys.argv[2], Path(sys.argv[3])


async def by_socket():
    client = ComfyUIClientAsync(url, workflow)
    await client.connect()
    try:
        await client.set_data(key="KSampler", seed=12)
        return await client.generate(["Save Image"])
    finally:
        await client.close()


asyncio.run(by_socket())["Save Image"].save(out / "socket.png")

client = ComfyUIClient(url, workflow)
client.connect()
client.set_data(key="KSampler", seed=13)
client.generate(["Save Image"])["Save Image"].save(out / "polling.png")
client.close()
