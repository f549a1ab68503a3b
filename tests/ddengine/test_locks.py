"""One writer for a folder, and no lock that outlives its process."""

import errno
import fcntl
import json
import os
import signal
import stat
import time

import pytest

from ddengine import files, locks
from ddengine.errors import UsageError


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def forked(work):
    """The number of a process that does `work(say)`; `say` is heard by the reader that is returned too."""
    reader, pipe = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            work(lambda: os.write(pipe, b"."))
        finally:
            os._exit(0)
    os.close(pipe)
    return child, reader


def holding(folder):
    def work(say):
        with locks.writing(folder):
            say()
            signal.pause()

    child, reader = forked(work)
    assert os.read(reader, 1) == b"."
    os.close(reader)
    return child


def end(child):
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def test_a_second_writer_is_refused_and_told_who_the_first_is(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["/somewhere/ddengine", "distill", "out=my run"])
    child = holding(tmp_path)
    try:
        expected = f"out={tmp_path} is being written by process {child} (ddengine distill 'out=my run')"
        with pytest.raises(UsageError) as caught, locks.writing(tmp_path):
            pytest.fail("two writers")
        assert caught.value.code == 2 and "choose another out=DIR" in caught.value.remedy
        assert caught.value.cause == expected
    finally:
        end(child)


def test_a_lock_ends_with_its_process_and_its_file_with_the_next_writer(tmp_path):
    end(holding(tmp_path))
    assert names(tmp_path) == [locks.LOCK]
    with locks.writing(tmp_path):
        assert names(tmp_path) == [locks.LOCK] and locks.others(tmp_path) == []
    assert names(tmp_path) == []


def test_a_worker_that_outlives_its_parent_holds_no_lock(tmp_path):
    reader, pipe = os.pipe()

    def work(say):
        with locks.writing(tmp_path):
            worker = os.fork()
            if worker == 0:
                signal.pause()
            os.write(pipe, worker.to_bytes(4, "big"))
            signal.pause()

    child, unused = forked(work)
    os.close(unused)
    worker = int.from_bytes(os.read(reader, 4), "big")
    end(child)
    try:
        os.kill(worker, 0)  # it lives
        with locks.writing(tmp_path):
            pass
    finally:
        os.kill(worker, signal.SIGKILL)
    assert names(tmp_path) == []


def test_a_worker_leaves_the_lock_of_its_parent_alone(tmp_path):
    with locks.writing(tmp_path):
        child, reader = forked(lambda say: None)
        os.waitpid(child, 0)
        os.close(reader)
        with pytest.raises(UsageError, match="is being written"), locks.writing(tmp_path):
            pytest.fail("two writers")


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, UsageError])
def test_a_lock_is_gone_after_an_error(tmp_path, error):
    with pytest.raises(error), locks.writing(tmp_path):
        raise error("stop")
    assert names(tmp_path) == []


def test_a_folder_in_which_nothing_was_written_goes_with_the_error(tmp_path):
    with pytest.raises(ValueError, match="stop"), locks.writing(tmp_path / "new"):
        raise ValueError("stop")
    assert not (tmp_path / "new").exists()
    with pytest.raises(ValueError, match="stop"), locks.writing(tmp_path / "begun"):
        (tmp_path / "begun" / "kept").write_text("")
        raise ValueError("stop")
    assert names(tmp_path / "begun") == ["kept"]


def test_among_many_writers_there_is_never_more_than_one(tmp_path):
    """Each takes the lock 25 times; inside it makes a file that must not be there and takes it away."""
    processes, times = 4, 25

    def work(say):
        done = 0
        while done < times:
            try:
                with locks.writing(tmp_path / "out"):
                    mine = os.open(tmp_path / "alone", os.O_CREAT | os.O_EXCL)
                    os.close(mine)
                    (tmp_path / "alone").unlink()
                    done += 1
                    say()
            except UsageError:
                time.sleep(0.001)

    started = [forked(work) for _ in range(processes)]
    for child, reader in started:
        assert os.waitpid(child, 0)[1] == 0
        assert len(os.read(reader, 2 * times)) == times
        os.close(reader)
    assert names(tmp_path) == ["out"] and names(tmp_path / "out") == []


def test_a_lock_file_of_anything_else_is_no_obstacle(tmp_path):
    for content in (b"", b"[]", b"{", b'{"process": "x"}', b"[" * 9999):
        (tmp_path / locks.LOCK).write_bytes(content)
        with locks.writing(tmp_path):
            assert json.loads((tmp_path / locks.LOCK).read_bytes())["process"] == os.getpid()
            (tmp_path / locks.LOCK).write_bytes(content)
            with pytest.raises(UsageError, match="by another process"), locks.writing(tmp_path):
                pytest.fail("two writers")
    (tmp_path / "victim").write_text("mine")
    (tmp_path / locks.LOCK).symlink_to(tmp_path / "victim")
    with pytest.raises(UsageError, match="cannot write out="), locks.writing(tmp_path):
        pytest.fail("wrote through a link")
    assert (tmp_path / "victim").read_text() == "mine"


def test_a_file_system_without_locks_is_said_and_used(tmp_path, monkeypatch):
    def none(handle, how):
        raise OSError(errno.ENOLCK, "No locks available")

    said = []
    monkeypatch.setattr(fcntl, "flock", none)
    with locks.writing(tmp_path, said.append):
        files.write_json(tmp_path / "a.json", {})
        assert names(tmp_path) == ["a.json"]
    assert len(said) == 1 and f"{tmp_path} has no locks" in said[0]


def test_a_full_disk_is_named_and_keeps_no_lock(tmp_path, monkeypatch):
    def full(handle, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with (
            pytest.raises(UsageError, match=r"cannot write out=.* \([0-9]+ bytes\): No space left"),
            locks.writing(tmp_path),
        ):
            pytest.fail("no room for a lock")
    assert names(tmp_path) == []


def test_a_folder_that_cannot_be_written_needs_no_lock(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with locks.writing(tmp_path):
        assert names(tmp_path) == []


def test_no_folder_and_a_file_in_its_place(tmp_path):
    with locks.writing(None):
        pass
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"out=.*file is a file"), locks.writing(tmp_path / "file"):
        pytest.fail("locked a file")


def test_a_log_of_results_is_locked_and_rid_of_what_was_half_written(tmp_path):
    (tmp_path / ".tmp-foreign").write_text("of nobody we know")
    with locks.results_log(tmp_path) as log:
        log({"row": 1})
        with pytest.raises(UsageError, match="is being written"), locks.writing(tmp_path):
            pytest.fail("two writers")
    assert names(tmp_path) == [".tmp-foreign", "results.jsonl"]
    with locks.results_log(tmp_path) as log:
        log({"row": 2})
    assert names(tmp_path) == ["results.jsonl"]
    assert list(files.read_json_lines(tmp_path / "results.jsonl")) == [{"row": 1}, {"row": 2}]
    with locks.results_log(None) as log:
        assert log is None


def test_what_is_half_written_by_the_living_is_not_swept(tmp_path, monkeypatch):
    real = os.fsync

    def sweep_first(handle):
        if not stat.S_ISDIR(os.fstat(handle).st_mode):
            (tmp_path / ".tmp-dead").write_text("left by a process that was killed")
            files.sweep(tmp_path)
            assert len(names(tmp_path)) == 1
        real(handle)

    monkeypatch.setattr(os, "fsync", sweep_first)
    files.write_bytes(tmp_path / "a", b"whole")
    assert names(tmp_path) == ["a"] and (tmp_path / "a").read_bytes() == b"whole"


def test_a_file_that_was_swept_before_it_was_locked_is_made_again(tmp_path, monkeypatch):
    real, times = fcntl.flock, []

    def late(handle, how):
        times.append(how)
        if len(times) == 1:
            next(tmp_path.glob(".tmp-*")).unlink()
        real(handle, how)

    monkeypatch.setattr(fcntl, "flock", late)
    files.write_bytes(tmp_path / "a", b"whole")
    assert len(times) == 2 and names(tmp_path) == ["a"] and (tmp_path / "a").read_bytes() == b"whole"
