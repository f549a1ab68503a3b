"""The honest table of graph condensation: every selection and every trivial score at equal bytes.

    python benchmarks/graph_table.py --root DIR [--sets NCI1 MUTAG] [--networks gin gcn gat]

Sets x networks x splits x budgets x rows, each row by five fresh networks under `standard-v1` (fixed steps,
two rates of which validation accuracy chooses, all seeds reported). A set without an official split has three
hashed ones. Rows are appended to results/graph_table.jsonl, and those that are there are kept;
`--summary` prints the Markdown table and computes nothing.
"""

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

import matchers
from ddengine import data, files, graph_judge, loop
from ddengine.data import GraphDataset
from ddengine.graph_bench import needs_degree
from ddengine.graphs import Graphs
from ddengine.nets.core import NetSpec
from ddengine.ops.dag import Trees, histogram, trees_of
from ddengine.parallel import one_thread
from ddengine.rng import Rng
from ddengine.tables import spread
from ddengine.types import Budget, Task
from matchers.tree_evidence import tree_scores
from synth.graph_starts import GRAPH_SELECTIONS, within_bytes
from synth.graph_subset import stored_graphs

OUT = Path(__file__).parent / "results" / "graph_table.jsonl"
SETS = {"NCI1": "tu", "MUTAG": "tu", "IMDB-BINARY": "tu", "ogbg-molbace": "ogb"}
NETWORKS, BUDGETS, SPLITS, HOPS = ("gin", "gcn", "gat"), (1500, 6000), 3, 2
MADE = {
    "evidence": {"select": "evidence"},
    "itemsets, closed": {"select": "itemsets"},
    "itemsets, closed, mean counts": {"select": "itemsets", "counts": "mean"},
}
SAME_LABELS = ("random", "herding")  # with the evidence model's labels in place of their own
Record = dict[str, Any]


@dataclass(frozen=True)
class Held:
    """A set in memory, as far as the judge sees one."""

    trees: Trees | Graphs
    nbytes: dict[str, int]
    manifest: dict[str, Any]

    def decode(self) -> Trees | Graphs:
        """What networks train on."""
        return self.trees


def made(dataset: GraphDataset, name: str, options: dict[str, Any], network: str, nbytes: int | None) -> Held:
    """What a matcher makes of the fit part."""
    budget = None if nbytes is None else Budget(nbytes=nbytes)
    task = Task(dataset.fit, budget)
    found = loop.distill(task, matchers.make(name, NetSpec(network), **options)).distilled
    return Held(found.decode(), dict(found.nbytes), found.manifest)


def relabelled(dataset: GraphDataset, selection: str, network: str, nbytes: int) -> Held:
    """Real graphs of `nbytes` bytes with the soft labels of the model behind the evidence."""
    degree = needs_degree(NetSpec(network))
    trees = trees_of(dataset.fit, HOPS, degree=degree)
    counts = histogram(trees)
    ranked = GRAPH_SELECTIONS[selection](counts, dataset.fit.y, max(dataset.fit.counts), Rng(0).fold("same"))

    def size(index: torch.Tensor) -> int:
        return stored_graphs(dataset.fit.take(index), HOPS, degree).nbytes["total"]

    index = within_bytes(ranked, nbytes, size)
    scores = torch.from_numpy(counts @ tree_scores(trees)[0].numpy()) / dataset.fit.nodes[:, None]
    chosen = trees_of(dataset.fit.take(index), HOPS, degree=degree)
    soft = replace(chosen, y=scores[index].softmax(1).float(), y_kind="prob")
    return Held(soft, dict(stored_graphs(dataset.fit.take(index), HOPS, degree).nbytes), {})


def cases(dataset: GraphDataset, network: str) -> Iterator[tuple[int | None, str, Any, tuple[str, ...]]]:
    """Budget, name, a function that makes the set, and the rows of the judge to take beside it."""
    free = ("untrained", "full", *(("size_only", "wl_logistic") if network == NETWORKS[0] else ()))
    name = dataset.spec.name
    for nbytes in BUDGETS:
        for row, options in MADE.items():
            beside = ("random_bytes", "herding_bytes", "kcenter_bytes") if row == "evidence" else ()
            beside += free if (row, nbytes) == ("evidence", BUDGETS[0]) else ()
            yield (
                nbytes,
                row,
                lambda o=options, b=nbytes: made(dataset, "computation_tree", o, network, b),
                beside,
            )
        for selection in SAME_LABELS:
            row = f"{selection}, same labels"
            yield nbytes, row, lambda s=selection, b=nbytes: relabelled(dataset, s, network, b), ()
    published = matchers.computation_tree.MIRAGE.get(name, ((), 0))
    if published[1]:
        options = {"variant": "mirage"}
        yield (
            None,
            "Mirage as published",
            lambda: made(dataset, "computation_tree", options, network, None),
            (),
        )


def rows(name: str, split: int, network: str, seeds: int, root: str, have: set[Any]) -> Iterator[Record]:
    """The missing records of one set, split and network."""
    dataset = data.load_graphs(SETS[name], name, root=root, split=split)
    for nbytes, row, make, beside in cases(dataset, network):
        if (name, split, network, nbytes, row) in have:
            continue
        began = time.process_time()
        try:
            held = make()
        except ValueError as error:  # Mirage's supports leave a class without a set on some splits
            yield {"set": name, "split": split, "network": network, "budget": nbytes, "row": row,
                   "refused": str(error).splitlines()[0]}  # fmt: skip
            continue
        seconds = time.process_time() - began
        table = graph_judge.evaluate_graphs(
            held, dataset, networks=[NetSpec(network)], seeds=seeds, rows=beside
        )
        for found in table.rows:
            made_here = found.name == "distilled"
            label = row if made_here else found.name
            yield {
                "set": name, "split": split, "network": network if found.lr is not None else found.network,
                "budget": nbytes if made_here or "bytes" in found.name else None, "row": label,
                "metric": found.metric, "values": list(found.values), "items": found.count,
                "bytes": found.nbytes["total"], "seconds": round(seconds, 3) if made_here else None,
            }  # fmt: skip


def summary(records: list[Record]) -> str:
    """For each set a Markdown table: ROC-AUC of every row and network, with interval, accuracy and cost."""
    parts = []
    for name in dict.fromkeys(r["set"] for r in records):
        lines = ["| bytes up to | row | network | ROC-AUC | 95 % | accuracy | n | items | bytes | s |",
                 "|--:|:--|:--|--:|--:|--:|--:|--:|--:|--:|"]  # fmt: skip
        mine = [r for r in records if r["set"] == name and "values" in r]
        keys = dict.fromkeys((r["budget"], r["row"], r["network"]) for r in mine)
        lines += [_line(key, mine) for key in sorted(keys, key=lambda key: (key[0] or 10**9, key[1], key[2]))]
        parts.append("\n".join([f"## {name}", "", *lines]))
    return "\n\n".join(parts)


def _line(key: tuple[int | None, str, str], records: list[Record]) -> str:
    """Mean ± standard deviation over all splits and seeds, and the interval of the mean."""
    mine = [r for r in records if (r["budget"], r["row"], r["network"]) == key]
    values = {m: [v for r in mine if r["metric"] == m for v in r["values"]] for m in ("roc_auc", "accuracy")}
    (auc, dev, ci), (right, spread_of, _) = spread(values["roc_auc"]), spread(values["accuracy"])
    items, nbytes, seconds = (
        sum(r[part] or 0 for r in mine) / len(mine) for part in ("items", "bytes", "seconds")
    )
    return (
        f"| {key[0] or ''} | {key[1]} | {key[2]} | {auc:.3f}{f' ± {dev:.3f}' if dev is not None else ''} "
        f"| {'' if ci is None else f'{ci[0]:.3f} to {ci[1]:.3f}'} "
        f"| {right:.3f}{f' ± {spread_of:.3f}' if spread_of is not None else ''} | {len(values['roc_auc'])} "
        f"| {items:.0f} | {nbytes:,.0f} | {f'{seconds:.1f}' if seconds else ''} |"
    )


def main() -> None:
    """Compute what is missing, or print what is there."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--root", default=None)
    parser.add_argument("--sets", nargs="*", default=list(SETS))
    parser.add_argument("--networks", nargs="*", default=list(NETWORKS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--summary", action="store_true")
    given = parser.parse_args()
    records = list(files.read_json_lines(OUT))
    if given.summary:
        print(summary(records))
        return
    have = {(r["set"], r["split"], r["network"], r["budget"], r["row"]) for r in records}
    for name in given.sets:
        for split in range(SPLITS if SETS[name] == "tu" else 1):
            for network in given.networks:
                with one_thread():
                    for record in rows(name, split, network, given.seeds, given.root, have):
                        files.append_json_line(OUT, record)
                        print(json.dumps(record), flush=True)


if __name__ == "__main__":
    main()
