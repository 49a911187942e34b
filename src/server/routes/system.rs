//! `/system_stats`, `/features`, `/extensions`, `/object_info`, `/free`.

use hyper::StatusCode;
use serde_json::{Value as Json, json};

use super::{blocking, is_truthy};
use crate::engine::FreeRequest;
use crate::server::http::{self, Call, Failure, Response, json_response, json_text};
use crate::server::{COMFYUI_VERSION, host, openapi};
use crate::tensor::{BackendInfo, MemoryUse};

/// Versions of ComfyUI's web page and templates that belong to [`COMFYUI_VERSION`]; clients compare them.
const FRONTEND_VERSION: &str = "1.27.10";
const TEMPLATES_VERSION: &str = "0.1.95";

/// The device of `/system_stats`. A CPU's memory is the machine's; a GPU's has what kiln holds of it, class by class,
/// besides ComfyUI's figures.
fn device((info, memory): (BackendInfo, MemoryUse), machine: &host::Memory) -> Json {
    match memory.device_total {
        None => json!({
            "name": "cpu",
            "type": "cpu",
            "index": null,
            "vram_total": machine.total,
            "vram_free": machine.free,
            "torch_vram_total": machine.total,
            "torch_vram_free": machine.free,
        }),
        // What this process holds, and what of that is free for reuse, stand in for PyTorch's figures.
        Some(total) => json!({
            "name": info.name,
            "type": info.kind,
            "index": info.index,
            "vram_total": total,
            "vram_free": memory.available + memory.cached,
            "torch_vram_total": memory.held(),
            "torch_vram_free": memory.cached,
            "memory": {
                "weights": memory.weights,
                "activations": memory.activations,
                "workspace": memory.workspace,
                "cached": memory.cached,
            },
        }),
    }
}

/// `GET /system_stats`.
pub(in crate::server) async fn stats(call: Call) -> Result<Response, Failure> {
    let memory = blocking(host::memory).await?;
    let kiln = format!("none (kiln {}, no Python)", env!("CARGO_PKG_VERSION"));
    let body = json!({
        "system": {
            "os": if cfg!(windows) { "nt" } else { "posix" },
            "ram_total": memory.total,
            "ram_free": memory.free,
            "comfyui_version": COMFYUI_VERSION,
            "required_frontend_version": FRONTEND_VERSION,
            "installed_templates_version": TEMPLATES_VERSION,
            "required_templates_version": TEMPLATES_VERSION,
            "python_version": kiln,
            "pytorch_version": kiln,
            "embedded_python": false,
            "argv": call.app.config.argv,
        },
        "devices": [device(call.app.engine.device(), &memory)],
    });
    Ok(json_response(StatusCode::OK, &body))
}

/// `GET /health`: whether the server takes prompts. Needs no key.
pub(in crate::server) async fn health(call: Call) -> Result<Response, Failure> {
    let (status, word) = match call.app.is_stopping() {
        false => (StatusCode::OK, "ok"),
        true => (StatusCode::SERVICE_UNAVAILABLE, "stopping"),
    };
    Ok(json_response(status, &json!({"status": word, "version": env!("CARGO_PKG_VERSION")})))
}

/// `GET /openapi.json`: the API, for programs.
pub(in crate::server) async fn openapi(call: Call) -> Result<Response, Failure> {
    Ok(json_response(StatusCode::OK, &openapi::document(&call.app.router.patterns())))
}

/// `GET /features`: what the server can do.
pub(in crate::server) async fn features(call: Call) -> Result<Response, Failure> {
    Ok(json_response(StatusCode::OK, &call.app.features()))
}

/// `GET /extensions`: scripts that a web page should load; kiln brings none.
pub(in crate::server) async fn extensions(_call: Call) -> Result<Response, Failure> {
    Ok(json_response(StatusCode::OK, &json!([])))
}

/// `GET /object_info` and `/object_info/{class}`: node classes, with the files of now.
pub(in crate::server) async fn object_info(call: Call) -> Result<Response, Failure> {
    let text = blocking(move || {
        let class = Some(call.param("class")).filter(|class| !class.is_empty());
        call.app.engine.object_info(class).to_string()
    })
    .await?;
    Ok(json_text(StatusCode::OK, text))
}

/// `POST /free`: `{"unload_models": bool, "free_memory": bool}`.
pub(in crate::server) async fn free(call: Call) -> Result<Response, Failure> {
    let (app, body) = call.into_json().await?;
    let body = body.unwrap_or(Json::Null);
    app.engine.free(FreeRequest {
        unload_models: is_truthy(body.get("unload_models")),
        free_memory: is_truthy(body.get("free_memory")),
    });
    Ok(http::empty(StatusCode::OK))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_gpu_s_memory_by_class() {
        let info = BackendInfo {
            kind: "cuda",
            name: "cuda:1 Some GPU (f16)".into(),
            index: Some(1),
            threads: 0,
            element_bytes: 2,
        };
        let memory = MemoryUse {
            activations: 10,
            cached: 20,
            workspace: 3,
            weights: 400,
            available: 5000,
            device_total: Some(6000),
            ..MemoryUse::default()
        };
        let device = device((info, memory), &host::Memory { total: 1, free: 1 });
        assert_eq!(
            device,
            json!({
                "name": "cuda:1 Some GPU (f16)", "type": "cuda", "index": 1,
                "vram_total": 6000, "vram_free": 5020, "torch_vram_total": 433, "torch_vram_free": 20,
                "memory": {"weights": 400, "activations": 10, "workspace": 3, "cached": 20},
            })
        );
    }
}
