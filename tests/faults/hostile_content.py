"""Hostile content: tensors, headers, JSON and names that are well packed and mean nothing good."""

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent))

import forging
from hostile import IMAGES, LABELS, STEP_FOLDER, Case, Met, copied, foreign, placed
from kinds import KINDS, SHAPE

TENSORS: dict[str, Callable[[], object]] = {
    "NaN": lambda: (IMAGES * torch.nan, LABELS),
    "infinity": lambda: (IMAGES + torch.inf, LABELS),
    "overflow in float32": lambda: (IMAGES.double() + 1e300, LABELS),
    "a label of 5": lambda: (IMAGES, LABELS + 1),
    "a label of -1": lambda: (IMAGES, LABELS - 1),
    "a label of 2**62": lambda: (IMAGES, LABELS + 2**62),
    "soft labels of NaN": lambda: (IMAGES, torch.full((10, 5), torch.nan)),
    "soft labels of six classes": lambda: (IMAGES, torch.ones((10, 6))),
    "labels of truth values": lambda: (IMAGES, LABELS > 2),
    "complex images": lambda: (IMAGES.to(torch.complex64), LABELS),
    "sparse images": lambda: (IMAGES.to_sparse(), LABELS),
    "quantised images": lambda: (torch.quantize_per_tensor(IMAGES, 0.1, 0, torch.quint8), LABELS),
    "meta images": lambda: (IMAGES.to("meta"), LABELS),
    "one number for all": lambda: (torch.zeros(1).expand(10**6, *SHAPE), LABELS),
    "no image": lambda: (IMAGES[:0], LABELS[:0]),
    "images of no size": lambda: (torch.zeros((10, 3, 0, 5)), LABELS),
    "64 axes": lambda: (torch.zeros((1,) * 64), LABELS),
    "100,000 tensors": lambda: [IMAGES[0, 0, 0, 0]] * 100_000,
    "a deep nest": lambda: _nest(90),
    "a module": lambda: torch.nn.Linear(2, 3),
    "a network's state": lambda: torch.nn.Linear(2, 3).state_dict(),
    "an object of numpy": lambda: (np.array([object], dtype=object), LABELS),
    "a rate of NaN": lambda: {"x": IMAGES, "y": LABELS, "student_lr": float("nan")},
    "a rate of -1": lambda: {"x": IMAGES, "y": LABELS, "student_lr": -1.0},
    "a rate of infinity": lambda: {"x": IMAGES, "y": LABELS, "student_lr": float("inf")},
    "a kind of labels": lambda: {"x": IMAGES, "y": LABELS, "y_kind": "../x"},
    "classes that are none": lambda: {"x": IMAGES, "y": LABELS, "classes": {"ant": 1}},
    "a mean of NaN": lambda: {"x": IMAGES, "y": LABELS, "mean": [float("nan")] * 3, "std": [1.0] * 3},
    "a std of zero": lambda: {"x": IMAGES, "y": LABELS, "mean": [0.0] * 3, "std": [0.0] * 3},
}


def _nest(depth: int) -> Any:
    found: Any = IMAGES
    for _ in range(depth):
        found = [found]
    return found


def tensors() -> Iterator[tuple[str, Case]]:
    """Tensors that are no distilled set, as torch saves them."""
    for name, content in TENSORS.items():
        make = lambda folder, sentinel, c=content: foreign(
            "torch", forging.torch_file(folder / "set.pt", c())
        )
        yield f"a torch file of {name}", Case(make)


ENTRIES: dict[str, Callable[[], bytes]] = {
    "a negative shape": lambda: forging.header({"images": ("U8", [-1], 0, 1)}),
    "a shape beyond 64 bits": lambda: forging.header({"images": ("U8", [2**40, 2**40], 0, 1)}),
    "offsets that overlap": lambda: forging.header(
        {"images": ("U8", [2], 0, 2), "labels": ("U8", [2], 1, 3)}
    ),
    "offsets that run backwards": lambda: forging.header({"images": ("U8", [2], 3, 1)}),
    "offsets beyond the file": lambda: forging.header({"images": ("U8", [2**20], 0, 2**20)}),
    "an unknown type": lambda: forging.header({"images": ("Q9", [1], 0, 1)}),
    "a name that is a path": lambda: forging.header({"../../x": ("U8", [1], 0, 1)}),
    "a length of 2**63": lambda: forging.header({"images": ("U8", [1], 0, 1)}, claimed=2**63),
    "20,000 tensors": lambda: _many(20_000),
}


@cache
def _many(count: int) -> bytes:
    return forging.header({f"t{i}": ("U8", [], i, i + 1) for i in range(count)}) + bytes(count)


HOLDERS = {
    "distilled set": ("pixels", "data.safetensors", 1500),
    "expert": ("expert buffer", "expert_00000.safetensors", 3600),
    "checkpoint": ("checkpoint", f"{STEP_FOLDER}/state.safetensors", 400),
}


def headers() -> Iterator[tuple[str, Case]]:
    """Headers of safetensors that lie, under hashes and seals that agree with them."""
    for name, content in ENTRIES.items():
        for holder, (kind, file, room) in HOLDERS.items():
            make = lambda folder, sentinel, k=kind, f=file, c=content, r=room: placed(
                k, f, folder, c().ljust(r, b"\0")
            )
            yield f"a header with {name} in a {holder}", Case(make)


TEXTS: dict[str, Callable[[str], str]] = {
    "a key twice": lambda text: text.replace("{\n", '{\n "format": "x",\n', 1),
    "NaN": lambda text: text.replace(": ", ": NaN, \"x\": ", 1),
    "infinity": lambda text: text.replace(": ", ": -Infinity, \"x\": ", 1),
    "a number of 10,000 digits": lambda text: text.replace(": ", f": {'9' * 10_000}, \"x\": ", 1),
    "100,000 brackets": lambda text: "[" * 100_000,
    "900 brackets": lambda text: text.replace(": ", f": {'[' * 900}{']' * 900}, \"x\": ", 1),
    "half a surrogate": lambda text: text.replace(": ", ": \"\\ud800\", \"x\": ", 1),
    "a terminal's codes": lambda text: text.replace("{\n", '{\n "\\u001b[31m\\n": 1,\n', 1),
    "a byte order mark": lambda text: "\ufeff" + text,
    "more behind it": lambda text: text + "{}",
    "no table": lambda text: json.dumps(text),
    "nothing": lambda text: "",
    "zero bytes": lambda text: "\0" * 100,
    "20,000 keys": lambda text: json.dumps({str(i): i for i in range(20_000)}),
    "another case": lambda text: text.upper(),
    "a comment": lambda text: "// ours\n" + text,
}  # fmt: skip
SAME = ("a key twice", "a byte order mark")  # the seal of a checkpoint is of what its manifest says
SEALED = {
    "set": ("pixels", "manifest.json"),
    "buffer": ("expert buffer", "manifest.json"),
    "checkpoint": ("checkpoint", f"{STEP_FOLDER}/manifest.json"),
    "run": ("run", "run.json"),
    "table": ("run", "table.json"),
}


def texts() -> Iterator[tuple[str, Case]]:
    """JSON that is none, or that two readers would take for two things."""
    for name, change in TEXTS.items():
        for holder, (kind, file) in SEALED.items():

            def make(folder: Path, sentinel: Path, k: str = kind, f: str = file, c: Any = change) -> Met:
                path = copied(k, folder) / f
                path.write_text(c(path.read_text()), "utf-8", "surrogatepass")
                return partial(KINDS[k].read, folder / "artefact")

            yield f"JSON with {name} in a {holder}", Case(make, holder == "checkpoint" and name in SAME)


PATHS = (
    "../x",
    "../../etc/passwd",
    "/etc/passwd",
    "a/b",
    "..",
    ".",
    "",
    "a\0",
    "a\n",
    "C:\\x",
    "~/x",
    "\u202ex",
)


def paths() -> Iterator[tuple[str, Case]]:
    """Names of files that lie elsewhere."""
    entry = {"sha256": "0" * 64, "bytes": 3}
    for name in PATHS:

        def in_set(folder: Path, sentinel: Path, n: str = name) -> Met:
            forging.edited(copied("pixels", folder), lambda m: m["files"].update({n: entry}))
            return partial(KINDS["pixels"].read, folder / "artefact")

        def in_buffer(folder: Path, sentinel: Path, n: str = name) -> Met:
            forging.edited(copied("expert buffer", folder), lambda m: m["experts"]["0"].update(file=n))
            return partial(KINDS["expert buffer"].read, folder / "artefact")

        yield f"a file {name!r} in a set", Case(in_set)
        yield f"a file {name!r} in a buffer", Case(in_buffer)


LINKED = (
    *(("pixels", name) for name in ("data.safetensors", "manifest.json", "README.md", "preview.png")),
    ("expert buffer", "manifest.json"),
    ("expert buffer", "expert_00001.safetensors"),
    ("checkpoint", f"{STEP_FOLDER}/state.safetensors"),
)


def links() -> Iterator[tuple[str, Case]]:
    """Files that are links to others of the user's, or pipes, which would never end."""
    for kind, name in LINKED:

        def link(folder: Path, sentinel: Path, k: str = kind, n: str = name) -> Met:
            path = copied(k, folder) / n
            shutil.copy(path, folder / "theirs")
            path.unlink()
            path.symlink_to(folder / "theirs")
            return partial(KINDS[k].read, folder / "artefact")

        yield f"a link for {name} of the {kind}", Case(link)
