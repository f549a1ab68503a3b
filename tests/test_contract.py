"""What every registered matcher keeps to, whatever its algorithm."""

import json
from dataclasses import fields, is_dataclass, replace

import pytest
import torch
import trained_experts
from global_rng import global_rng_untouched

import matchers
from ddengine import checkpoint
from ddengine.data import load
from ddengine.errors import UsageError
from ddengine.loop import check_fit, run_identity
from ddengine.nets import NetSpec
from ddengine.rng import Rng
from ddengine.types import Budget, Matcher, Task
from matchers.trajectory import TrajectoryMatching
from synth import DistilledSet

NET = NetSpec("convnet", width=4, depth=2)
QUICK = {"steps": 3, "real_per_class": 5, "chunk": 31, "inner": {"steps": 2, "rate": 0.02}}
AST = {"middle": "equal", "balance": True, "perturb": 1.0, "ema": 0.9}
CASES = {
    **{name: (name, {}) for name in matchers.MATCHERS},
    "trajectory-learned": ("trajectory", {"labels": "learned", "start": "correct"}),
    "trajectory-target": ("trajectory", {"labels": "target", "gradient": "tesla"}),
    "trajectory-ast": ("trajectory", {**AST, "inner": {**QUICK["inner"], "momentum": 0.9, "batch": 7}}),
    "attention-buffer": ("attention", {"networks": "buffer"}),
}
DETERMINISTIC = {"herding", "kcenter"}  # selections that draw nothing
IPC = 3


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    digits = load("digits").fit
    some = digits.take(torch.arange(0, len(digits), 9))
    buffer = trained_experts.write(tmp_path_factory.mktemp("experts") / "buffer", some, NET)
    return Task(some, Budget(IPC), buffer)


@pytest.fixture(params=CASES)
def matcher(request):
    name, options = CASES[request.param]
    known = {f.name for f in fields(matchers.find(name).options)}
    quick = {key: value for key, value in QUICK.items() if key in known}
    return matchers.make(name, NET, **{**quick, **options})


def run(matcher, task, seed=5, state=None):
    """The states from a start, or from `state`, to the end, the metrics of each step, the finished set."""
    rng = Rng(seed)
    states, metrics = [state if state is not None else matcher.init(task, rng)], []
    work = matcher.prepare(task, rng)
    while states[-1].step < matcher.steps(task):
        state, measured = matcher.step(states[-1], work, rng)
        states.append(state)
        metrics.append({key: float(value) for key, value in measured.items()})
    synth = matcher.finish(states[-1], work, rng)
    work.close()
    return states, metrics, synth


def same(a, b):
    """Whether two states or sets hold the same bits under the same names."""
    one, two = dict(checkpoint.leaves(a)), dict(checkpoint.leaves(b))
    return one.keys() == two.keys() and all(
        torch.equal(v, two[k]) if isinstance(v, torch.Tensor) else v == two[k] for k, v in one.items()
    )


def copied(state):
    return {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in checkpoint.leaves(state)}


def test_it_is_a_frozen_value_that_follows_the_protocol(matcher, task):
    assert isinstance(matcher, Matcher) and is_dataclass(matcher) and matcher.__dataclass_params__.frozen
    check_fit(task, matcher)
    assert json.loads(json.dumps(run_identity(task, matcher, 0))) == run_identity(task, matcher, 0)


def test_the_same_seed_gives_the_same_bits(matcher, task):
    first, second = run(matcher, task), run(matcher, task)
    assert all(same(a, b) for a, b in zip(first[0], second[0], strict=True))
    assert first[1] == second[1] and same(first[2], second[2])


def test_another_seed_gives_another_set(matcher, task):
    sets = [run(matcher, task, seed)[2] for seed in range(3)]
    alike = [same(sets[0], other) for other in sets[1:]]
    if getattr(matcher, "selection", None) in DETERMINISTIC:
        assert all(alike)
    else:
        assert not all(alike)


def test_resumed_from_any_saved_state_equals_straight(matcher, task, tmp_path):
    states, metrics, synth = run(matcher, task)
    for done, state in enumerate(states):
        checkpoint.save(tmp_path, state.step, state, {"done": done})
        template = matcher.init(task, Rng(5))
        loaded, extra = checkpoint.load(tmp_path, state.step, template)
        assert extra == {"done": done} and same(loaded, state)
        later, rest, again = run(matcher, task, state=loaded)
        assert all(same(a, b) for a, b in zip(later, states[done:], strict=True))
        assert rest == metrics[done:] and same(again, synth)


def test_a_step_leaves_its_input_untouched(matcher, task):
    rng = Rng(5)
    state, work = matcher.init(task, rng), matcher.prepare(task, rng)
    source = task.source.x.clone()
    for _ in range(2):
        before = copied(state)
        after, _ = matcher.step(state, work, rng)
        after, _ = matcher.step(after, work, rng)
        matcher.finish(after, work, rng)
        now = dict(checkpoint.leaves(state))
        assert all(
            torch.equal(v, now[k]) if isinstance(v, torch.Tensor) else v == now[k] for k, v in before.items()
        )
        state, _ = matcher.step(state, work, rng)
    work.close()
    assert torch.equal(task.source.x, source)


def test_a_state_can_be_stepped_in_any_workspace(matcher, task):
    rng = Rng(5)
    used = matcher.prepare(task, rng)
    state = matcher.init(task, rng)
    for _ in range(2):
        matcher.step(state, used, rng)
    fresh = matcher.prepare(task, rng)
    assert same(matcher.step(state, used, rng)[0], matcher.step(state, fresh, rng)[0])
    used.close()
    fresh.close()


def test_no_global_generator_is_touched(matcher, task):
    with global_rng_untouched():
        run(matcher, task)


def test_budget_and_classes_are_respected(matcher, task):
    _, _, synth = run(matcher, task)
    images = synth.decode()
    assert len(images) == 10 * IPC and images.spec == task.source.spec
    if images.y_kind == "class":
        assert images.counts == [IPC] * 10
    assert images.x.dtype == torch.float32 and images.x.isfinite().all()
    assert torch.equal(synth.decode(torch.tensor([29, 0])).x, images.x[[29, 0]])
    parts = {key: synth.nbytes[key] for key in ("images", "labels", "extras")}
    assert synth.nbytes["total"] == sum(parts.values()) == sum(t.nbytes for t in synth.pack().values())
    if isinstance(matcher, TrajectoryMatching):  # the student's rate
        assert parts["extras"] == 4
    assert DistilledSet.make(synth, recipe={}, provenance={}).nbytes == synth.nbytes


def test_a_budget_in_bytes_holds_the_stored_set(matcher, task):
    some = replace(task, budget=Budget(nbytes=1600))
    if getattr(matcher.options, "labels", "hard") != "hard":
        with pytest.raises(UsageError, match=r"budget.nbytes=1600 .* hard labels\nGive ipc=N"):
            run(matcher, some)
        return
    _, _, synth = run(matcher, some)
    counts = synth.decode().counts
    assert len(set(counts)) == 1 and counts[0] >= 1
    assert synth.nbytes["images"] + synth.nbytes["labels"] <= 1600


def test_an_unknown_option_is_refused_with_the_known_ones():
    for name in matchers.MATCHERS:
        with pytest.raises(UsageError, match=f"unknown option of matcher '{name}' 'stesp'"):
            matchers.make(name, NET, stesp=3)


def test_a_value_of_the_wrong_type_is_refused():
    for name in ("attention", "distribution"):
        with pytest.raises(UsageError, match="matcher"):
            matchers.make(name, NET, lr="fast")


def test_an_unknown_matcher_is_refused_with_the_nearest():
    with pytest.raises(UsageError, match=r"unknown matcher 'atention'\nDid you mean 'attention'\?"):
        matchers.make("atention")


def test_an_installed_matcher_is_found_by_its_entry_point(tmp_path, monkeypatch):
    meta = tmp_path / "plugin-1.0.dist-info"
    meta.mkdir()
    (meta / "METADATA").write_text("Metadata-Version: 2.1\nName: plugin\nVersion: 1.0\n")
    (meta / "entry_points.txt").write_text("[ddengine.matchers]\nmine = matchers.subset:SubsetSelection\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert matchers.names() == [*matchers.MATCHERS, "mine"]
    assert matchers.find("mine").__name__ == "SubsetSelection"
