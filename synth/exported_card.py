"""The data card of a set on the Hugging Face hub: YAML that its readers take, then Markdown for people."""

import re
from collections.abc import Sequence
from typing import Any

import yaml

from synth.card import LIMITS, escape, json_block, source_list
from synth.exported_files import Contents

LICENCES = (
    "mit", "apache-2.0", "bsd-3-clause", "cc0-1.0", "cc-by-3.0", "cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0",
    "cc-by-nc-sa-4.0", "odc-by", "gpl-3.0",
)  # fmt: skip
SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"))
LARGEST = "n>1M"


def hub_card(contents: Contents, names: Sequence[str]) -> str:
    """README.md of a dataset on the hub; `names` are the class folders in label order."""
    # A line must not break, since one of dashes alone would end the YAML.
    head = yaml.safe_dump(_front(contents, names), sort_keys=False, allow_unicode=True, width=1 << 30)
    manifest = contents.manifest
    sections = [
        f"# Distilled set of {escape(manifest['dataset']['name'])}",
        _what(contents),
        "## Source",
        source_list(manifest["dataset"], _images(contents)),
        "## Load",
        _load(contents),
        "## Evaluation recipe",
        json_block(manifest["recipe"]),
        "## How it was made",
        json_block(manifest["provenance"]),
        "## Limits",
        LIMITS,
    ]
    return f"---\n{head}---\n\n" + "\n\n".join(sections)


def licence_fields(licence: str) -> dict[str, str]:
    """The hub's licence fields for a licence in free text: one it knows, "other" by name, or "unknown"."""
    words = re.sub(r"[^a-z0-9.]+", "-", licence.lower()).strip("-")
    if not words:
        return {"license": "unknown"}
    return {"license": words} if words in LICENCES else {"license": "other", "license_name": words}


def _front(contents: Contents, names: Sequence[str]) -> dict[str, Any]:
    images, dataset = contents.images, contents.manifest["dataset"]
    features: list[dict[str, Any]] = [{"name": "image", "dtype": "image"}, _label(names)]
    if images.y_kind != "class":
        features.append({"name": "soft_label", "list": "float64"})
    return {
        **licence_fields(dataset["licence"]),
        "pretty_name": " ".join(f"Distilled set of {dataset['name']}".split()),
        "task_categories": ["image-classification"],
        "size_categories": [next((text for size, text in SIZES if len(images) < size), LARGEST)],
        "tags": ["dataset-distillation", "synthetic", "ddengine"],
        "configs": [{"config_name": "default", "data_files": [{"split": "train", "path": "train/**"}]}],
        "dataset_info": {"config_name": "default", "features": features},
    }


def _label(names: Sequence[str]) -> dict[str, Any]:
    numbered = {str(i): name for i, name in enumerate(names)}
    return {"name": "label", "dtype": {"class_label": {"names": numbered}}}


def _what(contents: Contents) -> str:
    lines = [
        f"{len(contents.images)} training images as 8-bit PNG files: a small set for training networks in "
        "place of its source."
    ]
    if contents.images.y_kind != "class":
        kind = {"prob": "probabilities", "logit": "logits"}[contents.images.y_kind]
        lines.append(f"The column `soft_label` has {kind} of the classes; `label` is the largest of them.")
    if contents.student_lr is not None:
        lines.append(f"A learning rate for SGD was learned with it: {contents.student_lr:.9g}.")
    return "\n\n".join(lines)


def _images(contents: Contents) -> str:
    spec = contents.images.spec
    c, h, w = spec.shape
    how = f"normalise pixels in [0, 1] with mean {_short(spec.mean)} and std {_short(spec.std)}"
    if spec.zca is not None:
        how = "the set was made for ZCA-whitened input, whose matrix is not in PNG files"
    return f"Images: {c} x {h} x {w} (channels, height, width); {how}"


def _short(values: Sequence[float]) -> list[float]:
    return [round(v, 6) for v in values]


def _load(contents: Contents) -> str:
    return "\n".join(
        [
            "```python",
            "from datasets import load_dataset",
            'train = load_dataset("imagefolder", data_dir="path/to/this/folder")["train"]',
            "```",
        ]
    )
