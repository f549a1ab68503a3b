"""Readers beside a writer: what they get is the old state or the new one, never a mix of both."""

import os
import signal
import threading

import pytest
import torch

from ddengine import files
from ddengine.errors import UsageError
from ddengine.types import DataSpec
from synth import DistilledSet, Pixels

READS = 500
SPEC = DataSpec("noise", (3, 7, 5), ("ant", "bee"), (0.5, 0.4, 0.3), (0.25, 0.2, 0.3))


@pytest.fixture(scope="module")
def sets():
    """Two sets of other pixels, labels and size."""
    draw = torch.Generator().manual_seed(3)

    def made(count):
        images = torch.randn(count, 3, 7, 5, generator=draw)
        return Pixels(images, torch.arange(count) % 2, SPEC, student_lr=count / 100)

    return [DistilledSet.make(made(n), recipe={"lr": n}, provenance={"n": n}) for n in (5, 11)]


def writer(sets, folder):
    """A process that saves the sets in turn into `folder`, until it is killed."""
    child = os.fork()
    if child == 0:
        try:
            while True:
                for found in sets:
                    found.save(folder, overwrite=True)
        finally:
            os._exit(1)
    return child


def test_a_set_that_is_replaced_again_and_again_is_read_as_one_or_the_other(sets, tmp_path):
    folder = sets[0].save(tmp_path / "set")
    child, seen = writer(sets, folder), []
    try:
        for _ in range(READS):
            found = DistilledSet.load(folder)
            which = found.manifest["count"] == 11
            assert found.tensors.keys() == sets[which].tensors.keys()
            assert all(torch.equal(t, found.tensors[name]) for name, t in sets[which].tensors.items())
            assert found.manifest["provenance"] == sets[which].manifest["provenance"]
            seen.append(which)
        assert os.waitpid(child, os.WNOHANG) == (0, 0)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert {True, False} == set(seen)
    sets[0].save(folder, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


def test_two_savers_of_one_folder_do_not_mix(sets, tmp_path, monkeypatch):
    real, inside, go_on = files.write_tensors, threading.Event(), threading.Event()

    def slow(path, tensors):
        inside.set()
        assert go_on.wait(60)
        return real(path, tensors)

    monkeypatch.setattr(files, "write_tensors", slow)
    first = threading.Thread(target=sets[0].save, args=(tmp_path / "set",))
    first.start()
    assert inside.wait(60)
    with pytest.raises(UsageError, match=rf"set is being written by process {os.getpid()} "):
        sets[1].save(tmp_path / "set")
    go_on.set()
    first.join()
    assert DistilledSet.load(tmp_path / "set").manifest["count"] == 5
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


def test_a_folder_that_is_exchanged_while_it_is_read_is_read_again(sets, tmp_path, monkeypatch):
    folder, other = sets[0].save(tmp_path / "set"), sets[1].save(tmp_path / "other")
    real, times = files.read_tensors, []

    def late(path, entry):
        times.append(path)
        if len(times) == 1:
            assert files.exchange(other, folder)
        return real(path, entry)

    if not files.exchange(other, folder):
        pytest.skip("this file system cannot exchange two names")
    assert files.exchange(other, folder)
    monkeypatch.setattr(files, "read_tensors", late)
    assert DistilledSet.load(folder).manifest["count"] == 11 and len(times) == 2


def test_a_log_and_a_table_are_read_whole_beside_their_writer(tmp_path):
    rounds, over = 50, threading.Event()

    def write():
        for number in range(rounds):
            files.append_json_line(tmp_path / "log.jsonl", {"step": number, "text": "x" * number})
            files.write_json(tmp_path / "table.json", {"step": number, "text": "x" * number})
        over.set()

    thread = threading.Thread(target=write)
    thread.start()
    while not over.is_set():
        records = list(files.read_json_lines(tmp_path / "log.jsonl"))
        assert [record["step"] for record in records] == list(range(len(records)))
        if (tmp_path / "table.json").exists():
            table = files.read_json(tmp_path / "table.json")
            assert len(table["text"]) == table["step"]
    thread.join()
    assert len(list(files.read_json_lines(tmp_path / "log.jsonl"))) == rounds
