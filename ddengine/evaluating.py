"""Judging by name and path: the set, its data, networks, recipe and teachers, then the judge of its kind."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import nn
from yaml import YAMLError

from ddengine import catalog, data, judge, tracking
from ddengine.artefacts import artefact, holds_graphs, named, run_of
from ddengine.config import EvaluateConfig, EvaluateGraphsConfig, RecipeConfig
from ddengine.data import Dataset, GraphDataset
from ddengine.errors import ArtefactError, UsageError, require, unknown
from ddengine.evaluated import write_table
from ddengine.evaluating_graphs import evaluate_graphs, run_evaluate_graphs
from ddengine.given import Watch, device_of, load_named, precision_of, tuples
from ddengine.graph_train import GraphRecipe
from ddengine.kept import Kept, kept_folder
from ddengine.locks import results_log
from ddengine.nets.core import NetSpec
from ddengine.ops.dsa import strategy_for
from ddengine.parallel import workers_of
from ddengine.protocols import STANDARD, Protocol, parse_protocol
from ddengine.subject import check_kind, check_same, chosen, networks_of
from ddengine.tables import Table
from ddengine.train import Recipe
from expert_buffers.store import ExpertBuffer
from synth import DistilledSet


def evaluate(
    path: str | Path | DistilledSet,
    *,
    dataset: str | Dataset | GraphDataset | None = None,
    networks: Sequence[str | NetSpec] | None = None,
    protocol: str | Protocol = STANDARD.name,
    seeds: int | None = None,
    seed: int = 0,
    rows: Sequence[str] | None = None,
    recipe: Recipe | GraphRecipe | None = None,
    robust: Sequence[str] = (),
    severity: int = 3,
    kept: str | Path | None = None,
    experts: str | Path | ExpertBuffer | None = None,
    workers: int = 1,
    device: str = "auto",
    precision: str = "auto",
    watch: Watch = Watch(),
    out: Path | None = None,
    command: str = "",
    **load: Any,
) -> Table:
    """Judge a distilled set by a protocol; dataset, networks, recipe default to what its manifest names.

    `protocol` is a name (`ddengine list protocols`), a YAML file or a Protocol. Rows default to those of the
    set's kind; a set of graphs goes to `evaluate_graphs`, whose networks are trained on the CPU in fp32. For
    `robust` and `severity` see `judge.evaluate`; rows that depend on data and recipe alone are kept in the
    folder `kept` for the next set. The last checkpoints of `experts` are the teachers that label, else those
    stored in the set. With `out`, or for the set of a run, each trained network is one line of
    `results.jsonl` there, and the newest table is `table.json`, with the `command` that was typed; beside it
    `set.json` says where the set lies, if not there. Raises UsageError, also where another process writes
    there.
    """
    distilled = path if isinstance(path, DistilledSet) else DistilledSet.load(artefact(Path(path)))
    check_kind(distilled, dataset, recipe)
    if holds_graphs(distilled):
        if experts is not None:
            raise UsageError("experts are teachers for images, the set holds graphs", "Leave experts out")
        require(device, ("auto", "cpu"), "device for graph networks")
        require(precision, ("auto", "fp32"), "precision for graph networks")
        given: dict[str, Any] = {"dataset": dataset, "recipe": recipe, "networks": networks, "seeds": seeds}
        given |= {"seed": seed, "workers": workers, "watch": watch, "out": out, "command": command, **load}
        if robust:
            raise UsageError("robust is for images, the set holds graphs", "Leave robust out")
        named_so = protocol if isinstance(protocol, str) else protocol.name
        return evaluate_graphs(path, **given, rows=rows, protocol=named_so)
    assert not isinstance(recipe, GraphRecipe)
    rules = protocol if isinstance(protocol, Protocol) else find_protocol(protocol)
    if recipe is not None and not rules.own_recipe:
        raise UsageError(f"protocol={rules.name} has a recipe of its own", "Leave recipe out")
    if not isinstance(dataset, Dataset):
        own = named(distilled, "dataset") if dataset is None else {"name": dataset}
        dataset = data.load(**{**own, **load})
    check_same(distilled, dataset, watch)
    specs = networks_of(networks, NetSpec(**named(distilled, "network")))
    teachers = teachers_of(experts, distilled, watch)
    where = device_of(device)
    folder = out or (run_of(Path(path)) if not isinstance(path, DistilledSet) else None)
    bar = watch.bar("evaluating")
    with results_log(folder, watch.notice) as log:
        table = judge.evaluate(
            distilled,
            dataset,
            networks=specs,
            protocol=rules,
            seeds=seeds,
            seed=seed,
            rows=rows,
            recipe=recipe,
            robust=robust,
            severity=severity,
            kept=None if kept is None else Kept(Path(kept).expanduser()),
            teachers=teachers,
            workers=workers,
            device=str(where),
            precision=precision_of(precision, where),
            log=log,
            on_progress=lambda done, total: bar(done, total, {}),
        )
        table = replace(table, command=command)
        if folder is not None:
            write_table(folder, table.to_json(), path)
    return table


def teachers_of(
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


def run_evaluate(
    path: Path, config: EvaluateConfig | EvaluateGraphsConfig, watch: Watch, command: str = ""
) -> Table:
    """`ddengine evaluate PATH`: the set, the data that its manifest or the command names, the whole table.

    The `command` as it was typed is kept in the table; trackers get the mean of each row, as one more step.
    """
    names = tracking.chosen(config.track)
    folder = Path(config.out).expanduser() if config.out else run_of(path)
    if names and folder is None:
        raise UsageError("track needs a folder to keep its files in", "Give out=DIR")
    if isinstance(config, EvaluateGraphsConfig):
        table = run_evaluate_graphs(path, config, watch, command)
    else:
        table = _run_images(path, config, watch, command)
    if folder is None:
        watch.notice("note: this table is not kept: with out=DIR it is, and ddengine report DIR shows it")
    else:
        means = {f"{row['network']}/{row['name']}": row["mean"] for row in table.to_json()["rows"]}
        with tracking.following(names, folder, tracking.settings(config), watch.notice) as tell:
            tell(None, means)
    return table


def _run_images(path: Path, config: EvaluateConfig, watch: Watch, command: str) -> Table:
    distilled = DistilledSet.load(artefact(path))
    rules = find_protocol(config.protocol)
    recipe = recipe_given(config.recipe, distilled.manifest, distilled.spec.name, rules)
    where = device_of(config.device)
    precision_of(config.precision, where)
    return evaluate(
        path,
        dataset=load_named(config.dataset, watch),
        networks=chosen(config, distilled),
        protocol=rules,
        seeds=config.seeds,
        seed=config.seed,
        rows=config.rows,
        recipe=recipe,
        robust=config.robust,
        severity=config.severity,
        kept=_kept(config.kept),
        experts=config.experts,
        workers=workers_of(config.workers, where.type),
        device=config.device,
        precision=config.precision,
        watch=watch,
        out=Path(config.out).expanduser() if config.out else None,
        command=command,
    )


def recipe_given(
    config: RecipeConfig, manifest: Mapping[str, Any], dataset: str, rules: Protocol
) -> Recipe | None:
    """The recipe of protocol and manifest with what the command gives in its place; None for that of both.

    Raises UsageError where the protocol's recipe may not be changed.
    """
    given = {key: value for key, value in tuples(vars(config)).items() if value is not None}
    if not given:
        return None
    if not rules.own_recipe:
        raise UsageError(
            f"protocol={rules.name} has a recipe of its own, and recipe.{min(given)} is given",
            "Leave recipe.* out",
        )
    if config.augment == "auto":
        given["augment"] = strategy_for(dataset)
    return replace(rules.recipe_for(manifest, dataset, 1), **given)


def _kept(given: str) -> Path | None:
    """The folder of kept rows that a command names: auto is the usual one, none is none."""
    return {"auto": kept_folder(), "none": None}.get(given, Path(given).expanduser())


def find_protocol(name: str) -> Protocol:
    """The protocol called `name`, ours or a publication's, or that of a YAML file (else UsageError)."""
    path = Path(name).expanduser()
    if name in catalog.PROTOCOLS:
        path = catalog.folder() / "protocols" / f"{name}.yaml"
        if not path.is_file():
            raise UsageError(
                f"protocol={name} is for graphs, the set holds images", "Give protocol=standard-v1"
            )
    elif path.suffix not in (".yaml", ".yml"):
        raise unknown("protocol", name, catalog.PROTOCOLS)
    try:
        values = OmegaConf.to_container(OmegaConf.load(path))
    except OSError as error:
        raise UsageError(f"cannot read the protocol {path}: {error.strerror}", "Give a YAML file") from error
    except (YAMLError, OmegaConfBaseException, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"{path} is no YAML: {reason}", "See configs/protocols for examples") from error
    found = parse_protocol(values, str(path))
    if found.name in catalog.PROTOCOLS and name != found.name:
        raise UsageError(
            f"{path} is named {found.name}, as one of ours is", "Give your protocol a name of its own"
        )
    return found
