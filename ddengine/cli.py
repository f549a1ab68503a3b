"""The command line: finds command and flags, hands the rest to hydra, and turns errors into two lines.

Nothing here imports torch, numpy or hydra; a command does when it runs.
"""

import json
import os
import signal
import sys
import textwrap
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ddengine import __version__, origins
from ddengine.errors import (
    EXIT_DONE,
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EXIT_USAGE,
    DDError,
    UsageError,
    one_line,
    unknown,
)

COMMANDS = {
    "demo": ("", "distil the embedded digits and judge the result: under two minutes, no network"),
    "distill": ("", "distil a dataset; the same command resumes after an interruption"),
    "buffer": ("", "record expert trajectories; the same command goes on, or extends the buffer"),
    "import": ("FILE ...", "make an expert buffer of other tools' replay_buffer_*.pt: --from replay_buffer"),
    "evaluate": ("PATH", "judge a distilled set or a run by the fair protocol"),
    "report": ("RUN ...", "show what runs made, their last evaluations and learning curves, also as a page"),
    "inspect": ("PATH", "show what is in a distilled set, a run or an expert buffer"),
    "verify": ("PATH", "check hashes, shapes and ranges of a set or a buffer; safe on untrusted files"),
    "list": ("KIND", "list matchers, datasets, networks, recipes or configs"),
    "doctor": ("", "show versions, devices and what is wrong with the installation"),
}
DATASET = (
    "dataset=NAME dataset.root=PATH dataset.size=PIXELS dataset.preprocessing=standard|zca "
    "dataset.on_error=raise|skip dataset.download=true|false"
)
GRAPHS = (
    "dataset=tu|ogb dataset.name=NAME dataset.root=PATH dataset.discretise=quantile|kmeans|none "
    "dataset.bins=N dataset.split=N dataset.download=true|false"
)
NETWORK = "network=NAME network.width=N network.depth=N network.norm=NAME"
PLACE = "device=auto|cpu|cuda precision=auto|fp32|bf16"
GRAPH_KEYS = {
    "distill": GRAPHS,
    "evaluate": f"{GRAPHS} networks=[gin,gcn] protocol=standard-v1|paper/mirage seeds=N seed=N "
    "rows=[random_bytes,full] recipe.steps=N recipe.lrs=[0.001,0.005] recipe.weight_decay=X "
    "recipe.pool=mean|sum recipe.dropout=X recipe.balance=true|false workers=N out=DIR",
}
KEYS = {
    "distill": f"{DATASET} matcher=NAME matcher.OPTION=VALUE {NETWORK} ipc=N budget.nbytes=N "
    f"experts=DIR synth=pixels|compensated seed=N out=DIR {PLACE} deterministic=true|false workers=N "
    "checkpoint.steps=N checkpoint.minutes=N row=NAME",
    "buffer": f"{DATASET} {NETWORK} networks=[a,b] recipe=mtt|ftd|ast|squeeze recipe.OPTION=VALUE "
    "count=N epochs=N max_start_epoch=N expert_epochs=N full_experts=N encoding=delta16|fp32 "
    f"seed=N out=DIR {PLACE} workers=N checkpoint.minutes=N",
    "import": f"{DATASET} {NETWORK} encoding=delta16|fp32 out=DIR",
    "evaluate": f"{DATASET} {NETWORK} networks=[a,b] seeds=N seed=N "
    "rows=[random,random_same_labels,full] experts=DIR recipe.steps=N recipe.lrs=[0.01,0.03] "
    "recipe.optimiser=sgd|adamw recipe.momentum=X recipe.weight_decay=X recipe.batch_size=N "
    "recipe.loss=ce|kl recipe.temperature=X recipe.squared=true|false recipe.mix=none|mixup|cutmix "
    "recipe.mix_alpha=X recipe.augment=auto|none|color_crop_flip recipe.augment_mode=batch|item "
    f"recipe.ema=X {PLACE} workers=N out=DIR",
    "demo": "out=DIR seed=N seeds=N",
}
FLAGS = ("--json", "--help", "-h")
VALUED = {"report": {"--html": "FILE"}, "import": {"--from": "FORMAT"}}  # flags that take a value
FORMATS = ("replay_buffer",)


def main(arguments: Sequence[str] | None = None, *, pinned: bool = True) -> int:
    """Run one command and return its exit code; `pinned` makes our packages win over their namesakes."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        if pinned:
            origins.pin()
        with _terminable():
            return _run(given)
    except DDError as error:
        return _fail(error.cause, error.remedy, error.code, error)
    except KeyboardInterrupt as error:
        return _fail("interrupted", "Repeat the same command", EXIT_INTERRUPTED, error)
    except OSError as error:
        remedy = "Check the path, your rights to it, and the room on its disk"
        refused = f"the system refuses {error.filename}: {error.strerror}" if error.filename else str(error)
        return _fail(refused, remedy, EXIT_USAGE if error.filename else EXIT_FAILED, error)
    except Exception as error:
        return _fail(
            f"{type(error).__name__}: {' '.join(str(error).split())[:300]}",
            "This is a defect or a lack of memory or disk; DDENGINE_DEBUG=1 shows where",
            EXIT_FAILED,
            error,
        )


@contextmanager
def _terminable() -> Iterator[None]:
    """Inside, SIGTERM is taken as Ctrl-C (in the main thread, where alone Python lets one choose)."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, _terminated)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _terminated(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def _show(text: str) -> None:
    """Print a result on stdout; a reader that has left, such as `head`, is no failure."""
    encoding = sys.stdout.encoding or "utf-8"
    try:
        print(text.encode(encoding, "backslashreplace").decode(encoding), flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python fails as it ends


def _fail(cause: str, remedy: str, code: int, error: BaseException) -> int:
    if os.environ.get("DDENGINE_DEBUG") == "1":
        traceback.print_exception(error)
    print(f"error: {one_line(cause)}", file=sys.stderr)
    if remedy:
        print(f"  fix: {one_line(remedy)}", file=sys.stderr)
    return code


def _run(given: list[str]) -> int:
    if not given or given[0] in ("--help", "-h", "help"):
        _show(_overview())
        return EXIT_DONE if given else EXIT_USAGE
    if given[0] in ("--version", "-V"):
        _show(f"ddengine {__version__}")
        return EXIT_DONE
    command, rest = given[0], given[1:]
    if command not in COMMANDS:
        raise unknown("command", command, COMMANDS)
    known = VALUED.get(command, {})
    rest, values = _values(rest, known)
    flags = [word for word in rest if word.startswith("-")]
    for flag in flags:
        if flag not in FLAGS:
            raise unknown("flag", flag, (*FLAGS, *known))
    if "--help" in flags or "-h" in flags:
        chosen = [word.partition("=")[2] for word in rest if word.startswith("matcher=")]
        _show(_help(command) + (_options(chosen[-1]) if chosen and command == "distill" else ""))
        return EXIT_DONE
    words = [word for word in rest if not word.startswith("-")]
    if origins.SiblingFinder not in sys.meta_path:
        origins.check()
    return _HANDLERS[command](words, "--json" in flags, **values)


def _values(words: list[str], known: Mapping[str, str]) -> tuple[list[str], dict[str, str]]:
    """The words without the flags `known`, and these with their values: `--flag VALUE` or `--flag=VALUE`."""
    others, values, left = [], {}, list(words)
    while left:
        flag, joined, value = left.pop(0).partition("=")
        if flag not in known:
            others.append(flag + joined + value)
            continue
        if not joined and left and not left[0].startswith("-"):
            value = left.pop(0)
        if not value:
            raise UsageError(f"{flag} names no {known[flag].lower()}", f"Write: {flag} {known[flag]}")
        values[flag.removeprefix("--")] = value
    return others, values


def _overview() -> str:
    rows = [(" ".join((name, argument)).strip(), text) for name, (argument, text) in COMMANDS.items()]
    lines = [f"  {head:16} {text}" for head, text in rows]
    return "\n".join(
        [
            "ddengine COMMAND [key=value ...] [--json]",
            "",
            *lines,
            "",
            "ddengine COMMAND --help shows a command's keys. Result on stdout, progress on stderr.",
            "Exit codes: 0 done, 1 the run failed, 2 usage, 3 an artefact failed verification,",
            "130 interrupted. DDENGINE_DEBUG=1 adds a traceback to an error.",
        ]
    )


def _help(command: str) -> str:
    argument, text = COMMANDS[command]
    head = " ".join(filter(None, ("ddengine", command, argument)))
    valued = "".join(f"{flag} {kind}, " for flag, kind in VALUED.get(command, {}).items())
    parts = [head, f"{text[0].upper()}{text[1:]}.", f"Flags: --json (one object on stdout), {valued}--help"]
    if command in KEYS:
        keys = textwrap.wrap(KEYS[command], 90, break_long_words=False, break_on_hyphens=False)
        parts.insert(2, "\n  ".join(["Keys:", *keys]))
    if command in GRAPH_KEYS:
        keys = textwrap.wrap(GRAPH_KEYS[command], 90, break_long_words=False, break_on_hyphens=False)
        parts.insert(3, "\n  ".join(["For graphs:", *keys]))
    if command == "distill":
        parts.append("The options of a matcher: ddengine distill matcher=NAME --help")
    return "\n\n".join(parts)


def _options(name: str) -> str:
    """The options of a matcher with their defaults, and the head of its documentation."""
    from dataclasses import is_dataclass

    import matchers

    def lines(options: Any, path: str) -> Iterator[str]:
        for key in options.__dataclass_fields__:
            value = getattr(options, key)
            said = "null" if value is None else str(value).lower() if isinstance(value, bool) else value
            yield from lines(value, f"{path}{key}.") if is_dataclass(value) else [f"  {path}{key}={said}"]

    options = matchers.find(name).options
    return "\n\n".join(["", f"Options of {name} with their defaults:", "\n".join(lines(options, "matcher."))])


def _split(command: str, words: list[str]) -> tuple[Path, list[str]]:
    paths = [w for w in words if "=" not in w] or [w for w in words[:1] if Path(w).exists()]
    overrides = [w for w in words if w not in paths]
    if len(paths) != 1:
        raise UsageError(f"{command} takes one PATH, not {len(paths)}", f"Write: ddengine {command} PATH")
    return Path(paths[0]), overrides


def _print_table(table: Any, as_json: bool) -> None:
    from ddengine import report

    found = table.to_json()
    _show(json.dumps(found, allow_nan=False) if as_json else report.table_text(found).rstrip("\n"))


def _demo(words: list[str], as_json: bool) -> int:
    from ddengine.compose import composed
    from ddengine.console import Console
    from ddengine.demo import run_demo

    config = composed("demo", words)
    with Console() as console:
        table = run_demo(config, console.watch())
    _print_table(table, as_json)
    return EXIT_DONE


def _distill(words: list[str], as_json: bool) -> int:
    from ddengine import artefacts, recipes
    from ddengine.compose import composed
    from ddengine.console import Console

    config = composed("distill", words, artefacts.expert_values(words) | artefacts.graph_values(words))
    with Console() as console:
        result = recipes.run_distill(config, console.watch())
    assert result.folder is not None
    found = {**artefacts.summary(result.folder), "resumed_from": result.resumed_from}
    _show(json.dumps(found) if as_json else artefacts.summary_text(found))
    return EXIT_DONE


def _buffer(words: list[str], as_json: bool) -> int:
    from ddengine import artefacts, recipes
    from ddengine.compose import composed
    from ddengine.console import Console

    config = composed("buffer", words)
    with Console() as console:
        found = recipes.run_buffer(config, console.watch()).summary()
    _show(json.dumps(found) if as_json else artefacts.summary_text(found))
    return EXIT_DONE


def _import(words: list[str], as_json: bool, **flags: str) -> int:
    from ddengine import artefacts, recipes
    from ddengine.compose import composed
    from ddengine.console import Console

    paths = [Path(word) for word in words if "=" not in word]
    if not paths or "from" not in flags:
        lacking = "--from FORMAT" if paths else "one FILE or more"
        raise UsageError(
            f"import takes {lacking}", "Write: ddengine import FILE ... --from replay_buffer out=DIR"
        )
    if flags["from"] not in FORMATS:
        raise unknown("format", flags["from"], FORMATS)
    config = composed("import", [word for word in words if "=" in word])
    with Console() as console:
        found = recipes.run_import(paths, config, console.watch()).summary()
    _show(json.dumps(found) if as_json else artefacts.summary_text(found))
    return EXIT_DONE


def _evaluate(words: list[str], as_json: bool) -> int:
    from ddengine import artefacts, recipes
    from ddengine.compose import composed
    from ddengine.console import Console

    path, overrides = _split("evaluate", words)
    graphs = artefacts.holds_graphs(artefacts.DistilledSet.load(artefacts.artefact(path)))
    config = composed(f"evaluate{'_graphs' * graphs}", overrides, artefacts.manifest_values(path))
    with Console() as console:
        table = recipes.run_evaluate(path, config, console.watch())
    _print_table(table, as_json)
    return EXIT_DONE


def _report(words: list[str], as_json: bool, html: str | None = None) -> int:
    from ddengine import report
    from ddengine.page import page
    from ddengine.runs import read_run, write_page

    if not words:
        raise UsageError("report takes one RUN or more, not 0", "Write: ddengine report RUN ...")
    runs = [read_run(Path(word)) for word in words]
    shown = [run.shown() for run in runs]
    if html is not None:
        write_page(Path(html).expanduser(), page(shown))
        print(one_line(f"wrote {html}"), file=sys.stderr)
    if as_json:
        _show(json.dumps({"runs": [run.to_json() for run in runs]}, allow_nan=False))
    else:
        _show("\n".join(map(report.run_markdown, shown)).rstrip("\n"))
    return EXIT_DONE


def _inspect(words: list[str], as_json: bool) -> int:
    from ddengine import artefacts

    path, overrides = _split("inspect", words)
    _no_keys("inspect", overrides)
    found = artefacts.summary(path)
    _show(json.dumps(found) if as_json else artefacts.summary_text(found))
    return EXIT_DONE


def _verify(words: list[str], as_json: bool) -> int:
    from ddengine import artefacts

    path, overrides = _split("verify", words)
    _no_keys("verify", overrides)
    lines = artefacts.verified(path)
    found = {"path": str(path), "ok": True, "checks": lines}
    _show(json.dumps(found) if as_json else "\n".join([*map(one_line, lines), "ok"]))
    return EXIT_DONE


def _list(words: list[str], as_json: bool) -> int:
    from ddengine import catalog

    kinds = [*catalog.KINDS, "configs"]
    if len(words) != 1:
        raise UsageError("list takes one kind", f"Write: ddengine list {'|'.join(kinds)}")
    if words[0] not in kinds:
        raise unknown("kind", words[0], kinds)
    rows = catalog.configs() if words[0] == "configs" else catalog.listing(words[0])
    if as_json:
        items = [dict(zip(("name", "origin", "description"), row, strict=True)) for row in rows]
        _show(json.dumps({"kind": words[0], "items": items}))
    else:
        width = max(len(name) for name, _, _ in rows)
        lines = [f"{n:{width}}  {t}" + ("" if o == "ddengine" else f"  [{o}]") for n, o, t in rows]
        _show("\n".join(lines))
    return EXIT_DONE


def _doctor(words: list[str], as_json: bool) -> int:
    from ddengine import doctor

    _no_keys("doctor", words)
    findings = doctor.examine()
    ok = all(finding.ok for finding in findings)
    if as_json:
        _show(json.dumps({"ok": ok, "findings": [finding._asdict() for finding in findings]}))
    else:
        _show("\n".join(f"{'ok ' if f.ok else 'BAD'}  {f.name}: {f.value}" for f in findings))
    return EXIT_DONE if ok else EXIT_FAILED


def _no_keys(command: str, words: list[str]) -> None:
    if words:
        form = f"ddengine {command} {COMMANDS[command][0]}".strip()
        raise UsageError(f"{command} does not take '{words[0]}'", f"Write: {form}")


_HANDLERS: dict[str, Callable[..., int]] = {
    "demo": _demo,
    "distill": _distill,
    "buffer": _buffer,
    "import": _import,
    "evaluate": _evaluate,
    "report": _report,
    "inspect": _inspect,
    "verify": _verify,
    "list": _list,
    "doctor": _doctor,
}
