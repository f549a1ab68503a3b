import subprocess
import sys
from dataclasses import replace

import numpy as np
import plugged
import pytest
import torch

from ddengine import data
from ddengine.data import registry
from ddengine.data.source import Part, Source
from ddengine.errors import UsageError
from ddengine.types import fingerprint


@pytest.fixture(scope="module")
def digits():
    return data.load("digits")


def source(n: int = 12, k: int = 2, **changes) -> Source:
    draw = np.random.default_rng(0).integers(0, 256, (n, 3, 2, 5), dtype=np.uint8)
    part = Part(torch.from_numpy(draw), torch.arange(n) % k)
    return replace(Source(tuple("abcdefg"[:k]), part), **changes)


def test_digits_holds_every_bundled_image_once(digits):
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    ours = [
        (int(y), x.numpy().tobytes())
        for part in (digits.fit, digits.validation, digits.test)
        for x, y in zip(part.x, part.y, strict=True)
    ]
    theirs = [
        (int(y), np.round(x * 255 / 16).astype(np.uint8).tobytes())
        for x, y in zip(images, labels, strict=True)
    ]
    assert sorted(ours) == sorted(theirs)


def test_digits_is_split_four_to_one_and_nine_to_one_in_each_class(digits):
    from sklearn.datasets import load_digits

    for label, n in enumerate(np.bincount(load_digits().target).tolist()):
        test = int(n * 0.2 + 0.5)
        validation = int((n - test) * 0.1 + 0.5)
        found = [part.counts[label] for part in (digits.fit, digits.validation, digits.test)]
        assert found == [n - test - validation, validation, test]


def test_parts_share_one_spec_and_are_sorted_by_class(digits):
    assert digits.fit.spec is digits.validation.spec is digits.test.spec is digits.spec
    for part in (digits.fit, digits.validation, digits.test):
        assert part.x.dtype == torch.uint8
        assert part.y.tolist() == sorted(part.y.tolist())
    assert digits.spec.shape == (1, 8, 8)
    assert "CC BY 4.0" in digits.spec.licence


def test_a_second_load_is_identical(digits):
    again = data.load("digits")
    assert torch.equal(again.fit.x, digits.fit.x)
    assert again.spec == digits.spec
    assert len(digits.spec.fingerprint) == 64


def test_digit_pixels_are_scaled_from_sixteen_levels_to_the_full_range(digits):
    assert set(digits.fit.x.unique().tolist()) <= {round(v * 255 / 16) for v in range(17)}
    assert int(digits.fit.x.max()) == 255


def test_statistics_are_those_of_the_fit_part_alone(digits):
    pixels = digits.fit.x.numpy().astype(np.float64) / 255
    assert digits.spec.mean == pytest.approx((pixels.mean(),), abs=1e-14)
    assert digits.spec.std == pytest.approx((pixels.std(),), abs=1e-12)
    normal = digits.fit.model_input()
    assert float(normal.mean()) == pytest.approx(0, abs=1e-5)
    assert float(normal.std()) == pytest.approx(1, abs=1e-3)


def test_statistics_agree_with_numpy_channel_by_channel():
    x = torch.from_numpy(np.random.default_rng(3).integers(0, 200, (7, 3, 5, 11), dtype=np.uint8))
    mean, std, notes = registry.channel_statistics(x)
    pixels = x.numpy().astype(np.float64) / 255
    assert mean == pytest.approx(tuple(pixels.mean((0, 2, 3))), abs=1e-14)
    assert std == pytest.approx(tuple(pixels.std((0, 2, 3))), abs=1e-12)
    assert notes == ()


def test_a_constant_channel_gets_a_floor_and_a_note():
    given = source()
    given.train.x[:, 1] = 77
    made = registry.assemble("mine", given)
    assert made.spec.std[1] == 1 / 255
    assert made.notes == ("channel 1 is constant over the fit part: its std is set to 1/255",)


def test_published_constants_replace_computed_ones():
    made = registry.assemble("mine", source(mean=(0.5, 0.5, 0.5), std=(0.25, 0.5, 1.0)))
    assert (made.spec.mean, made.spec.std) == ((0.5, 0.5, 0.5), (0.25, 0.5, 1.0))


def test_the_fingerprint_covers_all_three_parts(digits):
    given = source()
    first = registry.assemble("mine", given)
    other = Part(given.train.x.clone(), given.train.y)
    for i in range(len(other)):
        other.x[i, 0, 0, 0] = other.x[i, 0, 0, 0] ^ 1
        changed = registry.assemble("mine", replace(given, train=other))
        assert changed.spec.fingerprint != first.spec.fingerprint
        other.x[i, 0, 0, 0] = other.x[i, 0, 0, 0] ^ 1
    assert registry.assemble("yours", given).spec.fingerprint == first.spec.fingerprint
    assert first.spec.fingerprint != fingerprint(first.fit.x, first.fit.y, first.spec.classes)


def test_shuffling_the_source_changes_nothing():
    given = source(40, 3)
    order = torch.from_numpy(np.random.default_rng(5).permutation(40))
    first, second = (
        registry.assemble("m", s) for s in (given, replace(given, train=given.train.take(order)))
    )
    assert first.spec == second.spec
    for name in ("fit", "validation", "test"):
        assert torch.equal(getattr(first, name).x, getattr(second, name).x)


def test_parts_that_the_source_has_are_kept_whole():
    given = source(20)
    own, other = given.train.take(torch.arange(4)), given.train.take(torch.arange(4, 7))
    made = registry.assemble("m", replace(given, validation=own, test=other))
    assert (len(made.fit), len(made.validation), len(made.test)) == (20, 4, 3)


def test_a_class_of_one_image_is_fit_and_nothing_else():
    given = source(20)
    y = given.train.y.clone()
    y[:] = 0
    y[7] = 1
    made = registry.assemble("m", replace(given, train=Part(given.train.x, y)))
    assert (made.fit.counts[1], made.validation.counts[1], made.test.counts[1]) == (1, 0, 0)


@pytest.mark.parametrize(
    ("given", "cause"),
    [
        (source(2), "none is left for the validation part"),
        (source(12, 1), "has one class, 'a'"),
        (source(12, 2, classes=("a", "b", "c")), "class 'c' of m has no training image"),
    ],
)
def test_a_source_that_cannot_be_judged_is_refused(given, cause):
    with pytest.raises(UsageError, match=cause) as error:
        registry.assemble("m", given)
    assert "\n" not in error.value.cause
    assert error.value.remedy


def test_zca_is_fitted_on_the_fit_part_and_undone_by_its_inverse(digits):
    white = data.load("digits", preprocessing="zca")
    assert white.spec.preprocessing == "zca"
    mean = digits.fit.x.float().flatten(1).mean(0) / 255
    assert torch.allclose(white.spec.zca.mean, mean, atol=1e-6)
    assert torch.allclose(white.spec.denormalise(white.test.model_input()), white.test.x / 255, atol=1e-4)
    assert white.spec.fingerprint == digits.spec.fingerprint


def test_zca_of_large_images_is_refused_before_any_work():
    big = Part(torch.zeros(9, 3, 65, 64, dtype=torch.uint8), torch.arange(9) % 2)
    with pytest.raises(UsageError, match="12480 x 12480 matrix.*\n.*preprocessing=standard"):
        registry.assemble("m", source(train=big), "zca")


def test_size_scales_any_dataset():
    assert data.load("digits", size=5).spec.shape == (1, 5, 5)


@pytest.mark.parametrize(
    ("options", "cause"),
    [
        ({"name": "digit"}, "unknown dataset 'digit'\nDid you mean 'digits'"),
        ({"name": "digits", "preprocessing": "whiten"}, "unknown dataset.preprocessing 'whiten'"),
        ({"name": "digits", "on_error": "ignore"}, "unknown dataset.on_error 'ignore'"),
        ({"name": "digits", "size": 0}, "dataset.size=0 is out of range"),
        ({"name": "npz"}, "dataset=npz needs a path"),
        ({"name": "tu"}, "'tu' is a collection of graph sets.*\n.*load_graphs\\('tu', NAME\\)"),
        ({"name": "image_folder"}, "dataset=image_folder needs a path"),
    ],
)
def test_a_wrong_option_is_one_line_and_a_remedy(options, cause):
    with pytest.raises(UsageError, match=cause) as error:
        data.load(**options)
    assert error.value.code == 2


def test_every_dataset_has_a_loader_and_a_description():
    assert {*data.DATASETS, *data.GRAPHS} == set(data.DESCRIPTIONS)
    assert tuple(data.GRAPHS) == data.GRAPH_COLLECTIONS
    assert data.names()[0] == "digits"
    assert all("\n" not in data.describe(name) for name in data.names())
    with pytest.raises(UsageError, match="unknown dataset 'imagenet22k'"):
        data.describe("imagenet22k")


PLUGIN = """
import torch
from ddengine.data import Part, Source


def plugin(request):
    part = Part(torch.arange(24 * 30).reshape(24, 3, 2, 5).to(torch.uint8), torch.arange(24) % 2)
    return Source(("a", "b"), part, notes=(f"size {request.size}",))


def failing(request):
    return {}[request.name]


def finished(request):
    return [1, 2]


number = 3
"""


@pytest.fixture
def plugins(tmp_path, monkeypatch):
    found = {"mine": "plugin", "failing": "failing", "finished": "finished", "number": "number"}
    entries = {name: f"more_datasets:{attribute}" for name, attribute in found.items()}
    entries |= {"broken": "no_such_module:f", "digits": "more_datasets:plugin"}
    plugged.install(tmp_path, "more-datasets", {"datasets": entries}, PLUGIN, version="2.1")
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("more_datasets", None)


def test_an_installed_plugin_is_found_by_name(plugins):
    loaded = data.load("mine", size=7)
    assert loaded.notes == ("size 7",) and len(loaded.spec.fingerprint) == 64
    assert sum(len(part) for part in (loaded.fit, loaded.validation, loaded.test)) == 24
    assert data.names()[len(data.DESCRIPTIONS) :] == ["broken", "failing", "finished", "mine", "number"]
    assert data.describe("mine") == "plug-in of more-datasets 2.1: more_datasets:plugin"
    assert len(data.load("digits").fit) > 1000


@pytest.mark.parametrize(
    ("name", "cause"),
    [
        ("broken", r"dataset 'broken' does not load: No module named 'no_such_module'"),
        ("failing", r"dataset 'failing' fails: KeyError: 'failing'"),
        ("finished", r"dataset 'finished' gives a list, not a ddengine.data.Source"),
        ("number", r"dataset 'number' is a int, not a function of a Request"),
    ],
)
def test_a_plugin_that_cannot_be_used_is_one_line_and_a_remedy(plugins, name, cause):
    with pytest.raises(UsageError, match=rf"{cause} \(plug-in of more-datasets 2.1, ") as refused:
        data.load(name)
    assert "\n" not in refused.value.cause
    assert refused.value.remedy.startswith("Repair, update or uninstall more-datasets")


def test_the_default_root_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("DDENGINE_DATA", str(tmp_path))
    assert data.dataset_root() == tmp_path
    monkeypatch.delenv("DDENGINE_DATA")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert data.dataset_root() == tmp_path / "cache" / "ddengine"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert data.dataset_root() == tmp_path / ".cache" / "ddengine"


def test_listing_datasets_imports_no_torch():
    code = "import sys, ddengine.data as d; [d.describe(n) for n in d.names()]; print('torch' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"
