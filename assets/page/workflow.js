// Workflows: made from the form, read from files, and taken apart again.

/** JSON.parse, but whole numbers beyond 2^53 (seeds go up to 2^64) become BigInts instead of other numbers. */
export function parseJson(text) {
  const isLarge = (value) => typeof value === "number" && Number.isInteger(value) && !Number.isSafeInteger(value);
  return JSON.parse(text, (_, value, context) =>
    isLarge(value) && /^-?\d+$/.test(context?.source ?? "") ? BigInt(context.source) : value);
}

/** The inverse of parseJson. */
export function toJson(value) {
  const exact = JSON.rawJSON ?? ((text) => Number(text));
  return JSON.stringify(value, (_, v) => (typeof v === "bigint" ? exact(String(v)) : v));
}

/** The seven nodes of a text-to-image run. */
export function textToImage(s) {
  const node = (class_type, title, inputs) => ({ class_type, inputs, _meta: { title } });
  return {
    3: node("KSampler", "Sampler", {
      seed: s.seed, steps: s.steps, cfg: s.cfg, sampler_name: s.sampler, scheduler: s.scheduler, denoise: 1,
      model: ["4", 0], positive: ["6", 0], negative: ["7", 0], latent_image: ["5", 0],
    }),
    4: node("CheckpointLoaderSimple", "Model", { ckpt_name: s.model }),
    5: node("EmptyLatentImage", "Size", { width: s.width, height: s.height, batch_size: s.count }),
    6: node("CLIPTextEncode", "Prompt", { text: s.prompt, clip: ["4", 1] }),
    7: node("CLIPTextEncode", "Not wanted", { text: s.negative, clip: ["4", 1] }),
    8: node("VAEDecode", "Decode", { samples: ["3", 0], vae: ["4", 2] }),
    9: node("SaveImage", "Save", { filename_prefix: "kiln", images: ["8", 0] }),
  };
}

const SIMPLE = "CLIPTextEncode CLIPTextEncode CheckpointLoaderSimple EmptyLatentImage KSampler SaveImage VAEDecode";

/** The form's settings if the form could have made this graph, else null. */
export function settingsOf(graph) {
  if (Object.values(graph).map((node) => node.class_type).sort().join(" ") !== SIMPLE) return null;
  const find = (type) => Object.values(graph).find((node) => node.class_type === type).inputs;
  const [sampler, latent, loader] = [find("KSampler"), find("EmptyLatentImage"), find("CheckpointLoaderSimple")];
  const [positive, negative] = [graph[sampler.positive?.[0]], graph[sampler.negative?.[0]]];
  const values = {
    prompt: positive?.inputs?.text, negative: negative?.inputs?.text, model: loader.ckpt_name,
    width: latent.width, height: latent.height, count: latent.batch_size, seed: sampler.seed, steps: sampler.steps,
    cfg: sampler.cfg, sampler: sampler.sampler_name, scheduler: sampler.scheduler,
  };
  const isWhole = sampler.denoise === 1 && Object.values(values).every((v) => v !== undefined && !Array.isArray(v));
  return isWhole ? values : null;
}

/** The text of a graph's sampler's positive prompt, or of its first text. */
export function describe(graph) {
  const nodes = Object.values(graph ?? {});
  const sampler = nodes.find((node) => Array.isArray(node?.inputs?.positive));
  const source = graph?.[sampler?.inputs.positive[0]];
  const texts = [source, ...nodes].map((node) => node?.inputs?.text).filter((text) => typeof text === "string" && text);
  return texts[0] ?? nodes.map((node) => node?.class_type).filter(Boolean).slice(-1)[0] ?? "workflow";
}

/** Replaces the seeds that a graph holds as numbers. */
export function reseed(graph, seed) {
  for (const node of Object.values(graph))
    for (const name of ["seed", "noise_seed"]) if (/number|bigint/.test(typeof node.inputs?.[name])) node.inputs[name] = seed;
}

/** A graph from a dropped file; throws an Error that says what is wrong with it. */
export async function fromFile(file) {
  const bytes = new Uint8Array(await file.arrayBuffer());
  const isPng = bytes[0] === 0x89 && bytes[1] === 0x50;
  const texts = isPng ? await pngTexts(bytes) : { prompt: new TextDecoder().decode(bytes) };
  const text = texts.prompt ?? texts.workflow;
  if (text === undefined) throw new Error(`${file.name} carries no workflow.`);
  let value;
  try {
    // Python writes NaN where JSON has null
    value = parseJson(text.replace(/:\s*NaN\b/g, ": null"));
  } catch {
    throw new Error(`${file.name} is no workflow: it is not JSON.`);
  }
  return check(value?.prompt && !value.prompt.class_type ? value.prompt : value, file.name);
}

function check(graph, name) {
  if (Array.isArray(graph?.nodes)) return graph;
  const nodes = graph && typeof graph === "object" ? Object.values(graph) : [];
  if (!nodes.length || !nodes.every((node) => node?.class_type)) throw new Error(`${name} is no workflow in API format.`);
  return graph;
}

/** The text chunks of a PNG by keyword (tEXt, zTXt, iTXt). */
export async function pngTexts(bytes) {
  const texts = {};
  const view = new DataView(bytes.buffer, bytes.byteOffset);
  const latin = new TextDecoder("latin1");
  for (let at = 8; at + 12 <= bytes.length; ) {
    const [size, kind] = [view.getUint32(at), latin.decode(bytes.subarray(at + 4, at + 8))];
    const data = bytes.subarray(at + 8, at + 8 + size);
    at += 12 + size;
    if (!/^(tEXt|zTXt|iTXt)$/.test(kind)) continue;
    const end = data.indexOf(0);
    const keyword = latin.decode(data.subarray(0, end));
    if (kind === "tEXt") texts[keyword] = latin.decode(data.subarray(end + 1));
    if (kind === "zTXt") texts[keyword] = latin.decode(await inflate(data.subarray(end + 2)));
    if (kind === "iTXt") {
      const start = data.indexOf(0, data.indexOf(0, end + 3) + 1) + 1;
      const body = data.subarray(start);
      texts[keyword] = new TextDecoder().decode(data[end + 1] ? await inflate(body) : body);
    }
  }
  return texts;
}

async function inflate(bytes) {
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}
