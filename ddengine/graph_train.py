"""Training fresh graph networks on weighted trees: the recipe of `standard-v1` for graphs.

Networks are trained on the colour DAG, full batch, several at once; the result is a pure function of
(network, trees, recipe, rate, generators).
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.stats import rankdata
from torch import Tensor

from ddengine.errors import UsageError, require, require_positive
from ddengine.nets.core import NetSpec
from ddengine.nets.graph import POOLS, GraphNetworks, build_graph_networks
from ddengine.ops.dag import Trees
from ddengine.rng import Rng

Watch = Callable[[int, GraphNetworks], None]


@dataclass(frozen=True)
class GraphRecipe:
    """How every network of every row is trained: Adam at a constant rate over `steps` full-batch steps.

    With more than one rate in `lrs` validation accuracy chooses; no step is ever chosen, the last weights
    count. `pool` is how nodes become a graph, `dropout` acts after pooling, and `balance` gives all classes
    of hard labels the same weight in the loss. Raises UsageError for a value out of range.
    """

    steps: int = 300
    lrs: tuple[float, ...] = (0.001, 0.005)
    weight_decay: float = 0.0
    pool: str = "mean"
    dropout: float = 0.0
    balance: bool = True

    def __post_init__(self) -> None:
        require_positive("recipe.steps", self.steps, zero=True)  # none leaves networks untrained
        if not self.lrs or len(set(self.lrs)) < len(self.lrs):
            raise UsageError(f"recipe.lrs={list(self.lrs)} is empty or repeats", "Give different rates")
        for lr in self.lrs:
            require_positive("recipe.lrs", lr)
        require_positive("recipe.weight_decay", self.weight_decay, zero=True)
        require(self.pool, POOLS, "recipe.pool")
        if not 0 <= self.dropout < 1:
            raise UsageError(f"recipe.dropout={self.dropout} is out of range", "Give 0 <= dropout < 1")

    def to_dict(self) -> dict[str, Any]:
        """The recipe fully spelled, as plain JSON values."""
        fixed = {"optimiser": "adam", "weights": "last step", "batch": "the whole set"}
        return asdict(self) | {"lrs": list(self.lrs)} | fixed


def item_weights(trees: Trees, balance: bool) -> Float[Tensor, " m"]:
    """Weight of each item in the loss, of sum 1; with `balance` all classes that occur have equal sums.

    Soft labels are not balanced: what they say of the classes is not to be changed.
    """
    weight = trees.weight.clone()
    if balance and trees.y_kind == "class":
        total = torch.zeros(len(trees.spec.classes)).index_add_(0, trees.classes, weight)
        weight = weight / total[trees.classes]
    return weight / weight.sum()


def train_graph_networks(
    spec: NetSpec,
    trees: Trees,
    recipe: GraphRecipe,
    lr: float,
    rngs: Sequence[Rng],
    watch: Watch | None = None,
) -> GraphNetworks:
    """One fresh network for each of `rngs` after `recipe.steps` steps at rate `lr`, in eval mode.

    `watch` is called with the step and the networks, in eval mode, before each step and after the last.
    Raises UsageError where network and trees do not fit one another.
    """
    generators = [rng.torch("weights") for rng in rngs]
    nets = build_graph_networks(spec, trees.spec, generators, pool=recipe.pool, dropout=recipe.dropout)
    targets = trees.y
    if trees.y_kind == "class":
        targets = torch.nn.functional.one_hot(trees.y, len(trees.spec.classes)).float()
    weights, planned = item_weights(trees, recipe.balance), nets.plan(trees)
    optimiser = torch.optim.Adam(nets.parameters(), lr, weight_decay=recipe.weight_decay)
    for step in range(recipe.steps):
        if watch is not None:
            watch(step, nets.eval())
        nets.train()
        noise = [rng.fold("dropout", step).torch("mask") for rng in rngs] if recipe.dropout else None
        logits = nets(planned, generator=noise)
        optimiser.zero_grad()
        loss = -(logits.log_softmax(2) * targets).sum(2) @ weights
        loss.sum().backward()  # networks share nothing, so each has the gradient of its own loss
        optimiser.step()
    if watch is not None:
        watch(recipe.steps, nets.eval())
    return nets.eval()


def predicted(nets: GraphNetworks, planned: Any) -> Float[np.ndarray, "s m k"]:
    """Class probabilities of every item by every network."""
    with torch.no_grad():
        return nets(planned).softmax(2).double().numpy()


def accuracy(probabilities: Float[np.ndarray, "m k"], y: Int[Tensor, " m"]) -> float:
    """The fraction of items whose largest probability is their class's (0..1)."""
    return float((probabilities.argmax(1) == y.numpy()).mean())


def roc_auc(probabilities: Float[np.ndarray, "m k"], y: Int[Tensor, " m"]) -> float:
    """Area under the ROC curve (0..1): of class 1 for two classes, else the mean of each against the rest.

    It is the part of (item of the class, other item) pairs that are in order, ties half, from ranks (Mann and
    Whitney, 1947). Classes that no item has are left out of the mean; .5 where probabilities are not finite.
    Items of two classes or more are needed.
    """
    labels = y.numpy()
    if not np.isfinite(probabilities).all():
        return 0.5
    present = [1] if probabilities.shape[1] == 2 else np.unique(labels)
    ranks = rankdata(probabilities, axis=0)
    return float(np.mean([_in_order(ranks[labels == c, c], len(labels)) for c in present]))


def _in_order(ranks: Float[np.ndarray, " p"], items: int) -> float:
    """Of the pairs of one of the items with these ranks and one of the others, the part in order."""
    p = len(ranks)
    return float(ranks.sum() - p * (p + 1) / 2) / (p * (items - p))


METRICS = {"accuracy": accuracy, "roc_auc": roc_auc}
