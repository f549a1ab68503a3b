"""Sets that are written out for other tools come back as they were, or the notes say what is lost."""

import csv
import json
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ddengine.errors import UsageError
from ddengine.rng import Rng
from ddengine.types import DataSpec, Whitening
from synth import DistilledSet, Pixels, Subset
from synth.exported import TARGETS, export
from synth.exported_card import licence_fields
from synth.exported_folders import folder_names, hub_names
from synth.foreign import read_foreign

FILES = {"npz": "set.npz", "torch": "set.pt"}


def random_set(n, k, c, kind, codec="fp32", zca=False, rate=None, seed=0):
    """A set of random images; the spec has awkward numbers."""
    rng, shape = Rng(seed), (c, 3, 2)
    classes = tuple(f"class {chr(97 + i)}" for i in range(k))
    mean, std = tuple(0.1 + i / 7 for i in range(c)), tuple(0.3 - i / 11 for i in range(c))
    spec = DataSpec("random", shape, classes, mean, std, "c" * 64, "MIT")
    if zca:
        matrix = torch.eye(6 * c) * 1.7
        spec = replace(
            spec, zca=Whitening(torch.rand(6 * c, generator=rng.torch("m")), matrix, matrix / 2.89)
        )
    images = torch.randn((n, *shape), generator=rng.torch("x"))
    labels = torch.randint(k, (n,), generator=rng.torch("y"))
    if kind != "class":
        labels = torch.randn((n, k), generator=rng.torch("soft"))
        labels = labels.softmax(1) if kind == "prob" else labels
    return stored(Pixels(images, labels, spec, kind, codec, rate))


def stored(synth):
    return DistilledSet.make(synth, recipe={"network": {"name": "convnet"}}, provenance={"seed": 3})


def rate_of(distilled):
    return float(distilled.tensors["student_lr"]) if "student_lr" in distilled.tensors else None


@settings(max_examples=30, deadline=None)
@given(
    n=st.integers(1, 7), k=st.integers(2, 5), c=st.sampled_from([1, 2, 3]), zca=st.booleans(),
    kind=st.sampled_from(["class", "prob", "logit"]), codec=st.sampled_from(["fp32", "fp16", "uint8"]),
    to=st.sampled_from(["npz", "torch"]), rate=st.sampled_from([None, 0.0123]), seed=st.integers(0, 99),
)  # fmt: skip
def test_files_come_back_bit_for_bit(n, k, c, zca, kind, codec, to, rate, seed):
    made = random_set(n, k, c, kind, codec, zca, rate, seed)
    images = made.decode()
    with TemporaryDirectory() as folder:
        path = Path(folder) / FILES[to]
        export(made, to, path)
        found = read_foreign([path], to, images.spec)
    assert torch.equal(found.images.x, images.x) and torch.equal(found.images.y, images.y)
    assert found.images.y_kind == kind and found.student_lr == rate_of(made)


def test_an_npz_file_opens_in_numpy_alone(tmp_path):
    made = random_set(7, 3, 3, "prob", zca=True, rate=0.5)
    export(made, "npz", tmp_path / "set.npz")
    with np.load(tmp_path / "set.npz", allow_pickle=False) as found:
        arrays = dict(found)
    images, spec = made.decode(), made.spec
    assert np.array_equal(arrays["x"], images.x) and np.array_equal(arrays["y"], images.y)
    assert arrays["classes"].tolist() == list(spec.classes) and arrays["y_kind"] == "prob"
    assert arrays["mean"].tolist() == list(spec.mean) and arrays["student_lr"] == 0.5
    back = arrays["x"].reshape(7, -1) @ arrays["zca_inverse"] + arrays["zca_mean"]
    pixels = np.rint(np.clip(back, 0, 1) * 255).reshape(arrays["x"].shape)
    assert np.abs(pixels - arrays["pixels"].astype(float)).max() <= 1 and arrays["pixels"].dtype == np.uint8


def test_a_torch_file_is_plain_and_loads_with_weights_only(tmp_path):
    made = random_set(7, 3, 3, "class", rate=0.5)
    export(made, "torch", tmp_path / "set.pt")
    found = torch.load(tmp_path / "set.pt", weights_only=True)
    assert torch.equal(found["images"], made.decode().x) and found["labels"].dtype == torch.int64
    assert found["classes"] == list(made.spec.classes) and found["student_lr"] == 0.5
    assert (found["mean"], found["std"]) == (list(made.spec.mean), list(made.spec.std))


def test_another_normalisation_is_brought_over_by_way_of_pixels(tmp_path):
    made = random_set(5, 3, 3, "class")
    export(made, "npz", tmp_path / "set.npz")
    other = replace(made.spec, mean=(0.5, 0.5, 0.5), std=(0.25, 0.5, 0.125))
    found = read_foreign([tmp_path / "set.npz"], "npz", other)
    x = made.decode().x.double()
    for c in range(3):
        x[:, c] = (x[:, c] * made.spec.std[c] + made.spec.mean[c] - other.mean[c]) / other.std[c]
    assert torch.allclose(found.images.x.double(), x, atol=1e-5)
    assert any("another mean, std or whitening" in note for note in found.notes)


def test_files_of_the_same_set_are_the_same_bytes(tmp_path):
    for to, name in FILES.items():
        for i in range(2):
            export(random_set(5, 3, 3, "class"), to, tmp_path / f"{i}{name}")
        assert (tmp_path / f"0{name}").read_bytes() == (tmp_path / f"1{name}").read_bytes()


@pytest.fixture
def subset(digits):
    return stored(Subset.of(digits, torch.arange(0, 1797, 97)))


def test_an_image_folder_of_real_pixels_is_exact(tmp_path, subset):
    notes = export(subset, "imagefolder", tmp_path / "out")
    assert not any("clamped" in note or "rounding" in note for note in notes)
    found = read_foreign([tmp_path / "out"], "imagefolder", subset.spec)
    order = subset.decode().classes.argsort(stable=True)
    assert torch.equal(found.images.x, subset.decode().x[order])
    assert torch.equal(found.images.y, subset.decode().y[order])


def test_an_image_folder_is_within_half_a_level_and_counts_what_is_clamped(tmp_path):
    made = random_set(11, 3, 3, "class", rate=0.25)
    images, spec = made.decode(), made.spec
    notes = export(made, "imagefolder", tmp_path / "out")
    pixels = images.x.double() * torch.tensor(spec.std).double()[:, None, None]
    pixels += torch.tensor(spec.mean).double()[:, None, None]
    outside = int(((pixels < 0) | (pixels > 1)).sum())
    assert outside and any(f"{outside} of {pixels.numel()} pixel values lie outside" in n for n in notes)
    assert any("rounding to 8 bits" in n for n in notes) and any(
        "learned learning rate 0.25" in n for n in notes
    )
    order = images.classes.argsort(stable=True)
    found = read_foreign([tmp_path / "out"], "imagefolder", spec).images
    assert torch.equal(found.y, images.y[order])
    error = (spec.denormalise(found.x).double() - pixels[order].clamp(0, 1)).abs().max()
    assert error < 0.5 / 255 + 1e-6


def test_soft_labels_of_an_image_folder_are_in_a_table(tmp_path):
    made = random_set(7, 3, 1, "logit")
    notes = export(made, "imagefolder", tmp_path / "out")
    rows = list(csv.reader((tmp_path / "out" / "labels.csv").open()))
    images = made.decode()
    assert rows[0] == ["file", *made.spec.classes] and any("labels.csv" in note for note in notes)
    table = torch.tensor([[float(v) for v in row[1:]] for row in rows[1:]])
    assert torch.equal(table, images.y)
    for (file, *_), x, label in zip(rows[1:], images.x, images.classes.tolist(), strict=True):
        assert file.startswith(f"{made.spec.classes[label]}/")
        shown = np.asarray(Image.open(tmp_path / "out" / file))
        exact = (x[0].double() * made.spec.std[0] + made.spec.mean[0]).clamp(0, 1) * 255
        assert np.abs(shown - exact.numpy()).max() <= 0.5 + 1e-3
    found = read_foreign([tmp_path / "out"], "imagefolder", made.spec)
    assert any("labels.csv is not read" in note for note in found.notes)


AWKWARD = ("T-shirt/top", "..", "", "Cat", "cat", "3", "a" * 101, "elk ", "été", "1")


def test_class_names_that_are_no_safe_folders_become_numbers(tmp_path):
    assert folder_names(AWKWARD) == ["0", "01", "2", "03", "4", "3", "6", "7", "été", "1"]
    spec = DataSpec("odd", (3, 3, 2), AWKWARD, (0.5,) * 3, (0.2,) * 3)
    pixels = torch.randint(0, 256, (10, 3, 3, 2), generator=Rng(0).torch("x"), dtype=torch.uint8)
    made = stored(Pixels(spec.normalise(pixels), torch.arange(10), spec, codec="fp32"))
    notes = export(made, "imagefolder", tmp_path / "out")
    assert any("7 class names are no safe folder names, such as 'T-shirt/top'" in note for note in notes)
    assert any("classes.json has its order" in note for note in notes)
    told = json.loads((tmp_path / "out" / "classes.json").read_text())["classes"]
    assert [entry["class"] for entry in told] == list(AWKWARD)
    assert [entry["folder"] for entry in told] == folder_names(AWKWARD)
    found = read_foreign([tmp_path / "out"], "imagefolder", spec)
    assert torch.equal(found.images.x, made.decode().x) and found.images.y.tolist() == list(range(10))
    assert {path.name for path in tmp_path.iterdir()} == {"out"}


def test_folders_for_the_hub_sort_as_labels_do_and_none_is_a_part():
    assert hub_names(("ant", "bee")) == ["ant", "bee"]
    assert hub_names(("bee", "ant")) == ["0-bee", "1-ant"]
    names = ("test", "train", "test tube", "latest", "a/b", *"cdefgh")
    assert hub_names(names) == [
        "00", "01", "02", "03-latest", "04", "05-c", "06-d", "07-e", "08-f", "09-g", "10-h",
    ]  # fmt: skip
    assert hub_names(names) == sorted(hub_names(names))


def front_matter(folder):
    """The YAML of a data card, and its Markdown."""
    _, head, body = (folder / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(head), body


def test_a_folder_for_the_hub_has_its_card_and_images(tmp_path, subset):
    notes = export(subset, "hf", tmp_path / "out")
    head, body = front_matter(tmp_path / "out")
    assert head["license"] == "cc-by-4.0" and head["task_categories"] == ["image-classification"]
    assert head["size_categories"] == ["n<1K"] and "dataset-distillation" in head["tags"]
    assert head["configs"][0]["data_files"] == [{"split": "train", "path": "train/**"}]
    image, label = head["dataset_info"]["features"]
    assert image == {"name": "image", "dtype": "image"}
    assert label["dtype"]["class_label"]["names"] == {str(i): str(i) for i in range(10)}
    assert "load_dataset" in body and "convnet" in body and notes
    images, seen = subset.decode(), [tmp_path / "out" / "README.md"]
    pixels = (subset.spec.denormalise(images.x) * 255).round().to(torch.uint8)
    for number, label in enumerate(images.y.tolist(), 1):
        path = tmp_path / "out" / "train" / str(label) / f"{number:05d}.png"
        assert np.array_equal(np.asarray(Image.open(path)), pixels[number - 1, 0].numpy())
        seen.append(path)
    assert {p for p in (tmp_path / "out").rglob("*") if p.is_file()} == {
        *seen,
        tmp_path / "out" / "README.md",
    }


@pytest.mark.parametrize("kind", ["class", "prob", "logit"])
def test_soft_labels_and_absent_classes_for_the_hub_are_in_metadata(tmp_path, kind):
    made = random_set(3, 5, 3, kind, rate=0.125)
    export(made, "hf", tmp_path / "out")
    lines = (tmp_path / "out" / "train" / "metadata.jsonl").read_text().splitlines()
    rows, images = [json.loads(line) for line in lines], made.decode()
    assert [row["label"] for row in rows] == images.classes.tolist()
    assert all((tmp_path / "out" / "train" / row["file_name"]).is_file() for row in rows)
    head, body = front_matter(tmp_path / "out")
    columns = [feature["name"] for feature in head["dataset_info"]["features"]]
    assert columns == ["image", "label", *(["soft_label"] if kind != "class" else [])]
    if kind != "class":
        assert torch.equal(torch.tensor([row["soft_label"] for row in rows]), images.y)
    assert "was learned with it: 0.125" in body


def test_the_hub_reads_what_was_written(tmp_path):
    datasets = pytest.importorskip("datasets")
    made = random_set(7, 5, 3, "prob")
    export(made, "hf", tmp_path / "out")
    where = {"data_dir": str(tmp_path / "out"), "cache_dir": str(tmp_path / "cache")}
    found = datasets.load_dataset("imagefolder", **where)["train"]
    images, columns = made.decode(), (found["label"], found["soft_label"])
    read = {(label, tuple(np.float32(row))) for label, row in zip(*columns, strict=True)}
    own = {(label, tuple(row)) for label, row in zip(images.classes.tolist(), images.y.numpy(), strict=True)}
    assert len(found) == 7 and read == own


LICENCES = {
    "MIT": {"license": "mit"},
    "CC BY 4.0": {"license": "cc-by-4.0"},
    "": {"license": "unknown"},
    "none stated": {"license": "other", "license_name": "none-stated"},
}


@pytest.mark.parametrize("text", LICENCES)
def test_licences_are_the_hubs_or_other_by_name(text):
    assert licence_fields(text) == LICENCES[text]


def test_names_cannot_break_out_of_the_card(tmp_path):
    classes = ("---", "a: b\n- c", "${x}", "'\"\\", "été 🙂")
    spec = DataSpec("x\n---\n# evil", (3, 3, 2), classes, (0.5,) * 3, (0.2,) * 3, licence="a\nb: c")
    export(stored(Pixels(torch.zeros(5, 3, 3, 2), torch.arange(5), spec)), "hf", tmp_path / "out")
    head, body = front_matter(tmp_path / "out")
    assert head["license_name"] == "a-b-c" and head["pretty_name"] == "Distilled set of x --- # evil"
    assert "\n# evil" not in body and len(head["dataset_info"]["features"]) == 2


@pytest.mark.parametrize("to", TARGETS)
def test_a_compensated_set_exports_its_composites(tmp_path, composed, to):
    for name, synth in composed.items():
        made = stored(synth)
        out = tmp_path / f"{name}.{FILES.get(to, 'out').rpartition('.')[2]}"
        notes = export(made, to, out)
        assert any(f"{synth.count} composites of {len(synth.bases)} bases" in note for note in notes)
        images = made.decode()
        if to in FILES:
            found = read_foreign([out], to, images.spec).images
            assert torch.equal(found.x, images.x) and torch.equal(found.y, images.y)
        else:
            assert len(list(out.rglob("*.png"))) == synth.count


@pytest.mark.parametrize("to", TARGETS)
def test_sets_of_graphs_are_refused(tmp_path, graph_forms, to):
    for synth in graph_forms.values():
        with pytest.raises(UsageError, match=f"'{synth.kind}' holds graphs"):
            export(stored(synth), to, tmp_path / "out.npz")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("to", ["imagefolder", "hf"])
def test_a_folder_that_holds_anything_is_refused_and_left_alone(tmp_path, subset, to):
    (tmp_path / "out").mkdir()
    export(subset, to, tmp_path / "out")
    before = sorted(path.name for path in (tmp_path / "out").rglob("*"))
    with pytest.raises(UsageError, match="is not an empty folder"):
        export(subset, to, tmp_path / "out")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UsageError, match="is not an empty folder"):
        export(subset, to, tmp_path / "file")
    assert sorted(path.name for path in (tmp_path / "out").rglob("*")) == before


@pytest.mark.parametrize("to", ["npz", "torch"])
def test_a_file_that_exists_or_has_another_suffix_is_refused(tmp_path, subset, to):
    path = tmp_path / FILES[to]
    path.write_text("mine")
    with pytest.raises(UsageError, match="exists"):
        export(subset, to, path)
    assert path.read_text() == "mine"
    with pytest.raises(UsageError, match=f"does not end as a {to} file does\nGive out=NAME.(npz|pt)"):
        export(subset, to, tmp_path / "folder")


@pytest.mark.parametrize("to", ["imagefolder", "hf"])
def test_an_export_that_fails_leaves_nothing(tmp_path, subset, monkeypatch, to):
    def full(*unused):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("synth.exported._sync", full)
    with pytest.raises(UsageError, match="No space left"):
        export(subset, to, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_images_of_two_channels_have_no_png(tmp_path):
    with pytest.raises(UsageError, match="2 channels cannot be PNG"):
        export(random_set(5, 3, 2, "class"), "imagefolder", tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_an_unknown_target_is_named(tmp_path, subset):
    with pytest.raises(UsageError, match="unknown target 'npy'\nDid you mean 'npz'"):
        export(subset, "npy", tmp_path / "out")
