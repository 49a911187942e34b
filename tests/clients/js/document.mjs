// The JavaScript of docs/api.md, as printed but for the address. KILN_DOCUMENT names the file.
import { readFileSync, writeFileSync } from "node:fs";

const [url, file, out] = process.argv.slice(2);
const printed = readFileSync(process.env.KILN_DOCUMENT, "utf8").match(/```js\n([^]*?)```/)[1];

// Node has a WebSocket of its own from version 22 on.
const Socket = globalThis.WebSocket ?? (await import("ws")).WebSocket;
const closed = new Promise((resolve) => {
  globalThis.WebSocket = class extends Socket {
    constructor(address) {
      super(address);
      this.addEventListener("close", resolve);
    }
  };
});
globalThis.workflow = JSON.parse(readFileSync(file, "utf8"));
const images = [];
const say = console.log;
console.log = (text, list) => {
  say(text, list ?? "");
  if (text === "images") images.push(...list);
};

const source = printed.replaceAll("127.0.0.1:8188", new URL(url).host);
await import(`data:text/javascript,${encodeURIComponent(source)}`);
await closed;
for (const [i, { filename, subfolder, type }] of images.entries()) {
  const answer = await fetch(`${url}/view?${new URLSearchParams({ filename, subfolder, type })}`);
  writeFileSync(`${out}/${i}.png`, Buffer.from(await answer.arrayBuffer()));
}
