//! What a canvas will have as results, before anything of it has run.
//!
//! Celery builds a small graph of `AsyncResult` and `GroupResult` objects while it fixes the
//! ids of a canvas; what ends up in `children` and in saved groups is that graph as nested
//! tuples: `[[id, parent], null]` for a task, `[[id, parent], [members…]]` for a group.

use serde_json::{Value, json};

/// A node of the graph.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Handle(usize);

#[derive(Debug)]
struct Node {
    id: String,
    parent: Option<Handle>,
    members: Option<Vec<Handle>>,
}

/// The graph.
#[derive(Debug, Default)]
pub(super) struct Results {
    nodes: Vec<Node>,
}

impl Results {
    fn add(&mut self, id: &str, members: Option<Vec<Handle>>) -> Handle {
        self.nodes.push(Node {
            id: id.to_owned(),
            parent: None,
            members,
        });
        Handle(self.nodes.len() - 1)
    }

    /// The result of one task.
    pub(super) fn task(&mut self, id: &str) -> Handle {
        self.add(id, None)
    }

    /// The results of a group.
    pub(super) fn group(&mut self, id: &str, members: Vec<Handle>) -> Handle {
        self.add(id, Some(members))
    }

    /// Task id or group id.
    pub(super) fn id(&self, node: Handle) -> &str {
        &self.nodes[node.0].id
    }

    /// The members of a group; `None` for a task.
    pub(super) fn members(&self, node: Handle) -> Option<&[Handle]> {
        self.nodes[node.0].members.as_deref()
    }

    /// The result before this one in its chain.
    pub(super) fn parent(&self, node: Handle) -> Option<Handle> {
        self.nodes[node.0].parent
    }

    /// Says what comes before.
    pub(super) fn set_parent(&mut self, node: Handle, parent: Option<Handle>) {
        self.nodes[node.0].parent = parent;
    }

    /// The first of the chain that ends here.
    pub(super) fn oldest(&self, node: Handle) -> Handle {
        let mut oldest = node;
        // Ids are unique, so this ends; the bound is for signatures that repeat one.
        for _ in 0..self.nodes.len() {
            match self.parent(oldest) {
                Some(parent) => oldest = parent,
                None => break,
            }
        }
        oldest
    }

    /// The node of the chain ending at `from` whose parent is `parent`.
    pub(super) fn child_of(&self, from: Handle, parent: Handle) -> Option<Handle> {
        let mut node = from;
        for _ in 0..self.nodes.len() {
            match self.parent(node)? {
                found if found == parent => return Some(node),
                next => node = next,
            }
        }
        None
    }

    /// As it is stored.
    pub(super) fn tuple(&self, node: Handle) -> Value {
        self.tuple_within(node, self.nodes.len())
    }

    fn tuple_within(&self, node: Handle, depth: usize) -> Value {
        let Node {
            id,
            parent,
            members,
        } = &self.nodes[node.0];
        let Some(depth) = depth.checked_sub(1) else {
            return json!([[id, null], null]);
        };
        let parent = parent.map(|parent| self.tuple_within(parent, depth));
        let members = members.as_ref().map(|members| {
            let each = members
                .iter()
                .map(|member| self.tuple_within(*member, depth));
            each.collect::<Vec<_>>()
        });
        json!([[id, parent], members])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tuples_nest_parents_and_members() {
        let mut results = Results::default();
        let members = vec![results.task("a"), results.task("b")];
        let header = results.group("g", members);
        let body = results.task("body");
        results.set_parent(body, Some(header));
        let expected = json!([
            [
                "body",
                [["g", null], [[["a", null], null], [["b", null], null]]]
            ],
            null
        ]);
        assert_eq!(results.tuple(body), expected);
        assert_eq!(results.oldest(body), header);
        assert_eq!(results.child_of(body, header), Some(body));
    }

    #[test]
    fn a_circle_of_parents_ends() {
        let mut results = Results::default();
        let (one, two) = (results.task("1"), results.task("2"));
        results.set_parent(one, Some(two));
        results.set_parent(two, Some(one));
        results.oldest(one);
        results.tuple(one);
        assert_eq!(results.child_of(one, Handle(9)), None);
    }
}
