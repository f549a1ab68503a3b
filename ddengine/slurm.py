"""Jobs for Slurm through submitit: an array of them, each of which goes on by itself after its time is up."""

import subprocess
import time
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ddengine.config import SlurmConfig
from ddengine.errors import DDError, UsageError, require_positive

POLL = 0.5  # seconds between looks at a process


class Process:
    """A command that Slurm runs; submitit calls `checkpoint` when its time ends, and queues the result."""

    def __init__(self, line: Sequence[str], log: str) -> None:
        self.line, self.log = list(line), log
        self._process: subprocess.Popen[bytes] | None = None

    def __call__(self) -> int:
        """Run the command to its end; raises RuntimeError where it fails, for Slurm to see."""
        with Path(self.log).open("ab") as log:
            self._process = subprocess.Popen(self.line, stdout=log, stderr=log)
            while (code := self._process.poll()) is None:  # no wait, which `checkpoint` could not enter
                time.sleep(POLL)
        if code:
            raise RuntimeError(f"exit code {code}, see {self.log}")
        return code

    def checkpoint(self) -> Any:
        """Let the command save its state, and ask for the same again."""
        if self._process is not None:
            self._process.terminate()
            self._process.wait()
        return import_module("submitit").helpers.DelayedSubmission(Process(self.line, self.log))


def submit(
    lines: Sequence[tuple[Sequence[str], str]], folder: Path, parallel: int | None, config: SlurmConfig
) -> list[str]:
    """Hand commands, each with its log file, to Slurm as one array; returns the numbers of the jobs.

    At most `parallel` run at a time. Slurm's script and submitit's files go to `folder`. UsageError for a
    value out of range and where submitit is not installed, DDError where there is no Slurm.
    """
    for key in ("minutes", "cpus"):
        require_positive(f"slurm.{key}", getattr(config, key))
    require_positive("slurm.gpus", config.gpus, zero=True)
    if find_spec("submitit") is None:
        raise UsageError("launcher=slurm needs submitit", 'Run: pip install "ddengine[slurm]"')
    submitit = import_module("submitit")
    try:
        executor = submitit.AutoExecutor(folder=folder, cluster="slurm")
        executor.update_parameters(**_parameters(parallel, config))
        jobs = executor.submit_array([Process(line, log) for line, log in lines])
    except (RuntimeError, submitit.core.utils.FailedJobError) as error:
        raise DDError(f"Slurm takes no jobs: {error}", "Start this on a machine that has sbatch") from error
    return [job.job_id for job in jobs]


def _parameters(parallel: int | None, config: SlurmConfig) -> dict[str, Any]:
    """What submitit calls the same; what is not said is left to the cluster."""
    said = {
        "name": "ddengine", "timeout_min": config.minutes, "cpus_per_task": config.cpus,
        "gpus_per_node": config.gpus or None, "mem_gb": config.memory_gb, "slurm_array_parallelism": parallel,
        "slurm_partition": config.partition, "slurm_account": config.account,
    }  # fmt: skip
    return {key: value for key, value in said.items() if value is not None}
