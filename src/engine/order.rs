//! In which order the nodes of a prompt run.
//!
//! Only what the outputs need and the cache lacks runs. Of the nodes whose
//! inputs are there, one that shows something to the user goes first: an output
//! node, then a node in front of an output node, then one two steps in front;
//! otherwise the one that was met first on the way up from the outputs.

use std::collections::BTreeSet;

use crate::graph::Graph;

/// The nodes still to run.
pub(super) struct Order<'g> {
    graph: &'g Graph,
    /// Which nodes' results were there when the prompt started.
    is_cached: Vec<bool>,
    /// For each node, how many different nodes it still waits for.
    waits_for: Vec<usize>,
    /// For each node, the nodes to run that take its outputs.
    consumers: Vec<Vec<usize>>,
    /// How many of those have not run yet.
    open_consumers: Vec<usize>,
    /// Position among the nodes to run, as met on the way up; `None`: does not run.
    rank: Vec<Option<usize>>,
    /// 0 for output nodes, 1 and 2 for nodes one and two steps in front of one, else 3.
    distance: Vec<u8>,
    ready: BTreeSet<(u8, usize, usize)>,
    has_run: Vec<bool>,
}

impl<'g> Order<'g> {
    /// The nodes that `outputs` need. Outputs count even if cached, so that
    /// their data is sent again.
    pub fn new(
        graph: &'g Graph,
        outputs: &[usize],
        is_cached: Vec<bool>,
        is_output_node: impl Fn(usize) -> bool,
    ) -> Self {
        let count = graph.nodes().len();
        let mut order = Self {
            graph,
            is_cached,
            waits_for: vec![0; count],
            consumers: vec![Vec::new(); count],
            open_consumers: vec![0; count],
            rank: vec![None; count],
            distance: vec![3; count],
            ready: BTreeSet::new(),
            has_run: vec![false; count],
        };
        let met = order.meet(outputs);
        order.connect(&met);
        order.set_distances(&met, is_output_node);
        for node in met {
            if order.waits_for[node] == 0 {
                order.make_ready(node);
            }
        }
        order
    }

    /// Goes up from the outputs; the last input of a node is followed first.
    fn meet(&mut self, outputs: &[usize]) -> Vec<usize> {
        let mut met = Vec::new();
        for &output in outputs {
            let mut stack = vec![output];
            while let Some(node) = stack.pop() {
                if self.rank[node].is_some() {
                    continue;
                }
                self.rank[node] = Some(met.len());
                met.push(node);
                if !self.is_cached[node] {
                    let upstream = self.graph.nodes()[node].upstream();
                    stack.extend(upstream.filter(|&source| !self.is_cached[source]));
                }
            }
        }
        met
    }

    fn connect(&mut self, met: &[usize]) {
        for &node in met {
            for source in self.sources(node) {
                self.consumers[source].push(node);
                self.open_consumers[source] += 1;
                self.waits_for[node] += usize::from(!self.is_cached[source]);
            }
        }
    }

    /// The different nodes that this one takes values from when it runs.
    fn sources(&self, node: usize) -> Vec<usize> {
        if self.is_cached[node] {
            return Vec::new();
        }
        let mut sources: Vec<usize> = self.graph.nodes()[node].upstream().collect();
        sources.sort_unstable();
        sources.dedup();
        sources
    }

    fn set_distances(&mut self, met: &[usize], is_output_node: impl Fn(usize) -> bool) {
        met.iter().filter(|&&n| is_output_node(n)).for_each(|&n| self.distance[n] = 0);
        for step in 1..=2 {
            for &node in met {
                if self.distance[node] > step
                    && self.consumers[node].iter().any(|&c| self.distance[c] == step - 1)
                {
                    self.distance[node] = step;
                }
            }
        }
    }

    fn make_ready(&mut self, node: usize) {
        self.ready.insert((self.distance[node], self.rank[node].unwrap_or_default(), node));
    }

    /// The next node to run; its [`done`](Order::done) makes others ready.
    pub fn next(&mut self) -> Option<usize> {
        self.ready.pop_first().map(|(_, _, node)| node)
    }

    /// Notes that a node has run; returns the sources that nothing needs any more.
    pub fn done(&mut self, node: usize) -> Vec<usize> {
        self.has_run[node] = true;
        if !self.is_cached[node] {
            for consumer in self.consumers[node].clone() {
                self.waits_for[consumer] -= 1;
                if self.waits_for[consumer] == 0 {
                    self.make_ready(consumer);
                }
            }
        }
        let mut sources = self.sources(node);
        sources.iter().for_each(|&source| self.open_consumers[source] -= 1);
        sources.retain(|&source| self.open_consumers[source] == 0);
        sources
    }

    /// Whether a node has yet to run or takes part in one that has.
    pub fn is_needed(&self, node: usize) -> bool {
        self.open_consumers[node] > 0 || self.rank[node].is_some() && !self.has_run[node]
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Map, Value as Json, json};

    use super::*;
    use crate::graph::{Classes, FileList, FileLists, Input, Schema};

    /// Two classes: `N` with four inputs, and the same as an output node `O`.
    struct TwoClasses([Schema; 2]);

    impl TwoClasses {
        fn new() -> Self {
            let schema = |class| {
                let input = |name| Input::link(name, "*").optional();
                let inputs = ["a", "b", "c", "d"].map(input);
                inputs.into_iter().fold(Schema::new(class, "").output("*"), Schema::input)
            };
            Self([schema("N"), schema("O").sink()])
        }
    }

    impl FileLists for TwoClasses {
        fn list(&self, _: &FileList) -> Vec<String> {
            Vec::new()
        }
    }

    impl Classes for TwoClasses {
        fn schema(&self, class: &str) -> Option<&Schema> {
            self.0.iter().find(|s| s.class == class)
        }

        fn checked_inputs(&self, _: &str) -> &[&str] {
            &[]
        }

        fn check(&self, _: &str, _: &Map<String, Json>) -> Result<(), String> {
            Ok(())
        }
    }

    /// Entries `(id, class, sources)`.
    fn run(entries: &[(&str, &str, &[&str])], outputs: &[&str], cached: &[&str]) -> Vec<String> {
        let node = |class: &str, sources: &[&str]| {
            let names = ["a", "b", "c", "d"];
            let inputs: Map<String, Json> =
                names.iter().zip(sources).map(|(name, id)| ((*name).to_owned(), json!([id, 0]))).collect();
            json!({"class_type": class, "inputs": inputs})
        };
        let prompt: Json =
            entries.iter().map(|(id, class, sources)| ((*id).to_owned(), node(class, sources))).collect();
        let graph = Graph::new(&prompt, &TwoClasses::new());
        let outputs: Vec<_> = outputs.iter().filter_map(|id| graph.find(id)).collect();
        let is_cached = graph.nodes().iter().map(|n| cached.contains(&&*n.id)).collect();
        let mut order = Order::new(&graph, &outputs, is_cached, |n| graph.nodes()[n].class == "O");
        let mut ran = Vec::new();
        while let Some(node) = order.next() {
            ran.push(graph.nodes()[node].id.to_string());
            order.done(node);
        }
        ran
    }

    const TXT2IMG: &[(&str, &str, &[&str])] = &[
        ("3", "N", &["4", "6", "7", "5"]),
        ("4", "N", &[]),
        ("5", "N", &[]),
        ("6", "N", &["4"]),
        ("7", "N", &["4"]),
        ("8", "N", &["3", "4"]),
        ("9", "O", &["8"]),
    ];

    #[test]
    fn recorded_orders_of_the_reference() {
        assert_eq!(run(TXT2IMG, &["9"], &[]), ["4", "5", "7", "6", "3", "8", "9"]);
        let error: &[(&str, &str, &[&str])] = &[
            ("1", "N", &[]),
            ("2", "N", &[]),
            ("4", "N", &["1"]),
            ("5", "N", &["4", "2"]),
            ("3", "O", &["5"]),
        ];
        assert_eq!(run(error, &["3"], &[]), ["2", "1", "4", "5", "3"]);
        let twins: &[(&str, &str, &[&str])] = &[
            ("1", "N", &[]),
            ("2", "N", &["1"]),
            ("3", "N", &["1"]),
            ("4", "N", &["2", "3"]),
            ("9", "O", &["4"]),
        ];
        assert_eq!(run(twins, &["9"], &[]), ["1", "3", "2", "4", "9"]);
        let pad: &[(&str, &str, &[&str])] = &[
            ("1", "N", &[]),
            ("2", "N", &["1"]),
            ("8", "O", &["2"]),
            ("3", "N", &["2"]),
            ("9", "O", &["3"]),
        ];
        assert_eq!(run(pad, &["8", "9"], &[]), ["1", "2", "8", "3", "9"]);
    }

    #[test]
    fn cached_nodes_are_left_out_but_cached_outputs_are_visited() {
        assert_eq!(run(TXT2IMG, &["9"], &["4", "5", "6", "7"]), ["3", "8", "9"]);
        assert_eq!(run(TXT2IMG, &["9"], &["3", "4", "5", "6", "7", "8", "9"]), ["9"]);
        let chained: &[(&str, &str, &[&str])] =
            &[("1", "O", &[]), ("2", "O", &["1"]), ("3", "O", &["2", "2"])];
        assert_eq!(run(chained, &["1", "2", "3"], &["1"]), ["1", "2", "3"]);
    }
}
