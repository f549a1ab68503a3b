"""Where names meet classes: each command as a short, linear recipe, and the same for Python callers."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

import matchers
from ddengine import data, loop, tracking
from ddengine.config import (
    BufferConfig,
    CheckpointConfig,
    DistillConfig,
    ImportConfig,
)
from ddengine.data import Dataset, GraphDataset
from ddengine.errors import UsageError, require_positive
from ddengine.given import (
    Progress,
    Watch,
    deterministic,
    device_of,
    given,
    load_named,
    network_spec,
    plain,
    precision_of,
    tuples,
)
from ddengine.graphs import Graphs, as_graph_source
from ddengine.nets import import_network, is_import_path
from ddengine.nets.core import NetSpec
from ddengine.parallel import workers_of
from ddengine.ranks import Ranks, check_replicas, joined
from ddengine.types import Budget, Images, Matcher, Task, as_source
from expert_buffers import legacy, record
from expert_buffers.recipes import ExpertRecipe
from expert_buffers.store import ExpertBuffer


def task(
    source: str | Images | Graphs | Dataset | GraphDataset,
    *,
    ipc: int | None = None,
    nbytes: int | None = None,
    experts: Any = None,
    device: str = "auto",
    precision: str = "auto",
    workers: int = 1,
    replicas: int = 1,
    **load: Any,
) -> Task:
    """What a matcher works on: a dataset's name, a loaded dataset, Images or Graphs.

    `load` goes to `ddengine.data.load` with the name, for a collection of graph sets to `load_graphs`, as in
    `task("tu", name="MUTAG", ipc=5)`. Give `ipc` images or items per class or `nbytes`; graphs need neither
    where the matcher sets the size. Of a dataset only the fit part is taken. Raises UsageError.
    """
    where = device_of(device)
    graphs = isinstance(source, Graphs | GraphDataset) or source in data.GRAPH_COLLECTIONS
    budget = None if graphs and ipc is None and nbytes is None else Budget(ipc, nbytes)
    made: dict[str, Any] = {"budget": budget, "experts": experts, "device": where, "workers": workers}
    made["replicas"] = replicas
    precise = precision if (precision, where.type) == ("auto", "cuda") else precision_of(precision, where)
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
        return Task(loaded.fit, **made, precision=precise, origin={"collection": source, **plain(load)})
    dataset = data.load(source, **load)
    return Task(dataset.fit, **made, precision=precise, origin={"name": source, **plain(load)})


def matcher(name: str, *, network: str | NetSpec | None = None, **options: Any) -> Matcher[Any]:
    """The matcher called `name`, as in `matcher("attention", steps=500)` (UsageError for unknown names)."""
    spec = NetSpec(network) if isinstance(network, str) else network
    if spec is not None and is_import_path(spec.name):
        import_network(spec.name)
    return matchers.make(name, spec, **options)


def run_distill(config: DistillConfig, watch: Watch) -> loop.Result:
    """`ddengine distill`: load the fit part, run the matcher, keep everything in the run's folder.

    Of several processes the first alone tells `watch` what happens.
    """
    algorithm, task_on, watch = *distillation(config), watch if Ranks.here().first else Watch()
    folder, schedule = distill_folder(config), schedule_of(config.checkpoint)
    names = tracking.chosen(config.track) if Ranks.here().first else ()
    followed = tracking.following(names, folder, tracking.settings(config), watch.notice)
    exact = deterministic(config.deterministic, watch.notice)
    with joined(device_of(config.device)) as ranks, followed as tell, exact:
        dataset = ranks.one_by_machine(lambda: load_named(config.dataset, watch))
        return loop.distill(
            task_on(dataset),
            algorithm,
            seed=config.seed,
            out=folder,
            schedule=schedule,
            progress=_told(watch.bar(f"distilling {config.dataset.name}"), tell),
            notice=watch.notice,
            config=OmegaConf.to_yaml({k: value for k, value in vars(config).items() if k != "defaults"}),
        )


def _told(show: Progress, tell: tracking.Tell) -> Progress:
    """Progress that is shown, and whose values are told to trackers."""

    def progress(done: int, total: int, values: Mapping[str, float]) -> None:
        show(done, total, values)
        tell(done, values)

    return progress


def distillation(
    config: DistillConfig,
) -> tuple[Matcher[Any], Callable[[Dataset | GraphDataset], Task]]:
    """The matcher of a configuration, and what makes its task of a dataset, after all else was checked."""
    options = tuples({key: value for key, value in vars(config.matcher).items() if key != "name"})
    if config.synth is not None:
        options["synth"] = _form(config.matcher.name, options, config.synth)
    algorithm = matchers.make(config.matcher.name, network_spec(config.network), **options)
    check_replicas(config.replicas, Ranks.here(), algorithm.accepts.replicas)
    unsaid = config.ipc is None and config.budget.nbytes is None
    budget = None if unsaid and not algorithm.accepts.budget else Budget(config.ipc, config.budget.nbytes)
    where = device_of(config.device)
    precision = precision_of(config.precision, where, algorithm.accepts.bf16)
    experts = ExpertBuffer(Path(config.experts).expanduser()) if config.experts else None
    origin, workers = given(config.dataset), workers_of(config.workers)

    def task_on(dataset: Dataset | GraphDataset) -> Task:
        return Task(dataset.fit, budget, experts, where, precision, origin, workers, replicas=config.replicas)

    return algorithm, task_on


def _form(name: str, options: Mapping[str, Any], synth: str) -> dict[str, Any]:
    """The options of a matcher's synthetic set, of the form that the command names."""
    if "synth" not in options:
        raise UsageError(
            f"synth={synth} means nothing to matcher={name}: what it makes has one form",
            "Leave synth out; attention, distribution, characteristic and trajectory have it",
        )
    return {**options["synth"], "name": synth}


def run_buffer(config: BufferConfig, watch: Watch) -> ExpertBuffer:
    """`ddengine buffer`: load the fit part and train experts on it, into the folder of the buffer.

    Trackers get where each expert ended, its number as the step.
    """
    networks, out, options = recording(config)
    names = tracking.chosen(config.track)
    made = record(
        load_named(config.dataset, watch).fit,
        networks,
        out,
        **options,
        progress=watch.bar(f"recording {config.dataset.name}"),
        notice=watch.notice,
    )
    with tracking.following(names, made.root, tracking.settings(config), watch.notice) as tell:
        for number in range(len(made)):
            entry = made.manifest["experts"][str(number)]
            tell(number, {key: entry[key] for key in ("loss", "accuracy") if entry[key] is not None})
    return made


def recording(config: BufferConfig) -> tuple[list[NetSpec], Path, dict[str, Any]]:
    """The networks, folder and options of a recording, as `record` takes them beside its source."""
    recipe = ExpertRecipe(**tuples(vars(config.recipe)))
    require_positive("checkpoint.minutes", config.checkpoint.minutes)
    where = device_of(config.device)
    precision = precision_of(config.precision, where)
    names = [config.network.name] if config.networks is None else config.networks
    default = f"runs/{config.dataset.name}_{'+'.join(names)}_experts_seed{config.seed}"
    same = ("count", "epochs", "max_start_epoch", "expert_epochs", "full_experts", "seed", "encoding")
    options = {
        **{key: getattr(config, key) for key in same},
        "recipe": recipe,
        "workers": workers_of(config.workers),
        "device": str(where),
        "precision": precision,
        "save_minutes": config.checkpoint.minutes,
        "origin": given(config.dataset),
    }
    networks = [replace(network_spec(config.network), name=name) for name in names]
    return networks, Path(config.out or default), options


def run_import(paths: Sequence[Path], config: ImportConfig, watch: Watch) -> ExpertBuffer:
    """`ddengine import`: other tools' replay buffers as an expert buffer for the dataset that is named."""
    dataset = load_named(config.dataset, watch)
    return legacy.convert(
        [path.resolve() for path in paths],
        Path(config.out).expanduser(),
        spec=dataset.fit.spec,
        network=network_spec(config.network),
        origin=given(config.dataset),
        encoding=config.encoding,
    )


def distill_folder(config: DistillConfig) -> Path:
    """The folder of a run: the one given, else one named after what it does."""
    size = f"ipc{config.ipc}" if config.ipc is not None else f"bytes{config.budget.nbytes or ''}"
    default = f"runs/{config.dataset.name}_{config.matcher.name}_{size}_seed{config.seed}"
    return Path(config.out or default).expanduser()


def schedule_of(config: CheckpointConfig) -> loop.Schedule:
    """How often a run saves (UsageError for a number that is not positive)."""
    if config.steps is not None:
        require_positive("checkpoint.steps", config.steps)
    require_positive("checkpoint.minutes", config.minutes)
    return loop.Schedule(config.steps, config.minutes)
