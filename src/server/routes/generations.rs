//! `/v1/images/generations` and `/v1/models`, as OpenAI's clients know them, and
//! `/models/load`: workflows that kiln brings along.

use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use data_encoding::BASE64;
use hyper::StatusCode;
use serde_json::{Map, Value as Json, json};

use super::{blocking, is_truthy, prompt, waiting};
use crate::engine::{JobStatus, JobView, Refused, Submission};
use crate::server::App;
use crate::server::http::{Call, Failure, Response, json_response};
use crate::server::outputs;

/// Longest wait for the pictures.
const PATIENCE: Duration = Duration::from_secs(3600);
/// Pictures of one request.
const MAX_COUNT: u64 = 10;
/// Sides of a picture.
const SIDES: std::ops::RangeInclusive<u64> = 16..=4096;
const DEFAULT_STEPS: u64 = 20;
const DEFAULT_GUIDANCE: f64 = 7.0;

fn refuse(code: &'static str, message: impl Into<String>) -> Failure {
    Failure::coded(StatusCode::BAD_REQUEST, code, message)
}

/// A text to picture.
struct Wish {
    model: String,
    prompt: String,
    negative: String,
    width: u64,
    height: u64,
    count: u64,
    seed: u64,
    steps: u64,
    guidance: f64,
}

impl Wish {
    /// The seven nodes that draw it.
    fn graph(&self, saver: &str) -> Json {
        let mut end = json!({"class_type": saver, "inputs": {"images": ["8", 0]}});
        if saver == "SaveImage" {
            end["inputs"]["filename_prefix"] = "generation".into();
        }
        json!({
            "3": {"class_type": "KSampler", "inputs": {
                "seed": self.seed, "steps": self.steps, "cfg": self.guidance, "sampler_name": "euler",
                "scheduler": "normal", "denoise": 1.0, "model": ["4", 0], "positive": ["6", 0],
                "negative": ["7", 0], "latent_image": ["5", 0]}},
            "4": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": self.model}},
            "5": {"class_type": "EmptyLatentImage", "inputs": {
                "width": self.width, "height": self.height, "batch_size": self.count}},
            "6": {"class_type": "CLIPTextEncode", "inputs": {"text": self.prompt, "clip": ["4", 1]}},
            "7": {"class_type": "CLIPTextEncode", "inputs": {"text": self.negative, "clip": ["4", 1]}},
            "8": {"class_type": "VAEDecode", "inputs": {"samples": ["3", 0], "vae": ["4", 2]}},
            "9": end,
        })
    }
}

/// The checkpoint of that name, with or without its ending; the first one if none is named.
fn checkpoint(app: &App, name: Option<&str>) -> Result<String, Failure> {
    let all = app.folders.list_models("checkpoints");
    let found = match name.filter(|name| !name.is_empty()) {
        None => all.first(),
        Some(name) => all
            .iter()
            .find(|file| *file == name || file.rsplit_once('.').is_some_and(|(stem, _)| stem == name)),
    };
    found.cloned().ok_or_else(|| {
        let message =
            format!("there is no checkpoint '{}'; GET /v1/models lists them", name.unwrap_or_default());
        Failure::coded(StatusCode::NOT_FOUND, "model_not_found", message)
    })
}

fn text<'a>(body: &'a Map<String, Json>, key: &str) -> Result<Option<&'a str>, Failure> {
    match body.get(key) {
        None | Some(Json::Null) => Ok(None),
        Some(Json::String(text)) => Ok(Some(text)),
        Some(_) => Err(refuse("invalid_type", format!("'{key}' must be a text"))),
    }
}

fn number(
    body: &Map<String, Json>,
    key: &str,
    range: std::ops::RangeInclusive<u64>,
) -> Result<Option<u64>, Failure> {
    match body.get(key) {
        None | Some(Json::Null) => Ok(None),
        Some(value) => match value.as_u64().filter(|n| range.contains(n)) {
            Some(number) => Ok(Some(number)),
            None => {
                let (least, most) = (range.start(), range.end());
                Err(refuse("invalid_value", format!("'{key}' must be a whole number from {least} to {most}")))
            }
        },
    }
}

fn size(body: &Map<String, Json>) -> Result<(u64, u64), Failure> {
    let text = match text(body, "size")? {
        None | Some("auto") => return Ok((512, 512)),
        Some(text) => text,
    };
    let sides =
        text.split_once('x').and_then(|(w, h)| Some((w.parse::<u64>().ok()?, h.parse::<u64>().ok()?)));
    match sides {
        Some((width, height)) if SIDES.contains(&width) && SIDES.contains(&height) => Ok((width, height)),
        _ => Err(refuse(
            "invalid_size",
            format!("'size' must be like 512x512, sides 16 to 4096, not '{text}'"),
        )),
    }
}

/// A seed of the day's randomness.
fn any_seed() -> u64 {
    uuid::Uuid::new_v4().as_u64_pair().1 >> 1
}

fn wish(app: &App, body: &Map<String, Json>) -> Result<Wish, Failure> {
    let prompt = text(body, "prompt")?.ok_or_else(|| refuse("missing_prompt", "'prompt' is missing"))?;
    let (width, height) = size(body)?;
    let guidance = match body.get("guidance_scale") {
        None | Some(Json::Null) => DEFAULT_GUIDANCE,
        Some(value) => value
            .as_f64()
            .filter(|g| (0.0..=100.0).contains(g))
            .ok_or_else(|| refuse("invalid_value", "'guidance_scale' must be a number from 0 to 100"))?,
    };
    Ok(Wish {
        model: checkpoint(app, text(body, "model")?)?,
        prompt: prompt.to_owned(),
        negative: text(body, "negative_prompt")?.unwrap_or_default().to_owned(),
        width,
        height,
        count: number(body, "n", 1..=MAX_COUNT)?.unwrap_or(1),
        seed: number(body, "seed", 0..=u64::MAX)?.unwrap_or_else(any_seed),
        steps: number(body, "steps", 1..=1000)?.unwrap_or(DEFAULT_STEPS),
        guidance,
    })
}

fn refused(refused: &Refused) -> Failure {
    let text = |key: &str| refused.error[key].as_str().unwrap_or_default();
    let message = format!("{}: {}", text("message"), text("details"));
    match refused.is_queue_full {
        true => Failure::coded(StatusCode::TOO_MANY_REQUESTS, "queue_full", text("message")),
        false => refuse("invalid_prompt", message),
    }
}

/// Runs a graph to its good end.
async fn run(app: &Arc<App>, graph: Json, owner: Option<String>) -> Result<JobView, Failure> {
    prompt::check_running(app)?;
    let submission =
        Submission { prompt: graph, owner, limits: prompt::queue_limits(app), ..Submission::default() };
    let queued = waiting::queue(app, submission, None).await?.map_err(|r| refused(&r))?;
    let job = waiting::for_end(app, queued, PATIENCE).await?;
    if job.status == JobStatus::Completed {
        return Ok(job);
    }
    let message = match (job.error(), job.status) {
        (Some(error), _) => error["exception_message"].as_str().unwrap_or_default().trim().to_owned(),
        (None, JobStatus::Cancelled) => "the job was cancelled".to_owned(),
        (None, _) => "the job is not over yet; it goes on".to_owned(),
    };
    Err(Failure::coded(StatusCode::INTERNAL_SERVER_ERROR, "generation_failed", message))
}

fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs())
}

/// `POST /v1/images/generations`: `{prompt, model, size, n, response_format, seed}`, and
/// `negative_prompt`, `steps`, `guidance_scale`.
pub(in crate::server) async fn create(call: Call) -> Result<Response, Failure> {
    let (base, owner) = (call.base_url(), call.owner());
    let (app, body) = call.into_object().await?;
    let wants_bytes = match text(&body, "response_format")? {
        None | Some("url") => false,
        Some("b64_json") => true,
        Some(other) => {
            let message = format!("'response_format' must be url or b64_json, not '{other}'");
            return Err(refuse("invalid_value", message));
        }
    };
    let (reader, seen) = (app.clone(), body);
    let wish = blocking(move || wish(&reader, &seen)).await??;
    let job = run(&app, wish.graph("SaveImage"), owner).await?;
    let mut data = Vec::new();
    for file in outputs::files(&job.outputs) {
        data.push(match wants_bytes {
            true => json!({"b64_json": BASE64.encode(&waiting::png(&app, &file).await?)}),
            false => json!({"url": format!("{base}{}", file.view_path())}),
        });
    }
    let body =
        json!({"created": now(), "data": data, "seed": wish.seed, "model": wish.model, "job_id": job.id});
    Ok(json_response(StatusCode::OK, &body))
}

/// `GET /v1/models`: the checkpoints.
pub(in crate::server) async fn models(call: Call) -> Result<Response, Failure> {
    let names = blocking(move || call.app.folders.list_models("checkpoints")).await?;
    let data: Vec<Json> = names
        .iter()
        .map(|name| json!({"id": name, "object": "model", "created": 0, "owned_by": "kiln"}))
        .collect();
    Ok(json_response(StatusCode::OK, &json!({"object": "list", "data": data})))
}

/// `POST /models/load`: `{"model": name}` loads a checkpoint with all its parts, by one
/// smallest picture that is thrown away, so that the next prompt finds it warm. Waits for that
/// unless `"wait": false`.
pub(in crate::server) async fn load(call: Call) -> Result<Response, Failure> {
    let owner = call.owner();
    let (app, body) = call.into_object().await?;
    let name = ["model", "ckpt_name", "checkpoint"].iter().find_map(|key| body.get(*key));
    let Some(Json::String(name)) = name.cloned() else {
        return Err(refuse("missing_model", "'model' must be the name of a checkpoint"));
    };
    let reader = app.clone();
    let model = blocking(move || checkpoint(&reader, Some(&name))).await??;
    let wish = Wish {
        model: model.clone(),
        prompt: String::new(),
        negative: String::new(),
        width: 64,
        height: 64,
        count: 1,
        seed: any_seed(),
        steps: 1,
        guidance: DEFAULT_GUIDANCE,
    };
    let graph = wish.graph("PreviewImage");
    if body.get("wait").is_none_or(|wait| is_truthy(Some(wait))) {
        let job = run(&app, graph, owner).await?;
        let took = job.started_ms.zip(job.ended_ms).map(|(start, end)| end.saturating_sub(start));
        let body = json!({"model": model, "status": "loaded", "job_id": job.id, "milliseconds": took});
        return Ok(json_response(StatusCode::OK, &body));
    }
    prompt::check_running(&app)?;
    let limits = prompt::queue_limits(&app);
    let submission = Submission { prompt: graph, owner, limits, ..Submission::default() };
    let queued = waiting::queue(&app, submission, None).await?.map_err(|r| refused(&r))?;
    let body = json!({"model": model, "status": "loading", "job_id": queued.accepted.prompt_id});
    Ok(json_response(StatusCode::ACCEPTED, &body))
}
