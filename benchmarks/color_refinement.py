"""Colour refinement against plain labelling of explicit trees, and its time and memory on large inputs.

    python benchmarks/color_refinement.py --root DIR [--repeat 15]

DIR (or $DDENGINE_DATA) holds the TU folders MUTAG and NCI1. The plain versions unroll the tree of each node
breadth first over all neighbours and label it by recursion with sorted, delimited strings, edge labels
included: over objects that hold their children, strings mapped to ids by a dict (the published method read
straight); over networkx graphs, one for the set and one for each tree; over bare lists, the least that Python
can do. Their partitions must equal the refinement's. All run in this process, in turn; parsing is not
counted. A ratio is that of a turn, the plain time over the median of ten refinements.

The large input is generated: threads in which most replies go to a few posts, of the size of REDDIT-BINARY.
Memory is the most that arrays held beside the input, by tracemalloc, in a run that is not timed.
"""

import argparse
import gc
import json
import os
import platform
import sys
import time
import tracemalloc
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import networkx as nx
import numpy as np
import torch

from ddengine.files import write_json
from ddengine.ops.refinement import Coloring, color_refinement
from ddengine.rng import Rng

RESULTS = Path(os.environ.get("RESULTS", Path(__file__).parent / "results"))
GRAPHS, NODES = 2_000, 860_000  # REDDIT-BINARY has 2,000 graphs with 859,254 nodes
EXTRA = 0.16  # edges for each node beside those of a tree: it has 497.75 edges on 429.63 nodes

Codes = tuple[np.ndarray, np.ndarray, np.ndarray]  # x [n 1], edge_index [2 e], edge_attr [e q]
Received = list[list[tuple[int, int]]]  # for each node the (edge label, sender) pairs of its messages


def column(folder: Path, part: str) -> np.ndarray:
    """The integers of one file of a TU set."""
    text = (folder / f"{folder.name}_{part}.txt").read_text()
    return np.array(text.replace(",", " ").split(), dtype=np.int64)


def read(folder: Path, graphs: int | None) -> Codes:
    """Node labels, edges and edge labels (a constant where there are none) of the first `graphs` graphs."""
    ends = column(folder, "A").reshape(-1, 2).T - 1
    labelled = (folder / f"{folder.name}_edge_labels.txt").exists()
    attr = column(folder, "edge_labels") if labelled else np.zeros(ends.shape[1], np.int64)
    batch = column(folder, "graph_indicator")
    kept = batch <= (graphs or batch[-1])
    edges = kept[ends[0]]  # graphs stand one after the other: numbers stay
    return column(folder, "node_labels")[kept][:, None], ends[:, edges], attr[edges][:, None]


def threads(rng: Rng) -> Codes:
    """Graphs like discussion threads: a reply goes to the first post or, less often, to a later one."""
    generator = rng.numpy("threads")
    cuts = np.sort(generator.choice(np.arange(1, NODES // 2), GRAPHS - 1, replace=False)) * 2
    starts, sizes = np.r_[0, cuts], np.diff(np.r_[0, cuts, NODES])
    inside = np.arange(NODES) - np.repeat(starts, sizes)
    first = np.repeat(starts, sizes)
    reply = np.flatnonzero(inside)
    to = first[reply] + (inside[reply] * generator.random(len(reply)) ** 4).astype(np.int64)
    more = generator.choice(reply, int(EXTRA * NODES))
    again = first[more] + (inside[more] * generator.random(len(more)) ** 2).astype(np.int64)
    one_way = np.stack([np.r_[reply, more], np.r_[to, again]])
    ends = np.hstack([one_way, one_way[::-1]])
    return np.zeros((NODES, 1), np.int64), ends, np.zeros((ends.shape[1], 0), np.int64)


@dataclass
class Place:
    """A place of an explicit tree: a node, its label and that of the edge to it, and its children."""

    node: int
    label: int
    edge: int | None = None
    depth: int = 0
    children: list["Place"] = field(default_factory=list)

    def named(self) -> str:
        """The canonical string of the tree below."""
        parts = sorted(f"{child.edge}:{child.named()}" for child in self.children)
        return f"{self.label}({','.join(parts)})"


def with_objects(codes: Codes, hops: int) -> list[int]:
    """The id of each node's explicit tree, built of objects, by a dict of canonical strings."""
    labels, received, ids = codes[0][:, 0].tolist(), messages(codes), dict[str, int]()
    trees = (_grown(root, hops, labels, received) for root in range(len(labels)))
    return [ids.setdefault(tree.named(), len(ids)) for tree in trees]


def _grown(root: int, hops: int, labels: list[int], received: Received) -> Place:
    tree = Place(root, labels[root])
    queue = deque([tree])
    while queue and queue[0].depth < hops:
        place = queue.popleft()
        for edge, sender in received[place.node]:
            place.children.append(Place(sender, labels[sender], edge, place.depth + 1))
        queue += place.children
    return tree


def messages(codes: Codes) -> Received:
    """What each node receives."""
    x, ends, attr = codes
    received: Received = [[] for _ in range(len(x))]
    for source, target, label in zip(*ends.tolist(), attr[:, 0].tolist(), strict=True):
        received[target].append((label, source))
    return received


def with_lists(codes: Codes, hops: int) -> list[str]:
    """The canonical string of each node's explicit tree, unrolled into lists."""
    labels, received = codes[0][:, 0].tolist(), messages(codes)
    return [_named(*_unrolled(root, hops, received), labels) for root in range(len(labels))]


def _unrolled(root: int, hops: int, received: Received) -> tuple[list[int], list[list[Any]]]:
    """A tree's places: the graph's node at each, and (edge label, place) of its children."""
    nodes, layer = [root], [0]
    children: list[list[Any]] = [[]]
    for _ in range(hops):
        below: list[int] = []
        for place in layer:
            for label, node in received[nodes[place]]:
                children[place].append((label, len(nodes)))
                below.append(len(nodes))
                nodes.append(node)
                children.append([])
        layer = below
    return nodes, children


def _named(nodes: list[int], children: list[list[Any]], labels: list[int], place: int = 0) -> str:
    parts = [f"{label}:{_named(nodes, children, labels, child)}" for label, child in children[place]]
    return f"{labels[nodes[place]]}({','.join(sorted(parts))})"


def with_networkx(codes: Codes, hops: int) -> list[str]:
    """The canonical string of each node's explicit tree, a networkx graph of its own."""
    x, ends, attr = codes
    graph = nx.MultiDiGraph()
    graph.add_nodes_from((node, {"label": label}) for node, label in enumerate(x[:, 0].tolist()))
    graph.add_weighted_edges_from(zip(*ends.tolist(), attr[:, 0].tolist(), strict=True), weight="label")
    return [_tree_named(_tree(graph, root, hops), 0) for root in graph]


def _tree(graph: nx.MultiDiGraph, root: int, hops: int) -> nx.DiGraph:
    tree, layer = nx.DiGraph(), [0]
    tree.add_node(0, node=root, label=graph.nodes[root]["label"])
    for _ in range(hops):
        below = []
        for place in layer:
            for sender, _, label in graph.in_edges(tree.nodes[place]["node"], data="label"):
                below.append(len(tree))
                tree.add_node(below[-1], node=sender, label=graph.nodes[sender]["label"])
                tree.add_edge(place, below[-1], label=label)
        layer = below
    return tree


def _tree_named(tree: nx.DiGraph, place: int) -> str:
    children = tree[place].items()
    parts = [f"{edge['label']}:{_tree_named(tree, child)}" for child, edge in children]
    return f"{tree.nodes[place]['label']}({','.join(sorted(parts))})"


PLAIN: dict[str, tuple[Callable[[Codes, int], Sequence[object]], str]] = {
    "objects": (with_objects, "trees of Python objects with children, strings mapped to ids by a dict"),
    "networkx": (with_networkx, "one networkx graph for the set and one for each tree, strings"),
    "lists": (with_lists, "trees unrolled into bare Python lists, strings"),
}


def same_partition(names: Sequence[object], colors: np.ndarray) -> bool:
    """Whether two labellings put the same nodes together."""
    pairs = len(set(zip(names, colors.tolist(), strict=True)))
    return pairs == len(set(names)) == len(np.unique(colors))


def timed(work: Callable[[], Any], repeat: int) -> tuple[list[float], Any]:
    """CPU seconds of this process for each repeat, and the last result; garbage of others is not counted."""
    gc.collect()
    seconds = []
    for _ in range(repeat):
        began = time.process_time()
        result = work()
        seconds.append(time.process_time() - began)
    return seconds, result


def spread(values: list[float]) -> dict[str, float]:
    """Median, distance of the quartiles, and least."""
    low, middle, high = np.quantile(values, (0.25, 0.5, 0.75)).tolist()
    return {"median": middle, "iqr": high - low, "min": min(values)}


def compared(name: str, codes: Codes, hops: int, repeat: int) -> dict[str, Any]:
    """The row of one input: all versions in turn, ten times as many runs of ours, partitions compared."""
    color_refinement(*codes, hops=hops)
    seconds: dict[str, list[float]] = {"refinement": [], **{version: [] for version in PLAIN}}
    ratios: dict[str, list[float]] = {version: [] for version in PLAIN}
    for _ in range(repeat):
        ours, coloring = timed(lambda: color_refinement(*codes, hops=hops), 10)
        seconds["refinement"] += ours
        for version, (label, _) in PLAIN.items():
            (plain,), names = timed(partial(label, codes, hops), 1)
            seconds[version].append(plain)
            ratios[version].append(plain / float(np.median(ours)))
            if not same_partition(names, coloring.colors[-1]):
                sys.exit(f"{name}: the partition of {version} differs")
    return {
        **described(name, codes, hops, coloring),
        "seconds": {version: spread(found) for version, found in seconds.items()},
        "times_faster": {version: spread(found) for version, found in ratios.items()},
        "same_partition": True,
    }


def alone(name: str, codes: Codes, hops: int, repeat: int) -> dict[str, Any]:
    """The row of an input by refinement alone, with and without its exact check."""
    work, checked = (partial(color_refinement, *codes, hops=hops, check=check) for check in (False, True))
    held = memory(work)
    seconds, coloring = timed(work, repeat)
    return {
        **described(name, codes, hops, coloring),
        "seconds": {"refinement": spread(seconds), "checked": spread(timed(checked, repeat)[0])},
        "memory_bytes": held,
        "memory_bytes_per_edge": held / codes[1].shape[1],
    }


def described(name: str, codes: Codes, hops: int, coloring: Coloring) -> dict[str, Any]:
    """What an input is and how many colours it has at each level."""
    sizes = {"nodes": len(codes[0]), "edges": codes[1].shape[1]}
    return {"input": name, **sizes, "hops": hops, "colors": coloring.sizes}


def memory(work: Callable[[], Any]) -> int:
    """Most bytes that are held at once while this runs, its result included."""
    tracemalloc.start()
    work()
    held = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return held


def table(rows: list[dict[str, Any]]) -> str:
    """The rows in Markdown: medians of milliseconds, and of ratios with the distance of the quartiles."""
    versions = ("refinement", "checked", *PLAIN)
    names = ("input", "nodes", "hops", "colours", *(f"{version}, ms" for version in versions), "memory, MB")
    lines = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    for row in rows:
        middle = {version: f"{1e3 * found['median']:.2f}" for version, found in row["seconds"].items()}
        for version, ratio in row.get("times_faster", {}).items():
            middle[version] += f" ({ratio['median']:.0f}x, IQR {ratio['iqr']:.0f})"
        held = f"{row['memory_bytes'] / 1e6:.1f}" if "memory_bytes" in row else ""
        cells = [row["input"], row["nodes"], row["hops"], "/".join(map(str, row["colors"]))]
        cells += [*(middle.get(version, "") for version in versions), held]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    root = os.environ.get("DDENGINE_DATA")
    parser.add_argument("--root", type=Path, default=root, required=root is None)
    parser.add_argument("--repeat", type=int, default=15)
    parser.add_argument("--out", type=Path, default=RESULTS / "color_refinement.json")
    given = parser.parse_args()
    torch.set_num_threads(1)
    some = read(given.root / "NCI1", 300)
    rows = [
        compared("MUTAG", read(given.root / "MUTAG", None), 2, given.repeat),
        compared("NCI1, 300 graphs", some, 2, given.repeat),
        compared("NCI1, 300 graphs", some, 3, given.repeat),
        alone("NCI1", read(given.root / "NCI1", None), 3, given.repeat),
        alone("threads, generated", threads(Rng(0)), 3, given.repeat),
    ]
    setting = {
        "repeat": given.repeat,
        "threads": 1,
        "clock": "CPU seconds of the process",
        "versions": {
            "refinement": "color_refinement of ddengine, by hashes",
            "checked": "the same with its exact check",
            **{version: words for version, (_, words) in PLAIN.items()},
        },
        "times_faster": "plain over refinement (median of 10 runs), turn by turn",
    }
    machine = {
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "networkx": nx.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }
    write_json(given.out, {"setting": setting, **machine, "rows": rows})
    print(json.dumps(setting))
    print(table(rows))


if __name__ == "__main__":
    main()
