// The server as this page sees it: requests, pictures' addresses, and the WebSocket.

import { parseJson, toJson } from "./workflow.js";

const KEY = "kiln-key";
let key = sessionStorage.getItem(KEY);
const given = new URLSearchParams(location.search).get("token");
if (given) {
  remember(given);
  history.replaceState(null, "", location.pathname);
}
let askForKey = async () => {};

export function remember(value) {
  key = value;
  sessionStorage.setItem(KEY, value);
}

/** Who is asked when the server wants a key: an async function that ends when there is a new one. */
export function onKeyWanted(ask) {
  askForKey = ask;
}

/** A refusal, with the server's words. */
export class Refusal extends Error {}

function wordsOf(status, text) {
  try {
    const body = JSON.parse(text);
    const lines = [body.error?.message ?? body.error ?? body.message ?? text];
    for (const [id, node] of Object.entries(body.node_errors ?? {}))
      for (const fault of node.errors) lines.push(`${node.class_type} (${id}): ${fault.message}: ${fault.details}`);
    return lines.join("\n");
  } catch {
    return text || `the server answered ${status}`;
  }
}

async function request(path, options = {}) {
  const headers = key ? { Authorization: `Bearer ${key}` } : {};
  const response = await fetch(path, { ...options, headers });
  if (response.status === 401) {
    await askForKey();
    return request(path, options);
  }
  if (!response.ok) throw new Refusal(wordsOf(response.status, await response.text()));
  return response;
}

export const get = async (path) => parseJson(await (await request(path)).text());

export async function post(path, body) {
  const text = await (await request(path, { method: "POST", body: toJson(body) })).text();
  return text ? parseJson(text) : null;
}

/** The address of a picture; `preview` is a form such as "webp;80". */
export function pictureUrl({ filename, subfolder = "", type = "output" }, preview) {
  const query = new URLSearchParams({ filename, subfolder, type });
  if (preview) query.set("preview", preview);
  if (key) query.set("token", key);
  return `view?${query}`;
}

/** One id a tab, so that a reload hears the rest of its own jobs. */
export const clientId = (() => {
  const name = "kiln-client";
  // randomUUID needs https or localhost, and this page is also opened by address
  const fresh = () => Array.from(crypto.getRandomValues(new Uint8Array(16)), (b) => b.toString(16).padStart(2, "0")).join("");
  const id = sessionStorage.getItem(name) ?? fresh();
  sessionStorage.setItem(name, id);
  return id;
})();

/** Keeps a WebSocket open. `tell(type, data)` hears messages, "picture" for previews, and "open" and "closed". */
export function listen(tell, pause = 500) {
  const url = new URL("ws", location.href);
  url.protocol = url.protocol.replace("http", "ws");
  url.searchParams.set("clientId", clientId);
  if (key) url.searchParams.set("token", key);
  const socket = new WebSocket(url);
  socket.binaryType = "arraybuffer";
  socket.onopen = () => {
    pause = 500;
    socket.send(JSON.stringify({ type: "feature_flags", data: { supports_preview_metadata: true } }));
    tell("open", {});
  };
  socket.onclose = () => {
    tell("closed", {});
    setTimeout(() => listen(tell, Math.min(pause * 2, 10_000)), pause);
  };
  socket.onmessage = ({ data }) => {
    if (typeof data === "string") {
      const message = JSON.parse(data);
      tell(message.type, message.data ?? {});
    } else {
      const picture = pictureOf(data);
      if (picture) tell("picture", picture);
    }
  };
}

/** Event 1: format and picture. Event 4: length of a JSON header, the header, the picture. */
function pictureOf(buffer) {
  const view = new DataView(buffer);
  const [event, second] = [view.getUint32(0), view.getUint32(4)];
  if (event === 1) return { blob: new Blob([buffer.slice(8)], { type: second === 2 ? "image/png" : "image/jpeg" }) };
  if (event !== 4) return null;
  const header = JSON.parse(new TextDecoder().decode(buffer.slice(8, 8 + second)));
  return { blob: new Blob([buffer.slice(8 + second)], { type: header.image_type }), promptId: header.prompt_id };
}
