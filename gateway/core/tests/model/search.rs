//! Breadth-first search through every state of a model: what is violated, by how short a trace, and
//! from where nothing but a repair by hand would help.
//!
//! Deliberately plain: one map of seen states, no symmetry, no hashing away of states.

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::fmt::Debug;
use std::hash::Hash;

/// One step out of a state.
pub struct Move<L, S> {
    pub label: L,
    pub to: S,
    /// Something that breaks; not needed for anything to end well.
    pub fault: bool,
}

/// A protocol with every fault it is to bear.
pub trait Model {
    type State: Clone + Eq + Hash + Ord + Debug;
    type Label: Clone + Debug;

    fn start(&self) -> Self::State;
    fn moves(&self, state: &Self::State) -> Vec<Move<Self::Label, Self::State>>;
    /// The invariant that this state violates.
    fn violated(&self, state: &Self::State) -> Option<&'static str>;
    /// Everything is over, and well.
    fn is_settled(&self, state: &Self::State) -> bool;
    /// A machine was lost with its host: no protocol brings it back, so liveness is not asked for.
    fn is_lost(&self, state: &Self::State) -> bool;
}

/// A violated invariant and the shortest way there.
#[derive(Debug)]
pub struct Counterexample<L> {
    pub invariant: &'static str,
    pub trace: Vec<L>,
}

/// What a search found.
pub struct Found<M: Model> {
    pub states: Vec<M::State>,
    pub transitions: usize,
    pub counterexample: Option<Counterexample<M::Label>>,
    index: HashMap<M::State, usize>,
    parents: Vec<Option<(usize, M::Label)>>,
}

/// Visits every reachable state, or stops at the first one that violates an invariant.
pub fn search<M: Model>(model: &M) -> Found<M> {
    let start = model.start();
    let mut found: Found<M> = Found {
        states: vec![start.clone()],
        transitions: 0,
        counterexample: None,
        index: HashMap::from([(start, 0)]),
        parents: vec![None],
    };
    let mut queue: VecDeque<usize> = VecDeque::from([0]);
    while let Some(at) = queue.pop_front() {
        let state = found.states[at].clone();
        if let Some(invariant) = model.violated(&state) {
            found.counterexample = Some(Counterexample { invariant, trace: found.trace(at) });
            return found;
        }
        for step in model.moves(&state) {
            found.transitions += 1;
            if found.index.contains_key(&step.to) {
                continue;
            }
            let next = found.states.len();
            found.index.insert(step.to.clone(), next);
            found.states.push(step.to);
            found.parents.push(Some((at, step.label)));
            queue.push_back(next);
        }
    }
    found
}

impl<M: Model> Found<M> {
    /// The shortest way to the state at `at`.
    pub fn trace(&self, mut at: usize) -> Vec<M::Label> {
        let mut trace = Vec::new();
        while let Some((before, label)) = &self.parents[at] {
            trace.push(label.clone());
            at = *before;
        }
        trace.reverse();
        trace
    }

    /// States in which nothing is lost and from which no way without faults leads to a settled one,
    /// if moves that `usable` denies are left out.
    pub fn stuck(&self, model: &M, usable: impl Fn(&M::Label) -> bool) -> BTreeSet<usize> {
        let mut before: Vec<Vec<usize>> = vec![Vec::new(); self.states.len()];
        for (at, state) in self.states.iter().enumerate() {
            for step in model.moves(state).into_iter().filter(|step| !step.fault && usable(&step.label)) {
                before[self.index[&step.to]].push(at);
            }
        }
        let mut can: Vec<bool> = self.states.iter().map(|state| model.is_settled(state)).collect();
        let mut queue: VecDeque<usize> = (0..can.len()).filter(|at| can[*at]).collect();
        while let Some(at) = queue.pop_front() {
            for earlier in &before[at] {
                if !can[*earlier] {
                    can[*earlier] = true;
                    queue.push_back(*earlier);
                }
            }
        }
        (0..can.len()).filter(|at| !can[*at] && !model.is_lost(&self.states[*at])).collect()
    }
}
