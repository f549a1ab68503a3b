"""What the tests of synthetic sets share: real digits, and sets of prime, unequal sizes."""

import shutil
from dataclasses import replace

import pytest
import torch
from random_graphs import random_graphs
from sklearn.datasets import load_digits

from ddengine.ops.dag import trees_of
from ddengine.types import DataSpec, Images
from synth import Compensated, DistilledSet, Forest, GraphSubset, Pixels

SHAPE, CLASSES = (3, 7, 5), ("ant", "bee", "cat", "dog", "elk")
COUNT = 11


@pytest.fixture(scope="session")
def digits() -> Images:
    """All 1,797 digits of scikit-learn, uint8, class-sorted."""
    bunch = load_digits()
    x = torch.from_numpy((bunch.images / 16 * 255).round()).to(torch.uint8)[:, None]
    spec = DataSpec("digits", (1, 8, 8), tuple("0123456789"), (0.3,), (0.37,), "f" * 64, "CC BY 4.0")
    return Images(x, torch.from_numpy(bunch.target).long(), spec).sorted_by_class()


@pytest.fixture(scope="session")
def spec() -> DataSpec:
    return DataSpec("small", SHAPE, CLASSES, (0.5, 0.4, 0.3), (0.2, 0.25, 0.3), "a" * 64, "CC0-1.0")


@pytest.fixture(scope="session")
def pixels(spec) -> Pixels:
    g = torch.Generator().manual_seed(3)
    images = torch.randn((COUNT, *SHAPE), generator=g)
    return Pixels(images, torch.randint(0, len(CLASSES), (COUNT,), generator=g), spec, student_lr=0.0123)


@pytest.fixture(scope="session")
def pristine(pixels, tmp_path_factory):
    """A saved set of every optional part but whitening, to copy from."""
    made = DistilledSet.make(pixels, recipe={"lr": 0.01}, provenance={"seed": 5})
    return made.save(tmp_path_factory.mktemp("pristine") / "distilled")


@pytest.fixture
def saved(pristine, tmp_path):
    """A saved set that a test may damage; its folder."""
    return shutil.copytree(pristine, tmp_path / "distilled")


@pytest.fixture(scope="session")
def graph_forms() -> dict:
    """A forest and a set of real graphs that have every optional part."""
    g = torch.Generator().manual_seed(7)
    graphs = random_graphs(3, node_sizes=(3, 5), edge_sizes=(4, 2))
    values = {"node_values": (None, torch.rand((5, 2), generator=g)), "edge_values": (torch.eye(4), None)}
    about = {"discretised": "kmeans", "fingerprint": "b" * 64, "licence": "CC0-1.0"}
    graphs = replace(graphs, spec=replace(graphs.spec, **values, **about))
    y, weight = torch.rand((7, 3), generator=g).softmax(1), torch.rand(7, generator=g) + 0.1
    trees = replace(trees_of(graphs, 2, degree=True), y=y, weight=weight, y_kind="prob")
    return {"forest": Forest.of(trees), "graphs": GraphSubset.of(graphs)}


@pytest.fixture(scope="session")
def pristine_graphs(graph_forms, tmp_path_factory):
    """The folders of these sets, saved, to copy from."""
    folder, notes = tmp_path_factory.mktemp("pristine"), {"recipe": {"lr": 0.01}, "provenance": {"seed": 5}}
    return {kind: DistilledSet.make(s, **notes).save(folder / kind) for kind, s in graph_forms.items()}


@pytest.fixture(params=["forest", "graphs"])
def saved_graphs(request, pristine_graphs, tmp_path):
    """A saved set of graphs that a test may damage; its folder."""
    return shutil.copytree(pristine_graphs[request.param], tmp_path / "distilled")


@pytest.fixture(scope="session")
def composed(spec) -> dict[str, Compensated]:
    """Compensated sets of every optional part: real bases in few bits, free bases in floats."""
    g = torch.Generator().manual_seed(11)
    real = torch.randint(0, 256, (COUNT, *SHAPE), generator=g, dtype=torch.uint8)
    parts = {
        "classes": torch.randint(0, len(CLASSES), (COUNT,), generator=g),
        "compensators": 0.3 * torch.randn((3, 2, *SHAPE), generator=g),
        "group": torch.arange(COUNT) % 3,
        "labels": 3 * torch.randn((3 * COUNT, len(CLASSES)), generator=g),
        "teachers": ((torch.randn(17, generator=g), torch.rand(6, generator=g)),) * 2,
        "student_lr": 0.0123,
    }
    free = torch.randn((COUNT, *SHAPE), generator=g)
    few = Compensated(bases=real, spec=spec, label_codec="int4", **parts)
    return {"int8": few, "fp16": replace(few, bases=free, codec="fp16", label_codec="fp16")}


@pytest.fixture(scope="session")
def pristine_composed(composed, tmp_path_factory):
    """The folders of these sets, saved, to copy from."""
    folder, notes = tmp_path_factory.mktemp("pristine"), {"recipe": {"lr": 0.01}, "provenance": {"seed": 5}}
    return {codec: DistilledSet.make(s, **notes).save(folder / codec) for codec, s in composed.items()}


@pytest.fixture(params=["int8", "fp16"])
def saved_composed(request, pristine_composed, tmp_path):
    """A saved compensated set that a test may damage; its folder."""
    return shutil.copytree(pristine_composed[request.param], tmp_path / "distilled")


@pytest.fixture(params=["pixels", "compensated", "forest", "graphs"])
def any_saved(request, pristine, pristine_composed, tmp_path):
    """A saved set of images or graphs that a test may damage; its folder."""
    folders = {"pixels": pristine, "compensated": pristine_composed["int8"]}
    if request.param not in folders:
        folders = request.getfixturevalue("pristine_graphs")
    return shutil.copytree(folders[request.param], tmp_path / "distilled")
