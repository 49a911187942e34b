//! Numbers, priorities, deleting, history, object_info.

use serde_json::json;

use super::bench::*;
use crate::engine::*;

fn submit(bench: &Bench, change: impl FnOnce(&mut Submission)) -> Accepted {
    let mut submission = Submission { prompt: small(5), ..Default::default() };
    change(&mut submission);
    bench.engine.submit(submission).expect("accepted")
}

#[test]
fn numbers_count_up_even_when_refused() {
    let bench = Bench::new();
    assert_eq!(submit(&bench, |_| {}).number, 0.into());
    let refused = bench.engine.submit(Submission::default()).expect_err("no prompt");
    assert_eq!(
        refused.error,
        json!({"type": "no_prompt", "message": "No prompt provided", "details": "No prompt provided", "extra_info": {}})
    );
    assert_eq!(submit(&bench, |_| {}).number, 2.into());
    assert_eq!(submit(&bench, |s| s.number = Some(12345.5)).number.to_string(), "12345.5");
    assert_eq!(submit(&bench, |s| s.number = Some(5.0)).number.to_string(), "5.0");
    assert_eq!(submit(&bench, |s| s.front = true).number, (-3).into());
    assert_eq!(submit(&bench, |s| s.number = Some(f64::NAN)).number, 4.into());
}

#[test]
fn ids_are_the_clients_or_new_uuids() {
    let bench = Bench::new();
    let mine = submit(&bench, |s| s.prompt_id = Some("mine".to_owned()));
    assert_eq!((mine.prompt_id.as_str(), mine.node_errors), ("mine", json!({})));
    let new = submit(&bench, |_| {}).prompt_id;
    assert_eq!(uuid::Uuid::parse_str(&new).map(|u| u.get_version_num()).ok(), Some(4));
}

#[test]
fn the_queue_shows_and_runs_by_priority() {
    let mut bench = Bench::new();
    let slow = bench.start_slow();
    let normal = submit(&bench, |s| s.client_id = Some("c".to_owned())).prompt_id;
    let front = submit(&bench, |s| s.front = true).prompt_id;
    let queue = bench.engine.queue();
    assert_eq!(queue.running.len(), 1);
    assert_eq!(queue.running[0][1], json!(slow));
    assert_eq!(queue.pending[0], json!([-2, front, small(5), {}, ["3"]]));
    assert_eq!(queue.pending[1], json!([1, normal, small(5), {"client_id": "c"}, ["3"]]));
    assert_eq!(bench.engine.queue_remaining(), 3);
    bench.engine.interrupt(None);
    bench.finish(&normal);
    let history = bench.engine.history(None, None);
    let order: Vec<_> = history.as_object().expect("an object").keys().cloned().collect();
    assert_eq!(order, [slow, front, normal]);
}

#[test]
fn deleted_prompts_do_not_run_and_everybody_hears_of_it() {
    let mut bench = Bench::new();
    let slow = bench.start_slow();
    let ids: Vec<_> = (0..4).map(|_| submit(&bench, |_| {}).prompt_id).collect();
    bench.until(|e| name(e) == "status:5");
    assert_eq!(bench.engine.delete_pending(&[ids[0].clone(), "unknown".to_owned(), slow.clone()]), 1);
    bench.until(|e| name(e) == "status:4");
    assert_eq!(bench.engine.delete_pending(&["unknown".to_owned()]), 0);
    bench.engine.clear_pending();
    bench.until(|e| name(e) == "status:1");
    let last = submit(&bench, |_| {}).prompt_id;
    bench.engine.interrupt(None);
    bench.finish(&last);
    for id in &ids {
        assert_eq!(bench.engine.history_one(id), json!({}));
    }
    assert_eq!(bench.engine.queue_remaining(), 0);
}

#[test]
fn the_history_is_cut_deleted_and_cleared() {
    let mut bench = Bench::with(|config| config.history_cap = 3);
    let ids: Vec<_> = (0..5).map(|i| bench.submit(small(i))).collect();
    bench.finish(&ids[4]);
    let keys = |history: Json| history.as_object().expect("an object").keys().cloned().collect::<Vec<_>>();
    assert_eq!(keys(bench.engine.history(None, None)), ids[2..]);
    assert_eq!(keys(bench.engine.history(Some(1), None)), ids[4..]);
    assert_eq!(keys(bench.engine.history(Some(1), Some(1))), ids[3..4]);
    bench.engine.delete_history(&[ids[3].clone()]);
    assert_eq!(keys(bench.engine.history(None, None)), [ids[2].clone(), ids[4].clone()]);
    bench.engine.clear_history();
    assert_eq!(bench.engine.history(None, None), json!({}));
}

#[test]
fn a_refused_prompt_leaves_no_trace() {
    let mut bench = Bench::new();
    let prompt = json!({"3": node("Show", json!({"x": ["99", 0]}))});
    let submission = Submission { prompt, prompt_id: Some("bad".to_owned()), ..Default::default() };
    let refused = bench.engine.submit(submission).expect_err("refused");
    assert_eq!(refused.error["details"], "Exception when validating node: '99'");
    assert_eq!(refused.node_errors["3"]["class_type"], "Show");
    assert_eq!(bench.engine.queue_remaining(), 0);
    assert!(bench.events.try_recv().is_err());
}

#[test]
fn stored_prompts_show_the_converted_values() {
    let mut bench = Bench::new();
    let mut prompt = small(0);
    prompt["1"]["inputs"]["value"] = json!("24");
    let (_, entry) = bench.run(prompt);
    assert_eq!(entry["prompt"][2]["1"]["inputs"]["value"], json!(24));
    assert_eq!(entry["outputs"]["3"]["text"], json!(["48"]));
}

#[test]
fn object_info_of_one_and_of_all() {
    let bench = Bench::new();
    let all = bench.engine.object_info(None);
    assert!(all.as_object().is_some_and(|m| m.len() > 10));
    assert_eq!(bench.engine.object_info(Some("Num")), json!({"Num": all["Num"]}));
    assert_eq!(bench.engine.object_info(Some("NoSuchNode")), json!({}));
}

#[test]
fn many_threads_may_submit_at_once() {
    let mut bench = Bench::new();
    let ids = std::thread::scope(|scope| {
        let workers: Vec<_> = (0..8_i64)
            .map(|w| {
                let engine = &bench.engine;
                scope.spawn(move || {
                    let submit = |i: i64| Submission { prompt: small(w * 10 + i), ..Default::default() };
                    (0..10_i64)
                        .map(|i| engine.submit(submit(i)).expect("accepted").prompt_id)
                        .collect::<Vec<_>>()
                })
            })
            .collect();
        workers.into_iter().flat_map(|w| w.join().expect("no panic")).collect::<Vec<_>>()
    });
    let events = bench.until(|e| name(e) == "status:0");
    assert!(!events.is_empty());
    while bench.engine.queue_remaining() > 0 {
        bench.until(|e| name(e) == "status:0");
    }
    for id in ids {
        assert_eq!(bench.engine.history_one(&id)[&id]["status"]["status_str"], "success");
    }
}
