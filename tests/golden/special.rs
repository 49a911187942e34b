//! Groups that are not workflows, told by their structure.

mod conditions;
mod description;
mod preview;
mod rng;
mod sampler_nodes;
mod samplers;
mod schedules;
mod tokenizer;
mod toy;
mod unet;

use serde_json::Value as Json;

use super::Group;
use super::bench::Bench;
use super::report::{Outcome, Report};

/// Runs the group if it is of one of these formats; `false` if not.
pub fn run(group: &Group, bench: &Bench, report: &mut Report) -> bool {
    let json = &group.json;
    let first = |list: &Json, key: &str| list[0].get(key).is_some();
    if first(json, "kind") {
        rng::run(group, report);
    } else if first(&json["cases"], "prompt") {
        tokenizer::run(group, bench, report);
    } else if ["ksampler", "nodes", "model_sampling"].iter().any(|key| json.get(key).is_some()) {
        schedules::run(group, bench, report);
    } else if json.get("keys").is_some() && json.get("metadata").is_some() {
        report.case(&group.name, "keys", Outcome::Later(vec!["CheckpointSave".to_owned()]));
    } else {
        return by_cases(group, bench, report);
    }
    true
}

/// Formats of groups with named cases.
fn by_cases(group: &Group, bench: &Bench, report: &mut Report) -> bool {
    let first = group.json["cases"].as_object().and_then(|c| c.values().next());
    let has = |keys: &[&str]| first.is_some_and(|case| keys.iter().all(|key| case.get(key).is_some()));
    if has(&["sampler", "scheduler", "use_latent"]) {
        each(group, report, |name, case| samplers::compare(group, name, case));
    } else if has(&["sampler", "scheduler", "desc"]) {
        each(group, report, |name, case| conditions::compare(group, name, case));
    } else if has(&["node", "inputs", "scheduler"]) {
        each(group, report, |name, case| sampler_nodes::compare(group, name, case, bench));
    } else if has(&["sigma"]) && group.json.get("prompts").is_some() {
        each(group, report, |name, case| unet::compare(group, name, case, bench));
    } else if has(&["threads1"]) {
        report.skip_file(&group.name, "a record of the reference's own spread, not cases");
    } else {
        return false;
    }
    true
}

/// Runs the cases that the filter takes.
fn each(group: &Group, report: &mut Report, compare: impl Fn(&str, &Json) -> Result<Outcome, Outcome>) {
    for (name, case) in group.json["cases"].as_object().into_iter().flatten() {
        if report.wants(&group.name, name) {
            report.case(&group.name, name, compare(name, case).unwrap_or_else(|outcome| outcome));
        }
    }
}

/// A case without a workflow among others that have one.
pub fn case(group: &Group, name: &str, case: &Json, bench: &Bench) -> Outcome {
    let has = |part: &str| group.tensors.raw(&format!("{name}.{part}")).is_some();
    let outcome = if has("model_output") {
        unet::compare(group, name, case, bench)
    } else if has("rgb_u8") {
        preview::compare(group, name, case, bench)
    } else {
        Ok(Outcome::Skip("no workflow".to_owned()))
    };
    outcome.unwrap_or_else(|outcome| outcome)
}
