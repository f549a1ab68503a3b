import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import ddengine as dd
from ddengine import data, given
from ddengine.cli import main
from ddengine.compose import spelled
from ddengine.errors import ArtefactError, UsageError
from ddengine.given import deterministic
from ddengine.nets.core import NetSpec
from ddengine.train import Recipe
from ddengine.types import fingerprint
from matchers.attention import AttentionMatching, AttentionOptions, Statistics, attention_matching_loss
from synth import DistilledSet

ROOT = Path(dd.__file__).parents[1]
ODD = 'it\'s (my) "data" {1}, \u00fcn\u00ef ${HOME} a\\b'
RECIPE = Recipe(steps=1, lrs=(0.1,), batch_size=7, augment="none")
QUICK = {"seeds": 1, "rows": [], "recipe": RECIPE}
SMALL = NetSpec("convnet", width=3, depth=1, norm="batch")


@pytest.fixture
def loads(monkeypatch):
    """Records the arguments of every load and does it."""
    calls, real = [], data.load
    monkeypatch.setattr(
        data, "load", lambda *args, **kwargs: calls.append((args, kwargs)) or real(*args, **kwargs)
    )
    return calls


@pytest.fixture
def photos(tmp_path):
    """Class folders of colour pictures of two sizes, under a name that needs every kind of quoting."""
    rng = np.random.default_rng(1)
    for k, name in enumerate(("cat", "dog")):
        folder = tmp_path / ODD / name
        folder.mkdir(parents=True)
        for i in range(11):
            pixels = rng.integers(0, 256, (13 + 4 * k, 17, 3), np.uint8)
            Image.fromarray(pixels).save(folder / f"{i}.png")
    return tmp_path / ODD


@pytest.fixture
def arrays(tmp_path):
    """A file of grey arrays in three classes."""
    rng = np.random.default_rng(2)
    path = tmp_path / "my arrays.npz"
    parts = {
        f"x_{part}": rng.integers(0, 256, (n, 9, 11), np.uint8) for part, n in (("train", 33), ("test", 6))
    }
    np.savez(path, **parts, y_train=np.arange(33) % 3, y_test=np.arange(6) % 3)
    return path


def test_the_documented_lines_work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    task = dd.task("digits", ipc=1)
    options = {"steps": 2, "real_per_class": 3}
    result = dd.distill(task, dd.matcher("attention", network=SMALL, **options), seed=0, out="runs/digits")
    table = dd.evaluate("runs/digits/distilled", networks=["convnet"], **QUICK)
    assert (result.steps, len(result.distilled.decode()), result.folder) == (2, 10, Path("runs/digits"))
    assert [(row.name, row.network, len(row.values)) for row in table.rows] == [("distilled", "convnet", 1)]
    assert DistilledSet.load("runs/digits/distilled").manifest == result.distilled.manifest


def test_one_piece_is_usable_without_the_engine():
    real = Statistics((torch.eye(2),), torch.ones(2, 3))
    fake = Statistics((torch.zeros(2, 2),), torch.zeros(2, 3))
    assert attention_matching_loss(real, fake, mmd_weight=0.5, scale=10).item() == 10 * (2 + 0.5 * 6)
    assert AttentionMatching(AttentionOptions(steps=7)).steps(dd.task("digits", ipc=1)) == 7


def test_a_task_from_a_name_is_the_fit_part_and_remembers_its_source(arrays, monkeypatch):
    monkeypatch.chdir(arrays.parent)
    task = dd.task("npz", ipc=2, root="my arrays.npz", size=8, preprocessing="zca", device="cpu")
    fit = data.load("npz", root=arrays, size=8, preprocessing="zca").fit
    assert torch.equal(task.source.x, fit.x)
    assert (task.ipc, task.device.type, task.precision) == (2, "cpu", "fp32")
    assert dict(task.origin) == {"name": "npz", "root": str(arrays), "size": 8, "preprocessing": "zca"}


def test_a_task_from_images_sorts_them_and_fingerprints_them():
    fit = data.load("digits").fit
    images = fit.take(torch.randperm(len(fit), generator=torch.Generator().manual_seed(0)))
    task = dd.task(images, ipc=3)
    assert task.source.y.tolist() == sorted(fit.y.tolist())
    assert (task.ipc, dict(task.origin)) == (3, {})
    bare = dd.Images(fit.x, fit.y, dd.DataSpec("mine", (1, 8, 8), fit.spec.classes, (0.3,), (0.4,)))
    assert dd.task(bare, ipc=1).source.spec.fingerprint == fingerprint(fit.x, fit.y, fit.spec.classes)


def test_a_task_from_a_loaded_dataset_is_its_fit_part():
    dataset = data.load("digits")
    task = dd.task(dataset, nbytes=10 * (64 + 8 + 1) * 2)
    assert task.source is dataset.fit
    assert (task.ipc, task.origin["name"]) == (2, "digits")


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: dd.task("digits"), "ipc or nbytes"),
        (lambda: dd.task("digits", ipc=1, nbytes=1000), "ipc or nbytes"),
        (lambda: dd.task("digitz", ipc=1), "digitz"),
        (lambda: dd.task("digits", ipc=1, device="tpu"), "tpu"),
        (lambda: dd.task("digits", ipc=1, precision="fp8"), "fp8"),
        (lambda: dd.task(data.load("digits"), ipc=1, size=9), "size"),
        (lambda: dd.matcher("atention"), "atention"),
        (lambda: dd.matcher("attention", stps=1), "stps"),
        (lambda: dd.matcher("attention", network="convnet", steps=0), "matcher.steps=0"),
    ],
)
def test_mistakes_are_usage_errors_that_name_the_value(make, named):
    with pytest.raises(UsageError) as raised:
        make()
    assert named in raised.value.cause
    assert raised.value.remedy


def test_public_names_are_there_and_others_are_not():
    assert all(getattr(dd, name) is not None for name in dd.__all__)
    with pytest.raises(AttributeError, match="no_such_thing"):
        dd.__getattr__("no_such_thing")


def test_importing_the_package_is_light(tmp_path):
    code = "import sys, ddengine; print(sorted({'torch', 'numpy', 'synth', 'matchers'} & set(sys.modules)))"
    env = {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=env, cwd=tmp_path, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("[]\n", "")


def test_a_set_of_a_folder_is_judged_on_that_folder_with_its_size_and_whitening(
    photos, tmp_path, monkeypatch, loads
):
    monkeypatch.chdir(photos.parent)
    task = dd.task("image_folder", ipc=1, root=ODD, size=8, preprocessing="zca")
    dd.distill(task, dd.matcher("random", network=SMALL), out=tmp_path / "run")
    loads.clear()
    monkeypatch.chdir("/")
    table = dd.evaluate(tmp_path / "run", **QUICK)
    ((_, given),) = loads
    assert given == {"name": "image_folder", "root": str(photos), "size": 8, "preprocessing": "zca"}
    assert (table.dataset, table.source_matches) == ("image_folder", True)
    assert table.rows[0].network_spec == SMALL.to_dict()
    assert table.rows[0].seen_by_matcher is True


def test_a_set_of_arrays_is_judged_on_that_file(arrays, tmp_path, monkeypatch, loads):
    monkeypatch.chdir(arrays.parent)
    dd.distill(
        dd.task("npz", ipc=1, root=arrays.name), dd.matcher("random", network="mlp"), out=tmp_path / "run"
    )
    monkeypatch.chdir("/")
    table = dd.evaluate(tmp_path / "run" / "distilled", **QUICK)
    assert loads[-1][1] == {"name": "npz", "root": str(arrays)}
    assert (table.source_matches, table.rows[0].network) == (True, "mlp")


@pytest.mark.parametrize("source", ["photos", "arrays"])
def test_the_command_line_reads_the_same_from_the_manifest(
    source, request, tmp_path, monkeypatch, loads, capsys
):
    path = request.getfixturevalue(source)
    name, options = {
        "photos": ("image_folder", ["dataset.size=8", "dataset.preprocessing=zca", "dataset.on_error=skip"]),
        "arrays": ("npz", ["dataset.size=10", "dataset.download=false"]),
    }[source]
    net = ["network.width=3", "network.depth=1", "network.norm=batch"]
    monkeypatch.chdir(path.parent)
    words = [f"dataset={name}", spelled("dataset.root", path.name), *options, *net, "ipc=1", "matcher=random"]
    assert main(["distill", *words, f"out={tmp_path / 'run'}"]) == 0
    monkeypatch.chdir("/")
    quick = ["seeds=1", "rows=[]", "recipe.steps=1", "recipe.lrs=[0.1]", "recipe.augment=none", "workers=1"]
    capsys.readouterr()
    assert main(["evaluate", str(tmp_path / "run"), *quick, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert loads[1] == (loads[0][0], {**loads[0][1], "root": str(path)})
    assert loads[0][1]["root"] == path.name
    assert (found["dataset"], found["source_matches"]) == (name, True)
    assert found["rows"][0]["network_spec"] == SMALL.to_dict()


def test_named_networks_have_the_manifest_options_only_if_they_are_its_own(tmp_path):
    made = dd.distill(dd.task("digits", ipc=1), dd.matcher("random", network=SMALL), out=tmp_path / "run")
    networks = ["convnet", "lenet", NetSpec("convnet", width=5, depth=1)]
    rows = dd.evaluate(made.distilled, networks=networks, **QUICK).rows
    widths = [(row.network_spec["name"], row.network_spec["width"]) for row in rows]
    assert widths == [("convnet", 3), ("lenet", None), ("convnet", 5)]


def test_overrides_of_the_dataset_win_and_keep_the_rest(arrays, tmp_path, loads):
    task = dd.task("npz", ipc=1, root=arrays, size=8)
    dd.distill(task, dd.matcher("random", network=SMALL), out=tmp_path / "run")
    moved = arrays.rename(arrays.parent / "moved.npz")
    with pytest.raises(UsageError, match="my arrays"):
        dd.evaluate(tmp_path / "run", **QUICK)
    table = dd.evaluate(tmp_path / "run", root=moved, **QUICK)
    assert loads[-1][1] == {"name": "npz", "root": moved, "size": 8}
    assert table.source_matches is True


def test_evaluating_adds_a_line_for_each_network_to_the_run(tmp_path):
    made = dd.distill(dd.task("digits", ipc=1), dd.matcher("random", network=SMALL), out=tmp_path / "run")
    log = tmp_path / "run" / "results.jsonl"
    dd.evaluate(tmp_path / "run", **QUICK)
    dd.evaluate(tmp_path / "run" / "distilled", **{**QUICK, "seeds": 3, "rows": ["random"]})
    records = [json.loads(line) for line in log.read_text().splitlines()]
    assert [record["kind"] for record in records] == ["trial", "final"] + ["trial"] * 2 + ["final"] * 6
    assert all(0 <= record["test"] <= 1 for record in records if record["kind"] == "final")
    dd.evaluate(made.distilled, **QUICK)
    made.distilled.save(tmp_path / "alone" / "set")
    dd.evaluate(tmp_path / "alone" / "set", **QUICK)
    assert len(log.read_text().splitlines()) == len(records)
    assert [path.name for path in (tmp_path / "alone").iterdir()] == ["set"]
    dd.evaluate(tmp_path / "alone" / "set", out=tmp_path / "kept", **QUICK)
    assert len((tmp_path / "kept" / "results.jsonl").read_text().splitlines()) == 2


def test_other_data_of_the_same_classes_are_judged_with_a_warning():
    dataset, said = data.load("digits"), []
    spec = replace(dataset.fit.spec, fingerprint="")
    made = dd.distill(
        dd.task(replace(dataset.validation, spec=spec), ipc=1), dd.matcher("random", network=SMALL)
    )
    table = dd.evaluate(made.distilled, dataset=dataset, watch=given.Watch(notice=said.append), **QUICK)
    assert table.source_matches is False
    assert any("not the one that the set was made from" in line for line in said)
    with pytest.raises(UsageError, match="8, 8"):
        dd.evaluate(made.distilled, dataset=data.load("digits", size=9), **QUICK)


def test_what_is_no_set_is_an_artefact_error(tmp_path):
    with pytest.raises(UsageError, match="nowhere does not exist"):
        dd.evaluate(tmp_path / "nowhere")
    with pytest.raises(ArtefactError, match="holds no distilled set"):
        dd.evaluate(tmp_path)


def test_a_foreign_module_in_front_of_ours_is_named(tmp_path):
    (tmp_path / "synth.py").write_text("raise SystemExit('ran the wrong synth')\n")
    (tmp_path / "matchers").mkdir()
    code = "import ddengine\ntry:\n    ddengine.task\nexcept ValueError as error:\n    print(error.cause)"
    env = {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    done = subprocess.run([sys.executable, "-c", code], env=env, cwd=tmp_path, capture_output=True, text=True)
    assert done.stderr == ""
    assert done.stdout.startswith(f"'synth' would be imported from {tmp_path / 'synth.py'}")


def test_what_deterministic_does_not_cover_is_said_once_and_the_rest_is_as_before():
    said = []
    with deterministic(True, said.append):
        assert torch.are_deterministic_algorithms_enabled()
        for _ in range(2):
            torch.zeros(3).put_(torch.tensor([0, 0]), torch.ones(2))
    assert said == ["note: deterministic=true does not cover put_: another run may have other bits"]
    assert not torch.are_deterministic_algorithms_enabled()
    with deterministic(True, said.append):
        torch.zeros(3).add_(1)
    with deterministic(False, said.append):
        assert not torch.are_deterministic_algorithms_enabled()
    assert len(said) == 1


def test_how_a_set_is_judged_never_changes_it(tmp_path):
    task = dd.task("digits", ipc=1)
    matcher = dd.matcher("attention", network=NetSpec("convnet", width=3, depth=1), steps=2, real_per_class=3)
    dd.distill(task, matcher, seed=0, out=tmp_path / "run")
    folder = tmp_path / "run" / "distilled"
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    for steps, seed, networks in ((2, 0, ["mlp"]), (3, 5, [NetSpec("convnet", width=4, depth=1)])):
        recipe = Recipe(steps=steps, lrs=(0.01,), batch_size=10)
        dd.evaluate(folder, networks=networks, seeds=1, seed=seed, rows=[], recipe=recipe)
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    again = dd.distill(task, matcher, seed=0, out=tmp_path / "again")
    stored = DistilledSet.load(folder)
    assert all(torch.equal(tensor, stored.tensors[name]) for name, tensor in again.distilled.tensors.items())
