"""The command line: finds the command and its flags, hands the rest to hydra, and turns errors into two lines.

Nothing here imports torch, numpy or hydra; a command does when it runs.
"""

import json
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ddengine import __version__, origins
from ddengine.errors import EXIT_DONE, EXIT_FAILED, EXIT_INTERRUPTED, EXIT_USAGE, DDError, UsageError, unknown

COMMANDS = {
    "demo": ("", "distil the embedded digits and judge the result: under two minutes, no network"),
    "distill": ("", "distil a dataset; the same command resumes after an interruption"),
    "evaluate": ("PATH", "judge a distilled set or a run by the fair protocol"),
    "inspect": ("PATH", "show what is in a distilled set or a run"),
    "verify": ("PATH", "check hashes, shapes and ranges of a distilled set; safe on untrusted files"),
    "list": ("KIND", "list matchers, datasets, networks or configs"),
    "doctor": ("", "show versions, devices and what is wrong with the installation"),
}
KEYS = {
    "distill": "dataset=NAME dataset.root=PATH matcher=NAME matcher.steps=N network=NAME network.width=N "
    "ipc=N budget.nbytes=N seed=N out=DIR device=auto|cpu|cuda precision=auto|fp32|bf16 row=NAME",
    "evaluate": "networks=[a,b] seeds=N seed=N rows=[...] recipe.steps=N recipe.lrs=[...] workers=N device=NAME",
    "demo": "out=DIR seed=N seeds=N",
}
FLAGS = ("--json", "--help", "-h")


def main(arguments: Sequence[str] | None = None, *, pinned: bool = True) -> int:
    """Run one command and return its exit code; `pinned` makes our packages win over modules of their names."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        if pinned:
            origins.pin()
        signal.signal(signal.SIGTERM, _terminated)
        return _run(given)
    except DDError as error:
        return _fail(error.cause, error.remedy, error.code, error)
    except KeyboardInterrupt as error:
        return _fail("interrupted", "Repeat the same command to go on", EXIT_INTERRUPTED, error)
    except BrokenPipeError:
        sys.stderr.close()
        return EXIT_DONE
    except Exception as error:
        return _fail(
            f"{type(error).__name__}: {' '.join(str(error).split())[:300]}",
            "This is a defect or a lack of memory or disk; DDENGINE_DEBUG=1 shows where",
            EXIT_FAILED,
            error,
        )


def _terminated(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def _fail(cause: str, remedy: str, code: int, error: BaseException) -> int:
    if os.environ.get("DDENGINE_DEBUG") == "1":
        traceback.print_exception(error)
    print(f"error: {cause}", file=sys.stderr)
    if remedy:
        print(f"  fix: {remedy}", file=sys.stderr)
    return code


def _run(given: list[str]) -> int:
    if not given or given[0] in ("--help", "-h", "help"):
        print(_overview())
        return EXIT_DONE if given else EXIT_USAGE
    if given[0] in ("--version", "-V"):
        print(f"ddengine {__version__}")
        return EXIT_DONE
    command, rest = given[0], given[1:]
    if command not in COMMANDS:
        raise unknown("command", command, COMMANDS)
    flags = [word for word in rest if word.startswith("-")]
    for flag in flags:
        if flag not in FLAGS:
            raise unknown("flag", flag, FLAGS)
    if "--help" in flags or "-h" in flags:
        print(_help(command))
        return EXIT_DONE
    words = [word for word in rest if not word.startswith("-")]
    if not sys.modules.get("ddengine.origins") or origins.SiblingFinder not in sys.meta_path:
        origins.check()
    return _HANDLERS[command](words, "--json" in flags)


def _overview() -> str:
    lines = [f"  {' '.join((name, argument)).strip():16} {text}" for name, (argument, text) in COMMANDS.items()]
    return "\n".join(
        [
            "ddengine COMMAND [key=value ...] [--json]",
            "",
            *lines,
            "",
            "ddengine COMMAND --help shows a command's keys. Result on stdout, progress on stderr.",
            "Exit codes: 0 done, 1 the run failed, 2 usage, 3 an artefact failed verification, 130 interrupted.",
        ]
    )


def _help(command: str) -> str:
    argument, text = COMMANDS[command]
    head = " ".join(filter(None, ("ddengine", command, argument)))
    keys = f"\n\nKeys: {KEYS[command]}" if command in KEYS else ""
    return f"{head}\n\n{text[0].upper()}{text[1:]}.{keys}\n\nFlags: --json (one object on stdout), --help"


def _split(command: str, words: list[str]) -> tuple[Path, list[str]]:
    paths, overrides = [w for w in words if "=" not in w], [w for w in words if "=" in w]
    if len(paths) != 1:
        raise UsageError(f"{command} takes one PATH, not {len(paths)}", f"Write: ddengine {command} PATH")
    return Path(paths[0]), overrides


def _print_table(table: Any, as_json: bool) -> None:
    from ddengine import report

    print(json.dumps(table.to_json(), allow_nan=False) if as_json else report.table_text(table.to_json()))


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
    from ddengine import recipes
    from ddengine.compose import composed
    from ddengine.console import Console

    config = composed("distill", words)
    with Console() as console:
        result = recipes.run_distill(config, console.watch())
    assert result.folder is not None
    found = recipes.summary(result.folder)
    print(json.dumps({**found, "resumed_from": result.resumed_from}) if as_json else recipes.summary_text(found))
    return EXIT_DONE


def _evaluate(words: list[str], as_json: bool) -> int:
    from ddengine import recipes
    from ddengine.compose import composed
    from ddengine.console import Console

    path, overrides = _split("evaluate", words)
    config = composed("evaluate", [*recipes.manifest_overrides(path), *overrides])
    with Console() as console:
        table = recipes.run_evaluate(path, config, console.watch())
    _print_table(table, as_json)
    return EXIT_DONE


def _inspect(words: list[str], as_json: bool) -> int:
    from ddengine import recipes

    path, overrides = _split("inspect", words)
    _no_keys("inspect", overrides)
    found = recipes.summary(path)
    print(json.dumps(found) if as_json else recipes.summary_text(found))
    return EXIT_DONE


def _verify(words: list[str], as_json: bool) -> int:
    from ddengine import recipes

    path, overrides = _split("verify", words)
    _no_keys("verify", overrides)
    lines = recipes.verified(path)
    print(json.dumps({"path": str(path), "ok": True, "checks": lines}) if as_json else "\n".join([*lines, "ok"]))
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
        print(json.dumps([dict(zip(("name", "origin", "description"), row, strict=True)) for row in rows]))
    else:
        width = max(len(name) for name, _, _ in rows)
        print("\n".join(f"{n:{width}}  {text}" + ("" if o == "ddengine" else f"  [{o}]") for n, o, text in rows))
    return EXIT_DONE


def _doctor(words: list[str], as_json: bool) -> int:
    from ddengine import doctor

    _no_keys("doctor", words)
    findings = doctor.examine()
    if as_json:
        print(json.dumps([finding._asdict() for finding in findings]))
    else:
        print("\n".join(f"{'ok ' if f.ok else 'BAD'}  {f.name}: {f.value}" for f in findings))
    return EXIT_DONE if all(finding.ok for finding in findings) else EXIT_FAILED


def _no_keys(command: str, words: list[str]) -> None:
    if words:
        raise UsageError(f"{command} does not take '{words[0]}'", f"Write: ddengine {command} {COMMANDS[command][0]}")


_HANDLERS: dict[str, Callable[[list[str], bool], int]] = {
    "demo": _demo,
    "distill": _distill,
    "evaluate": _evaluate,
    "inspect": _inspect,
    "verify": _verify,
    "list": _list,
    "doctor": _doctor,
}
