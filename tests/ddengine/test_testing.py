"""The exported contract: a sound matcher passes, and one that is broken in one place fails in that clause."""

import json
import random
import sys
from dataclasses import dataclass, replace
from random import getrandbits as kept_getrandbits
from random import seed as kept_seed
from types import ModuleType
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from ddengine import data
from ddengine.errors import ArtefactError, DDError, UsageError
from ddengine.loop import Schedule, distill
from ddengine.nets import NetSpec
from ddengine.reruns import copied, global_rng_untouched, same, unchanged
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
        self._draw("steps")
        if self.fault == "cannot say its steps":
            raise KeyError("no such option")
        if self.fault == "ends when asked for its steps":
            sys.exit(3)
        return {"says no steps": None, "says -1 steps": -1, "says 2.0 steps": 2.0}.get(
            self.fault, self.options.steps
        )

    def _draw(self, verb):
        """Draws from global generators in the one verb that the fault names, seeded each time."""
        if self.fault == f"seeds torch in {verb}":
            torch.manual_seed(0)
            torch.rand(3)
        elif self.fault == f"seeds numpy in {verb}":
            np.random.seed(0)
            np.random.rand()
        elif self.fault == f"seeds python in {verb}":
            kept_seed(0)
            kept_getrandbits(8)

    def prepare(self, task, rng):
        self._draw("prepare")
        return Workspace(task, task.images, {"used": []})

    def init(self, task, rng):
        if self.fault == "takes no digits":
            raise UsageError("digits are too small", "Give larger images")
        x = start_images("real", task.images, task.ipc, rng.fold("start"))
        return State(1 if self.fault == "starts at one" else 0, x, {"seen": 0})

    def step(self, state, work, rng):
        images, rng = work.data, rng.fold("step", state.step)
        x, counts, loss, metrics = state.x, dict(state.counts), 0.5, {}
        self._draw("step")
        if self.fault == "draws from torch":
            torch.rand(())
        elif self.fault == "draws from numpy":
            np.random.rand()
        elif self.fault == "draws from python":
            random.random()
        elif self.fault == "draws a normal from python":
            random.normalvariate(0, 1)
        elif self.fault == "draws bits from python and hides it":
            try:
                random.getrandbits(8)
            except AssertionError:
                loss = 1.0
        elif self.fault == "saves and restores torch's":
            with torch.random.fork_rng():
                torch.manual_seed(state.step)
                torch.rand(())
        elif self.fault == "holds NaN" and state.step == 1:
            x = x.where(torch.arange(len(x))[:, None, None, None] != 3, float("nan"))
        elif self.fault == "logs a step":
            metrics = {"step": 99.0}
        elif self.fault == "logs seconds":
            metrics = {"seconds": 7.0}
        elif self.fault == "logs under a number":
            metrics = {3: 7.0}
        elif self.fault == "ends":
            sys.exit(3)
        elif self.fault == "ends in a line":
            sys.exit("no GPU")
        elif self.fault == "finds it damaged":
            raise ArtefactError("table.pt is damaged", "Load it again")
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
        made = replace(state, step=state.step + 1, x=x + 0.5 * (goal - x), counts=counts)
        if self.fault == "hides part of its state":
            made = replace(made, x=made.x + hidden)
            object.__setattr__(made, "hidden", hidden)
        return made, {"loss": torch.tensor(loss), **metrics}

    def finish(self, state, work, rng):
        spec, x = work.data.spec, state.x
        self._draw("finish")
        labels = torch.arange(len(spec.classes)).repeat_interleave(len(x) // len(spec.classes))
        if self.fault == "finishes by overwriting":
            x.clamp_(-1, 1)
        elif self.fault == "takes double":
            x, labels = torch.cat([x, x]), torch.cat([labels, labels])
        elif self.fault == "crowds one class":
            labels[0] = 1
        elif self.fault == "forgets a class":
            labels = labels.clamp(min=1)
        elif self.fault in ("finishes with nan", "finishes with inf"):
            x = x.clone()
            x[0, 0, 0, 0] = float(self.fault.split()[-1])
        elif self.fault.startswith("cannot be"):
            rate = 0.1 if self.fault == "cannot be packed" else 0.2
            return Unstorable(x, labels, spec, codec="fp32", student_lr=rate)
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


class Unstorable(Pixels):
    """Pixels that cannot be packed, or (`student_lr` 0.2) not even be decoded."""

    def decode(self, indices=None):
        if self.student_lr == 0.2:
            raise UsageError("it cannot be decoded", "Lower the learning rate")
        return super().decode(indices)

    def pack(self):
        raise DDError("it cannot be packed", "Lower the learning rate")


@dataclass(frozen=True)
class Formless:
    """Pixels under another name."""

    pixels: Pixels

    def __getattr__(self, name):
        return getattr(self.pixels, name)


@dataclass(frozen=True)
class Accepting(Means):
    """Means that accept what they are told."""

    told: Any = None

    def __init__(self, told):
        object.__setattr__(self, "told", told)

    @property
    def accepts(self):
        return self.told


@dataclass(frozen=True)
class Unsaid(Means):
    """Means that cannot say what they accept."""

    @property
    def accepts(self):
        raise OSError("no accepts today")


@dataclass(frozen=True)
class Lowest:
    """A state with a running minimum."""

    step: int
    x: torch.Tensor
    counts: dict[str, int]
    lowest: torch.Tensor
    last: float


@dataclass(frozen=True)
class Watching(Means):
    """Means whose state starts from an infinite minimum."""

    def init(self, task, rng):
        state = super().init(task, rng)
        return Lowest(0, state.x, state.counts, torch.tensor([float("inf"), 3.0]), 0.5)


BROKEN = {
    "starts at one": ("steps are counted", r"say step \[1, 2, 3\]"),
    "loses a step": ("steps are counted", r"say step \[0, 2, 4\], steps\(task\) says 3"),
    "says no steps": ("steps are counted", r"steps\(task\) says None, which is no whole number"),
    "says -1 steps": ("steps are counted", r"steps\(task\) says -1, which is no whole number"),
    "says 2.0 steps": ("steps are counted", r"steps\(task\) says 2.0, which is no whole number"),
    "cannot say its steps": ("steps are counted", "the matcher fails with KeyError: 'no such option'"),
    "ends when asked for its steps": ("steps are counted", r"the matcher calls sys.exit\(3\)"),
    "ends": ("steps are counted", r"the matcher calls sys.exit\(3\)"),
    "ends in a line": ("steps are counted", r"the matcher calls sys.exit\('no GPU'\)"),
    "finds it damaged": ("steps are counted", "table.pt is damaged"),
    "has no loss": ("numbers are finite", "loss is nan after step 1"),
    "holds NaN": ("numbers are finite", "the state of step 2 holds NaN in '/x'"),
    "finishes with nan": ("numbers are finite", "the set holds what is not finite in '/images'"),
    "finishes with inf": ("numbers are finite", "the set holds what is not finite in '/images'"),
    "logs a step": ("metrics have names of their own", "a metric is called 'step'"),
    "logs seconds": ("metrics have names of their own", "a metric is called 'seconds'"),
    "logs under a number": ("metrics have names of their own", "a metric is called 3, which is no text"),
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
    "draws a normal from python": ("no global generator", "Python's global generator was used"),
    "draws bits from python and hides it": ("no global generator", "Python's global generator was used"),
    **{
        f"seeds {library} in {verb}": ("no global generator", f"{name}'s global generator (moved|was used)")
        for library, name in {"torch": "torch", "numpy": "numpy", "python": "Python"}.items()
        for verb in ("steps", "prepare", "step", "finish")
        if library == "torch" or verb == "step"
    },
    "looks at the test part": ("no data but the task's", "loads the dataset 'digits', test part and all"),
    "looks at the test part and hides it": ("no data but the task's", "loads the dataset 'digits'"),
    "takes double": ("budget and classes", "40 items of 10 classes, .* at ipc=2"),
    "crowds one class": ("budget and classes", r"20 items of 10 classes, by class \[1, 3, 2, .* at ipc=2"),
    "forgets a class": ("budget and classes", "class '0' has no item"),
    "renames the data": ("budget and classes", "another spec than the source"),
    "hides part of its state": ("resumed equals straight", "resumed from step 1 it does not end as"),
    "cannot be decoded": ("budget and classes", "it cannot be decoded"),
    "cannot be packed": ("budget and classes", "it cannot be packed"),
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


def test_a_state_may_wait_for_its_minimum_at_infinity():
    assert check_matcher(Watching()) == list(CLAUSES)


def test_a_generator_that_is_put_back_as_it_was_counts_as_untouched():
    assert check_matcher(Means(fault="saves and restores torch's")) == list(CLAUSES)


def test_a_task_that_a_matcher_does_not_take_is_no_breach():
    with pytest.raises(UsageError, match="digits are too small\nGive larger images"):
        check_matcher(Means(fault="takes no digits"))


def test_the_global_generators_end_as_they_were_whatever_happens_inside():
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    with pytest.raises(AssertionError, match="torch's global generator moved"), global_rng_untouched():
        torch.manual_seed(0)
        np.random.seed(0)
    with pytest.raises(KeyError), global_rng_untouched():
        torch.rand(3)
        raise KeyError
    assert torch.equal(torch.get_rng_state(), before[0]) and random.getstate() == before[2]
    assert (np.random.get_state()[1] == before[1]).all()


def test_every_function_of_pythons_generator_is_watched_and_afterwards_draws_again():
    kept = ModuleType("kept")
    names = [name for name in dir(random.Random) if name in random.__all__ and not name.endswith("state")]
    assert len(names) > 15
    for name in names:
        with pytest.raises(AssertionError, match="Python's global"), global_rng_untouched():
            setattr(kept, name, getattr(random, name))
            getattr(random, name)()
    held = random.getstate()
    assert 0 <= kept.random() < 1 and random.random is not kept.random
    random.setstate(held)


def test_states_are_equal_by_their_bits():
    nan, other = torch.tensor([1.0, float("nan")]), torch.tensor([1.0, float("nan")])
    assert same({"x": nan, "y": float("nan")}, {"x": other, "y": float("nan")})
    assert unchanged({"x": nan}, copied({"x": nan}))
    assert not same({"x": nan}, {"x": torch.ones(2)})
    assert not same({"x": torch.zeros(2)}, {"x": -torch.zeros(2)})
    assert not same({"x": torch.ones(2)}, {"x": torch.ones(2, 1)}) and not same({"y": 0.0}, {"y": -0.0})
    assert same({"x": torch.ones(3, 1).expand(3, 2)}, {"x": torch.ones(3, 2)})
    assert same({"x": torch.tensor(True)}, {"x": torch.tensor(True)}) and not same({"y": 1}, {"y": True})


@pytest.mark.parametrize("fault", ["logs a step", "logs seconds"])
def test_the_log_of_a_run_keeps_its_own_fields(fault, tmp_path):
    shown = []
    distill(
        image_task(),
        Means(fault=fault),
        out=tmp_path / "run",
        schedule=Schedule(log_steps=1),
        progress=lambda step, steps, values: shown.append(values),
    )
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [(list(record), record["step"]) for record in records] == [
        (["step", "seconds", "loss"], step) for step in (1, 2, 3)
    ]
    assert all(record["seconds"] != 7 for record in records) and shown == [{"loss": 0.5}] * 3


def test_every_clause_has_a_matcher_that_breaks_it():
    assert {clause for clause, _ in BROKEN.values()} | {"a frozen value"} == set(CLAUSES)


@pytest.mark.parametrize(
    ("value", "detail"),
    [
        (Accepting("images"), "it has a str as accepts, which must be an Accepts"),
        (Accepting(None), "it has a NoneType as accepts, which must be an Accepts"),
        (Unsaid(), "the matcher fails with OSError: no accepts today"),
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
    with pytest.raises(UsageError, match="options of a matcher that is given by its name"):
        check_matcher(Means(), steps=3)


def test_the_small_task_holds_every_class_and_no_test_image():
    task, digits = image_task(), data.load("digits")
    assert task.budget.ipc == 1 and 100 < len(task.images) < 200 and min(task.images.counts) > 5
    fit = {bytes(x.numpy()) for x in digits.fit.x}
    assert {bytes(x.numpy()) for x in task.images.x} <= fit
