"""The judge for graphs: fresh networks on a distilled set, beside trivial scores, real graphs and full data.

Epochs are fixed and every seed is reported (`standard-v1`); `paper/mirage` is that publication's selection,
under its own name. The judge knows nothing of how a set was made.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from ddengine.bench import SUBJECT, Log, Progress, Record
from ddengine.data.graph_source import GraphDataset
from ddengine.errors import UsageError, require, require_positive
from ddengine.graph_bench import (
    RULES,
    SAME_LABELS,
    UNTRAINED,
    GraphBench,
    GraphJob,
    needs_degree,
    run_graph_job,
    trees_for,
)
from ddengine.graph_paper import KEPT, PAPER
from ddengine.graph_simple import SIMPLE, simple_rows
from ddengine.graph_train import METRICS, GraphRecipe
from ddengine.graphs import Graphs, GraphSpec
from ddengine.nets.core import NetSpec
from ddengine.nets.graph import build_graph_networks, resolve_graph
from ddengine.ops.dag import Trees, histogram, trees_of
from ddengine.parallel import job_pool, one_thread
from ddengine.rng import Rng
from ddengine.scores import table_scores
from ddengine.tables import PROTOCOL, Row, Table, cost_of, label_networks, sizes_of
from synth.forest import as_stored
from synth.graph_starts import GRAPH_SELECTIONS, per_class, within_bytes
from synth.graph_subset import stored_graphs

GRAPH_ROWS = ("random_bytes", "herding_bytes", UNTRAINED, *SIMPLE, "full")
DRAWN_ANEW = ("random", "random_bytes", SAME_LABELS)
Labeler = Callable[[Graphs, int, bool], Tensor]


def usual_rows(soft: bool) -> tuple[str, ...]:
    """The rows beside a set whose labels are soft, or hard."""
    return (GRAPH_ROWS[0], SAME_LABELS, *GRAPH_ROWS[1:]) if soft else GRAPH_ROWS


@runtime_checkable
class JudgedGraphs(Protocol):
    """All that the judge sees of a distilled set of graphs."""

    @property
    def manifest(self) -> Mapping[str, Any]: ...

    @property
    def nbytes(self) -> Mapping[str, int]: ...

    def decode(self) -> Trees | Graphs: ...


@dataclass(frozen=True)
class _Size:
    """How real graphs are counted beside the set: colours of `hops` levels, with degrees or without."""

    hops: int
    degree: bool

    def nbytes(self, graphs: Graphs) -> dict[str, int]:
        """Bytes by part of real graphs in their smaller stored form."""
        return dict(stored_graphs(graphs, self.hops, self.degree).nbytes)


def evaluate_graphs(
    distilled: JudgedGraphs,
    dataset: GraphDataset,
    *,
    networks: Sequence[NetSpec],
    seeds: int = 5,
    seed: int = 0,
    rows: Sequence[str] = GRAPH_ROWS,
    recipe: GraphRecipe = GraphRecipe(),
    protocol: str = PROTOCOL,
    workers: int = 1,
    labeler: Labeler | None = None,
    log: Log | None = None,
    on_progress: Progress | None = None,
) -> Table:
    """Judge `distilled` beside `rows` with `seeds` fresh networks of each kind: two table rows for each, one
    of accuracy and one of the area under the ROC curve.

    Rows ending in `_bytes` hold as many real graphs as fit in the set's bytes, stored in the smaller of our
    two forms, and one of each class at least. The row `random_same_labels` needs the `labeler` of a
    soft-labelled set: it takes the fit part, hops and whether degrees are told apart, and gives
    probabilities [g k]. The result is a function of the arguments, not of `workers`. `log` gets a record for
    each trained network. Raises UsageError for networks that do not fit the set, unknown rows, a set of other
    classes or labels, a test part of one class; DDError when a worker process dies.
    """
    require(protocol, (PROTOCOL, PAPER), "protocol")
    resolved = [resolve_graph(net) for net in networks]
    decoded = distilled.decode()
    _check(decoded, dataset, resolved, rows, seeds, seed)
    if SAME_LABELS in rows and labeler is None:
        raise UsageError(
            f"the row {SAME_LABELS} is for sets with soft labels, and this one has hard labels",
            "Leave it out of rows",
        )
    size = _Size(max(net.depth or 0 for net in resolved), any(map(needs_degree, resolved)))
    with one_thread():
        soft = labeler(dataset.fit, size.hops, size.degree) if labeler and SAME_LABELS in rows else None
        bench = GraphBench(
            decoded,
            dataset.fit,
            dataset.validation,
            dataset.test,
            dict(_picks(dataset.fit, decoded, distilled.nbytes["total"], rows, size, seeds, seed)),
            recipe,
            seed,
            RULES[protocol == PAPER],
            None if soft is None else as_stored(soft),
        )
    records = _trained(bench, resolved, rows, seeds, workers, log, on_progress)
    table = [
        row
        for net, label in zip(resolved, label_networks(resolved), strict=True)
        for name in (SUBJECT, *rows)
        if name not in SIMPLE
        for row in _rows(bench, distilled, net, label, name, size, records, protocol)
    ]
    with one_thread():
        table += simple_rows([name for name in rows if name in SIMPLE], dataset, size.hops, size.nbytes)
    mine, theirs = decoded.spec.fingerprint, dataset.spec.fingerprint
    matches = mine == theirs if mine and theirs else None
    cost = cost_of(distilled.manifest)
    trained = seeds if protocol == PAPER else None
    parts, untested = sizes_of(dataset.spec.classes, dataset.fit, dataset.validation, dataset.test)
    return Table(
        dataset.spec.name,
        tuple(table),
        recipe,
        seed,
        cost,
        matches,
        scores=table_scores(table, decoded.y_kind != "class" if isinstance(decoded, Trees) else False),
        protocol=protocol,
        seeds=trained,
        fingerprint=dataset.spec.fingerprint,
        parts=parts,
        untested=untested,
    )


def _check(
    decoded: Trees | Graphs,
    dataset: GraphDataset,
    networks: Sequence[NetSpec],
    rows: Sequence[str],
    seeds: int,
    seed: int,
) -> None:
    for part in (dataset.validation, dataset.test):
        if sum(count > 0 for count in part.counts) < 2:
            raise UsageError(
                f"the validation or test part of '{dataset.spec.name}' has graphs of one class only",
                "Give a dataset or a split with two classes in each part",
            )
    chosen = (f"{name}{suffix}" for name in GRAPH_SELECTIONS for suffix in ("", "_bytes"))
    known = (*chosen, SAME_LABELS, UNTRAINED)
    for row in rows:
        require(row, (*known, *SIMPLE, "full"), "row")
    require_positive("seeds", seeds)
    if not networks or len(set(networks)) < len(networks) or len(set(rows)) < len(rows):
        raise UsageError("networks or rows are empty or repeat one another", "Give each network and row once")
    mine, theirs = decoded.spec, dataset.spec
    parts = ("classes", "node_sizes", "edge_sizes", "discretised")
    if any(getattr(mine, part) != getattr(theirs, part) for part in parts) or not _same_values(mine, theirs):
        raise UsageError(
            f"the set has {len(mine.classes)} classes and node labels {mine.node_sizes}, '{theirs.name}' "
            f"{len(theirs.classes)} and {theirs.node_sizes}, or their classes or edge labels differ",
            "Evaluate the set on the dataset that it was distilled from",
        )
    for net in networks:  # a network that does not fit is refused before any is trained
        generator = Rng(seed).torch("check")
        build_graph_networks(net, mine, [generator]).plan(trees_for(decoded, net))


def _same_values(mine: GraphSpec, theirs: GraphSpec) -> bool:
    """Whether the codes of continuous attributes stand for the same values."""
    pairs = ((mine.node_values, theirs.node_values), (mine.edge_values, theirs.edge_values))
    tables = [(a, b) for one, two in pairs for a, b in zip(one, two, strict=False)]
    nothing = torch.zeros(0)
    return all(torch.equal(*(nothing if v is None else v.float() for v in pair)) for pair in tables)


def _picks(
    fit: Graphs,
    decoded: Trees | Graphs,
    nbytes: int,
    rows: Sequence[str],
    size: _Size,
    seeds: int,
    seed: int,
) -> Iterator[tuple[tuple[str, int | None], Tensor]]:
    counts = histogram(trees_of(fit, size.hops, degree=size.degree))
    wider = max(0, len(fit.spec.classes) - 2)  # a soft label takes a byte for each class but one
    each = min(max(1, round(len(decoded) / len(fit.spec.classes))), *fit.counts)
    for row in rows:
        name = "random" if row == SAME_LABELS else row.removesuffix("_bytes")
        if name not in GRAPH_SELECTIONS:
            continue
        for index in (None, *range(seeds)) if row in DRAWN_ANEW else (None,):
            rng = Rng(seed).fold("judge", "pick", row, "trial" if index is None else index)
            limit = max(fit.counts) if row != name else each
            ranked = GRAPH_SELECTIONS[name](counts, fit.y, limit, rng)
            if row == name:
                yield (row, index), per_class(ranked, each)
            else:
                extra = wider if row == SAME_LABELS else 0

                def total(chosen: Tensor, extra: int = extra) -> int:
                    return size.nbytes(fit.take(chosen))["total"] + extra * len(chosen)

                least = per_class(ranked, 1)
                fits = total(least) <= nbytes
                yield (row, index), within_bytes(ranked, nbytes, total) if fits else least


def _trained(
    bench: GraphBench,
    networks: Sequence[NetSpec],
    rows: Sequence[str],
    seeds: int,
    workers: int,
    log: Log | None,
    on_progress: Progress | None,
) -> list[Record]:
    """Records of all networks: trials where there are several rates, then the final ones."""
    labelled = list(zip(networks, label_networks(networks), strict=True))
    pairs = [(net, label, row) for net, label in labelled for row in (SUBJECT, *rows) if row not in SIMPLE]
    trials = [
        GraphJob(net, label, row, lr)
        for net, label, row in pairs
        for lr in bench.recipe.lrs
        if len(bench.recipe.lrs) > 1 and row != UNTRAINED
    ]
    total, records = len(trials) + len(pairs) * seeds, list[Record]()
    with job_pool(run_graph_job, bench, workers) as results:

        def gather(jobs: Sequence[GraphJob]) -> None:
            for found in results(jobs):
                for record in found:
                    records.append(record)
                    if log is not None:
                        log(record)
                if on_progress is not None:
                    on_progress(len(records), total)

        gather(trials)
        finals = []
        for net, label, row in pairs:
            rate, numbers = _choose(records, bench.recipe, label, row), tuple(range(seeds))
            groups = [(i,) for i in numbers] if bench.drawn_anew(row) else [numbers]
            finals += [GraphJob(net, label, row, rate, group) for group in groups]
        gather(finals)
    return records


def _choose(tried: Sequence[Record], recipe: GraphRecipe, label: str, row: str) -> float:
    """The rate with the best validation accuracy of this network and row; the first of equals."""
    mine = [r for r in tried if (r["network"], r["row"], r["kind"]) == (label, row, "trial")]
    return max(mine, key=lambda record: record["validation"])["lr"] if mine else recipe.lrs[0]


def _rows(
    bench: GraphBench,
    distilled: JudgedGraphs,
    net: NetSpec,
    label: str,
    name: str,
    size: _Size,
    records: Sequence[Record],
    protocol: str,
) -> Iterator[Row]:
    mine = [record for record in records if (record["network"], record["row"]) == (label, name)]
    trials = [record for record in mine if record["kind"] == "trial"]
    finals = [record for record in mine if record["kind"] == "final"]
    if protocol == PAPER:
        finals = sorted(finals, key=lambda record: -record["validation_roc_auc"])[:KEPT]
    source = bench.training_set(name, None)
    nbytes = dict(distilled.nbytes)
    if name == UNTRAINED:
        nbytes = dict.fromkeys(nbytes, 0)
    elif name != SUBJECT:
        assert isinstance(source, Graphs)
        nbytes = size.nbytes(source)
        if name == SAME_LABELS:
            more = max(0, len(source.spec.classes) - 2) * len(source)
            nbytes |= {"labels": nbytes["labels"] + more, "total": nbytes["total"] + more}
    count = 0 if name == UNTRAINED else len(source)
    for metric in METRICS:
        yield Row(
            name=name,
            network=label,
            metric=metric,
            values=tuple(record[f"test_{metric}"] for record in finals),
            steps=finals[0]["steps"],
            nbytes=nbytes,
            lr=finals[0]["lr"],
            trials=tuple({"lr": record["lr"], "validation": record["validation"]} for record in trials),
            train_seconds=round(sum(record["seconds"] for record in mine), 3),
            count=count,
            ipc=round(count / len(bench.fit.spec.classes), 2),
            network_spec=net.to_dict(),
            seen_by_matcher=False,
        )
