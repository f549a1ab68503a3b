"""Several runs by one command: which they are, how they run here, what Slurm is given."""

import json
import os
import signal
import stat
import sys
import threading
import time

import pytest

from ddengine import multirun, slurm
from ddengine.cli import main
from ddengine.config import MultirunConfig, SlurmConfig
from ddengine.errors import DDError, UsageError
from synth import DistilledSet

RUN = ["dataset=digits", "matcher=random", "ipc=1"]


def jobs(*words):
    return multirun.jobs_of("distill", [*RUN, *words], lambda words: {})


def quick(tmp_path, names="abc"):
    """Jobs whose command is a line of Python: their only word."""
    return [multirun.Job(name, (name,), tmp_path / name, tmp_path / f"{name}.log") for name in names]


def test_every_combination_is_a_run_with_a_folder_that_says_what_it_is():
    found = jobs("seed=0,1", "ipc=1,2,5", "out=runs/some")
    assert [job.name for job in found] == [f"seed={s},ipc={i}" for s in (0, 1) for i in (1, 2, 5)]
    assert [str(job.out) for job in found] == [f"runs/some/{job.name}" for job in found]
    assert found[4].words == (*RUN, "seed=1", "ipc=2", "out=runs/some/seed=1,ipc=2")
    assert str(found[4].log) == "runs/some/seed=1,ipc=2.log"
    assert [job.name for job in jobs("seed=range(2,8,3)", "out=some")] == ["seed=2", "seed=5"]


def test_names_of_folders_are_plain_short_and_distinct():
    long = "x" * 150
    found = jobs(f"experts='a/b','a_b',{long}", "out=some")
    names = [job.name for job in found]
    assert len(set(names)) == 3 and max(map(len, names)) <= multirun.LONGEST
    assert not any("/" in name or "'" in name for name in names)


def test_a_folder_may_name_the_keys_itself():
    found = jobs("seed=3,4", "out=runs/x${seed}/run")
    assert [str(job.out) for job in found] == ["runs/x3/run", "runs/x4/run"]
    assert [str(job.log) for job in found] == ["runs/x/seed=3.log", "runs/x/seed=4.log"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["seed=0,1"], "several runs need a folder\nGive out=DIR"),
        (["seed=0", "out=x"], "no key has several values\nGive for example seed=0,1,2"),
        (["seed=0,0", "out=x"], "no key has several values"),
        (["seed=0,1", "ipc=1,2", "out=x${seed}"], "one folder for several runs"),
        (["matcher=random,randon", "out=x"], "unknown matcher 'randon'\nDid you mean 'random'"),
        (["seed=interval(0,1)", "out=x"], "names a range without steps"),
    ],
)
def test_mistakes_show_before_any_run_starts(words, said):
    with pytest.raises(UsageError) as error:
        jobs(*words)
    assert said in str(error.value)


def test_the_words_of_the_multirun_are_no_words_of_its_runs():
    words = ["seed=0,1", "launcher=slurm", "slurm.cpus=2", "jobs=3", "slurmed=1", "jobsite=2"]
    assert multirun.split(words) == (words[1:4], [words[0], *words[4:]])


def test_the_command_runs_all_here_and_tells_what_became_of_each(tmp_path, capsys):
    words = [*RUN, "ipc=1,5000", f"out={tmp_path}", "jobs=2", "--json"]
    assert main(["distill", "-m", *words]) == 1
    captured = capsys.readouterr()
    runs = json.loads(captured.out)["runs"]
    assert [(run["name"], run["code"]) for run in runs] == [("ipc=1", 0), ("ipc=5000", 2)]
    assert DistilledSet.load(tmp_path / "ipc=1" / "distilled").decode().counts == [1] * 10
    assert "ipc=5000 is more than the" in (tmp_path / "ipc=5000.log").read_text()
    assert sorted(captured.err.splitlines())[0].startswith("ipc=1: done, ")
    assert f"ipc=5000: exit code 2, see {tmp_path / 'ipc=5000.log'}" in captured.err


def test_the_command_line_refuses_in_two_lines(capsys):
    assert main(["distill", *RUN, "seed=0,1"]) == 2
    assert "Give one, or -m with distill or buffer" in capsys.readouterr().err
    assert main(["buffer", "--multirun", "dataset=digits", "seed=0,1", "out=x", "launcher=here"]) == 2
    assert capsys.readouterr().err.startswith("error: unknown launcher 'here'\n  fix: Known: local, slurm")


def test_jobs_run_side_by_side_on_their_share_of_the_cores(tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(multirun.os, "cpu_count", lambda: 9)
    wait = "import os, time; print(os.environ['OMP_NUM_THREADS'], flush=True); time.sleep(1)"
    monkeypatch.setattr(multirun, "START", wait)
    told: list[str] = []
    began = time.monotonic()
    found = multirun.launch("distill", quick(tmp_path), MultirunConfig(jobs=3), told.append)
    assert time.monotonic() - began < 2.5 and [run["code"] for run in found] == [0, 0, 0]
    assert {(tmp_path / f"{name}.log").read_text() for name in "abc"} == {"3\n"}
    assert sorted(line.partition(":")[0] for line in told) == ["a", "b", "c"]


def test_a_signal_stops_what_runs_once_and_starts_no_more(tmp_path, monkeypatch):
    saves = (
        "import signal, sys, time; signal.signal(15, lambda *a: (print('saved', flush=True), sys.exit(130)));"
    )
    monkeypatch.setattr(multirun, "START", f"{saves} print('began', flush=True); time.sleep(60)")

    def interrupt():
        log = tmp_path / "a.log"
        while not (log.exists() and "began" in log.read_text()):
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt).start()
    found = multirun.launch("distill", quick(tmp_path), MultirunConfig(), lambda text: None)
    assert [run["code"] for run in found] == [130, 130, 130] and multirun.exit_code(found) == 130
    assert (tmp_path / "a.log").read_text() == "began\nsaved\n"
    assert not (tmp_path / "b.log").exists()


def test_exit_codes_of_all_make_one():
    assert multirun.exit_code([{"code": 0}, {"id": "7_1"}]) == 0
    assert multirun.exit_code([{"code": 0}, {"code": 3}]) == 1
    assert multirun.exit_code([{"code": 2}, {"code": 130}]) == 130


def test_a_process_of_slurm_runs_its_command_and_fails_aloud(tmp_path):
    log = tmp_path / "log"
    assert slurm.Process([sys.executable, "-c", "print('ran')"], str(log))() == 0
    assert log.read_text() == "ran\n"
    with pytest.raises(RuntimeError, match=f"exit code 3, see {log}"):
        slurm.Process([sys.executable, "-c", "raise SystemExit(3)"], str(log))()


def test_a_process_of_slurm_saves_when_its_time_ends_and_is_queued_again(tmp_path):
    pytest.importorskip("submitit")
    saves = (
        "import signal, sys, time; signal.signal(15, lambda *a: (print('saved', flush=True), sys.exit(130)));"
    )
    line = [sys.executable, "-c", f"{saves} print('began', flush=True); time.sleep(60)"]
    process, log, again = slurm.Process(line, str(tmp_path / "log")), tmp_path / "log", []

    def ends(number, frame):
        again.append(process.checkpoint())
        raise InterruptedError

    before = signal.signal(signal.SIGUSR2, ends)

    def tell():
        while not (log.exists() and "began" in log.read_text()):
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGUSR2)

    threading.Thread(target=tell).start()
    try:
        with pytest.raises(InterruptedError):
            process()
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert log.read_text() == "began\nsaved\n"
    assert (again[0].function.line, again[0].function.log) == (line, str(log))


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """Programs in front of all others that keep what Slurm would be given."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("srun", "sbatch"):
        path = folder / name
        path.write_text(f'#!/bin/sh\ncp "$1" {tmp_path}/script\necho Submitted batch job 4217\n')
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


def test_slurm_gets_one_array_with_what_was_asked_for(cluster, tmp_path):
    submitit = pytest.importorskip("submitit")
    asked = SlurmConfig(partition="short", minutes=61, cpus=3, gpus=2, memory_gb=7)
    config = MultirunConfig(launcher="slurm", jobs=2, slurm=asked)
    made = multirun.jobs_of("distill", [*RUN, "seed=0,1,2", f"out={tmp_path / 'runs'}"], lambda words: {})
    found = multirun.launch("distill", made, config, lambda text: None)
    assert [run["id"] for run in found] == ["4217_0", "4217_1", "4217_2"]
    assert multirun.outcome(found[1]) == "job 4217_1" and multirun.exit_code(found) == 0
    script = (tmp_path / "script").read_text().splitlines()
    options = dict(
        line.removeprefix("#SBATCH --").partition("=")[::2] for line in script if "#SBATCH" in line
    )
    wanted = {"array": "0-2%2", "partition": "short", "time": "61", "cpus-per-task": "3", "mem": "7GB"}
    assert wanted.items() <= options.items() and options["gpus-per-node"] == "2"
    kept = sorted((tmp_path / "runs" / "slurm").glob("*_submitted.pkl"))
    lines = [submitit.core.utils.DelayedSubmission.load(path).function.line for path in kept]
    assert sorted(lines) == sorted(job.line("distill") for job in made)


def test_no_slurm_and_no_submitit_are_said(tmp_path, monkeypatch):
    config = MultirunConfig(launcher="slurm")
    monkeypatch.setattr(slurm, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r'needs submitit\nRun: pip install "ddengine\[slurm\]"'):
        multirun.launch("distill", quick(tmp_path), config, print)
    pytest.importorskip("submitit")
    monkeypatch.undo()
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DDError, match="Slurm takes no jobs"):
        multirun.launch("distill", quick(tmp_path), config, print)


@pytest.mark.parametrize("key", ["minutes", "cpus", "gpus"])
def test_values_out_of_range_are_refused(key, tmp_path):
    config = MultirunConfig(launcher="slurm", slurm=SlurmConfig(**{key: -1}))
    with pytest.raises(UsageError, match=f"slurm.{key}=-1"):
        multirun.launch("distill", quick(tmp_path), config, print)


def test_a_log_that_cannot_be_written_is_refused_before_any_run_starts(tmp_path):
    todo = quick(tmp_path)
    todo[2].log.mkdir()
    with pytest.raises(UsageError, match="cannot write .*c.log: Is a directory"):
        multirun.launch("distill", todo, MultirunConfig(), print)
    assert not any(job.out.exists() for job in todo)
