import os
import signal
import sys
import threading
import time
from multiprocessing import active_children

import pytest
import torch
from pool_jobs import gradient, naps, scaled, threads, waits

from ddengine import parallel
from ddengine.errors import DDError, UsageError
from ddengine.parallel import Pool, job_pool, one_thread, signals


@pytest.fixture(params=["fork", "spawn"])
def started(request, monkeypatch):
    """Each way in which processes start."""
    if request.param == "fork" and sys.platform != "linux":
        pytest.skip("processes are copied on Linux only")
    monkeypatch.setattr(parallel, "start_method", lambda: request.param)


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_one_thread_inside_and_the_former_count_afterwards(two_threads):
    with pytest.raises(KeyError), one_thread():
        assert torch.get_num_threads() == 1
        raise KeyError
    assert torch.get_num_threads() == 2


def test_jobs_run_in_order_and_on_one_thread_in_this_process(two_threads):
    with job_pool(scaled, 3.0) as results:
        assert list(results([2, 1])) == [6.0, 3.0]
    with job_pool(threads, None) as results:
        assert list(results([0])) == [(1, os.getpid())]
    assert torch.get_num_threads() == 2


def test_a_pool_maps_twice_passes_on_errors_and_does_not_hang_on_a_dead_worker(started):
    shared = torch.tensor([1.0, 2.0]).share_memory_()
    with pytest.raises(DDError, match="worker processes") as dead, job_pool(scaled, shared, 2) as results:
        assert [r.tolist() for r in results([3])] == [[3, 6]]
        assert [r.tolist() for r in results([5])] == [[5, 10]]
        with pytest.raises(UsageError) as refused:
            list(results([0]))
        list(results([-1]))
    assert (refused.value.cause, refused.value.remedy) == ("job 0 is wrong", "Give another")
    assert "workers=1" in dead.value.remedy
    assert not active_children()


def test_results_come_as_they_are_ready_where_order_does_not_matter(started):
    with job_pool(waits, None, 2, ordered=False) as results:
        assert list(results([1.5, 0.0, 0.0])) == [0.0, 0.0, 1.5]
    with job_pool(waits, None, ordered=False) as results:
        assert list(results([0.1, 0.0])) == [0.1, 0.0]


def test_the_first_signal_is_noted_and_the_second_interrupts():
    before, told = signal.getsignal(signal.SIGTERM), []
    with pytest.raises(KeyboardInterrupt), signals(lambda: told.append(1)) as caught:
        signal.raise_signal(signal.SIGTERM)
        assert (caught, told) == ([signal.SIGTERM], [1])
        signal.raise_signal(signal.SIGINT)
    assert told == [1]
    assert signal.getsignal(signal.SIGTERM) is before


def test_ctrl_c_ends_the_workers_at_once(started):
    with pytest.raises(KeyboardInterrupt), job_pool(naps, None, workers=2) as results:
        assert list(results([0])) == [True]
        results([600])
        began = time.monotonic()
        raise KeyboardInterrupt
    assert time.monotonic() - began < 10 and not active_children()


def test_copies_compute_what_this_process_did_on_many_threads(two_threads, started):
    expected = gradient(3.0, 2)
    with job_pool(gradient, 3.0, 2) as results:
        for found in results([2, 2]):
            torch.testing.assert_close(found, expected)


def test_processes_are_copies_only_where_nothing_can_be_locked_or_belong_to_a_device(monkeypatch):
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.setattr(threading, "active_count", lambda: 1)
    assert parallel.start_method() == "fork"
    for owner, name, value in (
        (sys, "platform", "darwin"),
        (torch.accelerator, "is_available", lambda: True),
        (threading, "active_count", lambda: 2),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, value)
            assert parallel.start_method() == "spawn"


def test_less_than_one_worker_is_refused():
    with pytest.raises(UsageError, match="workers=0"), job_pool(scaled, 1, workers=0):
        pass


def test_a_pool_that_stays_open_gives_round_after_round_and_tells_of_a_death_in_one_line(started):
    pool = Pool(scaled, 3, workers=2)
    try:
        assert [list(pool.map([1, 2, 5])) for _ in range(2)] == [[3, 6, 15]] * 2
        with pytest.raises(DDError, match="one of 2 worker processes died .*\nRepeat with workers=1"):
            list(pool.map([1, -1, 2]))
    finally:
        pool.close()
