"""The data card of a distilled set: README.md, written from the manifest alone."""

import html
import json
import re
from collections.abc import Mapping
from typing import Any

CLASSES_SHOWN = 200
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
            "![one row per class](preview.png)",
            "## Source",
            _source(manifest["dataset"]),
            "## Contents",
            _contents(manifest),
            "## Load",
            _load(manifest["y_kind"]),
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


def _what(manifest: Mapping[str, Any]) -> str:
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


def _load(y_kind: str) -> str:
    labels = {"class": "class numbers", "prob": "class probabilities", "logit": "class logits"}[y_kind]
    return "\n".join(
        [
            "```python",
            "from synth import DistilledSet",
            'images = DistilledSet.load("path/to/this/folder").decode()',
            f"x, y = images.x, images.y  # float32 [n, c, h, w] in model-input space, and {labels}",
            "```",
            "",
            "`images.spec.denormalise(x)` gives pixels in [0, 1].",
            "`ddengine evaluate path/to/this/folder` trains fresh networks on the set, beside baselines.",
        ]
    )


def json_block(value: Mapping[str, Any]) -> str:
    """A table from the manifest as a block of JSON, or that it was not recorded."""
    # Indented JSON never starts a line with a fence, so its texts cannot end the block.
    return f"```json\n{json.dumps(value, indent=1)}\n```" if value else "Not recorded."
