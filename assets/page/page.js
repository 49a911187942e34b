// kiln's own page: the form, the running picture, the queue and the gallery.
// What the server says is the only state; this file shows it and sends what the user asks for.

import { clientId, get, listen, onKeyWanted, pictureUrl, post, remember } from "./server.js";
import { describe, fromFile, parseJson, reseed, settingsOf, textToImage } from "./workflow.js";

const $ = (id) => document.getElementById(id);
const GALLERY = 60;
const SIZES = [[128, 128], [256, 256], [512, 512], [512, 768], [768, 512], [768, 768], [1024, 1024], [832, 1216], [1216, 832]];
const FORM_KEY = "kiln-form";
const FIELDS = ["prompt", "negative", "model", "width", "height", "count", "steps", "cfg", "sampler", "scheduler", "seed"];
const NUMBERS = ["width", "height", "count", "steps", "cfg"];

/** The workflow from a file, if one is open: { name, graph }. */
let custom = null;
/** The prompt on the stage: { id, graph, done } . */
let current = null;
let pictureAddress = "";
let history = {};

function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element[name] = value;
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value != null) element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}

const say = (text) => { if ($("status").textContent !== text) $("status").textContent = text; };

function fail(text) {
  $("error").textContent = text ?? "";
  $("error").hidden = !text;
}

/** Runs something that asks the server; shows why it failed. */
async function attempt(work) {
  try {
    return await work();
  } catch (error) {
    fail(error instanceof TypeError ? "The server can't be reached." : error.message);
    if ($("status").textContent === "Sending.") say("Refused.");
  }
}

// The form

function fillSelect(select, values, chosen) {
  const wanted = chosen ?? select.value;
  select.replaceChildren(...values.map((v) => (Array.isArray(v) ? new Option(v[1], v[0]) : new Option(v, v))));
  if (wanted && [...select.options].some((o) => o.value === String(wanted))) select.value = wanted;
}

const optionsOf = (select) => [...select.options].map((option) => option.value);

/** A list input's choices, in the old and in the new form of /object_info. */
const choicesOf = (spec) => (Array.isArray(spec?.[0]) ? spec[0] : (spec?.[1]?.options ?? []));

async function loadChoices() {
  const [loader, sampler] = await Promise.all([get("object_info/CheckpointLoaderSimple"), get("object_info/KSampler")]);
  const models = choicesOf(loader.CheckpointLoaderSimple.input.required.ckpt_name);
  const inputs = sampler.KSampler.input.required;
  const saved = parseJson(localStorage.getItem(FORM_KEY) ?? "{}");
  fillSelect($("model"), models, saved.model);
  fillSelect($("sampler"), choicesOf(inputs.sampler_name), saved.sampler ?? "euler");
  fillSelect($("scheduler"), choicesOf(inputs.scheduler), saved.scheduler ?? "normal");
  if (!models.length) fail("No checkpoint was found. Put one into models/checkpoints.");
  if (saved.model && models.includes(saved.model)) applySettings(saved);
  else await applySuggestions();
}

/** What a model file itself suggests, else what suits Stable Diffusion 1.x. */
async function applySuggestions() {
  const name = encodeURIComponent($("model").value);
  const facts = await get(`view_metadata/checkpoints?filename=${name}`).catch(() => ({}));
  const side = (key) => Number(facts[key]) || 512;
  showSize(side("native_width"), side("native_height"));
  for (const name of ["steps", "cfg"]) if (Number(facts[`suggest.${name}`])) $(name).value = Number(facts[`suggest.${name}`]);
  for (const name of ["sampler", "scheduler"]) if (facts[`suggest.${name}`]) fillSelect($(name), optionsOf($(name)), facts[`suggest.${name}`]);
  if (!$("prompt").value && facts.native_width === "128") $("prompt").value = "a red circle on a blue background";
}

function showSize(width, height) {
  const sizes = SIZES.map(([w, h]) => [`${w}x${h}`, `${w} × ${h}`]);
  fillSelect($("size"), [...sizes, ["custom", "other …"]]);
  const text = `${width}x${height}`;
  $("size").value = sizes.some(([value]) => value === text) ? text : "custom";
  $("custom-size").hidden = $("size").value !== "custom";
  $("width").value = width;
  $("height").value = height;
}

function settings() {
  if ($("size").value !== "custom") [$("width").value, $("height").value] = $("size").value.split("x");
  if ($("random").checked) $("seed").value = Math.floor(Math.random() * 2 ** 48);
  const values = Object.fromEntries(FIELDS.map((name) => [name, $(name).value]));
  for (const name of NUMBERS) values[name] = Number(values[name]);
  values.seed = parseJson(/^\d+$/.test(values.seed) ? values.seed.replace(/^0+(?=\d)/, "") : "0");
  return values;
}

function applySettings(values) {
  for (const name of FIELDS) if (values[name] != null) $(name).value = values[name];
  showSize(values.width, values.height);
}

async function submit(event) {
  event.preventDefault();
  fail();
  let graph;
  if (custom) {
    if (!custom.graph.nodes && $("custom-random")?.checked) {
      reseed(custom.graph, Math.floor(Math.random() * 2 ** 48));
      showNodes();
    }
    graph = custom.graph;
  } else {
    const values = settings();
    localStorage.setItem(FORM_KEY, JSON.stringify({ ...values, seed: String(values.seed) }));
    graph = textToImage(values);
  }
  $("run").disabled = true;
  say("Sending.");
  await attempt(async () => {
    await post("prompt", { prompt: graph, client_id: clientId, extra_data: { preview_method: "auto" } });
    // it may run already
    if ($("status").textContent === "Sending.") say("Queued.");
    await refreshQueue();
  });
  $("run").disabled = false;
}

// Workflows from files

async function openFile(file) {
  if (!file) return;
  fail();
  try {
    openGraph(await fromFile(file), file.name);
    say(`${file.name} is open.`);
  } catch (error) {
    fail(error.message);
  }
}

function openGraph(graph, name) {
  const values = graph.nodes ? null : settingsOf(graph);
  if (values) {
    closeCustom();
    applySettings(values);
    $("random").checked = false;
    return;
  }
  custom = { name, graph };
  $("custom-name").textContent = name;
  const count = graph.nodes?.length ?? Object.keys(graph).length;
  $("custom-facts").textContent = `${count} ${count === 1 ? "node" : "nodes"}`;
  $("simple").hidden = true;
  $("custom").hidden = false;
  return attempt(showNodes);
}

function closeCustom() {
  custom = null;
  $("simple").hidden = false;
  $("custom").hidden = true;
}

/** A form for every value in the open workflow. Links between nodes are not shown. */
async function showNodes() {
  const { graph } = custom;
  if (graph.nodes) {
    $("nodes").replaceChildren(make("p", { class: "muted" }, "This is the node editor's own format; it is sent as it is."));
    return;
  }
  const classes = [...new Set(Object.values(graph).map((node) => node.class_type))];
  const infos = await Promise.all(classes.map((name) => get(`object_info/${encodeURIComponent(name)}`).catch(() => ({}))));
  const known = Object.assign({}, ...infos);
  const hasSeed = Object.values(graph).some((n) => n.inputs?.seed !== undefined || n.inputs?.noise_seed !== undefined);
  const random = make("label", { class: "check" }, make("input", { type: "checkbox", id: "custom-random", checked: true }), "New seed each time");
  const fieldsets = Object.entries(graph).map(([id, node]) => nodeFields(id, node, known[node.class_type]));
  $("nodes").replaceChildren(...(hasSeed ? [random] : []), ...fieldsets.filter(Boolean));
}

function nodeFields(id, node, info) {
  const specs = { ...info?.input?.required, ...info?.input?.optional };
  const values = Object.entries(node.inputs ?? {}).filter(([, value]) => !Array.isArray(value) && typeof value !== "object");
  if (info && !values.length) return null;
  const title = node._meta?.title ?? info?.display_name ?? node.class_type;
  const fields = values.flatMap(([name, value]) => valueField(`n-${id}-${name}`, name, value, specs[name], (v) => { node.inputs[name] = v; }));
  if (!info) fields.unshift(make("p", { class: "error" }, `This server has no node ${node.class_type}.`));
  return make("fieldset", {}, make("legend", {}, title), ...fields);
}

function valueField(id, name, value, spec, set) {
  const choices = choicesOf(spec);
  let field;
  if (typeof value === "boolean") {
    field = make("input", { id, type: "checkbox", checked: value, onchange: () => set(field.checked) });
    return [make("label", { class: "check", for: id }, field, name)];
  }
  if (choices.length) {
    field = make("select", { id, onchange: () => set(field.value) });
    fillSelect(field, choices.includes(value) ? choices : [value, ...choices], value);
  } else if (typeof value === "string") {
    field = make(value.length > 40 || spec?.[1]?.multiline ? "textarea" : "input", { id, rows: 2 });
    field.value = value;
    field.oninput = () => set(field.value);
  } else {
    field = make("input", { id, inputmode: "decimal", value: String(value) });
    field.onchange = () => {
      const isNumber = field.value.trim() !== "" && Number.isFinite(Number(field.value));
      if (isNumber) set(parseJson(field.value.trim().replace(/^[+]|^0+(?=\d)/g, "").replace(/^\./, "0.")));
      else field.value = String(value);
    };
  }
  return [make("label", { for: id }, name), field];
}

// The stage

function showPicture(source, alt) {
  if (pictureAddress) URL.revokeObjectURL(pictureAddress);
  pictureAddress = source.startsWith("blob:") ? source : "";
  $("picture").src = source;
  $("picture").alt = alt;
  $("picture").hidden = false;
  $("empty").hidden = true;
}

function showProgress(fraction, text = "") {
  if (fraction === null) $("progress").removeAttribute("value");
  else $("progress").value = fraction;
  $("step").textContent = text;
}

function titleOf(id) {
  const node = current?.graph?.[id];
  return node?._meta?.title ?? node?.class_type ?? `node ${id}`;
}

function advance(step = 0, steps = 1) {
  const nodes = Object.keys(current?.graph ?? {}).length || 7;
  // nodes without steps take next to no time: the one that counts them gets most of the bar
  const share = Math.min(1, (current?.done.size ?? 0) / nodes);
  const stepped = current?.stepped ?? 0;
  const value = steps > 1 ? step / steps : 0;
  if (current) current.stepped = Math.max(stepped, value);
  showProgress(Math.min(0.98, 0.2 * share + 0.78 * (current?.stepped ?? 0)), steps > 1 ? `${step} of ${steps}` : "");
}

const listeners = {
  open: () => {
    $("connection").textContent = "connected";
    $("connection").className = "pill on";
    refreshAll();
  },
  closed: () => {
    $("connection").textContent = "not connected";
    $("connection").className = "pill off";
  },
  status: () => refreshAll(),
  execution_start: async ({ prompt_id: id }) => {
    current = { id, graph: null, done: new Set(), stepped: 0 };
    say("Running.");
    showProgress(null);
    const queue = await get("queue").catch(() => null);
    const row = queue?.queue_running.find((r) => r[1] === id);
    if (row && current?.id === id) current.graph = row[2];
  },
  execution_cached: ({ nodes }) => nodes.forEach((id) => current?.done.add(id)),
  executing: ({ node, prompt_id: id }) => {
    if (node === null) {
      // the end, also of a run whose beginning was missed
      if (current?.id === id) current = null;
      return;
    }
    if (current?.id !== id) current = { id, graph: null, done: new Set(), stepped: 0 };
    if (current.node) current.done.add(current.node);
    current.node = node;
    advance();
    $("step").textContent = current.graph ? titleOf(node) : "";
  },
  progress: ({ value, max }) => advance(value, max),
  picture: ({ blob, promptId }) => {
    if (!promptId || promptId === current?.id) showPicture(URL.createObjectURL(blob), "Preview of the running picture");
  },
  executed: ({ output, prompt_id: id }) => {
    const picture = output?.images?.at(-1);
    if (picture && current?.id === id) showPicture(pictureUrl(picture), describe(current.graph));
  },
  execution_success: () => {
    showProgress(1);
    say("Done.");
  },
  execution_error: ({ node_type: type, node_id: id, exception_message: message }) => {
    showProgress(0);
    say("Failed.");
    fail(`${type} (${id}): ${message}`);
  },
  execution_interrupted: () => {
    showProgress(0);
    say("Cancelled.");
  },
};

// Queue

let refreshTimer = 0;
function refreshAll() {
  clearTimeout(refreshTimer);
  refreshTimer = setTimeout(() => attempt(() => Promise.all([refreshQueue(), refreshHistory(), refreshMemory()])), 60);
}

async function refreshQueue() {
  const { queue_running: running, queue_pending: pending } = await get("queue");
  pending.sort((a, b) => Number(a[0]) - Number(b[0]));
  const row = ([, id, graph], state) => {
    const text = describe(graph);
    return make("li", {}, make("span", { title: text }, text), make("span", { class: "muted" }, state),
      make("button", { class: "quiet", type: "button", "aria-label": `Cancel: ${text}`, onclick: () => cancel(id, state) }, "Cancel"));
  };
  $("queue").replaceChildren(...running.map((r) => row(r, "running")), ...pending.map((r, i) => row(r, `waits, ${i + 1}`)));
  const count = running.length + pending.length;
  $("queue-empty").hidden = count > 0;
  $("clear").hidden = count < 2;
  document.title = count ? `(${count}) kiln` : "kiln";
}

const cancel = (id, state) => attempt(async () => {
  // it may have begun to run since the list was drawn
  await post("queue", { delete: [id] });
  await post("interrupt", { prompt_id: id });
  if (state !== "running") say("Cancelled.");
  await refreshQueue();
});

const cancelAll = () => attempt(async () => {
  const { queue_running: running } = await get("queue");
  await post("queue", { clear: true });
  for (const row of running) await post("interrupt", { prompt_id: row[1] });
  await refreshQueue();
});

// Gallery

async function refreshHistory() {
  const entries = await get(`history?max_items=${GALLERY}`);
  const isSame = Object.keys(entries).join() === Object.keys(history).join();
  history = entries;
  if (isSame) return;
  const tiles = Object.entries(entries).reverse().flatMap(([id, entry]) => {
    const text = describe(entry.prompt[2]);
    const pictures = Object.values(entry.outputs).flatMap((output) => output.images ?? []);
    const failure = entry.status?.messages?.find(([kind]) => kind === "execution_error")?.[1];
    if (failure) return [make("li", {}, make("div", { class: "failed", tabindex: 0 }, `Failed: ${failure.exception_message}`))];
    return pictures.map((picture) => make("li", {}, make("button", { type: "button", onclick: () => view(id, picture) },
      make("img", { src: pictureUrl(picture, "webp;80"), alt: text, loading: "lazy" }))));
  });
  $("gallery").replaceChildren(...tiles);
  $("gallery-empty").hidden = tiles.length > 0;
}

function view(id, picture) {
  const graph = history[id]?.prompt[2] ?? {};
  const values = settingsOf(graph);
  const text = describe(graph);
  $("viewer-picture").src = $("viewer-save").href = pictureUrl(picture);
  $("viewer-picture").alt = text;
  $("viewer-save").download = picture.filename;
  $("viewer-title").textContent = picture.filename;
  $("viewer-text").textContent = text;
  $("viewer-facts").textContent = values
    ? `${values.model}, ${values.width} × ${values.height}, ${values.steps} steps, ${values.sampler} ${values.scheduler}, guidance ${values.cfg}, seed ${values.seed}`
    : `${Object.keys(graph).length} nodes`;
  $("viewer-use").onclick = () => {
    $("viewer").close();
    openGraph(structuredClone(graph), picture.filename);
    $("form").scrollIntoView();
    $(custom ? "run" : "prompt").focus();
  };
  $("viewer-delete").onclick = () => attempt(async () => {
    await post("history", { delete: [id] });
    $("viewer").close();
    await refreshHistory();
  });
  $("viewer").showModal();
}

// Memory

async function refreshMemory() {
  const { system, devices } = await get("system_stats");
  const device = devices[0];
  const gib = (bytes) => (bytes / 2 ** 30).toFixed(1);
  const used = device.vram_total - device.vram_free;
  $("memory").value = device.vram_total ? used / device.vram_total : 0;
  $("memory-label").textContent = device.type === "cpu" ? "Memory" : "GPU memory";
  $("memory-text").textContent = `${gib(used)} of ${gib(device.vram_total)} GiB`;
  const version = system.pytorch_version.match(/kiln [\d.]+/)?.[0] ?? "kiln";
  $("version").textContent = `${version} on ${device.name}, speaks ComfyUI ${system.comfyui_version}`;
}

// Files by drag and drop

let depth = 0;
const isFile = (event) => event.dataTransfer?.types.includes("Files");
const drag = {
  dragenter: () => { depth += 1; },
  dragover: () => {},
  dragleave: () => { depth -= 1; },
  drop: (event) => {
    depth = 0;
    openFile(event.dataTransfer.files[0]);
  },
};
for (const [name, handle] of Object.entries(drag)) {
  addEventListener(name, (event) => {
    if (!isFile(event)) return;
    event.preventDefault();
    handle(event);
    $("drop").hidden = depth <= 0;
  });
}

// Everything else

onKeyWanted(() => new Promise((resolve) => {
  if (!$("login").open) $("login").showModal();
  $("login-form").addEventListener("submit", (event) => {
    event.preventDefault();
    remember($("key").value);
    $("login").close();
    resolve();
  }, { once: true });
}));

$("form").onsubmit = submit;
$("form").onkeydown = (event) => { if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) $("form").requestSubmit(); };
$("size").onchange = () => { $("custom-size").hidden = $("size").value !== "custom"; };
$("model").onchange = () => attempt(applySuggestions);
$("open").onclick = () => $("file").click();
$("file").onchange = () => { openFile($("file").files[0]); $("file").value = ""; };
$("custom-close").onclick = closeCustom;
$("clear").onclick = cancelAll;
$("viewer-close").onclick = () => $("viewer").close();
$("free").onclick = () => attempt(async () => {
  await post("free", { unload_models: true, free_memory: true });
  say("Memory is given back.");
  setTimeout(refreshAll, 500);
});

showSize(512, 512);
attempt(loadChoices);
listen((type, data) => listeners[type]?.(data));
setInterval(() => { if (!document.hidden) attempt(refreshMemory); }, 5000);
