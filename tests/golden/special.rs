//! Groups that are not workflows, told by their structure.

mod unet;

use super::Group;
use super::report::Report;
use super::workflow::Bench;

/// Runs the group if it is of one of these formats; `false` if not.
pub fn run(group: &Group, bench: &mut Bench, report: &mut Report) -> bool {
    let cases = group.json["cases"].as_object();
    let has =
        |key: &str| cases.is_some_and(|c| c.values().next().is_some_and(|case| case.get(key).is_some()));
    if group.json.get("prompts").is_some() && has("sigma") {
        unet::run(group, bench, report);
        return true;
    }
    false
}
