"""docs/formats.md is enough: a reader written from it alone, without our code, gets what ours decodes."""

from itertools import pairwise

import numpy as np
import plain_reader
import pytest
import torch
import toy_experts

from ddengine import data
from ddengine.graphs import Graphs, GraphSpec
from ddengine.ops.dag import trees_of
from ddengine.rng import Rng
from ddengine.types import DataSpec, Whitening
from expert_buffers import ExpertBuffer
from synth import Compensated, DistilledSet, Factored, Forest, Pixels, Subset

SPEC = DataSpec("toy", (3, 5, 7), ("ant", "bee", "cat"), (0.5, 0.25, 0.75), (0.25, 0.5, 0.3))
DRAW = Rng(11)


def noise(name, *shape):
    return torch.randn(*shape, generator=DRAW.torch(name))


def levels(name, *shape):
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=DRAW.torch(name))


def whitened():
    eye, draw = torch.eye(105), noise("zca", 105, 105) / 30
    return DataSpec(
        "toy", (3, 5, 7), SPEC.classes, SPEC.mean, SPEC.std,
        zca=Whitening(noise("zca mean", 105), eye + draw, torch.linalg.inv(eye + draw)),
    )  # fmt: skip


def composed(**more):
    bases, classes = levels("bases", 6, 3, 5, 7), torch.tensor([0, 0, 1, 1, 2, 2])
    group = torch.tensor([0, 1, 0, 1, 0, 1])
    return Compensated(bases, classes, noise("u", 2, 3, 3, 5, 7) / 3, group, SPEC, **more)


HARD = torch.tensor([0, 1, 2, 2, 1])
SOFT = torch.softmax(noise("soft", 5, 3), 1)
EXACT = {
    "uint8 with a range for each channel": Pixels(noise("x", 5, 3, 5, 7), HARD, SPEC),
    "float16": Pixels(noise("x", 5, 3, 5, 7), HARD, SPEC, codec="fp16"),
    "float32 with soft labels": Pixels(noise("x", 5, 3, 5, 7), SOFT, SPEC, "prob", codec="fp32"),
    "real pixels": Pixels(SPEC.normalise(levels("r", 5, 3, 5, 7)), HARD, SPEC, student_lr=0.03),
    "a subset": Subset(levels("s", 5, 3, 5, 7), torch.arange(5) + 40, HARD, SPEC),
    "compensators with class numbers": composed(),
    "compensators with logits in 4 bits": composed(labels=noise("z", 24, 3) * 5, label_codec="int4"),
    "compensators with logits in 8 bits": composed(labels=noise("z", 24, 3) * 5, codec="fp16"),
    "free bases": Compensated(
        noise("x", 5, 3, 5, 7), HARD, noise("u", 1, 2, 3, 5, 7), torch.zeros(5, dtype=torch.int64), SPEC
    ),
}
NEARLY = {  # a matrix product or an interpolation, whose last bits depend on the order of sums
    "grids of four": Factored(noise("x", 5, 3, 5, 7), HARD, SPEC, factor=2),
    "grids of nine with soft labels": Factored(
        noise("x", 5, 3, 5, 7), torch.softmax(noise("nine", 45, 3), 1), SPEC, factor=3, y_kind="prob"
    ),
    "a whitened subset": Subset(levels("s", 5, 3, 5, 7), torch.arange(5), HARD, whitened()),
}


def saved(synth, folder):
    return DistilledSet.make(synth, recipe={}, provenance={"seconds": 0.1}).save(folder / "set")


@pytest.mark.parametrize("name", [*EXACT, *NEARLY])
def test_a_plain_reader_gets_the_images_that_decode_gives(name, tmp_path):
    folder = saved((EXACT | NEARLY)[name], tmp_path)
    ours = DistilledSet.load(folder).decode()
    x, y = plain_reader.images(folder)
    assert x.shape == tuple(ours.x.shape) and len(x) == plain_reader.distilled(folder)[0]["count"]
    if name in EXACT:
        assert x.dtype == np.float32 and np.array_equal(x, ours.x.numpy())
    else:
        np.testing.assert_allclose(x, ours.x.numpy(), rtol=1e-4, atol=1e-4)
    assert np.array_equal(y.astype(np.float32), ours.y.float().numpy())


def test_a_plain_reader_gets_the_trees_of_a_forest(tmp_path):
    spec = GraphSpec("toy", ("a", "b"), (3,), (2,))
    ends = torch.tensor([[0, 1, 1, 2, 3, 4], [1, 0, 2, 1, 4, 3]])
    marks = torch.tensor([[0], [0], [1], [1], [1], [1]])
    x, batch, y = torch.tensor([[0], [1], [0], [2], [2]]), torch.tensor([0, 0, 0, 1, 1]), torch.tensor([0, 1])
    graphs = Graphs(x, ends, marks, batch, y, spec)
    folder = saved(Forest.of(trees_of(graphs, 1, degree=True)), tmp_path)
    leaf = {v: ("x", x, d) for v, (x, d) in enumerate([(0, 1), (1, 2), (0, 1), (2, 1), (2, 1)])}
    arcs = list(zip(*ends.tolist(), marks[:, 0].tolist(), strict=True))
    into = {v: [(leaf[s], (mark,)) for s, t, mark in arcs if t == v] for v in range(5)}
    tree = {v: (leaf[v], tuple(sorted(((*child, 1) for child in into[v]), key=repr))) for v in range(5)}
    (first, y0, w0), (second, y1, w1) = plain_reader.forest(folder)
    assert first == {tree[0]: 1, tree[1]: 1, tree[2]: 1} and second == {tree[3]: 2}
    assert (y0, y1, w0, w1) == (0, 1, 1, 1)


@pytest.mark.parametrize("encoding", ["delta16", "fp32"])
def test_a_plain_reader_gets_the_rows_of_an_expert(encoding, tmp_path):
    toy_experts.write(tmp_path / "experts", [toy_experts.walk(seed=i) for i in (0, 1)], encoding=encoding)
    buffer = ExpertBuffer(tmp_path / "experts")
    for i in (0, 1):
        assert np.array_equal(plain_reader.expert_rows(tmp_path / "experts", i), buffer[i].params.numpy())


def test_one_changed_bit_is_seen_by_a_plain_reader(tmp_path):
    folder = saved(EXACT["a subset"], tmp_path)
    path = folder / "data.safetensors"
    body = bytearray(path.read_bytes())
    body[-1] ^= 1
    path.write_bytes(body)
    with pytest.raises(AssertionError):
        plain_reader.images(folder)


def test_the_fingerprinted_digits_are_read_back(tmp_path):
    fit = data.load("digits").fit
    folder = saved(Subset.of(fit, torch.arange(0, len(fit), 97)), tmp_path)
    x, y = plain_reader.images(folder)
    assert np.array_equal(x, fit.model_input(torch.arange(0, len(fit), 97)).numpy())
    assert all(a <= b for a, b in pairwise(y.tolist()))
