import json
import os
import shlex
import shutil
import subprocess
import sys
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest
from tu_folder import random_set, write_ogb, write_tu

import ddengine as dd
from ddengine import config, data, evaluating_graphs
from ddengine.cli import main
from ddengine.errors import UsageError
from ddengine.graph_train import GraphRecipe
from ddengine.nets import NetSpec
from ddengine.runs import read_run
from ddengine.train import Recipe
from synth import DistilledSet

ROOT = Path(dd.__file__).parents[1]
TWO = ["dataset=tu", "dataset.root=data", "dataset.name=TWO", "dataset.download=false"]
THREE, BARE, ATTRS = ([*TWO[:2], f"dataset.name={name}", TWO[3]] for name in ("THREE", "BARE", "ATTRS"))
OGB = ["dataset=ogb", "dataset.root=data", "dataset.name=ogbg_molbace"]
SMALL = ["budget.nbytes=300", "network.width=4"]
QUICK = ["seeds=1", "recipe.steps=1", "recipe.lrs=[0.1]", "workers=1"]
RUNS = {
    "two": [*TWO, *SMALL],
    "three": [*THREE, *SMALL],
    "degrees": [*TWO, *SMALL, "matcher.degree=true"],
    "bare": [*BARE, *SMALL],
    "ogb": [*OGB, *SMALL],
    "sets": [*TWO, "matcher=computation_tree", "network.width=4", "ipc=3", "matcher.select=itemsets"],
    "it's $a run": [
        *ATTRS,
        "dataset.discretise=kmeans",
        "dataset.bins=3",
        "seed=5",
        "dataset.split=2",
        *SMALL,
    ],
}


def spoiled(folder, name, part, change):
    """A set of 31 graphs, one of whose files has its lines changed."""
    path = write_tu(folder / name, name, random_set(31)) / f"{name}_{part}.txt"
    path.write_text("".join(f"{line}\n" for line in change(path.read_text().splitlines())))


def written(root):
    """Graph sets in both forms, and sets with one mistake each."""
    folder, pairs = root / "data", random_set(61, 4, (0, 1))
    write_tu(folder, "TWO", random_set(61))
    write_tu(folder, "THREE", random_set(79, 1, (0, 4, 7)))
    write_tu(
        folder, "BARE", [{k: g[k] for k in ("y", "n", "edges", "node_labels")} for g in random_set(61, 3)]
    )
    write_tu(
        folder, "ATTRS", [{**g, "node_attributes": [i / 7 for i in range(g["n"])]} for g in random_set(61)]
    )
    once = [{**g, "edges": g["edges"][::2], "edge_labels": g["edge_labels"][::2]} for g in pairs]
    write_ogb(folder / "ogbg_molbace", once, (list(range(41)), list(range(41, 51)), list(range(51, 61))))
    write_tu(root / "bad" / "ONE", "ONE", random_set(31, 0, (1,)))
    write_tu(root / "bad" / "GONE", "GONE", random_set(31))
    (root / "bad" / "GONE" / "GONE_graph_labels.txt").unlink()
    spoiled(root / "bad", "TEXT", "A", lambda lines: [*lines[:3], "1, x", *lines[3:]])
    spoiled(root / "bad", "RANGE", "A", lambda lines: [*lines, "1, 4321"])
    spoiled(root / "bad", "CROSS", "A", lambda lines: [*lines, "1, 40"])
    spoiled(root / "bad", "LABELS", "node_labels", lambda lines: lines[:-1])
    spoiled(root / "bad", "COUNT", "graph_labels", lambda lines: lines[:-1])
    spoiled(root / "bad", "EMPTY", "A", lambda lines: [])


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Graph sets, good and bad, and runs on the good ones, one of which has lost its data."""
    root = tmp_path_factory.mktemp("graph_world")
    written(root)
    before = Path.cwd()
    os.chdir(root)
    try:
        for name, words in RUNS.items():
            assert main(["distill", *words, f"out={name}"]) == 0
        shutil.copytree("data", "lost")
        assert main(["distill", *TWO, *SMALL, "dataset.root=lost", "out=moved"]) == 0
        assert main(["distill", "dataset=digits", "ipc=1", "matcher=random", "out=digits"]) == 0
    finally:
        os.chdir(before)
    shutil.rmtree(root / "lost")
    for name in ("damaged", "unfinished"):
        shutil.copytree(root / "two", root / name)
    damaged = root / "damaged" / "distilled" / "data.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")
    shutil.rmtree(root / "unfinished" / "distilled")
    return root


def one_object(out):
    assert out.count("\n") == 1
    return json.loads(out, parse_constant=lambda text: pytest.fail(f"{text} is not JSON"))


def snapshot(folder):
    return {p.relative_to(folder): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def same(table):
    """A table without what differs from time to time, or from one spelling of the command to another."""
    rows = [{key: value for key, value in row.items() if key != "train_seconds"} for row in table["rows"]]
    return {**table, "rows": rows, "command": None, "seal": None}


def bad(name):
    return ["distill", "dataset=tu", f"dataset.root=bad/{name}", f"dataset.name={name}", "budget.nbytes=300"]


BAD = [
    (["distill", "dataset=tu", "dataset.root=data", "budget.nbytes=300"], "dataset.name"),
    (["distill", *TWO], "ipc or nbytes"),
    (["distill", *TWO, *SMALL, "dataset.name=NOPE"], "'NOPE' is not at data"),
    (["distill", *TWO, *SMALL, "dataset.name=../TWO"], "'../TWO'"),
    (["distill", *TWO, *SMALL, "dataset.root=nowhere"], "'TWO' is not at nowhere"),
    (["distill", *OGB, *SMALL, "dataset.name=NOPE"], "'NOPE' is not at data"),
    (bad("GONE"), "bad/GONE/GONE_graph_labels.txt"),
    (bad("TEXT"), "bad/TEXT/TEXT_A.txt: row 4 holds 'x'"),
    (bad("RANGE"), "names node 4321"),
    (bad("CROSS"), "node 40 of graph"),
    (bad("LABELS"), "LABELS_node_labels.txt"),
    (bad("COUNT"), "COUNT_graph_labels.txt has 30 rows"),
    (bad("EMPTY"), "bad/EMPTY/EMPTY_A.txt"),
    (bad("ONE"), "ONE has one class, '1'"),
    (["distill", *ATTRS, *SMALL], "ATTRS has 1 continuous node attributes"),
    (["distill", *ATTRS, *SMALL, "dataset.discretise=banana"], "banana"),
    (["distill", *ATTRS, *SMALL, "dataset.discretise=kmeans", "dataset.bins=1"], "dataset.bins=1"),
    (["distill", *OGB, *SMALL, "dataset.split=3"], "split=3"),
    (["distill", *TWO, *SMALL, "dataset.split=-1"], "split=-1"),
    (["distill", *TWO, *SMALL, "dataset.size=8"], "dataset.size"),
    (["distill", *TWO, *SMALL, "matcher=attention"], "'TWO' holds graphs"),
    (["distill", *TWO, *SMALL, "matcher=trajectory"], "'TWO' holds graphs"),
    (["distill", *TWO, *SMALL, "matcher=kmeans"], "kmeans"),
    (["distill", "dataset=digits", "matcher=computation_tree", "ipc=1"], "'digits' holds images"),
    (["distill", *TWO, *SMALL, "network=convnet"], "network convnet works on images"),
    (["distill", *TWO, *SMALL, "network=gim"], "gim"),
    (["distill", "dataset=digits", "network=gin", "ipc=1"], "gin"),
    (["distill", *TWO, *SMALL, "matcher.hops=1"], "matcher.hops=1"),
    (["distill", *TWO, *SMALL, "network=gcn", "matcher.degree=false"], "matcher.degree=false"),
    (["distill", *TWO, "network.width=4", "matcher.support=[-1]"], "-1"),
    (["distill", *TWO, *SMALL, "matcher.support=[often]"], "often"),
    (["distill", *TWO, "matcher=random", "budget.nbytes=1"], "nbytes=1"),
    (["distill", *TWO, "matcher=tree_herding", "budget.nbytes=1"], "nbytes=1"),
    (["distill", *TWO, "matcher=random", "ipc=1000"], "1000 graphs of each class"),
    (["distill", *TWO, "matcher.variant=mirage"], "no published supports for 'TWO'"),
    (["distill", *TWO, *SMALL, "matcher.select=evidence", "matcher.support=[3]"], "select=evidence"),
    (["distill", *TWO, *SMALL, "seed=9", "out=two"], "seed is 0 there and 9 here"),
    (["buffer", *TWO, "count=1"], "dataset=tu holds graphs"),
    (["evaluate", "bare", "networks=[gine]"], "the edges of 'BARE' have none"),
    (["evaluate", "two", "networks=[gin,gcn]"], "network gcn needs the degree"),
    (["evaluate", "two", "networks=[gin,gim]"], "gim"),
    (["evaluate", "two", "network=convnet"], "network convnet works on images"),
    (["evaluate", "two", "network.depth=3"], "3 layers, the trees 2 hops"),
    (["evaluate", "two", "dataset.name=THREE"], "2 classes are not the 3 of 'THREE'"),
    (["evaluate", "two", "dataset=digits"], "dataset=digits holds images"),
    (["evaluate", "digits", *TWO], "dataset=tu holds graphs"),
    (["evaluate", "digits", "networks=[gin]"], "gin"),
    (["evaluate", "two", "rows=[kmeans]"], "kmeans"),
    (["evaluate", "sets", "rows=[random_same_labels]"], "random_same_labels"),
    (["evaluate", "two", "protocol=paper/mirage"], "no recipe for 'TWO'"),
    (["evaluate", "two", "protocol=paper"], "'paper'"),
    (["evaluate", "ogb", "protocol=paper/mirage", "recipe.steps=3"], "a recipe of its own"),
    (["evaluate", "ogb", "protocol=paper/mirage", "seeds=3"], "seeds=3"),
    (["evaluate", "two", "recipe.pool=max"], "max"),
    (["evaluate", "two", "recipe.augment=none"], "recipe.augment"),
    (["evaluate", "two", "device=cpu"], "device"),
    (["evaluate", "two", "seeds=0"], "seeds=0"),
    (["evaluate", "moved"], "'TWO' is not at"),
]
DAMAGED = [
    (["evaluate", "damaged"], "damaged/distilled/data.safetensors"),
    (["inspect", "damaged"], "damaged/distilled/data.safetensors"),
    (["verify", "damaged"], "damaged/distilled/data.safetensors"),
    (["evaluate", "unfinished"], "unfinished"),
    (["evaluate", "data"], "data"),
]


@pytest.mark.parametrize(
    ("words", "named", "code"),
    [(*case, 2) for case in BAD] + [(*case, 3) for case in DAMAGED],
    ids=lambda value: " ".join(value)[:90] if isinstance(value, list) else "",
)
def test_bad_input_is_one_line_of_cause_one_of_remedy_and_loses_nothing(words, named, code, call, world):
    before = snapshot(world)
    found, out, err = call(*words)
    lines = err.splitlines()
    assert (found, out, len(lines)) == (code, "", 2), err
    assert lines[0].startswith("error: ")
    assert named in lines[0]
    assert lines[1].startswith("  fix: ")
    assert len(lines[1]) > 12
    assert snapshot(world) == before


@pytest.mark.parametrize(
    ("word", "named"),
    [
        ("matcher.support=[2,3,4]", "matcher.support=[2, 3, 4] for 2 classes"),
        ("matcher.support=[99]", "no set of trees is frequent in class '-1'"),
        ("budget.nbytes=1", "nbytes=1"),
    ],
)
def test_what_only_the_trees_can_tell_is_refused_after_the_notes_and_leaves_no_set(
    word, named, call, tmp_path
):
    code, out, err = call("distill", *TWO, "network.width=4", word, f"out={tmp_path / 'run'}")
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert (code, out, len(errors)) == (2, "", 1)
    assert named in errors[0]
    assert err.splitlines()[-2:] == [errors[0], err.splitlines()[-1]]
    assert err.splitlines()[-1].startswith("  fix: ")
    assert not (tmp_path / "run" / "distilled").exists()


@pytest.mark.parametrize(("run", "kind"), [("two", "forest"), ("three", "forest"), ("ogb", "forest")])
def test_graphs_are_distilled_by_computation_trees_for_gin_unless_said_otherwise(run, kind, call, world):
    code, out, err = call("distill", *RUNS[run], f"out={run}", "--json")
    found = one_object(out)
    assert (code, err, found["kind"]) == (0, f"note: {run} is finished, and is returned as it is\n", kind)
    assert found["provenance"]["matcher"]["type"] == "matchers.computation_tree.ComputationTree"
    assert (found["recipe"]["network"]["name"], found["recipe"]["network"]["width"]) == ("gin", 4)
    assert found["budget"]["total"] <= 300
    assert found["resumed_from"] == found["provenance"]["steps"] == 1
    assert found["recipe"]["dataset"]["collection"] == ("ogb" if run == "ogb" else "tu")


def test_the_repeated_command_returns_the_finished_run_untouched(call, world):
    before = snapshot(world / "three")
    assert call("distill", *RUNS["three"], "out=three")[0] == 0
    assert snapshot(world / "three") == before


@pytest.mark.parametrize(
    ("matcher", "size"),
    [
        ("random", "budget.nbytes=300"),
        ("herding", "ipc=2"),
        ("kcenter", "budget.nbytes=300"),
        ("tree_herding", "ipc=2"),
        ("tree_herding", "budget.nbytes=300"),
    ],
)
def test_real_graphs_are_chosen_by_name(matcher, size, call, tmp_path):
    words = ["distill", *THREE, f"matcher={matcher}", "network.width=4", size, f"out={tmp_path / 'run'}"]
    found = one_object(call(*words, "--json")[1])
    assert found["kind"] in ("graphs", "forest")
    assert found["count"] == 6 if size == "ipc=2" else found["budget"]["total"] <= 300
    code, out, _ = call("evaluate", str(tmp_path / "run"), *QUICK, "rows=[]", "--json")
    assert (code, [row["name"] for row in one_object(out)["rows"]]) == (0, ["distilled"] * 2)


def test_evaluate_prints_every_row_with_both_metrics(call, world):
    code, out, err = call("evaluate", "three", *QUICK, "seeds=2", "--json")
    table = one_object(out)
    assert code == 0
    assert "evaluating: 12/12" in err
    assert {"protocol", "dataset", "rows", "scores"} <= set(table)
    names = list(dict.fromkeys(row["name"] for row in table["rows"]))
    networked = ["distilled", "random_bytes", "random_same_labels", "herding_bytes", "untrained", "full"]
    assert names == [*networked, "size_only", "wl_logistic"]
    wanted = {"name", "network", "metric", "mean", "std", "n", "ci95", "values", "steps", "bytes"}
    assert all(wanted <= set(row) for row in table["rows"])
    assert {row["metric"] for row in table["rows"]} == {"accuracy", "roc_auc"}
    assert same(json.loads((world / "three" / "table.json").read_text())) == same(table)
    assert len((world / "three" / "results.jsonl").read_text().splitlines()) >= 12


def test_networks_that_the_set_was_not_made_for_judge_it_too(call):
    networks = "networks=[gin,gcn,gat,sage]"
    code, out, _ = call("evaluate", "degrees", *QUICK, networks, "rows=[random_bytes]", "--json")
    rows = one_object(out)["rows"]
    assert code == 0
    assert [row["network"] for row in rows[::4]] == ["gin", "gcn", "gat", "sage"]
    assert [row["network_spec"]["width"] for row in rows[::4]] == [4, 64, 64, 64]


def test_the_official_split_of_an_ogb_set_is_judged(call):
    code, out, _ = call("evaluate", "ogb", *QUICK, "rows=[full,size_only]", "--json")
    table = one_object(out)
    assert (code, table["dataset"], table["source_matches"]) == (0, "ogbg-molbace", True)
    assert {row["count"] for row in table["rows"] if row["name"] == "full"} == {41}


def test_people_get_a_table_for_each_metric(call):
    code, out, _ = call("evaluate", "two", *QUICK)
    assert code == 0
    assert out.splitlines()[0] == "TWO, standard-v1, seed 0"
    assert "accuracy %" in out
    assert "ROC-AUC %" in out
    assert sum(line.startswith("wl_logistic") for line in out.splitlines()) == 6
    assert sum("distilled is " in line for line in out.splitlines()) == 2


def test_inspect_verify_and_report_know_graphs(call, world, tmp_path):
    code, out, err = call("inspect", "ogb")
    assert (code, err) == (0, "")
    assert "items of node labels" in out
    code, out, err = call("verify", "ogb")
    assert (code, err, out.splitlines()[-1]) == (0, "", "ok")
    assert call("evaluate", "ogb", *QUICK, "rows=[full]")[0] == 0
    code, out, err = call("report", "ogb", "--html", str(tmp_path / "page.html"))
    assert (code, err) == (0, f"wrote {tmp_path / 'page.html'}\n")
    assert "| dataset | ogbg-molbace, graphs of " in out
    assert "| classes | 2: 0, 1 |" in out
    assert ", trees " in next(line for line in out.splitlines() if line.startswith("| bytes"))
    document = (tmp_path / "page.html").read_text()
    assert "<h3>The distilled trees</h3>" in document
    assert (world / "ogb" / "distilled" / "preview.png").is_file()
    assert "ROC-AUC" in document


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("matchers", {"computation_tree", "tree_herding"}),
        ("datasets", {"tu", "ogb"}),
        ("networks", {"gin", "gcn", "gine", "sage", "gat", "gatv2"}),
    ],
)
def test_list_names_what_is_there_for_graphs(kind, names, call):
    items = one_object(call("list", kind, "--json")[1])["items"]
    assert names <= {item["name"] for item in items}


def keys(kind, path=""):
    for f in fields(kind):
        if is_dataclass(f.type):
            yield from keys(f.type, f"{path}{f.name}.")
        elif f.name not in ("defaults", "collection", "dataset"):
            yield path + f.name


def test_help_names_the_keys_for_graphs(call):
    said = {word.partition("=")[0] for word in call("evaluate", "--help")[1].split()}
    assert {key for key in keys(config.EvaluateGraphsConfig) if key != "network.name"} <= said
    for command in ("distill", "evaluate"):
        said = {word.partition("=")[0] for word in call(command, "--help")[1].split()}
        assert set(keys(config.GraphDatasetConfig, "dataset.")) <= said
    assert "matcher.support=" in call("distill", "matcher=computation_tree", "--help")[1]


@pytest.mark.parametrize("run", ["three", "degrees", "ogb", "sets", "it's $a run"])
def test_the_distill_command_of_a_run_finds_it_finished_and_makes_it_again(run, call, world, tmp_path):
    before = (world / run / "distilled" / "data.safetensors").read_bytes()
    _, *words = shlex.split(read_run(Path(run)).commands["distill"])
    assert not any(word.startswith(("device", "matcher.limit", "dataset.collection")) for word in words)
    code, out, _ = call(*words, "--json")
    assert (code, one_object(out)["resumed_from"]) == (0, one_object(out)["provenance"]["steps"])
    elsewhere = [*(word for word in words if not word.startswith("out=")), f"out={tmp_path / 'again'}"]
    code, out, _ = call(*elsewhere, "--json")
    assert (code, one_object(out)["resumed_from"]) == (0, None)
    assert (tmp_path / "again" / "distilled" / "data.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    ("run", "words"),
    [
        ("two", [*QUICK, "rows=[random_bytes]", "seeds=2", "recipe.pool=sum"]),
        ("sets", QUICK),
        ("degrees", [*QUICK, "rows=[]", "networks=[gin,gat]", "recipe.dropout=0.5", "recipe.balance=false"]),
        (
            "it's $a run",
            [*QUICK, "rows=[untrained,wl_logistic]", "network=sage", "network.width=3", "seed=4"],
        ),
        ("ogb", ["protocol=paper/mirage", "rows=[untrained]", "workers=1"]),
    ],
    ids=str,
)
def test_the_evaluate_command_of_a_run_repeats_its_table(run, words, call, world):
    assert call("evaluate", run, *words)[0] == 0
    path, (before, command) = world / run / "table.json", evaluated(run)
    path.unlink()
    assert call(*shlex.split(command)[1:], "workers=1")[0] == 0
    assert same(json.loads(path.read_text())) == same(before)


def evaluated(run):
    found = read_run(Path(run))
    return found.table, found.commands["evaluate"]


def test_the_publication_trains_ten_and_keeps_five(call, world):
    assert call("evaluate", "ogb", "protocol=paper/mirage", "rows=[untrained]", "workers=1")[0] == 0
    table, command = evaluated("ogb")
    assert (table["protocol"], table["seeds"], table["recipe"]["steps"]) == ("paper/mirage", 10, 30)
    assert {row["n"] for row in table["rows"]} == {5}
    assert {(row["network_spec"]["width"], row["network_spec"]["depth"]) for row in table["rows"]} == {
        (128, 2)
    }
    assert "recipe." not in command
    assert "protocol=paper/mirage" in command


FAST = {"seeds": 1, "recipe": GraphRecipe(steps=1, lrs=(0.1,))}


def test_python_does_what_the_command_line_does(call, world, tmp_path):
    made = dd.task("tu", name="TWO", root="data", nbytes=300, download=False)
    matcher = dd.matcher("computation_tree", network=NetSpec("gin", width=4))
    result = dd.distill(made, matcher, seed=0, out=tmp_path / "run")
    stored = DistilledSet.load(world / "two" / "distilled")
    assert (
        result.distilled.manifest["files"]["data.safetensors"] == stored.manifest["files"]["data.safetensors"]
    )
    assert result.distilled.manifest["recipe"]["network"] == stored.manifest["recipe"]["network"]
    table = dd.evaluate(tmp_path / "run", **FAST).to_json()
    assert call("evaluate", "two", *QUICK)[0] == 0
    assert same(table)["rows"] == same(evaluated("two")[0])["rows"]
    assert same(evaluating_graphs.evaluate_graphs(tmp_path / "run", **FAST).to_json()) == same(table)
    assert same(json.loads((tmp_path / "run" / "table.json").read_text())) == same(table)
    assert len((tmp_path / "run" / "results.jsonl").read_text().splitlines()) == 2 * 6


def test_evaluate_takes_a_loaded_set_networks_and_rows_for_graphs(call, world):
    loaded = data.load_graphs("tu", "TWO", root="data")
    distilled = DistilledSet.load(world / "two" / "distilled")
    given = {**FAST, "rows": ["random"], "networks": ["gin", NetSpec("sage", width=3)], "device": "cpu"}
    table = dd.evaluate(distilled, dataset=loaded, **given)
    assert [(row.network, row.name) for row in table.rows[::2]] == [
        (net, row) for net in ("gin", "sage") for row in ("distilled", "random")
    ]
    other = dd.evaluate(distilled, dataset="tu", name="TWO", root="data", **given)
    assert [row.values for row in other.rows] == [row.values for row in table.rows]
    with pytest.raises(UsageError, match="'TWO' or its split is not the one .*\nGive dataset.root and"):
        dd.evaluate(distilled, split=1, **given)


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: dd.evaluate("two", device="cuda"), "'cuda'"),
        (lambda: dd.evaluate("two", precision="bf16"), "'bf16'"),
        (lambda: dd.evaluate("two", recipe=Recipe()), "holds graphs, a Recipe is for images"),
        (lambda: dd.evaluate("two", dataset=data.load("digits")), "holds graphs, a Dataset is for images"),
        (lambda: dd.evaluate("digits", recipe=GraphRecipe()), "holds images, a GraphRecipe is for graphs"),
        (
            lambda: dd.evaluate("digits", dataset=data.load_graphs("tu", "TWO", root="data")),
            "holds images, a GraphDataset is for graphs",
        ),
        (lambda: dd.evaluate("two", dataset="tu"), "'' is no name of a graph set"),
        (lambda: dd.evaluate("two", dataset="digits"), "digits"),
        (lambda: evaluating_graphs.evaluate_graphs("digits"), "holds images, not graphs"),
        (lambda: dd.evaluate("two", protocol="paper/mirage"), "no recipe for 'TWO'"),
        (lambda: dd.task("tu", nbytes=300), "'' is no name of a graph set"),
        (lambda: dd.task("ogb", name="NOPE", root="data", nbytes=300), "'NOPE'"),
    ],
)
def test_python_callers_get_the_same_refusals(make, named, call, world):
    before = snapshot(world)
    with pytest.raises(UsageError) as raised:
        make()
    assert named in raised.value.cause
    assert raised.value.remedy
    assert snapshot(world) == before


SCRIPT = """
import ddengine as dd
from ddengine.evaluating_graphs import evaluate_graphs
from ddengine.graph_train import GraphRecipe
task = dd.task("tu", name="THREE", root="data", nbytes=300)
result = dd.distill(task, dd.matcher("tree_herding", network="sage"), out="script")
fast = {"seeds": 1, "recipe": GraphRecipe(steps=1, lrs=(0.1,)), "rows": ["full"]}
values = [[row.values for row in make("script", **fast).rows] for make in (dd.evaluate, evaluate_graphs)]
assert values[0] == values[1] and len(values[0]) == 4
print(result.folder, result.distilled.manifest["count"] > 2)
"""


def test_a_script_of_a_few_lines_distils_and_judges_graphs(world, tmp_path):
    (tmp_path / "data").symlink_to(world / "data")
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    given = {"capture_output": True, "text": True, "timeout": 120, "cwd": tmp_path, "env": env}
    done = subprocess.run([sys.executable, "-c", SCRIPT], **given)
    assert (done.returncode, done.stdout, done.stderr) == (0, "script True\n", "")
