"""Splits of graphs that depend on their content alone, never on how graphs or nodes are numbered."""

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Int, UInt64
from torch import Tensor

from ddengine.data.split import held_out
from ddengine.errors import UsageError
from ddengine.graphs import Graphs
from ddengine.ops.refinement import graph_hashes
from ddengine.rng import Rng

Parts = tuple[Int[Tensor, " _"], Int[Tensor, " _"], Int[Tensor, " _"]]
HOPS = 3  # levels of refinement that tell graphs apart
FRACTION = 0.1  # of each class that goes to the test part, and again to validation


def content(graphs: Graphs) -> UInt64[np.ndarray, " g"]:
    """A hash of each graph's nodes, edges and labels, without its class; equal for isomorphic graphs."""
    return graph_hashes(graphs, hops=HOPS, salt=_salt(0, "order"))


def hashed_parts(graphs: Graphs, split: int = 0) -> Parts:
    """Indices of the fit, validation and test part, 80/10/10 in each class.

    The graphs of lowest hash are held out; `split` and the part enter it as salt, so that splits are
    independent. Graphs of one class with equal content stay in one part: the cut moves to the nearer end of
    their group. Equal graphs of different classes may be in different parts. Raises UsageError for a class of
    fewer than three different graphs.
    """
    rest, parts = np.arange(len(graphs)), []
    y, sizes = graphs.y.cpu().numpy(), graphs.counts
    for name, groups_left in (("test", 2), ("validation", 1)):
        keys = graph_hashes(graphs, hops=HOPS, salt=_salt(split, name))
        out = []
        for c, label in enumerate(graphs.spec.classes):
            members = rest[y[rest] == c]
            out.append(_lowest(members, keys[members], held_out(sizes[c], FRACTION), groups_left, label))
        parts.append(np.concatenate(out))
        rest = np.setdiff1d(rest, parts[-1])
    test, validation = (torch.from_numpy(part) for part in parts)
    return torch.from_numpy(rest), validation, test


def sorted_parts(keys: UInt64[np.ndarray, " g"], y: Int[Tensor, " g"], parts: Sequence[Tensor]) -> Parts:
    """The same parts, each sorted by class and then by `keys`, the content of the graphs."""
    labels, places = y.cpu().numpy(), [part.numpy() for part in parts]
    fit, validation, test = (
        torch.from_numpy(place[np.lexsort((keys[place], labels[place]))]) for place in places
    )
    return fit, validation, test


def fingerprint(keys: UInt64[np.ndarray, " g"], graphs: Graphs, parts: Sequence[Tensor], split: int) -> str:
    """SHA-256 over class names, split number and the (class, content) of each graph of sorted `parts`."""
    digest = hashlib.sha256("\0".join((*graphs.spec.classes, str(split))).encode())
    y = graphs.y.cpu().numpy()
    for place in (part.numpy() for part in parts):
        digest.update(str(len(place)).encode())
        digest.update(np.stack([y[place].astype("<u8"), keys[place].astype("<u8")], axis=1).tobytes())
    return digest.hexdigest()


def _salt(split: int, part: str) -> int:
    return Rng(split).fold("graphs").integer(part)


def _lowest(members: np.ndarray, keys: np.ndarray, count: int, groups_left: int, label: str) -> np.ndarray:
    """About `count` members of a class, of lowest keys, cut where a group of equal keys ends."""
    order = np.argsort(keys, kind="stable")
    ends = np.flatnonzero(np.diff(keys[order])) + 1
    if len(ends) < groups_left:
        raise UsageError(
            f"class '{label}' has {len(np.unique(keys))} different graphs, too few for three parts",
            "Give at least three different graphs to each class, or remove the class",
        )
    allowed = ends[: len(ends) - groups_left + 1]
    return members[order[: allowed[np.abs(allowed - count).argmin()]]]
