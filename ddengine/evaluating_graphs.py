"""Judging a set of graphs by name and path: its data, networks and recipe, then the judge for graphs."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ddengine import data, graph_judge, graph_paper
from ddengine.artefacts import artefact, holds_graphs, named, run_of
from ddengine.config import EvaluateGraphsConfig
from ddengine.data import GraphDataset
from ddengine.errors import UsageError
from ddengine.evaluated import write_table
from ddengine.given import Watch, load_named, tuples
from ddengine.graph_train import GraphRecipe
from ddengine.graphs import Graphs
from ddengine.locks import results_log
from ddengine.nets.core import NetSpec
from ddengine.ops.dag import Trees, trees_of
from ddengine.parallel import workers_of
from ddengine.subject import check_kind, check_same, chosen, networks_of, own_network
from ddengine.tables import Table
from matchers.tree_evidence import graph_labels
from synth import DistilledSet


def evaluate_graphs(
    path: str | Path | DistilledSet,
    *,
    dataset: str | GraphDataset | None = None,
    networks: Sequence[str | NetSpec] | None = None,
    protocol: str = graph_judge.PROTOCOL,
    seeds: int | None = None,
    seed: int = 0,
    rows: Sequence[str] | None = None,
    recipe: GraphRecipe | None = None,
    workers: int = 1,
    watch: Watch = Watch(),
    out: Path | None = None,
    command: str = "",
    **load: Any,
) -> Table:
    """Judge a distilled set of graphs, as `evaluate` does one of images (`graph_judge.evaluate_graphs`).

    `load` are arguments of `ddengine.data.load_graphs` that replace those which the manifest names; `dataset`
    is a loaded set or the name of another collection. `paper/mirage` has a recipe and seeds of its own.
    """
    distilled = path if isinstance(path, DistilledSet) else DistilledSet.load(artefact(Path(path)))
    if not holds_graphs(distilled):
        raise UsageError(f"the set of '{distilled.spec.name}' holds images, not graphs", "Call evaluate")
    check_kind(distilled, dataset, recipe)
    if not isinstance(dataset, GraphDataset):
        own = named(distilled, "dataset") if dataset is None else {"collection": dataset, "name": ""}
        dataset = data.load_graphs(**{**own, **load})
    check_same(distilled, dataset, watch)
    usual = NetSpec(**own_network(distilled, protocol))
    specs = [replace(spec, depth=spec.depth or usual.depth) for spec in networks_of(networks, usual)]
    recipe, seeds = recipe or GraphRecipe(), graph_paper.SEEDS if seeds is None else seeds
    if protocol == graph_paper.PAPER:
        decoded = distilled.decode()
        hops = decoded.dag.hops if isinstance(decoded, Trees) else None
        specs, recipe, seeds = graph_paper.as_published(specs, hops, dataset.spec.name, recipe, seeds)
    folder = out or (run_of(Path(path)) if not isinstance(path, DistilledSet) else None)
    bar = watch.bar("evaluating")
    labeler = _graph_labels if distilled.manifest["y_kind"] == "prob" else None
    with results_log(folder, watch.notice) as log:
        table = graph_judge.evaluate_graphs(
            distilled,
            dataset,
            networks=specs,
            protocol=protocol,
            seeds=seeds,
            seed=seed,
            rows=graph_judge.usual_rows(labeler is not None) if rows is None else rows,
            recipe=recipe,
            workers=workers,
            labeler=labeler,
            log=log,
            on_progress=lambda done, total: bar(done, total, {}),
        )
        table = replace(table, command=command)
        if folder is not None:
            write_table(folder, table.to_json(), path)
    return table


def run_evaluate_graphs(path: Path, config: EvaluateGraphsConfig, watch: Watch, command: str = "") -> Table:
    """`ddengine evaluate PATH` of a set of graphs."""
    recipe = GraphRecipe(**tuples(vars(config.recipe)))
    return evaluate_graphs(
        path,
        dataset=load_named(config.dataset, watch),
        networks=chosen(config, DistilledSet.load(artefact(path))),
        protocol=config.protocol,
        seeds=config.seeds,
        seed=config.seed,
        rows=config.rows,
        recipe=recipe,
        workers=workers_of(config.workers),
        watch=watch,
        out=Path(config.out).expanduser() if config.out else None,
        command=command,
    )


def _graph_labels(graphs: Graphs, hops: int, degree: bool) -> torch.Tensor:
    return graph_labels(trees_of(graphs, hops, degree=degree))
