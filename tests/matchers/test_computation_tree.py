"""Condensing graphs to computation trees: what is mined, what the budget leaves, and what is refused."""

from dataclasses import replace

import naive_trees
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from naive_herding_graphs import naive_round_robin
from naive_itemsets import naive_itemsets, support_of
from random_graphs import random_graphs, same_bits

import matchers
from ddengine.data.graph_source import load_graphs
from ddengine.errors import UsageError
from ddengine.graphs import as_graph_source
from ddengine.nets import NetSpec
from ddengine.ops.dag import histogram, trees_of
from ddengine.ops.refinement import color_refinement
from ddengine.rng import Rng
from ddengine.types import Budget, Task
from matchers import computation_tree
from matchers.computation_tree import MIRAGE
from matchers.itemsets import WALKS
from matchers.tree_evidence import evidence_set, tree_frequency, tree_scores
from matchers.tree_sets import item_trees, scaled
from synth import Forest

GIN = NetSpec("gin", width=4, depth=1)
COUNT, CLASSES = 23, 3


def collection(seed, classes=CLASSES, edges=5):
    """Random graphs of few trees, sorted by class."""
    graphs = random_graphs(seed, count=COUNT, node_sizes=(2,), edges=edges, classes=classes)
    return as_graph_source(replace(graphs, y=torch.arange(COUNT) % classes))


def named(graphs, name):
    return replace(graphs, spec=replace(graphs.spec, name=name))


def mined(matcher, graphs, budget=None):
    """The state after the last step, and the workspace."""
    task, rng = Task(graphs, budget), Rng(0)
    state, work = matcher.init(task, rng), matcher.prepare(task, rng)
    for _ in range(matcher.steps(task)):
        state, _ = matcher.step(state, work, rng)
    return state, work


def distilled(matcher, graphs, budget=None):
    state, work = mined(matcher, graphs, budget)
    return matcher.finish(state, work, Rng(0))


def make(**options):
    return matchers.make("computation_tree", GIN, **options)


def sets_of(graphs, hops=1):
    """For each class the sets of trees of its graphs, trees numbered as they first come."""
    nested = (graphs.x.tolist(), graphs.edge_index.tolist(), graphs.edge_attr.tolist())
    color = naive_trees.first_occurrence(naive_trees.trees(*nested, hops))
    found = [set() for _ in graphs.y]
    for tree, graph in zip(color, graphs.batch.tolist(), strict=True):
        found[graph].add(tree)
    return [[s for s, y in zip(found, graphs.y.tolist(), strict=True) if y == c] for c in range(CLASSES)]


def by_items(found):
    return dict(zip(found.sets, found.support.tolist(), strict=True))


@pytest.mark.parametrize("kind", WALKS)
@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 10**6), supports=st.tuples(*[st.integers(2, 5)] * CLASSES))
def test_mined_sets_are_those_of_naive_counting(kind, seed, supports):
    graphs = collection(seed)
    naive = [naive_itemsets(rows, s, kind) for rows, s in zip(sets_of(graphs), supports, strict=True)]
    if not all(naive):
        with pytest.raises(UsageError, match="no set of trees is frequent in class"):
            mined(make(support=supports, itemsets=kind), graphs)
        return
    state, _ = mined(make(support=supports, itemsets=kind), graphs)
    assert [by_items(found) for found in state.mined] == naive


@pytest.mark.parametrize(
    ("support", "absolute"),
    [((3.0,), (3, 3, 3)), ((2, 3, 4), (2, 3, 4)), ((0.3,), (3, 3, 3)), ((0.25, 4, 0.5), (2, 4, 4))],
)
def test_support_is_a_number_or_a_fraction_for_each_class_or_for_all(support, absolute):
    graphs = collection(2)
    assert graphs.counts == [8, 8, 7]
    state, _ = mined(make(support=support, itemsets="all"), graphs)
    for found, rows, least in zip(state.mined, sets_of(graphs), absolute, strict=True):
        assert by_items(found) == naive_itemsets(rows, least, "all")


def test_metrics_are_the_number_of_sets_of_each_class():
    task, rng, matcher = Task(collection(2), None), Rng(0), make(support=(3,))
    state, work = matcher.init(task, rng), matcher.prepare(task, rng)
    state, metrics = matcher.step(state, work, rng)
    assert metrics == {f"sets_{c}": len(found.sets) for c, found in enumerate(state.mined)}
    assert state.step == matcher.steps(task) == 1


@pytest.mark.parametrize("support", [(3, 3), (3, 3, 3, 3)])
def test_supports_for_another_number_of_classes_are_refused(support):
    with pytest.raises(UsageError, match=r"matcher.support=\[3, 3.*\] for 3 classes\nGive one support for"):
        mined(make(support=support), collection(2))


@pytest.mark.parametrize("support", [0, -3, 1.5, float("nan")])
def test_what_is_no_support_is_refused_at_once(support):
    with pytest.raises(UsageError, match=f"support={support} is neither"):
        make(support=(4, support))


def test_supports_that_nothing_reaches_are_refused():
    with pytest.raises(
        UsageError, match="no set of trees is frequent in class 'class 0' .*\nLower matcher.s"
    ):
        distilled(make(support=(100,)), collection(2))


def test_a_class_of_common_sets_alone_is_refused_where_they_are_dropped():
    same = collection(2).take(torch.arange(3).repeat(2))
    graphs = replace(same, y=torch.tensor([0, 0, 0, 1, 1, 1]))
    graphs = replace(graphs, spec=replace(graphs.spec, classes=("left", "right")))
    with pytest.raises(
        UsageError,
        match="frequent in class 'left' is so in another\nGive other supports or matcher",
    ):
        distilled(make(support=(1,), drop_common=True), graphs)
    assert len(distilled(make(support=(1,)), graphs).decode()) >= 2


def test_without_a_support_the_budget_takes_the_most_frequent_sets_of_each_class():
    graphs = collection(4)
    trees = distilled(make(select="itemsets", itemsets="all"), graphs, Budget(ipc=5)).decode()
    assert torch.bincount(trees.y).tolist() == [5, 5, 5]
    state, _ = mined(make(select="itemsets", itemsets="all"), graphs, Budget(ipc=5))
    for found, rows in zip(state.mined, sets_of(graphs), strict=True):
        supports = sorted(naive_itemsets(rows, 1, "all").values(), reverse=True)
        assert found.support.tolist() == supports[:5]
        assert all(support_of(items, rows) == n for items, n in by_items(found).items())


def test_a_budget_by_count_takes_the_first_sets_that_a_support_gives():
    graphs, matcher = collection(4), make(support=(2,))
    state, _ = mined(matcher, graphs)
    assert min(len(found.sizes) for found in state.mined) > 3
    items = distilled(matcher, graphs, Budget(ipc=3)).decode()
    expected = torch.cat([found.support[:3] / found.support[:3].sum() for found in state.mined]) * 3
    torch.testing.assert_close(items.weight, expected, rtol=2e-3, atol=0)
    assert items.y.tolist() == [0] * 3 + [1] * 3 + [2] * 3


@pytest.mark.parametrize("counts", ["binary", "mean"])
@pytest.mark.parametrize("nbytes", [40, 97, 10_000])
def test_a_budget_in_bytes_takes_from_each_class_in_turn_what_fits(counts, nbytes):
    graphs, matcher = collection(4), make(support=(2,), counts=counts)
    state, work = mined(matcher, graphs)
    items = item_trees(work.extra["trees"], state.mined, counts=counts, weighting="support")

    def forest(index):
        kept = torch.tensor(sorted(index))
        parts = [found.keep([start + i in index for i in range(len(found.sizes))]) for start, found in placed]
        made = item_trees(work.extra["trees"], parts, counts=counts, weighting="support")
        assert len(made) == len(kept)
        return Forest.of(scaled(made, balance=True))

    starts = np.cumsum([0, *(len(found.sizes) for found in state.mined)])[:-1].tolist()
    placed = list(zip(starts, state.mined, strict=True))
    rankings = [list(range(start, start + len(found.sizes))) for start, found in placed]
    expected = naive_round_robin(rankings, nbytes, lambda index: forest(index).nbytes["total"])
    found = distilled(matcher, graphs, Budget(nbytes=nbytes))
    assert found.nbytes["total"] <= nbytes and same_bits(found.decode(), forest(expected).decode())
    assert (len(expected) == len(items)) == (nbytes == 10_000)


def test_classes_stay_balanced_where_the_budget_cuts_them_unevenly():
    graphs = collection(4)
    for weighting in ("none", "support"):
        uneven = make(support=(4, 2, 2), weighting=weighting)
        items = distilled(uneven, graphs, Budget(ipc=7)).decode()
        assert len(torch.bincount(items.y).unique()) > 1
        sums = torch.zeros(CLASSES).index_add(0, items.y, items.weight)
        torch.testing.assert_close(sums, torch.full((CLASSES,), len(items) / CLASSES), rtol=2e-3, atol=0)


def test_mirage_is_all_sets_but_common_ones_without_weights():
    graphs = collection(11)
    mirage = make(variant="mirage", support=(2, 2, 2))
    spelled = make(support=(2, 2, 2), itemsets="all", weighting="none", class_balance=False, drop_common=True)
    one, two = distilled(mirage, graphs), distilled(spelled, graphs)
    assert same_bits(one.decode(), two.decode())
    items = one.decode()
    assert items.weight.unique().tolist() == items.count.unique().tolist() == [1]
    frequent = [set(naive_itemsets(rows, 2, "all")) for rows in sets_of(graphs)]
    only = [frequent[c] - frequent[c - 1] - frequent[c - 2] for c in range(CLASSES)]
    assert torch.bincount(items.y).tolist() == [len(sets) for sets in only]


def test_mirage_refuses_a_set_without_published_supports_and_names_those_that_have_some():
    task = Task(collection(1), None)
    with pytest.raises(UsageError, match="no published supports for 'random'\n") as refused:
        make(variant="mirage").init(task, Rng(0))
    assert all(name in refused.value.remedy for name in MIRAGE)
    assert make(variant="mirage", support=(2, 2, 2)).init(task, Rng(0)).step == 0


@pytest.mark.parametrize("name", MIRAGE)
def test_mirage_knows_the_published_supports_and_hops(name):
    task = Task(named(collection(1, classes=2), name), None)
    options = make(variant="mirage").settled(task)
    assert (options.support, options.hops) == MIRAGE[name]
    assert (options.itemsets, options.counts, options.weighting) == ("all", "binary", "none")
    assert options.drop_common and not options.class_balance
    given = make(variant="mirage", support=(0.5,), hops=4).settled(task)
    assert (given.support, given.hops) == ((0.5,), 4)


@pytest.mark.parametrize(
    "options", [{"itemsets": "maximal"}, {"counts": "mean"}, {"drop_common": False, "weighting": "none"}]
)
def test_what_the_published_form_fixes_is_refused_beside_it(options):
    fixed = {key for key, value in options.items() if value}
    with pytest.raises(UsageError, match=f"matcher.{fixed.pop()} is fixed by the published form"):
        make(variant="mirage", **options)


@pytest.mark.parametrize("options", [{"itemsets": "all"}, {"counts": "mean"}, {"drop_common": True}])
def test_an_option_of_sets_selects_sets(options):
    assert not make(**options).evidence and make().evidence


@pytest.mark.parametrize("options", [{"support": (3,)}, {"variant": "mirage"}, {"itemsets": "maximal"}])
def test_options_of_sets_are_refused_beside_evidence(options):
    with pytest.raises(UsageError, match=f"matcher.{next(iter(options))} is for sets of trees, not"):
        make(select="evidence", **options)


@pytest.mark.parametrize(
    ("option", "value"),
    [("select", "trees"), ("variant", "published"), ("itemsets", "close"), ("counts", "max"),
     ("weighting", "frequency")],
)  # fmt: skip
def test_unknown_values_of_options_are_refused_with_the_known(option, value):
    with pytest.raises(UsageError, match=f"unknown matcher.{option} '{value}'\n.*Known: "):
        make(**{option: value})


def test_a_limit_stops_a_mining_that_finds_more():
    with pytest.raises(UsageError, match="limit=0 is out of range"):
        make(limit=0)
    with pytest.raises(UsageError, match="support=1 gives more all itemsets than the limit of 3"):
        mined(make(support=(1,), itemsets="all", limit=3), collection(1))


# Sets of each class before and after common ones are dropped: hashed split 0, 2 hops.
NCI1_SETS, NCI1_KEPT = [10, 8], [4, 2]


def test_mirage_on_nci1_finds_the_sets_of_naive_counting(graph_sets):
    fit = load_graphs("tu", "NCI1", root=graph_sets, download=False).fit
    mirage = matchers.make("computation_tree", NetSpec("gin"), variant="mirage")
    state, work = mined(mirage, fit)
    trees = work.extra["trees"]
    rows = histogram(trees)
    held = [set(rows[[i]].indices.tolist()) for i in range(len(fit))]
    classes = [[s for s, y in zip(held, fit.y.tolist(), strict=True) if y == c] for c in (0, 1)]
    expected = [naive_itemsets(classes[c], support, "all") for c, support in enumerate((440, 570))]
    assert [by_items(found) for found in state.mined] == expected
    assert [len(sets) for sets in expected] == NCI1_SETS
    items = mirage.finish(state, work, Rng(0)).decode()
    only = [set(expected[c]) - set(expected[1 - c]) for c in (0, 1)]
    assert torch.bincount(items.y).tolist() == [len(sets) for sets in only] == NCI1_KEPT
    assert sorted(torch.bincount(items.item).tolist()) == sorted(len(s) for sets in only for s in sets)


def test_fewer_hops_than_layers_are_refused_before_anything_is_mined():
    matcher = matchers.make("computation_tree", NetSpec("gin", depth=3), hops=2)
    with pytest.raises(
        UsageError, match="matcher.hops=2 is less than the 3 layers .*\nGive matcher.hops=3 or"
    ):
        matcher.init(Task(collection(1), Budget(ipc=1)), Rng(0))


def test_gcn_tells_degrees_apart_and_refuses_not_to():
    gcn, task = NetSpec("gcn"), Task(collection(1), Budget(ipc=1))
    trees = matchers.make("computation_tree", gcn).prepare(task, Rng(0)).extra["trees"]
    assert trees.dag.degree is not None and trees.dag.hops == 2
    with pytest.raises(UsageError, match="matcher.degree=false with network=gcn"):
        matchers.make("computation_tree", gcn, degree=False).init(task, Rng(0))


@pytest.mark.parametrize(
    ("options", "hops", "degree"), [({}, 1, False), ({"hops": 3, "degree": True}, 3, True)]
)
def test_hops_and_degree_are_those_of_the_network_or_those_given(options, hops, degree):
    dag = make(**options).prepare(Task(collection(1), Budget(ipc=1)), Rng(0)).extra["trees"].dag
    assert dag.hops == hops and (dag.degree is not None) == degree


def test_a_note_says_how_many_nodes_share_a_tree():
    graphs = collection(1, edges=2)
    colors = color_refinement(graphs.x, graphs.edge_index, hops=1).colors[-1].max() + 1
    nodes = len(graphs.x)
    assert nodes >= 2 * colors
    expected = f"{nodes} nodes have {colors} different trees of 1 hops: {nodes / colors:.1f} nodes a tree"
    assert make().prepare(Task(graphs, Budget(ipc=1)), Rng(0)).notes == (expected,)


def test_a_warning_says_that_no_tree_occurs_twice():
    graphs = collection(1)
    alone = replace(
        graphs, x=torch.arange(len(graphs.x))[:, None], spec=replace(graphs.spec, node_sizes=(len(graphs.x),))
    )
    (note,) = make().prepare(Task(alone, Budget(ipc=1)), Rng(0)).notes
    assert note.startswith("warning: ") and "1.0 nodes a tree; almost no tree occurs twice" in note


def evidence_by_hand(graphs, count, weighted=True):
    """The forest of the `count` most frequent trees, equal ones by number."""
    trees = trees_of(graphs, 1)
    frequency = tree_frequency(trees)
    order = sorted(range(len(frequency)), key=lambda i: (-float(frequency[i]), i))
    chosen = torch.tensor(order[:count])
    return Forest.of(evidence_set(trees, tree_scores(trees)[0], frequency, chosen, weighted))


@pytest.mark.parametrize("weighting", ["support", "none"])
def test_evidence_keeps_the_most_frequent_trees_for_a_budget_by_count(weighting):
    graphs = collection(3)
    found = distilled(make(weighting=weighting), graphs, Budget(ipc=4))
    assert same_bits(found.decode(), evidence_by_hand(graphs, 12, weighting == "support").decode())
    assert (found.decode().weight.unique().tolist() == [1]) == (weighting == "none")


def test_evidence_keeps_all_trees_where_the_budget_is_for_more():
    graphs = collection(3)
    distinct = trees_of(graphs, 1).dag.sizes[-1]
    assert len(distilled(make(), graphs, Budget(ipc=distinct)).decode()) == distinct


@pytest.mark.parametrize("nbytes", [25, 73])
def test_evidence_keeps_as_many_of_the_most_frequent_trees_as_fit_in_the_bytes(nbytes):
    graphs = collection(3)
    found = distilled(make(), graphs, Budget(nbytes=nbytes))
    count = len(found.decode())
    assert same_bits(found.decode(), evidence_by_hand(graphs, count).decode())
    assert found.nbytes["total"] <= nbytes < evidence_by_hand(graphs, count + 1).nbytes["total"]


def test_evidence_reports_the_accuracy_of_its_model_and_the_number_of_trees():
    task, rng, matcher = Task(collection(3), Budget(ipc=1)), Rng(0), make()
    work = matcher.prepare(task, rng)
    state, metrics = matcher.step(matcher.init(task, rng), work, rng)
    scores, right = tree_scores(work.extra["trees"])
    assert metrics == {"model_accuracy": right, "trees": len(scores)} and torch.equal(state.scores, scores)
    assert matcher.steps(task) == state.step == 1


def test_the_refinement_of_colors_is_public_beside_the_matcher():
    assert computation_tree.color_refinement is color_refinement
