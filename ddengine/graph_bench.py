"""Graph networks of an evaluation: what all jobs share, and the job of training some and scoring them.

This is all that a worker process of the judge loads.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ddengine.bench import SUBJECT, Record
from ddengine.errors import require
from ddengine.graph_train import METRICS, GraphRecipe, predicted, roc_auc, train_graph_networks
from ddengine.graphs import Graphs
from ddengine.nets.core import NetSpec
from ddengine.nets.graph import GraphNetworks
from ddengine.nets.graph_plan import Plan
from ddengine.ops.dag import Trees, trees_of
from ddengine.rng import Rng

UNTRAINED, SAME_LABELS = "untrained", "random_same_labels"
RULES = ("last step", "best validation step")
Picks = Mapping[tuple[str, int | None], Tensor]


@dataclass(frozen=True)
class GraphBench:
    """What every job of one evaluation shares. `picks` holds indices into `fit` by row and network number,
    `labels` the soft labels of all graphs of `fit` for the row of the same labels.

    `rule` says which weights are scored: those of the last step, or of the step (the untrained start too)
    with the best area under the ROC curve on validation. `held` keeps what several jobs of a process need.
    """

    distilled: Trees | Graphs
    fit: Graphs
    validation: Graphs
    test: Graphs
    picks: Picks
    recipe: GraphRecipe
    seed: int
    rule: str = RULES[0]
    labels: Tensor | None = None
    held: dict[Any, Any] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        require(self.rule, RULES, "rule")

    def training_set(self, row: str, index: int | None) -> Trees | Graphs:
        """What network `index` of `row` is trained on; None is the trials' own draw."""
        if row in (SUBJECT, UNTRAINED):
            return self.distilled
        if row == "full":
            return self.fit
        return self.fit.take(self.picks.get((row, index), self.picks[row, None]))

    def training_trees(self, row: str, index: int | None, network: NetSpec) -> Trees:
        """The same on the colour DAG that `network` needs, with the labels of that row."""
        if row == "full":
            return self.trees("fit", network)
        trees = trees_for(self.training_set(row, index), network)
        if row != SAME_LABELS:
            return trees
        assert self.labels is not None
        soft = self.labels[self.picks.get((row, index), self.picks[row, None])]
        return replace(trees, y=soft, y_kind="prob")

    def drawn_anew(self, row: str) -> bool:
        """Whether each network of `row` has a training set of its own."""
        return (row, 0) in self.picks

    def trees(self, part: str, network: NetSpec) -> Trees:
        """`fit`, `validation` or `test` on the colour DAG that `network` needs."""
        key = (part, network.depth, needs_degree(network))
        if key not in self.held:
            self.held[key] = trees_for(getattr(self, part), network)
        return self.held[key]


@dataclass(frozen=True)
class GraphJob:
    """Networks to train together: a trial for the rate (`indices` empty) or those of these numbers."""

    network: NetSpec
    label: str
    row: str
    lr: float
    indices: tuple[int, ...] = ()


def needs_degree(network: NetSpec) -> bool:
    """Whether the first colours must tell degrees apart for `network`: the symmetric norm of GCN does."""
    return network.name == "gcn"


def trees_for(source: Trees | Graphs, network: NetSpec) -> Trees:
    """The trees that `network` (resolved) computes on; a set of trees is taken as it is."""
    if isinstance(source, Trees):
        return source
    assert network.depth is not None
    return trees_of(source, network.depth, degree=needs_degree(network))


def run_graph_job(bench: GraphBench, job: GraphJob) -> list[Record]:
    """Train and score the networks of a job: one record each.

    Their streams depend on (seed, network, index), not on the row.
    """
    began = time.perf_counter()
    root = Rng(bench.seed).fold("judge", job.network.name)
    rngs = [root.fold(index) for index in job.indices] or [root.fold("trial")]
    recipe = bench.recipe if job.row != UNTRAINED else replace(bench.recipe, steps=0)
    trees = bench.training_trees(job.row, job.indices[0] if job.indices else None, job.network)
    best = BestOnValidation(bench.trees("validation", job.network))
    watch = best.see if bench.rule == RULES[1] else None
    nets = train_graph_networks(job.network, trees, recipe, job.lr, rngs, watch)
    if watch is not None:
        best.restore(nets)
    scores = _scores(nets, bench.trees("validation", job.network))
    head = {"row": job.row, "network": job.label, "lr": job.lr, "steps": recipe.steps}
    seconds = round((time.perf_counter() - began) / len(rngs), 3)
    if not job.indices:
        return [{**head, "kind": "trial", "validation": scores["accuracy"][0], "seconds": seconds}]
    tested = score_on_test(nets, bench, job.network)
    return [
        {
            **head,
            "kind": "final",
            "index": index,
            **{f"validation_{metric}": values[i] for metric, values in scores.items()},
            **{f"test_{metric}": values[i] for metric, values in tested.items()},
            "seconds": seconds,
        }
        for i, index in enumerate(job.indices)
    ]


def score_on_test(nets: GraphNetworks, bench: GraphBench, network: NetSpec) -> dict[str, list[float]]:
    """Test scores of finished networks whose rate is chosen: the only place that reads the test part."""
    return _scores(nets, bench.trees("test", network))


def _scores(nets: GraphNetworks, trees: Trees) -> dict[str, list[float]]:
    probabilities = predicted(nets, nets.plan(trees))
    return {name: [metric(p, trees.y) for p in probabilities] for name, metric in METRICS.items()}


class BestOnValidation:
    """The weights of each network at the step with its best validation area; the first of equals."""

    def __init__(self, validation: Trees) -> None:
        self.validation, self.planned = validation, list[Plan]()
        self.best, self.weights = np.empty(0), dict[str, Tensor]()

    def see(self, step: int, nets: GraphNetworks) -> None:
        """Score `nets` and keep the weights of those that are better than before."""
        self.planned = self.planned or [nets.plan(self.validation)]
        areas = np.array([roc_auc(p, self.validation.y) for p in predicted(nets, self.planned[0])])
        now = {name: value.detach().clone() for name, value in nets.state_dict().items()}
        if not len(self.best):
            self.best, self.weights = areas, now
            return
        better = torch.from_numpy(areas > self.best)
        self.best = np.maximum(areas, self.best)
        for name, value in now.items():
            chosen = better.reshape(-1, *[1] * (value.ndim - 1))
            self.weights[name] = torch.where(chosen, value, self.weights[name])

    def restore(self, nets: GraphNetworks) -> None:
        """Put the kept weights into `nets`."""
        nets.load_state_dict(self.weights)
