"""Graph sets in the raw csv form of the Open Graph Benchmark (Hu et al., NeurIPS 2020)."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ddengine.data.raw_graphs import (
    RawGraphs,
    is_blank,
    read_integers,
    read_numbers,
    read_text,
    require_rows,
)
from ddengine.errors import UsageError

PLACES = ("{name}", "", "graphs/{name}", "ogb/{name}")
PARTS = ("train", "valid", "test")
MISSING = ("", "nan")


def read_ogb(root: Path, name: str, download: bool = False) -> RawGraphs:
    """The set `name`, such as ogbg-molbace, from raw/*.csv.gz and split/SCHEME/*.csv.gz below `root`.

    An edge is listed once there and becomes two messages with the same label, as OGB's loader makes them for
    these sets. Columns that hold integers only are labels, the others attributes. The official split is
    used. Nothing is downloaded, whatever `download` says. Raises UsageError that names file and row.
    """
    folder = _folder(root, name)
    raw = folder / "raw"
    nodes, edges = (_counts(raw / f"num-{kind}-list.csv.gz") for kind in ("node", "edge"))
    if len(edges) != len(nodes):
        require_rows(raw / "num-edge-list.csv.gz", len(edges), len(nodes), raw / "num-node-list.csv.gz")
    y, classes = _classes(raw / "graph-label.csv.gz")
    require_rows(raw / "graph-label.csv.gz", len(y), len(nodes), raw / "num-node-list.csv.gz")
    batch = np.repeat(np.arange(len(nodes)), nodes)
    node_labels, node_attributes = _features(
        raw / "node-feat.csv.gz", len(batch), raw / "num-node-list.csv.gz"
    )
    edge_index = _edges(raw / "edge.csv.gz", raw / "num-edge-list.csv.gz", nodes, edges)
    listed = _features(raw / "edge-feat.csv.gz", edge_index.shape[1] // 2, raw / "edge.csv.gz")
    edge_labels, edge_attributes = (None if t is None else t.repeat_interleave(2, 0) for t in listed)
    return RawGraphs(
        folder_name(name).replace("_", "-"), edge_index, torch.from_numpy(batch), y, classes,
        node_labels, node_attributes, edge_labels, edge_attributes,
        parts=_parts(folder / "split", len(y)), licence="MIT",
    )  # fmt: skip


def folder_name(name: str) -> str:
    """The folder that OGB gives a set: ogbg_molbace for ogbg-molbace."""
    return name.replace("-", "_")


def _folder(root: Path, name: str) -> Path:
    folders = [root / place.format(name=spelt) for spelt in (folder_name(name), name) for place in PLACES]
    found = next((f for f in folders if (f / "raw" / "edge.csv.gz").is_file()), None)
    if found is None:
        places = ", ".join(place.format(name=folder_name(name)) or "." for place in PLACES)
        raise UsageError(
            f"'{name}' is not at {root} (looked for raw/edge.csv.gz in {places}) and is never downloaded",
            f"Unpack its archive, with the folders raw and split, into {root / folder_name(name)}",
        )
    return found


def _counts(path: Path) -> np.ndarray:
    table = read_integers(path)
    least = 1 if path.name.startswith("num-node") else 0
    wrong = np.flatnonzero(table[:, 0] < least)
    if table.shape[1] != 1 or len(wrong):
        row = f"row {wrong[0] + 1} holds {table[wrong[0], 0]}" if len(wrong) else "it has several columns"
        raise UsageError(f"{path}: {row}", f"Give one count of at least {least} for each graph")
    return table[:, 0]


def _classes(path: Path) -> tuple[Tensor, tuple[str, ...]]:
    """Class numbers and names; one task whose label every graph has."""
    rows = read_text(path).rstrip("\n").split("\n")
    several = rows[0].count(",") + 1
    missing = sum(row.strip().lower() in MISSING for row in rows)
    if several > 1 or missing:
        cause = (
            f"has {several} tasks" if several > 1 else f"lacks the labels of {missing} of {len(rows)} graphs"
        )
        raise UsageError(f"{path} {cause}", "Give a set of one task in which every graph has a class")
    labels, y = np.unique(read_integers(path)[:, 0], return_inverse=True)
    return torch.from_numpy(y.astype(np.int64)), tuple(str(label) for label in labels)


def _features(path: Path, count: int, of: Path) -> tuple[Tensor | None, Tensor | None]:
    """The columns of integers, and those of other numbers; None where there are none of that kind."""
    if not path.is_file() or (not count and is_blank(path)):
        return None, None
    table = read_numbers(path)
    require_rows(path, len(table), count, of)
    whole = (table == np.rint(table)).all(0)
    labels, attributes = torch.from_numpy(table[:, whole]).long(), torch.from_numpy(table[:, ~whole])
    return (labels if whole.any() else None), (None if whole.all() else attributes)


def _edges(path: Path, of: Path, nodes: np.ndarray, edges: np.ndarray) -> Tensor:
    """Both directions of every edge side by side, nodes numbered over all graphs."""
    if not edges.any() and is_blank(path):
        return torch.zeros(2, 0, dtype=torch.long)
    table = read_integers(path)
    if table.shape[1] != 2:
        raise UsageError(f"{path} has {table.shape[1]} columns", "Give two node numbers in each row")
    require_rows(path, len(table), int(edges.sum()), of)
    owner = np.repeat(np.arange(len(nodes)), edges)
    wrong = np.argwhere((table < 0) | (table >= nodes[owner][:, None]))
    if len(wrong):
        row, column = wrong[0]
        raise UsageError(
            f"{path}: row {row + 1} names node {table[row, column]} of a graph of {nodes[owner[row]]} nodes",
            "Number the nodes of each graph from 0",
        )
    ends = torch.from_numpy(table + (np.cumsum(nodes) - nodes)[owner][:, None]).T
    return torch.stack([ends, ends.flip(0)], dim=2).flatten(1)


def _parts(folder: Path, graphs: int) -> tuple[Tensor, Tensor, Tensor]:
    """The official split: the one scheme below `folder`."""
    schemes = sorted(p.name for p in folder.iterdir() if p.is_dir()) if folder.is_dir() else []
    if len(schemes) != 1:
        found = ", ".join(schemes) or "none"
        raise UsageError(
            f"{folder} must hold one splitting scheme, it holds {found}",
            "Keep one folder there, such as scaffold, with train.csv.gz, valid.csv.gz and test.csv.gz",
        )
    paths = [folder / schemes[0] / f"{part}.csv.gz" for part in PARTS]
    indices = [read_integers(path).flatten() for path in paths]
    for path, index in zip(paths, indices, strict=True):
        wrong = index[(index < 0) | (index >= graphs)]
        if len(wrong):
            raise UsageError(f"{path} names graph {wrong[0]}, outside 0..{graphs - 1}", "Restore the split")
    seen, times = np.unique(np.concatenate(indices), return_counts=True)
    if (times > 1).any():
        raise UsageError(
            f"{folder / schemes[0]} names graph {seen[times > 1][0]} more than once",
            "Restore the split: its parts must not overlap",
        )
    fit, validation, test = (torch.from_numpy(index) for index in indices)
    return fit, validation, test
