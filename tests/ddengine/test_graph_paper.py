from dataclasses import replace

import pytest
import torch
from sklearn.metrics import roc_auc_score
from tu_folder import random_set, write_tu

from ddengine import evaluating_graphs
from ddengine.data import load_graphs
from ddengine.errors import UsageError
from ddengine.graph_judge import evaluate_graphs
from ddengine.graph_paper import KEPT, MIRAGE, NETWORKS_TRAINED, PAPER, as_published, paper_recipe
from ddengine.graph_train import GraphRecipe, train_graph_networks
from ddengine.nets import NetSpec
from ddengine.ops.dag import trees_of
from ddengine.rng import Rng
from synth import DistilledSet, Forest

GIN = NetSpec("gin", width=4)
RECIPE = GraphRecipe(steps=5, lrs=(0.1,), dropout=0.2, balance=False)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return load_graphs(
        "tu", "TINY", root=write_tu(tmp_path_factory.mktemp("sets"), "TINY", random_set(83, 5))
    )


def packed(dataset, hops=2):
    some = torch.arange(0, len(dataset.fit), 7)
    return DistilledSet.make(Forest.of(trees_of(dataset.fit.take(some), hops)), recipe={}, provenance={})


def areas(nets, trees):
    """ROC-AUC of each network, and the number of graphs whose likeliest class is theirs."""
    with torch.no_grad():
        logits = nets(trees).double()
    y = trees.y.numpy()
    return [
        (roc_auc_score(y, one.softmax(1)[:, 1]), float((one.argmax(1).numpy() == y).mean())) for one in logits
    ]


def naive(trees, dataset, steps):
    """(validation area, test area, test accuracy) of each network at the first step of best validation area.

    Each number of steps is a training of its own, from none to all.
    """
    validation, test = (trees_of(part, 2) for part in (dataset.validation, dataset.test))
    rngs = [Rng(0).fold("judge", "gin", i) for i in range(NETWORKS_TRAINED)]
    best = [(-1.0, 0.0, 0.0)] * NETWORKS_TRAINED
    for count in range(steps + 1):
        nets = train_graph_networks(GIN, trees, replace(RECIPE, steps=count), 0.1, rngs)
        seen = zip(areas(nets, validation), areas(nets, test), strict=True)
        for i, ((area, _), (tested, right)) in enumerate(seen):
            if area > best[i][0]:
                best[i] = (area, tested, right)
    return best


def test_networks_score_at_their_best_validation_step_and_half_of_them_are_kept(dataset):
    distilled = packed(dataset)
    log = []
    table = evaluate_graphs(
        distilled,
        dataset,
        networks=[GIN],
        protocol=PAPER,
        recipe=RECIPE,
        seeds=NETWORKS_TRAINED,
        rows=("untrained", "full"),
        log=log.append,
    )
    trained_on = {"distilled": (distilled.decode(), 5), "full": (trees_of(dataset.fit, 2), 5)}
    trained_on["untrained"] = (distilled.decode(), 0)
    for name, (trees, steps) in trained_on.items():
        found = naive(trees, dataset, steps)
        finals = [r for r in log if (r["row"], r["kind"]) == (name, "final")]
        assert [r["validation_roc_auc"] for r in finals] == pytest.approx([v for v, _, _ in found])
        assert [r["test_roc_auc"] for r in finals] == pytest.approx([t for _, t, _ in found])
        kept = sorted(found, key=lambda one: -one[0])[:KEPT]
        rows = {row.metric: row for row in table.rows if row.name == name}
        assert rows["roc_auc"].values == pytest.approx(tuple(t for _, t, _ in kept))
        assert rows["accuracy"].values == pytest.approx(tuple(right for _, _, right in kept))
        assert len(rows["accuracy"].values) == 5
    best_steps = [r["validation_roc_auc"] for r in log if r["row"] == "distilled"]
    starts = [r["validation_roc_auc"] for r in log if r["row"] == "untrained"]
    assert all(a >= b for a, b in zip(best_steps, starts, strict=True))  # the start is a candidate
    assert best_steps != starts
    assert any(a == b for a, b in zip(best_steps, starts, strict=True))
    assert (table.protocol, table.to_json()["seeds"]) == (PAPER, 10)


def test_the_standard_protocol_keeps_the_last_step_of_every_network(dataset):
    distilled = packed(dataset)
    table = evaluate_graphs(distilled, dataset, networks=[GIN], recipe=RECIPE, seeds=10, rows=())
    rngs = [Rng(0).fold("judge", "gin", i) for i in range(10)]
    nets = train_graph_networks(GIN, distilled.decode(), RECIPE, 0.1, rngs)
    wanted = areas(nets, trees_of(dataset.test, 2))
    rows = {row.metric: row.values for row in table.rows}
    assert rows["roc_auc"] == pytest.approx(tuple(area for area, _ in wanted))
    assert rows["accuracy"] == pytest.approx(tuple(right for _, right in wanted))


def test_recipes_are_those_of_the_publication():
    assert paper_recipe("NCI1").recipe == GraphRecipe(301, (0.001,), 100.0, "sum", 0.5, balance=False)
    assert paper_recipe("ogbg-molbbbp").recipe.pool == "mean"
    assert {name: paper.width for name, paper in MIRAGE.items() if paper.width == 64} == {
        "IMDB-BINARY": 64,
        "DD": 64,
    }
    assert all(paper.recipe.lrs == (0.001,) for paper in MIRAGE.values())
    with pytest.raises(UsageError, match="no recipe for 'MUTAG'; it has those of NCI1"):
        paper_recipe("MUTAG")


def test_networks_take_the_width_of_the_publication_and_the_depth_of_the_trees_where_they_have_none():
    given = [NetSpec("gin"), NetSpec("gat", width=5), NetSpec("gcn", depth=2)]
    networks, recipe, seeds = as_published(given, 3, "NCI1", GraphRecipe(), 5)
    assert [(net.width, net.depth) for net in networks] == [(128, 3), (5, 3), (128, 2)]
    assert (recipe, seeds) == (MIRAGE["NCI1"].recipe, 10)
    assert as_published([NetSpec("gin")], None, "DD", GraphRecipe(), 10)[0] == [NetSpec("gin", width=64)]


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"recipe": GraphRecipe(steps=5)}, "a recipe of its own"),
        ({"seeds": 3}, "trains 10 networks, not seeds=3"),
        ({}, "no recipe for 'TINY'"),
    ],
    ids=str,
)
def test_what_the_publication_does_not_say_is_refused(wrong, match, dataset):
    given = {"networks": [GIN], "rows": (), "protocol": PAPER, **wrong}
    with pytest.raises(UsageError, match=match):
        evaluating_graphs.evaluate_graphs(packed(dataset), dataset=dataset, **given)
