"""What the site's builder adds to the Markdown: the reference of the code, and what lies beside docs/."""

import dataclasses
import json
import re
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

TREE = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(TREE))
OUTSIDE = re.compile(r"\[([^\]]*)\]\(\.\./((?!\.\./)[^)#\s]*)(#[^)]*)?\)")
FROM_TOP = re.compile(r"\[([^\]]*)\]\((?!https?:|#|\./)([^)#\s]+)(#[^)]*)?\)")
FLOW = re.compile(r"!\[[^\]]*\]\((assets/data_flow\.svg)\)")
API = {  # what a user imports, by module
    "ddengine": ("task", "matcher", "distill", "evaluate", "Result", "Schedule", "Images", "DataSpec",
                 "Budget", "Task"),
    "ddengine.types": ("Workspace", "Accepts", "Matcher"),
    "ddengine.rng": ("Rng",),
    "ddengine.nets": ("NetSpec", "build"),
    "ddengine.data": ("load", "Part", "Source", "split_graphs"),
    "ddengine.testing": ("check_matcher",),
    "synth": ("DistilledSet", "verify", "Pixels", "Factored", "Compensated", "Subset", "Forest",
              "start_images"),
    "expert_buffers": ("ExpertBuffer", "record"),
    "matchers.attention": ("attention_map", "mmd_term", "attention_matching_loss", "AttentionMatching"),
    "matchers.distribution": ("DistributionMatching",),
    "matchers.characteristic": ("characteristic_loss", "CharacteristicMatching"),
    "matchers.trajectory": ("trajectory_loss", "TrajectoryMatching"),
    "matchers.compensator": ("bn_statistics_loss", "CompensatorMatching"),
    "matchers.computation_tree": ("color_refinement", "ComputationTree"),
    "matchers.tree_herding": ("TreeHerding",),
}  # fmt: skip


def on_files(files: Any, config: Any) -> Any:
    """Add the generated pages, and the project's own files that the site shows."""
    made = {
        "notebook.md": notebook_page(),
        "examples.md": examples_page(),
        "reference/cli.md": cli_page(),
        "reference/matcher_options.md": options_page(),
        "reference/api.md": api_page(),
        "contributing.md": (TREE / "CONTRIBUTING.md").read_text(),
    }
    for path, text in made.items():
        files.append(File.generated(config, path, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Links that leave docs/ become the names of what they point to: the site stands without the tree."""
    if page.file.src_uri == "contributing.md":
        return FROM_TOP.sub(named, re.sub(r"\]\(docs/([^)]*\.md)", r"](./\1", markdown))
    drawn = FLOW.sub(inlined, markdown)
    return drawn if "/" in page.file.src_uri else OUTSIDE.sub(named, drawn)


def inlined(found: re.Match[str]) -> str:
    """The drawing itself in place of its picture, so that it follows the page's choice of light or dark."""
    drawing = (TREE / "docs" / found[1]).read_text()
    whole = re.sub(r"\n\s*", "", drawing.replace("<svg ", '<svg class="flow" ', 1))
    return f'<div class="flow-box">{whole}</div>'


def named(found: re.Match[str]) -> str:
    """A link to a file of the tree as text; FileNotFoundError where there is none."""
    text, path = found[1], found[2]
    if not (TREE / path).exists():
        raise FileNotFoundError(f"docs link to {path}, which the tree does not have")
    return f"`{path}`" if text.strip("`") in path else f"{text} (`{path}`)"


def examples_page() -> str:
    """What the examples show, and each of the scripts; links to them become links within the page."""
    folder, lines = TREE / "examples", []
    text = (folder / "README.md").read_text().replace("](tutorial.ipynb)", "](notebook.md)")
    for path in sorted(folder.glob("*.py")):
        text = text.replace(f"]({path.name})", f"](#{path.stem})")
        lines += [f"## {path.name} {{#{path.stem}}}", "", "```python", path.read_text().rstrip(), "```", ""]
    return "\n".join([text.replace("[plugin](plugin)", "`examples/plugin`"), *lines])


def notebook_page() -> str:
    """The executed tutorial notebook: its text, its code, what that printed and drew."""
    cells = json.loads((TREE / "examples" / "tutorial.ipynb").read_text())["cells"]
    lines = []
    for cell in cells:
        text = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            lines += [text, ""]
            continue
        lines += ["```python", text, "```", ""]
        for output in cell["outputs"]:
            lines += [*_printed(output), ""]
    told = "The notebook `examples/tutorial.ipynb`, as it was executed."
    return "\n".join([*lines[:1], "", told, "", *lines[1:]])


def _printed(output: Any) -> list[str]:
    """The output of a notebook's cell: a picture within the page, or text."""
    data = output.get("data", {})
    if "image/png" in data:
        return [f"![What the cell drew](data:image/png;base64,{''.join(data['image/png'].split())})"]
    return ["```text", "".join(output.get("text", data.get("text/plain", []))).rstrip(), "```"]


def cli_page() -> str:
    """The commands with their keys, types and defaults, from the tables that the command line itself uses."""
    from ddengine import config, usage

    head = [
        "# Command line", "",
        "Made from the code: what `--help` says, and the configuration behind it.", "",
        "```text", usage.overview(), "```", "",
    ]  # fmt: skip
    for name in usage.COMMANDS:
        head += [f"## ddengine {name}", "", "```text", usage.help_text(name), "```", ""]
        for key in _configs(name):
            kind = config.COMMANDS[key]
            head += [f"### Keys of `{key}`", "", _said(kind), "", *_table(_fields(kind)), ""]
    return "\n".join(head)


def _configs(command: str) -> list[str]:
    from ddengine import config

    return [key for key in config.COMMANDS if key.split("_")[0] == command] + (
        ["multirun"] if command == "distill" else []
    )


def _said(kind: type) -> str:
    return " ".join((kind.__doc__ or "").split())


def _fields(kind: type, path: str = "") -> Iterator[tuple[str, str, str]]:
    """(key, type, default) of every leaf of a configuration, in its order."""
    for field in dataclasses.fields(kind):
        value = _default(field)
        if field.name == "defaults":
            continue
        if dataclasses.is_dataclass(value):
            yield from _fields(type(value), f"{path}{field.name}.")
        else:
            yield f"{path}{field.name}", _type(field.type), _shown(value)


def _default(field: Any) -> Any:
    made = field.default_factory is not dataclasses.MISSING
    return field.default_factory() if made else field.default


def _type(kind: Any) -> str:
    named_ = kind.__name__ if isinstance(kind, type) and not getattr(kind, "__args__", None) else str(kind)
    return named_.replace("typing.", "").replace("Any", "a choice").replace(" | None", " or null")


def _shown(value: Any) -> str:
    if value == "???":
        return "must be given"
    if value is dataclasses.MISSING:
        return "none"
    spelled = {None: "null", True: "true", False: "false", "": "empty"}
    return f"`{spelled[value] if isinstance(value, bool | str | None) and value in spelled else value}`"


def _table(rows: Iterator[tuple[str, str, str]]) -> list[str]:
    lines = [f"| `{key}` | {kind.replace('|', 'or')} | {default} |" for key, kind, default in rows]
    return ["| key | type | default |", "|:--|:--|:--|", *lines]


def options_page() -> str:
    """Every matcher's options with defaults, and what their documentation says."""
    import matchers

    lines = ["# Options of matchers", "", "Keys `matcher.NAME=VALUE`, or arguments of `dd.matcher`.", ""]
    for name, value in matchers.MATCHERS.items():
        lines += [f"## {name}", "", _prose(type(value.options)), ""]
        rows = list(_values(value.options))
        lines += [*_table(iter(rows)), ""] if rows else ["It has no options.", ""]
    return "\n".join(lines)


def _prose(kind: type) -> str:
    """A docstring as Markdown: its indentation taken off."""
    import inspect

    return inspect.getdoc(kind) or ""


def _values(options: Any, path: str = "matcher.") -> Iterator[tuple[str, str, str]]:
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        if dataclasses.is_dataclass(value):
            yield from _values(value, f"{path}{field.name}.")
        else:
            yield f"{path}{field.name}", _type(field.type), _shown(value)


def api_page() -> str:
    """What a user imports, from its docstrings."""
    lines = [
        "# Python",
        "",
        "Made from the docstrings. Shapes stand in brackets, as `Float[Tensor, 'm c h w']`.",
        "",
    ]
    for module, names in API.items():
        for name in names:
            home = getattr(import_module(module), name).__module__
            said = ["    options:", f"      heading: {module}.{name}", f"      toc_label: {module}.{name}"]
            lines += [f"::: {home}.{name}", *said, ""]
    return "\n".join(lines)
