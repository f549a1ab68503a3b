"""Damaged and hostile distilled sets: refused with ArtefactError naming the file, never another exception."""

import json
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from random_graphs import mutated

from ddengine import files
from ddengine.errors import ArtefactError
from ddengine.rng import Rng
from ddengine.types import Whitening
from synth import DistilledSet, Factored, Subset, schema, verify

FILES = ("README.md", "data.safetensors", "manifest.json", "preview.png")


def refuse(folder, name: str = "") -> ArtefactError:
    with pytest.raises(ArtefactError) as caught:
        verify(folder)
    assert name in caught.value.cause and caught.value.remedy and "\n" not in caught.value.cause
    return caught.value


def forge(folder, tensors=None, /, *, honest=True, **changes):
    """Rewrite a set as an attacker would: hashes, sizes and seal agree with what is in it."""
    manifest = json.loads((folder / "manifest.json").read_text())
    if tensors is not None:
        manifest["files"]["data.safetensors"] = files.write_tensors(folder / "data.safetensors", tensors)
        if honest:
            declared = {
                n: {"dtype": str(t.dtype).removeprefix("torch."), "shape": list(t.shape)}
                for n, t in tensors.items()
            }
            manifest["tensors"] = declared
            if all(t["dtype"] in schema.DTYPES for t in declared.values()):
                manifest["budget"] |= schema.part_bytes(declared, manifest["kind"])
    for path, value in changes.items():
        *parents, last = path.split("__")
        place = manifest
        for name in parents:
            place = place[name]
        place[last] = value
    files.write_json(folder / "manifest.json", {**manifest, "seal": schema.seal(manifest)})


@pytest.mark.parametrize("name", FILES)
def test_every_sampled_bit_flip_is_refused(saved, name):
    refuse_flips(saved, name, 100)


def refuse_flips(saved, name, count):
    data = (saved / name).read_bytes()
    places = torch.randint(0, 8 * len(data), (count,), generator=torch.Generator().manual_seed(0)).tolist()
    for place in {*places, 0, 8 * len(data) - 1}:
        flipped = bytearray(data)
        flipped[place // 8] ^= 1 << place % 8
        (saved / name).write_bytes(flipped)
        refuse(saved, name)
    (saved / name).write_bytes(data)
    assert verify(saved)


@pytest.mark.parametrize("name", FILES)
def test_every_sampled_truncation_and_extension_is_refused(saved, name):
    refuse_lengths(saved, name, 40)


def refuse_lengths(saved, name, count):
    data = (saved / name).read_bytes()
    for length in {*range(0, len(data), max(1, len(data) // count)), len(data) - 1}:
        (saved / name).write_bytes(data[:length])
        refuse(saved, name)
    for more in (b"\0", b"\n", b" "):
        (saved / name).write_bytes(data + more)
        refuse(saved, name)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("what", ["missing", "folder", "link", "dangling link"])
def test_files_that_are_no_files_are_refused(saved, name, what):
    (saved / name).rename(saved.parent / "real")
    if what == "folder":
        (saved / name).mkdir()
    elif what != "missing":
        (saved / name).symlink_to(saved.parent / ("real" if what == "link" else "nothing"))
    refuse(saved, name)


@pytest.mark.parametrize(
    "error", [PermissionError(13, "Permission denied"), OSError(5, "Input/output error")]
)
def test_files_that_cannot_be_read_are_refused_by_name(saved, monkeypatch, error):
    def fail(*_, **__):
        raise error

    for name in ("lstat", "read_bytes", "open"):
        with monkeypatch.context() as patch:
            patch.setattr(Path, name, fail)
            with pytest.raises(ArtefactError, match=error.strerror):
                verify(saved)


def test_a_file_in_place_of_the_folder_is_refused(saved):
    refuse(saved / "data.safetensors", "manifest.json is missing")


def test_without_verify_card_and_preview_may_be_edited_but_data_may_not(saved):
    (saved / "README.md").write_text("my own words")
    (saved / "preview.png").unlink()
    assert len(DistilledSet.load(saved, verify=False).decode()) == 11
    data = bytearray((saved / "data.safetensors").read_bytes())
    data[-1] ^= 1
    (saved / "data.safetensors").write_bytes(data)
    with pytest.raises(ArtefactError, match=r"data\.safetensors"):
        DistilledSet.load(saved, verify=False)


def test_a_newer_version_asks_for_an_upgrade(saved):
    forge(saved, version=2)
    assert "Upgrade" in refuse(saved, "manifest.json").remedy


def test_edited_text_is_refused_even_where_it_means_the_same(saved):
    manifest = json.loads((saved / "manifest.json").read_text())
    (saved / "manifest.json").write_text(json.dumps(manifest))
    refuse(saved, "changed after it was sealed")


def test_a_forged_set_with_nothing_wrong_is_accepted(saved):
    forge(saved, DistilledSet.load(saved).tensors)
    assert verify(saved)


HOSTILE = [
    *({name: value} for name in ("format", "kind", "y_kind") for value in (None, 3, [], "x", {})),
    *({"version": value} for value in (0, -1, True, "1", 1.0, None, 10**30)),
    *({"count": value} for value in (0, 12, -1, 1e3, True, None, 2**80)),
    *({f"dataset__{name}": 5} for name in ("name", "shape", "classes", "mean", "std", "licence")),
    *({"dataset__shape": v} for v in ([3, 7], [3, 7, 0], [3, 5, 7], [-3, -7, 5], [3, 7, 2**60])),
    *({"dataset__shape": v} for v in ([3.0, 7, 5], [True] * 3, "375", [[3], 7, 5])),
    *({"dataset__std": v} for v in ([0.0] * 3, [0.1] * 2, [-1.0] * 3, [1e-300] * 3, [10**400] * 3)),
    *({"dataset__mean": v} for v in ([], [0.1] * 4, [None] * 3, [[]] * 3)),
    *({"dataset__classes": v} for v in ([], ["a"], ["a", "b", 3, "c", "d"], {"a": 1}, "abcde")),
    *({"dataset__preprocessing": v} for v in ("zca", "none", None)),
    *({"budget__total": v} for v in (-1, 0, 5, "9", None)),
    *({"budget__ipc": v} for v in (0, -2, "1", 1.5)),
    *({"tensors": v} for v in ({}, [], None, {"images": {}}, {"../x": {"dtype": "uint8", "shape": [1]}})),
    *({"tensors__images__shape": v} for v in ([], [0], [-11, 3, 7, 5], [2**50] * 9, "x", [11, 3, 7, 5.0])),
    *({"tensors__images__dtype": v} for v in ("object", "float64", None, ["uint8"], "float32")),
    *({"files": v} for v in ({}, [], None, {"data.safetensors": None})),
    *({f"files__{name}": {"sha256": "0" * 64, "bytes": 3}} for name in ("../../x", "/etc/passwd", "a/b")),
    *({f"files__{name}": {"sha256": "0" * 64, "bytes": 3}} for name in ("..", ".", "", "a\0", "a\n")),
    *({"files__data.safetensors__bytes": v} for v in (-1, 0, 2**70, "5", None, 1.5, True)),
    *({"files__data.safetensors__sha256": v} for v in ("", "0" * 63, "g" * 64, 7, None)),
    *({name: value} for name in ("recipe", "provenance") for value in (None, [], "x", 3)),
    {"surprise": 1},
    {"dataset__surprise": 1},
]  # fmt: skip


@pytest.mark.parametrize("changes", HOSTILE, ids=lambda c: ascii(c)[:60])
def test_hostile_manifests_are_refused(saved, changes):
    forge(saved, **changes)
    refuse(saved)


def test_every_missing_field_is_refused(any_saved):
    manifest = json.loads((any_saved / "manifest.json").read_text())
    for where in ((), ("dataset",), ("budget",), ("tensors", "labels"), ("files", "README.md")):
        table = manifest
        for name in where:
            table = table[name]
        for name in list(table):
            kept = table.pop(name)
            sealed = (
                {**manifest, "seal": schema.seal(manifest)} if (where, name) != ((), "seal") else manifest
            )
            files.write_json(any_saved / "manifest.json", sealed)
            refuse(any_saved, "manifest.json")
            table[name] = kept


@pytest.mark.parametrize(
    "text",
    ["", "null", "[]", "1e999", "{", '{"a":1}', "[" * 100000, '"\\ud800"', "9" * 5000, "\ufeff{}", "NaN"],
)
def test_manifests_that_are_no_tables_are_refused(saved, text):
    (saved / "manifest.json").write_text(text)
    refuse(saved, "manifest.json")


def test_manifests_with_a_key_twice_or_nan_or_deep_nesting_are_refused(saved):
    text = (saved / "manifest.json").read_text()
    twice = text.replace('"count": 11', '"count": 12,\n "count": 11')
    deep = text.replace('"seed": 5', '"seed": ' + "[" * 900 + "]" * 900)
    for hostile in (twice, text.replace('"seed": 5', '"seed": NaN'), deep):
        assert hostile != text
        (saved / "manifest.json").write_text(hostile)
        refuse(saved, "manifest.json")


def with_value(tensors, name, index, value):
    changed = {n: t.clone() for n, t in tensors.items()}
    changed[name][index] = value
    return changed


TENSORS = {
    "label out of range": lambda t: with_value(t, "labels", 3, 5),
    "offset NaN": lambda t: with_value(t, "images.offset", (2, 1), float("nan")),
    "scale infinite": lambda t: with_value(t, "images.scale", (2, 1), float("inf")),
    "scale negative": lambda t: with_value(t, "images.scale", (2, 1), -1.0),
    "scale overflows when decoded": lambda t: with_value(t, "images.scale", (2, 1), 3e38),
    "rate NaN": lambda t: {**t, "student_lr": torch.tensor(float("nan"))},
    "rate negative": lambda t: {**t, "student_lr": torch.tensor(-1.0)},
    "rate a vector": lambda t: {**t, "student_lr": torch.ones(2)},
    "labels missing": lambda t: {n: v for n, v in t.items() if n != "labels"},
    "images missing": lambda t: {n: v for n, v in t.items() if n != "images"},
    "scale missing": lambda t: {n: v for n, v in t.items() if n != "images.scale"},
    "tensor unknown": lambda t: {**t, "code": torch.zeros(3)},
    "one label too few": lambda t: {**t, "labels": t["labels"][:10]},
    "labels float": lambda t: {**t, "labels": t["labels"].float()},
    "labels int64": lambda t: {**t, "labels": t["labels"].long()},
    "images transposed": lambda t: {**t, "images": t["images"].transpose(2, 3)},
    "images flat": lambda t: {**t, "images": t["images"].flatten(1)},
    "images a number": lambda t: {**t, "images": torch.tensor(3, dtype=torch.uint8)},
    "images int32": lambda t: {**t, "images": t["images"].int()},
    "images empty": lambda t: {n: v if v.ndim == 0 else v[:0] for n, v in t.items()},
    "floats with offsets": lambda t: {**t, "images": t["images"].float()},
    "fewer images than counted": lambda t: {n: v if v.ndim == 0 else v[:10] for n, v in t.items()},
    "scale transposed": lambda t: {**t, "images.scale": t["images.scale"].T},
    "half a whitening": lambda t: {**t, "zca.mean": torch.zeros(105)},
    "a thousand tensors": lambda t: {**t, **{f"images.x{'a' * i}": torch.zeros(1) for i in range(100)}},
}


@pytest.mark.parametrize("case", TENSORS)
def test_hostile_tensors_are_refused(saved, case):
    forge(saved, TENSORS[case](DistilledSet.load(saved).tensors))
    refuse(saved)


def test_tensors_that_are_not_the_declared_ones_are_refused(saved):
    tensors = DistilledSet.load(saved).tensors
    for changed in (
        {**tensors, "labels": tensors["labels"].to(torch.int8)},
        {**tensors, "label": tensors["labels"].clone()},
    ):
        forge(saved, changed, honest=False)
        refuse(saved)


def test_hostile_whitenings_are_refused(tmp_path, pixels):
    d = 3 * 7 * 5
    zca = Whitening(torch.zeros(d), torch.eye(d), torch.eye(d))
    spec = pixels.spec
    white = type(spec)(spec.name, spec.shape, spec.classes, spec.mean, spec.std, zca=zca)
    made = DistilledSet.make(type(pixels)(pixels.images, pixels.labels, white), recipe={}, provenance={})
    folder = made.save(tmp_path / "white")
    bad = {
        "zca.mean": torch.zeros(d - 1),
        "zca.matrix": torch.eye(d).half(),
        "zca.inverse": torch.eye(d) * torch.inf,
    }
    for name, tensor in bad.items():
        forge(folder, {**made.tensors, name: tensor})
        refuse(folder, name)
    forge(folder, made.tensors, dataset__preprocessing="standard")
    refuse(folder, "whitening")


def test_hostile_subsets_are_refused(tmp_path, digits):
    made = DistilledSet.make(Subset.of(digits, torch.tensor([1, 7, 9])), recipe={}, provenance={})
    folder = made.save(tmp_path / "subset")
    t = made.tensors
    bad = (
        {**t, "indices": t["indices"] - 5},
        {**t, "indices": t["indices"][:2]},
        {**t, "images": t["images"].float()},
        {**t, "labels": t["labels"] + 10},
        {"images": t["images"], "labels": t["labels"]},
    )
    for tensors in bad:
        forge(folder, tensors)
        refuse(folder)
    forge(folder, t, y_kind="prob")
    refuse(folder)


@pytest.mark.parametrize("low", [-0.1, 1.1, float("nan"), float("inf")])
def test_probabilities_out_of_range_are_refused(tmp_path, pixels, low):
    soft = type(pixels)(pixels.images, torch.full((11, 5), 0.2), pixels.spec, "prob")
    made = DistilledSet.make(soft, recipe={}, provenance={})
    folder = made.save(tmp_path / "soft")
    forge(folder, with_value(made.tensors, "labels", (3, 2), low))
    refuse(folder, "labels")


def entry(name: str, shape: list[int], start: int, stop: int, dtype: str = "U8") -> str:
    return f'"{name}":{{"dtype":"{dtype}","shape":{shape},"data_offsets":[{start},{stop}]}}'


HEADERS = {
    "claims a gigabyte": f"{{{entry('images', [2**30], 0, 2**30)}}}",
    "overlaps": f"{{{entry('a', [2], 0, 2)},{entry('b', [2], 1, 3)}}}",
    "negative shape": f"{{{entry('images', [-1], 0, 1)}}}",
    "unknown type": f"{{{entry('images', [1], 0, 1, 'Q9')}}}",
    "overflowing shape": f"{{{entry('images', [2**32] * 3, 0, 0)}}}",
    "no table": "[]",
    "not JSON": "{",
    "key twice": f"{{{entry('a', [1], 0, 1)},{entry('a', [1], 0, 1)}}}",
}


@pytest.mark.parametrize("header", HEADERS)
@pytest.mark.parametrize("length", ["true", "too long", "huge"])
def test_hostile_safetensors_headers_are_refused(saved, header, length):
    text = HEADERS[header].encode()
    claimed = {"true": len(text), "too long": len(text) + 10**6, "huge": 2**63}[length]
    data = claimed.to_bytes(8, "little") + text
    data += bytes(max(0, 1600 - len(data)))
    (saved / "data.safetensors").write_bytes(data)
    digest = files.sha256(saved / "data.safetensors")
    forge(saved, **{"files__data.safetensors": {"sha256": digest, "bytes": len(data)}})
    refuse(saved, "data.safetensors")


def test_a_data_file_much_larger_than_its_tensors_is_refused_unread(saved, monkeypatch):
    def never(*_):
        raise AssertionError("read")

    monkeypatch.setattr(safetensors.torch, "load", never)
    with (saved / "data.safetensors").open("ab") as file:
        file.truncate(3 << 20)
    forge(saved, **{"files__data.safetensors__bytes": 3 << 20})
    refuse(saved, "cannot have")


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
PLACES = [
    "format", "version", "kind", "y_kind", "count", "seal", "tensors", "tensors__images",
    "tensors__images__shape", "tensors__labels__dtype", "files", "files__README.md",
    "files__data.safetensors", "files__preview.png__bytes", "dataset", "dataset__shape", "dataset__mean",
    "dataset__std", "dataset__classes", "dataset__preprocessing", "budget", "budget__images",
    "budget__preprocessing",
]  # fmt: skip


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.sampled_from(PLACES), value=JSON)
def test_random_values_in_a_sealed_manifest_raise_nothing_else(saved, place, value):
    copy = saved.parent / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(saved, copy)
    forge(copy, **{place: value})
    if place == "seal":
        assert verify(copy)  # the forger seals last
    else:
        refuse(copy)


@pytest.mark.parametrize("name", ["data.safetensors", "manifest.json"])
def test_flipped_and_cut_sets_of_graphs_are_refused(saved_graphs, name):
    refuse_flips(saved_graphs, name, 30)
    refuse_lengths(saved_graphs, name, 15)


HOSTILE_GRAPHS = [
    *({"kind": v} for v in ("pixels", "subset", "tree", "", None, ["forest"])),
    *({"y_kind": v} for v in ("logit", "x", None)),
    *({"count": v} for v in (0, 6, 8, -1, None)),
    *({f"dataset__{name}": 5} for name in ("name", "classes", "fingerprint", "licence", "codes_from")),
    *({"dataset__node_sizes": v} for v in ([], [3], [3, 0], [3, 6], [2, 5], [3.0, 5], [3, 2**40], "35", 3)),
    *({"dataset__edge_sizes": v} for v in ([], [4], [4, 1], [-4, 2], [5, 2], [4, 2, 1], [1] * 300, {})),
    *({"dataset__classes": v} for v in ([], ["a"], ["a", "b", 3], "abc")),
    *({"dataset__discretised": v} for v in ("some", None, 1)),
    *({f"budget__{part}": v} for part in ("images", "trees", "extras", "total") for v in (-1, 1, 10**9)),
    *({"tensors__labels__dtype": v} for v in ("float64", "int32", None)),
    {"dataset__shape": [3, 7, 5]},
    {"budget__surprise": 1},
    {"surprise": 1},
]  # fmt: skip


@pytest.mark.parametrize("changes", HOSTILE_GRAPHS, ids=lambda c: ascii(c)[:60])
def test_hostile_manifests_of_graphs_are_refused(saved_graphs, changes):
    forge(saved_graphs, **changes)
    refuse(saved_graphs)


HOSTILE_CODEBOOKS = {
    "codebook.node.1 is not": lambda t: with_value(t, "codebook.node.1", (0, 0), float("nan")),
    "codebook.node.1 is not one row": lambda t: {**t, "codebook.node.1": t["codebook.node.1"][1:]},
    "codebook.node.1 is not one row of": lambda t: {**t, "codebook.node.1": t["codebook.node.1"].half()},
    "for each of 4 codes": lambda t: {**t, "codebook.edge.0": t["codebook.edge.0"].flatten()},
    "codebook.node.2 stands for no column": lambda t: {**t, "codebook.node.2": t["codebook.node.1"]},
    "codebook.edge.00 stands for": lambda t: {**t, "codebook.edge.00": t["codebook.edge.0"]},
    "codebook.x stands for": lambda t: {**t, "codebook.x": t["codebook.edge.0"]},
    "'codebook' does not belong": lambda t: {**t, "codebook": t["codebook.edge.0"]},
    "'images' does not belong": lambda t: {**t, "images": torch.zeros(3)},
    "'zca.mean' does not belong": lambda t: {**t, "zca.mean": torch.zeros(3)},
}


@pytest.mark.parametrize("words", HOSTILE_CODEBOOKS)
def test_hostile_codebooks_and_foreign_tensors_are_refused(saved_graphs, words):
    forge(saved_graphs, HOSTILE_CODEBOOKS[words](DistilledSet.load(saved_graphs).tensors))
    assert words in refuse(saved_graphs, "data.safetensors").cause


def test_a_rule_of_the_form_that_is_broken_names_the_file(saved_graphs):
    tensors = DistilledSet.load(saved_graphs).tensors
    name = "trees.own" if "trees.own" in tensors else "graphs.edges"
    forge(saved_graphs, with_value(tensors, name, -1, 250))
    refuse(saved_graphs, "data.safetensors is damaged: ")


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_mutated_tensors_of_graphs_are_refused_or_make_a_set(saved_graphs, data):
    copy = saved_graphs.parent / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(saved_graphs, copy)
    forge(copy, mutated(data.draw, DistilledSet.load(saved_graphs).tensors))
    try:
        verify(copy)
    except ArtefactError as error:
        assert str(copy) in error.cause and "\n" not in error.cause
    else:
        assert len(DistilledSet.load(copy).decode()) == 7


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    place=st.sampled_from(
        ["kind", "y_kind", "count", "dataset", "dataset__node_sizes", "dataset__edge_sizes", "budget__trees"]
    ),
    value=JSON,
)
def test_random_values_in_a_sealed_manifest_of_graphs_raise_nothing_else(saved_graphs, place, value):
    copy = saved_graphs.parent / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(saved_graphs, copy)
    forge(copy, **{place: value})
    refuse(copy)


def test_a_forest_of_no_items_is_refused(pristine_graphs, tmp_path):
    folder = shutil.copytree(pristine_graphs["forest"], tmp_path / "distilled")
    left_out = ("items.sizes", "items.color", "items.count", "weights")
    tensors = {n: t for n, t in DistilledSet.load(folder).tensors.items() if n not in left_out}
    forge(folder, {**tensors, "labels": tensors["labels"][0, 0].clone()})
    assert "there is no item" in refuse(folder, "data.safetensors").cause


@pytest.mark.parametrize("name", FILES)
def test_flipped_and_cut_compensated_sets_are_refused(saved_composed, name):
    refuse_flips(saved_composed, name, 30)
    refuse_lengths(saved_composed, name, 15)


HOSTILE_COMPOSITES = [
    *({"kind": v} for v in ("pixels", "subset", "forest", "composed", "", None)),
    *({"y_kind": v} for v in ("class", "prob", "x", None)),
    *({"count": v} for v in (0, 11, 32, 34, -1, None)),
    *({"dataset__shape": v} for v in ([3, 5, 7], [1, 7, 5], [3, 7, 6])),
    *({"dataset__classes": v} for v in (["a"], list("abc"), list("abcdefg"))),
    *({f"budget__{part}": v} for part in ("images", "labels", "extras", "total") for v in (-1, 1, 10**9)),
    *({"tensors__compensators__dtype": v} for v in ("uint8", "float64", "int16", None)),
    {"budget__trees": 0},
    {"tensors__group__shape": [12]},
]  # fmt: skip


@pytest.mark.parametrize("changes", HOSTILE_COMPOSITES, ids=lambda c: ascii(c)[:60])
def test_hostile_manifests_of_compensated_sets_are_refused(saved_composed, changes):
    forge(saved_composed, **changes)
    refuse(saved_composed)


def without(t, *names):
    return {n: v for n, v in t.items() if n not in names}


COMPOSITES = {
    "group lies outside": lambda t: with_value(t, "group", 4, 3),
    "group is torch.float32": lambda t: {**t, "group": t["group"].float()},
    "group is torch.uint8 [10]": lambda t: {**t, "group": t["group"][:10]},
    "'group' is missing": lambda t: without(t, "group"),
    "'compensators' is missing": lambda t: without(t, "compensators"),
    "[3, 2, 3, 5, 7]": lambda t: {**t, "compensators": t["compensators"].transpose(3, 4)},
    "[6, 3, 7, 5]": lambda t: {**t, "compensators": t["compensators"].flatten(0, 1)},
    "group lies outside 0..1": lambda t: {**t, "compensators": t["compensators"][:2]},
    "labels are": lambda t: {**t, "labels": t["labels"][:-1]},
    "labels lie outside 0..4": lambda t: with_value(t, "labels.classes", 3, 5),
    "'labels.classes' is missing": lambda t: without(t, "labels.classes"),
    "labels are torch.float32 [11]": lambda t: {**t, "labels.classes": t["labels.classes"].float()},
    "images are": lambda t: {**t, "images": t["images"].transpose(2, 3)},
    "'images' is missing": lambda t: without(t, "images"),
    "'teachers.0.params' is missing": lambda t: without(t, "teachers.0.params"),
    "'teachers.2.statistics' does not belong": lambda t: {**t, "teachers.2.statistics": torch.ones(3)},
    "'teachers.01.params' does not belong": lambda t: {**t, "teachers.01.params": torch.ones(3)},
    "teachers.1.params is not": lambda t: {**t, "teachers.1.params": t["teachers.1.params"].float()},
    "teachers.1.statistics is not": lambda t: with_value(t, "teachers.1.statistics", 2, float("inf")),
    "teachers.0.statistics is not": lambda t: {**t, "teachers.0.statistics": torch.ones((2, 3))},
    "student_lr is not": lambda t: {**t, "student_lr": torch.tensor(-1.0)},
    "whitening tensors": lambda t: {**t, "zca.mean": torch.zeros(105)},
    "'code' does not belong": lambda t: {**t, "code": torch.zeros(3)},
}


@pytest.mark.parametrize("words", COMPOSITES)
def test_hostile_tensors_of_compensated_sets_are_refused(saved_composed, words):
    forge(saved_composed, COMPOSITES[words](DistilledSet.load(saved_composed).tensors))
    assert words in refuse(saved_composed, "data.safetensors").cause


CODED = {
    "compensators.scale is negative": lambda t: with_value(t, "compensators.scale", (1, 1, 2), -1.0),
    "compensators.scale is negative or not finite": lambda t: with_value(
        t, "compensators.scale", (1, 1, 2), float("nan")
    ),
    "compensators.scale is torch.float32": lambda t: {
        **t, "compensators.scale": t["compensators.scale"].float(),
    },
    "compensators.scale is torch.float16 [3, 2]": lambda t: {
        **t, "compensators.scale": t["compensators.scale"][:, :, 0],
    },
    "'compensators.scale' is missing": lambda t: without(t, "compensators.scale"),
    "'compensators.scale' does not belong": lambda t: {**t, "compensators": t["compensators"].half()},
    "'labels.scale' is missing": lambda t: without(t, "labels.scale"),
    "labels.scale is negative": lambda t: with_value(t, "labels.scale", 7, -0.5),
    "labels.scale is not": lambda t: with_value(t, "labels.scale", 7, float("inf")),
    "labels.offset is not": lambda t: {**t, "labels.offset": t["labels.offset"][:-1]},
    "labels are torch.uint8 [33, 2]": lambda t: {**t, "labels": t["labels"][:, :2]},
    "'images.offset' is missing": lambda t: {**t, "images.scale": torch.ones((11, 3))},
    "images.scale is": lambda t: {
        **t, "images.scale": torch.ones((11, 2)), "images.offset": torch.ones((11, 3)),
    },
    "'labels.offset' does not belong to": lambda t: {**t, "labels": t["labels"].int()},
    "'compensators.scale' does not belong to": lambda t: {**t, "compensators": t["compensators"].float()},
    "'labels.offset' does not belong": lambda t: {**t, "labels": torch.zeros((33, 5))},
}  # fmt: skip


@pytest.mark.parametrize("words", CODED)
def test_hostile_codes_of_compensated_sets_are_refused(pristine_composed, tmp_path, words):
    folder = shutil.copytree(pristine_composed["int8"], tmp_path / "distilled")
    forge(folder, CODED[words](DistilledSet.load(folder).tensors))
    assert words in refuse(folder, "data.safetensors").cause


def test_hostile_floats_of_compensated_sets_are_refused(pristine_composed, tmp_path):
    folder = shutil.copytree(pristine_composed["fp16"], tmp_path / "distilled")
    t = DistilledSet.load(folder).tensors
    bad = {
        "compensators are not finite": with_value(t, "compensators", (1, 1, 2, 3, 3), float("inf")),
        "compensators are torch.float32": {**t, "compensators": t["compensators"].float()},
        "compensators are torch.uint8": {**t, "compensators": t["compensators"].to(torch.uint8)},
        "labels are torch.int32": {**t, "labels": t["labels"].int()},
        "labels are not finite": with_value(t, "labels", (1, 1), float("nan")),
        "images are not finite": with_value(t, "images.scale", (1, 1), -1.0),
        "'images.scale' is missing": without(t, "images.scale"),
        "images.offset does not belong": {**t, "images": t["images"].float()},
    }
    for words, tensors in bad.items():
        forge(folder, tensors)
        assert words in refuse(folder, "data.safetensors").cause


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_mutated_tensors_of_compensated_sets_are_refused_or_make_a_set(pristine_composed, tmp_path, data):
    copy = tmp_path / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(pristine_composed["fp16"], copy)
    forge(copy, mutated(data.draw, DistilledSet.load(copy).tensors))
    try:
        verify(copy)
    except ArtefactError as error:
        assert str(copy) in error.cause and "\n" not in error.cause
    else:
        assert len(DistilledSet.load(copy).decode()) == 33


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    place=st.sampled_from(["kind", "y_kind", "count", "dataset", "dataset__shape", "budget__extras"]),
    value=JSON,
)
def test_random_values_in_a_sealed_manifest_of_composites_raise_nothing_else(
    pristine_composed, tmp_path, place, value
):
    copy = tmp_path / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(pristine_composed["int8"], copy)
    forge(copy, **{place: value})
    refuse(copy)


@pytest.fixture
def saved_grids(pixels, tmp_path):
    """A saved set of grids with soft labels of every cell."""
    labels = torch.randn((4 * len(pixels.images), len(pixels.spec.classes)), generator=Rng(5).torch("labels"))
    synth = Factored(pixels.images, labels, pixels.spec, 2, "logit", student_lr=0.01)
    return DistilledSet.make(synth, recipe={}, provenance={}).save(tmp_path / "grids")


def test_forged_factors_are_refused(pixels, saved_grids, tmp_path):
    wrong = ((3, "labels are"), (6, "no 6 cells"), (0, "1..16"), (2**20, "1..16"), (2.0, "1..16"))
    for factor, said in wrong:
        forge(saved_grids, factor=factor)
        assert said in refuse(saved_grids).cause
    forge(saved_grids, factor=2, count=4)
    assert "count is not the number" in refuse(saved_grids).cause
    forge(saved_grids, count=44, kind="pixels")
    assert "'factor' is unknown" in refuse(saved_grids, "manifest.json").cause
    plain = DistilledSet.make(pixels, recipe={}, provenance={}).save(tmp_path / "pixels")
    forge(plain, kind="factored")
    assert "'factor' is missing" in refuse(plain, "manifest.json").cause


def test_forged_tensors_of_grids_are_refused(saved_grids):
    tensors = DistilledSet.load(saved_grids).tensors
    for changed, said in (
        ({"labels": tensors["labels"][:11].clone()}, "labels are"),
        ({"labels": tensors["labels"] * float("nan")}, "labels are not finite"),
        ({"images": tensors["images"][:, :, 1:].contiguous()}, "images are"),
        ({"images.scale": -tensors["images.scale"]}, "images are not finite"),
        ({"student_lr": torch.tensor(-1.0)}, "student_lr"),
        ({"extra": torch.zeros(1)}, "'extra' does not belong"),
    ):
        forge(saved_grids, {**tensors, **changed})
        assert said in refuse(saved_grids, "data.safetensors").cause
