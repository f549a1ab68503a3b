"""Graph sets in the raw text form of the TU Dortmund collection (Morris et al., TUDataset, 2020)."""

import contextlib
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ddengine.data.raw_graphs import RawGraphs, is_blank, read_integers, read_numbers, require_rows
from ddengine.errors import UsageError, one_line

PLACES = ("{name}", "{name}/raw", "", "raw", "graphs/{name}", "TUDataset/{name}/raw")
REQUIRED = ("A", "graph_indicator", "graph_labels")
PUBLISHED = {
    "MUTAG": 188, "NCI1": 4110, "PROTEINS": 1113, "DD": 1178,
    "IMDB-BINARY": 1000, "IMDB-MULTI": 1500, "REDDIT-BINARY": 2000,
}  # fmt: skip  # graphs of the published sets; "cleaned" archives under the same names hold fewer


def read_tu(root: Path, name: str, download: bool = False) -> RawGraphs:
    """The set `name` from NAME_A.txt, NAME_graph_indicator.txt and NAME_graph_labels.txt below `root`.

    Node and edge labels and attributes are read where their files lie beside these; nodes and graphs are
    numbered from 1 there. Where NAME_A.txt is blank, and what lies beside it for edges, no graph has an edge.
    `download` lets torch_geometric fetch a set that is not there into root/NAME/raw.
    Raises UsageError that names file and row for whatever does not fit together.
    """
    folder = _folder(root, name)
    if folder is None:
        folder = _fetched(root, name, download)
    files = {part: folder / f"{name}_{part}.txt" for part in REQUIRED}
    missing = [path for path in files.values() if not path.is_file()]
    if missing:
        raise UsageError(f"{missing[0]} is missing", f"Put all files of {name} into one folder")
    y, classes = _classes(files["graph_labels"])
    batch, order = _batch(files["graph_indicator"], files["graph_labels"], len(y))
    nodes, of = torch.from_numpy(order), files["graph_indicator"]
    on_nodes = [_rows(folder, f"{name}_node_{kind}", len(batch), of) for kind in ("labels", "attributes")]
    edges = _edges(files["A"], batch, order)
    on_edges = [
        _rows(folder, f"{name}_edge_{kind}", edges.shape[1], files["A"]) for kind in ("labels", "attributes")
    ]
    return RawGraphs(
        name,
        edges,
        torch.from_numpy(batch),
        y,
        classes,
        node_labels=None if on_nodes[0] is None else on_nodes[0][nodes],
        node_attributes=None if on_nodes[1] is None else on_nodes[1][nodes],
        edge_labels=on_edges[0],
        edge_attributes=on_edges[1],
        notes=_notes(name, len(y)),
        licence="none stated",
    )


def _folder(root: Path, name: str) -> Path | None:
    """The first of PLACES that holds one of the required files."""
    folders = [root / place.format(name=name) for place in PLACES]
    return next((f for f in folders if any((f / f"{name}_{part}.txt").is_file() for part in REQUIRED)), None)


def _fetched(root: Path, name: str, download: bool) -> Path:
    """The folder of `name` after torch_geometric has fetched it into `root` (UsageError where it has not)."""
    places = ", ".join(place.format(name=name) or "." for place in PLACES)
    where = f"'{name}' is not at {root} (looked for {name}_A.txt in {places})"
    remedy = f"Put its raw TU files into {root / name}, or set dataset.root=DIR"
    if not download:
        raise UsageError(f"{where}: downloading is switched off", remedy)
    try:
        from torch_geometric.datasets import TUDataset
    except ImportError as error:
        raise UsageError(
            f"{where}: downloading it needs torch_geometric",
            f'Install it: pip install "ddengine[graph]". Or: {remedy}',
        ) from error
    try:
        with contextlib.redirect_stdout(sys.stderr):
            TUDataset(str(root), name)
    except Exception as error:  # whatever its network, archive and tensor libraries raise
        reason = one_line(" ".join(str(error).split())[:160] or type(error).__name__)
        raise UsageError(f"{where}: the download failed ({reason})", f"Check the name. {remedy}") from error
    folder = _folder(root, name)
    if folder is None:
        raise UsageError(f"{where}: the download is incomplete", remedy)
    return folder


def _classes(path: Path) -> tuple[Tensor, tuple[str, ...]]:
    table = read_integers(path)
    if table.shape[1] != 1:
        raise UsageError(f"{path} has {table.shape[1]} columns", "Give one class label for each graph")
    labels, y = np.unique(table[:, 0], return_inverse=True)
    return torch.from_numpy(y.astype(np.int64)), tuple(str(label) for label in labels)


def _batch(path: Path, labels: Path, graphs: int) -> tuple[np.ndarray, np.ndarray]:
    """The graph number of each node from 0, sorted, and the order of nodes that sorts them."""
    table = read_integers(path)
    low, high = int(table.min()), int(table.max())
    if table.shape[1] != 1 or low < 1:
        raise UsageError(
            f"{path} is no column of graph numbers from 1", "Give the graph of each node, from 1"
        )
    if high > graphs:
        raise UsageError(
            f"{path} counts graphs up to {high}, {labels.name} has {graphs} rows",
            "Give one class label for each graph",
        )
    empty = np.flatnonzero(np.bincount(table[:, 0], minlength=graphs + 1)[1:] == 0)
    if len(empty):
        raise UsageError(
            f"{path}: graph {empty[0] + 1} of {graphs} has no node",
            "Remove it and its label, and number graphs without gaps",
        )
    order = np.argsort(table[:, 0], kind="stable")
    return table[order, 0] - 1, order


def _rows(folder: Path, stem: str, count: int, of: Path) -> Tensor | None:
    """Labels or attributes of nodes or edges, one row for each; None without such a file or unit."""
    path = folder / f"{stem}.txt"
    if not path.is_file() or (not count and is_blank(path)):
        return None
    table = read_numbers(path) if stem.endswith("attributes") else read_integers(path)
    require_rows(path, len(table), count, of)
    return torch.from_numpy(table)


def _edges(path: Path, batch: np.ndarray, order: np.ndarray) -> Tensor:
    """Edges in the order of the file, between nodes as `order` has sorted them."""
    beside = [path.with_name(f"{path.stem[:-1]}edge_{kind}.txt") for kind in ("labels", "attributes")]
    if all(is_blank(file) for file in (path, *beside) if file.is_file()):
        return torch.zeros(2, 0, dtype=torch.long)
    table, n = read_integers(path), len(order)
    if table.shape[1] != 2:
        raise UsageError(f"{path} has {table.shape[1]} columns", "Give two node numbers in each row")
    wrong = np.argwhere((table < 1) | (table > n))
    if len(wrong):
        row, column = wrong[0]
        raise UsageError(
            f"{path}: row {row + 1} names node {table[row, column]}, outside 1..{n}",
            "Number nodes from 1, in the order of the graph indicator",
        )
    place = np.empty_like(order)
    place[order] = np.arange(n)
    ends = place[table - 1].T
    crossing = np.flatnonzero(batch[ends[0]] != batch[ends[1]])
    if len(crossing):
        source, target = table[crossing[0]]
        raise UsageError(
            f"{path}: row {crossing[0] + 1} joins node {source} of graph {batch[ends[0, crossing[0]]] + 1} "
            f"to node {target} of graph {batch[ends[1, crossing[0]]] + 1}",
            "Let each edge stay inside one graph",
        )
    return torch.from_numpy(np.ascontiguousarray(ends))


def _notes(name: str, graphs: int) -> tuple[str, ...]:
    if PUBLISHED.get(name, graphs) == graphs:
        return ()
    return (f"{name} has {graphs} graphs here, {PUBLISHED[name]} as published: this is other data",)
