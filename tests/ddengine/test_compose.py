import json
import sys
from dataclasses import fields, is_dataclass, replace
from operator import attrgetter
from typing import get_type_hints

import plugged
import pytest
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

import matchers
from ddengine import catalog, evaluating, given, loop, recipes
from ddengine.cli import KEYS
from ddengine.compose import composed, spelled
from ddengine.config import COMMANDS, DemoConfig, DistillConfig, EvaluateConfig, EvaluateGraphsConfig
from ddengine.data import DATASETS, GRAPH_COLLECTIONS, GRAPHS
from ddengine.errors import UsageError
from ddengine.graph_train import GraphRecipe
from ddengine.nets import NETWORKS
from ddengine.nets.graph import GRAPH_NETWORKS
from ddengine.ops import dsa
from ddengine.protocols import STANDARD
from ddengine.train import Recipe
from matchers import MATCHERS

ROWS = [name for name, _, _ in catalog.configs()]
ODD = [
    "a b",
    "it's",
    'say "so"',
    "back\\slash",
    "end\\",
    "quote\\'d",
    "(1),{2},[3]",
    "ünï",
    " lead",
    "a=b",
    "#5",
    "a:b",
    "1.10",
    "2026_01",
    "true",
    "$HOME",
    "~/x",
    "x,y",
]


def test_defaults_of_every_command_are_those_of_its_dataclass():
    assert composed("demo", []) == DemoConfig()
    evaluate = composed("evaluate", ["dataset=digits"])
    assert (evaluate.dataset.name, evaluate.network.name) == ("digits", "convnet")
    distill = composed("distill", ["dataset=digits"])
    assert (distill.dataset.name, distill.network.name, distill.matcher.name) == (
        "digits",
        "convnet",
        "attention",
    )
    for made, kind in ((evaluate, EvaluateConfig), (distill, DistillConfig)):
        assert type(made) is kind
        for key in {f.name for f in fields(kind)} - {"defaults", "dataset", "network", "matcher"}:
            assert getattr(made, key) == getattr(kind(), key)


def test_graph_sets_are_judged_by_the_defaults_of_the_judge():
    made = composed("evaluate_graphs", _needed("evaluate_graphs"))
    assert type(made) is EvaluateGraphsConfig
    assert (made.dataset.collection, made.dataset.name, made.network.name) == ("tu", "MUTAG", "gin")
    assert GraphRecipe(**given.tuples(vars(made.recipe))) == GraphRecipe()
    assert made.rows is None  # all that the labels of the set allow


def test_graphs_and_images_have_keys_of_their_own():
    graphs = composed("distill", ["dataset=ogb", "dataset.name=ogbg_molbace", "dataset.root=a b"]).dataset
    assert (graphs.collection, graphs.name, graphs.root) == ("ogb", "ogbg_molbace", "a b")
    for words, key in (
        (["dataset=digits"], "dataset.bins"),
        (["dataset=tu", "dataset.name=M"], "dataset.size"),
    ):
        with pytest.raises(UsageError, match=f"unknown key '{key}'"):
            composed("distill", [*words, f"{key}=8"])
    with pytest.raises(UsageError, match="distill needs dataset.name"):
        composed("distill", ["dataset=tu"])


@pytest.mark.parametrize(
    ("command", "dataset"),
    [("buffer", "tu"), ("import", "ogb"), ("evaluate", "tu"), ("evaluate_graphs", "npz")],
)
def test_a_command_that_takes_the_other_kind_of_data_refuses_it(command, dataset):
    with pytest.raises(UsageError, match=f"dataset={dataset} holds"):
        composed(command, [f"dataset={dataset}"])


@pytest.mark.parametrize("name", ROWS)
def test_shipped_row_composes_and_its_options_fit_its_matcher(name):
    config = composed("distill", [f"row={name}"])
    options = {key: value for key, value in vars(config.matcher).items() if key != "name"}
    assert matchers.make(config.matcher.name, **given.tuples(options)) is not None
    assert getattr(config.dataset, "collection", config.dataset.name) in (*DATASETS, *GRAPHS)
    assert (config.ipc is None) != (config.budget.nbytes is None)


def test_there_is_a_shipped_row_and_the_command_line_outranks_it():
    assert ROWS
    assert composed("distill", [f"row={ROWS[0]}", "ipc=3", "network.width=7"]).ipc == 3
    assert composed("distill", ["ipc=3", f"row={ROWS[0]}"]).ipc == 3


@pytest.mark.parametrize("name", MATCHERS)
def test_options_of_a_matcher_are_its_keys_with_their_defaults(name):
    options = MATCHERS[name].options
    node = composed("distill", ["dataset=digits", f"matcher={name}"]).matcher
    assert [f.name for f in fields(node)] == ["name", *(f.name for f in fields(options))]
    same_defaults(node, type(options))


def same_defaults(node, options):
    """Whether a node has the defaults and types of a dataclass of options, groups of options too."""
    for f in fields(options):
        value = getattr(node, f.name)
        if is_dataclass(f.default):
            assert [g.name for g in fields(value)] == [g.name for g in fields(f.default)]
            same_defaults(value, type(f.default))
            continue
        assert value == (list(f.default) if isinstance(f.default, tuple) else f.default)
        assert get_type_hints(type(node))[f.name] == get_type_hints(options)[f.name]


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("layers=[0,2]", "layers", (0, 2)),
        ("layers=[]", "layers", ()),
        ("layers=null", "layers", None),
        ("p=2", "p", 2),
        ("steps=7", "steps", 7),
        ("lr=1e-3", "lr", 1e-3),
        ("schedule=cosine", "schedule", "cosine"),
    ],
)
def test_overrides_reach_the_frozen_options(text, key, value, monkeypatch, tmp_path):
    class ReachedError(Exception):
        pass

    def distill(task, matcher, **rest):
        raise ReachedError(task, matcher, rest)

    monkeypatch.setattr(loop, "distill", distill)
    words = ["dataset=digits", "ipc=2", f"matcher.{text}", "network.width=5", "seed=3", f"out={tmp_path}"]
    with pytest.raises(ReachedError) as raised:
        recipes.run_distill(composed("distill", words), given.Watch())
    task, matcher, rest = raised.value.args
    assert (rest["seed"], rest["out"]) == (3, tmp_path)
    found = getattr(matcher.options, key)
    assert found == value
    assert type(found) is type(value)
    assert (task.ipc, matcher.network.width, matcher.network.name) == (2, 5, "convnet")


@pytest.mark.parametrize("text", ["steps=1.5", "layers=3", "layers=[a]", "lr=x", "lr=null"])
def test_options_of_a_wrong_type_are_refused(text):
    with pytest.raises(UsageError) as raised:
        composed("distill", ["dataset=digits", "ipc=1", f"matcher.{text}"])
    assert f"matcher.{text}" in raised.value.cause
    assert "\n" not in raised.value.cause


def test_catalog_names_what_the_registries_hold():
    ours = {
        kind: [n for n, origin, _ in catalog.listing(kind) if origin == "ddengine"] for kind in catalog.KINDS
    }
    assert ours["matchers"] == list(MATCHERS)
    assert ours["datasets"] == [*DATASETS, *GRAPHS]
    assert list(GRAPHS) == list(GRAPH_COLLECTIONS)
    assert ours["networks"] == [*NETWORKS, *GRAPH_NETWORKS]
    assert (list(catalog.NETWORKS), list(catalog.GRAPH_NETWORKS)) == (list(NETWORKS), list(GRAPH_NETWORKS))
    assert all(text for kind in catalog.KINDS for _, _, text in catalog.listing(kind))
    assert all(text for _, _, text in catalog.configs())


def test_composing_twice_gives_equal_configurations_that_share_nothing():
    first = composed("evaluate", ["dataset=digits", "recipe.lrs=[0.5]", "networks=[mlp]"])
    first.networks.append("mine")
    first.recipe.lrs.append(0.25)
    first.dataset.root = "elsewhere"
    second, third = (composed("evaluate", ["dataset=digits"]) for _ in range(2))
    assert second == third
    assert second.networks == EvaluateConfig().networks
    assert (second.dataset.root, second.recipe.lrs) == (None, EvaluateConfig().recipe.lrs)
    assert second.recipe is not third.recipe


def test_a_recipe_that_is_given_in_part_keeps_what_the_set_says():
    config = composed("evaluate", ["dataset=digits", "recipe.steps=50", "recipe.temperature=4"]).recipe
    trained = {"optimiser": "adamw", "temperature": 20.0, "augment": "crop_flip", "steps": 7}
    manifest = {"recipe": {"train": trained}}
    expected = Recipe(steps=50, optimiser="adamw", temperature=4.0, augment="crop_flip")
    assert evaluating.recipe_given(config, manifest, "digits", STANDARD) == expected
    auto = composed("evaluate", ["dataset=digits", "recipe.augment=auto", "recipe.lrs=[1]"]).recipe
    digits = replace(expected, steps=7, temperature=20.0, lrs=(1.0,), augment=dsa.strategy_for("digits"))
    assert evaluating.recipe_given(auto, manifest, "digits", STANDARD) == digits
    plain = composed("evaluate", ["dataset=cifar10"]).recipe
    assert evaluating.recipe_given(plain, {"recipe": {}}, "cifar10", STANDARD) is None  # the protocol's


def test_every_field_of_a_recipe_but_its_schedule_has_a_key():
    keys = vars(composed("evaluate", ["dataset=digits"]).recipe)
    assert set(keys) == {field.name for field in fields(Recipe)} - {"schedule"}
    assert all(f"recipe.{key}=" in KEYS["evaluate"] for key in keys)


def test_composing_leaves_no_state_behind_even_after_an_error():
    with pytest.raises(UsageError):
        composed("distill", ["dataset=digits", "matcher=distribution", "matcher.lr=fast"])
    assert not GlobalHydra.instance().is_initialized()
    composed("distill", ["dataset=digits", "matcher=distribution", "matcher.lr=3"])
    assert not GlobalHydra.instance().is_initialized()
    plain = composed("distill", ["dataset=digits", "matcher=distribution"])
    assert plain.matcher.lr == MATCHERS["distribution"].options.lr


@pytest.mark.parametrize(("root", "out"), list(zip(ODD[::2], ODD[1::2], strict=True)))
def test_paths_are_taken_as_typed(root, out):
    config = composed("distill", ["dataset=npz", f"dataset.root={root}", f"out={out}"])
    assert (config.dataset.root, config.out) == (root, out)


def test_quoted_paths_and_null_mean_what_they_say():
    words = ["dataset=npz", "dataset.root=null", "out='a b'"]
    made = composed("distill", words)
    assert (made.dataset.root, made.out) == (None, "a b")
    words = ["dataset=npz", "out=runs/${seed}", "seed=5", 'dataset.root="a b"']
    made = composed("distill", words)
    assert (made.dataset.root, made.out) == ("a b", "runs/5")


def test_texts_spelled_for_hydra_come_back_unchanged():
    texts = [*ODD, "null", "${seed}", "\\${seed}", "a\\\\${seed}", "${", "", "new\nline", "x,y"]
    keys = ["dataset.root", "dataset.preprocessing", "out", "device", "precision", "network.norm"]
    for start in range(0, len(texts), len(keys)):
        want = dict(zip(keys, texts[start:], strict=False))
        made = composed("distill", ["dataset=npz", *(spelled(key, text) for key, text in want.items())])
        assert {key: attrgetter(key)(made) for key in want} == want


def test_values_read_from_yaml_with_quotes_and_spaces_are_kept():
    text = 'on_error: "it\'s odd"\nroot: \'C:\\my "data" (1)\'\nsize: 32\ndownload: no\n'
    values = OmegaConf.to_container(OmegaConf.create(text))
    words = [spelled(f"dataset.{key}", value) for key, value in values.items()]
    made = composed("distill", ["dataset=npz", *words]).dataset
    assert {key: getattr(made, key) for key in values} == values
    assert made.root == 'C:\\my "data" (1)'


@pytest.mark.parametrize("name", ["mlp", "vit"])
def test_a_chosen_network_is_the_one_configured(name):
    assert composed("distill", ["dataset=digits", f"network={name}"]).network.name == name


def test_defaults_yield_to_overrides_and_go_with_their_choice():
    named = {"dataset": "npz", "dataset.root": "it's here", "dataset.size": 9, "network": "mlp"}
    kept = composed("evaluate", [], named)
    assert (kept.dataset.name, kept.dataset.root, kept.dataset.size) == ("npz", "it's here", 9)
    assert kept.network.name == "mlp"
    assert composed("evaluate", ["dataset.size=5"], named).dataset.size == 5
    assert composed("evaluate", ["dataset=npz"], named).dataset.size == 9
    other = composed("evaluate", ["dataset=digits", "network=lenet"], named)
    assert (other.dataset.name, other.dataset.root, other.dataset.size) == ("digits", None, None)
    assert other.network.name == "lenet"


@pytest.mark.parametrize("command", sorted({*COMMANDS} - {"multirun"}))
def test_later_overrides_win(command):
    assert composed(command, [*_needed(command), "out=one", "out=two"]).out == "two"


@pytest.mark.parametrize(
    "text", ["+seed=1", "++seed=1", "~seed", "seed@here=1", "seed=1,2", "seed=range(1,3)"]
)
def test_only_key_equals_value_is_an_override(text):
    with pytest.raises(UsageError) as raised:
        composed("demo", [text])
    assert text in raised.value.cause
    assert raised.value.remedy


@pytest.fixture
def plug_ins(tmp_path, monkeypatch):
    entries = {"broken": "torchhh:matcher", "mine": "more_matchers:MINE"}
    module = "from matchers.distribution import DistributionMatching\nMINE = DistributionMatching()\n"
    plugged.install(tmp_path, "more-matchers", {"matchers": entries}, module)
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("more_matchers", None)


def test_a_plug_in_that_does_not_load_disturbs_only_those_who_choose_it(plug_ins):
    assert composed("distill", ["dataset=digits"]).matcher.name == "attention"
    with pytest.raises(UsageError, match="'broken' does not load: No module named 'torchhh'"):
        composed("distill", ["dataset=digits", "matcher=broken"])


def test_a_plug_in_matcher_composes_like_ours(plug_ins):
    config = composed("distill", ["dataset=digits", "matcher=mine", "matcher.steps=3"])
    assert (config.matcher.name, config.matcher.steps) == ("mine", 3)


def test_run_keeps_the_resolved_configuration_as_plain_yaml(tmp_path):
    words = ["dataset=digits", "ipc=1", "matcher=random", f"out={tmp_path / 'run'}"]
    recipes.run_distill(composed("distill", words), given.Watch())
    kept = OmegaConf.load(tmp_path / "run" / "config.yaml")
    assert "defaults" not in kept
    assert (kept.dataset.name, kept.matcher.name, kept.ipc) == ("digits", "random", 1)
    assert "???" not in json.dumps(OmegaConf.to_container(kept))


def _needed(command: str) -> list[str]:
    needed = {
        "demo": [],
        "export": [],
        "evaluate_graphs": ["dataset=tu", "dataset.name=MUTAG", "network=gin"],
    }
    return needed.get(command, ["dataset=digits"])
