"""Memory, time and disk of a command before it runs: counts, and a few real steps of what it would do.

Everything is measured on what the command itself would use, in this process: the data are loaded, the start
is made, some steps are timed, and a set is finished and saved in a folder that is removed. Where the steps of
all classes would take too long, those of a few are timed, and time and memory carried on in a straight line.
"""

import resource
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from ddengine import loop, recipes
from ddengine.checkpoint import KEEP, leaves
from ddengine.config import BufferConfig, DistillConfig
from ddengine.data import Dataset
from ddengine.data.disk import DiskPixels
from ddengine.forecast import Forecast, disk_room, memory_room
from ddengine.given import Watch, load_named
from ddengine.identity import check_fit, evaluation_recipe, run_identity
from ddengine.nets import build, count_parameters, resolve
from ddengine.parallel import Pool
from ddengine.rng import Rng
from ddengine.types import Images, Matcher, Task, Workspace
from expert_buffers.recorder import forecast
from matchers.target_bank import BLOCK, computed_share
from synth import DistilledSet

LIMIT = 20.0  # seconds that the timed steps may take in all, if one step of two classes takes less
ENOUGH = 2.0  # seconds after which steps have been timed for long enough
LEAST = 3  # timed steps, where the limit allows so many
FEW = 2  # classes of the first probe
LINE = 120  # bytes of a line of metrics


@dataclass(frozen=True)
class Probe:
    """A run of a few steps: seconds of its parts, bytes of its state, peak and saved set."""

    start: float
    first: float
    step: float
    finish: float
    peak: int
    state: int
    saved: int


def estimate_distill(config: DistillConfig, watch: Watch = Watch()) -> Forecast:
    """What `ddengine distill` would take with this configuration (UsageError as for the command)."""
    began = time.perf_counter()
    algorithm, task_on = recipes.distillation(config)
    schedule, folder = recipes.schedule_of(config.checkpoint), recipes.distill_folder(config)
    task = task_on(load_named(config.dataset, watch))
    check_fit(task, algorithm)
    load = time.perf_counter() - began
    steps, found = algorithm.steps(task), probed(task, algorithm, config.seed)
    work = found.first + found.step * max(steps - 1, 0)
    parts = {"load": load, "start": found.start, f"{steps} steps": work, "finish": found.finish}
    saves = bool(config.checkpoint.steps) or work > 60 * schedule.checkpoint_minutes
    lines = LINE * (steps // schedule.log_steps + 1) if steps else 0
    ipc = f"ipc {config.ipc}" if config.ipc else f"{config.budget.nbytes or 0:,} bytes"
    return Forecast(
        "distill",
        f"{config.matcher.name} on {config.dataset.name}, {ipc}",
        sum(parts.values()),
        found.peak + saves * found.state,
        found.saved + saves * (KEEP + 1) * found.state + lines,
        memory_room(task.device),
        disk_room(folder),
        parts,
        {**_counts(task, algorithm), "state bytes": found.state, "steps": steps},
    )


def probed(task: Task, matcher: Matcher[Any], seed: int, limit: float = LIMIT) -> Probe:
    """What a run of `matcher` takes: of all classes, or carried on from two numbers of classes."""
    if not isinstance(task.source, Images) or matcher.accepts.experts or not matcher.steps(task):
        return _probe(task, matcher, seed, limit)  # what takes experts of all classes has no fewer
    classes = len(task.source.spec.classes)
    if classes <= FEW:
        return _probe(task, matcher, seed, limit)
    few = _probe(_fewer(task, FEW), matcher, seed, limit / 4)
    affordable = int(FEW * limit / (4 * (LEAST + 1) * max(few.step, 1e-9)))
    if affordable >= classes:
        return _probe(task, matcher, seed, limit)
    more = max(FEW + 1, affordable)
    return _carried_on(few, _probe(_fewer(task, more), matcher, seed, limit), FEW, more, classes)


def _carried_on(few: Probe, more: Probe, low: int, high: int, classes: int) -> Probe:
    """The probe of `classes` classes on the straight line through those of `low` and `high`."""

    def line(name: str) -> float:
        at, slope = getattr(more, name), (getattr(more, name) - getattr(few, name)) / (high - low)
        return float(at + max(slope, 0) * (classes - high))

    seconds = [line(name) for name in ("start", "first", "step", "finish")]
    sizes = [int(line(name)) for name in ("peak", "state", "saved")]
    return Probe(*seconds, *sizes)  # type: ignore[arg-type]


def _fewer(task: Task, classes: int) -> Task:
    """The task on the first `classes` classes."""
    source = task.images
    index = (source.classes < classes).nonzero().squeeze(1)
    spec = replace(source.spec, classes=source.spec.classes[:classes])
    budget = task.budget
    if budget is not None and budget.nbytes is not None:
        budget = replace(budget, nbytes=budget.nbytes * classes // len(source.spec.classes))
    x = source.x
    part = Images(
        x.chosen(index) if isinstance(x, DiskPixels) else x[index],  # what is on disk stays there
        source.y[index], spec, "class",
    )  # fmt: skip
    return replace(task, source=part, budget=budget)


def _probe(task: Task, matcher: Matcher[Any], seed: int, limit: float) -> Probe:
    rng, steps, clock = Rng(seed), matcher.steps(task), _Clock(task.device)
    state = matcher.init(task, rng)
    work = matcher.prepare(task, rng)
    if "bank" in work.extra:  # what is computed here is of data that there may not be, and is not kept
        work.extra["bank"].root = None
    start, step, first = clock.lap(), 0.0, 0.0
    workers = task.workers if any(isinstance(value, Pool) for value in work.extra.values()) else 0
    try:
        if steps:
            state, _ = matcher.step(state, work, rng)
            first, done, spent = clock.lap(), 0, 0.0
            while done < steps - 1 and (done < LEAST or spent < ENOUGH) and first + spent < limit:
                state, _ = matcher.step(state, work, rng)
                spent, done = spent + clock.lap(), done + 1
            step = spent / done if done else first
            if "bank" in work.extra:
                step = _with_bank(step, matcher, state, work, rng, clock)
        synth = matcher.finish(state, work, rng)
        facts = {**run_identity(task, matcher, seed), "seconds": 0.0}
        made = DistilledSet.make(synth, recipe=evaluation_recipe(task, matcher), provenance=facts)
        saved = _saved(made)
    finally:
        work.close()
    tensors = [value for _, value in leaves(state) if isinstance(value, Tensor)]
    held = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    return Probe(start, first, step, clock.lap(), peak_of_all(task.device, workers), held, saved)


def _saved(made: DistilledSet) -> int:
    """Bytes of a saved set and of the copy that is read back, which is what a run does with it."""
    with tempfile.TemporaryDirectory() as folder:
        path = made.save(Path(folder) / "distilled")
        DistilledSet.load(path)
        return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def peak_of_all(device: torch.device, workers: int) -> int:
    """Peak bytes on a GPU, else of this process and its `workers`, each as large as the largest one was."""
    if device.type == "cuda":
        return loop.peak_memory(device)
    child = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    return loop.peak_memory(device) + workers * child


class _Clock:
    """Seconds between laps, after what the device has been given is done."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.last = device, time.perf_counter()

    def lap(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        before, self.last = self.last, time.perf_counter()
        return self.last - before


def _with_bank(miss: float, matcher: Any, state: Any, work: Workspace, rng: Rng, clock: _Clock) -> float:
    """Seconds a step where a bank has the real targets of most: `miss` seconds are one that computes them."""
    done, o = state.step, matcher.options
    again = -(-BLOCK // o.networks_per_step)  # the step at which the first pair comes again
    state, spent = replace(state, step=again), 0.0
    for _ in range(done):
        state, _ = matcher.step(state, work, rng)
        spent += clock.lap()
    share = computed_share(o.steps * o.networks_per_step, o.bank_reuse)
    return share * miss + (1 - share) * spent / done


def _counts(task: Task, matcher: Matcher[Any]) -> dict[str, int]:
    """What can be counted: parameters and activations of the network, bytes of the data."""
    network = getattr(matcher, "network", None)
    if not isinstance(task.source, Images):
        return {"graphs": len(task.source)}
    shape, classes = task.source.spec.shape, len(task.source.spec.classes)
    counts = {"images": len(task.source), "data bytes": len(task.source) * torch.Size(shape).numel()}
    if network is None:
        return counts
    net = build(resolve(network, shape), shape, classes, Rng(0).torch("weights"))
    return {**counts, "parameters": count_parameters(net), "activation bytes": activations(net, shape)}


def activations(net: torch.nn.Module, shape: tuple[int, int, int]) -> int:
    """Bytes that the network keeps of one image for the way back, by the difference of two and one."""
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    def of(images: int) -> int:
        kept.clear()
        with saved_tensors_hooks(note, lambda tensor: tensor):
            net(torch.zeros(images, *shape))
        return sum(kept.values())

    return of(3) - of(2)  # batch norm takes no fewer than two


def estimate_buffer(config: BufferConfig, watch: Watch = Watch()) -> Forecast:
    """What `ddengine buffer` would take with this configuration (UsageError as for the command)."""
    began = time.perf_counter()
    networks, out, options = recipes.recording(config)
    dataset: Dataset = load_named(config.dataset, watch)
    load = time.perf_counter() - began
    cost, said = forecast(dataset.fit, networks, out, **options)
    device, shape = torch.device(options["device"]), dataset.fit.spec.shape
    net = build(resolve(networks[0], shape), shape, len(dataset.fit.spec.classes), Rng(0).torch("weights"))
    return Forecast(
        "buffer",
        f"{config.dataset.name}: {said}",
        load + cost.seconds,
        cost.memory_bytes,
        cost.disk_bytes,
        memory_room(device),
        disk_room(out),
        {"load": load, "experts": cost.seconds},
        {
            "images": len(dataset.fit),
            "parameters": count_parameters(net),
            "activation bytes": activations(net, shape),
        },
    )
