"""pycomfy: takes pictures from `executed` only, so that message must come on cached runs too: it runs twice."""

import sys
from pathlib import Path

from pycomfy import ComfyAPI

url, workflow, out = sys.argv[1], sys.argv[2], Path(sys.argv[3])
for run in ("first", "cached"):
    with ComfyAPI(url) as server:
        for number, image in enumerate(server.load_workflow(workflow).execute(seed=15)):
            image.save(out / f"{run}-{number}.png")
assert len(list(out.glob("*.png"))) == 2, list(out.iterdir())
