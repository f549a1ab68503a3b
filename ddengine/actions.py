"""What each command does when it runs: composes its configuration, calls a recipe, prints the result.

Heavy modules are imported by the command that needs them.
"""

import json
import os
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from contextvars import ContextVar
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO

from ddengine.errors import EXIT_DONE, EXIT_FAILED, UsageError, one_line, unknown
from ddengine.usage import BUFFERS, COMMANDS, FORMATS

_results: ContextVar[TextIO | None] = ContextVar("_results", default=None)


@contextmanager
def result_alone() -> Iterator[None]:
    """Inside, stdout is for what `show` writes, and what code of the user's prints goes to stderr."""
    kept, real = sys.stdout, sys.stdout is sys.__stdout__ and None not in (sys.stdout, sys.stderr)
    if real:  # processes that are started inside have it so too
        sys.stdout.flush()
        kept = os.fdopen(os.dup(1), "w", encoding=sys.stdout.encoding, errors=sys.stdout.errors)
        os.dup2(2, 1)
    token = _results.set(kept)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        _results.reset(token)
        if real:
            os.dup2(kept.fileno(), 1)
            kept.close()


def show(text: str) -> None:
    """Print a result on stdout; a reader that has left, such as `head`, is no failure."""
    stream = _results.get() or sys.stdout
    if stream is None:  # the process was started without one
        return
    encoding = stream.encoding or "utf-8"
    try:
        print(text.encode(encoding, "backslashreplace").decode(encoding), file=stream, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())  # else Python fails as it ends


def _split(command: str, words: list[str]) -> tuple[Path, list[str]]:
    paths = [w for w in words if "=" not in w] or [w for w in words[:1] if Path(w).exists()]
    overrides = [w for w in words if w not in paths]
    if len(paths) != 1:
        raise UsageError(f"{command} takes one PATH, not {len(paths)}", f"Write: ddengine {command} PATH")
    return Path(paths[0]), overrides


def _print_table(table: Any, as_json: bool) -> None:
    from ddengine import report

    found = table.to_json()
    show(json.dumps(found, allow_nan=False) if as_json else report.table_text(found).rstrip("\n"))


def _demo(words: list[str], as_json: bool) -> int:
    from ddengine.compose import composed
    from ddengine.console import Console
    from ddengine.demo import run_demo

    config = composed("demo", words)
    with Console() as console:
        table = run_demo(config, console.watch())
    _print_table(table, as_json)
    return EXIT_DONE


def _multirun(command: str, words: list[str], as_json: bool) -> int:
    from ddengine import artefacts, multirun
    from ddengine.compose import composed
    from ddengine.console import Console

    def defaults(words: list[str]) -> dict[str, Any]:
        return artefacts.expert_values(words) | artefacts.graph_values(words) if command == "distill" else {}

    own, rest = multirun.split(words)
    config, jobs = composed("multirun", own), multirun.jobs_of(command, rest, defaults)
    with Console() as console:
        found = multirun.launch(command, jobs, config, console.watch().notice)
    lines = [f"{one_line(run['out'])}  {multirun.outcome(run)}" for run in found]
    show(json.dumps({"runs": found}) if as_json else "\n".join(lines))
    return multirun.exit_code(found)


def _distill(words: list[str], as_json: bool, **several: bool) -> int:
    if several:
        return _multirun("distill", words, as_json)
    from ddengine import artefacts, recipes
    from ddengine.compose import composed
    from ddengine.console import Console

    config = composed("distill", words, artefacts.expert_values(words) | artefacts.graph_values(words))
    with Console() as console:
        result = recipes.run_distill(config, console.watch())
    if result.folder is None:  # of several processes the first has it, and shows the result
        return EXIT_DONE
    found = {**artefacts.summary(result.folder), "resumed_from": result.resumed_from}
    show(json.dumps(found) if as_json else artefacts.summary_text(found))
    return EXIT_DONE


def _buffer(words: list[str], as_json: bool, **several: bool) -> int:
    if several:
        return _multirun("buffer", words, as_json)
    from ddengine import artefacts, recipes
    from ddengine.compose import composed
    from ddengine.console import Console

    config = composed("buffer", words)
    with Console() as console:
        found = recipes.run_buffer(config, console.watch()).summary()
    show(json.dumps(found) if as_json else artefacts.summary_text(found))
    return EXIT_DONE


def _import(words: list[str], as_json: bool, **flags: str) -> int:
    from ddengine import artefacts, exchange, recipes
    from ddengine.compose import composed
    from ddengine.console import Console

    paths = [Path(word) for word in words if "=" not in word]
    if not paths or "from" not in flags:
        lacking = "--from FORMAT" if paths else "one FILE or more"
        raise UsageError(f"import takes {lacking}", "Write: ddengine import FILE ... --from FORMAT out=DIR")
    form = flags["from"]
    if form not in FORMATS:
        raise unknown("format", form, FORMATS)
    buffer = form in BUFFERS
    config = composed("import" if buffer else "import_set", [word for word in words if "=" in word])
    with Console() as console:
        if buffer:
            found = recipes.run_import(paths, config, console.watch()).summary()
        else:
            found = artefacts.summary(exchange.run_import_set(paths, form, config, console.watch()))
    show(json.dumps(found) if as_json else artefacts.summary_text(found))
    return EXIT_DONE


def _export(words: list[str], as_json: bool, **flags: str) -> int:
    from ddengine import exchange
    from ddengine.compose import composed
    from ddengine.console import Console

    path, overrides = _split("export", words)
    if "to" not in flags:
        raise UsageError("export takes --to FORMAT", "Write: ddengine export PATH --to imagefolder out=DIR")
    config, said = composed("export", overrides), list[str]()
    with Console() as console:
        watch = console.watch()

        def notice(text: str) -> None:
            said.append(text.removeprefix("note: "))
            watch.notice(text)

        out = exchange.run_export(path, flags["to"], config, replace(watch, notice=notice))
    found = {"path": str(out), "format": flags["to"], "notes": said}
    show(json.dumps(found) if as_json else f"wrote {one_line(out)}")
    return EXIT_DONE


def _downstream(words: list[str], as_json: bool) -> int:
    from ddengine import applying, artefacts, continual_table, nas_table
    from ddengine.compose import composed
    from ddengine.console import Console

    tasks: dict[str, tuple[Callable[..., Any], Callable[..., str]]] = {
        "continual": (applying.run_continual, continual_table.table_text),
        "nas": (applying.run_nas, nas_table.table_text),
    }
    if not words or words[0] not in tasks:
        if words and "=" not in words[0]:
            raise unknown("task", words[0], tasks)
        raise UsageError("downstream takes a task", "Write: ddengine downstream continual|nas PATH")
    task, (run, text) = words[0], tasks[words[0]]
    path, overrides = _split("downstream", words[1:])
    values = artefacts.manifest_values(path)
    if task == "nas":
        values = {key: value for key, value in values.items() if key.partition(".")[0] != "network"}
    config = composed(f"downstream_{task}", overrides, values)
    with Console() as console:
        found = run(path, config, console.watch())
    show(json.dumps(found, allow_nan=False) if as_json else text(found).rstrip("\n"))
    return EXIT_DONE


def _audit(words: list[str], as_json: bool) -> int:
    from ddengine import applying, artefacts
    from ddengine.audited import audit_text
    from ddengine.compose import composed
    from ddengine.console import Console

    path, overrides = _split("audit", words)
    config = composed("audit", overrides, artefacts.manifest_values(path, overrides))
    with Console() as console:
        found = applying.run_audit(path, config, console.watch())
    show(json.dumps(found, allow_nan=False) if as_json else audit_text(found).rstrip("\n"))
    return EXIT_DONE


def _evaluate(words: list[str], as_json: bool) -> int:
    from ddengine import artefacts, evaluating
    from ddengine.compose import composed
    from ddengine.console import Console

    path, overrides = _split("evaluate", words)
    graphs = artefacts.holds_graphs(artefacts.DistilledSet.load(artefacts.artefact(path)))
    config = composed(f"evaluate{'_graphs' * graphs}", overrides, artefacts.manifest_values(path, overrides))
    with Console() as console:
        typed = shlex.join(["ddengine", "evaluate", *words])
        table = evaluating.run_evaluate(path, config, console.watch(), typed)
    _print_table(table, as_json)
    return EXIT_DONE


def _estimate(words: list[str], as_json: bool) -> int:
    from ddengine import artefacts, estimating
    from ddengine.compose import composed
    from ddengine.console import Console
    from ddengine.estimating_evaluation import estimate_evaluate

    known = ("distill", "buffer", "evaluate")
    if not words or words[0] not in known:
        if words and "=" not in words[0]:
            raise unknown("command to estimate", words[0], known)
        raise UsageError("estimate takes a command", f"Write: ddengine estimate {'|'.join(known)} ...")
    command, rest = words[0], words[1:]
    with Console() as console:
        if command == "distill":
            values = artefacts.expert_values(rest) | artefacts.graph_values(rest)
            found = estimating.estimate_distill(composed(command, rest, values), console.watch())
        elif command == "buffer":
            found = estimating.estimate_buffer(composed(command, rest), console.watch())
        else:
            path, overrides = _split(command, rest)
            graphs = artefacts.holds_graphs(artefacts.DistilledSet.load(artefacts.artefact(path)))
            config = composed(
                f"evaluate{'_graphs' * graphs}", overrides, artefacts.manifest_values(path, overrides)
            )
            found = estimate_evaluate(path, config, console.watch())
    show(json.dumps(found.to_json(), allow_nan=False) if as_json else found.text())
    return EXIT_FAILED if found.lacking else EXIT_DONE


def _report(words: list[str], as_json: bool, html: str | None = None, compare: bool = False) -> int:
    from ddengine import report
    from ddengine.compare import pair_of
    from ddengine.page import page
    from ddengine.runs import read_run, write_page

    if not words:
        raise UsageError("report takes one PATH or more, not 0", "Write: ddengine report PATH ...")
    runs = [read_run(Path(word)) for word in words]
    shown = [run.shown(len(runs)) for run in runs]
    pair = pair_of(shown, required=compare)
    if html is not None:
        write_page(Path(html).expanduser(), page(shown, pair))
        print(one_line(f"wrote {html}"), file=sys.stderr)
    found = {"runs": [run.to_json() for run in runs], "comparison": pair and pair.to_json()}
    if as_json:
        show(json.dumps(pair.to_json() if compare and pair else found, allow_nan=False))
    elif compare and pair:
        show(pair.text().rstrip("\n"))
    else:
        parts = [*map(report.run_markdown, shown), *([pair.markdown()] if pair else [])]
        show("\n".join(parts).rstrip("\n"))
    return EXIT_DONE


def _inspect(words: list[str], as_json: bool) -> int:
    from ddengine import artefacts

    path, overrides = _split("inspect", words)
    _no_keys("inspect", overrides)
    found = artefacts.summary(path)
    show(json.dumps(found) if as_json else artefacts.summary_text(found))
    return EXIT_DONE


def _verify(words: list[str], as_json: bool) -> int:
    from ddengine import artefacts

    path, overrides = _split("verify", words)
    _no_keys("verify", overrides)
    lines = artefacts.verified(path)
    found = {"path": str(path), "ok": True, "checks": lines}
    show(json.dumps(found) if as_json else "\n".join([*map(one_line, lines), "ok"]))
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
        show(json.dumps({"kind": words[0], "items": items}))
    else:
        width = max(len(name) for name, _, _ in rows)
        lines = [f"{n:{width}}  {t}" + ("" if o == "ddengine" else f"  [{o}]") for n, o, t in rows]
        show("\n".join(lines))
    return EXIT_DONE


def _doctor(words: list[str], as_json: bool) -> int:
    from ddengine import doctor

    _no_keys("doctor", words)
    findings = doctor.examine()
    ok = all(finding.ok for finding in findings)
    if as_json:
        show(json.dumps({"ok": ok, "findings": [finding._asdict() for finding in findings]}))
    else:
        marks = ("warn" if f.warning else "ok" if f.ok else "BAD" for f in findings)
        show("\n".join(f"{mark:4} {f.name}: {f.value}" for mark, f in zip(marks, findings, strict=True)))
    return EXIT_DONE if ok else EXIT_FAILED


def _no_keys(command: str, words: list[str]) -> None:
    if words:
        form = f"ddengine {command} {COMMANDS[command][0]}".strip()
        raise UsageError(f"{command} does not take '{words[0]}'", f"Write: {form}")


HANDLERS: dict[str, Callable[..., int]] = {
    "demo": _demo,
    "distill": _distill,
    "buffer": _buffer,
    "import": _import,
    "export": _export,
    "evaluate": _evaluate,
    "estimate": _estimate,
    "downstream": _downstream,
    "audit": _audit,
    "report": _report,
    "inspect": _inspect,
    "verify": _verify,
    "list": _list,
    "doctor": _doctor,
}
