// @stable-canvas/comfyui-client: appends ?clientId= to every request; by WebSocket, then the same prompt by polling.

import fs from "node:fs";
import path from "node:path";
import { Client } from "@stable-canvas/comfyui-client";
import WebSocket from "ws";

const [url, workflow, out] = process.argv.slice(2);
const graph = JSON.parse(fs.readFileSync(workflow));
graph[3].inputs.seed = 22;
const client = new Client({ api_host: new URL(url).host, WebSocket, fetch });
client.connect();
if (!(await client.getSDModels()).includes(graph[4].inputs.ckpt_name)) throw new Error("the model is not listed");
if (!(await client.getSamplers()).includes("euler")) throw new Error("the sampler is not listed");
for (const [name, run] of [["socket", client.enqueue(graph, {})], ["polling", client.enqueue_polling(graph, {})]]) {
  const [image] = (await run).images;
  const data = image.type === "buff" ? image.data : await (await fetch(image.data)).arrayBuffer();
  fs.writeFileSync(path.join(out, `${name}.png`), Buffer.from(data));
}
client.close();
process.exit(0);
