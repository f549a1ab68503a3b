"""Where names meet classes: each command as a short, linear recipe, and the same for Python callers."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, is_dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import nn

import matchers
from ddengine import data, files, graph_judge, graph_paper, judge, loop
from ddengine.artefacts import artefact, holds_graphs, named, run_of
from ddengine.config import (
    BufferConfig,
    CheckpointConfig,
    DatasetConfig,
    DistillConfig,
    EvaluateConfig,
    EvaluateGraphsConfig,
    GraphDatasetConfig,
    ImportConfig,
    NetworkConfig,
    RecipeConfig,
)
from ddengine.data import Dataset, GraphDataset
from ddengine.errors import ArtefactError, UsageError, require, require_positive, unknown
from ddengine.graph_train import GraphRecipe
from ddengine.graphs import Graphs, as_graph_source
from ddengine.nets.core import NetSpec
from ddengine.ops.dag import Trees, trees_of
from ddengine.ops.dsa import strategy_for
from ddengine.tables import Table
from ddengine.train import Recipe, recipe_of
from ddengine.types import Budget, Images, Matcher, Task, as_source, class_order
from expert_buffers import legacy, record
from expert_buffers.recipes import ExpertRecipe
from expert_buffers.store import ExpertBuffer
from matchers.tree_evidence import graph_labels
from synth import DistilledSet

Progress = Callable[[int, int, Mapping[str, float]], None]
Notice = Callable[[str], None]


@dataclass(frozen=True)
class Watch:
    """Where a recipe tells what it does: `notice` takes lines, `bar(title)` gives a progress callback."""

    notice: Notice = lambda text: None
    bar: Callable[[str], Progress] = lambda title: lambda done, total, values: None


def task(
    source: str | Images | Graphs | Dataset | GraphDataset,
    *,
    ipc: int | None = None,
    nbytes: int | None = None,
    experts: Any = None,
    device: str = "auto",
    precision: str = "auto",
    workers: int = 1,
    **load: Any,
) -> Task:
    """What a matcher works on: a dataset's name, a loaded dataset, Images or Graphs.

    `load` goes to `ddengine.data.load` with the name, for a collection of graph sets to `load_graphs`, as in
    `task("tu", name="MUTAG", ipc=5)`. Give `ipc` images or items per class or `nbytes`; graphs need neither
    where the matcher sets the size. Of a dataset only the fit part is taken. Raises UsageError.
    """
    where = _device(device)
    graphs = isinstance(source, Graphs | GraphDataset) or source in data.GRAPH_COLLECTIONS
    budget = None if graphs and ipc is None and nbytes is None else Budget(ipc, nbytes)
    made: dict[str, Any] = {"budget": budget, "experts": experts, "device": where, "workers": workers}
    precise = _precision(precision, where)
    if load and not isinstance(source, str):
        raise UsageError(f"{next(iter(load))} is for a dataset's name, not for loaded images", "Leave it out")
    if isinstance(source, Images):
        return Task(as_source(source), **made, precision=precise)
    if isinstance(source, Graphs):
        return Task(as_graph_source(source), **made, precision=precise)
    if isinstance(source, Dataset | GraphDataset):
        return Task(source.fit, **made, precision=precise, origin={"name": source.fit.spec.name})
    if source in data.GRAPH_COLLECTIONS:
        loaded = data.load_graphs(source, **{"name": "", **load})
        return Task(loaded.fit, **made, precision=precise, origin={"collection": source, **_plain(load)})
    dataset = data.load(source, **load)
    return Task(dataset.fit, **made, precision=precise, origin={"name": source, **_plain(load)})


def matcher(name: str, *, network: str | NetSpec | None = None, **options: Any) -> Matcher[Any]:
    """The matcher called `name`, as in `matcher("attention", steps=500)` (UsageError for unknown names)."""
    return matchers.make(name, NetSpec(network) if isinstance(network, str) else network, **options)


def evaluate(
    path: str | Path | DistilledSet,
    *,
    dataset: str | Dataset | GraphDataset | None = None,
    networks: Sequence[str | NetSpec] | None = None,
    protocol: str = graph_judge.PROTOCOL,
    seeds: int = 5,
    seed: int = 0,
    rows: Sequence[str] | None = None,
    recipe: Recipe | GraphRecipe | None = None,
    experts: str | Path | ExpertBuffer | None = None,
    workers: int = 1,
    device: str = "auto",
    precision: str = "auto",
    watch: Watch = Watch(),
    out: Path | None = None,
    **load: Any,
) -> Table:
    """Judge a distilled set by `standard-v1`; dataset, networks, recipe default to what its manifest names.

    Rows default to those of the set's kind; a set of graphs goes to `evaluate_graphs`, whose networks are
    trained on the CPU in fp32. The last checkpoints of `experts` are the teachers that label, else those
    stored in the set. With `out`, or for the set of a run, each trained network is one line of
    `results.jsonl` there, and the newest table is `table.json`. Raises UsageError.
    """
    distilled = path if isinstance(path, DistilledSet) else DistilledSet.load(artefact(Path(path)))
    _check_kind(distilled, dataset, recipe)
    if holds_graphs(distilled):
        if experts is not None:
            raise UsageError("experts are teachers for images, the set holds graphs", "Leave experts out")
        require(device, ("auto", "cpu"), "device for graph networks")
        require(precision, ("auto", "fp32"), "precision for graph networks")
        given: dict[str, Any] = {"dataset": dataset, "recipe": recipe, "networks": networks, "seeds": seeds}
        given |= {"seed": seed, "workers": workers, "watch": watch, "out": out, **load}
        return evaluate_graphs(path, **given, rows=rows, protocol=protocol)
    require(protocol, (graph_judge.PROTOCOL,), "protocol for a set of images")
    assert not isinstance(recipe, GraphRecipe)
    if not isinstance(dataset, Dataset):
        own = named(distilled, "dataset") if dataset is None else {"name": dataset}
        dataset = data.load(**{**own, **load})
    _check_same(distilled, dataset, watch)
    specs = _networks(networks, NetSpec(**named(distilled, "network")))
    teachers = _teachers(experts, distilled, watch)
    where = _device(device)
    folder = out or (run_of(Path(path)) if not isinstance(path, DistilledSet) else None)
    if folder is not None:
        files.make_folder(folder)
    bar = watch.bar("evaluating")
    table = judge.evaluate(
        distilled,
        dataset,
        networks=specs,
        seeds=seeds,
        seed=seed,
        rows=rows,
        recipe=recipe,
        teachers=teachers,
        workers=workers,
        device=str(where),
        precision=_precision(precision, where),
        log=(lambda record: files.append_json_line(folder / "results.jsonl", record)) if folder else None,
        on_progress=lambda done, total: bar(done, total, {}),
    )
    if folder is not None:
        files.write_json(folder / "table.json", table.to_json())
    return table


def _teachers(
    experts: str | Path | ExpertBuffer | None, distilled: DistilledSet, watch: Watch
) -> list[nn.Module]:
    """Who labels for the row of same labels: the teachers in the set, else those experts that labelled it.

    Experts are taken as they ended, in eval mode; UsageError for a buffer that did not label the set.
    """
    own, said = distilled.teachers(), distilled.manifest["recipe"].get("labelled_by")
    if experts is None:
        if not own and isinstance(said, dict):
            watch.notice(
                "note: experts=DIR, the buffer that labelled this set, adds the row random_same_labels"
            )
        return own
    if own:
        raise UsageError("the set brings its own teachers, experts were given too", "Leave experts out")
    buffer = experts if isinstance(experts, ExpertBuffer) else ExpertBuffer(Path(experts).expanduser())
    buffer.check(distilled.spec)
    numbers = list(range(len(buffer)))
    if isinstance(said, dict):
        if said.get("digest") != buffer.digest:
            raise UsageError(
                f"the experts of {buffer.root} are not those that labelled the set",
                "Give the buffer that it was made with, as it was then, or leave experts out",
            )
        named = said.get("experts")
        if (
            not isinstance(named, list)
            or not named
            or any(type(i) is not int or i not in numbers for i in named)
        ):
            raise ArtefactError(
                f"the set's recipe.labelled_by names the experts {named}", "Make the set again"
            )
        numbers = named
    elif distilled.manifest["y_kind"] == "class":
        raise UsageError("experts were given, and the set has hard labels", "Leave experts out")
    return [buffer.build(i, buffer.epochs(i)).eval() for i in numbers]


def evaluate_graphs(
    path: str | Path | DistilledSet,
    *,
    dataset: str | GraphDataset | None = None,
    networks: Sequence[str | NetSpec] | None = None,
    protocol: str = graph_judge.PROTOCOL,
    seeds: int = 5,
    seed: int = 0,
    rows: Sequence[str] | None = None,
    recipe: GraphRecipe | None = None,
    workers: int = 1,
    watch: Watch = Watch(),
    out: Path | None = None,
    **load: Any,
) -> Table:
    """Judge a distilled set of graphs, as `evaluate` does one of images (`graph_judge.evaluate_graphs`).

    `load` are arguments of `ddengine.data.load_graphs` that replace those which the manifest names; `dataset`
    is a loaded set or the name of another collection. `paper/mirage` has a recipe and seeds of its own.
    """
    distilled = path if isinstance(path, DistilledSet) else DistilledSet.load(artefact(Path(path)))
    if not holds_graphs(distilled):
        raise UsageError(f"the set of '{distilled.spec.name}' holds images, not graphs", "Call evaluate")
    _check_kind(distilled, dataset, recipe)
    if not isinstance(dataset, GraphDataset):
        own = named(distilled, "dataset") if dataset is None else {"collection": dataset, "name": ""}
        dataset = data.load_graphs(**{**own, **load})
    _check_same(distilled, dataset, watch)
    usual = NetSpec(**_own(distilled, protocol))
    specs = [replace(spec, depth=spec.depth or usual.depth) for spec in _networks(networks, usual)]
    recipe = recipe or GraphRecipe()
    if protocol == graph_paper.PAPER:
        decoded = distilled.decode()
        hops = decoded.dag.hops if isinstance(decoded, Trees) else None
        specs, recipe, seeds = graph_paper.as_published(specs, hops, dataset.spec.name, recipe, seeds)
    folder = out or (run_of(Path(path)) if not isinstance(path, DistilledSet) else None)
    if folder is not None:
        files.make_folder(folder)
    bar = watch.bar("evaluating")
    labeler = _graph_labels if distilled.manifest["y_kind"] == "prob" else None
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
        log=(lambda record: files.append_json_line(folder / "results.jsonl", record)) if folder else None,
        on_progress=lambda done, total: bar(done, total, {}),
    )
    if folder is not None:
        files.write_json(folder / "table.json", table.to_json())
    return table


def _graph_labels(graphs: Graphs, hops: int, degree: bool) -> torch.Tensor:
    return graph_labels(trees_of(graphs, hops, degree=degree))


def run_distill(config: DistillConfig, watch: Watch) -> loop.Result:
    """`ddengine distill`: load the fit part, run the matcher, keep everything in the run's folder."""
    if config.deterministic:
        torch.use_deterministic_algorithms(True)
    options = _tuples({key: value for key, value in vars(config.matcher).items() if key != "name"})
    if config.synth is not None:
        options["synth"] = _form(config.matcher.name, options, config.synth)
    algorithm = matchers.make(config.matcher.name, _spec(config.network), **options)
    unsaid = config.ipc is None and config.budget.nbytes is None
    budget = None if unsaid and not algorithm.accepts.budget else Budget(config.ipc, config.budget.nbytes)
    folder = Path(config.out or _default_out(config)).expanduser()
    where = _device(config.device)
    precision = _precision(config.precision, where, algorithm.accepts.bf16)
    schedule = _schedule(config.checkpoint)
    experts = ExpertBuffer(Path(config.experts).expanduser()) if config.experts else None
    dataset = _load(config.dataset, watch)
    workers = (os.cpu_count() or 1) if config.workers is None else config.workers
    work = Task(dataset.fit, budget, experts, where, precision, _given(config.dataset), workers)
    return loop.distill(
        work,
        algorithm,
        seed=config.seed,
        out=folder,
        schedule=schedule,
        progress=watch.bar(f"distilling {config.dataset.name}"),
        notice=watch.notice,
        config=OmegaConf.to_yaml({key: value for key, value in vars(config).items() if key != "defaults"}),
    )


def _form(name: str, options: Mapping[str, Any], synth: str) -> dict[str, Any]:
    """The options of a matcher's synthetic set, of the form that the command names."""
    if "synth" not in options:
        raise UsageError(
            f"synth={synth} means nothing to matcher={name}: what it makes has one form",
            "Leave synth out; attention, distribution and trajectory have it",
        )
    return {**options["synth"], "name": synth}


def run_buffer(config: BufferConfig, watch: Watch) -> ExpertBuffer:
    """`ddengine buffer`: load the fit part and train experts on it, into the folder of the buffer."""
    recipe = ExpertRecipe(**_tuples(vars(config.recipe)))
    require_positive("checkpoint.minutes", config.checkpoint.minutes)
    where = _device(config.device)
    precision = _precision(config.precision, where)
    names = [config.network.name] if config.networks is None else config.networks
    dataset = _load(config.dataset, watch)
    default = f"runs/{config.dataset.name}_{'+'.join(names)}_experts_seed{config.seed}"
    return record(
        dataset.fit,
        [replace(_spec(config.network), name=name) for name in names],
        Path(config.out or default),
        count=config.count,
        epochs=config.epochs,
        max_start_epoch=config.max_start_epoch,
        expert_epochs=config.expert_epochs,
        full_experts=config.full_experts,
        recipe=recipe,
        seed=config.seed,
        encoding=config.encoding,
        workers=(os.cpu_count() or 1) if config.workers is None else config.workers,
        device=str(where),
        precision=precision,
        save_minutes=config.checkpoint.minutes,
        progress=watch.bar(f"recording {config.dataset.name}"),
        notice=watch.notice,
        origin=_given(config.dataset),
    )


def run_import(paths: Sequence[Path], config: ImportConfig, watch: Watch) -> ExpertBuffer:
    """`ddengine import`: other tools' replay buffers as an expert buffer for the dataset that is named."""
    dataset = _load(config.dataset, watch)
    return legacy.convert(
        [path.resolve() for path in paths],
        Path(config.out).expanduser(),
        spec=dataset.fit.spec,
        network=_spec(config.network),
        origin=_given(config.dataset),
        encoding=config.encoding,
    )


def run_evaluate(path: Path, config: EvaluateConfig | EvaluateGraphsConfig, watch: Watch) -> Table:
    """`ddengine evaluate PATH`: the set, the data that its manifest or the command names, the whole table."""
    if isinstance(config, EvaluateGraphsConfig):
        return _run_evaluate_graphs(path, config, watch)
    distilled = DistilledSet.load(artefact(path))
    recipe = _recipe(config.recipe, distilled.manifest, distilled.spec.name)
    where = _device(config.device)
    _precision(config.precision, where)
    return evaluate(
        path,
        dataset=_load(config.dataset, watch),
        networks=_chosen(config, distilled),
        seeds=config.seeds,
        seed=config.seed,
        rows=config.rows,
        recipe=recipe,
        experts=config.experts,
        workers=(os.cpu_count() or 1) if config.workers is None else config.workers,
        device=config.device,
        precision=config.precision,
        watch=watch,
        out=Path(config.out).expanduser() if config.out else None,
    )


def _run_evaluate_graphs(path: Path, config: EvaluateGraphsConfig, watch: Watch) -> Table:
    recipe = GraphRecipe(**_tuples(vars(config.recipe)))
    return evaluate_graphs(
        path,
        dataset=_load(config.dataset, watch),
        networks=_chosen(config, DistilledSet.load(artefact(path))),
        protocol=config.protocol,
        seeds=config.seeds,
        seed=config.seed,
        rows=config.rows,
        recipe=recipe,
        workers=(os.cpu_count() or 1) if config.workers is None else config.workers,
        watch=watch,
        out=Path(config.out).expanduser() if config.out else None,
    )


def _chosen(config: EvaluateConfig | EvaluateGraphsConfig, distilled: DistilledSet) -> list[NetSpec]:
    """The networks to judge with; the manifest's own has its options there where the command gives none."""
    own = _own(distilled, getattr(config, "protocol", None))
    given = {key: value for key, value in vars(config.network).items() if key != "name" and value is not None}
    names = [config.network.name] if config.networks is None else config.networks
    return [NetSpec(**{**(own if name == own["name"] else {}), **given, "name": name}) for name in names]


def _own(distilled: DistilledSet, protocol: str | None) -> dict[str, Any]:
    """The network that the manifest names; the publication has a width and a depth of its own."""
    own = named(distilled, "network")
    return {"name": own["name"]} if protocol == graph_paper.PAPER else own


def _networks(names: Sequence[str | NetSpec] | None, own: NetSpec) -> list[NetSpec]:
    if names is None:
        return [own]
    return [(own if name == own.name else NetSpec(name)) if isinstance(name, str) else name for name in names]


def _check_kind(distilled: DistilledSet, *given: Any) -> None:
    graphs = holds_graphs(distilled)
    for value in given:
        if isinstance(value, (Dataset, Recipe) if graphs else (GraphDataset, GraphRecipe)):
            kind, other = ("graphs", "images") if graphs else ("images", "graphs")
            said = f"the set of '{distilled.spec.name}' holds {kind}, a {type(value).__name__} is for {other}"
            raise UsageError(said, f"Give a dataset and a recipe for {kind}")


def _check_same(distilled: DistilledSet, dataset: Dataset | GraphDataset, watch: Watch) -> None:
    mine, theirs = distilled.classes, dataset.spec.classes
    if mine != theirs:
        first = next(pair for pair in zip_longest(mine, theirs, fillvalue="nothing") if pair[0] != pair[1])
        raise UsageError(
            f"the set's {len(mine)} classes are not the {len(theirs)} of '{dataset.spec.name}': "
            f"'{first[0]}' there is '{first[1]}' here",
            "Evaluate with the dataset that the set was made from",
        )
    if distilled.manifest["recipe"].get("class_order", class_order(mine)) != class_order(mine):
        raise ArtefactError("the set's recipe.class_order is not that of its classes", "Make the set again")
    if distilled.spec.fingerprint != dataset.spec.fingerprint:
        if isinstance(dataset, GraphDataset) and distilled.spec.name == dataset.spec.name:
            raise UsageError(
                f"this '{dataset.spec.name}' or its split is not the one that the set was made from: "
                "graphs that the set knows may be among those to test on",
                "Give dataset.root and dataset.split as they were when it was distilled",
            )
        watch.notice(
            "warning: this dataset is not the one that the set was made from (their fingerprints differ)"
        )


def _load(config: Any, watch: Watch) -> Any:
    if isinstance(config, GraphDatasetConfig):
        graphs = data.load_graphs(**vars(config))
        for note in graphs.notes:
            watch.notice(note)
        return graphs
    dataset = data.load(
        config.name,
        root=config.root,
        size=config.size,
        preprocessing=config.preprocessing,
        on_error=config.on_error,
        download=config.download,
    )
    for note in dataset.notes:
        watch.notice(note)
    return dataset


def _given(config: DatasetConfig | GraphDatasetConfig) -> dict[str, Any]:
    """What of a dataset's configuration is not the default: enough to load it again."""
    default, values = type(config)(), _plain(vars(config))
    return {key: value for key, value in values.items() if value != getattr(default, key)}


def _plain(load: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `ddengine.data.load` that mean the same in any folder."""
    root = load.get("root")
    return {**load, **({} if root is None else {"root": str(Path(root).expanduser().absolute())})}


def _tuples(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options as matchers take them: tuples for lists, mappings for groups of options."""
    found = {key: tuple(value) if isinstance(value, list) else value for key, value in options.items()}
    return {key: vars(value) if is_dataclass(value) else value for key, value in found.items()}


def _spec(config: NetworkConfig) -> NetSpec:
    return NetSpec(config.name, config.width, config.depth, config.norm)


def _recipe(config: RecipeConfig, manifest: Mapping[str, Any], dataset: str) -> Recipe:
    """The recipe of the set's manifest with what the command gives in its place."""
    given = {key: value for key, value in _tuples(vars(config)).items() if value is not None}
    if config.augment == "auto":
        given["augment"] = strategy_for(dataset)
    return replace(recipe_of(manifest, dataset), **given)


def _default_out(config: DistillConfig) -> str:
    size = f"ipc{config.ipc}" if config.ipc is not None else f"bytes{config.budget.nbytes or ''}"
    return f"runs/{config.dataset.name}_{config.matcher.name}_{size}_seed{config.seed}"


def _device(name: str) -> torch.device:
    if name not in ("auto", "cpu", "cuda") and not name.startswith("cuda:"):
        raise unknown("device", name, ("auto", "cpu", "cuda"))
    return loop.as_device(name)


def _schedule(config: CheckpointConfig) -> loop.Schedule:
    if config.steps is not None:
        require_positive("checkpoint.steps", config.steps)
    require_positive("checkpoint.minutes", config.minutes)
    return loop.Schedule(config.steps, config.minutes)


def _precision(name: str, device: torch.device, bf16: bool = True) -> str:
    require(name, ("auto", "fp32", "bf16"), "precision")
    if name == "auto":
        return "bf16" if device.type == "cuda" and bf16 else "fp32"
    return name
