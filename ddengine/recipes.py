"""Where names meet classes: each command of the tool as a short, linear recipe, and the same for Python callers."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

import matchers
from ddengine import data, files, judge, loop
from ddengine.config import DatasetConfig, DistillConfig, EvaluateConfig, NetworkConfig, RecipeConfig
from ddengine.data import Dataset
from ddengine.errors import ArtefactError, UsageError, require
from ddengine.nets.core import NetSpec
from ddengine.ops.dsa import strategy_for
from ddengine.tables import Table
from ddengine.train import Recipe
from ddengine.types import Budget, Images, Matcher, Task
from synth import DistilledSet, verify

Progress = Callable[[int, int, Mapping[str, float]], None]
Notice = Callable[[str], None]


@dataclass(frozen=True)
class Watch:
    """Where a recipe tells what it does: `notice` takes lines, `bar(title)` gives a progress callback."""

    notice: Notice = lambda text: None
    bar: Callable[[str], Progress] = lambda title: lambda done, total, values: None


def task(
    source: str | Images | Dataset,
    *,
    ipc: int | None = None,
    nbytes: int | None = None,
    experts: Any = None,
    device: str = "auto",
    precision: str = "auto",
    **load: Any,
) -> Task:
    """What a matcher works on: a dataset's name (with `load` for `ddengine.data.load`), a loaded dataset, or Images.

    Give `ipc` images per class or `nbytes`. Of a dataset only the fit part is taken. Raises UsageError.
    """
    where = loop.as_device(device)
    made = {"budget": Budget(ipc, nbytes), "experts": experts, "device": where}
    precise = _precision(precision, where)
    if isinstance(source, Images):
        return Task(source.sorted_by_class(), **made, precision=precise)
    if isinstance(source, Dataset):
        return Task(source.fit, **made, precision=precise, origin={"name": source.fit.spec.name})
    dataset = data.load(source, **load)
    return Task(dataset.fit, **made, precision=precise, origin={"name": source, **_plain(load)})


def matcher(name: str, *, network: str | NetSpec | None = None, **options: Any) -> Matcher[Any]:
    """The matcher called `name`, for example `matcher("attention", steps=500)` (UsageError for unknown names)."""
    return matchers.make(name, NetSpec(network) if isinstance(network, str) else network, **options)


def evaluate(
    path: str | Path | DistilledSet,
    *,
    dataset: str | Dataset | None = None,
    networks: Sequence[str | NetSpec] | None = None,
    seeds: int = 5,
    seed: int = 0,
    rows: Sequence[str] = judge.ROWS,
    recipe: Recipe | None = None,
    workers: int = 1,
    device: str = "auto",
    precision: str = "auto",
    watch: Watch = Watch(),
    out: Path | None = None,
    **load: Any,
) -> Table:
    """Judge a distilled set by `standard-v1`; dataset and networks default to what its manifest names.

    With `out`, or for the set of a run, each trained network is one line of `results.jsonl` there.
    """
    distilled = path if isinstance(path, DistilledSet) else DistilledSet.load(artefact(Path(path)))
    named = distilled.manifest["recipe"]
    if not isinstance(dataset, Dataset):
        dataset = data.load(dataset, **load) if dataset else data.load(**{**_origin(distilled), **load})
    _check_same(distilled, dataset, watch)
    specs = _networks(networks, NetSpec(**(named.get("network") or {})))
    where = loop.as_device(device)
    folder = out or (run_of(Path(path)) if not isinstance(path, DistilledSet) else None)
    if folder is not None:
        files.make_folder(folder)
    bar = watch.bar("evaluating")
    return judge.evaluate(
        distilled,
        dataset,
        networks=specs,
        seeds=seeds,
        seed=seed,
        rows=rows,
        recipe=recipe,
        workers=workers,
        device=str(where),
        precision=_precision(precision, where),
        log=(lambda record: files.append_json_line(folder / "results.jsonl", record)) if folder else None,
        on_progress=lambda done, total: bar(done, total, {}),
    )


def run_distill(config: DistillConfig, watch: Watch) -> loop.Result:
    """`ddengine distill`: load the fit part, run the matcher, keep everything in the run's folder."""
    if config.deterministic:
        torch.use_deterministic_algorithms(True)
    options = {key: value for key, value in vars(config.matcher).items() if key != "name"}
    algorithm = matchers.make(config.matcher.name, _spec(config.network), **_tuples(options))
    budget = Budget(config.ipc, config.budget.nbytes)
    folder = Path(config.out or _default_out(config))
    dataset = _load(config.dataset, watch)
    where = loop.as_device(config.device)
    work = Task(dataset.fit, budget, None, where, _precision(config.precision, where), _given(config.dataset))
    schedule = loop.Schedule(config.checkpoint.steps, config.checkpoint.minutes)
    return loop.distill(
        work,
        algorithm,
        seed=config.seed,
        out=folder,
        schedule=schedule,
        progress=watch.bar(f"distilling {config.dataset.name}"),
        notice=watch.notice,
        config=OmegaConf.to_yaml(OmegaConf.structured(config)),
    )


def run_evaluate(path: Path, config: EvaluateConfig, watch: Watch) -> Table:
    """`ddengine evaluate PATH`: the set, the data that its manifest or the command names, the whole table."""
    distilled = DistilledSet.load(artefact(path))
    dataset = _load(config.dataset, watch)
    network = _spec(config.network)
    networks = [replace(network, name=name) if name != network.name else network for name in config.networks or []]
    return evaluate(
        path,
        dataset=dataset,
        networks=networks or [network],
        seeds=config.seeds,
        seed=config.seed,
        rows=config.rows,
        recipe=_recipe(config.recipe, distilled.spec.name),
        workers=config.workers or os.cpu_count() or 1,
        device=config.device,
        precision=config.precision,
        watch=watch,
        out=Path(config.out) if config.out else None,
    )


def manifest_overrides(path: Path) -> list[str]:
    """The overrides that make `evaluate` use the dataset and network which the manifest of the set at `path` names."""
    recipe = DistilledSet.load(artefact(path)).manifest["recipe"]
    dataset, network = dict(recipe.get("dataset") or {}), dict(recipe.get("network") or {})
    found = []
    for group, values in (("dataset", dataset), ("network", network)):
        name = values.pop("name", None)
        found += [f"{group}={name}"] if name else []
        found += [f"{group}.{key}={_quoted(value)}" for key, value in values.items() if value is not None]
    return found


def _quoted(value: Any) -> str:
    if not isinstance(value, str):
        return str(value).lower() if isinstance(value, bool) else str(value)
    return "'" + value.replace("\\", "\\\\").replace("'", "\\'") + "'"


def artefact(path: Path) -> Path:
    """The folder of the distilled set at `path`: itself, or `distilled` in a run's folder (else ArtefactError)."""
    for folder in (path, path / "distilled"):
        if (folder / "manifest.json").is_file():
            return folder
    if (path / "run.json").is_file():
        raise ArtefactError(f"the run {path} is not finished", "Repeat its distill command to go on")
    raise ArtefactError(f"{path} holds no distilled set", "Give the folder of a distilled set or of a finished run")


def run_of(path: Path) -> Path | None:
    """The run that the set at `path` belongs to, None for a set on its own."""
    folder = artefact(path).parent
    return folder if (folder / "run.json").is_file() else None


def _networks(names: Sequence[str | NetSpec] | None, named: NetSpec) -> list[NetSpec]:
    given = [named if name == named.name else NetSpec(name) if isinstance(name, str) else name for name in names or []]
    return given or [named]


def _check_same(distilled: DistilledSet, dataset: Dataset, watch: Watch) -> None:
    if distilled.classes != dataset.fit.spec.classes:
        raise UsageError(
            f"the set has {len(distilled.classes)} classes and the dataset {len(dataset.fit.spec.classes)}, "
            "or their names or order differ",
            "Evaluate with the dataset that the set was made from",
        )
    if distilled.spec.fingerprint != dataset.fit.spec.fingerprint:
        watch.notice("warning: this dataset is not the one that the set was made from (their fingerprints differ)")


def _origin(distilled: DistilledSet) -> dict[str, Any]:
    return dict(distilled.manifest["recipe"].get("dataset") or {"name": distilled.spec.name})


def _load(config: DatasetConfig, watch: Watch) -> Dataset:
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


def _given(config: DatasetConfig) -> dict[str, Any]:
    """What of a dataset's configuration is not the default: enough to load it again."""
    default = DatasetConfig(config.name)
    values = {**vars(config), "root": None if config.root is None else str(Path(config.root).absolute())}
    return {key: value for key, value in values.items() if key == "name" or value != getattr(default, key)}


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: str(value) if isinstance(value, Path) else value for key, value in values.items()}


def _tuples(options: Mapping[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in options.items()}


def _spec(config: NetworkConfig) -> NetSpec:
    return NetSpec(config.name, config.width, config.depth, config.norm)


def _recipe(config: RecipeConfig, dataset: str) -> Recipe:
    augment = strategy_for(dataset) if config.augment == "auto" else config.augment
    values = {key: value for key, value in vars(config).items() if key not in ("augment", "lrs")}
    return Recipe(lrs=tuple(config.lrs), augment=augment, **values)


def _default_out(config: DistillConfig) -> str:
    size = f"ipc{config.ipc}" if config.ipc is not None else f"bytes{config.budget.nbytes}"
    return f"runs/{config.dataset.name}_{config.matcher.name}_{size}_seed{config.seed}"


def _precision(name: str, device: torch.device) -> str:
    require(name, ("auto", "fp32", "bf16"), "precision")
    if name == "auto":
        return "bf16" if device.type == "cuda" else "fp32"
    return name


def summary(path: Path) -> dict[str, Any]:
    """What `inspect` shows of the set at `path`, after its files were verified (plain JSON)."""
    folder = artefact(path)
    distilled = DistilledSet.load(folder)
    manifest = distilled.manifest
    keys = ("format", "version", "kind", "count", "y_kind", "tensors", "dataset", "budget", "recipe", "provenance")
    return {"path": str(folder), **{key: manifest[key] for key in keys}}


def summary_text(found: Mapping[str, Any]) -> str:
    """The same for people."""
    dataset, budget, made = found["dataset"], found["budget"], found["provenance"]
    network = (found["recipe"].get("network") or {}).get("name", "none")
    size = ", ".join(f"{key} {budget[key]:,}" for key in ("images", "labels", "extras", "total"))
    return "\n".join(
        [
            f"{found['path']}: {found['kind']}, {found['count']} images of {'x'.join(map(str, dataset['shape']))}",
            f"  source   {dataset['name']}, {len(dataset['classes'])} classes, {dataset['preprocessing']}",
            f"  bytes    {size}",
            f"  made by  {made['matcher']['type']}, {made['steps']} steps, {made['seconds']} s, seed {made['seed']}",
            f"  network  {network}",
        ]
    )


def verified(path: Path) -> list[str]:
    """The lines of `verify`: what was checked and found right (else ArtefactError)."""
    return verify(artefact(path))
