"""The exported contract: a sound matcher passes, and one that is broken in one place fails in that clause."""

import random
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from ddengine import data
from ddengine.errors import UsageError
from ddengine.nets import NetSpec
from ddengine.testing import CLAUSES, ContractError, check_matcher, graph_task, image_task
from ddengine.types import Accepts, Workspace
from synth import Pixels, start_images


@dataclass(frozen=True)
class Options:
    steps: int = 3
    odd: Any = None


@dataclass(frozen=True)
class State:
    step: int
    x: torch.Tensor
    counts: dict[str, int]


@dataclass(frozen=True)
class Means:
    """Moves pixels to the class means of a random third of the real images, unless it has a `fault`."""

    options: Options = Options()
    network: NetSpec = NetSpec()
    fault: str = ""

    accepts: ClassVar[Accepts] = Accepts()
    calls: ClassVar[list[int]] = []

    def steps(self, task):
        return self.options.steps

    def prepare(self, task, rng):
        return Workspace(task, task.images, {"used": []})

    def init(self, task, rng):
        x = start_images("real", task.images, task.ipc, rng.fold("start"))
        return State(1 if self.fault == "starts at one" else 0, x, {"seen": 0})

    def step(self, state, work, rng):
        images, rng = work.data, rng.fold("step", state.step)
        x, counts, loss = state.x, dict(state.counts), 0.5
        if self.fault == "draws from torch":
            torch.rand(())
        elif self.fault == "draws from numpy":
            np.random.rand()
        elif self.fault == "draws from python":
            random.random()
        elif self.fault == "overwrites its input":
            x.mul_(0.9)
        elif self.fault == "counts in its input":
            state.counts["seen"] += 1
        elif self.fault == "overwrites the source":
            images.x[0, 0, 0, 0] += 1
        elif self.fault == "remembers its calls":
            self.calls.append(1)
            x = x + len(self.calls)
        elif self.fault == "remembers in the workspace":
            work.extra["used"].append(1)
            x = x + len(work.extra["used"])
        elif self.fault == "loses a step":
            return replace(state, step=state.step + 2), {}
        elif self.fault == "has no loss":
            loss = float("nan")
        elif self.fault == "looks at the test part" and state.step == 0:
            x = x + data.load("digits").test.x[0].float().mean()
        elif self.fault == "looks at the test part and hides it" and state.step == 0:
            try:
                data.load("digits")
            except Exception:
                loss = 1.0
        elif self.fault == "fails":
            raise KeyError("nothing there")
        picks = images.draw(rng.torch("real"), range(len(images.spec.classes)), 3)
        means = torch.stack([images.model_input(p).mean(0) for p in picks])
        goal = means.repeat_interleave(len(x) // len(means), 0)
        counts["seen"] += 3
        hidden = getattr(state, "hidden", 0) + 1
        made = State(state.step + 1, x + 0.5 * (goal - x), counts)
        if self.fault == "hides part of its state":
            made = replace(made, x=made.x + hidden)
            object.__setattr__(made, "hidden", hidden)
        return made, {"loss": torch.tensor(loss)}

    def finish(self, state, work, rng):
        spec, x = work.data.spec, state.x
        labels = torch.arange(len(spec.classes)).repeat_interleave(len(x) // len(spec.classes))
        if self.fault == "finishes by overwriting":
            x.clamp_(-1, 1)
        elif self.fault == "takes double":
            x, labels = torch.cat([x, x]), torch.cat([labels, labels])
        elif self.fault == "crowds one class":
            labels[0] = 1
        elif self.fault == "forgets a class":
            labels = labels.clamp(min=1)
        elif self.fault == "renames the data":
            spec = replace(spec, name="mine")
        elif self.fault == "miscounts its bytes":
            return Miscounted(x, labels, spec)
        elif self.fault == "has no stored form":
            return Formless(Pixels(x, labels, spec))
        elif self.fault == "finishes by the workspace":
            work.extra["used"].append(1)
            x = x + len(work.extra["used"])
        return Pixels(x, labels, spec, codec="fp32")


class Miscounted(Pixels):
    """Pixels that forget their labels when they count."""

    @property
    def nbytes(self):
        parts = super().nbytes
        return {**parts, "labels": 0, "total": parts["total"] - parts["labels"]}


@dataclass(frozen=True)
class Formless:
    """Pixels under another name."""

    pixels: Pixels

    def __getattr__(self, name):
        return getattr(self.pixels, name)


BROKEN = {
    "starts at one": ("steps are counted", r"say step \[1, 2, 3\]"),
    "loses a step": ("steps are counted", r"say step \[0, 2, 4\], steps\(task\) says 3"),
    "has no loss": ("metrics are finite", "loss is nan after step 1"),
    "remembers its calls": ("same seed, same bits", "two runs of seed 5 differ in the state of step 1"),
    "overwrites its input": ("inputs are left alone", "change the state of step 0"),
    "counts in its input": ("inputs are left alone", "change the state of step 0"),
    "finishes by overwriting": ("inputs are left alone", "finish changes a state"),
    "overwrites the source": ("inputs are left alone", "changes the source"),
    "remembers in the workspace": ("a workspace changes no result", "a step differs"),
    "finishes by the workspace": ("a workspace changes no result", "finish differs"),
    "draws from torch": ("no global generator", "torch's global generator moved"),
    "draws from numpy": ("no global generator", "numpy's global generator moved"),
    "draws from python": ("no global generator", "Python's global generator was used"),
    "looks at the test part": ("no data but the task's", "loads the dataset 'digits', test part and all"),
    "looks at the test part and hides it": ("no data but the task's", "loads the dataset 'digits'"),
    "takes double": ("budget and classes", "40 items of 10 classes, .* at ipc=2"),
    "crowds one class": ("budget and classes", r"20 items of 10 classes, by class \[1, 3, 2, .* at ipc=2"),
    "forgets a class": ("budget and classes", "class '0' has no item"),
    "renames the data": ("budget and classes", "another spec than the source"),
    "hides part of its state": ("resumed equals straight", "resumed from step 1 it does not end as"),
    "miscounts its bytes": ("stored and read again", "it says .*'total': .* bytes, stored are"),
    "has no stored form": ("stored and read again", "a Formless has no stored form"),
    "fails": ("steps are counted", "the matcher fails with KeyError: 'nothing there'"),
}


def test_a_sound_matcher_keeps_every_clause_on_the_default_task():
    assert check_matcher(Means()) == list(CLAUSES)


@pytest.mark.parametrize("fault", BROKEN)
def test_a_matcher_broken_in_one_place_fails_in_the_clause_that_names_it(fault):
    clause, detail = BROKEN[fault]
    with pytest.raises(ContractError, match=f"^{clause}: .*{detail}") as raised:
        check_matcher(Means(fault=fault), image_task(2))
    assert raised.value.clause == clause and isinstance(raised.value, AssertionError)


def test_every_clause_has_a_matcher_that_breaks_it():
    assert {clause for clause, _ in BROKEN.values()} | {"a frozen value"} == set(CLAUSES)


@pytest.mark.parametrize(
    ("value", "detail"),
    [
        (Means, r"is a class; it must be a value of it: Means\(\)"),
        (Options(), "is a Options and no matcher: it has no accepts, prepare, init, step, finish"),
        (Means(options=3), "has options that are no frozen dataclass"),
        (Means(Options(odd=object())), "are not JSON: Object of type object is not JSON serializable"),
        (Means(Options(odd=float("nan"))), "are not JSON: Out of range float"),
        (Means(Options(odd={3: 4})), "is not what JSON gives back of it"),
    ],
)
def test_what_is_no_frozen_value_is_named(value, detail):
    with pytest.raises(ContractError, match=f"^a frozen value: .*{detail}"):
        check_matcher(value)


def test_a_matcher_is_also_given_by_its_name_with_options():
    assert check_matcher("kcenter") == list(CLAUSES)
    network = NetSpec("mlp", width=5)
    assert check_matcher("distribution", network=network, steps=2, real_per_class=3) == list(CLAUSES)
    with pytest.raises(UsageError, match="unknown option of matcher 'distribution' 'stesp'"):
        check_matcher("distribution", stesp=2)
    with pytest.raises(UsageError, match="unknown matcher 'kcentre'\nDid you mean 'kcenter'"):
        check_matcher("kcentre")


def test_a_matcher_of_graphs_has_a_task_of_graphs():
    assert check_matcher("tree_herding") == list(CLAUSES)
    graphs = graph_task().graphs
    assert graphs.counts == [11, 11, 11] and set(graphs.nodes.tolist()) == {3, 4, 5, 6, 7}
    degrees = torch.bincount(graphs.edge_index[1], minlength=len(graphs.x))
    ring, star, path = (degrees[graphs.y[graphs.batch] == label] for label in range(3))
    assert set(ring.tolist()) == {2} and set(path.tolist()) == {1, 2}
    hubs = [int(d) for d in star if d > 1]
    assert sorted(hubs) == sorted((graphs.nodes[graphs.y == 1] - 1).tolist())
    with pytest.raises(UsageError, match="works on graphs, 'digits' holds images"):
        check_matcher("tree_herding", image_task())


def test_what_cannot_be_checked_is_refused_with_a_remedy():
    with pytest.raises(UsageError, match="over at most 20 steps, this matcher takes 21\nGive few"):
        check_matcher(Means(Options(steps=21)))
    with pytest.raises(UsageError, match="learns from experts, and the default task has none\nGive task="):
        check_matcher("trajectory", steps=1)
    with pytest.raises(UsageError, match="for a matcher given by its name"):
        check_matcher(Means(), steps=3)


def test_the_small_task_holds_every_class_and_no_test_image():
    task, digits = image_task(), data.load("digits")
    assert task.budget.ipc == 1 and 100 < len(task.images) < 200 and min(task.images.counts) > 5
    fit = {bytes(x.numpy()) for x in digits.fit.x}
    assert {bytes(x.numpy()) for x in task.images.x} <= fit
