"""Small graph sets written as TU text and OGB csv, as the published sets lie on disk."""

import gzip
from pathlib import Path

import numpy as np

UNITS = ("node_labels", "node_attributes", "edge_labels", "edge_attributes")


def write_tu(folder: Path, name: str, graphs: list[dict], comma: str = ", ") -> Path:
    """Write NAME_*.txt into `folder` (made if it is not there) and return it.

    A graph is a dict: `y` its class (an integer), `n` its nodes, `edges` a list of pairs (source, target) of
    its nodes from 0, one line of NAME_A.txt each (list both directions of an undirected edge). Optional are
    `node_labels` and `node_attributes` (a row for each node) and `edge_labels` and `edge_attributes` (a row
    for each pair); a row is a number or a tuple of numbers. All graphs have the same of these.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows: dict[str, list] = {"A": [], "graph_indicator": [], "graph_labels": []}
    start = 1
    for number, graph in enumerate(graphs, 1):
        rows["A"] += [(u + start, v + start) for u, v in graph["edges"]]
        rows["graph_indicator"] += [number] * graph["n"]
        rows["graph_labels"].append(graph["y"])
        for unit in UNITS:
            if unit in graph:
                rows.setdefault(unit, []).extend(graph[unit])
        start += graph["n"]
    for part, lines in rows.items():
        (folder / f"{name}_{part}.txt").write_text("".join(_line(row, comma) for row in lines))
    return folder


def write_ogb(
    folder: Path, graphs: list[dict], parts: tuple[list, list, list], scheme: str = "scaffold"
) -> Path:
    """Write raw/*.csv.gz and split/SCHEME/*.csv.gz into `folder` and return it.

    Graphs as for `write_tu`, but `edges` lists one direction of each edge, and labels and attributes are
    columns of one file. `parts` are the indices of the train, valid and test part.
    """
    raw, split = folder / "raw", folder / "split" / scheme
    content = {
        raw / "num-node-list": [graph["n"] for graph in graphs],
        raw / "num-edge-list": [len(graph["edges"]) for graph in graphs],
        raw / "edge": [edge for graph in graphs for edge in graph["edges"]],
        raw / "graph-label": [graph["y"] for graph in graphs],
        **{split / part: rows for part, rows in zip(("train", "valid", "test"), parts, strict=True)},
    }
    for unit, key in (("node", "node_labels"), ("edge", "edge_labels")):
        if key in graphs[0]:
            content[raw / f"{unit}-feat"] = [row for graph in graphs for row in graph[key]]
    for path, lines in content.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_name(f"{path.name}.csv.gz").write_bytes(
            gzip.compress("".join(_line(row, ",") for row in lines).encode())
        )
    return folder


def random_graph(rng: np.random.Generator, y: int, nodes: int, labels: int = 3, edge_labels: int = 2) -> dict:
    """An undirected graph of `nodes` nodes, isolated ones among them, with node and edge labels."""
    pairs = [(u, v) for u in range(nodes) for v in range(u) if rng.random() < 0.4]
    marks = rng.integers(0, edge_labels, len(pairs)).tolist()
    return {
        "y": y,
        "n": nodes,
        "edges": [end for u, v in pairs for end in ((u, v), (v, u))],
        "node_labels": rng.integers(0, labels, nodes).tolist(),
        "edge_labels": [mark for mark in marks for _ in range(2)],
    }


def random_set(count: int, seed: int = 0, classes: tuple[int, ...] = (-1, 1)) -> list[dict]:
    """`count` random graphs of 5 to 11 nodes, their classes in turn."""
    rng = np.random.default_rng(seed)
    return [random_graph(rng, classes[i % len(classes)], int(rng.integers(5, 12))) for i in range(count)]


def renumbered(graph: dict, rng: np.random.Generator) -> dict:
    """The same graph with its nodes and its edges in another order."""
    place, order = rng.permutation(graph["n"]), rng.permutation(len(graph["edges"]))
    back = np.argsort(place)
    moved = dict(graph, edges=[tuple(int(place[end]) for end in graph["edges"][i]) for i in order])
    for unit in UNITS:
        if unit in graph:
            moved[unit] = [graph[unit][i] for i in (back if unit.startswith("node") else order)]
    return moved


def _line(row: object, comma: str) -> str:
    return comma.join(str(v) for v in row) + "\n" if isinstance(row, (tuple, list)) else f"{row}\n"
