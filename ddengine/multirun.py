"""Several runs by one command (`-m`): every combination of the values given, here or as jobs of Slurm.

Each run is the command itself with one value a key, in a process and a folder of its own, so that it is
resumed, inspected and evaluated as any other; repeating the whole command does what is left.
"""

import hashlib
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ddengine.compose import composed, swept
from ddengine.config import MultirunConfig
from ddengine.errors import EXIT_DONE, EXIT_FAILED, EXIT_INTERRUPTED, UsageError, require_positive, unknown
from ddengine.files import make_folder, refused
from ddengine.given import Notice
from ddengine.parallel import signals
from ddengine.slurm import submit

LAUNCHERS = ("local", "slurm")
OWN = ("launcher", "jobs", "slurm.")  # keys of the multirun; all others are the runs'
LONGEST = 120  # of a folder's name
START = "import sys; from ddengine.cli import main; sys.exit(main())"


@dataclass(frozen=True)
class Job:
    """One run: its name among the others, what its command says, and where its output goes."""

    name: str
    words: tuple[str, ...]
    out: Path
    log: Path

    def line(self, command: str) -> list[str]:
        """The program and its arguments."""
        return [sys.executable, "-c", START, command, *self.words]


def split(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """The words that are the multirun's own, and those of its runs."""
    own = [w for w in words if w.partition("=")[0] in OWN or w.startswith(OWN[-1])]
    return own, [w for w in words if w not in own]


def jobs_of(
    command: str, words: Sequence[str], defaults: Callable[[list[str]], Mapping[str, Any]]
) -> list[Job]:
    """The runs that the words of a multirun mean, each composed once, so that a mistake shows before any.

    `out=DIR` becomes DIR/KEY=VALUE,... unless it holds an interpolation such as ${seed}; `defaults` are what
    `composed` takes beside a run's words. UsageError for any mistake, and for two runs in one folder.
    """
    given = [w for w in words if w.startswith("out=")]
    if not given:
        raise UsageError("several runs need a folder", "Give out=DIR; each is kept in DIR/KEY=VALUE")
    combined = swept([w for w in words if w not in given])
    varied = [i for i in range(len(combined[0])) if len({words[i] for words in combined}) > 1]
    if not varied:
        raise UsageError("-m, and no key has several values", "Give for example seed=0,1,2")
    own, root = "${" in given[-1], Path(given[-1].removeprefix("out=").strip("'\"")).expanduser()
    logs = Path(str(root).partition("${")[0] or ".") if own else root
    jobs = []
    for run in combined:
        name = _name([run[i] for i in varied])
        said = [*run, given[-1] if own else f"out={root / name}"]
        out = Path(composed(command, said, defaults(said)).out)
        jobs.append(Job(name, tuple(said), out, logs / f"{name}.log"))
    if len({job.out for job in jobs}) < len(jobs):
        raise UsageError(f"{given[-1]} is one folder for several runs", "Name the swept keys in it")
    return jobs


def _name(values: Sequence[str]) -> str:
    """A folder's name for a run: what sets it apart, as far as file systems and hydra's grammar take it."""
    plain = ",".join(values)
    name = re.sub(r"[^\w.=,+-]", "_", plain)
    if name == plain and len(name) <= LONGEST:
        return name
    return f"{name[: LONGEST - 13]}-{hashlib.sha256(plain.encode()).hexdigest()[:12]}"


def launch(command: str, jobs: Sequence[Job], config: MultirunConfig, notice: Notice) -> list[dict[str, Any]]:
    """Run the jobs here, `jobs` at a time, or hand them to Slurm: what became of each (plain JSON).

    A `code` is the exit code of a run that ended here; Slurm's jobs have an `id` instead.
    """
    if config.launcher not in LAUNCHERS:
        raise unknown("launcher", config.launcher, LAUNCHERS)
    if config.jobs is not None:
        require_positive("jobs", config.jobs)
    for job in jobs:
        make_folder(job.log.parent)
        fresh = not job.log.exists()
        with refused(f"write {job.log}"):
            job.log.open("ab").close()
        if fresh:  # it is there once the run starts
            job.log.unlink()
    if config.launcher == "slurm":
        lines = [(job.line(command), str(job.log)) for job in jobs]
        ids = submit(lines, jobs[0].log.parent / "slurm", config.jobs, config.slurm)
        told: list[dict[str, Any]] = [{"id": number} for number in ids]
    else:
        told = [{"code": code} for code in _here(command, jobs, config.jobs or 1, notice)]
    return [
        {"name": job.name, "out": str(job.out), "log": str(job.log), **found}
        for job, found in zip(jobs, told, strict=True)
    ]


def outcome(run: Mapping[str, Any]) -> str:
    """What became of one run, for people."""
    if "id" in run:
        return f"job {run['id']}"
    return "done" if run["code"] == EXIT_DONE else f"exit code {run['code']}, see {run['log']}"


def exit_code(found: Sequence[Mapping[str, Any]]) -> int:
    """The exit code of a multirun: interrupted where a run was, else failed where one failed."""
    codes = {run.get("code", EXIT_DONE) for run in found}
    if EXIT_INTERRUPTED in codes:
        return EXIT_INTERRUPTED
    return EXIT_DONE if codes == {EXIT_DONE} else EXIT_FAILED


def _here(command: str, jobs: Sequence[Job], count: int, notice: Notice) -> list[int]:
    """The exit codes of jobs run on this machine; a signal stops those that run, and starts no more.

    They have sessions of their own: Ctrl-C reaches them once, through this process.
    """
    running: dict[str, subprocess.Popen[bytes]] = {}
    threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // count))} if count > 1 else {}

    def run(job: Job) -> int:
        if stop:
            return EXIT_INTERRUPTED
        began = time.monotonic()
        with job.log.open("ab") as log:
            running[job.name] = subprocess.Popen(
                job.line(command), stdout=log, stderr=log, stdin=subprocess.DEVNULL,
                env={**threads, **os.environ}, start_new_session=True,
            )  # fmt: skip
            if stop:
                running[job.name].terminate()
            code = running[job.name].wait()
        del running[job.name]
        told = outcome({"code": code, "log": job.log})
        notice(f"{job.name}: {told}, {time.monotonic() - began:.0f} s")
        return code

    def end() -> None:
        for process in list(running.values()):
            process.terminate()

    with signals(end) as stop, ThreadPoolExecutor(count) as pool:
        return list(pool.map(run, jobs))
