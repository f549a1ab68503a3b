"""Hostile names: markup for pages, codes for terminals, and words that some configuration tools would run."""

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import forging
from hostile import Case, Met, copied
from kinds import KINDS, command, pixels

from synth import DistilledSet

MODULE = "hostile_module"  # lies in the folder of a case, which is where its command runs
PLAIN = "plain words"
MARKUP = {
    PLAIN: "harmless",
    "a script": "<script>document.title='hostile'</script>",
    "a picture": "<img src=x onerror=hostile()>",
    "an end of an attribute": "\" onmouseover=\"hostile()\" x=\"",
    "an end of a single quote": "' onclick='hostile()",
    "an end of the style": "</style><script>hostile()</script>",
    "a comment": "<!--><script>hostile()</script>-->",
    "a link of Markdown": "[x](javascript:hostile())",
    "a picture of Markdown": "![x](http://hostile.example/x.png)",
    "an escaped link": "\\[x](javascript:hostile())",
    "an end of a cell": "a | b |\n| c",
    "code of Markdown": "`</code><script>hostile()</script>`",
    "an entity": "&lt;script&gt;hostile()&lt;/script&gt;",
    "a terminal's codes": "\x1b]0;hostile\x07\x1b[31m",
    "a change of direction": "\u202ehostile\u2066",
    "half a surrogate": "\ud800hostile",
    "a vector graphic": "<svg/onload=hostile()>",
}  # fmt: skip


def _named_run(folder: Path, text: str) -> Path:
    """A run all of whose names are `text`: classes, data, licence, matcher, options, rows, networks, log."""
    place = copied("run", folder)
    shutil.rmtree(place / "distilled")
    synth = pixels()
    spec = replace(synth.spec, name=text, licence=text, classes=tuple(f"{i}{text}" for i in range(5)))
    notes = {"matcher": {"type": text}, "versions": {text: text}, "device": text}
    made = DistilledSet.make(
        replace(synth, spec=spec), recipe={text: text, "network": {"name": text}}, provenance=notes
    )
    made.save(place / "distilled")
    identity = {
        "matcher": {"type": text, text: text},
        "dataset": {"name": text, "shape": [3, 7, 5]},
        "budget": {text: 1},
    }
    (place / "run.json").write_text(
        json.dumps({"format": "ddengine/run", "version": 1, "identity": identity})
    )
    row = {
        "name": text,
        "network": text,
        "mean": 0.5,
        "std": None,
        "ci95": None,
        "n": 1,
        "values": [0.5],
        "lr": 0.1,
    }
    row |= {
        "steps": 3,
        "bytes": {"total": 7},
        "network_spec": {"name": text},
        "robust": {text: 0.25},
        "metric": text,
    }
    scores = {"network": text, "networks": {text: {"hlr": 0.5}}, "components": {"accuracies": {text: 0.5}}}
    table = {
        "dataset": text,
        "protocol": text,
        "seed": 0,
        "recipe": {text: text},
        "rows": [row],
        "scores": scores,
    }
    (place / "table.json").write_text(json.dumps(table))
    (place / "metrics.jsonl").write_text(json.dumps({"step": 1, text: 0.5}) + "\n")
    return place  # fmt: skip


def markup() -> Iterator[tuple[str, Case]]:
    """Runs whose every name is markup, which a report shows as text."""
    for name, text in MARKUP.items():

        def make(folder: Path, sentinel: Path, t: str = text) -> Met:
            place = _named_run(folder, t)
            (folder / "out").mkdir()
            return lambda: command("report", place, "--html", folder / "out" / "page.html")

        yield f"names that are {name}", Case(make, shown=True)


TARGETS: dict[str, dict[str, Any]] = {
    "_target_": {"_target_": f"{MODULE}.run", "_args_": ["x"]},
    "a nested _target_": {"steps": {"_target_": f"{MODULE}.run", "_recursive_": True}},
    "an interpolation": {"name": "${oc.env:HOME}", "x": "${hydra:runtime.cwd}"},
    "a resolver": {"name": "${oc.decode:'__import__(\"" + MODULE + "\")'}"},
    "an import path": {"name": f"{MODULE}:Net"},
    "an override": {"name": "convnet hydra.run.dir=out"},
    "a path": {"name": "../../x"},
}  # fmt: skip


def _module(folder: Path, sentinel: Path) -> None:
    """What an import path would find beside the artefact."""
    text = f"open({str(sentinel)!r}, 'w').close()\ndef run(*given):\n    pass\nNet = run\n"
    (folder / f"{MODULE}.py").write_text(text)


def _edited(
    kind: str, edit: Callable[[dict[str, Any]], object], words: list[str]
) -> Callable[[Path, Path], Met]:
    def make(folder: Path, sentinel: Path) -> Met:
        _module(folder, sentinel)
        place = copied(kind, folder)
        forging.edited(place / "distilled" if kind == "run" else place, edit)
        return lambda: command(*(word.format(place) for word in words))

    return make  # fmt: skip


QUICK = ["rows=[]", "seeds=1", "recipe.steps=1", "recipe.lrs=[0.1]", "kept=none", "workers=1", "device=cpu"]


def targets() -> Iterator[tuple[str, Case]]:
    """Sets and buffers whose recipe, origin and provenance name things to call, import or look up."""
    for name, value in TARGETS.items():
        for group in ("network", "dataset"):
            edit = lambda m, g=group, v=value: m["recipe"].update({g: v})
            make = _edited("run", edit, ["evaluate", "{0}", "dataset=digits", *QUICK, "out=out"])
            yield f"{name} as the {group} of a set", Case(make, shown=group == "dataset")
        both = lambda m, v=value: m.update(recipe=v, provenance=v)
        yield f"{name} as all that a set tells", Case(_edited("pixels", both, ["inspect", "{0}"]), shown=True)
        origin = lambda m, v=value: m.update(origin=v, recipe=v)
        words = ["distill", "experts={0}", "ipc=1", "matcher=trajectory", "out=out"]
        yield f"{name} as the origin of a buffer", Case(_edited("expert buffer", origin, words))


CONFIGURATIONS = {
    "_target_": "{name: convnet, _target_: hostile_module.run}",
    "an import path": "{name: 'hostile_module:Net'}",
    "an interpolation": "{name: '${oc.env:HOME}'}",
    "a Python object": "!!python/object/apply:os.system ['touch SENTINEL']",
    "a Python name": "!!python/name:hostile_module.Net",
    "a Python module": "{name: convnet, x: !!python/module:hostile_module }",
    "an alias": "{name: convnet, x: &x [1], y: *x}",
    "a shell's words": "{name: '; touch SENTINEL #'}",
    "a substitution": "{name: '$(touch SENTINEL)', width: '`touch SENTINEL`'}",
}


def configurations() -> Iterator[tuple[str, Case]]:
    """Runs whose config.yaml, from which a report tells the command, names things to call or import."""
    for name, network in CONFIGURATIONS.items():

        def make(folder: Path, sentinel: Path, n: str = network) -> Met:
            _module(folder, sentinel)
            place = copied("run", folder)
            text = n.replace("SENTINEL", str(sentinel))
            (place / "config.yaml").write_text(
                f"dataset: {{name: digits}}\nmatcher: {{name: random}}\nnetwork: {text}\nipc: 1\n"
            )
            return lambda: KINDS["run"].read(place)

        yield f"a configuration with {name}", Case(make, shown=name not in ("a Python object", "an alias"))


COMMANDS = (
    "rm -rf ~",
    "ddengine evaluate x; touch x",
    "ddengine evaluate $(touch x)",
    "ddengine report x",
    "'",
)


def commands() -> Iterator[tuple[str, Case]]:
    """Tables that tell another command than one that evaluates, for a user to paste."""
    for text in COMMANDS:

        def make(folder: Path, sentinel: Path, t: str = text) -> Met:
            path = copied("run", folder) / "table.json"
            table = json.loads(path.read_text())
            del table["seal"]
            path.write_text(json.dumps({**table, "command": t}))
            return lambda: KINDS["run"].read(path.parent)

        yield f"a table with the command {text!r}", Case(make)
