"""Distilled sets on disk: round trips, the manifest, the card, replacing what is there."""

import json
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from random_graphs import random_graphs, same_bits

from ddengine import files
from ddengine.composites import Composites
from ddengine.errors import ArtefactError, UsageError
from ddengine.ops.dag import take, trees_of
from ddengine.types import DataSpec, Whitening
from synth import Compensated, DistilledSet, Forest, GraphSubset, Pixels, Subset, verify

NO_NOTES = {"recipe": {}, "provenance": {}}
FILES = ["README.md", "data.safetensors", "manifest.json", "preview.png"]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def whitening(d: int) -> Whitening:
    g = torch.Generator().manual_seed(d)
    matrix = torch.randn(d, d, generator=g) + 5 * torch.eye(d)
    return Whitening(torch.randn(d, generator=g), matrix, matrix.inverse())


@settings(max_examples=20, deadline=None)
@given(
    shape=st.tuples(*[st.sampled_from([1, 2, 3, 5])] * 3),
    m=st.integers(1, 5),
    codec=st.sampled_from(["fp32", "fp16", "uint8"]),
    y_kind=st.sampled_from(["class", "prob", "logit"]),
    zca=st.booleans(),
    labels=st.lists(st.text(max_size=9), min_size=1, max_size=5),
    seed=st.integers(0, 2**31),
)
def test_loading_gives_back_every_bit(tmp_path_factory, shape, m, codec, y_kind, zca, labels, seed):
    g, k, c = torch.Generator().manual_seed(seed), len(labels), shape[0]
    matrices = whitening(c * shape[1] * shape[2]) if zca else None
    spec = DataSpec("n", shape, tuple(labels), (1 / 3,) * c, (0.1,) * c, "ab", "none", matrices)
    y = torch.randint(0, k, (m,), generator=g) if y_kind == "class" else torch.rand((m, k), generator=g)
    x = torch.randn((m, *shape), generator=g)
    made = DistilledSet.make(Pixels(x, y, spec, y_kind, codec), recipe={"a": (1, 2.5)}, provenance={})
    loaded = DistilledSet.load(made.save(tmp_path_factory.mktemp("set") / "distilled"))
    before, after = made.decode(), loaded.decode()
    assert torch.equal(before.x, after.x) and torch.equal(before.y, after.y) and after.y_kind == y_kind
    assert {n: v for n, v in loaded.manifest.items() if n not in ("files", "seal")} == made.manifest
    assert replace(loaded.spec, zca=None) == replace(spec, zca=None)
    if matrices is not None:
        for part in ("mean", "matrix", "inverse"):
            assert torch.equal(getattr(loaded.spec.zca, part), getattr(matrices, part))


def test_a_whitened_subset_decodes_to_the_same_bits(tmp_path, digits):
    source = replace(digits, spec=replace(digits.spec, zca=whitening(64)))
    made = DistilledSet.make(Subset.of(source, torch.tensor([1, 500, 1700])), **NO_NOTES)
    loaded = DistilledSet.load(made.save(tmp_path / "set"))
    assert torch.equal(loaded.decode().x, made.decode().x)
    assert torch.equal(loaded.decode().x, source.model_input(torch.tensor([1, 500, 1700])))
    assert loaded.kind == "subset" and torch.equal(loaded.synth.indices, torch.tensor([1, 500, 1700]))


def test_a_set_holds_the_bytes_it_reports(saved, pixels):
    loaded = DistilledSet.load(saved)
    sizes = {name: t.numel() * t.element_size() for name, t in loaded.tensors.items()}
    assert loaded.nbytes == pixels.nbytes and loaded.nbytes["total"] == sum(sizes.values())


def test_whitening_matrices_are_reported_but_not_in_the_budget(pixels):
    d = 3 * 7 * 5
    white = replace(pixels, spec=replace(pixels.spec, zca=whitening(d)))
    made = DistilledSet.make(white, **NO_NOTES)
    assert made.nbytes == pixels.nbytes and made.manifest["budget"]["preprocessing"] == 4 * (d + 2 * d * d)


def test_what_a_set_says_of_itself_is_true(saved, pixels):
    loaded = DistilledSet.load(saved)
    manifest = json.loads((saved / "manifest.json").read_text())
    assert names(saved) == FILES and loaded.manifest == manifest
    assert (loaded.kind, loaded.classes, loaded.spec) == ("pixels", pixels.spec.classes, pixels.spec)
    assert manifest["dataset"]["shape"] == [3, 7, 5] and manifest["count"] == 11
    assert manifest["recipe"] == {"lr": 0.01} and manifest["provenance"] == {"seed": 5}
    assert loaded.synth.student_lr == pytest.approx(0.0123, rel=1e-6)
    for name, entry in manifest["files"].items():
        assert entry == {"sha256": files.sha256(saved / name), "bytes": (saved / name).stat().st_size}


@pytest.mark.parametrize(
    ("labels", "ipc"), [([0, 1, 2, 3, 4] * 2, 2), ([0, 0, 1, 1, 2, 2, 3, 3, 4, 0], None)]
)
def test_the_budget_names_images_per_class_only_where_all_classes_have_as_many(pixels, labels, ipc):
    made = DistilledSet.make(
        replace(pixels, images=pixels.images[:10], labels=torch.tensor(labels)), **NO_NOTES
    )
    assert made.manifest["budget"]["ipc"] == ipc


def test_saving_twice_gives_the_same_bytes(saved, tmp_path):
    DistilledSet.load(saved).save(tmp_path / "again")
    assert all((saved / name).read_bytes() == (tmp_path / "again" / name).read_bytes() for name in FILES)


def test_verify_says_what_it_checked(saved):
    lines = "\n".join(verify(saved))
    for part in (
        "seal intact",
        "data.safetensors",
        "preview.png",
        "images: uint8 [11, 3, 7, 5]",
        "student_lr",
    ):
        assert part in lines


def test_the_preview_is_a_picture(saved):
    with Image.open(saved / "preview.png") as image:
        image.load()
        assert image.format == "PNG" and image.width > 100 and image.height > 5 * 48


def test_the_card_tells_what_a_reader_needs(saved):
    card = (saved / "README.md").read_text()
    for part in ("CC0", "ant, bee, cat", "images 1419", "labels 11", "extras 4", '"lr": 0.01', '"seed": 5'):
        assert part in card
    assert "3 x 7 x 5" in card and "preview.png" in card and "privacy" in card


def test_the_loading_code_of_the_card_runs(saved):
    code = (saved / "README.md").read_text().split("```python\n")[1].split("```")[0]
    assert len(code.strip().splitlines()) == 3
    scope: dict = {}
    exec(code.replace("path/to/this/folder", str(saved)), scope)
    assert scope["x"].shape == (11, 3, 7, 5) and scope["y"].shape == (11,)


def test_names_cannot_become_markup_in_the_card(pixels, tmp_path):
    evil = ("<script>alert(1)</script>", "[x](javascript:y)", "a\n# b", "```", "\udcff|")
    spec = replace(pixels.spec, name="*b*", classes=evil, licence="<b>")
    made = DistilledSet.make(replace(pixels, spec=spec), recipe={"x": "```\n<script>"}, provenance={})
    card = (made.save(tmp_path / "set") / "README.md").read_text()
    prose = card.split("```python")[0]
    assert not any(markup in prose for markup in ("<", "\n# b", "[x](", " *b*", "```"))
    assert "alert" in prose and card.count("\n```") == 4  # python and recipe, opened and closed
    assert DistilledSet.load(tmp_path / "set").classes == evil


def test_decode_takes_indices(saved):
    loaded = DistilledSet.load(saved)
    pick = torch.tensor([10, 0, 3])
    assert torch.equal(loaded.decode(pick).x, loaded.decode().x[pick])
    assert torch.equal(loaded.decode(pick).y, loaded.decode().y[pick])


def test_an_equal_set_may_be_saved_again_whatever_its_provenance(saved, pixels):
    DistilledSet.make(pixels, recipe={"lr": 0.01}, provenance={"seconds": 7}).save(saved)
    assert DistilledSet.load(saved).manifest["provenance"] == {"seconds": 7}


@pytest.mark.parametrize("change", ["pixels", "recipe"])
def test_another_set_is_replaced_only_when_told(saved, pixels, change):
    other = replace(pixels, images=pixels.images + 1) if change == "pixels" else pixels
    made = DistilledSet.make(other, recipe={"lr": 0.01 if change == "pixels" else 0.02}, provenance={})
    before = {name: (saved / name).read_bytes() for name in FILES}
    with pytest.raises(UsageError, match="holds another distilled set"):
        made.save(saved)
    assert before == {name: (saved / name).read_bytes() for name in FILES}
    made.save(saved, overwrite=True)
    assert torch.equal(DistilledSet.load(saved).decode().x, made.decode().x)
    assert names(saved.parent) == ["distilled"]


def test_a_damaged_set_is_replaced_only_when_told(saved, pixels):
    (saved / "data.safetensors").write_bytes(b"")
    made = DistilledSet.make(pixels, recipe={"lr": 0.01}, provenance={"seed": 5})
    with pytest.raises(UsageError, match="holds another"):
        made.save(saved)
    verify(made.save(saved, overwrite=True))


def test_folders_of_other_files_are_never_replaced(pixels, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    made = DistilledSet.make(pixels, **NO_NOTES)
    with pytest.raises(UsageError, match=r"thesis\.tex"):
        made.save(tmp_path, overwrite=True)
    with pytest.raises(UsageError, match="cannot write"):
        made.save(tmp_path / "thesis.tex", overwrite=True)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_an_empty_folder_and_missing_parents_are_fine(pixels, tmp_path):
    (tmp_path / "empty").mkdir()
    made = DistilledSet.make(pixels, **NO_NOTES)
    for folder in (tmp_path / "empty", tmp_path / "a" / "b" / "c"):
        assert names(made.save(folder)) == FILES


@pytest.mark.parametrize("failing", ["write_tensors", "write_json", "sync_folder", "sha256"])
def test_a_failing_disk_leaves_the_earlier_set_and_no_rubbish(saved, pixels, monkeypatch, failing):
    def no_space(*_):
        raise OSError(28, "No space left on device")

    before = {name: (saved / name).read_bytes() for name in FILES}
    made = DistilledSet.make(replace(pixels, images=pixels.images + 1), **NO_NOTES)
    with monkeypatch.context() as patch:
        patch.setattr(files, failing, no_space)
        with pytest.raises(UsageError, match="No space left"):
            made.save(saved, overwrite=True)
    assert before == {name: (saved / name).read_bytes() for name in FILES}
    assert names(saved.parent) == ["distilled"]
    verify(made.save(saved, overwrite=True))


@pytest.mark.parametrize("renames", [0, 1])
def test_a_kill_between_the_renames_of_a_system_without_exchange_loses_nothing(
    saved, pixels, monkeypatch, renames
):
    class Killed(BaseException):
        pass

    real, done = Path.rename, []

    def rename(path, target):
        if len(done) == renames:
            raise Killed
        done.append(target)
        return real(path, target)

    old = DistilledSet.load(saved)
    made = DistilledSet.make(replace(pixels, images=pixels.images + 1), **NO_NOTES)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Path, "rename", rename)
        patch.setattr(files, "exchange", lambda one, other: False)
        made.save(saved, overwrite=True)
    with pytest.raises(UsageError, match="holds another"):
        made.save(saved)
    assert torch.equal(DistilledSet.load(saved).decode().x, old.decode().x)
    made.save(saved, overwrite=True)
    assert names(saved.parent) == ["distilled"]


def test_the_manifest_is_written_last(pixels, tmp_path, monkeypatch):
    written = []
    real = files.write_bytes
    monkeypatch.setattr(
        files, "write_bytes", lambda path, data: (written.append(path.name), real(path, data))[1]
    )
    DistilledSet.make(pixels, **NO_NOTES).save(tmp_path / "set")
    assert sorted(written) == FILES and written[-1] == "manifest.json"


@pytest.mark.parametrize("notes", [{"lr": float("nan")}, {"path": Path()}, {"x": torch.zeros(1)}], ids=str)
def test_notes_that_are_not_json_are_refused(pixels, notes):
    with pytest.raises(UsageError, match="recipe is not JSON"):
        DistilledSet.make(pixels, recipe=notes, provenance={})


def test_sets_that_no_reader_would_accept_are_refused_when_made(pixels):
    soft = replace(pixels, labels=torch.full((11, 5), -0.1), y_kind="prob")
    empty = replace(pixels, images=pixels.images[:0], labels=pixels.labels[:0])
    for bad, cause in ((soft, r"outside 0\.\.1"), (empty, "one or more")):
        with pytest.raises(UsageError, match=cause):
            DistilledSet.make(bad, **NO_NOTES)


def test_a_missing_folder_is_the_users_mistake_and_a_missing_manifest_is_damage(tmp_path):
    with pytest.raises(UsageError, match="there is no folder"):
        DistilledSet.load(tmp_path / "nowhere")
    with pytest.raises(ArtefactError, match=r"manifest\.json is missing"):
        DistilledSet.load(tmp_path)


def test_a_whitening_of_one_shared_matrix_is_stored(pixels, tmp_path):
    eye = torch.eye(3 * 7 * 5)
    white = replace(pixels, spec=replace(pixels.spec, zca=Whitening(eye[0], eye, eye)))
    loaded = DistilledSet.load(DistilledSet.make(white, **NO_NOTES).save(tmp_path / "set"))
    assert torch.equal(loaded.spec.zca.inverse, eye) and torch.equal(loaded.spec.zca.matrix, eye)


def without_picture(made, folder):
    """Save a set of graphs, with a preview that is no picture: drawing one takes long."""
    with mock.patch("synth.tree_sheet.tree_sheet", lambda _, path: files.write_bytes(path, b"-")):
        return made.save(folder)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**20),
    kind=st.sampled_from(["forest", "graphs"]),
    hops=st.integers(0, 3),
    degree=st.booleans(),
    soft=st.booleans(),
    edge_sizes=st.sampled_from([(), (3,), (2, 300)]),
    values=st.booleans(),
    labels=st.lists(st.text(max_size=9), min_size=1, max_size=4),
)
def test_loading_graphs_gives_back_every_bit(
    tmp_path_factory, seed, kind, hops, degree, soft, edge_sizes, values, labels
):
    g = torch.Generator().manual_seed(seed)
    graphs = random_graphs(seed, node_sizes=(3, 2), edge_sizes=edge_sizes, classes=len(labels))
    tables = {"node_values": (torch.randn((3, 2), generator=g), None)} if values else {}
    about = {"codes_from": "degree", "discretised": "quantile", "fingerprint": "ab", "licence": "none"}
    graphs = replace(graphs, spec=replace(graphs.spec, classes=tuple(labels), **about, **tables))
    trees = trees_of(graphs, hops, degree=degree)
    if soft and len(labels) > 1:
        y, weight = torch.rand((7, len(labels)), generator=g), torch.rand(7, generator=g) + 0.01
        trees = replace(trees, y=y.softmax(1), y_kind="prob", weight=weight)
    synth = Forest.of(trees) if kind == "forest" else GraphSubset.of(graphs)
    made = DistilledSet.make(synth, recipe={"a": (1, 2.5)}, provenance={})
    loaded = DistilledSet.load(without_picture(made, tmp_path_factory.mktemp("set") / "distilled"))
    pick = torch.tensor([5, 0, 5])
    assert same_bits(loaded.decode(), synth.decode()) and same_bits(made.decode(), synth.decode())
    assert same_bits(loaded.decode(pick), synth.decode(pick))
    assert same_bits(loaded.spec, synth.spec) and loaded.kind == kind
    assert {n: v for n, v in loaded.manifest.items() if n not in ("files", "seal")} == made.manifest


def test_a_set_of_graphs_holds_the_bytes_it_reports(saved_graphs, graph_forms):
    loaded = DistilledSet.load(saved_graphs)
    stored = safetensors.torch.load_file(saved_graphs / "data.safetensors")
    assert loaded.nbytes == graph_forms[loaded.kind].nbytes
    assert loaded.nbytes["total"] == sum(t.numel() * t.element_size() for t in stored.values())
    assert loaded.nbytes["total"] == sum(n for part, n in loaded.nbytes.items() if part != "total")
    assert loaded.nbytes["extras"] == 4 * (10 + 16) and loaded.nbytes["images"] == 0
    size = (saved_graphs / "data.safetensors").stat().st_size
    assert loaded.manifest["files"]["data.safetensors"]["bytes"] == size > loaded.nbytes["total"]


def test_the_manifest_of_graphs_says_what_they_are(saved_graphs):
    manifest = json.loads((saved_graphs / "manifest.json").read_text())
    assert manifest["count"] == 7 and names(saved_graphs) == FILES
    assert manifest["dataset"] == {
        "name": "random",
        "classes": ["class 0", "class 1", "class 2"],
        "node_sizes": [3, 5],
        "edge_sizes": [4, 2],
        "discretised": "kmeans",
        "codes_from": "labels",
        "fingerprint": "b" * 64,
        "licence": "CC0-1.0",
    }
    parts = {"images", "trees", "labels", "extras", "preprocessing", "total", "ipc"}
    assert set(manifest["budget"]) == parts and manifest["budget"]["preprocessing"] == 0


def test_verify_says_what_it_checked_of_graphs(saved_graphs):
    lines = verify(saved_graphs)
    kind = DistilledSet.load(saved_graphs).kind
    said = {"forest": "7 forest items, labels (prob) in range", "graphs": "7 graphs, labels (class) in range"}
    assert lines[-1] == said[kind] and any("codebook.node.1: float32 [5, 2]" in line for line in lines)


def test_the_preview_of_graphs_is_a_picture(saved_graphs):
    with Image.open(saved_graphs / "preview.png") as image:
        image.load()
        assert image.format == "PNG" and image.width > 100 and image.height > 100


def test_the_card_of_a_forest_tells_which_networks_may_use_it(pristine_graphs, graph_forms):
    card = (pristine_graphs["forest"] / "README.md").read_text()
    sizes = " / ".join(str(n) for n in graph_forms["forest"].trees.dag.sizes)
    counts = torch.bincount(graph_forms["forest"].decode().classes, minlength=3).tolist()
    for part in ("7 training items", f"0 to 2 hops: {sizes}", "at most 2 layers", "GCN may be used too"):
        assert part in card
    assert all(f"| class {i} | {n} |" in card for i, n in enumerate(counts))
    assert "class probabilities" in card and "kmeans" in card and "images" not in card


def test_the_card_of_trees_without_degrees_rules_gcn_out(tmp_path):
    forest = Forest.of(trees_of(random_graphs(2), 1))
    made = DistilledSet.make(forest, **NO_NOTES)
    card = (without_picture(made, tmp_path / "set") / "README.md").read_text()
    assert "at most 1 layers" in card and "GCN" in card and "cannot be used" in card


def test_the_card_of_graphs_tells_their_bytes_and_those_of_the_file(saved_graphs, graph_forms):
    loaded = DistilledSet.load(saved_graphs)
    card = (saved_graphs / "README.md").read_text()
    nbytes, size = loaded.nbytes, (saved_graphs / "data.safetensors").stat().st_size
    for part in ("trees", "labels", "extras"):
        assert f"{part} {nbytes[part]}" in card
    assert f"total {nbytes['total']}; the file `data.safetensors` has {size}." in card
    assert "CC0" in card and '"lr": 0.01' in card and '"seed": 5' in card and "privacy" in card


def test_the_loading_code_of_the_card_of_graphs_runs(saved_graphs):
    code = (saved_graphs / "README.md").read_text().split("```python\n")[1].split("```")[0]
    scope: dict = {}
    exec(code.replace("path/to/this/folder", str(saved_graphs)), scope)
    assert len(code.strip().splitlines()) == 3 and len(scope["y"]) == 7


@pytest.mark.parametrize("kind", ["forest", "graphs"])
def test_names_of_graphs_cannot_become_markup_in_the_card(tmp_path, kind):
    evil = ("<script>alert(1)</script>", "[x](javascript:y)|", "a\n# b", "```")
    graphs = random_graphs(4, classes=4)
    graphs = replace(graphs, spec=replace(graphs.spec, name="*b*", classes=evil, licence="<b>"))
    synth = GraphSubset.of(graphs) if kind == "graphs" else Forest.of(trees_of(graphs, 1))
    made = DistilledSet.make(synth, recipe={"x": "```\n<script>"}, provenance={})
    card = (without_picture(made, tmp_path / "set") / "README.md").read_text()
    prose = card.split("```python")[0]
    assert not any(markup in prose for markup in ("<", "\n# b", "[x](", " *b*", "```"))
    assert "alert" in prose and card.count("\n```") == 4  # python and recipe, opened and closed


def test_saving_graphs_twice_gives_the_same_bytes(saved_graphs, tmp_path):
    DistilledSet.load(saved_graphs).save(tmp_path / "again")
    assert all((saved_graphs / n).read_bytes() == (tmp_path / "again" / n).read_bytes() for n in FILES)


def test_an_equal_set_of_graphs_may_be_saved_again_and_another_only_when_told(saved_graphs, graph_forms):
    kind = DistilledSet.load(saved_graphs).kind
    without_picture(DistilledSet.make(graph_forms[kind], recipe={"lr": 0.01}, provenance={}), saved_graphs)
    some = torch.tensor([0, 1])
    forest, graphs = graph_forms["forest"], graph_forms["graphs"]
    other = {
        "forest": lambda: Forest.of(take(forest.trees, some)),
        "graphs": lambda: GraphSubset.of(graphs.graphs.take(some)),
    }
    with pytest.raises(UsageError, match="holds another distilled set"):
        without_picture(DistilledSet.make(other[kind](), recipe={"lr": 0.01}, provenance={}), saved_graphs)


def test_graphs_of_more_label_columns_than_a_reader_accepts_are_refused(graph_forms):
    graphs = graph_forms["graphs"].graphs
    x = torch.zeros((len(graphs.x), 257), dtype=torch.int64)
    spec = replace(graphs.spec, node_sizes=(1,) * 257, node_values=())
    with pytest.raises(UsageError, match=r"dataset\.node_sizes"):
        DistilledSet.make(GraphSubset.of(replace(graphs, x=x, spec=spec)), **NO_NOTES)


def test_codebooks_that_are_not_finite_are_refused(graph_forms):
    graphs = graph_forms["graphs"].graphs
    spec = replace(graphs.spec, node_values=(None, torch.full((5, 2), torch.nan)))
    with pytest.raises(UsageError, match=r"codebook\.node\.1"):
        DistilledSet.make(GraphSubset.of(replace(graphs, spec=spec)), **NO_NOTES)


def test_graphs_per_class_are_named_where_all_classes_have_as_many(graph_forms):
    graphs = graph_forms["graphs"].graphs
    for labels, ipc in (([0, 1, 2, 0, 1, 2], 2), ([0, 0, 0, 1, 1, 2], None)):
        some = replace(graphs.take(torch.arange(6)), y=torch.tensor(labels))
        assert DistilledSet.make(GraphSubset.of(some), **NO_NOTES).manifest["budget"]["ipc"] == ipc


@settings(max_examples=20, deadline=None)
@given(
    shape=st.tuples(*[st.sampled_from([1, 2, 3, 5])] * 3),
    b=st.integers(1, 5),
    g=st.integers(1, 3),
    m=st.integers(0, 3),
    real=st.booleans(),
    soft=st.booleans(),
    codecs=st.tuples(
        st.sampled_from(["int8", "fp16"]),
        st.sampled_from(["fp32", "fp16", "int8", "int4"]),
        st.sampled_from(["fp32", "fp16", "uint8"]),
    ),
    zca=st.booleans(),
    labels=st.lists(st.text(max_size=9), min_size=1, max_size=5),
    seed=st.integers(0, 2**31),
)
def test_loading_composites_gives_back_every_bit(
    tmp_path_factory, shape, b, g, m, real, soft, codecs, zca, labels, seed
):
    draws, k, c = torch.Generator().manual_seed(seed), len(labels), shape[0]
    matrices = whitening(c * shape[1] * shape[2]) if zca else None
    spec = DataSpec("n", shape, tuple(labels), (1 / 3,) * c, (0.1,) * c, "ab", "none", matrices)
    pixels = torch.randint(0, 256, (b, *shape), generator=draws, dtype=torch.uint8)
    synth = Compensated(
        pixels if real else torch.randn((b, *shape), generator=draws),
        torch.randint(0, k, (b,), generator=draws),
        torch.randn((g, m, *shape), generator=draws),
        torch.randint(0, g, (b,), generator=draws),
        spec,
        torch.randn((b * (m + 1), k), generator=draws) if soft else None,
        *codecs,
    )
    made = DistilledSet.make(synth, recipe={"a": (1, 2.5)}, provenance={})
    loaded = DistilledSet.load(made.save(tmp_path_factory.mktemp("set") / "distilled"))
    before, after, pick = made.decode(), loaded.decode(), torch.tensor([b * m, 0, b - 1])
    assert torch.equal(before.x, after.x) and torch.equal(before.y, after.y)
    assert after.y_kind == synth.y_kind and len(after) == loaded.manifest["count"] == b * (m + 1)
    assert same_bits(loaded.composites().take(pick).x, made.decode(pick).x)
    assert {n: v for n, v in loaded.manifest.items() if n not in ("files", "seal")} == made.manifest
    assert loaded.nbytes == synth.nbytes and loaded.kind == "compensated"


def test_a_compensated_set_holds_the_bytes_it_reports(saved_composed, composed):
    loaded = DistilledSet.load(saved_composed)
    stored = safetensors.torch.load_file(saved_composed / "data.safetensors")
    synth = composed["int8" if "compensators.scale" in stored else "fp16"]
    assert loaded.nbytes == synth.nbytes
    assert loaded.nbytes["total"] == sum(t.numel() * t.element_size() for t in stored.values())
    nominal = -(-(loaded.nbytes["total"] - synth.teacher_bytes) // (5 * 3 * 7 * 5))
    assert loaded.manifest["count"] == 33 and loaded.manifest["budget"]["ipc"] == nominal
    bits = torch.int8 if loaded.synth.codec == "int8" else torch.float16
    assert stored["compensators"].dtype == bits and stored["compensators"].shape == (3, 2, 3, 7, 5)


def test_saving_a_compensated_set_twice_gives_the_same_bytes(saved_composed, tmp_path):
    DistilledSet.load(saved_composed).save(tmp_path / "again")
    assert all((saved_composed / n).read_bytes() == (tmp_path / "again" / n).read_bytes() for n in FILES)


def test_verify_says_what_it_checked_of_composites(saved_composed):
    lines = verify(saved_composed)
    assert lines[-1] == "33 composites of 11 bases, labels (logit) in range"
    assert any(line.startswith("teachers.1.statistics: float32 [6]") for line in lines)


def test_more_than_256_groups_are_stored_in_two_bytes(spec):
    b = 257
    synth = Compensated(
        torch.zeros((b, *spec.shape), dtype=torch.uint8),
        torch.arange(b) % 5,
        torch.arange(b).float()[:, None, None, None, None].expand(b, 1, *spec.shape) / b,
        torch.arange(b),
        spec,
    )
    made = DistilledSet.make(synth, **NO_NOTES)
    assert made.tensors["group"].dtype == torch.int16 and torch.equal(made.synth.group, synth.group)
    assert made.nbytes == synth.nbytes


def test_saving_does_not_make_all_composites(composed, tmp_path, monkeypatch):
    asked = []
    real = Composites.model_input
    monkeypatch.setattr(Composites, "model_input", lambda s, i=None: (asked.append(len(i)), real(s, i))[1])
    DistilledSet.make(composed["int8"], **NO_NOTES).save(tmp_path / "set")
    assert asked and max(asked) <= len(composed["int8"].bases)
