// kiln's own page in Chromium: a picture from the form, files, the queue, the gallery; on a desktop and on a phone.

import assert from "node:assert/strict";
import fs from "node:fs";
import path from "node:path";
import { after, before, beforeEach, describe, test } from "node:test";

import { accessibilityFaults, fence, MODEL, openBrowser, shoot, startKiln, until } from "./browser.mjs";

let kiln, browser, page;
const outside = [];
const PREVIEWS = ["--preview-method", "latent2rgb"];

before(async () => {
  kiln = await startKiln(PREVIEWS);
  browser = await openBrowser();
  page = browser.page;
  page.setDefaultTimeout(60_000);
  await fence(browser.context, kiln.url, outside);
});
after(async () => {
  await browser?.close();
  await kiln?.stop();
});
beforeEach(() => {
  browser.faults.length = 0;
});

const api = async (route, body) => {
  const answer = await fetch(kiln.url + route, body && { method: "POST", body: JSON.stringify(body) });
  const text = await answer.text();
  return text && JSON.parse(text);
};
const status = (text) => until(page, (t) => document.getElementById("status").textContent === t, text);
const stagePicture = () => until(page, () => {
  const { src, naturalWidth, naturalHeight, complete } = document.getElementById("picture");
  return src.includes("/view?") && complete && naturalWidth ? { src, size: [naturalWidth, naturalHeight] } : null;
});
const set = async (values) => {
  await page.evaluate(() => { document.querySelector("details").open = true; });
  for (const [id, value] of Object.entries(values)) {
    const field = page.locator(`#${id}`);
    if (typeof value === "boolean") await field.setChecked(value);
    else if ((await field.evaluate((f) => f.tagName)) === "SELECT") await field.selectOption(value);
    else await field.fill(String(value));
  }
};
const history = async () => Object.entries(await api("/history"));

/** Drops files on the page, as a file manager does. */
const drop = async (name, type, bytes) => {
  const data = await page.evaluateHandle(({ name, type, text }) => {
    const transfer = new DataTransfer();
    transfer.items.add(new File([Uint8Array.from(atob(text), (c) => c.charCodeAt(0))], name, { type }));
    return transfer;
  }, { name, type, text: Buffer.from(bytes).toString("base64") });
  await page.dispatchEvent("main", "dragenter", { dataTransfer: data });
  assert.ok(await page.locator("#drop").isVisible(), "the page shows where to drop");
  await page.dispatchEvent("main", "drop", { dataTransfer: data });
  assert.ok(await page.locator("#drop").isHidden());
};

test("the page loads, finds the model and asks nobody else", async () => {
  await page.goto(kiln.url);
  await page.locator(".pill.on").waitFor();
  assert.equal(await page.locator("#model").inputValue(), MODEL);
  assert.equal(await page.locator("#size").inputValue(), "128x128", "the model's own size");
  assert.equal(await page.locator("#cfg").inputValue(), "5", "the model's own suggestion");
  assert.equal((await page.locator("#sampler option").count()) > 30, true);
  await until(page, () => document.getElementById("memory").value > 0);
  assert.match(await page.locator("#memory-text").textContent(), /^[\d.]+ of [\d.]+ GiB$/);
  assert.match(await page.locator("#version").textContent(), /^kiln [\d.]+ on cpu, speaks ComfyUI 0\.3\.64$/);
  assert.deepEqual(outside, []);
  assert.deepEqual(browser.faults, []);
});

test("a picture from the form, with progress and previews", async () => {
  await page.evaluate(() => {
    window.seen = { previews: 0, progress: [], said: [] };
    const picture = document.getElementById("picture");
    new MutationObserver(() => { if (picture.src.startsWith("blob:")) window.seen.previews += 1; }).observe(picture, { attributes: true });
    const bar = document.getElementById("progress");
    new MutationObserver(() => bar.hasAttribute("value") && window.seen.progress.push(bar.value)).observe(bar, { attributes: true });
    const line = document.getElementById("status");
    new MutationObserver(() => window.seen.said.push(line.textContent)).observe(line, { childList: true });
  });
  await set({ prompt: "a red circle on a blue background", seed: 7, random: false, cfg: 5, steps: 12 });
  await page.locator("#run").click();
  const { size } = await stagePicture();
  await status("Done.");
  const seen = await page.evaluate(() => window.seen);
  assert.deepEqual(size, [128, 128]);
  assert.ok(seen.previews >= 3, `${seen.previews} previews`);
  assert.deepEqual(seen.progress, [...seen.progress].sort((a, b) => a - b), "progress only grows");
  assert.equal(seen.progress.at(-1), 1);
  assert.deepEqual(seen.said.filter((text) => text !== "Queued."), ["Sending.", "Running.", "Done."]);
  assert.equal(await page.locator("#picture").getAttribute("alt"), "a red circle on a blue background");
  await page.locator("#gallery img").first().waitFor();
  const [, entry] = (await history()).at(-1);
  assert.equal(entry.prompt[2]["3"].inputs.seed, 7);
  assert.deepEqual(browser.faults, []);
  await page.emulateMedia({ colorScheme: "dark" });
  await shoot(page, "page-picture");
});

test("what the page draws is what the model draws: a red circle on blue", async () => {
  const colours = await page.evaluate(async () => {
    const picture = document.getElementById("picture");
    await picture.decode();
    const canvas = Object.assign(document.createElement("canvas"), { width: 128, height: 128 });
    const context = canvas.getContext("2d");
    context.drawImage(picture, 0, 0);
    let red = 0;
    let blue = 0;
    const { data } = context.getImageData(0, 0, 128, 128);
    for (let i = 0; i < data.length; i += 4) {
      red += data[i] > 150 && data[i + 2] < 110;
      blue += data[i + 2] > 130 && data[i] < 110;
    }
    return { red: red / 128 ** 2, blue: blue / 128 ** 2 };
  });
  assert.ok(colours.red > 0.05 && colours.blue > 0.3, JSON.stringify(colours));
});

test("large seeds keep all their digits", async () => {
  const tiles = () => document.querySelectorAll("#gallery button").length;
  const before = await page.evaluate(tiles);
  await set({ seed: "18446744073709551615", steps: 2 });
  await page.locator("#run").click();
  // "Done." may still be that of the run before, and the gallery follows the end of a run.
  await until(page, (n) => document.querySelectorAll("#gallery button").length > n, before);
  await status("Done.");
  const raw = await (await fetch(`${kiln.url}/history?max_items=1`)).text();
  assert.match(raw, /"seed":\s*18446744073709551615\b/);
  await page.locator("#gallery button").first().click();
  assert.match(await page.locator("#viewer-facts").textContent(), /seed 18446744073709551615$/);
  await page.locator("#viewer-use").click();
  assert.equal(await page.locator("#seed").inputValue(), "18446744073709551615");
});

test("the queue: cancel what waits, then what runs", async () => {
  await set({ size: "512x512", steps: 3000, random: true });
  for (const text of ["first", "second", "third"]) {
    await set({ prompt: text });
    await page.locator("#run").click();
    await page.locator("#queue li", { hasText: text }).waitFor();
  }
  await until(page, () => document.getElementById("step").textContent.includes("of 3000"));
  await shoot(page, "page-running");
  assert.equal(await page.title(), "(3) kiln");
  await page.getByRole("button", { name: "Cancel: second" }).click();
  await until(page, () => document.querySelectorAll("#queue li").length === 2);
  await page.getByRole("button", { name: "Cancel all" }).click();
  await page.locator("#queue-empty").waitFor();
  await status("Cancelled.");
  assert.deepEqual(await api("/queue"), { queue_running: [], queue_pending: [] });
  await set({ size: "128x128", steps: 6 });
});

test("a refusal is shown in the server's words", async () => {
  await page.evaluate((model) => document.getElementById("model").add(new Option("gone", "gone.safetensors"), model), MODEL);
  await page.locator("#model").selectOption("gone.safetensors");
  await page.locator("#run").click();
  await page.locator("#error").waitFor();
  assert.match(await page.locator("#error").textContent(), /CheckpointLoaderSimple \(4\): .*gone\.safetensors/s);
  await page.locator("#model").selectOption(MODEL);
  // the browser itself notes every 400 and 404
  assert.deepEqual(browser.faults.filter((f) => !/status of 40[04]/.test(f)), []);
});

test("a dropped picture brings its settings back", async () => {
  const [, entry] = (await history()).find(([, e]) => e.prompt[2]["3"].inputs.seed === 7);
  const { filename } = entry.outputs["9"].images[0];
  const bytes = await (await fetch(`${kiln.url}/view?filename=${filename}`)).arrayBuffer();
  await set({ prompt: "something else", seed: 1 });
  await drop("picture.png", "image/png", bytes);
  await until(page, () => document.getElementById("seed").value === "7");
  assert.equal(await page.locator("#prompt").inputValue(), "a red circle on a blue background");
  assert.equal(await page.locator("#steps").inputValue(), "12");
  assert.equal(await page.locator("#random").isChecked(), false);
});

test("a dropped workflow of any kind can be edited and run", async () => {
  const graph = {
    1: { class_type: "EmptyImage", inputs: { width: 96, height: 64, batch_size: 1, color: 255 }, _meta: { title: "Colour" } },
    2: { class_type: "SaveImage", inputs: { images: ["1", 0], filename_prefix: "dropped" } },
  };
  await drop("colour.json", "application/json", JSON.stringify(graph));
  await page.locator("#nodes fieldset").nth(1).waitFor();
  assert.equal(await page.locator("#custom-name").textContent(), "colour.json");
  assert.deepEqual(await page.locator("#nodes legend").allTextContents(), ["Colour", "Save Image"]);
  const field = page.getByRole("group", { name: "Colour" }).getByLabel("width");
  await field.fill("160");
  await field.blur();
  await shoot(page, "page-workflow", { fullPage: true });
  await page.locator("#run").click();
  await until(page, () => document.getElementById("picture").naturalWidth === 160);
  await page.locator("#custom-close").click();
  assert.ok(await page.locator("#prompt").isVisible());
});

test("a file that is no workflow is named", async () => {
  for (const [name, type, text, words] of [
    ["notes.json", "application/json", "{", "notes.json is no workflow: it is not JSON."],
    ["list.json", "application/json", "[1]", "list.json is no workflow in API format."],
  ]) {
    await drop(name, type, text);
    await until(page, (t) => document.getElementById("error").textContent === t, words);
  }
});

test("the keyboard is enough", async () => {
  await page.reload();
  await page.locator(".pill.on").waitFor();
  await until(page, () => document.getElementById("model").value);
  await page.keyboard.press("Tab");
  assert.equal(await page.evaluate(() => document.activeElement.className), "skip");
  await page.keyboard.press("Enter");
  assert.equal(await page.evaluate(() => location.hash), "#prompt");
  const newest = () => document.querySelector("#gallery img")?.src;
  const before = await until(page, newest);
  await set({ steps: 3 });
  await page.locator("#prompt").focus();
  await page.keyboard.press("Control+Enter");
  await until(page, (old) => document.querySelector("#gallery img")?.src !== old, before);
  await status("Done.");
  const first = page.locator("#gallery button").first();
  await first.focus();
  await page.keyboard.press("Enter");
  assert.ok(await page.locator("#viewer").evaluate((d) => d.open));
  await shoot(page, "page-viewer");
  await page.keyboard.press("Escape");
  assert.ok(!(await page.locator("#viewer").evaluate((d) => d.open)));
});

describe("for everybody", () => {
  for (const [name, width, height, colorScheme] of [
    ["desktop-dark", 1400, 1000, "dark"],
    ["desktop-light", 1400, 1000, "light"],
    ["phone-dark", 390, 844, "dark"],
    ["phone-light", 320, 640, "light"],
  ]) {
    test(`${name}: nothing is cut off, and axe finds nothing`, async () => {
      await page.setViewportSize({ width, height });
      await page.emulateMedia({ colorScheme });
      await page.waitForTimeout(300);
      await shoot(page, `page-${name}`, { fullPage: true });
      assert.ok(await page.evaluate(() => document.documentElement.scrollWidth <= innerWidth), "no sideways scrolling");
      const small = await page.evaluate(() => [...document.querySelectorAll("button, select, input:not([type=checkbox]), textarea, summary")]
        .filter((e) => e.checkVisibility() && e.getBoundingClientRect().height < 32).map((e) => e.id || e.textContent));
      assert.deepEqual(small, [], "everything is large enough for a finger");
      assert.deepEqual(await accessibilityFaults(page), []);
    });
  }
});

test("a phone makes a picture, too", async () => {
  await page.setViewportSize({ width: 390, height: 844 });
  await set({ prompt: "a purple cat on a yellow background", steps: 8, seed: 3, random: false });
  await page.locator("#run").click();
  await until(page, () => document.getElementById("picture").alt.startsWith("a purple cat"));
  await status("Done.");
  assert.ok(await page.locator("#picture").evaluate((p) => p.getBoundingClientRect().width <= innerWidth));
  await shoot(page, "page-phone-done");
});

test("a restarted server is found again", async () => {
  await kiln.stop();
  await page.locator(".pill.off").waitFor();
  kiln = await startKiln(PREVIEWS, { port: kiln.port, base: kiln.base });
  await page.locator(".pill.on").waitFor();
  await until(page, () => document.querySelectorAll("#gallery li").length === 0);
  fs.rmSync(path.join(kiln.base, "output"), { recursive: true, force: true });
});
