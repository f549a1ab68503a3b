"""Which segment an iteration uses is a pure function, and reading it ahead changes nothing."""

from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from toy_experts import BATCH, NET, recording, walk, write

from ddengine.errors import ArtefactError, UsageError
from ddengine.nets import NetSpec
from ddengine.rng import Rng
from expert_buffers import ExpertBuffer, Plan, Prefetch, Window
from expert_buffers.segment import read_segment


@pytest.fixture(scope="module")
def buffer(tmp_path_factory):
    """Experts of 7, 6 and 8 epochs, the middle one with batch norm."""
    walks = [walk(NET, 7, 0), walk(BATCH, 6, 1), walk(NET, 8, 2)]
    return write(tmp_path_factory.mktemp("experts"), walks, (NET, BATCH))


def plan_of(experts=5, window=Window(), length=2, limit=11, order="uniform", seed=3):
    return Plan(Rng(seed), tuple(range(10, 10 + experts)), window, length, limit, order)


def test_the_window_opens_linearly_from_start_to_max():
    window = Window(min=2, start=5, max=11, expand=13)
    assert [window.upper(it, 99) for it in (0, 1, 2, 3, 4, 5, 12, 13, 14, 10**6)] == [
        5, 5, 5, 6, 6, 7, 10, 11, 11, 11,
    ]  # fmt: skip


def test_a_window_without_start_is_open_at_once_and_one_without_max_ends_at_the_limit():
    assert [Window(max=7, expand=10).upper(it, 20) for it in (0, 5, 10)] == [7, 7, 7]
    assert [Window().upper(it, 20) for it in (0, 5)] == [20, 20]
    assert [Window(start=4, expand=8).upper(it, 20) for it in (0, 4, 8, 9)] == [4, 12, 20, 20]
    assert Window(start=4, max=9).upper(0, 20) == 9


@given(
    st.integers(0, 9), st.integers(1, 30), st.integers(0, 30), st.integers(0, 50),
    st.integers(0, 60), st.integers(1, 50),
)  # fmt: skip
def test_the_window_never_reaches_past_the_limit_nor_shrinks(low, start, more, expand, iteration, limit):
    window = Window(low, low + start, low + start + more, expand)
    upper = window.upper(iteration, limit)
    assert upper <= limit and upper <= low + start + more
    assert upper <= window.upper(iteration + 1, limit)
    assert window.upper(max(expand, iteration), limit) == min(limit, low + start + more)
    if iteration == 0 and expand:
        assert upper == min(limit, low + start)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"min": -1}, "window.min=-1"),
        ({"expand": -5}, "window.expand=-5"),
        ({"min": 4, "max": 4}, "window.max=4 with window.min=4\nGive a window.max above"),
        ({"min": 4, "start": 3}, "window.start=3 with window.min=4"),
        ({"start": 8, "max": 7}, "window.max=7 with window.start=8\nGive a window.max at least"),
        ({"min": 4, "start": 9, "max": 3}, "window.max=3 with window.start=9"),
    ],
)
def test_a_window_whose_ends_are_out_of_order_is_refused(options, said):
    with pytest.raises(UsageError, match=said):
        Window(**options)


def test_every_expert_is_used_once_in_each_pass_in_orders_that_differ():
    plan = plan_of(experts=7)
    passes = [tuple(plan.draw(7 * turn + i)[0] for i in range(7)) for turn in range(6)]
    assert all(sorted(order) == list(range(10, 17)) for order in passes)
    assert len(set(passes)) > 1


def test_start_epochs_are_uniform_in_the_window():
    plan = plan_of(window=Window(min=2, max=9))
    drawn = Counter(plan.draw(it)[1] for it in range(3500))
    assert sorted(drawn) == [2, 3, 4, 5, 6, 7, 8]
    assert sum((n - 500) ** 2 / 500 for n in drawn.values()) < 22.5  # chi-squared, 6 degrees, p = 0.001


def test_start_epochs_follow_the_window_as_it_opens():
    plan = plan_of(window=Window(min=1, start=3, max=11, expand=400))
    drawn = [plan.draw(it)[1] for it in range(1000)]
    assert all(1 <= t < plan.window.upper(it, 11) for it, t in enumerate(drawn))
    assert max(drawn[:40]) == 2 and max(drawn[400:]) == 10


def test_a_sequential_plan_sweeps_the_window():
    plan = plan_of(window=Window(min=3, max=7), order="sequential")
    assert [plan.draw(it)[1] for it in range(9)] == [3, 4, 5, 6, 3, 4, 5, 6, 3]


def test_a_draw_depends_on_seed_and_iteration_alone():
    forwards = [plan_of().draw(it) for it in range(40)]
    plan = plan_of()
    assert [plan.draw(it) for it in reversed(range(40))] == forwards[::-1]
    assert [plan_of(seed=4).draw(it) for it in range(40)] != forwards
    before = torch.get_rng_state()
    plan.draw(41)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_plan_reaches_as_far_as_the_shortest_of_its_experts(buffer):
    assert Plan.of(buffer, Rng(0), Window(), 2).limit == 5
    assert Plan.of(buffer, Rng(0), Window(), 2).experts == (0, 1, 2)
    only = Plan.of(buffer, Rng(0), Window(), 2, "sequential", NET)
    assert only.limit == 6 and only.experts == (0, 2) and only.order == "sequential"
    for it in range(60):
        expert, t = only.draw(it)
        assert expert in (0, 2) and t + 2 <= buffer.epochs(expert)
    assert Plan.of(buffer, Rng(0), Window(max=5), 2).window.max == 5


@pytest.mark.parametrize(
    ("window", "length", "said"),
    [
        (Window(max=6), 2, "holds 6 epochs; window.max=6 with expert_epochs=2 needs 7\n.*epochs=7"),
        (Window(start=9, expand=5), 3, "window.start=9 with expert_epochs=3 needs 11\n.*epochs=11"),
        (Window(min=5), 2, "window.min=5 with expert_epochs=2 needs 7"),
        (Window(), 7, "window.min=0 with expert_epochs=7 needs 7"),
    ],
)
def test_a_window_beyond_the_recorded_epochs_is_refused_with_what_it_needs(buffer, window, length, said):
    with pytest.raises(UsageError, match=said):
        Plan.of(buffer, Rng(0), window, length)


def test_a_plan_needs_experts_of_its_network_a_length_and_a_known_order(buffer):
    with pytest.raises(UsageError, match="holds no expert with this network"):
        Plan.of(buffer, Rng(0), Window(), 2, network=NetSpec("mlp"))
    with pytest.raises(UsageError, match="expert_epochs=0"):
        Plan.of(buffer, Rng(0), Window(), 0)
    with pytest.raises(UsageError, match="unknown order 'random'"):
        Plan.of(buffer, Rng(0), Window(), 2, "random")


def test_a_segment_is_a_start_and_the_epochs_after_it(buffer):
    rows = recording(walk(NET, 8, 2)).rows(range(9))
    segment = read_segment(buffer, 2, 3, 4, torch.device("cpu"))
    assert (segment.expert, segment.epoch) == (2, 3)
    assert torch.equal(segment.start, rows[3]) and torch.equal(segment.targets, rows[4:8])


def equal(one, other):
    return (one.expert, one.epoch) == (other.expert, other.epoch) and (
        torch.equal(one.start, other.start) and torch.equal(one.targets, other.targets)
    )


def test_prefetched_segments_are_those_of_the_plan_in_whatever_order(buffer):
    plan = Plan.of(buffer, Rng(5), Window(), 2, network=NET)
    prefetch = Prefetch(buffer, plan, torch.device("cpu"), ahead=3)
    wild = torch.randint(0, 50, (40,), generator=torch.Generator().manual_seed(0)).tolist()
    try:
        for iteration in [*range(20), 19, 19, 0, *wild]:
            direct = read_segment(buffer, *plan.draw(iteration), 2, torch.device("cpu"))
            assert equal(prefetch.get(iteration), direct)
    finally:
        prefetch.close()


def test_segments_are_read_before_they_are_asked_for(buffer):
    plan = Plan.of(buffer, Rng(5), Window(), 2, network=NET)
    prefetch = Prefetch(buffer, plan, torch.device("cpu"), ahead=3)
    try:
        prefetch.get(7)
        with prefetch._changed:
            assert prefetch._changed.wait_for(lambda: sorted(prefetch._ready) == [8, 9, 10], timeout=20)
    finally:
        prefetch.close()


def test_an_error_in_the_thread_is_raised_where_the_segment_is_asked_for(tmp_path):
    write(tmp_path, [walk(NET, 4, 0), walk(NET, 4, 1)])
    path = tmp_path / "expert_00001.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    damaged = ExpertBuffer(tmp_path)
    plan = Plan.of(damaged, Rng(0), Window(), 2)
    prefetch = Prefetch(damaged, plan, torch.device("cpu"))
    try:
        for iteration in range(6):
            if plan.draw(iteration)[0] == 1:
                with pytest.raises(ArtefactError, match="expert_00001.safetensors is damaged"):
                    prefetch.get(iteration)
            else:
                assert prefetch.get(iteration).expert == 0
    finally:
        prefetch.close()


def test_a_closed_prefetch_has_no_thread_left_and_says_that_it_is_closed(buffer):
    prefetch = Prefetch(buffer, Plan.of(buffer, Rng(5), Window(), 2, network=NET), torch.device("cpu"))
    prefetch.get(0)
    prefetch.close()
    prefetch.close()
    assert not prefetch._thread.is_alive()
    with pytest.raises(RuntimeError, match="closed"):
        prefetch.get(1)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_segments_reach_a_gpu_whole(buffer):
    plan = Plan.of(buffer, Rng(5), Window(), 2, network=NET)
    prefetch = Prefetch(buffer, plan, torch.device("cuda"))
    try:
        for iteration in range(20):
            direct = read_segment(buffer, *plan.draw(iteration), 2, torch.device("cpu"))
            found = prefetch.get(iteration)
            assert found.start.is_cuda and torch.equal(found.start.cpu(), direct.start)
            assert torch.equal(found.targets.cpu(), direct.targets)
    finally:
        prefetch.close()
