import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import fields, replace
from pathlib import Path
from typing import get_type_hints

import pytest
import torch

import ddengine
from ddengine import catalog, data, given, recipes
from ddengine.cli import main
from ddengine.compose import composed
from ddengine.config import BufferConfig
from ddengine.errors import UsageError
from ddengine.nets import NetSpec, build, has_batch_norm
from ddengine.rng import Rng
from expert_buffers import ExpertBuffer, legacy
from expert_buffers.recipes import RECIPES, ExpertRecipe
from expert_buffers.training import scored_indices

KILLS = int(os.environ.get("DDENGINE_FAULTS", "2"))
ROOT = Path(ddengine.__file__).parents[1]
SMALL = ["buffer", "dataset=digits", "network.width=4", "workers=1"]
WORDS = [*SMALL, "count=3", "epochs=3", "recipe=ast"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A buffer recorded by the command without interruption."""
    folder = tmp_path_factory.mktemp("made") / "experts"
    assert main([*WORDS, f"out={folder}"]) == 0
    return folder


@pytest.fixture
def call(capsys, monkeypatch, tmp_path):
    """Runs a command in an empty folder: (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DDENGINE_DEBUG", raising=False)
    capsys.readouterr()

    def run(*words):
        code = main(list(map(str, words)))
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def recorded(made, monkeypatch):
    """What a buffer command hands to `record`, which trains nothing."""
    calls, buffer = [], ExpertBuffer(made)
    monkeypatch.setattr(recipes, "record", lambda *given, **rest: calls.append((given, rest)) or buffer)

    def run(*words):
        recipes.run_buffer(composed("buffer", ["dataset=digits", *words]), given.Watch())
        return calls[-1]

    return run


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_finished_buffer_is_shown_on_stdout_and_returned_as_it_is(call, made):
    before = contents(made)
    code, out, err = call(*WORDS, f"out={made}")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0] == f"{made}: 3 experts of 3 epochs"
    assert len(lines) == 6
    assert "convnet width=4 depth=2 norm=instance" in out
    assert "ast: lr 0.003, momentum 0.9, weight_decay 0.001" in out
    code, out, err = call(*WORDS, f"out={made}", "--json")
    found = json.loads(out)
    assert (code, err, found["experts"], found["epochs"]) == (0, "", 3, [3, 3])
    assert contents(made) == before


def test_work_and_progress_are_told_on_stderr(call, tmp_path):
    code, out, err = call(*SMALL, "count=1", "epochs=1", "out=new", "--json")
    assert (code, json.loads(out)["path"]) == (0, "new")
    lines = err.splitlines()
    assert lines[0].startswith("1 experts x 1 epochs of 6 steps on 1 worker: about ")
    assert lines[-1].startswith("recording digits: 1/1")


def test_inspect_and_verify_know_a_buffer(call, made):
    code, out, err = call("inspect", made)
    assert (code, err, out.splitlines()[0]) == (0, "", f"{made}: 3 experts of 3 epochs")
    assert json.loads(call("inspect", made, "--json")[1]) == ExpertBuffer(made).summary()
    code, out, err = call("verify", made)
    assert (code, err, out.splitlines()[-1], len(out.splitlines())) == (0, "", "ok", 5)
    found = json.loads(call("verify", made, "--json")[1])
    assert (found["ok"], len(found["checks"])) == (True, 4)


def test_a_damaged_buffer_and_a_set_that_is_none_exit_3(call, made, tmp_path):
    broken = shutil.copytree(made, tmp_path / "broken")
    path = broken / "expert_00001.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    cases = [(("verify", broken), path.name), (("evaluate", made), "no manifest of a distilled set")]
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "manifest.json").write_bytes((made / "manifest.json").read_bytes()[:-9])
    cases += [(("inspect", "cut"), "manifest.json"), (("verify", "cut"), "manifest.json")]
    for words, named in cases:
        code, out, err = call(*words)
        assert (code, out, len(err.splitlines())) == (3, "", 2)
        assert named in err.splitlines()[0]


BAD = [
    (["buffer"], "dataset"),
    ([*SMALL, "count=0"], "count=0"),
    ([*SMALL, "epochs=0"], "epochs=0"),
    ([*SMALL, "epochs=1.5"], "1.5"),
    ([*SMALL, "expert_epochs=0"], "expert_epochs=0"),
    ([*SMALL, "max_start_epoch=-1"], "max_start_epoch=-1"),
    ([*SMALL, "count=2", "full_experts=3"], "full_experts=3"),
    ([*SMALL, "encoding=fp16"], "fp16"),
    ([*SMALL, "recipe=mtd"], "mtd"),
    ([*SMALL, "recipe.lr=0"], "recipe.lr=0"),
    ([*SMALL, "recipe.lr=fast"], "fast"),
    ([*SMALL, "recipe.lrs=[0.1]"], "recipe.lrs"),
    ([*SMALL, "recipe.augment=swirl"], "swirl"),
    ([*SMALL, "matcher=attention"], "matcher"),
    ([*SMALL, "row=fashion_mnist_ipc10"], "row"),
    ([*SMALL, "networks=[convnet,mlp]", "count=1"], "count=1"),
    ([*SMALL, "networks=[convnet,lenet]"], "network.width=4"),
    ([*SMALL, "networks=[convnet,convnet]"], "repeats"),
    ([*SMALL, "networks=[]"], "empty"),
    ([*SMALL, "networks=[nope]"], "nope"),
    ([*SMALL, "workers=0"], "workers=0"),
    ([*SMALL, "checkpoint.minutes=0"], "checkpoint.minutes=0"),
    ([*SMALL, "checkpoint.steps=3"], "checkpoint.steps"),
    ([*SMALL, "device=tpu"], "tpu"),
    ([*SMALL, "precision=fp8"], "fp8"),
    ([*SMALL, "out=file"], "out=file"),
    ([*SMALL, "out=foreign"], "foreign"),
    (["distill", "dataset=digits", "recipe=mtt"], "recipe"),
    (["evaluate", "nothing", "recipe=mtt"], "recipe"),
]


@pytest.mark.parametrize(
    ("words", "named"), BAD, ids=lambda value: " ".join(value[-2:]) if isinstance(value, list) else ""
)
def test_bad_input_is_one_line_of_cause_and_one_of_remedy(words, named, call, tmp_path):
    (tmp_path / "file").write_text("a file")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.txt").write_text("mine")
    code, out, err = call(*words)
    lines = err.splitlines()
    assert (code, out, len(lines)) == (2, "", 2)
    assert lines[0].startswith("error: ") and lines[1].startswith("  fix: ")
    assert named in lines[0] or words[0] == "evaluate"
    assert (tmp_path / "foreign" / "thesis.txt").read_text() == "mine"


def test_options_reach_the_recorder(recorded, tmp_path):
    given, rest = recorded(
        "network.width=5", "networks=[convnet,mlp]", "recipe=ftd", "recipe.alpha=0.7",
        "recipe.loss_ramp=[0.5]", "count=7", "seed=3", "full_experts=2", "checkpoint.minutes=0.5",
        "workers=3", f"out={tmp_path}",
    )  # fmt: skip
    assert given[1:] == ([NetSpec("convnet", 5), NetSpec("mlp", 5)], tmp_path)
    assert rest["recipe"] == replace(RECIPES["ftd"], alpha=0.7, loss_ramp=(0.5,))
    assert (rest["count"], rest["epochs"], rest["seed"], rest["full_experts"]) == (7, None, 3, 2)
    assert (rest["save_minutes"], rest["workers"], rest["origin"]) == (0.5, 3, {"name": "digits"})
    assert len(given[0]) < 1797


def test_defaults_are_those_of_record_and_the_folder_names_data_networks_and_seed(recorded):
    given, rest = recorded()
    assert str(given[2]) == "runs/digits_convnet_experts_seed0"
    assert rest["workers"] == os.cpu_count()
    assert rest["recipe"] == RECIPES["mtt"]
    given, rest = recorded("networks=[lenet,vit]", "seed=4")
    assert str(given[2]) == "runs/digits_lenet+vit_experts_seed4"
    kept = BufferConfig()
    assert all(rest[key] == getattr(kept, key) for key in ("count", "epochs", "max_start_epoch", "encoding"))


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_a_group_with_the_values_of_its_name(name):
    node = composed("buffer", ["dataset=digits", f"recipe={name}"]).recipe
    assert [f.name for f in fields(node)] == [f.name for f in fields(ExpertRecipe)]
    assert get_type_hints(type(node)) == get_type_hints(ExpertRecipe)
    values = {key: tuple(v) if isinstance(v, list) else v for key, v in vars(node).items()}
    assert ExpertRecipe(**values) == RECIPES[name]


def test_the_recipe_of_the_judge_is_another():
    assert composed("evaluate", ["dataset=digits", "recipe.steps=3", "recipe.lrs=[0.5]"]).recipe.steps == 3
    with pytest.raises(UsageError, match="recipe=mtt"):
        composed("evaluate", ["dataset=digits", "recipe=mtt"])
    assert composed("buffer", ["dataset=digits", "recipe.lr=0.5"]).recipe.lr == 0.5


def test_the_catalog_lists_the_recipes_that_there_are(call):
    assert list(catalog.RECIPES) == list(RECIPES)
    code, out, err = call("list", "recipes")
    assert (code, err, [line.split()[0] for line in out.splitlines()]) == (0, "", list(RECIPES))
    code, out, err = call("buffer", "dataset=digits", "recipe=mtd")
    assert "Did you mean 'mtt'?" in err


@pytest.mark.parametrize(("number", "seconds"), [(signal.SIGINT, 0.7), (signal.SIGTERM, 6)])
def test_a_signal_to_the_whole_group_ends_cleanly(number, seconds, tmp_path):
    words = [*SMALL[:-1], "workers=2", "count=2", "epochs=9999", "out=stopped"]
    process = launch(words, tmp_path, start_new_session=True)
    process.stderr.readline()
    time.sleep(seconds)  # while the workers start, or work
    os.killpg(process.pid, number)
    err = process.stderr.read()
    process.stderr.close()
    assert (process.wait(60), number.name in err, "Repeat the same command" in err) == (130, True, True), err
    assert len(ExpertBuffer(tmp_path / "stopped")) == 0


def launch(words, folder, **changes):
    """A process of the command in that folder, whose stderr can be read."""
    return subprocess.Popen(
        [sys.executable, "-m", "ddengine", *words],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        **changes,
    )


def test_a_recording_that_is_killed_again_and_again_ends_with_the_bits_of_a_straight_one(
    made, tmp_path, call
):
    """The process gets SIGKILL at random moments of its work; DDENGINE_FAULTS says how often."""
    moments = Rng(0).fold("kills").torch("seconds")
    words = [*WORDS, "checkpoint.minutes=1e-9", "out=killed"]
    folder, survived = tmp_path / "killed", []
    for _ in range(KILLS):
        process = launch(words, tmp_path)
        process.stderr.readline()  # the work was announced: it starts now, or there is none left
        time.sleep(0.4 * float(torch.rand((), generator=moments)))
        process.send_signal(signal.SIGKILL)
        process.stderr.close()
        survived.append(process.wait(60) == 0)
        assert not (folder / "manifest.json").exists() or ExpertBuffer(folder).verify()
    assert call(*words)[0] == 0
    assert ExpertBuffer(folder).verify()
    assert contents(folder).keys() == contents(made).keys()
    assert contents(folder) == contents(made)
    assert not all(survived)


def released(path, experts=2, checkpoints=4):
    """A file as other tools write them: experts of a narrow network on the digits."""
    made = []
    for number in range(experts):
        net = build(NetSpec("convnet", width=4, depth=2), (1, 8, 8), 10, Rng(number).torch("weights"))
        order = legacy.order_of_use(net, (1, 8, 8)).names
        rows = [[net.get_parameter(name).detach() + 0.01 * t for name in order] for t in range(checkpoints)]
        made.append(rows)
    torch.save(made, path)
    return path


IMPORT = ("--from", "replay_buffer", "dataset=digits", "network.width=4", "network.depth=2")


def test_released_replay_buffers_become_a_buffer_that_matchers_take(call, tmp_path):
    path = released(tmp_path / "replay_buffer_0.pt")
    code, out, err = call("import", path, *IMPORT, "out=experts", "--json")
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert (found["experts"], found["epochs"], found["recipe"]["name"]) == (2, [3, 3], "imported")
    code, out, _ = call("import", path, *IMPORT, "out=experts")
    assert code == 0 and "  accuracy  unknown\n" in out
    assert call("verify", "experts")[0] == 0
    words = ["matcher.steps=1", "matcher.inner.steps=2", "matcher.compile=off"]
    code, _, err = call("distill", "matcher=trajectory", "experts=experts", "ipc=1", *words, "out=run")
    assert code == 0, err


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--from", "replay_buffer", "dataset=digits", "out=new"], 2, "one FILE or more"),
        (["FILE", "dataset=digits", "out=new"], 2, "--from FORMAT"),
        (["FILE", "--from"], 2, "--from names no format"),
        (["FILE", "--from", "replay_bufer", "dataset=digits", "out=new"], 2, "unknown format 'replay_bufer'"),
        (["FILE", *IMPORT], 2, "import needs out"),
        (["FILE", *IMPORT, "out=new", "count=3"], 2, "unknown key 'count'"),
        (["FILE", "--from", "replay_buffer", "dataset=digits", "out=new"], 3, "has shape"),
        (["nothing.pt", *IMPORT, "out=new"], 3, "nothing.pt"),
    ],
)
def test_an_import_that_cannot_be_is_refused_in_two_lines(words, code, said, call, tmp_path):
    path = str(released(tmp_path / "replay_buffer_0.pt", experts=1, checkpoints=2))
    found, out, err = call("import", *(path if word == "FILE" else word for word in words))
    assert (found, out) == (code, "")
    assert said in err and len(err.splitlines()) == 2 and "  fix: " in err


TEACHERS = ["buffer", "dataset=digits", "networks=[convnet,resnet18]", "network.width=4",
            "network.norm=batch", "recipe=squeeze", "count=2", "workers=1", "out=teachers"]  # fmt: skip


def test_teachers_of_several_architectures_come_back_with_their_running_statistics(call, tmp_path):
    code, out, err = call(*TEACHERS, "epochs=2", "--json")
    found = json.loads(out)
    assert (code, found["experts"], found["epochs"]) == (0, 2, [2, 2]), err
    assert (found["recipe"]["schedule"], found["recipe"]["epochs"]) == ("cosine", 2)
    buffer, source = ExpertBuffer(tmp_path / "teachers"), data.load("digits").fit
    assert [buffer.network(i).name for i in range(2)] == ["convnet", "resnet18"]
    scored = source.take(scored_indices(0, len(source)))
    for i in range(2):
        net = buffer.build(i, 2).eval()
        running = [tensor for name, tensor in net.named_buffers() if name.endswith("running_mean")]
        assert has_batch_norm(net) and running and all(tensor.any() for tensor in running)
        with torch.no_grad():
            right = (net(scored.model_input(slice(None))).argmax(1) == scored.y).float().mean()
        assert right.item() == pytest.approx(float(buffer[i].accuracy[2]), abs=0.005)
        assert buffer[i].accuracy[2] > 0.15  # a tenth is chance
    assert call("verify", "teachers")[0] == 0
    before = contents(tmp_path / "teachers")
    code, out, err = call(*TEACHERS, "epochs=3")
    assert (code, out, len(err.splitlines())) == (2, "", 2)
    assert "recipe.epochs is 2 there and 3 here" in err.splitlines()[0]
    assert contents(tmp_path / "teachers") == before


def test_squeeze_is_as_long_as_its_recipe_unless_epochs_says_otherwise(recorded, tmp_path):
    given, rest = recorded("recipe=squeeze", "networks=[mobilenet_v2,shufflenet_v2]", f"out={tmp_path}")
    assert (rest["recipe"], rest["epochs"]) == (RECIPES["squeeze"], None)
    assert [spec.name for spec in given[1]] == ["mobilenet_v2", "shufflenet_v2"]
    _, rest = recorded("recipe=squeeze", "recipe.epochs=4", "recipe.augment=none")
    assert rest["recipe"] == replace(RECIPES["squeeze"], epochs=4, augment="none")
