"""The data card of a distilled set of graphs: README.md, from its manifest and what it decodes to."""

from collections.abc import Mapping
from typing import Any

import torch

from ddengine.graphs import Graphs
from ddengine.ops.dag import Trees
from synth.card import CLASSES_SHOWN, escape, json_block, source_list, tensor_table
from synth.schema import DATA, parts

LIMITS = """\
The items were made or chosen to train networks; they represent the source in no other sense.
They hold graphs of the source or pieces of them, and no guarantee of privacy is given.
Terms of the source's licence may apply to them.
"""


def graph_card(manifest: Mapping[str, Any], decoded: Trees | Graphs) -> str:
    """Markdown: what the set is, which networks may use it, its source, sizes, making, loading, evaluation.

    `manifest` has the "files" entry of the data. Names and texts from it are escaped, so that none can become
    markup.
    """
    return "\n\n".join(
        [
            f"# Distilled set of {escape(manifest['dataset']['name'])}",
            _what(manifest, decoded),
            "![items by class](preview.png)",
            "## Source",
            source_list(manifest["dataset"], _labels(manifest["dataset"])),
            "## Contents",
            _items(manifest["dataset"]["classes"], decoded),
            _inside(decoded),
            f"{tensor_table(manifest)}\n\n{_bytes(manifest)}",
            "## Networks",
            _networks(decoded),
            "## Load",
            _load(decoded),
            "## Evaluation recipe",
            json_block(manifest["recipe"]),
            "## How it was made",
            json_block(manifest["provenance"]),
            "## Limits",
            LIMITS,
        ]
    )


def _what(manifest: Mapping[str, Any], decoded: Trees | Graphs) -> str:
    ipc = manifest["budget"]["ipc"]
    each = f", {ipc} for each class" if ipc is not None else ""
    items = "multisets of computation trees" if isinstance(decoded, Trees) else "real graphs"
    return (
        f"{manifest['count']} training items ({items}){each}, stored as `{manifest['kind']}` in "
        f"{manifest['budget']['total']} bytes: a small set for training networks in place of its source."
    )


def _labels(dataset: Mapping[str, Any]) -> str:
    nodes = "degrees" if dataset["codes_from"] == "degree" else "labels of the data"
    sizes = " x ".join(str(size) for size in dataset["edge_sizes"])
    edges = f"edges: {sizes} codes" if sizes else "edges: no labels"
    made = "" if dataset["discretised"] == "none" else f"; continuous attributes by {dataset['discretised']}"
    return f"Nodes: {' x '.join(str(n) for n in dataset['node_sizes'])} codes ({nodes}); {edges}{made}"


def _items(classes: list[str], decoded: Trees | Graphs) -> str:
    counts = torch.bincount(decoded.classes, minlength=len(classes)).tolist()
    shown = [f"| {escape(n)} | {c} |" for n, c in zip(classes[:CLASSES_SHOWN], counts, strict=False)]
    left = len(classes) - len(shown)
    rest = [f"| {left} more | {sum(counts[CLASSES_SHOWN:])} |"] if left else []
    return "\n".join(["| class | items |", "|---|---|", *shown, *rest])


def _inside(decoded: Trees | Graphs) -> str:
    if isinstance(decoded, Graphs):
        nodes, edges = len(decoded.x), decoded.edge_index.shape[1]
        return f"{len(decoded)} graphs of {nodes} nodes and {edges} directed edges in all."
    sizes = " / ".join(str(size) for size in decoded.dag.sizes)
    labels = "class numbers" if decoded.y_kind == "class" else "class probabilities"
    weights = "of weight 1" if bool((decoded.weight == 1).all()) else "with weights"
    trees, hops = int(decoded.count.sum()), decoded.dag.hops
    return (
        f"{len(decoded)} items {weights} and {labels}, {trees} trees of {hops} hops in all. "
        f"Distinct trees of 0 to {hops} hops: {sizes}."
    )


def _bytes(manifest: Mapping[str, Any]) -> str:
    budget, stored = manifest["budget"], manifest["files"][DATA]["bytes"]
    counted = ", ".join(f"{part} {budget[part]}" for part in parts(manifest["kind"]) if part != "images")
    return f"Bytes: {counted}, total {budget['total']}; the file `{DATA}` has {stored}."


def _networks(decoded: Trees | Graphs) -> str:
    if isinstance(decoded, Graphs):
        return "Any network for graphs, of any number of layers."
    degree = (
        "Degrees are told apart in the trees, so that GCN may be used too."
        if decoded.dag.degree is not None
        else "Degrees are not told apart in the trees: GCN and others that norm by degree cannot be used."
    )
    return f"Message-passing networks of at most {decoded.dag.hops} layers. {degree}"


def _load(decoded: Trees | Graphs) -> str:
    name = "trees" if isinstance(decoded, Trees) else "graphs"
    said = "ddengine.ops.dag.Trees" if isinstance(decoded, Trees) else "ddengine.graphs.Graphs"
    return "\n".join(
        [
            "```python",
            "from synth import DistilledSet",
            f'{name} = DistilledSet.load("path/to/this/folder").decode()',
            f"y = {name}.y  # one label for each item; all fields: {said}",
            "```",
            "",
            "`ddengine evaluate path/to/this/folder` trains fresh networks on the set, beside baselines.",
        ]
    )
