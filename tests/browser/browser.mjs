// A kiln process and a headless Chromium, shared by the tests of this folder.

import { spawn } from "node:child_process";
import fs from "node:fs";
import { createRequire } from "node:module";
import os from "node:os";
import path from "node:path";

// The packages are installed outside the source tree; see run.sh.
const require = createRequire(path.join(process.env.KILN_NODE_MODULES ?? process.cwd(), "x.js"));
const { chromium } = require("playwright-core");

export const SHOTS = process.env.KILN_SHOTS ?? "target/browser";
export const MODEL = "demo-sd.safetensors";
fs.mkdirSync(SHOTS, { recursive: true });

/** Starts `kiln serve`; `port` 0 takes a free one. */
export async function startKiln(flags = [], { port = 0, base } = {}) {
  base ??= fs.mkdtempSync(path.join(os.tmpdir(), "kiln-browser-"));
  const binary = process.env.KILN_BIN ?? "target/release/kiln";
  const child = spawn(binary, ["serve", "--cpu", "--threads", "2", "--port", port, "--base-directory", base, ...flags]);
  let log = "";
  const url = await new Promise((resolve, reject) => {
    child.stderr.on("data", (data) => {
      log += data;
      const found = log.match(/listening on (http:\/\/[\d.:]+)/);
      if (found) resolve(found[1]);
    });
    child.on("exit", (code) => reject(new Error(`kiln ended with ${code}: ${log}`)));
    child.on("error", reject);
  });
  const ended = new Promise((resolve) => child.on("exit", resolve));
  return { url, base, port: new URL(url).port, stop: () => (child.kill("SIGKILL"), ended) };
}

/** A page that notes all that a user would find in the browser's console. */
export async function openBrowser(options = {}) {
  const profile = fs.mkdtempSync(path.join(os.tmpdir(), "kiln-chromium-"));
  const context = await chromium.launchPersistentContext(profile, {
    executablePath: process.env.CHROMIUM ?? "/usr/bin/chromium",
    headless: true,
    viewport: { width: 1400, height: 1000 },
    args: ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
      "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage"],
    ...options,
  });
  const page = context.pages()[0] ?? (await context.newPage());
  const faults = [];
  const failed = new Set();
  page.on("console", (m) => m.type() === "error" && faults.push(`console: ${m.text()} (${m.location().url})`));
  page.on("pageerror", (e) => faults.push(`page: ${e.stack ?? e}`));
  page.on("response", (r) => r.status() >= 400 && failed.add(`${r.status()} ${r.request().method()} ${new URL(r.url()).pathname}`));
  const close = async () => {
    await context.close();
    fs.rmSync(profile, { recursive: true, force: true });
  };
  return { context, page, faults, failed, close };
}

/** Asks the page until it says something true; that. (Playwright's own way is stopped by a content security policy.) */
export async function until(page, predicate, argument, timeout = 60_000) {
  const end = Date.now() + timeout;
  for (;;) {
    const value = await page.evaluate(predicate, argument);
    if (value) return value;
    if (Date.now() > end) throw new Error(`still not so after ${timeout / 1000} s: ${predicate}`);
    await new Promise((resolve) => setTimeout(resolve, 50));
  }
}

/** Nothing outside the server may be asked; what is, is noted and gets nothing. */
export async function fence(context, url, outside) {
  const { origin } = new URL(url);
  const isOutside = (u) => u.origin !== origin && !["data:", "blob:", "about:"].includes(u.protocol);
  await context.route(isOutside, (route) => {
    outside.push(route.request().url());
    return route.abort();
  });
}

export const shoot = (page, name, options = {}) => page.screenshot({ path: path.join(SHOTS, `${name}.png`), ...options });

/** What axe-core finds wrong for people who can't see, or not well, or use no mouse. */
export async function accessibilityFaults(page) {
  // The page's own content security policy keeps scripts out; axe comes in over the debugger instead.
  const source = fs.readFileSync(require.resolve("axe-core/axe.min.js"), "utf8");
  await page.evaluate(source);
  const { violations } = await page.evaluate(() => axe.run(document, { resultTypes: ["violations"] }));
  return violations.flatMap((v) => v.nodes.map((n) => `${v.id}: ${n.target} ${n.failureSummary ?? v.help}`));
}
