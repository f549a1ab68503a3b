"""Computation trees written out: a node's tree of l hops as nested tuples with sorted children."""


def neighbours(n, edge_index, edge_attr):
    """For each node the (edge label, sender) pairs of the messages that it receives."""
    found = [[] for _ in range(n)]
    for (source, target), label in zip(zip(*edge_index, strict=True), edge_attr, strict=True):
        found[target].append((tuple(label), source))
    return found


def canonical(node, hops, labels, received):
    """The tree of `hops` hops that is rooted at `node`: (label, sorted (edge label, child tree) pairs)."""
    if hops == 0:
        return (labels[node], ())
    children = [(edge, canonical(sender, hops - 1, labels, received)) for edge, sender in received[node]]
    return (labels[node], tuple(sorted(children)))


def trees(x, edge_index, edge_attr, hops, degree=False):
    """The canonical tree of every node; arguments are nested lists, `degree` adds the in-degree to labels."""
    received = neighbours(len(x), edge_index, edge_attr)
    labels = [(*row, len(got)) if degree else tuple(row) for row, got in zip(x, received, strict=True)]
    return [canonical(node, hops, labels, received) for node in range(len(x))]


def first_occurrence(values):
    """Ids of equal values, numbered as they first come."""
    ids = {}
    return [ids.setdefault(value, len(ids)) for value in values]
