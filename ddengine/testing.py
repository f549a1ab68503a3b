"""For authors of matchers: one call that holds a matcher to the contract that all of ours keep."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

import matchers
from ddengine import data
from ddengine.contract import CLAUSES, Case
from ddengine.errors import DDError, UsageError
from ddengine.graphs import Graphs, GraphSpec, as_graph_source
from ddengine.identity import check_fit
from ddengine.nets.core import NetSpec
from ddengine.plugins import said
from ddengine.rng import Rng
from ddengine.types import Budget, Matcher, Task

__all__ = ["CLAUSES", "ContractError", "check_matcher", "graph_task", "image_task"]

MOST_STEPS = 20  # a run is repeated from each of its states
NETWORKS = {"images": NetSpec("convnet", width=4, depth=2), "graphs": NetSpec("gin", width=4)}


class ContractError(AssertionError):
    """A matcher breaks its contract; `clause` is the key of CLAUSES."""

    def __init__(self, clause: str, detail: str) -> None:
        super().__init__(f"{clause}: {detail}")
        self.clause = clause


def check_matcher(
    matcher: Any,
    task: Task | None = None,
    *,
    network: NetSpec | None = None,
    seed: int = 5,
    **options: Any,
) -> list[str]:
    """Hold a matcher to every clause of the contract; returns the names of the clauses, all of them kept.

    `matcher` is a value, or a name with `options` and `network` (by default a small one). `task` is by
    default a fraction of digits at one image per class, or as few small graphs for a matcher of graphs. Runs
    are repeated many times: give few steps, such as `check_matcher("gradient", steps=3)`. Raises
    ContractError for the first clause that is broken, UsageError for a task that the matcher does not take,
    for no experts where it needs them, and for more than 20 steps.
    """
    made = _made(matcher, network, options)
    with _blamed("a frozen value"):
        wrong = matchers.problem(made)
    if wrong:
        raise ContractError("a frozen value", f"it {wrong}")
    given = _task_for(made) if task is None else task
    check_fit(given, made)
    with _blamed("steps are counted"):
        _check_few(made.steps(given))
    with tempfile.TemporaryDirectory() as folder:
        case = Case(made, given, seed, Path(folder))
        for clause in CLAUSES:
            _hold(case, clause)
    return list(CLAUSES)


def _check_few(steps: Any) -> None:
    """Refuse more steps than can be checked (UsageError); what is no number of steps breaks a clause."""
    if isinstance(steps, int) and steps > MOST_STEPS:
        raise UsageError(
            f"a contract is checked over at most {MOST_STEPS} steps, this matcher takes {steps}",
            "Give few, such as check_matcher(NAME, steps=3), or a value with such options",
        )


def image_task(ipc: int = 1) -> Task:
    """Every ninth image of the fit part of digits, at `ipc` images per class."""
    digits = data.load("digits").fit
    return Task(digits.take(torch.arange(0, len(digits), 9)), Budget(ipc), origin={"name": "digits"})


def graph_task(ipc: int = 1) -> Task:
    """Rings, stars and paths of three to seven nodes, eleven of each, at `ipc` graphs per class."""
    draw = Rng(0).numpy("nodes")
    shapes = [(label, int(draw.integers(3, 8))) for label in (0, 1, 2) for _ in range(11)]
    sizes = torch.tensor([nodes for _, nodes in shapes])
    ends = torch.cat(
        [
            start + _edges(label, nodes)
            for (label, nodes), start in zip(shapes, (sizes.cumsum(0) - sizes).tolist(), strict=True)
        ],
        1,
    )
    spec = GraphSpec("shapes", ("ring", "star", "path"), node_sizes=(3,))
    graphs = Graphs(
        x=torch.from_numpy(draw.integers(0, 3, (int(sizes.sum()), 1))),
        edge_index=torch.cat([ends, ends.flip(0)], 1),
        edge_attr=torch.zeros((2 * ends.shape[1], 0), dtype=torch.int64),
        batch=torch.arange(len(shapes)).repeat_interleave(sizes),
        y=torch.tensor([label for label, _ in shapes]),
        spec=spec,
    )
    return Task(as_graph_source(graphs), Budget(ipc))


def _edges(label: int, nodes: int) -> torch.Tensor:
    """The edges of a ring, a star or a path, one way."""
    first, others = torch.arange(nodes - 1), torch.arange(1, nodes)
    if label == 1:
        return torch.stack([torch.zeros_like(others), others])
    path = torch.stack([first, others])
    return path if label == 2 else torch.cat([path, torch.tensor([[nodes - 1], [0]])], 1)


def _made(matcher: Any, network: NetSpec | None, options: dict[str, Any]) -> Any:
    if isinstance(matcher, str):
        kind = matchers.find(matcher).accepts.source
        return matchers.make(matcher, network or NETWORKS.get(kind, NETWORKS["images"]), **options)
    if options or network:
        given = ", ".join([*options, *(["network"] if network else [])])
        raise UsageError(
            f"{given}: options of a matcher that is given by its name, and this is a value",
            "Give a value that was made with them, or the name",
        )
    return matcher


def _task_for(matcher: Matcher[Any]) -> Task:
    if matcher.accepts.experts:
        raise UsageError(
            "this matcher learns from experts, and the default task has none",
            "Give task=Task(source, Budget(ipc=1), ExpertBuffer(DIR))",
        )
    return graph_task() if matcher.accepts.source == "graphs" else image_task()


def _hold(case: Case, clause: str) -> None:
    """Raise ContractError if the clause is broken, or if the matcher fails while it is checked."""
    with _blamed(clause, case):
        broken = CLAUSES[clause](case)
    if broken:
        raise ContractError(clause, broken)


@contextmanager
def _blamed(clause: str, case: Case | None = None) -> Iterator[None]:
    """Make of what fails inside a ContractError; a UsageError stays one until the task has been taken."""
    try:
        yield
    except SystemExit as error:
        raise ContractError(clause, f"the matcher calls sys.exit({error.code!r})") from error
    except DDError as error:
        if isinstance(error, UsageError) and not (case and case.taken):
            raise
        raise ContractError(clause, error.cause) from error
    except Exception as error:
        raise ContractError(clause, f"the matcher fails with {said(error)}") from error
