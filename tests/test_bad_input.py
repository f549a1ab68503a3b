"""Wrong command lines, configurations and datasets: refused at once, in two lines, with nothing lost.

The tables of single commands are in tests/ddengine (test_cli and others);
this one has what they leave out, of every command.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ddengine.cli import COMMANDS, main

TREE = Path(__file__).parents[1]
SECONDS = 15  # the longest that a refusal may take
NET = ["network=mlp", "network.width=3"]
DIGITS = ["dataset=digits", "ipc=1"]
DISTILL = ["distill", *DIGITS, *NET]
BUFFER = ["buffer", "dataset=digits", *NET, "count=1", "epochs=1", "expert_epochs=1", "max_start_epoch=0"]
QUICK = ["rows=[]", "seeds=1", "recipe.steps=1", "recipe.lrs=[0.1]", "recipe.augment=none", "workers=1"]
EVALUATE = ["evaluate", "run", *QUICK, "kept=none"]
LOCAL = ["dataset.download=false", "ipc=1"]
IMPORT = ["dataset=digits", "out=new"]
PROTOCOLS = {
    "broken.yaml": "name: [",
    "text.yaml": "only words",
    "unknown.yaml": "name: mine\nshape: round\n",
    "ours.yaml": "name: standard-v1\n",
    "rates.yaml": (TREE / "configs/protocols/standard-v1.yaml").read_text().replace("standard-v1", "mine"),
    "bomb.yaml": "a: &a [x, x]\nb: [*a, *a]\n",
}
X, Y = np.zeros((8, 8, 8), np.uint8), np.arange(8) % 2
ARRAYS = {
    "negative.npz": {"x_train": X, "y_train": Y - 1},
    "gap.npz": {"x_train": X, "y_train": 3 * Y},
    "bright.npz": {"x_train": X + 7.5, "y_train": Y},
    "nan.npz": {"x_train": X * np.nan, "y_train": Y},
    "short.npz": {"x_train": X, "y_train": Y[:5]},
    "half.npz": {"x_train": X, "y_train": Y, "x_test": X},
    "sizes.npz": {"x_train": X, "y_train": Y, "x_test": X[:, :5], "y_test": Y},
    "names.npz": {"x_train": X, "y_train": Y, "class_names": np.array(["a", "a"])},
    "objects.npz": {"x_train": np.array([{}] * 8, object), "y_train": Y},
    "flat.npz": {"x_train": X.reshape(8, 64), "y_train": Y},
    "text.npz": {"x_train": X, "y_train": np.array(list("abababab"))},
    "empty.npz": {"x_train": X[:0], "y_train": Y[:0]},
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder of everything that a command may be pointed at, good and bad."""
    root = tmp_path_factory.mktemp("world")
    for name in ("run", "damaged"):
        assert main(["distill", *DIGITS, "matcher=random", *NET, f"out={root / name}"]) == 0
    assert main([*BUFFER, "workers=1", f"out={root / 'experts'}"]) == 0
    shutil.copytree(root / "experts", root / "broken_experts")
    for path in (root / "damaged" / "distilled" / "preview.png", root / "broken_experts" / "manifest.json"):
        path.write_bytes(path.read_bytes()[:-9])
    (root / "foreign").mkdir()
    (root / "foreign" / "thesis.txt").write_text("mine")
    (root / "file").write_text("a file")
    (root / "nothing").mkdir()
    for name, text in PROTOCOLS.items():
        (root / name).write_text(text.replace("rates: validation", "rates: guessed"))
    for name, arrays in ARRAYS.items():
        np.savez(root / name, **arrays)
    _write_foreign(root)
    _write_pictures(root)
    return root


def _write_foreign(root):
    labels = torch.arange(10)
    torch.save((torch.zeros(10, 3, 7, 5), labels), root / "colour.pt")
    torch.save((torch.zeros(10, 1, 8, 8), labels + 3), root / "labels.pt")
    torch.save({"data": [[torch.zeros(10, 1, 8, 8), labels]]}, root / "res_DM.pt")
    torch.save(torch.zeros(10, 1, 8, 8), root / "images_best.pt")
    (root / "images_7.pt").write_bytes((root / "images_best.pt").read_bytes()[:300])
    np.savez(root / "set.npz", x=np.zeros((10, 1, 8, 8)), y=np.arange(10) + 1)


def _write_pictures(root):
    for place, size in (("mixed/cat", 8), ("mixed/dog", 9), ("named/7", 8), ("named/whale", 8)):
        (root / place).mkdir(parents=True)
        for number in range(4):
            Image.new("L", (size, size), number).save(root / place / f"{number}.png")
    (root / "cifar" / "cifar-10-batches-py").mkdir(parents=True)
    for name in ("batches.meta", "test_batch", *(f"data_batch_{i}" for i in range(1, 6))):
        (root / "cifar" / "cifar-10-batches-py" / name).write_bytes(b"cposix\nsystem\n.")
    (root / "mnist" / "MNIST" / "raw").mkdir(parents=True)
    for part in ("train", "t10k"):
        for name in ("images-idx3", "labels-idx1"):
            (root / "mnist" / "MNIST" / "raw" / f"{part}-{name}-ubyte").write_bytes(
                b"\0\0\x08\x03" + bytes(9)
            )


def npz(name):
    return ["distill", "dataset=npz", f"dataset.root={name}", "ipc=1", "matcher=random"]


LINES = [
    (["demo", "out=file"], 2, "file"),
    (["demo", "out=foreign"], 2, "foreign"),
    (["demo", "out=run"], 2, "run"),
    (["demo", "seeds=0", "out=new"], 2, "seeds=0"),
    (["demo", "seed=1.5"], 2, "seed=1.5"),
    (["demo", "ipc=3"], 2, "ipc"),
    (["demo", "again"], 2, "again"),
    (["distill", *DIGITS, "matcher=trajectory"], 2, "experts"),
    (["distill", *DIGITS, "matcher=compensator"], 2, "experts"),
    (["distill", "ipc=1", "matcher=trajectory", "experts=nowhere"], 2, "nowhere"),
    (["distill", "ipc=1", "matcher=trajectory", "experts=run"], 3, "run/manifest.json"),
    (["distill", "ipc=1", "matcher=trajectory", "experts=broken_experts"], 3, "broken_experts/manifest.json"),
    (["distill", "ipc=1", "matcher=trajectory", "experts=experts", "network.width=5"], 2, "width=5"),
    ([*DISTILL, "matcher=random", "synth=pixels"], 2, "synth=pixels"),
    ([*DISTILL, "synth=hologram"], 2, "hologram"),
    ([*DISTILL, "matcher.steps=0"], 2, "matcher.steps=0"),
    ([*DISTILL, "matcher.steps=-5"], 2, "matcher.steps=-5"),
    ([*DISTILL, "matcher.real_per_class=0"], 2, "matcher.real_per_class=0"),
    ([*DISTILL, "matcher.lr=nan"], 2, "matcher.lr=nan"),
    ([*DISTILL, "matcher.networks=net"], 2, "net"),
    ([*DISTILL, "workers=0"], 2, "workers=0"),
    ([*DISTILL, "seed=1.5"], 2, "seed=1.5"),
    ([*DISTILL, "seed=null"], 2, "seed=null"),
    ([*DISTILL, "ipc=[1]"], 2, "ipc=[1]"),
    ([*DISTILL, "=3"], 2, "=3"),
    ([*DISTILL, "ipc"], 2, "ipc"),
    ([*DISTILL, "device=cuda:x"], 2, "cuda:x"),
    ([*DISTILL, "network=no.such:Net"], 2, "no.such"),
    ([*DISTILL, "deterministic=perhaps"], 2, "perhaps"),
    (["distill", "dataset=digits", "budget.nbytes=-5"], 2, "budget.nbytes=-5"),
    (["distill", "dataset=digits", "ipc=99999999999", "matcher=random"], 2, "99999999999"),
    ([*BUFFER, "out=run"], 2, "run"),
    ([*BUFFER, "out=experts", "seed=9"], 2, "seed is 0 there and 9 here"),
    ([*BUFFER, "recipe.batch_size=0"], 2, "recipe.batch_size=0"),
    ([*BUFFER, "recipe.momentum=2"], 2, "recipe.momentum=2"),
    ([*BUFFER, "network=nope"], 2, "nope"),
    ([*BUFFER, "count=many"], 2, "many"),
    (["import", "nowhere.pt", "--from", "mtt", *IMPORT], 3, "nowhere.pt"),
    (["import", "file", "--from", "torch", *IMPORT], 3, "file"),
    (["import", "images_7.pt", "--from", "mtt", *IMPORT], 3, "images_7.pt"),
    (["import", "colour.pt", "--from", "torch", *IMPORT], 2, "[3, 7, 5]"),
    (["import", "labels.pt", "--from", "torch", *IMPORT], 3, "3..12"),
    (["import", "labels.pt", "--from", "dm", *IMPORT], 3, "labels.pt"),
    (["import", "res_DM.pt", "--from", "dm", "source.experiment=4", *IMPORT], 2, "experiment=4"),
    (["import", "images_best.pt", "--from", "mtt", "source.space=hsv", *IMPORT], 2, "hsv"),
    (["import", "images_best.pt", "--from", "mtt", "source.lr=-1", *IMPORT], 2, "-1"),
    (["import", "colour.pt", "--from", "torch", "dataset=digits"], 2, "out"),
    (["import", "set.npz", "--from", "npz", *IMPORT], 3, "1..10"),
    (["import", "set.npz", "file", "--from", "npz", *IMPORT], 2, "file"),
    (["import", "named", "--from", "imagefolder", *IMPORT], 2, "whale"),
    (["import", "nothing", "--from", "sre2l", *IMPORT], 2, "nothing"),
    (["export", "run", "out=new"], 2, "--to"),
    (["export", "run", "--to", "gif", "out=new"], 2, "gif"),
    (["export", "run", "--to", "npz"], 2, "out"),
    (["export", "run", "--to", "npz", "out=file"], 2, "file"),
    (["export", "run", "--to", "imagefolder", "out=foreign"], 2, "foreign"),
    (["export", "run", "--to", "torch", "out=file/x.pt"], 2, "file"),
    (["export", "nowhere", "--to", "npz", "out=new"], 2, "nowhere"),
    (["export", "damaged", "--to", "npz", "out=new"], 3, "preview.png"),
    (["export", "experts", "--to", "npz", "out=new"], 3, "experts/manifest.json"),
    (["downstream"], 2, "task"),
    (["downstream", "sorting", "run"], 2, "sorting"),
    (["downstream", "continual", "nowhere"], 2, "nowhere"),
    (["downstream", "continual", "damaged"], 3, "preview.png"),
    (["downstream", "continual", "run", "steps=0"], 2, "steps=0"),
    (["downstream", "continual", "run", "orders=0"], 2, "orders=0"),
    (["downstream", "continual", "run", "rows=[nope]"], 2, "nope"),
    (["downstream", "nas", "run", "norms=[swirl]"], 2, "swirl"),
    (["downstream", "nas", "run", "depths=[9]"], 2, "9"),
    (["downstream", "nas", "run", "widths=[]"], 2, "widths=[]"),
    (["audit"], 2, "0"),
    (["audit", "damaged"], 3, "preview.png"),
    (["audit", "run", "recipe.steps=0"], 2, "recipe.steps=0"),
    (["audit", "run", "network=nope"], 2, "nope"),
    (["audit", "run", "rows=[full]"], 2, "rows"),
    (["audit", "run", "out=file"], 2, "file"),
    (["report", "run", "--html", "nothing"], 2, "nothing"),
    (["report", "run", "--html", "file"], 2, "file"),
    (["report", "run", "file"], 3, "file"),
    (["report", "damaged"], 3, "preview.png"),
    (["report", "--compare", "run"], 2, "1"),
    (["report", "run", "--fast"], 2, "--fast"),
    (["inspect", "nothing"], 3, "nothing"),
    (["inspect", "run", "damaged"], 2, "2"),
    (["inspect", "broken_experts"], 3, "broken_experts/manifest.json"),
    (["verify", "damaged"], 3, "damaged/distilled/preview.png"),
    (["verify", "broken_experts"], 3, "broken_experts/manifest.json"),
    (["verify", "run", "--html", "x"], 2, "--html"),
    (["verify", ""], 3, "no distilled set"),
    (["estimate", "paint", "run"], 2, "paint"),
    (["estimate", *DISTILL, "ipc=0"], 2, "ipc=0"),
    (["estimate", "evaluate", "nowhere"], 2, "nowhere"),
    (["list", "matchers", "networks"], 2, "kind"),
    (["list", "nets"], 2, "nets"),
    (["doctor", "out=x"], 2, "out=x"),
    (["doctor", "--mend"], 2, "--mend"),
    ([*EVALUATE, "protocol=nope"], 2, "nope"),
    ([*EVALUATE, "protocol=nowhere.yaml"], 2, "nowhere.yaml"),
    ([*EVALUATE, "protocol=broken.yaml"], 2, "broken.yaml"),
    ([*EVALUATE, "protocol=text.yaml"], 2, "text.yaml"),
    ([*EVALUATE, "protocol=unknown.yaml"], 2, "shape"),
    ([*EVALUATE, "protocol=ours.yaml"], 2, "ours.yaml"),
    ([*EVALUATE, "protocol=rates.yaml"], 2, "guessed"),
    ([*EVALUATE, "protocol=bomb.yaml"], 2, "bomb.yaml"),
    ([*EVALUATE, "robust=[contrast]", "severity=9"], 2, "9"),
    ([*EVALUATE, "networks=[]"], 2, "networks"),
    ([*EVALUATE, "recipe.batch_size=0"], 2, "recipe.batch_size=0"),
    ([*EVALUATE, "recipe.loss=l2"], 2, "l2"),
    ([*EVALUATE, "recipe.ema=2"], 2, "recipe.ema=2"),
    ([*EVALUATE, "kept=file"], 2, "file"),
    ([*EVALUATE, "experts=nowhere"], 2, "nowhere"),
    (npz("negative.npz"), 2, "-1"),
    (npz("gap.npz"), 2, "class 1"),
    (npz("bright.npz"), 2, "7.5"),
    (npz("nan.npz"), 2, "nan"),
    (npz("short.npz"), 2, "(5,)"),
    (npz("half.npz"), 2, "y_test"),
    (npz("sizes.npz"), 2, "(8, 5, 8)"),
    (npz("names.npz"), 2, "class_names"),
    (npz("objects.npz"), 2, "object"),
    (npz("flat.npz"), 2, "(8, 64)"),
    (npz("text.npz"), 2, "<U1"),
    (npz("empty.npz"), 2, "(0,)"),
    (["distill", "dataset=image_folder", "dataset.root=mixed", "ipc=1", "matcher=random"], 2, "9x9"),
    (["distill", "dataset=cifar10", "dataset.root=cifar", *LOCAL], 2, "batches.meta"),
    (["distill", "dataset=mnist", "dataset.root=mnist", *LOCAL], 2, "train-images"),
    (["distill", "dataset=svhn", "dataset.root=nothing", *LOCAL], 2, "nothing"),
    (["distill", "dataset=tu", "dataset.name=MUTAG", "dataset.root=nothing", *LOCAL], 2, "MUTAG"),
]  # fmt: skip


def digest(folder):
    """SHA-256 over names and contents of all files below a folder."""
    found = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        found.update(f"{path.relative_to(folder)}\0{path.stat().st_size}\0".encode())
        found.update(path.read_bytes())
    return found.hexdigest()


def two_lines(err):
    lines = err.splitlines()
    assert len(lines) == 2, err
    assert lines[0].startswith("error: ") and lines[1].startswith("  fix: "), err
    assert all(len(line) > 12 for line in lines)
    assert "Traceback" not in err
    return lines[0]


def test_the_table_is_large_and_has_every_command():
    assert len(LINES) >= 100
    assert len({" ".join(words) for words, _, _ in LINES}) == len(LINES)
    assert {words[0] for words, _, _ in LINES} == set(COMMANDS)


@pytest.mark.parametrize(
    ("words", "code", "named"), LINES, ids=lambda v: " ".join(v)[:80] if isinstance(v, list) else ""
)
def test_bad_input_is_refused_at_once_by_value_and_changes_nothing(
    words, code, named, world, capsys, monkeypatch
):
    monkeypatch.chdir(world)
    monkeypatch.delenv("DDENGINE_DEBUG", raising=False)
    before, began = digest(world), time.monotonic()
    found = main(words)
    seconds = time.monotonic() - began
    out, err = capsys.readouterr()
    cause = two_lines(err)
    assert found == code, err
    assert named in cause
    assert out == ""
    assert digest(world) == before
    assert seconds < SECONDS


@pytest.mark.parametrize("number", [0, 30, 58])
def test_the_process_says_the_same(number, world, tmp_path):
    words, code, named = LINES[number]
    script = "import sys; from ddengine.cli import main; sys.exit(main())"
    env = {key: value for key, value in os.environ.items() if key != "DDENGINE_DEBUG"}
    env |= {"PYTHONPATH": str(TREE), "PYTHONDONTWRITEBYTECODE": "1"}
    before = digest(world)
    done = subprocess.run(
        [sys.executable, "-c", script, *words],
        cwd=world,
        env=env,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stdout) == (code, "")
    assert named in two_lines(done.stderr)
    assert digest(world) == before
