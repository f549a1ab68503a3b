"""What a run is before its first step: whether task and matcher fit, what makes two runs the same, and what
a judge is told of it.
"""

from dataclasses import asdict
from typing import Any

import torch

from ddengine.data.disk import DiskPixels
from ddengine.errors import UsageError
from ddengine.nets import resolve
from ddengine.nets.graph import resolve_graph, usual_graph
from ddengine.ops.memory import free_memory
from ddengine.ranks import Ranks, check_replicas
from ddengine.types import Evaluated, Matcher, Task, no_budget


def check_fit(task: Task, matcher: Matcher[Any]) -> None:
    """Refuse a task whose source, budget or experts do not fit the matcher (UsageError)."""
    if matcher.accepts.source not in ("any", task.kind):
        raise UsageError(
            f"this matcher works on {matcher.accepts.source}, '{task.source.spec.name}' holds {task.kind}",
            "Give matcher=computation_tree, tree_herding, random or kcenter for graphs"
            if task.kind == "graphs"
            else "Give one of the matchers for images, such as matcher=attention",
        )
    if task.budget is None and matcher.accepts.budget:
        raise no_budget()
    if matcher.accepts.experts and task.experts is None:
        raise UsageError(
            "this matcher learns from experts and was given none",
            "Give experts=DIR, a folder that `ddengine buffer` recorded",
        )
    if task.precision == "bf16" and not matcher.accepts.bf16:
        raise UsageError("this matcher computes in float32, precision=bf16 was given", "Give precision=fp32")
    check_replicas(task.replicas, Ranks.here(), matcher.accepts.replicas)
    counted = task.budget is not None and task.budget.ipc is not None
    if task.kind == "images" and (counted or not matcher.accepts.plans):
        _check_count(task)


def _check_count(task: Task) -> None:
    """Refuse more images per class than the smallest class has (UsageError)."""
    ipc = task.ipc
    smallest = min(range(len(task.source.counts)), key=task.source.counts.__getitem__)
    if ipc > task.source.counts[smallest]:
        raise UsageError(
            f"ipc={ipc} is more than the {task.source.counts[smallest]} images that class "
            f"'{task.source.spec.classes[smallest]}' has to learn from",
            f"Give ipc={task.source.counts[smallest]} or less",
        )


def check_memory(task: Task, matcher: Matcher[Any]) -> None:
    """Refuse a set that alone does not fit the free memory, and on a GPU the data with it (UsageError).

    This is less than any run takes; what one does take, `ddengine estimate` tells.
    """
    if task.kind != "images" or task.budget is None or task.budget.ipc is None:
        return
    spec, source, place = task.images.spec, task.images.x, task.device
    each = torch.Size(spec.shape).numel() * (4 if matcher.steps(task) and not matcher.accepts.plans else 1)
    need = task.ipc * len(spec.classes) * each
    if place.type == "cuda" and source.device != place and not isinstance(source, DiskPixels):
        need += source.numel() * source.itemsize
    if need > (left := free_memory(place)):
        raise UsageError(
            f"ipc={task.ipc} of {len(spec.classes)} classes and the data take {need:,} bytes of memory "
            f"before the first step, {left:,} are free",
            "Give a smaller ipc or dataset.size, or dataset.memory=disk",
        )


def run_identity(task: Task, matcher: Matcher[Any], seed: int) -> dict[str, Any]:
    """What makes two runs the same: matcher and options, budget, data, precision and seed (plain JSON)."""
    kind = type(matcher)
    return {
        "matcher": {"type": f"{kind.__module__}.{kind.__qualname__}", **_plain(asdict(matcher))},  # type: ignore[call-overload]
        "budget": None if task.budget is None else asdict(task.budget),
        "dataset": {
            "name": task.source.spec.name,
            "fingerprint": task.source.spec.fingerprint,
            "preprocessing": task.source.spec.preprocessing,
            **({"shape": list(task.images.spec.shape)} if task.kind == "images" else _graph_identity(task)),
        },
        "precision": task.precision,
        "seed": seed,
        **({"replicas": task.replicas} if task.replicas > 1 else {}),
        **({"experts": task.experts.identity} if matcher.accepts.experts else {}),
    }


def _graph_identity(task: Task) -> dict[str, Any]:
    return {"kind": "graphs", "shape": list(task.graphs.spec.node_sizes)}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, tuple | list) else value


def evaluation_recipe(task: Task, matcher: Matcher[Any]) -> dict[str, Any]:
    """What the manifest tells a judge: the protocol, the network that distilled the set, the dataset, and
    what the matcher adds.
    """
    network = getattr(matcher, "network", None)
    if network is not None:
        graphs = task.kind == "graphs"
        network = (
            resolve_graph(usual_graph(network)) if graphs else resolve(network, task.images.spec.shape)
        ).to_dict()
    dataset = _plain(dict(task.origin)) or {"name": task.source.spec.name}
    own = matcher.evaluation(task) if isinstance(matcher, Evaluated) else {}
    return {"protocol": "standard-v1", "network": network, "dataset": dataset, **own}
