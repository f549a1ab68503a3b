"""Graph networks on the colour DAG: a registry, and builders that draw weights from generators of the
caller's.

A network is layers of one kind, then a pool over the nodes of each item and one linear map to the classes.
Several networks of one kind, each with weights of its own, run at once. Letters as in `graph_plan`; d is the
width, k are the classes.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from ddengine.errors import UsageError, require, require_positive, unknown
from ddengine.graphs import GraphSpec
from ddengine.nets.core import NetSpec
from ddengine.nets.graph_layers import (
    GAT,
    GCN,
    GIN,
    GINE,
    SAGE,
    GATv2,
    StackedBatchNorm,
    StackedLinear,
    draw_weights,
)
from ddengine.nets.graph_plan import Plan, plan, product
from ddengine.ops.dag import Trees

GRAPH_NETWORKS: dict[str, Callable[[int, int, int, int], nn.Module]] = {
    "gcn": GCN,
    "gin": GIN,
    "gine": GINE,
    "sage": SAGE,
    "gat": GAT,
    "gatv2": GATv2,
}
# after each layer and its norm: ReLU, and for attention the ELU of Velickovic et al., ICLR 2018, section 3.3
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gcn": F.relu,
    "gin": F.relu,
    "gine": F.relu,
    "sage": F.relu,
    "gat": F.elu,
    "gatv2": F.elu,
}
WIDTH, DEPTH = 64, 2
POOLS = ("mean", "sum")
GRAPH_NORMS = ("none", "batch")

Generators = torch.Generator | Sequence[torch.Generator]


class GraphNetworks(nn.Module):
    """s networks of one kind; parameters have the networks as their first dimension.

    Call with trees, or with their `plan` where they are used again; dropout follows the pool.
    """

    def __init__(self, spec: NetSpec, data: GraphSpec, copies: int, pool: str, dropout: float | int) -> None:
        super().__init__()
        assert spec.width is not None and spec.depth is not None
        self.spec, self.data, self.pool, self.dropout = spec, data, pool, dropout
        sizes = pairwise([data.width, *[spec.width] * spec.depth])
        layer = GRAPH_NETWORKS[spec.name]
        self.layers = nn.ModuleList(layer(copies, a, b, data.edge_width) for a, b in sizes)
        norms = spec.depth if spec.norm == "batch" else 0
        self.norms = nn.ModuleList(StackedBatchNorm(copies, spec.width) for _ in range(norms))
        self.classifier = StackedLinear(copies, spec.width, len(data.classes))

    def plan(self, trees: Trees) -> Plan:
        """What these networks need of `trees`, computed once.

        Raises UsageError for fewer hops than layers, features of another width, and colours that do not tell
        degrees where the network is gcn.
        """
        name, depth, hops = self.spec.name, len(self.layers), trees.dag.hops
        if depth > hops:
            raise UsageError(
                f"network {name} has {depth} layers, the trees {hops} hops: leaves would get no message",
                f"Give network.depth={hops} or distil with matcher.hops={depth}",
            )
        self._check(trees)
        return plan(trees, depth, self.classifier.weight.dtype, self.classifier.weight.device)

    def _check(self, trees: Trees) -> None:
        given = (trees.spec.width, trees.spec.edge_width)
        if given != (self.data.width, self.data.edge_width):
            raise UsageError(
                f"node and edge features of {given[0]} and {given[1]} numbers do not fit networks built for "
                f"{self.data.width} and {self.data.edge_width}",
                "Build the networks for the spec of these trees",
            )
        if self.spec.name == "gcn" and trees.dag.degree is None:
            raise UsageError(
                "network gcn needs the degree of every node, and these colours do not tell degrees apart",
                "Distil with matcher.degree=true, or give another network",
            )

    def forward(self, trees: Trees | Plan, generator: Generators | None = None) -> Float[Tensor, "s m k"]:
        """Logits. In train mode dropout draws from CPU generators: one for each network, or one that all
        draw from in turn (UsageError: dropout and none given).
        """
        ready = self._ready(trees)
        h = self._embed(ready)
        if self.training and self.dropout:
            pooled = self._pooled(ready, h)
            logits = self.classifier(pooled * self._mask(pooled, generator))
        else:  # scores of colours pooled are scores of the pool, and k numbers are less to add up than d
            logits = self.classifier.shifted(self._pooled(ready, self.classifier.project(h)))
        return logits.transpose(0, 1)

    def _ready(self, trees: Trees | Plan) -> Plan:
        if isinstance(trees, Trees):
            return self.plan(trees)
        self._check(trees.trees)
        weight = self.classifier.weight
        if (trees.trees.dag.hops, trees.dtype) != (len(self.layers), weight.dtype):
            raise UsageError(
                f"a plan of {trees.trees.dag.hops} hops in {trees.dtype} does not fit networks of "
                f"{len(self.layers)} layers in {weight.dtype}",
                "Plan with these networks' own plan(trees), once they have their dtype",
            )
        return trees

    def _embed(self, ready: Plan) -> Float[Tensor, "c s d"]:
        h = ready.features[:, None]
        for number, (layer, hop) in enumerate(zip(self.layers, ready.hops, strict=True)):
            h = layer(h, hop)
            if self.norms:
                h = self.norms[number](h, ready.counts[number])
            h = ACTIVATIONS[self.spec.name](h)
        return h

    def _pooled(self, ready: Plan, h: Float[Tensor, "c s d"]) -> Float[Tensor, "m s d"]:
        summed = product(ready.items, h)
        return summed / ready.nodes[:, None, None] if self.pool == "mean" else summed

    def _mask(self, pooled: Float[Tensor, "m s d"], generator: Generators | None) -> Float[Tensor, "m s d"]:
        m, s, d = pooled.shape
        given = [generator] * s if isinstance(generator, torch.Generator) else generator
        if given is None or len(given) != s:
            raise UsageError(
                f"dropout={self.dropout} draws for {s} networks in training, and "
                f"{'no generator was' if given is None else f'{len(given)} generators were'} given",
                "Give generator= one CPU generator, or one for each network",
            )
        drawn = torch.stack([torch.rand((m, d), generator=g) for g in given], dim=1)
        return (drawn >= self.dropout).to(pooled) / (1 - self.dropout)


def resolve_graph(spec: NetSpec) -> NetSpec:
    """`spec` with the defaults of graph networks filled in: width 64, 2 layers, no norm.

    Raises UsageError for a network of images, an unknown one, and a norm that graph networks lack.
    """
    from ddengine.nets import NETWORKS  # the package may list this module

    if spec.name not in GRAPH_NETWORKS:
        if spec.name in NETWORKS:
            raise UsageError(
                f"network {spec.name} works on images; graphs take: {', '.join(GRAPH_NETWORKS)}",
                "Give one of them, such as network=gin",
            )
        raise unknown("graph network", spec.name, GRAPH_NETWORKS)
    if spec.norm is not None and spec.norm not in GRAPH_NORMS:
        raise UsageError(
            f"network.norm={spec.norm} is for images; graph networks take: {', '.join(GRAPH_NORMS)}",
            "Leave network.norm out or give one of them",
        )
    return replace(spec, width=spec.width or WIDTH, depth=spec.depth or DEPTH, norm=spec.norm or "none")


def usual_graph(spec: NetSpec) -> NetSpec:
    """`spec`, or GIN where it is the default network of images."""
    return NetSpec("gin") if spec == NetSpec() else spec


def build_graph_networks(
    spec: NetSpec,
    data: GraphSpec,
    generators: Sequence[torch.Generator],
    *,
    pool: str = "mean",
    dropout: float | int = 0.0,
) -> GraphNetworks:
    """Networks for graphs of `data`, one for each generator, on the CPU in train mode.

    Network i's weights are drawn from generator i alone, and are those of a network built by itself. Raises
    UsageError as `resolve_graph` does, for gine on edges without labels, and for options out of range.
    """
    full = resolve_graph(spec)
    require(pool, POOLS, "pool")
    if not 0 <= dropout < 1:
        raise UsageError(f"dropout={dropout} is out of range", "Give a probability, 0 <= dropout < 1")
    require_positive("number of networks", len(generators))
    if full.name == "gine" and not data.edge_width:
        raise UsageError(
            f"network gine reads edge labels, and the edges of '{data.name}' have none",
            "Give network=gin, which needs none",
        )
    nets = GraphNetworks(full, data, len(generators), pool, dropout)
    draw_weights(nets, generators)
    return nets
