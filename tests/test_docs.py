"""The documentation: every block runs, every link and picture is there, the site builds with all pages."""

import json
import os
import re
import subprocess
import sys
import tomllib
from importlib.util import find_spec
from pathlib import Path

import doc_blocks
import foreign_sets
import numpy as np
import pytest
import torch
import tu_folder
import yaml
from PIL import Image

from ddengine import cli, data, demo, evaluating
from ddengine.artefacts import artefact, holds_graphs
from ddengine.compose import composed, swept
from ddengine.data import Part, Source, registry
from ddengine.graph_train import GraphRecipe
from ddengine.nets import NetSpec
from ddengine.train import Recipe
from synth import DistilledSet

TREE = Path(__file__).parents[1]
DOCS = TREE / "docs"
PROJECT = tomllib.loads((TREE / "pyproject.toml").read_text())["project"]
PAGES = {"README.md": TREE / "README.md"} | {
    str(path.relative_to(DOCS)): path for path in sorted(DOCS.rglob("*.md"))
}
OWN = {"plugins.md"}  # tests/test_docs_plugins.py installs its files and runs its blocks
RUN = {
    name: path
    for name, path in PAGES.items()
    if name not in OWN and any(kind != "text" for kind, _ in doc_blocks.blocks(path))
}
NAV = [
    page if isinstance(page, str) else next(iter(page.values()))
    for part in yaml.safe_load(re.sub(r"!\S+", "", (TREE / "mkdocs.yml").read_text()))["nav"]
    for page in next(iter(part.values()))
]
REFERENCE = {"reference/cli.md", "reference/matcher_options.md", "reference/api.md"}
MADE = REFERENCE | {"contributing.md", "notebook.md", "examples.md"}


def pictures(shape, each):
    """Noisy pictures of ten classes, a class a brightness."""
    draw = np.random.default_rng(0)
    y = np.arange(10 * each) % 10
    x = 25 * y[:, None, None, None] + draw.normal(10, 12, (len(y), *shape))
    return Part(torch.from_numpy(np.clip(x, 0, 255).astype(np.uint8)), torch.from_numpy(y))


def source(shape):
    names = tuple(f"class {k}" for k in range(10))
    return lambda request: Source(names, pictures(shape, 33), test=pictures(shape, 4), licence="CC0-1.0")


@pytest.fixture
def world(tmp_path, monkeypatch):
    """A folder with all that the pages speak of under their names, and what takes long made short."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(registry.DATASETS, "fashion_mnist", source((1, 28, 28)))
    monkeypatch.setitem(registry.DATASETS, "cifar10", source((3, 32, 32)))
    monkeypatch.setattr(os, "cpu_count", lambda: 1)  # no processes, whose start takes seconds
    monkeypatch.setattr(demo, "NETWORK", NetSpec("convnet", width=2, depth=1))
    monkeypatch.setattr(demo, "OPTIONS", {"steps": 2, "real_per_class": 3})
    monkeypatch.setattr(demo, "RECIPE", Recipe(steps=1, lrs=(0.1,), batch_size=11, augment="none"))
    whole = evaluating.evaluate

    def short(path, **given):
        recipe = GraphRecipe(steps=2, lrs=(0.01,)) if of_graphs(path) else Recipe(steps=2, lrs=(0.01,))
        return whole(path, **{"recipe": recipe, "seeds": 1, **given})

    monkeypatch.setattr(evaluating, "evaluate", short)
    yield tmp_path
    sys.modules.pop("my_nets", None)


def prepared(folder, page, monkeypatch):
    """The files that a page's commands take as there."""
    graphs = tu_folder.random_set(40)
    if page in ("README.md", "graphs.md", "matchers/computation_tree.md", "matchers/tree_herding.md"):
        for name in ("NCI1", "MUTAG"):
            tu_folder.write_tu(folder / "DIR" / name, name, graphs)
        classed = [{**graph, "y": i % 2} for i, graph in enumerate(tu_folder.random_set(60))]
        parts = (list(range(44)), list(range(44, 52)), list(range(52, 60)))
        tu_folder.write_ogb(folder / "DIR" / "ogbg_molbace", classed, parts)
    if page == "bring_your_own.md":
        part = pictures((32, 32, 3), 6)
        for i, (x, y) in enumerate(zip(part.x.numpy(), part.y.tolist(), strict=True)):
            path = folder / "DIR" / f"kind_{y}" / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(x).save(path)
        arrays = {"x_train": part.x.numpy(), "y_train": part.y.numpy()}
        with (folder / "FILE").open("wb") as file:
            np.savez(file, **arrays, x_test=arrays["x_train"][:20], y_test=arrays["y_train"][:20])
    if page == "evaluation.md":  # whitening takes the cube of the number of pixels
        monkeypatch.setitem(registry.DATASETS, "cifar10", source((3, 12, 12)))
        words = ["dataset=fashion_mnist", "ipc=1", "matcher=random", "out=runs/fashion"]
        assert cli.main(["distill", *words], pinned=False) == 0
    for name in set(re.findall(r"res_DM\w*\.pt", PAGES[page].read_text())):
        fit = data.load("cifar10" if "CIFAR10" in name else "fashion_mnist").fit
        chosen = torch.arange(0, len(fit), 10)
        foreign_sets.dm(folder, [(fit.model_input(chosen), fit.y[chosen])], name=name)
    if page == "evaluation.md":
        fit = data.load("cifar10", preprocessing="zca").fit
        foreign_sets.mtt(folder, fit.model_input(chosen), fit.y[chosen])


@pytest.mark.parametrize("page", RUN)
def test_every_block_of_a_page_runs(page, world, monkeypatch, capsys):
    prepared(world, page, monkeypatch)
    names = {"data_list": data_list()} if page == "graphs.md" else {}
    for kind, text in doc_blocks.blocks(RUN[page]):
        if kind in doc_blocks.SHELL:
            for words in doc_blocks.commands(text):
                ran(words, capsys)
        elif found := re.match(r"# (\w+\.py)\n", text):
            (world / found[1]).write_text(text)
        else:
            assert kind == "python", f"a block of {kind}: say what the tests do with it"
            exec(doc_blocks.small_python(text), names)


def ran(words, capsys):
    """Run one command line of a page; what only installs or tests is compared with the project."""
    program, *rest = words
    if program in ("pip", "pytest"):
        extras = re.findall(r"\.\[([\w,]+)\]", " ".join(rest))
        assert set(",".join(extras).split(",")) - {""} <= set(PROJECT["optional-dependencies"])
        return
    if program == "torchrun":  # several processes are another test: here its command in one
        rest = rest[rest.index("ddengine") + 1 :]
    else:
        assert program == "ddengine"
    if any(word.startswith("protocol=paper/") for word in rest):  # takes hours: its keys alone
        keys = [word for word in rest[2:] if "=" in word]
        assert composed("evaluate", ["dataset=digits", *keys]).protocol == "paper/dm"
        return
    if "-m" in rest:  # each run is a process, which other tests start: here the first of them
        runs = swept([word for word in rest[1:] if word != "-m"])
        assert len(runs) > 1
        rest = [rest[0], *runs[0]]
    if "networks=grid" in rest:
        assert len(composed("evaluate", ["dataset=digits", "networks=grid"]).networks) > 4
    graphs = rest[0] == "evaluate" and of_graphs(rest[1])
    done = cli.main(doc_blocks.small(rest, graphs), pinned=False)
    assert done == 0, (words, capsys.readouterr().err[-2000:])


def of_graphs(path):
    """Whether a run or a set is one of graphs."""
    return holds_graphs(DistilledSet.load(artefact(Path(path))))


def data_list():
    """Graphs as torch_geometric has them."""
    geometric = pytest.importorskip("torch_geometric.data", reason="the extra graph is not installed")
    made = []
    for i, graph in enumerate(tu_folder.random_set(40)):
        x = torch.nn.functional.one_hot(torch.tensor(graph["node_labels"]), 3).float()
        ends = torch.tensor(graph["edges"], dtype=torch.int64).reshape(-1, 2).T
        made.append(geometric.Data(x=x, edge_index=ends, y=torch.tensor([i % 2])))
    return made


def targets(path):
    """(where it leads, anchor) of every link and picture of a page that stays in the tree."""
    text = re.sub(r"```.*?```|`[^`\n]*`", "", path.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not target.startswith(("http://", "https://")):
            name, _, anchor = target.partition("#")
            yield (path.parent / name).resolve() if name else path, anchor


@pytest.mark.parametrize("page", PAGES)
def test_every_link_and_picture_of_a_page_is_there(page):
    made = {(DOCS / name).resolve() for name in MADE}
    missing = [
        str(target) for target, _ in targets(PAGES[page]) if not target.exists() and target not in made
    ]
    assert missing == []


def test_the_nav_lists_every_page_once():
    assert sorted(NAV) == sorted({*PAGES, *MADE} - {"README.md"})


def test_pictures_stay_small():
    sizes = {path.name: path.stat().st_size for path in (DOCS / "assets").iterdir()}
    assert sum(sizes.values()) < 1 << 20 and max(sizes.values()) < 100_000


def test_benchmarks_that_pages_name_are_there():
    named = {
        name
        for path in PAGES.values()
        for name in re.findall(r"benchmarks/(?:results/)?[\w.]+\.\w+", path.read_text())
    }
    assert len(named) > 10
    assert {name for name in named if not (TREE / name).exists()} == set()


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The site, built as its command builds it."""
    if find_spec("mkdocs") is None or find_spec("mkdocstrings") is None:
        pytest.skip('mkdocs is not installed: pip install ".[docs]"')
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-q", "-d", str(folder)]
    env = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(
        command, cwd=TREE, capture_output=True, text=True, env=env, timeout=280, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_the_site_builds_without_a_warning_and_has_every_page(site):
    assert {name.replace(".md", ".html") for name in NAV} <= {
        str(path.relative_to(site)) for path in site.rglob("*.html")
    }


def test_no_page_of_the_site_loads_anything_from_elsewhere(site):
    loads = r"<(?:script|img|iframe|source)[^>]*src=\"?(https?:[^\" >]*)|<link[^>]*href=\"?(https?:[^\" >]*)"
    assert [found for path in site.rglob("*.html") for found in re.findall(loads, path.read_text())] == []


def test_the_examples_stand_on_the_site_with_what_they_print_and_draw(site):
    page = (site / "examples.html").read_text()
    assert all(f'id="{path.stem}"' in page for path in (TREE / "examples").glob("*.py"))
    notebook = (site / "notebook.html").read_text()
    assert "data:image/png;base64," in notebook and "images to learn from" in notebook


def test_the_reference_has_every_command_key_and_option(site):
    from ddengine import usage

    page = (site / "reference" / "cli.html").read_text()
    assert all(f"ddengine {name}" in page for name in usage.COMMANDS)
    assert all(
        key in page for key in ("checkpoint.minutes", "dataset.on_error", "recipe.mix_alpha", "slurm.cpus")
    )
    options = (site / "reference" / "matcher_options.html").read_text()
    assert all(
        key in options for key in ("matcher.inner.steps", "matcher.label_codec", "matcher.frequencies")
    )
    api = (site / "reference" / "api.html").read_text()
    assert "attention_matching_loss" in api and "Mean of the class" not in api


def test_search_finds_pages_by_their_words(site):
    index = json.loads((site / "search" / "search_index.json").read_text())
    assert any("real_per_class" in part["text"] for part in index["docs"])
