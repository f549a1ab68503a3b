"""Tiny commands that write, what each needs, and whether two folders hold the same results."""

import hashlib
import json
import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "reference"))
sys.path.insert(0, str(Path(__file__).parents[2]))

from fault_points import Outcome, run
from tu_folder import random_set, write_tu

from ddengine import checkpoint, files, locks
from ddengine.errors import DDError
from expert_buffers import ExpertBuffer
from synth import DistilledSet

ROOT = Path(__file__).parents[2]
NET = ["dataset=digits", "network.width=2", "network.depth=1"]
STEPS = ["matcher.steps=4", "checkpoint.steps=1", "ipc=1", "out=run"]
JUDGE = ["seeds=1", "recipe.steps=2", "recipe.lrs=[0.01,0.03]", "workers=1", "out=judged"]
EXPERTS = [*NET, "recipe.lr=0.1", "count=2", "epochs=2", "checkpoint.minutes=1e-9", "out=experts"]
TEACHERS = ["dataset=digits", "network.width=2", "network.depth=2", "network.norm=batch", "recipe=squeeze",
            "count=1", "epochs=1", "workers=1", "out=teachers"]  # fmt: skip
TU = ["dataset=tu", "dataset.root={world}/graphs", "dataset.name=TWO", "dataset.download=false"]
# What varies between two runs of one command: times, memory, the machine, and what is sealed over them.
VOLATILE = {"seconds", "peak_memory_bytes", "host", "train_seconds", "seal", "kept", "README.md"}


@dataclass(frozen=True)
class Case:
    """A command and those whose results it starts from; `{world}` in words is the folder of all of them."""

    words: list[str]
    needs: tuple[str, ...] = ()


def _distil(name: str, *words: str) -> list[str]:
    return ["distill", f"matcher={name}", *words]


COMPENSATOR = ["experts={world}/teachers/teachers", "workers=1", "ipc=4", "matcher.steps=3"]
TREES = [*TU, "budget.nbytes=300", "network.width=4", "checkpoint.steps=1", "out=run"]
PICK = ["dataset=digits", "ipc=2", "out=run"]
CASES = {
    "buffer": Case(["buffer", *EXPERTS, "workers=1"]),
    "buffer_workers": Case(["buffer", *EXPERTS, "workers=2"]),
    "teachers": Case(["buffer", *TEACHERS]),
    "attention": Case(_distil("attention", *NET, *STEPS, "matcher.real_per_class=2")),
    "distribution": Case(_distil("distribution", *NET, *STEPS, "matcher.real_per_class=2")),
    "characteristic": Case(
        _distil("characteristic", *NET, *STEPS, "matcher.real_per_class=2", "matcher.frequencies=8")
    ),
    "trajectory": Case(
        _distil("trajectory", "experts={world}/buffer/experts", *STEPS, "matcher.inner.steps=2"), ("buffer",)
    ),
    "compensator": Case(_distil("compensator", *COMPENSATOR, "checkpoint.steps=1", "out=run"), ("teachers",)),
    "computation_tree": Case(_distil("computation_tree", *TREES)),
    "tree_herding": Case(_distil("tree_herding", *TREES)),
    **{name: Case(_distil(name, *PICK)) for name in ("random", "herding", "kmeans", "kcenter")},
    "evaluate": Case(["evaluate", "{world}/attention/run", "kept=rows", *JUDGE], ("attention",)),
    "evaluate_graphs": Case(["evaluate", "{world}/computation_tree/run", *JUDGE], ("computation_tree",)),
}


class World:
    """A folder with one uninterrupted run of each command, made when asked for."""

    def __init__(self, root: Path) -> None:
        self.root = root.resolve()
        self.straight: dict[str, tuple[Outcome, dict[str, str]]] = {}
        if not (self.root / "graphs").exists():
            write_tu(self.root / "graphs" / "TWO", "TWO", random_set(31))

    def words(self, name: str) -> list[str]:
        return [word.replace("{world}", str(self.root)) for word in CASES[name].words]

    def run(self, name: str) -> tuple[Outcome, dict[str, str]]:
        """How the uninterrupted command ended, and what it made."""
        if name not in self.straight:
            for need in CASES[name].needs:
                self.run(need)
            folder = self.fresh(name)
            outcome = run(self.words(name), folder)
            assert outcome.code == 0, f"{name}: {outcome.err}"
            self.straight[name] = outcome, contents(folder)
        return self.straight[name]

    def fresh(self, name: str) -> Path:
        """A new empty folder."""
        folder = self.root / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        return folder


def contents(folder: Path) -> dict[str, str]:
    """What lies in a folder, by name: the hash of each file without what varies between two runs.

    A log of trained networks is compared by its networks, of which a repeated one may stand there twice.
    """
    found = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(_settled(path)).hexdigest() for path in found}


def _settled(path: Path) -> bytes:
    if path.name == "results.jsonl":
        lines = {json.dumps(_steady(record), sort_keys=True) for record in files.read_json_lines(path)}
        return "\n".join(sorted(lines)).encode()
    if path.suffix == ".jsonl":
        return json.dumps([_steady(record) for record in files.read_json_lines(path)]).encode()
    if path.suffix == ".json":
        return json.dumps(_steady(json.loads(path.read_bytes())), sort_keys=True).encode()
    if path.name == "README.md":
        lines = path.read_text().splitlines()
        return "\n".join(line for line in lines if not any(f'"{key}"' in line for key in VOLATILE)).encode()
    return path.read_bytes()


def _steady(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _steady(inner) for key, inner in value.items() if key not in VOLATILE}
    return [_steady(inner) for inner in value] if isinstance(value, list) else value


def left_over(folder: Path) -> list[str]:
    """Temporary names and locks below a folder."""
    paths = (path.relative_to(folder) for path in folder.rglob("*"))
    return [str(p) for p in paths if p.name.startswith(files.TEMPORARY) or p.name == locks.LOCK]


def half_made(folder: Path) -> list[str]:
    """Artefacts below a folder that bear their final names and that their readers refuse, with the reason."""
    problems = []
    for manifest in folder.rglob("manifest.json"):
        if not any(part.startswith(files.TEMPORARY) for part in manifest.relative_to(folder).parts):
            try:
                _read(manifest.parent)
            except (DDError, OSError, ValueError, KeyError) as error:
                problems.append(f"{manifest.parent}: {error}")
    for path in (*folder.rglob("table.json"), *folder.rglob("run.json"), *folder.rglob("rows/*.json")):
        if not path.name.startswith(files.TEMPORARY):
            files.read_json(path)
    bare = [p for p in folder.rglob("*") if p.is_dir() and re.fullmatch(r"step_[0-9]+|distilled", p.name)]
    return problems + [f"{p} has no manifest" for p in bare if not (p / "manifest.json").exists()]


def _read(folder: Path) -> None:
    form = files.read_json(folder / "manifest.json")["format"]
    if form == checkpoint.FORMAT:
        manifest = files.read_json(folder / "manifest.json")
        files.read_tensors(folder / "state.safetensors", manifest["state.safetensors"])
    elif folder.name in ("experts", "teachers"):
        ExpertBuffer(folder).verify()
    else:
        DistilledSet.load(folder)
