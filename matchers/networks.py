"""The networks that pixels are matched on: fresh ones, or experts within a window of their epochs."""

import torch

from ddengine.errors import UsageError
from ddengine.nets import resolve
from ddengine.nets.core import NetSpec, Network, initialise
from ddengine.rng import Rng
from ddengine.types import Task, Workspace
from expert_buffers.segment import Window
from expert_buffers.store import ExpertBuffer
from matchers.descent_options import DescentOptions


def checked(task: Task, network: NetSpec) -> NetSpec:
    """The resolved network, after the task's buffer was found to fit it (UsageError)."""
    if not isinstance(task.experts, ExpertBuffer):
        raise UsageError(f"experts are a {type(task.experts).__name__}", "Give an ExpertBuffer: experts=DIR")
    resolved = resolve(network, task.images.spec.shape)
    task.experts.check(task.images.spec, resolved)
    return resolved


def experts_within(task: Task, network: NetSpec, window: Window) -> list[int]:
    """The experts with this network, all of which must reach into the window (UsageError)."""
    checked(task, network)
    found = task.experts.matching(network)
    shortest = min(task.experts.epochs(i) for i in found)
    if max(window.min, (window.start or 1) - 1, (window.max or 1) - 1) > shortest:
        raise UsageError(
            f"matcher.window reaches beyond the {shortest} epochs of the buffer {task.experts.root}",
            f"Give matcher.window.max={shortest + 1} or less, or continue the buffer",
        )
    return found


def draw_network(work: Workspace, rng: Rng, o: DescentOptions, iteration: int) -> Network:
    """The workspace's network in train mode with fresh weights, or those of an expert within the window."""
    if o.networks == "random":
        return initialise(work.extra["net"], rng.torch("weights")).train()  # type: ignore[return-value]
    generator, experts = rng.torch("expert"), work.extra["experts"]
    number = experts[int(torch.randint(len(experts), (), generator=generator))]
    high = o.window.upper(iteration, work.task.experts.epochs(number) + 1)
    row = int(torch.randint(o.window.min, high, (), generator=generator))
    return work.task.experts.load(work.extra["net"], number, row).train()
