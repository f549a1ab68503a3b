"""What every registered matcher keeps to, whatever its algorithm."""

import sys
from dataclasses import fields, replace

import plugged
import pytest
import torch
import trained_experts
from random_graphs import random_graphs

import matchers
from ddengine import reruns
from ddengine.data import load
from ddengine.errors import UsageError
from ddengine.graphs import Graphs, as_graph_source
from ddengine.identity import check_fit
from ddengine.nets import NetSpec
from ddengine.reruns import same
from ddengine.rng import Rng
from ddengine.testing import CLAUSES, check_matcher
from ddengine.types import Budget, Task
from matchers.trajectory import TrajectoryMatching
from synth import DistilledSet
from synth.compensated import Compensated

NET = NetSpec("convnet", width=4, depth=2)
QUICK = {"steps": 3, "real_per_class": 5, "chunk": 31, "inner": {"steps": 2, "rate": 0.02}}
DYNAMIC = {"labels": "dynamic", "count_teachers": False}
AST = {"middle": "equal", "balance": True, "perturb": 1.0, "ema": 0.9}
IMAGES = {
    **{name: (name, {}) for name, found in matchers.MATCHERS.items() if found.accepts.source != "graphs"},
    "trajectory-learned": ("trajectory", {"labels": "learned", "start": "correct"}),
    "trajectory-target": ("trajectory", {"labels": "target", "gradient": "tesla"}),
    "trajectory-ast": ("trajectory", {**AST, "inner": {**QUICK["inner"], "momentum": 0.9, "batch": 7}}),
    "attention-buffer": ("attention", {"networks": "buffer"}),
    "attention-factored": ("attention", {"synth": "factored"}),
    "characteristic-buffer": ("characteristic", {"networks": "buffer", "frequencies": 7, "alpha": 0.8}),
    "trajectory-factored": ("trajectory", {"synth": "factored", "labels": "learned"}),
    "attention-compensated": ("attention", {"synth": "compensated"}),
    "trajectory-compensated": (
        "trajectory",
        {"synth": {"name": "compensated", "groups": 2}, "labels": "learned"},
    ),
    "compensator": ("compensator", {"teachers": (1, 3)}),
    "compensator-dynamic": ("compensator", {"teachers": (1,), "label_teachers": (3,), **DYNAMIC}),
    "compensator-images": ("compensator", {"teachers": (1, 3), "recover": "images", "label_teachers": (0,)}),
    "compensator-part": (
        "compensator",
        {"teachers": (1, 3), "groups": 1, "class_batch": 7, "labels": "hard"},
    ),
}
GRAPHS = {
    "computation_tree": ("computation_tree", {}),
    "computation_tree-itemsets": ("computation_tree", {"select": "itemsets"}),
    "computation_tree-mean": ("computation_tree", {"select": "itemsets", "counts": "mean"}),
    "computation_tree-mirage": ("computation_tree", {"variant": "mirage", "support": (2, 2, 2)}),
    **{name: (name, {}) for name in ("tree_herding", "random", "herding", "kcenter")},
}
CASES = {
    **{name: ("images", *case) for name, case in IMAGES.items()},
    **{f"graphs-{name}": ("graphs", *case) for name, case in GRAPHS.items()},
}
DETERMINISTIC = {"herding", "kcenter", "tree_herding", "computation_tree"}  # they draw nothing
BATCH = NetSpec("convnet", width=4, depth=2, norm="batch")
NETS = {"images": NET, "graphs": NetSpec("gin")}
IPC = 3


@pytest.fixture(scope="module")
def images_task(tmp_path_factory):
    digits = load("digits").fit
    some = digits.take(torch.arange(0, len(digits), 9))
    buffer = trained_experts.write(tmp_path_factory.mktemp("experts") / "buffer", some, NET, BATCH)
    return Task(some, Budget(IPC), buffer)


@pytest.fixture(scope="module")
def graphs_task():
    """Three classes of 11, 11 and 10 small graphs with edge labels, isolated nodes among them."""
    drawn = random_graphs(5, count=32, edge_sizes=(2,), edges=7)
    graphs = as_graph_source(replace(drawn, y=torch.arange(32) % 3))
    assert graphs.counts == [11, 11, 10] and bool((graphs.degree == 0).any())
    return Task(graphs, Budget(IPC))


@pytest.fixture(params=CASES)
def case(request):
    return request.param


@pytest.fixture
def task(case, request):
    return request.getfixturevalue(f"{CASES[case][0]}_task")


@pytest.fixture
def matcher(case):
    return made(case)


def made(case):
    """The matcher of a case, with few steps."""
    kind, name, options = CASES[case]
    known = {f.name for f in fields(matchers.find(name).options)}
    quick = {key: value for key, value in QUICK.items() if key in known}
    return matchers.make(name, NETS[kind], **{**quick, **options})


def run(matcher, task, seed=5):
    """The finished set of a run."""
    return reruns.run(matcher, task, seed).synth


def test_it_keeps_every_clause_of_the_contract(matcher, task):
    assert check_matcher(matcher, task) == list(CLAUSES)


def test_another_seed_gives_another_set(case, matcher, task):
    sets = [run(matcher, task, seed) for seed in range(3)]
    alike = [same(sets[0], other) for other in sets[1:]]
    if getattr(matcher, "selection", CASES[case][1]) in DETERMINISTIC:
        assert all(alike)
    else:
        assert not all(alike)


def within_the_nominal_bytes(matcher, synth, nominal):
    """All bytes count, but those of teachers that are left out on demand; more of one class is one sheet."""
    uncounted = sum(2 * len(params) + 4 * len(statistics) for params, statistics in synth.teachers)
    assert bool(uncounted) == (getattr(matcher.options, "labels", "") == "dynamic")
    assert synth.nbytes["total"] - uncounted <= nominal
    counts = torch.bincount(synth.classes, minlength=len(synth.spec.classes))
    assert counts.min() >= 1 and counts.max() - counts.min() <= 1


def test_budget_and_classes_are_respected(matcher, task):
    synth = run(matcher, task)
    decoded = synth.decode()
    assert decoded.spec == task.source.spec
    counts = torch.bincount(decoded.classes, minlength=len(decoded.spec.classes)).tolist()
    each = IPC * getattr(synth, "factor", 1) ** 2
    if isinstance(synth, Compensated):
        within_the_nominal_bytes(matcher, synth, IPC * len(task.source.spec.classes) * 64)
    elif getattr(decoded, "y_kind", "class") == "class":
        assert sum(counts) == len(decoded) and all(1 <= n <= each for n in counts)
        if task.kind == "images" or isinstance(decoded, Graphs):
            assert len(decoded) == each * len(decoded.spec.classes)
    else:
        assert len(decoded) == each * len(decoded.spec.classes) or task.kind == "graphs"
    picked = synth.decode(torch.tensor([len(decoded) - 1, 0]))
    assert torch.equal(picked.y, decoded.y[[-1, 0]])
    if task.kind == "images":
        assert decoded.x.dtype == torch.float32 and decoded.x.isfinite().all()
        assert torch.equal(picked.x, decoded.x[[-1, 0]])
    assert DistilledSet.make(synth, recipe={}, provenance={}).nbytes == synth.nbytes


def test_the_bytes_of_the_parts_are_those_of_the_packed_tensors(matcher, task):
    synth = run(matcher, task)
    parts = {key: n for key, n in synth.nbytes.items() if key != "total"}
    assert parts.keys() >= {"images", "labels", "extras"} and (parts["images"] > 0) == (task.kind == "images")
    assert synth.nbytes["total"] == sum(parts.values()) == sum(t.nbytes for t in synth.pack().values())
    if isinstance(matcher, TrajectoryMatching):  # the student's rate
        assert synth.student_lr is not None and (parts["extras"] == 4 or isinstance(synth, Compensated))


def test_a_budget_in_bytes_holds_the_stored_set(matcher, task):
    nbytes = 1600 if task.kind == "images" else 230
    some = replace(task, budget=Budget(nbytes=nbytes))
    trajectory = isinstance(matcher, TrajectoryMatching) and matcher.options.labels != "hard"
    if trajectory and matcher.options.synth.name != "compensated":
        with pytest.raises(UsageError, match=r"budget.nbytes=1600 .* hard labels\nGive ipc=N"):
            run(matcher, some)
        return
    synth = run(matcher, some)
    if isinstance(synth, Compensated):
        within_the_nominal_bytes(matcher, synth, nbytes)
        return
    decoded = synth.decode()
    counts = torch.bincount(decoded.classes, minlength=len(decoded.spec.classes)).tolist()
    assert min(counts) >= 1
    if task.kind == "images":
        assert len(set(counts)) == 1
    assert synth.nbytes["images"] + synth.nbytes.get("trees", 0) + synth.nbytes["labels"] <= nbytes


def test_a_budget_in_bytes_that_holds_nothing_is_refused(matcher, task):
    with pytest.raises(UsageError, match="nbytes=3|budget of 3 bytes"):
        run(matcher, replace(task, budget=Budget(nbytes=3)))


def test_a_task_without_a_budget_needs_a_matcher_that_knows_the_size(case, matcher, task):
    free = replace(task, budget=None)
    if case == "graphs-computation_tree-mirage":
        check_fit(free, matcher)
        assert len(run(matcher, free).decode()) >= 3
        return
    with pytest.raises(UsageError, match="a budget needs either ipc or nbytes\nGive for example ipc=10"):
        check_fit(free, matcher)
    with pytest.raises(UsageError, match="a budget needs either ipc or nbytes"):
        matcher.init(free, Rng(0))


def test_supports_make_a_budget_needless(graphs_task):
    free = replace(graphs_task, budget=None)
    for options in ({"support": (3,)}, {"support": (0.2,), "itemsets": "all"}):
        mining = matchers.make("computation_tree", NETS["graphs"], **options)
        check_fit(free, mining)
        assert len(run(mining, free).decode()) >= 3


def test_a_matcher_of_images_or_graphs_refuses_the_other(images_task, graphs_task):
    source = {name: found.accepts.source for name, found in matchers.MATCHERS.items()}
    assert sorted(name for name in source if source[name] == "graphs") == ["computation_tree", "tree_herding"]
    for name, takes in source.items():
        for task in (images_task, graphs_task):
            if takes in ("any", task.kind):
                check_fit(task, matchers.find(name))
                continue
            with pytest.raises(
                UsageError, match=f"works on {takes}, '.*' holds {task.kind}\nGive "
            ) as refused:
                check_fit(task, matchers.find(name))
            assert "\n" not in refused.value.cause + refused.value.remedy


def test_k_means_of_graphs_is_refused_in_one_line(graphs_task):
    with pytest.raises(UsageError, match="matcher=kmeans works on images only\n.*kcenter") as refused:
        run(matchers.make("kmeans", NETS["graphs"]), graphs_task)
    assert "\n" not in refused.value.cause + refused.value.remedy


def test_a_budget_that_is_said_twice_names_both():
    with pytest.raises(UsageError, match="not both ipc=3 and nbytes=7\nLeave one out"):
        Budget(3, 7)


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
    module = "from matchers.subset import SubsetSelection\nMINE = SubsetSelection('herding')\n"
    plugged.install(tmp_path, "mine", {"matchers": {"mine": "mine:MINE"}}, module)
    monkeypatch.syspath_prepend(tmp_path)
    assert matchers.names() == [*matchers.MATCHERS, "mine"]
    assert matchers.find("mine") == matchers.MATCHERS["herding"]
    assert check_matcher("mine") == list(CLAUSES)
    sys.modules.pop("mine")
