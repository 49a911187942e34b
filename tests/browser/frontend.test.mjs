// ComfyUI's official web pages on kiln: each opens, runs a workflow on the demo model, shows previews and picture, and
// sends a saved workflow as `kiln convert` makes it.
//
// KILN_FRONTENDS lists folders of the package's files (the last part but one of each path is its version).

import assert from "node:assert/strict";
import { execFileSync } from "node:child_process";
import fs from "node:fs";
import path from "node:path";
import { test } from "node:test";

import { fence, MODEL, openBrowser, shoot, startKiln, until } from "./browser.mjs";

const FRONTENDS = (process.env.KILN_FRONTENDS ?? "").split(path.delimiter).filter(Boolean);
const [SIZE, STEPS] = [128, 8];

// What ComfyUI itself answers in the same run (a first visit): nothing is saved yet, no styles of the user's own, no
// templates package; and what its pages then write into the console. The browser adds a line of its own to each 404.
const USUAL_ANSWERS = [
  /^404 GET \/(api\/)?userdata(\/|$)/, /^404 GET \/(api\/)?user\.css$/, /^404 GET \/templates\/index[\w.-]*\.json$/,
];
const USUAL_WORDS = [/Failed to load resource/, /net::ERR_FAILED/, /addSetting/];

const graph = {
  3: {
    class_type: "KSampler",
    inputs: {
      seed: 5, steps: STEPS, cfg: 5, sampler_name: "euler", scheduler: "normal", denoise: 1,
      model: ["4", 0], positive: ["6", 0], negative: ["7", 0], latent_image: ["5", 0],
    },
  },
  4: { class_type: "CheckpointLoaderSimple", inputs: { ckpt_name: MODEL } },
  5: { class_type: "EmptyLatentImage", inputs: { width: SIZE, height: SIZE, batch_size: 1 } },
  6: { class_type: "CLIPTextEncode", inputs: { text: "a red circle on a blue background", clip: ["4", 1] } },
  7: { class_type: "CLIPTextEncode", inputs: { text: "", clip: ["4", 1] } },
  8: { class_type: "VAEDecode", inputs: { samples: ["3", 0], vae: ["4", 2] } },
  9: { class_type: "SaveImage", inputs: { filename_prefix: "official", images: ["8", 0] } },
};

/** Waits until the page knows the server's nodes, and closes what greets a first visitor. */
async function boot(page, url) {
  await page.goto(url);
  const classes = Object.values(graph).map((node) => node.class_type);
  await until(page, (names) => window.app?.graph && names.every((n) => window.LiteGraph?.registered_node_types?.[n]),
    classes, 120_000);
  await page.waitForTimeout(2000);
  for (let i = 0; i < 4 && (await page.locator("[role=dialog]").count()); i += 1) {
    await page.keyboard.press("Escape");
    await page.waitForTimeout(500);
  }
}

/** The page's default workflow with the demo model; where that is one for other models, ours, opened as a file. */
async function openWorkflow(page) {
  await page.evaluate(() => window.app.extensionManager.command.execute("Comfy.LoadDefaultWorkflow"));
  await until(page, () => window.app.graph._nodes.length > 3);
  const isSd = await page.evaluate(() => window.app.graph._nodes.some((n) => n.type === "CheckpointLoaderSimple"));
  if (!isSd) {
    await page.keyboard.press("Escape");
    await page.evaluate((text) => window.app.handleFile(new File([text], "graph.json", { type: "application/json" })), JSON.stringify(graph));
    await until(page, () => window.app.graph._nodes.some((n) => n.type === "CheckpointLoaderSimple"));
  }
  const offered = await page.evaluate(({ model, size, steps }) => {
    const set = (type, values) => {
      const node = window.app.graph._nodes.find((n) => n.type === type);
      for (const [name, value] of Object.entries(values)) {
        const widget = node.widgets.find((w) => w.name === name);
        widget.value = value;
        widget.callback?.(value);
      }
      return node;
    };
    const loader = set("CheckpointLoaderSimple", { ckpt_name: model });
    set("EmptyLatentImage", { width: size, height: size });
    set("KSampler", { steps });
    const { values } = loader.widgets.find((w) => w.name === "ckpt_name").options;
    return typeof values === "function" ? values() : values;
  }, { model: MODEL, size: SIZE, steps: STEPS });
  assert.ok(offered.includes(MODEL), `the page offers ${offered}`);
  await page.evaluate(() => window.app.extensionManager.command.execute("Comfy.Canvas.FitView"));
  await page.waitForTimeout(1000);
  return isSd;
}

/** A workflow as the page sends it, and as `kiln convert` makes it of the same file: they must be one prompt. */
async function compareConversions(page) {
  const file = new URL("workflow.json", import.meta.url).pathname;
  const theirs = await page.evaluate(async (workflow) => {
    await window.app.loadGraphData(workflow);
    return (await window.app.graphToPrompt()).output;
  }, JSON.parse(fs.readFileSync(file)));
  const ours = JSON.parse(execFileSync(process.env.KILN_BIN ?? "target/release/kiln", ["convert", file]));
  assert.deepEqual(ours, JSON.parse(JSON.stringify(theirs)));
  return Object.keys(ours).length;
}

/** Counts preview frames (events 1 and 4) on every WebSocket of the page. */
function countPreviews(page) {
  const seen = { previews: 0 };
  page.on("websocket", (socket) => socket.on("framereceived", ({ payload }) => {
    if (typeof payload !== "string" && [1, 4].includes(payload.readUInt32BE(0))) seen.previews += 1;
  }));
  return seen;
}

/** The picture that the page shows for the SaveImage node, on the canvas or as an element. */
const shownPicture = (page) => until(page, (size) => {
  window.app.graph.setDirtyCanvas(true, true);
  const refused = window.app.lastExecutionError ?? Object.values(window.app.lastNodeErrors ?? {})[0];
  if (refused) return { refused: JSON.stringify(refused) };
  const node = window.app.graph._nodes.find((n) => n.type === "SaveImage");
  const name = window.app.nodeOutputs?.[node.id]?.images?.[0]?.filename;
  const pictures = [...(node.imgs ?? []), ...document.images].filter((i) => name && i.src.includes(name) && i.complete);
  return pictures.some((i) => i.naturalWidth === size) ? { name } : null;
}, SIZE, 120_000);

test("there is a page to test", () => assert.ok(FRONTENDS.length, "KILN_FRONTENDS is empty; see run.sh"));

for (const root of FRONTENDS) {
  const version = root.split(path.sep).at(-3);
  test(`comfyui-frontend-package ${version}`, async () => {
    const kiln = await startKiln(["--preview-method", "latent2rgb", "--front-end-root", root]);
    const browser = await openBrowser({ viewport: { width: 1600, height: 1000 } });
    const { page, context, faults, failed } = browser;
    try {
      await fence(context, kiln.url, []);
      const seen = countPreviews(page);
      await boot(page, kiln.url);
      assert.equal(await page.evaluate(() => window.__COMFYUI_FRONTEND_VERSION__), version);
      const isDefault = await openWorkflow(page);
      await page.locator("button").filter({ hasText: /^\s*(Run|Queue)\s*$/ }).first().click();
      const picture = await shownPicture(page);
      assert.equal(picture.refused, undefined);
      await page.waitForTimeout(1500);
      await shoot(page, `frontend-${version}`);
      const bytes = Buffer.from(await (await fetch(`${kiln.url}/view?filename=${picture.name}`)).arrayBuffer());
      assert.deepEqual([bytes.readUInt32BE(16), bytes.readUInt32BE(20)], [SIZE, SIZE]);
      assert.ok(seen.previews >= 3, `${seen.previews} previews`);
      const unusual = [...failed].filter((f) => !USUAL_ANSWERS.some((usual) => usual.test(f)));
      const words = faults.filter((f) => !USUAL_WORDS.some((usual) => usual.test(f)));
      const nodes = await compareConversions(page);
      console.log(`frontend ${version}: converts ${nodes} nodes as kiln does, ${isDefault ? "its default workflow" : "our file"}, ${seen.previews} previews, picture ${picture.name}, ` +
        `${unusual.length} unexpected answers, ${words.length} console errors`);
      assert.deepEqual({ unusual, words }, { unusual: [], words: [] });
    } catch (error) {
      await shoot(page, `frontend-${version}-failed`).catch(() => {});
      throw error;
    } finally {
      await browser.close();
      await kiln.stop();
      fs.rmSync(kiln.base, { recursive: true, force: true });
    }
  });
}
