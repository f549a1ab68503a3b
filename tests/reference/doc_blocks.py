"""The code blocks of Markdown pages, and the commands and Python in them made small enough to run at once."""

import re
import shlex
from pathlib import Path

BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SHELL = {"", "bash", "console", "sh"}
SMALL = {  # values that take the place of a command's own, wherever the key stands
    "matcher.steps": "2", "network.width": "4", "matcher.real_per_class": "5", "matcher.inner.steps": "2",
    "recipe.steps": "2", "seeds": "1", "epochs": "1", "budget.nbytes": "800",
}  # fmt: skip
JUDGE = {"recipe.steps": "2", "recipe.lrs": "[0.01]", "seeds": "1", "workers": "1"}
ADDED = {  # keys that a command gets where it does not have them
    "demo": {"seeds": "1"},
    "buffer": {"network.width": "4", "workers": "1", "device": "cpu"},
    "distill": {"matcher.steps": "2", "network.width": "4", "workers": "1", "device": "cpu"},
    "evaluate": {**JUDGE, "kept": "none", "rows": "[random]"},
    "downstream": {**JUDGE, "orders": "1"},
    "audit": {**JUDGE, "seeds": "2"},
}  # fmt: skip
STEPLESS = {"kmeans", "random", "herding", "kcenter", "computation_tree", "tree_herding"}
PYTHON = {
    r"\bsteps=\d+": "steps=2",
    r"\bseeds=\d+": "seeds=1",
    r"\bwidth=\d+": "width=4",
    r"\bcount=\d+": "count=1",
}


def blocks(page: Path) -> list[tuple[str, str]]:
    """(language, text) of every fenced block of a page, in order."""
    return BLOCK.findall(page.read_text())


def commands(text: str) -> list[list[str]]:
    """The command lines of a shell block as words: backslashes join lines, comments go, && parts commands."""
    lines = text.replace("\\\n", " ").splitlines()
    parts = [part for line in lines for part in line.split("&&")]
    return [words for part in parts if (words := shlex.split(part, comments=True))]


def small(words: list[str], graphs: bool) -> list[str]:
    """A command of ours (without its program) with the same keys and names, and few steps and networks."""
    command, given = (
        words[0],
        {word.partition("=")[0]: word.partition("=")[2] for word in words if "=" in word},
    )
    if any(word in words for word in ("--help", "-h")):
        return words
    added = dict(ADDED.get(command, {}))
    if command == "distill" and (given.get("matcher") in STEPLESS or given.get("dataset") in ("tu", "ogb")):
        added.pop("matcher.steps")
    if command == "distill" and "experts" in given:
        added.pop("network.width")
    if command == "evaluate" and graphs:
        added = {**JUDGE, "rows": "[random_bytes]"}
    if command == "downstream" and words[1] != "continual":
        added.pop("orders")
    kept = [cut(word) for word in words]
    if command == "buffer":
        kept = [word for word in kept if not word.startswith("count=")]
        added["count"] = str(given.get("networks", "").count(",") + 1)
        added |= {"epochs": "1"} if given.get("recipe") == "squeeze" else {}
        given.pop("count", None)
    return kept + [f"{key}={value}" for key, value in added.items() if key not in given]


def cut(word: str) -> str:
    """A word of a command with its value made small, where it is one that takes time."""
    key = word.partition("=")[0]
    if word == "networks=grid":
        return "networks=[mlp]"  # a dozen networks; that the word is known is another test
    return f"{key}={SMALL[key]}" if key in SMALL else word


def small_python(text: str) -> str:
    """A block of Python with few steps, networks and channels."""
    for pattern, value in PYTHON.items():
        text = re.sub(pattern, value, text)
    return text
