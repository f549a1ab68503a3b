"""Continual learning with distilled memories and architecture search on distilled sets, beside real images.

    python benchmarks/downstream.py --dataset fashion_mnist --root DIR [--task continual] [--task nas]

Attention matching makes the sets: for continual learning of each group of classes alone, as a memory that
grows would have it, and for comparison once of all classes; for the search once. Rows are appended to the
result file one by one, and a call that was cut off goes on with the next; the tables come last, on stdout.
Meant for about half an hour on two cores.
"""

import argparse
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import cache, partial
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

import matchers
from ddengine import data, files, loop
from ddengine.continual import Memory, continual, set_memory, staged_memory
from ddengine.continual_table import table_text as continual_text
from ddengine.data import Dataset
from ddengine.nas import Setting, compared, convnet_space, reference, search
from ddengine.nas_table import Scored
from ddengine.nas_table import table_text as nas_text
from ddengine.nets import NetSpec
from ddengine.ops.dsa import strategy_for
from ddengine.train import Recipe
from ddengine.types import Budget, Images, Task

HERE = Path(__file__).parent / "results"
MATCHING = {"real_per_class": 64, "lr": 4.0, "schedule": "cosine", "start": "kmeans"}
REAL = ("random", "herding", "full")


def main() -> None:
    o = arguments()
    dataset = data.load(o.dataset, root=o.root)
    for task in o.task or ("continual", "nas"):
        for text in {"continual": continual_tables, "nas": nas_tables}[task](dataset, o):
            print(text, flush=True)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dataset", default="fashion_mnist")
    parser.add_argument("--root")
    parser.add_argument("--task", action="append", choices=("continual", "nas"), help="both where not given")
    parser.add_argument("--ipc", type=int, default=10)
    parser.add_argument("--match", type=int, default=200, help="steps of attention matching")
    parser.add_argument("--width", type=int, default=16, help="of the matcher's and the learner's ConvNet")
    parser.add_argument("--steps", type=int, default=200, help="of every network, the reference's apart")
    parser.add_argument("--lrs", type=float, nargs="+", default=[0.003, 0.01], help="of the learners")
    parser.add_argument("--search-lrs", type=float, nargs="+", default=[0.01], help="of the search")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--stages", type=int, nargs="+", default=[5, 10])
    parser.add_argument("--orders", type=int, default=3)
    parser.add_argument("--reference", type=int, default=1000, help="steps of the search's reference")
    parser.add_argument("--widths", type=int, nargs="+", default=[8, 16, 32])
    parser.add_argument("--depths", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--norms", nargs="+", default=["none", "instance", "batch"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", type=Path, default=HERE / "downstream.jsonl")
    return parser.parse_args()


def kept(o: argparse.Namespace, task: str, row: str, make: Callable[[], dict[str, Any]], *more: str) -> Any:
    """What `make` found for a row, from the result file where the same settings are there already."""
    keys = ("dataset", "ipc", "match", "width", "steps", "batch", "seed", *more)
    setting = {"task": task, "row": row, **{key: getattr(o, key) for key in keys}}
    for record in files.read_json_lines(o.out):
        if record["setting"] == setting:
            return record["found"]
    began = perf_counter()
    found = make()
    spent = {"seconds": round(perf_counter() - began, 1), "workers": o.workers}
    versions = {"torch": torch.__version__, "python": platform.python_version()}
    files.append_json_line(o.out, {"setting": setting, "found": found, **spent, **versions})
    print(f"{task} {row}: {spent['seconds']:.0f} s", flush=True)
    return found


def recipe_of(o: argparse.Namespace, dataset: Dataset, **changes: Any) -> Recipe:
    """One recipe for every row."""
    given: dict[str, Any] = {"steps": o.steps, "lrs": tuple(o.lrs), "batch_size": o.batch}
    return Recipe(**given | {"augment": strategy_for(dataset.spec.name)} | changes)


def distilled(source: Images, o: argparse.Namespace) -> Images:
    """The images that attention matching makes of a source."""
    matcher = matchers.make("attention", NetSpec("convnet", width=o.width), steps=o.match, **MATCHING)
    return loop.distill(Task(source, Budget(ipc=o.ipc)), matcher, seed=o.seed).distilled.decode()


def continual_tables(dataset: Dataset, o: argparse.Namespace) -> Iterator[str]:
    """A table for each number of stages."""
    staged = staged_memory(dataset.fit, lambda images: distilled(images, o))
    whole = cache(lambda: set_memory(distilled(dataset.fit, o)))
    memories: dict[str, Memory | None] = {
        "distilled": staged,
        "distilled_at_once": lambda groups, order: whole()(groups, order),
        **dict.fromkeys(REAL),
    }
    for stages in o.stages:
        name = f"continual_{stages}"
        makes = {row: partial(learned, dataset, row, memory, stages, o) for row, memory in memories.items()}
        yield continual_text(
            joined([kept(o, name, row, make, "orders", "lrs") for row, make in makes.items()])
        )


def learned(
    dataset: Dataset, row: str, memory: Memory | None, stages: int, o: argparse.Namespace
) -> dict[str, Any]:
    """The table of one row; rows do not depend on one another."""
    return continual(
        dataset,
        {} if memory is None else {row: memory},
        network=NetSpec("convnet", width=o.width),
        recipe=recipe_of(o, dataset),
        steps=stages,
        orders=o.orders,
        rows=(row,) if memory is None else (),
        ipc=o.ipc,
        seed=o.seed,
        workers=o.workers,
    ).to_json()


def joined(tables: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One table with the rows of all."""
    return {**tables[0], "rows": [row for table in tables for row in table["rows"]]}


def nas_tables(dataset: Dataset, o: argparse.Namespace) -> Iterator[str]:
    """The table of the search."""
    setting = Setting(tuple(convnet_space(o.widths, o.depths, o.norms)), seed=o.seed, workers=o.workers)
    recipe = recipe_of(o, dataset, lrs=tuple(o.search_lrs))
    longer = recipe_of(o, dataset, steps=o.reference, lrs=tuple(o.search_lrs))
    space = ("widths", "depths", "norms", "search_lrs")
    truth = kept(
        o, "nas", "reference", lambda: asdict(reference(dataset, longer, setting)), *space, "reference"
    )
    makes = {row: partial(ranked, dataset, row, recipe, setting, o) for row in ("distilled", *REAL)}
    rows = [kept(o, "nas", row, make, *space) for row, make in makes.items()]
    table = compared(dataset, setting, [Scored(**row) for row in rows], Scored(**truth), recipe, longer)
    yield nas_text(table.to_json())


def ranked(
    dataset: Dataset, row: str, recipe: Recipe, setting: Setting, o: argparse.Namespace
) -> dict[str, Any]:
    """The scores of all architectures on one set."""
    sets = {row: distilled(dataset.fit, o)} if row == "distilled" else {}
    rows = () if sets else (row,)
    return asdict(search(dataset, sets, recipe, setting, rows=rows, ipc=o.ipc)[0])


if __name__ == "__main__":
    main()
