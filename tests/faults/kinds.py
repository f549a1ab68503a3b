"""Small artefacts of every kind that ddengine stores, and how a user meets each of them."""

import contextlib
import io
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "reference"))

from random_graphs import random_graphs
from toy_experts import BATCH, NET, walk, write

from ddengine import checkpoint, files
from ddengine.cli import main
from ddengine.errors import EXIT_DONE, DDError
from ddengine.kept import Kept
from ddengine.ops.dag import trees_of
from ddengine.types import DataSpec, Images, Whitening
from synth import Compensated, DistilledSet, Forest, GraphSubset, Pixels, Subset

SHAPE, CLASSES, COUNT = (3, 7, 5), ("ant", "bee", "cat", "dog", "elk"), 11
SET_FILES = ("data.safetensors", "manifest.json", "README.md", "preview.png")
NOTES = {"recipe": {"lr": 0.01}, "provenance": {"seed": 5}}
STEP = 42
STATE = {"pixels": torch.linspace(-1, 1, 105).reshape(SHAPE), "step": STEP, "rate": 0.125}
DEPENDS = {"row": "random", "seed": 3, "lr": 0.01}
RECORD = {"test": 0.625, "steps": 13, "per_class": [0.5, 0.75]}


@dataclass(frozen=True)
class Said:
    """How an artefact was met: the exit code, what was printed, and the cause where there was an error."""

    code: int
    out: str
    cause: str
    lines: int = 0


@dataclass(frozen=True)
class Kind:
    """An artefact: `make` writes one into a folder, `read` meets it there as a user does.

    `files` are patterns of those that carry data. `told` says that what `read` prints is all that they mean,
    so that a reading which prints the same was not changed by damage. `disbelieved` is what is printed where
    a reader takes a damaged artefact for a missing one.
    """

    make: Callable[[Path], object]
    read: Callable[[Path], Said]
    files: tuple[str, ...]
    told: bool = False
    disbelieved: str | None = None


def command(*words: str | Path) -> Said:
    """Run a command in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([str(word) for word in words])
    lines = err.getvalue().splitlines()
    cause = next((line for line in lines if line.startswith("error: ")), "")
    return Said(code, out.getvalue(), cause.removeprefix("error: "), len(lines))


def _verify(folder: Path) -> Said:
    return command("verify", folder)


def _report(folder: Path) -> Said:
    return command("report", folder, "--json")


def _state(folder: Path) -> Said:
    """A checkpoint is read when its run goes on, which then takes an older one and says why."""
    try:
        state, extra = checkpoint.load(folder, STEP, STATE)
    except DDError as error:
        return Said(error.code, "", error.cause, len(str(error).splitlines()))
    return Said(EXIT_DONE, repr((state["pixels"].tolist(), state["step"], state["rate"], extra)), "")


def _row(folder: Path) -> Said:
    """A kept row is looked up by an evaluation; one that is not believed is trained again."""
    return Said(EXIT_DONE, repr(Kept(folder).find(DEPENDS)), "")


def spec(*, zca: bool = False) -> DataSpec:
    """The meaning of small colour images, with a whitening that does nothing where `zca` is set."""
    d = torch.Size(SHAPE).numel()
    found = DataSpec("small", SHAPE, CLASSES, (0.5, 0.4, 0.3), (0.2, 0.25, 0.3), "a" * 64, "CC0-1.0")
    return replace(found, zca=Whitening(torch.zeros(d), torch.eye(d), torch.eye(d))) if zca else found


def pixels(*, zca: bool = False) -> Pixels:
    """Free pixels with a learned rate."""
    g = torch.Generator().manual_seed(3)
    images = torch.randn((COUNT, *SHAPE), generator=g)
    labels = torch.randint(0, len(CLASSES), (COUNT,), generator=g)
    return Pixels(images, labels, spec(zca=zca), student_lr=0.0123)


def subset() -> Subset:
    """Real images by their indices."""
    g = torch.Generator().manual_seed(5)
    x = torch.randint(0, 256, (29, *SHAPE), generator=g, dtype=torch.uint8)
    return Subset.of(Images(x, torch.arange(29) % 5, spec()), torch.arange(0, 29, 4))


def compensated(codec: str = "int8") -> Compensated:
    """Bases, compensators, soft labels and teachers; in few bits, or in half floats."""
    g = torch.Generator().manual_seed(11)
    bases = torch.randint(0, 256, (COUNT, *SHAPE), generator=g, dtype=torch.uint8)
    few = Compensated(
        bases=bases,
        spec=spec(),
        label_codec="int4",
        classes=torch.randint(0, len(CLASSES), (COUNT,), generator=g),
        compensators=0.3 * torch.randn((3, 2, *SHAPE), generator=g),
        group=torch.arange(COUNT) % 3,
        labels=3 * torch.randn((3 * COUNT, len(CLASSES)), generator=g),
        teachers=((torch.randn(17, generator=g), torch.rand(6, generator=g)),) * 2,
        student_lr=0.0123,
    )
    free = torch.randn((COUNT, *SHAPE), generator=g)
    return few if codec == "int8" else replace(few, bases=free, codec="fp16", label_codec="fp16")


def graphs() -> GraphSubset:
    """Real graphs with labelled nodes and edges and a codebook."""
    found = random_graphs(3, node_sizes=(3, 5), edge_sizes=(4, 2))
    values = {"node_values": (None, torch.linspace(0, 1, 10).reshape(5, 2)), "discretised": "kmeans"}
    return GraphSubset.of(replace(found, spec=replace(found.spec, **values)))


def forest() -> Forest:
    """Weighted computation trees with soft labels."""
    g = torch.Generator().manual_seed(7)
    found = random_graphs(3, node_sizes=(3, 5), edge_sizes=(4, 2))
    y, weight = torch.rand((7, 3), generator=g).softmax(1), torch.rand(7, generator=g) + 0.1
    return Forest.of(replace(trees_of(found, 2, degree=True), y=y, weight=weight, y_kind="prob"))


def _set(synth: Callable[[], object]) -> Kind:
    return Kind(lambda folder: DistilledSet.make(synth(), **NOTES).save(folder), _verify, SET_FILES)


def _run(folder: Path) -> None:
    """A finished run of no steps that was evaluated, through the commands that make one."""
    told = ["dataset=digits", "ipc=1", "matcher=random", "network=mlp", "network.width=3"]
    quick = "seeds=2 rows=[random] recipe.steps=1 recipe.lrs=[0.1] recipe.augment=none workers=1 kept=none"
    assert command("distill", *told, f"out={folder}").code == EXIT_DONE
    assert command("evaluate", folder, *quick.split()).code == EXIT_DONE
    log = [{"step": step, "seconds": 0.5, "loss": 1 / step} for step in (1, 2, 3)]
    for record in log:
        files.append_json_line(folder / "metrics.jsonl", record)
    (folder / "config.yaml").unlink()  # as a run from Python has none; composing it anew takes a second


def _checkpoint(folder: Path) -> None:
    checkpoint.save(folder, STEP, STATE, {"seconds": 1.5})


def _kept(folder: Path) -> None:
    Kept(folder).put(DEPENDS, RECORD)


def _buffer(folder: Path) -> None:
    write(folder, [walk(NET, 2, 0), walk(BATCH, 3, 1)], (NET, BATCH))


STEP_FILES = (f"step_{STEP:06d}/manifest.json", f"step_{STEP:06d}/state.safetensors")
KINDS: dict[str, Kind] = {
    "pixels": _set(pixels),
    "pixels in ZCA space": _set(lambda: pixels(zca=True)),
    "subset": _set(subset),
    "compensated, few bits": _set(compensated),
    "compensated, half floats": _set(lambda: compensated("fp16")),
    "forest": _set(forest),
    "graphs": _set(graphs),
    "expert buffer": Kind(_buffer, _verify, ("manifest.json", "expert_*.safetensors")),
    "checkpoint": Kind(_checkpoint, _state, STEP_FILES, told=True),
    "run": Kind(_run, _report, ("run.json", "table.json"), told=True),
    "kept row": Kind(_kept, _row, ("*.json",), told=True, disbelieved="None"),
}
