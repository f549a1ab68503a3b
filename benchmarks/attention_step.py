"""One attention-matching step beside plain versions: CPU time, peak memory, the gradients of all; accuracies.

    python benchmarks/attention_step.py                            # width 32: about 6 minutes on one thread
    python benchmarks/attention_step.py --width 128 --repeat 2 --classes 10        # about 4 minutes
    python benchmarks/attention_step.py --accuracy DIR --threads 2  # Fashion-MNIST in DIR, width 16: an hour

The plain versions are written from the formulas the way the papers' scripts do it: a new network object with
hooks that copy every ReLU map at each step, real and synthetic maps held together, |f|^p as written. `plain`
takes a class at a time (DM's released code with instance norm), `released` all classes in one forward
(DataDAM's). All see the same data, draws and number of images. Each case has a process, and so a peak memory,
of its own; the cases take turns. Seconds are CPU seconds of the process, which other load moves least.

A row of the bank is the mean of REUSE steps of one pair: the first computes targets, the others find them.
The accuracies are of sets distilled in `--steps` steps by engine, bank and plain version, under the judge's
protocol: fresh networks on all of the test part, for `--seeds` distillations of each.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from trajectory_gradients import forget_peak, resident_peak

import matchers
from ddengine.data import load
from ddengine.judge import evaluate
from ddengine.nets import build
from ddengine.nets.core import NetSpec
from ddengine.ops import dsa
from ddengine.rng import Rng
from ddengine.tables import spread
from ddengine.types import Budget, DataSpec, Images, SynthSet, Task
from matchers import descent_options
from matchers.target_bank import BLOCK
from synth import DistilledSet

RESULTS = Path(os.environ.get("RESULTS", Path(__file__).parent / "results"))
REAL, IPC, SIDE, REUSE = 128, 10, 32, 5
KINDS = ("engine", "bank", "plain", "released")


def task(classes: int, device: str = "cpu", precision: str = "fp32") -> Task:
    """Noise in the shape of CIFAR: speed and memory do not depend on what the pixels show."""
    count = classes * (REAL + 8)
    x = torch.randint(0, 256, (count, 3, SIDE, SIDE), generator=Rng(0).torch("x"), dtype=torch.uint8)
    names = tuple(f"{c:03d}" for c in range(classes))
    spec = DataSpec("noise", (3, SIDE, SIDE), names, (0.5,) * 3, (0.25,) * 3)
    y = torch.arange(classes).repeat_interleave(REAL + 8)
    where = torch.device(device)
    return Task(Images(x, y, spec), Budget(ipc=IPC), device=where, precision=precision)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Plan:
    """What all versions do alike: settings of the matcher, and the seed that all their draws come from."""

    width: int
    steps: int = 10**6
    seed: int = 0
    lr: float = 4.0
    momentum: float = 0.5

    def matcher(self, bank: str = "off") -> Any:
        """The engine's matcher."""
        return matchers.make(
            "attention", NetSpec("convnet", width=self.width), steps=self.steps, real_per_class=REAL,
            lr=self.lr, momentum=self.momentum, schedule="cosine", bank=bank, bank_reuse=REUSE,
        )  # fmt: skip


class Version(NamedTuple):
    """`step(number)` makes a step with the draws of that number and returns the gradient it went along."""

    step: Callable[[int], Tensor]
    synth: Callable[[], SynthSet]


def engine(work: Task, plan: Plan, bank: str = "off") -> Version:
    """The engine's matcher."""
    matcher, rng = plan.matcher(bank), Rng(plan.seed)
    space, state = matcher.prepare(work, rng), [matcher.init(work, rng)]

    def step(number: int) -> Tensor:
        before = state[0].velocity["images"]
        state[0] = matcher.step(replace(state[0], step=number), space, rng)[0]
        return state[0].velocity["images"] - plan.momentum * before

    return Version(step, lambda: state[0].synth)


def attention(f: Tensor) -> Tensor:
    return F.normalize(f.abs().pow(4).sum(1).flatten(1), dim=1)


def plain(work: Task, plan: Plan, together: bool, draws: str = "step") -> Version:
    """The papers' scripts, from the engine's start and with its draws; `together`: all classes at once."""
    spec, start = work.images.spec, plan.matcher().init(work, Rng(plan.seed)).synth
    k = len(spec.classes)
    source, where = work.images.to(work.device), work.device
    syn = start.images.clone().requires_grad_()
    optimiser = torch.optim.SGD([syn], lr=plan.lr, momentum=plan.momentum)
    groups = [list(range(k))] if together else [[c] for c in range(k)]

    def step(number: int) -> Tensor:
        here = Rng(plan.seed).fold(draws, number, *([0] if draws == "step" else []))
        net = build(NetSpec("convnet", width=plan.width), spec.shape, k, here.torch("weights"))
        net.requires_grad_(False).to(where)
        params = dsa.sample(here.torch("augment"), dsa.strategy_for(spec.name), k, spec.shape[1:])
        picks = work.images.draw(here.torch("real"), range(k), REAL)
        total = torch.zeros((), device=where)
        for group in groups:
            rows = [params[torch.tensor([c])] for c in group]
            real = [source.model_input(picks[c].to(where)) for c in group]
            fake = [syn[c * IPC : (c + 1) * IPC] for c in group]
            sides = [torch.cat([dsa.apply(x, r) for x, r in zip(s, rows, strict=True)]) for s in (real, fake)]
            total = total + apart(*(hooked(net, x) for x in sides), len(group))
        optimiser.zero_grad()
        total.backward()
        optimiser.param_groups[0]["lr"] = descent_options.scheduled(plan.lr, "cosine", number, plan.steps)
        optimiser.step()
        assert syn.grad is not None
        return syn.grad.clone()

    return Version(step, lambda: start.replace({"images": syn.detach().clone()}))


def apart(real: list[Tensor], fake: list[Tensor], classes: int) -> Tensor:
    """100 times the attention term and the embedding's, which the engine weights by 2048 / d."""
    total = torch.zeros((), device=real[0].device)
    for level, pair in enumerate(zip(real, fake, strict=True)):
        last = level == len(real) - 1
        rows = [F.avg_pool2d(f, 2).flatten(1) if last else attention(f) for f in pair]
        a, b = (row.unflatten(0, (classes, -1)).mean(1) for row in rows)
        weight = descent_options.width_factor(a.shape[1], True) if last else 100
        total = total + weight * (a - b).square().sum()
    return total


def hooked(net: nn.Module, x: Tensor) -> list[Tensor]:
    """Copies of all ReLU maps of a forward to the logits."""
    maps: list[Tensor] = []
    for level in range(len(net.convs)):
        x = net.norms[level](net.convs[level](x)).relu()
        maps.append(x.clone())
        x = F.avg_pool2d(x, 2)
    net.classifier(x.flatten(1))
    return maps


def version(kind: str, work: Task, plan: Plan) -> Version:
    if kind == "bank":
        os.environ["DDENGINE_CACHE"] = tempfile.mkdtemp()
    if kind in ("engine", "bank"):
        return engine(work, plan, "on" if kind == "bank" else "off")
    return plain(work, plan, kind == "released")


def case(kind: str, classes: int, width: int, repeat: int) -> dict[str, Any]:
    """CPU seconds of `repeat` steps after one to warm up, and the peak resident bytes that the steps added.

    With the bank each is the mean of the REUSE steps of a pair.
    """
    step, _ = version(kind, task(classes), Plan(width))
    uses = REUSE if kind == "bank" else 1
    forget_peak()
    before = resident_peak()
    step(0)
    seconds = []
    for number in range(1, repeat + 1):
        began = time.process_time()
        for use in range(uses):
            step(number + use * BLOCK)
        seconds.append((time.process_time() - began) / uses)
    peak = resident_peak()
    return {"kind": kind, "classes": classes, "seconds": seconds, "step_bytes": peak - before}


def agreement(width: int) -> dict[str, float]:
    """Cosine and ratio of norms of first gradients: of each version and the plain one with the same draws."""
    work, plan = task(3), Plan(width)
    found = {kind: version(kind, work, plan).step(0).flatten() for kind in KINDS}
    banked = plain(work, plan, False, "bank").step(0).flatten()
    pairs = {"engine": found["plain"], "bank": banked, "released": found["plain"]}
    cosines = {k: float(F.cosine_similarity(found[k], b, dim=0)) for k, b in pairs.items()}
    return {**cosines, **{f"{k}_norm": float(found[k].norm() / b.norm()) for k, b in pairs.items()}}


def child(given: argparse.Namespace, kind: str, classes: int, repeat: int) -> dict[str, Any]:
    words = [sys.executable, __file__, "--case", kind, str(classes), "--width", str(given.width)]
    words += ["--repeat", str(repeat), "--threads", str(given.threads)]
    done = subprocess.run(words, check=True, capture_output=True, text=True)
    return json.loads(done.stdout)


def table(given: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One row for each kind and number of classes; `released` with few classes only: it needs all at once."""
    for classes in given.classes:
        kinds = [kind for kind in KINDS if kind != "released" or classes <= 10]
        found = [child(given, kind, classes, given.repeat if classes == 10 else 1) for kind in kinds * 2]
        for kind in kinds:
            mine = [f for f in found if f["kind"] == kind]
            seconds = sorted(s for f in mine for s in f["seconds"])
            spread = {"min": seconds[0], "median": statistics.median(seconds), "max": seconds[-1]}
            memory = max(f["step_bytes"] for f in mine)
            yield {"kind": kind, "classes": classes, "seconds": spread, "step_bytes": memory}


def speed(given: argparse.Namespace) -> None:
    """Print the rows and write them to results/."""
    cosines = agreement(given.width)
    rows = list(table(given))
    plain_seconds = {r["classes"]: r["seconds"]["median"] for r in rows if r["kind"] == "plain"}
    for row in rows:
        row["times_plain"] = round(plain_seconds[row["classes"]] / row["seconds"]["median"], 3)
        print(
            f"{row['kind']:8} {row['classes']:4} classes  {row['seconds']['median']:8.3f} CPU s/step  "
            f"{row['times_plain']:6.2f} x plain's rate  {row['step_bytes'] / 2**20:6.0f} MiB for the step"
        )
    setting = {
        "width": given.width, "threads": given.threads, "real_per_class": REAL, "ipc": IPC, "reuse": REUSE,
    }  # fmt: skip
    print(json.dumps(cosines))
    save(given.width, {"setting": setting, "against_plain": cosines, "rows": rows})


def accuracy(given: argparse.Namespace) -> None:
    """Test accuracies on Fashion-MNIST of sets that the engine, the bank and the plain version made."""
    dataset = load("fashion_mnist", root=given.accuracy)
    network, rows = NetSpec("convnet", width=16), []
    for kind in ("engine", "bank", "plain"):
        values: list[float] = []
        for seed in range(given.seeds):
            made = version(kind, Task(dataset.fit, Budget(ipc=IPC)), Plan(16, given.steps, seed))
            for number in range(given.steps):
                made.step(number)
            facts = {"seconds": 0.0, "steps": given.steps, "peak_memory_bytes": 0}
            stored = DistilledSet.make(made.synth(), recipe={}, provenance=facts)
            found = evaluate(stored, dataset, networks=[network], seeds=given.networks, rows=())
            values += found.rows[0].values
        mean, std, interval = spread(values)
        rows.append({"kind": kind, "mean": mean, "std": std, "ci95": list(interval), "values": values})
        print(json.dumps(rows[-1]), flush=True)
    setting = {"steps": given.steps, "ipc": IPC, "real_per_class": REAL, "reuse": REUSE, "width": 16}
    save("accuracy", {"setting": setting, "dataset": "fashion_mnist", "rows": rows})


def save(name: str | int, found: dict[str, Any]) -> None:
    machine = {
        "torch": torch.__version__, "python": platform.python_version(), "machine": platform.machine(),
        "cpu": torch.backends.cpu.get_cpu_capability(), "load": round(os.getloadavg()[1], 2),
        "date": time.strftime("%Y-%m-%d"),
    }  # fmt: skip
    end = {32: ""}.get(name, f"_w{name}" if isinstance(name, int) else f"_{name}")
    (RESULTS / f"attention_step{end}.json").write_text(json.dumps(found | machine, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--classes", type=int, nargs="+", default=[10, 100])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--case", nargs=2, metavar=("KIND", "CLASSES"))
    parser.add_argument("--accuracy", metavar="DIR")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--networks", type=int, default=5)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    if given.case:
        print(json.dumps(case(given.case[0], int(given.case[1]), given.width, given.repeat)))
    elif given.accuracy:
        accuracy(given)
    else:
        speed(given)


if __name__ == "__main__":
    main()
