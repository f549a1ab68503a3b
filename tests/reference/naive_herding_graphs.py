"""Selections of real graphs written from their formulas on dense matrices, and colours of a TU folder."""

from collections import Counter

import numpy as np
from scipy import sparse

TIE = 1e-9


def first_of_least(values):
    """The lowest of the positions whose values are least but for rounding."""
    return min(i for i, value in values.items() if value <= min(values.values()) + TIE)


def naive_herding(z, count):
    """Welling's herding: each row brings the sum of t chosen rows nearest to t times the mean."""
    chosen, mean = [], z.mean(0)
    for t in range(1, count + 1):
        left = [i for i in range(len(z)) if i not in chosen]
        far = {i: np.square(z[[*chosen, i]].sum(0) - t * mean).sum() for i in left}
        chosen.append(first_of_least(far))
    return chosen


def naive_kcenter(z, count):
    """The row nearest to the mean, then always the one farthest from the nearest of those chosen."""
    chosen = [first_of_least({i: np.square(row - z.mean(0)).sum() for i, row in enumerate(z)})]
    while len(chosen) < count:
        left = [i for i in range(len(z)) if i not in chosen]
        near = {i: -min(np.square(z[i] - z[j]).sum() for j in chosen) for i in left}
        chosen.append(first_of_least(near))
    return chosen


def naive_round_robin(rankings, nbytes, size):
    """One graph of each class in turn; a class leaves when its next does not fit or there is none."""
    taken, rivals = [0] * len(rankings), list(range(len(rankings)))
    while rivals:
        for c in list(rivals):
            wider = [n + (i == c) for i, n in enumerate(taken)]
            if wider[c] > len(rankings[c]) or size(prefixes(rankings, wider)) > nbytes:
                rivals.remove(c)
            else:
                taken = wider
    return prefixes(rankings, taken)


def prefixes(rankings, taken):
    """The first graphs of each ranking, class by class."""
    return [int(i) for ranking, n in zip(rankings, taken, strict=True) for i in ranking[:n]]


def tu_histogram(folder, name, hops):
    """Colour counts [g, colours] after `hops` refinements by plain dictionaries, and class numbers [g]."""

    def column(part):
        return np.loadtxt(folder / name / f"{name}_{part}.txt", dtype=int, delimiter=",", ndmin=1)

    graph, labels, edges = column("graph_indicator") - 1, column("node_labels"), column("A") - 1
    bonded = (folder / name / f"{name}_edge_labels.txt").exists()
    bonds = column("edge_labels") if bonded else np.zeros(len(edges), dtype=int)
    colors = labels.tolist()
    for _ in range(hops):
        received = [[] for _ in colors]
        for (source, target), bond in zip(edges.tolist(), bonds.tolist(), strict=True):
            received[target].append((colors[source], bond))
        trees = [(own, tuple(sorted(rows))) for own, rows in zip(colors, received, strict=True)]
        number = {tree: i for i, tree in enumerate(dict.fromkeys(trees))}
        colors = [number[tree] for tree in trees]
    counts = Counter(zip(graph.tolist(), colors, strict=True))
    rows, columns = np.array(list(counts)).T
    histogram = sparse.csr_array((np.array(list(counts.values()), dtype=float), (rows, columns)))
    return histogram, np.unique(column("graph_labels"), return_inverse=True)[1]
