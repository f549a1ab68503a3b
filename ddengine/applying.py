"""What a distilled set is good for beyond its accuracy: downstream tasks, and what it gives away."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from ddengine import files
from ddengine.artefacts import artefact, holds_graphs
from ddengine.audit import audit
from ddengine.composites import Composites
from ddengine.config import AuditConfig, ContinualConfig, NasConfig, RecipeConfig
from ddengine.continual import continual, set_memory
from ddengine.data import Dataset
from ddengine.downstream import ROWS
from ddengine.errors import UsageError
from ddengine.evaluating import recipe_given
from ddengine.given import Watch, device_of, load_named, precision_of
from ddengine.nas import convnet_space, nas
from ddengine.parallel import workers_of
from ddengine.protocols import STANDARD
from ddengine.rivals import label_mode
from ddengine.subject import check_same, chosen
from ddengine.train import Recipe
from ddengine.types import Images
from synth import DistilledSet

REFERENCE = 10  # times the search's steps that a network of reference takes where nobody says how many


def run_continual(path: Path, config: ContinualConfig, watch: Watch) -> dict[str, Any]:
    """`ddengine downstream continual PATH`: the table as plain JSON values.

    The memory is the set's images of the classes seen so far; a note says that a set which was distilled at
    once knows of later classes.
    """
    _require_place(config.out)
    distilled, dataset = _opened(path, config.dataset, watch)
    images, bar = _images(distilled), watch.bar("learning continually")
    table = continual(
        dataset,
        {"distilled": set_memory(images)},
        network=chosen(config, distilled)[0],
        recipe=_recipe(config.recipe, distilled, len(images)),
        steps=config.steps,
        orders=config.orders,
        networks=config.seeds,
        rows=ROWS if config.rows is None else config.rows,
        ipc=config.ipc or _ipc(distilled),
        nbytes={"distilled": distilled.nbytes},
        on_progress=lambda done, total: bar(done, total, {}),
        **_running(config),
    ).to_json()
    watch.notice("note: this set was distilled with all classes at once, which no memory of a stage could be")
    return _kept(table, config.out, "continual.json")


def run_nas(path: Path, config: NasConfig, watch: Watch) -> dict[str, Any]:
    """`ddengine downstream nas PATH`: the table as plain JSON values."""
    _require_place(config.out)
    for key, values in (("widths", config.widths), ("depths", config.depths), ("norms", config.norms)):
        if not values:
            raise UsageError(f"{key}=[] leaves no architecture to search", f"Give {key} one value or more")
    distilled, dataset = _opened(path, config.dataset, watch)
    images, bar = _images(distilled), watch.bar("searching")
    recipe = _recipe(config.recipe, distilled, len(images))
    longer = recipe_given(config.reference, {}, dataset.fit.spec.name, STANDARD) or recipe
    if config.reference.steps is None:
        longer = replace(longer, steps=REFERENCE * recipe.steps)
    table = nas(
        dataset,
        {"distilled": images},
        space=convnet_space(config.widths, config.depths, config.norms),
        recipe=recipe,
        reference_recipe=longer,
        rows=ROWS if config.rows is None else config.rows,
        ipc=config.ipc or _ipc(distilled),
        nbytes={"distilled": distilled.nbytes},
        seeds=config.seeds,
        on_progress=lambda done, total: bar(done, total, {}),
        **_running(config),
    ).to_json()
    return _kept(table, config.out, "nas.json")


def run_audit(path: Path, config: AuditConfig, watch: Watch) -> dict[str, Any]:
    """`ddengine audit PATH`: the findings as plain JSON values."""
    _require_place(config.out)
    distilled, dataset = _opened(path, config.dataset, watch, dynamic=True)
    bar = watch.bar("auditing")
    found = audit(
        distilled,
        dataset,
        network=chosen(config, distilled)[0],
        recipe=_recipe(config.recipe, distilled, len(_images(distilled))),
        networks=config.seeds,
        on_progress=lambda done, total: bar(done, total, {}),
        **_running(config),
    ).to_json()
    return _kept(found, config.out, "audit.json")


def _opened(path: Path, dataset: Any, watch: Watch, dynamic: bool = False) -> tuple[DistilledSet, Dataset]:
    """The set of images at `path` and its data, which must have its classes (else UsageError)."""
    distilled = DistilledSet.load(artefact(path))
    if holds_graphs(distilled):
        raise UsageError(f"{path} holds graphs, and this is for images", "Give a distilled set of images")
    if label_mode(distilled.manifest) == "dynamic" and not dynamic:
        raise UsageError(
            f"{path} has dynamic labels, which this task does not ask teachers for",
            "Give a set with hard or static labels",
        )
    loaded = load_named(dataset, watch)
    check_same(distilled, loaded, watch)
    return distilled, loaded


def _images(distilled: DistilledSet) -> Images | Composites:
    composites = distilled.composites()
    return distilled.decode() if composites is None else composites


def _recipe(config: RecipeConfig, distilled: DistilledSet, images: int) -> Recipe:
    name = distilled.spec.name
    given = recipe_given(config, distilled.manifest, name, STANDARD)
    return STANDARD.recipe_for(distilled.manifest, name, images) if given is None else given


def _ipc(distilled: DistilledSet) -> int | None:
    said = distilled.manifest["budget"].get("ipc")
    return said if type(said) is int else None


def _running(config: ContinualConfig | NasConfig | AuditConfig) -> dict[str, Any]:
    where = device_of(config.device)
    workers = workers_of(config.workers, where.type)
    precision = precision_of(config.precision, where)
    return {"seed": config.seed, "workers": workers, "device": str(where), "precision": precision}


def _require_place(out: str | None) -> None:
    """Refuse, before the work, a folder for its findings that is a file or lies in one (UsageError)."""
    path = None if out is None else Path(out).expanduser()
    for place in () if path is None else (path, *path.parents):
        if place.exists() and not place.is_dir():
            raise UsageError(f"out={out}: {place} is a file", "Choose another out=DIR")


def _kept(found: dict[str, Any], out: str | None, name: str) -> dict[str, Any]:
    """The findings, which with `out` are a file there too."""
    if out is not None:
        files.make_folder(Path(out).expanduser())
        files.write_json(Path(out).expanduser() / name, found)
    return found
