"""Sets of computation trees as a synthetic set: what they hold, their bytes, and what a reader refuses."""

import math
import re
from collections import Counter
from dataclasses import replace

import naive_trees
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_graphs import mutated, random_graphs, same_bits

from ddengine.errors import UsageError
from ddengine.ops.dag import take, trees_of
from ddengine.types import SynthSet
from synth import Forest

SIZES = st.lists(st.integers(1, 5), min_size=1, max_size=3).map(tuple)


def forest_like(seed, hops=2, degree=False, soft=False, weights="none", **options):
    """Random trees with labels and weights of the kinds asked for."""
    g = torch.Generator().manual_seed(seed + 1)
    trees = trees_of(random_graphs(seed, **options), hops, degree=degree)
    m, k = len(trees), len(trees.spec.classes)
    if soft:
        trees = replace(trees, y=torch.randn((m, k), generator=g).softmax(1), y_kind="prob")
    scale = {"none": None, "half": 9.0, "wide": 3e7}[weights]
    return trees if scale is None else replace(trees, weight=torch.rand(m, generator=g) * scale + 0.1)


RANDOM = {
    "seed": st.integers(0, 2**20),
    "hops": st.integers(0, 4),
    "degree": st.booleans(),
    "soft": st.booleans(),
    "weights": st.sampled_from(["none", "half", "wide"]),
    "count": st.integers(1, 7),
    "node_sizes": SIZES,
    "edge_sizes": st.just(()) | SIZES,
    "directed": st.booleans(),
    "edges": st.sampled_from([0, 3, 11]),
}


@pytest.fixture
def forest() -> Forest:
    return Forest.of(forest_like(5, degree=True, soft=True, weights="half", edge_sizes=(4, 2)))


def unrolled(dag, level, color):
    """The tree of a colour as nested tuples, like those of naive_trees."""
    if level == 0:
        own = (*dag.x[color].tolist(), *([] if dag.degree is None else [int(dag.degree[color])]))
        return own, ()
    above, children = dag.levels[level - 1], []
    for i in (above.row == color).nonzero().flatten().tolist():
        child = (tuple(dag.edge_attr[above.edge[i]].tolist()), unrolled(dag, level - 1, above.child[i]))
        children += [child] * int(above.times[i])
    root = color
    for below in reversed(dag.levels[:level]):
        root = below.own[root]
    return unrolled(dag, 0, root)[0], tuple(sorted(children))


@settings(max_examples=60, deadline=None)
@given(**RANDOM)
def test_unpacking_gives_back_every_bit(**options):
    forest = Forest.of(forest_like(**options))
    packed = forest.pack()
    back = Forest.unpack(packed, {"y_kind": forest.y_kind}, forest.spec)
    assert Forest.problem(packed, forest.y_kind, forest.spec) is None
    assert same_bits(back.decode(), forest.decode())
    assert packed.keys() == back.pack().keys()
    assert all(torch.equal(t, packed[name]) for name, t in back.pack().items())


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**20),
    hops=st.integers(0, 3),
    degree=st.booleans(),
    directed=st.booleans(),
    edge_sizes=st.sampled_from([(), (3,), (2, 2)]),
)
def test_items_hold_the_very_trees_of_their_graphs(seed, hops, degree, directed, edge_sizes):
    graphs = random_graphs(seed, count=5, edges=5, directed=directed, edge_sizes=edge_sizes)
    trees = Forest.of(trees_of(graphs, hops, degree=degree)).decode()
    nested = (graphs.x.tolist(), graphs.edge_index.tolist(), graphs.edge_attr.tolist())
    expected = [Counter() for _ in range(5)]
    for graph, tree in zip(graphs.batch.tolist(), naive_trees.trees(*nested, hops, degree), strict=True):
        expected[graph][tree] += 1
    found = [Counter() for _ in range(5)]
    for item, color, count in zip(trees.item.tolist(), trees.color, trees.count.tolist(), strict=True):
        found[item][unrolled(trees.dag, hops, color)] += count
    assert found == expected and torch.equal(trees.y, graphs.y)


def test_a_forest_has_nothing_free(forest):
    assert isinstance(forest, SynthSet) and forest.params() == {} and forest.replace({}) is forest
    with pytest.raises(UsageError, match="images"):
        forest.replace({"images": torch.zeros(1)})


@settings(max_examples=20, deadline=None)
@given(**RANDOM)
def test_bytes_are_those_of_the_packed_tensors(**options):
    forest = Forest.of(forest_like(**options))
    sizes = {name: t.numel() * t.element_size() for name, t in forest.pack().items()}
    labels = sizes["labels"] + sizes.get("weights", 0)
    trees = sum(size for name, size in sizes.items() if name.startswith(("trees.", "items.")))
    expected = {"images": 0, "trees": trees, "labels": labels, "extras": 0, "total": sum(sizes.values())}
    assert forest.nbytes == expected


def test_a_path_of_three_nodes_costs_the_bytes_counted_by_hand():
    graphs = random_graphs(0, count=1, edges=0)
    spec = replace(graphs.spec, classes=("a", "b"))
    x, ends = torch.tensor([[1], [0], [1]]), torch.tensor([[0, 1, 1, 2], [1, 0, 2, 1]])
    path = replace(
        graphs,
        x=x,
        edge_index=ends,
        edge_attr=torch.zeros((4, 0), dtype=torch.int64),
        batch=torch.zeros(3, dtype=torch.int64),
        y=torch.tensor([1]),
        spec=spec,
    )
    packed = Forest.of(trees_of(path, 1)).pack()
    assert {name: t.tolist() for name, t in packed.items()} == {
        "trees.x": [[1], [0]], "trees.sizes": [2, 2], "trees.own": [0, 1], "trees.entries": [1, 1],
        "trees.child": [1, 0], "trees.times": [1, 2], "items.sizes": [2], "items.color": [0, 1],
        "items.count": [2, 1], "labels": [1],
    }  # fmt: skip
    assert Forest.of(trees_of(path, 1)).nbytes["total"] == 18


@pytest.mark.parametrize(("high", "dtype"), [(255, torch.uint8), (256, torch.int16), (2**15, torch.int32)])
def test_counts_have_the_narrowest_type_that_holds_them(forest, high, dtype):
    count = torch.full_like(forest.trees.count, high)
    packed = Forest.of(replace(forest.trees, count=count)).pack()
    assert packed["items.count"].dtype == dtype and packed["trees.x"].dtype == torch.uint8


def test_counts_of_more_than_31_bits_are_refused(forest):
    with pytest.raises(UsageError, match="2147483648"):
        Forest.of(replace(forest.trees, count=torch.full_like(forest.trees.count, 2**31)))


def test_what_is_all_ones_costs_nothing(forest):
    ones = replace(
        forest.trees, count=torch.ones_like(forest.trees.count), weight=torch.ones(len(forest.trees))
    )
    packed = Forest.of(ones).pack()
    assert (
        not {"items.count", "weights"} & packed.keys() and {"items.count", "weights"} <= forest.pack().keys()
    )
    assert Forest.of(ones).decode().count.unique().tolist() == [1]


def test_only_what_the_items_use_is_stored(forest):
    trees = forest.decode()
    one = Forest.of(take(trees, torch.tensor([2])))
    assert sum(one.trees.dag.sizes) < sum(trees.dag.sizes)
    assert one.trees.dag.sizes[-1] == len(one.trees.color) == int((trees.item == 2).sum())


def test_chosen_items_are_decoded_in_the_order_asked(forest):
    index = torch.tensor([6, 0, 6])
    some, trees = forest.decode(index), forest.decode()
    assert torch.equal(some.y, trees.y[index]) and torch.equal(some.weight, trees.weight[index])
    for place, i in enumerate(index.tolist()):
        assert torch.equal(some.color[some.item == place], trees.color[trees.item == i])


def test_an_item_that_names_a_colour_twice_counts_it_once():
    trees = forest_like(3)
    twice = replace(
        trees,
        item=trees.item.repeat_interleave(2),
        color=trees.color.repeat_interleave(2),
        count=trees.count.repeat_interleave(2),
    )
    merged, once = Forest.of(twice).decode(), Forest.of(trees).decode()
    assert torch.equal(merged.count, 2 * once.count) and torch.equal(merged.color, once.color)


def test_soft_labels_and_weights_are_near_what_was_given():
    trees = forest_like(11, soft=True, weights="half")
    decoded = Forest.of(trees).decode()
    torch.testing.assert_close(decoded.y, trees.y, atol=1 / 255, rtol=0)
    torch.testing.assert_close(decoded.y.sum(1), torch.ones(len(trees)), atol=1e-6, rtol=0)
    torch.testing.assert_close(decoded.weight, trees.weight, atol=0, rtol=2**-11)


@settings(max_examples=30, deadline=None)
@given(
    y=st.integers(2, 7).flatmap(
        lambda k: st.lists(
            st.lists(st.integers(0, 1000), min_size=k, max_size=k).filter(any), min_size=1, max_size=7
        )
    )
)
def test_soft_labels_are_stored_as_255ths_by_largest_remainders(y):
    m, k = len(y), len(y[0])
    trees = trees_of(random_graphs(0, count=m, classes=k), 1)
    shares = torch.tensor(y).double()
    given = (shares / shares.sum(1, keepdim=True)).float()
    stored = Forest.of(replace(trees, y=given, y_kind="prob")).pack()["labels"]
    assert stored.dtype == torch.uint8 and tuple(stored.shape) == (m, k - 1)
    for seats, row in zip(stored.tolist(), shares.tolist(), strict=True):
        quotas = [255 * value / sum(row) for value in row]
        seats.append(255 - sum(seats))
        assert min(seats) >= 0 and distance(seats, quotas) <= distance(by_hand(quotas), quotas) + 1e-3
        assert all(abs(n - quota) < 1 + 1e-4 for n, quota in zip(seats, quotas, strict=True))


def distance(seats, quotas):
    """What rounding changed; largest remainders give the least (two halves may go either way)."""
    return sum(abs(n - quota) for n, quota in zip(seats, quotas, strict=True))


def by_hand(quotas):
    """255 seats: whole quotas, then one more for the largest fractions of a seat."""
    seats = [math.floor(quota) for quota in quotas]
    order = sorted(range(len(quotas)), key=lambda i: seats[i] - quotas[i])
    for i in order[: 255 - sum(seats)]:
        seats[i] += 1
    return seats


@pytest.mark.parametrize(
    ("row", "stored"),
    [([1, 0, 0], [255, 0]), ([0, 0, 1], [0, 0]), ([0, 1, 0], [0, 255]), ([0.5, 0.5, 0], [128, 127]),
     ([0.001, 0.001, 0.998], [0, 0]), ([0.003, 0.4, 0.597], [1, 102])],
)  # fmt: skip
def test_the_last_class_has_what_the_others_leave(row, stored):
    trees = trees_of(random_graphs(0, count=1), 1)
    forest = Forest.of(replace(trees, y=torch.tensor([row]).float(), y_kind="prob"))
    assert forest.pack()["labels"].tolist() == [stored]
    expected = torch.tensor([[*stored, 255 - sum(stored)]]) / 255
    torch.testing.assert_close(forest.decode().y, expected, atol=1e-7, rtol=0)


def test_soft_labels_of_one_class_are_refused():
    trees = trees_of(random_graphs(0, classes=1), 1)
    with pytest.raises(UsageError, match="one class"):
        Forest.of(replace(trees, y=torch.ones(7, 1), y_kind="prob"))
    assert len(Forest.of(trees).decode()) == 7


def single_trees(colors, counts=None):
    """Items of one tree each, of random graphs."""
    trees = forest_like(5)
    m, ones = len(colors), torch.ones(len(colors), dtype=torch.int64)
    return replace(
        trees,
        item=torch.arange(m),
        color=torch.tensor(colors),
        count=ones if counts is None else torch.tensor(counts),
        y=torch.arange(m) % 3,
        weight=torch.ones(m),
    )


def test_the_colors_of_single_trees_in_order_cost_nothing():
    forest = Forest.of(single_trees([2, 3, 7, 11]))
    assert not {"items.sizes", "items.color", "items.count"} & forest.pack().keys()
    back = Forest.unpack(forest.pack(), {"y_kind": "class"}, forest.spec)
    assert same_bits(back, forest) and back.trees.color.tolist() == back.trees.item.tolist() == [0, 1, 2, 3]
    times = Forest.of(single_trees([2, 3, 7, 11], counts=[1, 5, 1, 2])).pack()
    assert times["items.count"].tolist() == [1, 5, 1, 2]
    assert not {"items.sizes", "items.color"} & times.keys()


@pytest.mark.parametrize("colors", [[3, 2, 7], [2, 2, 3], [2, 3, 3]])
def test_the_colors_of_single_trees_in_another_order_are_stored(colors):
    forest = Forest.of(single_trees(colors))
    rank = sorted(set(colors))
    assert forest.pack()["items.color"].tolist() == [rank.index(c) for c in colors]
    assert same_bits(Forest.unpack(forest.pack(), {"y_kind": "class"}, forest.spec), forest)


def test_the_colors_of_items_of_several_trees_are_stored_even_in_order():
    trees = single_trees([2, 3, 7, 11])
    pairs = replace(trees, item=torch.tensor([0, 0, 1, 1]), y=trees.y[:2], weight=trees.weight[:2])
    packed = Forest.of(pairs).pack()
    assert packed["items.color"].tolist() == [0, 1, 2, 3] and packed["items.sizes"].tolist() == [2, 2]


@pytest.mark.parametrize(
    ("factor", "dtype"), [(1.0, torch.float16), (1e-7, torch.float32), (1e7, torch.float32)]
)
def test_weights_have_half_precision_only_where_its_range_holds_them(factor, dtype):
    trees = forest_like(2, weights="half")
    forest = Forest.of(replace(trees, weight=trees.weight * factor))
    assert forest.pack()["weights"].dtype == dtype and bool((forest.decode().weight > 0).all())


def test_codebooks_are_counted_as_extras():
    trees = forest_like(4, node_sizes=(3, 5), edge_sizes=(2,))
    values = (None, torch.arange(10.0, dtype=torch.float64).reshape(5, 2) / 3)
    spec = replace(
        trees.spec, node_values=values, edge_values=(torch.tensor([[0.5], [2.0]]),), discretised="kmeans"
    )
    forest = Forest.of(replace(trees, spec=spec))
    packed = forest.pack()
    assert {name for name in packed if name.startswith("codebook")} == {"codebook.node.1", "codebook.edge.0"}
    assert forest.nbytes["extras"] == 4 * (10 + 2) and same_bits(
        forest.spec.node_values[1], values[1].float()
    )
    assert forest.nbytes["total"] == sum(t.nbytes for t in packed.values())


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        ({"weight": torch.zeros(7)}, "weight"),
        ({"weight": torch.full((7,), torch.inf)}, "weight"),
        ({"y": torch.full((7, 3), 0.2), "y_kind": "prob"}, "probabilities"),
        ({"y": torch.full((7,), 3)}, r"outside 0\.\.2"),
        ({"y_kind": "logit", "y": torch.zeros(7, 3)}, "logit"),
    ],
)
def test_trees_that_no_reader_would_accept_are_refused(change, cause):
    with pytest.raises(UsageError, match=cause):
        Forest.of(replace(forest_like(1), **change))


def test_no_items_are_refused():
    with pytest.raises(UsageError, match="no item"):
        Forest.of(take(forest_like(1), torch.zeros(0, dtype=torch.int64)))


def test_trees_of_very_many_hops_are_refused():
    trees = trees_of(random_graphs(1, count=1, edges=0), 65)
    with pytest.raises(UsageError, match="65 levels"):
        Forest.of(trees)
    assert Forest.of(trees_of(random_graphs(1, count=1, edges=0), 64)).trees.dag.hops == 64


def put(tensors, name, index, value):
    changed = tensors[name].clone()
    changed[index] = value
    return {**tensors, name: changed}


def signed(tensors, name):
    return {**tensors, name: tensors[name].to(torch.int16)}


def without(tensors, *names):
    return {name: t for name, t in tensors.items() if name not in names}


def items_left_out(tensors, *sizes):
    """Without what items hold but for the sizes that are given: colours in order, each once."""
    rest = without(tensors, "items.sizes", "items.color", "items.count")
    return {**rest, "items.sizes": torch.tensor(sizes, dtype=torch.uint8)} if sizes else rest


PER_ENTRY = ("trees.child", "trees.times", "trees.edge")
BROKEN = {
    "'trees.x' is missing": lambda t: {n: v for n, v in t.items() if n != "trees.x"},
    "'code' does not belong": lambda t: {**t, "code": torch.zeros(1)},
    "trees.x is torch.int64": lambda t: {**t, "trees.x": t["trees.x"].long()},
    "trees.x is torch.uint8 .* 1 columns": lambda t: {**t, "trees.x": t["trees.x"].repeat(1, 2)},
    r"trees.own is torch.uint8 \[\]": lambda t: {**t, "trees.own": torch.tensor(1, dtype=torch.uint8)},
    "trees.child is .* a vector": lambda t: {**t, "trees.child": t["trees.child"][None]},
    "trees.degree is .*float": lambda t: {**t, "trees.degree": t["trees.degree"].float()},
    "items.color is .*bool": lambda t: {**t, "items.color": t["items.color"].bool()},
    "trees.own holds a number below 0": lambda t: put(signed(t, "trees.own"), "trees.own", 0, -1),
    "trees.sizes is not a number above 0": lambda t: put(t, "trees.sizes", 1, 0),
    "at most 65 levels": lambda t: {**t, "trees.sizes": torch.ones(66, dtype=torch.uint8)},
    "trees.x has": lambda t: {**t, "trees.x": t["trees.x"][1:]},
    "trees.degree has": lambda t: {**t, "trees.degree": t["trees.degree"][1:]},
    "trees.own has": lambda t: {**t, "trees.own": t["trees.own"][1:]},
    "trees.entries has": lambda t: {**t, "trees.entries": t["trees.entries"][1:]},
    "trees.times has": lambda t: {**t, "trees.times": t["trees.times"][1:]},
    "trees.edge has": lambda t: {**t, "trees.edge": t["trees.edge"][1:]},
    "items.count has": lambda t: {**t, "items.count": t["items.count"][1:]},
    "trees.entries add up to": lambda t: put(t, "trees.entries", 0, 99),
    "but trees.child has 0": lambda t: {n: v for n, v in t.items() if n not in PER_ENTRY},
    "items.sizes are not": lambda t: put(t, "items.sizes", 0, 0),
    "items.sizes are .* add up": lambda t: put(t, "items.sizes", 0, 200),
    "items.color does not ascend": lambda t: {**t, "items.color": t["items.color"].flip(0)},
    "weights are .*torch.uint8": lambda t: {**t, "weights": t["weights"].to(torch.uint8)},
    "weights are .*6": lambda t: {**t, "weights": t["weights"][1:]},
    "labels are torch.float64 .7, 2., not uint8": lambda t: {**t, "labels": t["labels"].double()},
    "labels are torch.float16 .7, 2., not uint8": lambda t: {**t, "labels": t["labels"].half()},
    "labels are torch.int16 .7, 2., not uint8": lambda t: {**t, "labels": t["labels"].short()},
    "labels are torch.bool .7, 2., not uint8": lambda t: {**t, "labels": t["labels"].bool()},
    r"labels are .*\[7, 3\], not": lambda t: {**t, "labels": t["labels"][:, [0, 1, 1]]},
    r"labels are .*\[7, 1\], not": lambda t: {**t, "labels": t["labels"][:, :1]},
    r"labels are .*\[6, 2\], not": lambda t: {**t, "labels": t["labels"][1:]},
    r"labels are .*\[14\], not": lambda t: {**t, "labels": t["labels"].flatten()},
    r"labels are .*\[7, 2, 1\], not": lambda t: {**t, "labels": t["labels"][:, :, None]},
    r"labels are .*\[\], not": lambda t: {**t, "labels": t["labels"][0, 0]},
    "add up to the 0 of items.color": lambda t: {**items_left_out(t, 1), "labels": t["labels"][0, 0]},
    "there is no item": lambda t: {**items_left_out(t), "labels": t["labels"][0, 0]},
    "no item": lambda t: {**items_left_out(t), "labels": t["labels"][:0]},
    "labels add up to more than 1": lambda t: put(t, "labels", 0, 128),
    "items.count has 22 rows where .* for 7": lambda t: without(t, "items.color"),
    "items.sizes are .* add up to the 7 of": lambda t: without(t, "items.color", "items.count"),
    r"labels are .*\[7, 2\], not uint8 \[1, 2\]": lambda t: without(items_left_out(t, 7), "weights"),
    "a colour of an item is outside 0..21": lambda t: {
        **items_left_out(t), "labels": t["labels"].repeat(4, 1), "weights": t["weights"].repeat(4)
    },
    "weight does not": lambda t: put(t, "weights", 3, 0.0),
    "weight does not give": lambda t: put(t, "weights", 3, float("inf")),
    "level 2: own is outside": lambda t: put(t, "trees.own", -1, 250),
    "level 1: child is outside": lambda t: put(t, "trees.child", 0, 250),
    "level 1: edge is outside": lambda t: put(t, "trees.edge", 0, 250),
    "edge is outside": lambda t: {n: v for n, v in t.items() if n != "trees.edges"},
    "level 1: times is below 1": lambda t: put(t, "trees.times", 0, 0),
    "messages are not as many as its degree": lambda t: put(t, "trees.degree", 0, 77),
    "a colour of an item is outside": lambda t: put(t, "items.color", -1, 255),
    "a count is below 1": lambda t: put(t, "items.count", 0, 0),
    "node codes do not fit": lambda t: put(t, "trees.x", (0, 0), 3),
    "edge codes do not fit": lambda t: put(t, "trees.edges", (0, 1), 2),
}  # fmt: skip


@pytest.mark.parametrize("words", BROKEN)
def test_stored_tensors_that_break_a_rule_are_named(forest, words):
    tensors = forest.pack()
    assert Forest.problem(tensors, "prob", forest.spec) is None
    problem = Forest.problem(BROKEN[words](tensors), "prob", forest.spec)
    assert problem is not None and "\n" not in problem
    assert re.search(words, problem), problem


def test_labels_of_another_kind_are_named(forest):
    for y_kind, words in (("logit", "not 'logit'"), ("class", "labels are")):
        assert words in Forest.problem(forest.pack(), y_kind, forest.spec)


def test_edge_labels_where_the_source_has_none_do_not_belong():
    forest = Forest.of(forest_like(1))
    tensors = {**forest.pack(), "trees.edge": forest.pack()["trees.child"]}
    assert "does not belong" in Forest.problem(tensors, "class", forest.spec)


@settings(max_examples=100, deadline=None)
@given(data=st.data(), seed=st.integers(0, 30))
def test_mutated_tensors_are_named_or_make_a_set(data, seed):
    options = {"degree": seed % 2 == 0, "soft": seed % 3 == 0, "edge_sizes": (3,), "count": 3}
    forest = Forest.of(forest_like(seed, weights="half", **options))
    tensors = mutated(data.draw, forest.pack())
    if Forest.problem(tensors, forest.y_kind, forest.spec) is None:
        trees = Forest.unpack(tensors, {"y_kind": forest.y_kind}, forest.spec).decode()
        again = Forest.of(trees).decode()
        assert len(again) == len(trees) and torch.equal(again.count.sum(), trees.count.sum())
