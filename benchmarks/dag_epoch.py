"""An epoch of a graph network on the colour DAG against the same network node by node.

    python benchmarks/dag_epoch.py --root DIR [--name NCI1] [--repeat 15]

GIN of width 64 with mean pool over all graphs in one batch, float32: forward, backward and an Adam step, in
CPU seconds of the process (one thread, so that other load counts little), taking turns in one process. The
plain version is written out here, its graphs already collated. Of its ways to add messages up, products with
MKL's sparse CSR (with the transpose at hand for the backward pass), gathering with index_add, and an
embedding bag, the fastest is taken. "our code, no sharing" is the networks of ddengine with every node a
colour of its own. Logits are compared at the same weights; training in float32 drifts apart from there, as
Adam divides tiny gradients by their own size. Last, several networks at once are set against the same ones
one after another, both on the DAG. `DIR` holds the folder NAME/ with the text files of the TU collection.
"""

import argparse
import json
import os
import platform
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ddengine.data.graph_source import load_graphs
from ddengine.files import write_json
from ddengine.graphs import Graphs, joined
from ddengine.nets import NetSpec
from ddengine.nets.graph import GraphNetworks, build_graph_networks
from ddengine.ops.dag import Trees, node_trees, trees_of
from ddengine.rng import Rng

RESULTS = Path(os.environ.get("RESULTS", Path(__file__).parent / "results"))
LR = 5e-3

Sums = Callable[[Tensor], Tensor]


class Constant(torch.autograd.Function):
    """A constant linear map, given as two functions: itself and its transpose."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, there: Sums, back: Sums) -> Tensor:  # noqa: D102
        ctx.back = back
        return there(h.detach())

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:  # noqa: D102
        return ctx.back(grads[0].contiguous()), None, None


def rows(row: Tensor, column: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Row pointers and columns of the matrix with ones at (row, column)."""
    return F.pad(torch.bincount(row, minlength=count).cumsum(0), (1, 0)), column[row.argsort(stable=True)]


def by_csr(source: Tensor, target: Tensor, senders: int, receivers: int) -> Sums:
    """Sums of messages as products with sparse CSR matrices."""
    ones = torch.ones(len(source))
    there = torch.sparse_csr_tensor(*rows(target, source, receivers), ones, (receivers, senders))
    back = torch.sparse_csr_tensor(*rows(source, target, senders), ones, (senders, receivers))
    return lambda h: Constant.apply(h, lambda h: there @ h, lambda g: back @ g)


def by_index_add(source: Tensor, target: Tensor, senders: int, receivers: int) -> Sums:
    """Sums of messages by gathering and adding."""
    return lambda h: h.new_zeros(receivers, h.shape[1]).index_add(0, target, h[source])


def by_bag(source: Tensor, target: Tensor, senders: int, receivers: int) -> Sums:
    """Sums of messages as embedding bags."""

    def bag(starts: Tensor, columns: Tensor) -> Sums:
        return lambda h: F.embedding_bag(columns, h, starts, mode="sum", include_last_offset=True)

    there, back = bag(*rows(target, source, receivers)), bag(*rows(source, target, senders))
    return lambda h: Constant.apply(h, there, back)


WAYS: dict[str, Callable[..., Sums]] = {"csr": by_csr, "index_add": by_index_add, "embedding_bag": by_bag}


class NodeGIN(nn.Module):
    """GIN node by node, with the weights of one of our networks."""

    def __init__(self, nets: GraphNetworks, graphs: Graphs, way: str) -> None:
        super().__init__()
        nodes = len(graphs.x)
        self.receive = WAYS[way](*graphs.edge_index, nodes, nodes)
        self.add_up = WAYS[way](torch.arange(nodes), graphs.batch, nodes, len(graphs))
        self.x: Tensor = graphs.spec.features(graphs.x)
        self.sizes: Tensor = graphs.nodes[:, None].float()
        self.eps = nn.ParameterList(layer.eps.detach()[0].clone() for layer in nets.layers)
        maps = [linear for layer in nets.layers for linear in (layer.first, layer.second)]
        self.maps = nn.ModuleList(self.copied(linear) for linear in maps)
        self.classifier = self.copied(nets.classifier)

    @staticmethod
    def copied(stacked: Any) -> nn.Linear:
        """The first of stacked linear maps."""
        linear = nn.utils.skip_init(nn.Linear, *stacked.weight.shape[1:])
        linear.weight.data, linear.bias.data = stacked.weight.data[0].T.clone(), stacked.bias.data[0].clone()
        return linear

    def forward(self) -> Tensor:
        """Logits of all graphs."""
        h = self.x
        for i, eps in enumerate(self.eps):
            summed = (1 + eps) * h + self.receive(h)
            h = self.maps[2 * i + 1](self.maps[2 * i](summed).relu()).relu()
        return self.classifier(self.add_up(h) / self.sizes)


class Run:
    """One thing to time: epochs of training and what they took."""

    def __init__(self, net: nn.Module, forward: Callable[[], Tensor], y: Tensor) -> None:
        self.optimiser, self.forward, self.y = torch.optim.Adam(net.parameters(), LR), forward, y
        self.seconds: list[float] = []

    def epoch(self) -> None:
        """Train one epoch, timed."""
        began = time.process_time()
        logits = self.forward()
        self.optimiser.zero_grad()
        copies = len(logits) if logits.ndim == 3 else 1
        targets = self.y.repeat(copies)
        (copies * F.cross_entropy(logits.reshape(len(targets), -1), targets)).backward()
        self.optimiser.step()
        self.seconds.append(time.process_time() - began)


def turns(runs: Sequence[Run], repeat: int) -> None:
    """`repeat` timed epochs of each, in turn, after two that do not count."""
    for run in runs:
        run.epoch()
        run.epoch()
        run.seconds.clear()
    for _ in range(repeat):
        for run in runs:
            run.epoch()


def largest(difference: Tensor) -> float:
    """The largest absolute value."""
    return float(difference.detach().abs().max())


def networks(graphs: Graphs, depth: int, width: int, seeds: Sequence[int]) -> GraphNetworks:
    spec = NetSpec("gin", width=width, depth=depth)
    return build_graph_networks(spec, graphs.spec, [Rng(seed).torch("weights") for seed in seeds])


def on(nets: GraphNetworks, trees: Trees) -> Run:
    planned = nets.plan(trees)
    return Run(nets, lambda: nets(planned), trees.y)


def fastest(graphs: Graphs, depth: int, width: int) -> tuple[str, dict[str, float]]:
    """The way to add messages up that the plain version is fastest with, and the milliseconds of each."""
    found = {}
    for way in WAYS:
        net = NodeGIN(networks(graphs, depth, width, [0]), graphs, way)
        run = Run(net, net, graphs.y)
        turns([run], 3)
        found[way] = spread(run.seconds)["median"]
    return min(found, key=lambda way: found[way]), found


def spread(seconds: Sequence[float]) -> dict[str, float]:
    """Median and quartiles in milliseconds."""
    low, middle, high = statistics.quantiles(seconds, n=4)
    return {"median": 1e3 * middle, "q1": 1e3 * low, "q3": 1e3 * high}


def ratios(slow: Sequence[float], quick: Sequence[float]) -> dict[str, float]:
    """Median and quartiles of how many times faster, turn by turn."""
    low, middle, high = statistics.quantiles([a / b for a, b in zip(slow, quick, strict=True)], n=4)
    return {"median": middle, "q1": low, "q3": high}


def against_nodes(graphs: Graphs, depth: int, given: argparse.Namespace) -> dict[str, Any]:
    """The row of one depth: the DAG, the plain version and our code without sharing, in turns."""
    began = time.process_time()
    trees = trees_of(graphs, depth)
    built = time.process_time() - began
    way, ways = fastest(graphs, depth, given.width)
    nets, same = (networks(graphs, depth, given.width, [0]) for _ in range(2))
    plain = NodeGIN(nets, graphs, way)
    runs = [on(nets, trees), Run(plain, plain, graphs.y), on(same, node_trees(graphs, depth))]
    before = largest(runs[0].forward()[0] - plain())
    turns(runs, given.repeat)
    after = largest(runs[0].forward()[0] - NodeGIN(nets, graphs, way)())
    dag, node, unshared = (run.seconds for run in runs)
    return {
        "depth": depth,
        "colors": trees.dag.sizes,
        "nodes": len(graphs.x),
        "dag_build_seconds": built,
        "plain_ways_ms": ways,
        "plain_way": way,
        "ms": {"dag": spread(dag), "plain": spread(node), "our code, no sharing": spread(unshared)},
        "times_faster": {"plain": ratios(node, dag), "our code, no sharing": ratios(unshared, dag)},
        "logits_differ_by": {"initial weights": before, f"weights after {given.repeat + 2} steps": after},
    }


def at_once(graphs: Graphs, depth: int, given: argparse.Namespace) -> dict[str, Any]:
    """The row of several networks at once against one after another, on the DAG."""
    trees, seeds = trees_of(graphs, depth), range(given.seeds)
    together = on(networks(graphs, depth, given.width, seeds), trees)
    alone = [on(networks(graphs, depth, given.width, [seed]), trees) for seed in seeds]
    difference = largest(together.forward() - torch.cat([run.forward() for run in alone]))
    turns([together, *alone], given.repeat)
    after = [sum(seconds) for seconds in zip(*(run.seconds for run in alone), strict=True)]
    return {
        "depth": depth,
        "seeds": given.seeds,
        "ms": {"at once": spread(together.seconds), "one after another": spread(after)},
        "times_faster": ratios(after, together.seconds),
        "logits_differ_by": {"initial weights": difference},
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--name", default="NCI1")
    parser.add_argument("--depths", type=int, nargs="+", default=[2, 3])
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--repeat", type=int, default=15)
    parser.add_argument("--out", type=Path, default=RESULTS / "dag_epoch.json")
    given = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", "Sparse")
    found = load_graphs("tu", given.name, root=given.root, download=False)
    graphs = joined([found.fit, found.validation, found.test])
    setting = {"dataset": given.name, "graphs": len(graphs), "width": given.width, "repeat": given.repeat}
    report = {
        "setting": setting,
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
        "rows": [against_nodes(graphs, depth, given) for depth in given.depths],
        "several": [at_once(graphs, depth, given) for depth in given.depths],
    }
    write_json(given.out, report)
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
