"""The data card of a distilled set: README.md, written from the manifest alone."""

import html
import json
import re
from collections.abc import Mapping
from typing import Any

CLASSES_SHOWN = 200
PRIVATE = ("host", "root")  # of the manifest's tables
LIMITS = """\
The images were made or chosen to train networks; they represent the source in no other sense.
They may resemble source images, and no guarantee of privacy is given.
Terms of the source's licence may apply to them.
"""


def data_card(manifest: Mapping[str, Any]) -> str:
    """Markdown: what the set is, its source and licence, sizes, how it was made, loaded and evaluated.

    Names and texts from the manifest are escaped, so that none can become markup.
    """
    return "\n\n".join(
        [
            f"# Distilled set of {escape(manifest['dataset']['name'])}",
            _what(manifest),
            f"![{_pictured(manifest)}](preview.png)",
            "## Source",
            _source(manifest["dataset"]),
            "## Contents",
            _contents(manifest),
            "## Load",
            _load(manifest),
            "## Evaluation recipe",
            json_block(manifest["recipe"]),
            "## How it was made",
            json_block(manifest["provenance"]),
            "## Limits",
            LIMITS,
        ]
    )


def escape(text: str) -> str:
    """`text` as one line that Markdown and HTML show literally."""
    line = " ".join(text.encode(errors="replace").decode().split())
    return re.sub(r"([\\`*_{}\[\]()#+!|~<>:-])", r"\\\1", html.escape(line, quote=False)) or "(no name)"


def describe_composites(manifest: Mapping[str, Any]) -> str:
    """The parts of a compensated set on one line: bases, compensators, labels, teachers."""
    tensors = manifest["tensors"]
    real = "images.scale" not in tensors and tensors["images"]["dtype"] == "uint8"
    bases = f"{tensors['images']['shape'][0]} {'real' if real else 'free'} bases"
    teachers = sum(name.startswith("teachers.") and name.endswith(".params") for name in tensors)
    networks = f"{teachers} {'teacher' if teachers == 1 else 'teachers'}" if teachers else ""
    return ", ".join(filter(None, [bases, _compensators(tensors), _soft_labels(manifest), networks]))


def describe_grids(manifest: Mapping[str, Any]) -> str:
    """What a set of grids holds, on one line: its stored images and what is in each."""
    stored, factor = manifest["tensors"]["images"]["shape"][0], manifest["factor"]
    return f"{stored} stored images, each a grid of {factor} x {factor} smaller ones"


def _compensators(tensors: Mapping[str, Any]) -> str:
    if "compensators" not in tensors:
        return "no compensators"
    entry = tensors["compensators"]
    g, m = entry["shape"][:2]
    return f"{g} {'groups' if g > 1 else 'group'} of {m} {entry['dtype']} compensators"


def _soft_labels(manifest: Mapping[str, Any]) -> str:
    entry, k = manifest["tensors"].get("labels"), len(manifest["dataset"]["classes"])
    if entry is None:
        return "class numbers for labels"
    coded = "int8" if entry["shape"][1] == k else "int4"
    return f"{coded if entry['dtype'] == 'uint8' else entry['dtype']} logits for labels"


def _what_composites(manifest: Mapping[str, Any]) -> str:
    budget = manifest["budget"]
    mode = manifest["recipe"].get("labels")
    trained = {
        "hard": "They are trained on with the class of their base.",
        "static": "They are trained on with the mean logits of the teachers, computed once and stored.",
        "dynamic": "They are trained on with what the stored teachers say of each batch.",
    }
    lines = [
        f"{manifest['count']} training images, stored as `compensated` in {budget['total']} bytes: "
        f"{describe_composites(manifest)}. Its bytes, but for teachers, count as those of "
        f"{budget['ipc']} uint8 images a class.",
        "A composite is a base image plus a compensator: an additive image that all classes share, one for "
        "each teacher and group of bases. Each base is trained on as it is and once with each compensator of "
        "its group; sums of real pixels are clipped to [0, 1]. Composites are made when they are asked for "
        "and never stored: composite v * b + i is base i of b, with compensator v (0 is none).",
        trained.get(mode, "") if isinstance(mode, str) else "",
    ]
    return "\n\n".join(line for line in lines if line)


def _what_grids(manifest: Mapping[str, Any]) -> str:
    count, budget, factor = manifest["count"], manifest["budget"], manifest["factor"]
    stored = manifest["tensors"]["images"]["shape"][0]
    return "\n\n".join(
        [
            f"{count} synthetic training images, stored as `factored` in {budget['total']} bytes: "
            f"{describe_grids(manifest)}. The stored images are {budget['ipc']} for each class.",
            f"Each stored image is cut into {factor} x {factor} cells, and a cell is brought to full size by "
            "bilinear up-sampling (corners not aligned) when it is asked for: image "
            f"v * {stored} + i is cell v, counted row by row, of stored image i. Where {factor} does not "
            "divide a side, its first cells are a pixel longer.",
        ]
    )


def _pictured(manifest: Mapping[str, Any]) -> str:
    if manifest["kind"] == "factored":
        return "images as they are decoded, one row per class"
    if manifest["kind"] != "compensated":
        return "one row per class"
    return "bases, one row per class, and what compensators add to some of them"


def _what(manifest: Mapping[str, Any]) -> str:
    if manifest["kind"] == "compensated":
        return _what_composites(manifest)
    if manifest["kind"] == "factored":
        return _what_grids(manifest)
    ipc = manifest["budget"]["ipc"]
    each = f", {ipc} for each class" if ipc is not None else ""
    origin = "real" if manifest["kind"] == "subset" else "synthetic"
    return (
        f"{manifest['count']} {origin} training images{each}, stored as `{manifest['kind']}` in "
        f"{manifest['budget']['total']} bytes: a small set for training networks in place of its source."
    )


def _source(dataset: Mapping[str, Any]) -> str:
    c, h, w = dataset["shape"]
    data = f"Images: {c} x {h} x {w} (channels, height, width), {dataset['preprocessing']} preprocessing"
    return source_list(dataset, data)


def source_list(dataset: Mapping[str, Any], data: str) -> str:
    """Name, licence, fingerprint, `data` (a line on what it holds) and classes of the source."""
    names = dataset["classes"]
    shown = ", ".join(escape(name) for name in names[:CLASSES_SHOWN])
    more = f", and {len(names) - CLASSES_SHOWN} more" if len(names) > CLASSES_SHOWN else ""
    licence = escape(dataset["licence"]) if dataset["licence"] else "not stated by the source"
    return "\n".join(
        [
            f"- Dataset: {escape(dataset['name'])}",
            f"- Licence of the source: {licence}",
            f"- Fingerprint (SHA-256 of the source data): `{escape(dataset['fingerprint'] or 'unknown')}`",
            f"- {data}",
            f"- {len(names)} classes, in label order: {shown}{more}",
        ]
    )


def _contents(manifest: Mapping[str, Any]) -> str:
    budget = manifest["budget"]
    parts = ", ".join(f"{part} {budget[part]}" for part in ("images", "labels", "extras"))
    total = f"total {budget['total']}; preprocessing matrices {budget['preprocessing']}."
    return f"{tensor_table(manifest)}\n\nBytes: {parts}, {total}"


def tensor_table(manifest: Mapping[str, Any]) -> str:
    """The stored tensors, their types and shapes."""
    rows = [f"| {n} | {t['dtype']} | {t['shape']} |" for n, t in sorted(manifest["tensors"].items())]
    return "\n".join(["`data.safetensors`:\n", "| tensor | type | shape |", "|---|---|---|", *rows])


def _load(manifest: Mapping[str, Any]) -> str:
    kinds = {"class": "class numbers", "prob": "class probabilities", "logit": "class logits"}
    labels = kinds[manifest["y_kind"]]
    lazily = "`DistilledSet.composites()` gives them a batch at a time, by `take(indices)`."
    return "\n".join(
        [
            "```python",
            "from synth import DistilledSet",
            'images = DistilledSet.load("path/to/this/folder").decode()',
            f"x, y = images.x, images.y  # float32 [n, c, h, w] in model-input space, and {labels}",
            "```",
            "",
            "`images.spec.denormalise(x)` gives pixels in [0, 1].",
            *([lazily] if manifest["kind"] == "compensated" else []),
            "`ddengine evaluate path/to/this/folder` trains fresh networks on the set, beside baselines.",
        ]
    )


def json_block(value: Mapping[str, Any]) -> str:
    """A table from the manifest as a block of JSON, or that it was not recorded.

    Without the folders and the machine of whoever made the set: a card is there to be published.
    """
    # Indented JSON never starts a line with a fence, so its texts cannot end the block.
    return f"```json\n{json.dumps(_public(value), indent=1)}\n```" if value else "Not recorded."


def _public(value: Any) -> Any:
    if not isinstance(value, Mapping):
        return value
    return {key: _public(held) for key, held in value.items() if key not in PRIVATE}
