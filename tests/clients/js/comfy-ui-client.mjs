// comfy-ui-client: ends on `executing` with no node, then reads /history and /view.

import fs from "node:fs";
import path from "node:path";
import { ComfyUIClient } from "comfy-ui-client";

const [url, workflow, out] = process.argv.slice(2);
const graph = JSON.parse(fs.readFileSync(workflow));
graph[3].inputs.seed = 21;
const client = new ComfyUIClient(new URL(url).host, "kiln-client-test");
await client.connect();
await client.getSystemStats();
const outputs = await client.getImages(graph);
for (const { blob, image } of Object.values(outputs).flat())
  fs.writeFileSync(path.join(out, image.filename), Buffer.from(await blob.arrayBuffer()));
await client.disconnect();
process.exit(0);
