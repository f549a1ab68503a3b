"""Small random graphs with everything that a collection may hold, and how to compare what is stored."""

import torch
from hypothesis import strategies as st

from ddengine.graphs import Graphs, GraphSpec


def random_graphs(seed, count=7, node_sizes=(3,), edge_sizes=(), directed=False, classes=3, edges=11):
    """Graphs of 1 to 7 nodes and up to `edges` edges, with isolated nodes, self-loops and repeated edges."""
    g = torch.Generator().manual_seed(seed)

    def codes(n, sizes):
        columns = [torch.randint(0, size, (n,), generator=g) for size in sizes]
        return torch.stack([*columns, torch.zeros(n, dtype=torch.int64)], 1)[:, : len(sizes)]

    nodes = torch.randint(1, 8, (count,), generator=g)
    drawn = torch.randint(0, edges + 1, (count,), generator=g)
    starts = nodes.cumsum(0) - nodes
    each = zip(starts.tolist(), nodes.tolist(), drawn.tolist(), strict=True)
    ends = torch.cat([s + torch.randint(0, n, (2, e), generator=g) for s, n, e in each], 1)
    labels = codes(ends.shape[1], edge_sizes)
    if not directed:
        back = ends[0] != ends[1]
        ends, labels = torch.cat([ends, ends[:, back].flip(0)], 1), torch.cat([labels, labels[back]])
    spec = GraphSpec("random", tuple(f"class {i}" for i in range(classes)), node_sizes, edge_sizes)
    batch = torch.arange(count).repeat_interleave(nodes)
    y = torch.randint(0, classes, (count,), generator=g)
    return Graphs(codes(len(batch), node_sizes), ends, labels, batch, y, spec)


def leaves(value):
    """The tensors and plain values that a nest of dataclasses and tuples is made of, by path."""
    if isinstance(value, torch.Tensor) or value is None or isinstance(value, str | int | float):
        return {"": value}
    parts = dict(enumerate(value)) if isinstance(value, tuple) else vars(value)
    return {f"{name}/{path}": leaf for name, part in parts.items() for path, leaf in leaves(part).items()}


def same_bits(one, two):
    """Whether two nests hold the same types, shapes and bits in the same places."""
    a, b = leaves(one), leaves(two)
    return a.keys() == b.keys() and all(
        (v.dtype == b[k].dtype and torch.equal(v, b[k])) if isinstance(v, torch.Tensor) else v == b[k]
        for k, v in a.items()
    )


def mutated(draw, tensors):
    """The tensors with one to three dropped, cut, retyped, reshaped, or overwritten in one place."""
    tensors = dict(tensors)
    for _ in range(draw(st.integers(1, min(3, len(tensors) - 1)))):
        name = draw(st.sampled_from(sorted(tensors)))
        how = draw(st.sampled_from(["drop", "cut", "type", "flat", "value", "value", "value"]))
        tensor = tensors.pop(name)
        if how != "drop":
            tensors[name] = MUTATIONS[how](draw, tensor)
    return tensors


def _overwritten(draw, tensor):
    top = {torch.uint8: 255, torch.int16: 2**15 - 1, torch.int32: 2**31 - 1}.get(tensor.dtype, float("nan"))
    values = [top, 0, 1, 2, *([] if tensor.dtype == torch.uint8 else [-1])]
    flat = tensor.flatten().clone()
    if len(flat):
        flat[draw(st.integers(0, len(flat) - 1))] = draw(st.sampled_from(values))
    return flat.reshape(tensor.shape)


TYPES = (torch.uint8, torch.int16, torch.int32, torch.float16, torch.float32)
SHAPES = ((-1,), (1, -1), (-1, 1))
MUTATIONS = {
    "cut": lambda draw, tensor: tensor.flatten()[: draw(st.integers(0, tensor.numel()))],
    "type": lambda draw, tensor: tensor.to(draw(st.sampled_from(TYPES))),
    "flat": lambda draw, tensor: tensor.reshape(draw(st.sampled_from(SHAPES))),
    "value": _overwritten,
}
