import json
import os
import signal
import subprocess
import sys
import threading
from dataclasses import fields, is_dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import ddengine
from ddengine import cli, config, console, demo, evaluating
from ddengine.cli import main
from ddengine.nets.core import NetSpec
from ddengine.train import Recipe
from ddengine.types import DataSpec
from synth import DistilledSet, Pixels

ROOT = Path(ddengine.__file__).parents[1]
QUICK = ["seeds=1", "rows=[]", "recipe.steps=1", "recipe.lrs=[0.1]", "recipe.augment=none", "workers=1"]
SMALL = ["network.width=2", "network.depth=1"]
STEPS = [
    "dataset=digits",
    "ipc=1",
    "matcher.steps=20",
    "matcher.real_per_class=2",
    "matcher.augment=none",
    *SMALL,
]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder of everything that a command may be pointed at, good and bad."""
    root = tmp_path_factory.mktemp("world")
    rng = np.random.default_rng(0)
    for name in ("cat", "dog", "elk"):
        for folder in ("photos", "corrupt", "empty_class"):
            (root / folder / name).mkdir(parents=True)
            for i in range(7):
                Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).save(
                    root / folder / name / f"{i}.png"
                )
    (root / "corrupt" / "dog" / "3.png").write_bytes(b"no picture")
    for path in (root / "empty_class" / "dog").iterdir():
        path.unlink()
    (root / "one" / "cat").mkdir(parents=True)
    (root / "one" / "cat" / "0.png").write_bytes((root / "photos" / "cat" / "0.png").read_bytes())
    (root / "foreign").mkdir()
    (root / "foreign" / "thesis.txt").write_text("mine")
    (root / "file").write_text("a file")
    (root / "nothing").mkdir()
    np.savez(root / "no_labels.npz", x_train=np.zeros((4, 8, 8), np.uint8))
    for out in ("run", "ipc=1", "damaged", "unfinished"):
        assert main(["distill", "dataset=digits", "ipc=1", "matcher=random", f"out={root / out}"]) == 0
    photos = ["dataset=image_folder", f"dataset.root={root / 'photos'}"]
    assert main(["distill", *photos, "ipc=1", "matcher=random", f"out={root / 'photo_run'}"]) == 0
    data = root / "damaged" / "distilled" / "data.safetensors"
    data.write_bytes(data.read_bytes()[:-1] + b"?")
    for path in (root / "unfinished" / "distilled").iterdir():
        path.unlink()
    (root / "unfinished" / "distilled").rmdir()
    return root


@pytest.fixture
def tiny_demo(monkeypatch):
    monkeypatch.setattr(demo, "NETWORK", NetSpec("convnet", width=2, depth=1))
    monkeypatch.setattr(demo, "OPTIONS", {"steps": 2, "real_per_class": 3})
    monkeypatch.setattr(demo, "RECIPE", Recipe(steps=1, lrs=(0.1,), batch_size=11, augment="none"))
    monkeypatch.setattr(os, "cpu_count", lambda: 1)


def snapshot(folder):
    return {p.relative_to(folder): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def two_lines(err):
    """The cause and the remedy of an error that is all there is on stderr."""
    lines = err.splitlines()
    assert len(lines) == 2, err
    assert lines[0].startswith("error: ")
    assert lines[1].startswith("  fix: ")
    assert all(len(line) > 10 for line in lines)
    return lines[0].removeprefix("error: "), lines[1].removeprefix("  fix: ")


BAD = [
    (["distill"], "dataset"),
    (["distill", "ipc=1", "matcher=random"], "dataset"),
    (["distill", "dataset=digits"], "ipc"),
    (["distill", "dataset=digits", "ipc=1", "budget.nbytes=9999"], "nbytes"),
    (["distill", "dataset=digits", "budget.nbytes=37"], "budget.nbytes=37"),
    (["distill", "dataset=digits", "ipc=0"], "ipc=0"),
    (["distill", "dataset=digits", "ipc=-3"], "ipc=-3"),
    (["distill", "dataset=digits", "ipc=many"], "many"),
    (["distill", "dataset=digits", "ipc=1.5"], "1.5"),
    (["distill", "dataset=digits", "ipc=1000", "matcher=random"], "ipc=1000"),
    (["distill", "dataset=digits", "icp=1"], "icp"),
    (["distill", "dataset=digits", "ipc=1", "matcher.stps=3"], "matcher.stps"),
    (["distill", "dataset=digits", "ipc=1", "hydra.verbose=true"], "hydra.verbose"),
    (["distill", "dataset=digits", "ipc=1", "+seed=3"], "+seed=3"),
    (["distill", "dataset=digits", "ipc=1,2"], "ipc=1,2"),
    (["distill", "dataset=digits", "ipc=1", "seed=a(b"], "seed=a(b"),
    (["distill", "dataset=digits", "ipc=1", "seed=${nope}"], "nope"),
    (["distill", "dataset=digits", "ipc=1", "stray"], "stray"),
    (["distill", "dataset=digitz", "ipc=1"], "digitz"),
    (["distill", "dataset=null", "ipc=1"], "null"),
    (["distill", "dataset=[digits]", "ipc=1"], "[digits]"),
    (["distill", "dataset=digits", "matcher=atention", "ipc=1"], "atention"),
    (["distill", "dataset=digits", "network=convnt", "ipc=1"], "convnt"),
    (["distill", "row=nope"], "nope"),
    (["distill", "dataset=digits", "ipc=1", "matcher.lr=-1"], "matcher.lr=-1"),
    (["distill", "dataset=digits", "ipc=1", "matcher.lr=fast"], "fast"),
    (["distill", "dataset=digits", "ipc=1", "matcher.start=middle"], "middle"),
    (["distill", "dataset=digits", "ipc=1", "matcher.augment=colour"], "colour"),
    (["distill", "dataset=digits", "ipc=1", "network.norm=spectral"], "spectral"),
    (["distill", "dataset=digits", "ipc=1", "network.depth=9", "out=new"], "network.depth=9"),
    (["distill", "dataset=digits", "ipc=1", "network.width=0"], "network.width=0"),
    (["distill", "dataset=digits", "ipc=1", "dataset.size=0"], "dataset.size=0"),
    (["distill", "dataset=digits", "ipc=1", "dataset.size=2", "out=new"], "2x2"),
    (["distill", "dataset=digits", "ipc=1", "dataset.preprocessing=pca"], "pca"),
    (["distill", "dataset=digits", "ipc=1", "dataset.on_error=ignore"], "ignore"),
    (["distill", "dataset=digits", "ipc=1", "device=tpu"], "tpu"),
    (["distill", "dataset=digits", "ipc=1", "precision=fp8"], "fp8"),
    (["distill", "dataset=digits", "ipc=1", "checkpoint.steps=0"], "checkpoint.steps=0"),
    (["distill", "dataset=digits", "ipc=1", "checkpoint.minutes=-1"], "checkpoint.minutes=-1"),
    (["distill", "dataset=image_folder", "ipc=1"], "image_folder"),
    (["distill", "dataset=image_folder", "dataset.root=nowhere", "ipc=1"], "nowhere"),
    (["distill", "dataset=image_folder", "dataset.root=nothing", "ipc=1"], "nothing"),
    (["distill", "dataset=image_folder", "dataset.root=empty_class", "ipc=1"], "dog"),
    (["distill", "dataset=image_folder", "dataset.root=one", "ipc=1"], "cat"),
    (["distill", "dataset=image_folder", "dataset.root=corrupt", "ipc=1"], "corrupt/dog/3.png"),
    (["distill", "dataset=npz", "dataset.root=file", "ipc=1"], "file"),
    (["distill", "dataset=npz", "dataset.root=no_labels.npz", "ipc=1"], "y_train"),
    (["distill", "dataset=mnist", "dataset.root=nothing", "dataset.download=false", "ipc=1"], "nothing"),
    (["distill", "dataset=digits", "ipc=1", "matcher=random", "out=file"], "out=file"),
    (["distill", "dataset=digits", "ipc=1", "matcher=random", "out=file/below"], "file/below"),
    (["distill", "dataset=digits", "ipc=1", "matcher=random", "out=foreign"], "foreign"),
    (
        ["distill", "dataset=digits", "ipc=1", "matcher=random", "out=run", "seed=7"],
        "seed is 0 there and 7 here",
    ),
    (["distill", "dataset=digits", "ipc=1", "matcher=herding", "out=run"], "run"),
    (["evaluate"], "0"),
    (["evaluate", "run", "photos"], "2"),
    (["evaluate", "run", "seeds=0"], "seeds=0"),
    (["evaluate", "run", "rows=[nope]"], "nope"),
    (["evaluate", "run", "networks=[nope]"], "nope"),
    (["evaluate", "run", "networks=nope"], "nope"),
    (["evaluate", "run", "networks=[mlp,mlp]", *QUICK], "networks"),
    (["evaluate", "run", "recipe.steps=0"], "recipe.steps=0"),
    (["evaluate", "run", "recipe.lrs=[]"], "recipe.lrs=[]"),
    (["evaluate", "run", "recipe.lrs=[-1]"], "-1"),
    (["evaluate", "run", "recipe.momentum=1"], "recipe.momentum=1"),
    (["evaluate", "run", "recipe.augment=colour"], "colour"),
    (["evaluate", "run", *QUICK, "workers=0"], "workers=0"),
    (["evaluate", "run", *QUICK, "network.depth=9"], "network.depth=9"),
    (["evaluate", "run", "row=nope"], "row"),
    (["evaluate", "photo_run", "dataset=digits", *QUICK], "'cat' there is '0' here"),
    (["evaluate", "run", "dataset=image_folder", "dataset.root=photos", *QUICK], "'0' there is 'cat' here"),
    (["evaluate", "run", "out=file/below", *QUICK], "file/below"),
    (["inspect", "run", "seed=3"], "seed=3"),
    (["inspect", "x" * 5000], "x" * 5000),
    (["verify"], "0"),
    (["list"], "kind"),
    (["list", "matcher"], "matcher"),
    (["doctor", "now"], "now"),
    (["demo", "dataset=digits"], "dataset"),
    (["demo", "seeds=none"], "none"),
    (["demo", "--fast"], "--fast"),
    (["undo"], "undo"),
    (["evaluate", "nowhere"], "nowhere"),
    (["--fast"], "--fast"),
]
DAMAGED = [
    (["evaluate", "photos"], "photos"),
    (["evaluate", "damaged"], "damaged/distilled/data.safetensors"),
    (["inspect", "file"], "file"),
    (["inspect", "unfinished"], "unfinished"),
    (["verify", "damaged"], "damaged/distilled/data.safetensors"),
    (["verify", "run/distilled/data.safetensors"], "data.safetensors"),
]


@pytest.mark.parametrize(
    ("words", "named", "code"),
    [(*case, 2) for case in BAD] + [(*case, 3) for case in DAMAGED],
    ids=lambda value: " ".join(value)[:70] if isinstance(value, list) else "",
)
def test_bad_input_is_one_line_of_cause_one_of_remedy_and_loses_nothing(words, named, code, call, world):
    before = snapshot(world)
    found, out, err = call(*words)
    cause, _ = two_lines(err)
    assert found == code
    assert named in cause
    assert out == ""
    assert snapshot(world) == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is there")
@pytest.mark.parametrize("words", [["distill", "dataset=digits", "ipc=1"], ["evaluate", "run"]])
def test_a_missing_cuda_device_is_named(words, call):
    code, out, err = call(*words, "device=cuda")
    assert (code, out) == (2, "")
    assert "device=cuda" in two_lines(err)[0]


@pytest.mark.parametrize(
    ("words", "near"),
    [
        (["distil"], "distill"),
        (["list", "--jsn"], "--json"),
        (["list", "matcher"], "matchers"),
        (["distill", "dataset=digits", "icp=1"], "ipc"),
        (["distill", "dataset=digits", "ipc=1", "matcher.stps=3"], "matcher.steps"),
        (["distill", "dataset=digits", "ipc=1", "steps=3"], "matcher.steps"),
        (["distill", "dataset=digitz", "ipc=1"], "digits"),
        (["distill", "dataset=digits", "matcher=atention", "ipc=1"], "attention"),
        (["evaluate", "run", "networks=[convnt]"], "convnet"),
        (["evaluate", "run", "rows=[randm]"], "random"),
    ],
)
def test_a_misspelling_is_answered_with_the_nearest_name(words, near, call):
    code, _, err = call(*words)
    assert code == 2
    assert f"Did you mean '{near}'?" in two_lines(err)[1]


@pytest.mark.parametrize(
    ("key", "level", "there", "elsewhere"),
    [
        ("foo", "Keys: ", "matcher", "steps"),
        ("matcher.foo", "Keys of matcher: ", "steps", "ipc"),
        ("matcher.synth.foo", "Keys of matcher.synth: ", "factor", "steps"),
        ("matcher.steps.foo", "Keys of matcher: ", "steps", "ipc"),
    ],
)
def test_an_unknown_key_is_answered_with_those_of_its_level(key, level, there, elsewhere, call):
    code, _, err = call("distill", "dataset=digits", "ipc=1", f"{key}=1")
    listed = two_lines(err)[1].partition(level)[2].split(", ")
    assert code == 2 and there in listed and elsewhere not in listed


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_help_of_every_command_names_it_and_its_keys(command, call):
    code, out, err = call(command, "--help")
    assert (code, err) == (0, "")
    assert out.startswith(f"ddengine {command}")
    assert call(command, "anything=1", "-h")[1] == out
    said = {word.partition("=")[0] for word in out.split()}
    assert set(leaves(config.COMMANDS.get(command))) <= said


def leaves(kind, path=""):
    """The keys of a command's configuration; a group is also chosen by its own name."""
    for f in fields(kind) if kind else ():
        if f.name == "defaults" or (path and f.name == "name"):
            continue
        if is_dataclass(f.type):
            yield from [f.name] if f.name in ("dataset", "network") else []
            yield from leaves(f.type, f"{path}{f.name}.")
        else:
            yield path + f.name


def test_overview_lists_every_command_and_exit_code(call):
    code, out, err = call("--help")
    assert (code, err) == (0, "")
    assert all(f"\n  {command}" in out for command in cli.COMMANDS)
    assert all(str(number) in out for number in (0, 1, 2, 3, 130))
    assert call() == (2, out, "")
    assert call("--version") == (0, f"ddengine {ddengine.__version__}\n", "")


@pytest.mark.parametrize("kind", ["matchers", "datasets", "networks", "configs"])
def test_list_gives_a_line_for_each(kind, call):
    code, out, err = call("list", kind)
    assert (code, err) == (0, "")
    found = json.loads(call("list", kind, "--json")[1])
    assert found["kind"] == kind
    assert [line.split()[0] for line in out.splitlines()] == [item["name"] for item in found["items"]]
    assert all(item["description"] for item in found["items"])


def one_object(out):
    assert out.count("\n") == 1
    found = json.loads(out, parse_constant=lambda text: pytest.fail(f"{text} is not JSON"))
    assert isinstance(found, dict)
    return found


def test_distill_prints_the_set_on_stdout_and_progress_on_stderr(call, tmp_path):
    words = ["distill", *STEPS, f"out={tmp_path / 'run'}"]
    code, out, err = call(*words)
    assert code == 0
    assert out.startswith(f"{tmp_path / 'run' / 'distilled'}: pixels, 10 images of 1x8x8\n")
    assert "distilling digits: 20/20, loss " in err
    code, out, err = call(*words, "--json")
    found = one_object(out)
    assert (code, found["resumed_from"], found["provenance"]["steps"]) == (0, 20, 20)
    assert err.startswith("note: ") and err.endswith("run is finished, and is returned as it is\n")


def test_json_of_distill_is_one_object(call, tmp_path):
    words = ["distill", "dataset=digits", "ipc=2", "matcher=kmeans", f"out={tmp_path / 'run'}", "--json"]
    code, out, _ = call(*words)
    found = one_object(out)
    assert (code, found["kind"], found["count"], found["resumed_from"]) == (0, "subset", 20, None)
    assert found["recipe"]["dataset"] == {"name": "digits"}


def test_json_of_evaluate_has_the_documented_fields(call):
    code, out, err = call("evaluate", "run", *QUICK, *SMALL, "rows=[random,full]", "seeds=2", "--json")
    found = one_object(out)
    assert code == 0
    assert "evaluating: 9/9" in err
    assert {"protocol", "dataset", "rows", "scores"} <= set(found)
    assert [row["name"] for row in found["rows"]] == ["distilled", "random", "full"]
    wanted = {"name", "network", "metric", "mean", "std", "n", "ci95", "values", "steps", "bytes"}
    assert all(wanted <= set(row) and row["n"] == len(row["values"]) == 2 for row in found["rows"])
    assert set(found["rows"][0]["bytes"]) == {"images", "labels", "extras", "total"}


def test_json_of_inspect_verify_list_and_doctor_is_one_object(call, world):
    code, out, err = call("inspect", "run", "--json")
    assert (code, err, one_object(out)["dataset"]["name"]) == (0, "", "digits")
    code, out, err = call("verify", str(world / "run" / "distilled"), "--json")
    assert (code, err, one_object(out)["ok"]) == (0, "", True)
    code, out, err = call("list", "networks", "--json")
    assert (code, err, one_object(out)["kind"]) == (0, "", "networks")
    code, out, err = call("doctor", "--json")
    found = one_object(out)
    assert (code, err) == (0 if found["ok"] else 1, "")
    assert found["ok"] == all(finding["ok"] for finding in found["findings"])


def test_json_of_demo_is_one_object_and_its_files_are_written(call, tiny_demo, tmp_path):
    code, out, err = call("demo", f"out={tmp_path / 'demo'}", "seeds=1", "--json")
    found = one_object(out)
    assert code == 0
    assert {"distilled", "random", "herding", "full"} <= {row["name"] for row in found["rows"]}
    assert "report.md" in err
    assert (tmp_path / "demo" / "distilled" / "preview.png").is_file()
    assert (tmp_path / "demo" / "report.md").is_file()


def test_people_get_the_table_and_the_lines_of_verify(call):
    code, out, _ = call("evaluate", "run", *QUICK, *SMALL)
    assert code == 0
    assert out.splitlines()[0] == "digits, standard-v1, seed 0"
    assert any(line.startswith("distilled  convnet") for line in out.splitlines())
    assert call("verify", "run")[1].splitlines()[-1] == "ok"
    assert "ok   torch: " in call("doctor")[1]


def test_doctor_names_what_is_missing_and_exits_1(call, monkeypatch):
    monkeypatch.setattr("ddengine.doctor.PACKAGES", ("torch", "no-such-package"))
    code, out, _ = call("doctor")
    assert code == 1
    assert "BAD  no-such-package: is not installed; run: pip install no-such-package" in out.splitlines()


def test_an_unforeseen_error_exits_1_without_a_traceback(call, monkeypatch):
    def fail(*given):
        raise RuntimeError("first\nsecond")

    monkeypatch.setattr(evaluating, "run_evaluate", fail)
    code, out, err = call("evaluate", "run")
    assert (code, out) == (1, "")
    assert two_lines(err)[0] == "RuntimeError: first second"


def test_a_run_that_diverges_exits_1_and_names_the_loss(call, tmp_path):
    code, out, err = call("distill", *STEPS, "matcher.steps=3", "matcher.lr=1e38", f"out={tmp_path / 'run'}")
    assert (code, out) == (1, "")
    assert "loss" in err.splitlines()[-2]
    assert "matcher.lr" in err.splitlines()[-1]


@pytest.mark.parametrize("words", [["undo"], ["distill"], ["verify", "damaged"]])
def test_a_traceback_is_shown_only_when_asked_for(words, call, monkeypatch):
    assert "Traceback" not in call(*words)[2]
    monkeypatch.setenv("DDENGINE_DEBUG", "1")
    code, out, err = call(*words)
    assert code in (2, 3)
    assert out == ""
    assert "Traceback (most recent call last)" in err
    two_lines("\n".join(err.splitlines()[-2:]))
    monkeypatch.setenv("DDENGINE_DEBUG", "0")
    assert "Traceback" not in call(*words)[2]


def test_a_signal_saves_exits_130_and_the_same_command_goes_on(call, tmp_path, monkeypatch):
    number = signal.SIGTERM
    words = ["distill", *STEPS, f"out={tmp_path / 'run'}", "--json"]
    with monkeypatch.context() as patch:
        patch.setattr(
            console, "_lines", lambda title: lambda done, total, values: signal.raise_signal(number)
        )
        code, out, err = call(*words)
    cause, remedy = two_lines(err)
    assert (code, out) == (130, "")
    assert signal.Signals(number).name in cause
    assert "step 10 of 20" in cause
    assert "Repeat the same command" in remedy
    code, out, err = call(*words)
    assert (code, one_object(out)["resumed_from"]) == (0, 10)
    assert "resuming" in err
    assert call("distill", *STEPS, f"out={tmp_path / 'straight'}")[0] == 0
    sets = [DistilledSet.load(tmp_path / name / "distilled").tensors for name in ("run", "straight")]
    assert all(torch.equal(sets[0][key], sets[1][key]) for key in sets[1])


def test_a_signal_outside_the_loop_exits_130(call, monkeypatch):
    def stop(*given):
        signal.raise_signal(signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(evaluating, "run_evaluate", stop)
    code, out, err = call("evaluate", "run")
    assert (code, out, two_lines(err)[0]) == (130, "", "interrupted")
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_path_with_an_equals_sign_is_still_a_path(call):
    assert call("inspect", "ipc=1")[1].startswith("ipc=1/distilled: subset")
    assert call("verify", "ipc=1")[0] == 0


def test_main_works_outside_the_main_thread(world, capsys):
    codes = []
    thread = threading.Thread(target=lambda: codes.append(main(["inspect", str(world / "run")])))
    thread.start()
    thread.join()
    assert codes == [0]


def test_a_set_without_recipe_and_provenance_is_shown_and_judged_as_its_dataset(call, world, tmp_path):
    stored = DistilledSet.load(world / "run" / "distilled")
    DistilledSet.make(stored.synth, recipe={}, provenance={}).save(tmp_path / "bare")
    code, out, err = call("inspect", str(tmp_path / "bare"))
    assert (code, err) == (0, "")
    assert "made by  ?" in out
    code, out, _ = call("evaluate", str(tmp_path / "bare"), *QUICK, *SMALL, "--json")
    assert (code, one_object(out)["dataset"]) == (0, "digits")


@pytest.mark.parametrize(
    "recipe",
    [
        {"dataset": "digits"},
        {"dataset": {"root": "/etc"}},
        {"dataset": {"name": "digits", "sise": 3}},
        {"dataset": {"name": "digits", "size": "big"}},
        {"network": {"name": "convnet", "width": "wide"}},
        {"network": ["convnet"]},
    ],
    ids=str,
)
def test_a_manifest_that_names_nonsense_fails_as_an_artefact(recipe, call, world, tmp_path):
    stored = DistilledSet.load(world / "run" / "distilled")
    DistilledSet.make(stored.synth, recipe=recipe, provenance={}).save(tmp_path / "odd")
    code, out, err = call("evaluate", str(tmp_path / "odd"), *QUICK)
    assert (code, out) == (3, "")
    assert two_lines(err)[0].startswith("the manifest")


def test_names_from_a_foreign_set_cannot_drive_the_terminal(call, tmp_path):
    spec = DataSpec("bad\x1b[31m\nok", (1, 8, 8), ("a", "b"), (0.5,), (0.2,))
    synth = Pixels(torch.zeros(2, 1, 8, 8), torch.arange(2), spec)
    recipe = {"dataset": {"name": "bad\x1b[31m"}}
    DistilledSet.make(synth, recipe=recipe, provenance={"matcher": "\x1b"}).save(tmp_path / "set")
    for command, code in (("inspect", 0), ("verify", 0), ("evaluate", 2)):
        found, out, err = call(command, str(tmp_path / "set"))
        assert (found, "\x1b" in out + err) == (code, False)
    assert len(call("inspect", str(tmp_path / "set"))[1].splitlines()) == 5


def test_networks_take_the_manifest_options_only_where_they_are_its_own(call, tmp_path):
    words = ["distill", *STEPS, "matcher.steps=1", f"out={tmp_path / 'run'}"]
    assert call(*words)[0] == 0
    quick = ["evaluate", str(tmp_path / "run"), *QUICK, "--json"]
    (row,) = one_object(call(*quick)[1])["rows"]
    assert (row["network_spec"]["width"], row["network_spec"]["depth"]) == (2, 1)
    rows = one_object(call(*quick, "networks=[convnet,lenet]")[1])["rows"]
    assert [row["network_spec"]["name"] for row in rows] == ["convnet", "lenet"]
    assert (rows[0]["network_spec"]["width"], rows[1]["network_spec"]["width"]) == (2, None)
    rows = one_object(call(*quick, "networks=[convnet,mlp]", "network.width=3")[1])["rows"]
    assert [row["network_spec"]["width"] for row in rows] == [3, 3]
    (row,) = one_object(call(*quick, "network=lenet")[1])["rows"]
    assert row["network_spec"]["name"] == "lenet"


def test_evaluate_writes_a_line_for_each_network_into_the_run(call, tmp_path):
    words = ["distill", "dataset=digits", "ipc=1", "matcher=random", f"out={tmp_path / 'run'}"]
    assert call(*words)[0] == 0
    assert call("evaluate", str(tmp_path / "run"), *QUICK, *SMALL, "seeds=2", "rows=[random]")[0] == 0
    lines = (tmp_path / "run" / "results.jsonl").read_text().splitlines()
    assert [json.loads(line)["kind"] for line in lines] == ["trial"] * 2 + ["final"] * 4


def command(*words, **changes):
    """The arguments of a process that is the console script, whether or not the package is installed."""
    code = "import sys; from ddengine.cli import main; sys.exit(main())"
    env = {key: value for key, value in os.environ.items() if key != "DDENGINE_DEBUG"}
    settings = {"env": {**env, "PYTHONPATH": str(ROOT)}, "text": True, "timeout": 120}
    return {"args": [sys.executable, "-c", code, *words], **settings, **changes}


def test_help_and_lists_import_neither_torch_nor_hydra_nor_numpy(tmp_path):
    code = """
import contextlib, io, sys
from ddengine.cli import COMMANDS, main
heavy = ("torch", "hydra", "omegaconf", "numpy", "scipy", "sklearn", "rich", "synth", "matchers")
asked = [["--help"], [], ["--version"], *([c, "--help"] for c in COMMANDS), ["undo"], ["list", "nope"]]
asked += [["list", k] for k in ("matchers", "datasets", "networks", "configs")]
asked += [["list", "matchers", "--json"]]
with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
    codes = [main(words) for words in asked]
print(codes, sorted(set(heavy) & set(sys.modules)))
"""
    done = subprocess.run(
        **command(capture_output=True, cwd=tmp_path) | {"args": [sys.executable, "-c", code]}
    )
    codes = [0, 2, 0, *[0] * len(cli.COMMANDS), 2, 2, *[0] * 5]
    assert (done.stdout.strip(), done.stderr) == (f"{codes} []", "")


def test_processes_exit_with_the_code_and_keep_streams_apart(tmp_path):
    done = subprocess.run(**command("list", "matchers", "--json", capture_output=True, cwd=tmp_path))
    assert (done.returncode, done.stderr, one_object(done.stdout)["kind"]) == (0, "", "matchers")
    done = subprocess.run(**command("lst", "matchers", capture_output=True, cwd=tmp_path))
    assert (done.returncode, done.stdout) == (2, "")
    assert two_lines(done.stderr)[0] == "unknown command 'lst'"
    module = [sys.executable, "-m", "ddengine", "list", "configs"]
    done = subprocess.run(**command(capture_output=True, cwd=tmp_path) | {"args": module})
    assert (done.returncode, done.stderr) == (0, "")


def test_a_reader_that_leaves_is_no_failure(tmp_path):
    given = command("list", "datasets", cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    given.pop("timeout")
    process = subprocess.Popen(**given)
    process.stdout.close()
    assert (process.stderr.read(), process.wait(60)) == ("", 0)


def test_output_that_the_terminal_cannot_spell_is_escaped(tmp_path):
    given = command("list", "n\u00e9tworks", capture_output=True, cwd=tmp_path)
    given["env"] = {**given["env"], "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    done = subprocess.run(**given)
    assert done.returncode == 2
    assert "Did you mean 'networks'?" in two_lines(done.stderr)[1]
