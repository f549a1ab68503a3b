"""Commands that write refuse a folder that another process is writing, in one line that names it."""

import pytest
import torch

import matchers
from ddengine import cli, locks
from ddengine.data import load
from ddengine.errors import UsageError
from ddengine.loop import distill
from ddengine.types import Budget, Task

BUFFER = [
    "buffer",
    "dataset=digits",
    "network.width=2",
    "network.depth=1",
    "count=1",
    "epochs=1",
    "workers=1",
]
DISTILL = ["distill", "dataset=digits", "matcher=random", "ipc=1"]
QUICK = ["network=mlp", "network.width=3", "rows=[]", "seeds=1", "recipe.steps=1", "recipe.lrs=[0.1]",
         "recipe.augment=none", "workers=1", "kept=none"]  # fmt: skip


@pytest.mark.parametrize("words", [BUFFER, DISTILL], ids=["buffer", "distill"])
def test_a_second_command_on_one_folder_is_refused_and_changes_nothing(words, tmp_path, capsys):
    with locks.writing(tmp_path):
        before = (tmp_path / locks.LOCK).read_bytes()
        code = cli.main([*words, f"out={tmp_path}"])
        assert (tmp_path / locks.LOCK).read_bytes() == before
    out, err = capsys.readouterr()
    cause, remedy = err.splitlines()[-2:]
    assert (code, out) == (2, "")
    assert (
        cause.startswith(f"error: out={tmp_path} is being written by process ") and "choose another" in remedy
    )
    assert list(tmp_path.iterdir()) == []
    assert cli.main([*words, f"out={tmp_path}"]) == 0
    assert locks.LOCK not in [path.name for path in tmp_path.iterdir()]


def test_an_evaluation_is_alone_in_its_folder_and_removes_what_a_killed_one_left(tmp_path, capsys):
    assert cli.main([*DISTILL, f"out={tmp_path / 'run'}"]) == 0
    judged = tmp_path / "judged"
    words = ["evaluate", str(tmp_path / "run"), *QUICK, f"out={judged}"]
    with locks.writing(judged):
        assert cli.main(words) == 2
    assert f"out={judged} is being written by process " in capsys.readouterr().err
    assert list(judged.iterdir()) == []
    assert cli.main(words) == 0
    (judged / ".tmp-abcdefgh").write_bytes(b"half")
    assert cli.main(words) == 0
    assert sorted(path.name for path in judged.iterdir()) == ["results.jsonl", "set.json", "table.json"]


def test_a_folder_of_other_files_is_refused_and_left_as_it_was(tmp_path):
    (tmp_path / ".tmp-notes").write_text("mine")
    (tmp_path / "thesis.tex").write_text("mine")
    fit = load("digits").fit
    task = Task(fit.take(torch.arange(0, len(fit), 13)), Budget(1))
    with pytest.raises(UsageError, match="holds files that are not a run"):
        distill(task, matchers.make("random", None), out=tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".tmp-notes", "thesis.tex"]
