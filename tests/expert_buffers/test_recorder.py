import os
import re
import shutil
import signal
import threading
from collections import namedtuple
from dataclasses import replace
from multiprocessing import active_children

import pytest
import torch
import torch.nn.functional as F
from global_rng import global_rng_untouched

from ddengine import data
from ddengine.errors import DDError, Interrupted, UsageError
from ddengine.nets import NetSpec, build
from ddengine.ops.whiten import fit_zca
from ddengine.recipes import task
from ddengine.rng import Rng
from ddengine.types import Images
from expert_buffers import ExpertBuffer, asked, record, recorder, training
from expert_buffers.estimate import Estimate, estimate
from expert_buffers.recipes import RECIPES
from expert_buffers.training import initial_state, train_epoch

NET = NetSpec("convnet", width=4, depth=2)
BATCH = NetSpec("convnet", width=4, depth=2, norm="batch")
MLP = NetSpec("mlp", width=5)
AST = replace(RECIPES["ast"], batch_size=53, penalty=0.0, lr_drop_epoch=2)
SHUFFLE = NetSpec("shufflenet_v2", width=2)
SQUEEZE = replace(RECIPES["squeeze"], batch_size=53, epochs=3)


@pytest.fixture(scope="module")
def images():
    """101 digits of all classes."""
    return data.load("digits").fit.take(torch.arange(101) * 12)


@pytest.fixture(scope="module")
def straight(images, tmp_path_factory):
    """Three experts of three epochs, recorded in one go."""
    return record(images, NET, tmp_path_factory.mktemp("straight") / "b", count=3, epochs=3, recipe=AST)


@pytest.fixture(scope="module")
def squeezed(images, tmp_path_factory):
    """Three teachers with batch norm of two architectures, as long as their recipe."""
    out = tmp_path_factory.mktemp("squeezed") / "b"
    return record(images, [BATCH, SHUFFLE], out, count=3, recipe=SQUEEZE, encoding="fp32")


def same(one, other):
    """Equal bits, statistics and resume states included, and equal manifests but for the files' names."""
    plain = [
        {**b.manifest, "seal": "", "experts": [{**e, "file": ""} for e in b.manifest["experts"].values()]}
        for b in (one, other)
    ]
    return one.digest == other.digest and plain[0] == plain[1]


def names(buffer):
    return sorted(path.name for path in buffer.root.iterdir())


@pytest.fixture
def stop_before(monkeypatch):
    """Sends this process a signal before the given epochs of training, counted over all experts."""

    def at(epochs, number=signal.SIGINT):
        calls = []

        def trained(*given):
            calls.append(given)
            if len(calls) in epochs:
                signal.raise_signal(number)
            return train_epoch(*given)

        monkeypatch.setattr(training, "train_epoch", trained)
        return calls

    return at


def test_rows_are_the_states_of_an_expert_trained_epoch_by_epoch(images, tmp_path):
    buffer = record(
        images, [NET, BATCH], tmp_path / "b", count=3, epochs=3, recipe=AST, seed=5, encoding="fp32"
    )
    recipe = AST.resolved("digits")
    for i, network in enumerate((NET, BATCH, NET)):
        rng, found = Rng(5).fold("expert", i), buffer[i]
        net = build(network, (1, 8, 8), 10, rng.torch("weights"))
        state = initial_state(net)
        assert buffer.network(i).norm == ("batch" if network is BATCH else "instance")
        for epoch in range(4):
            assert torch.equal(found.params[epoch], state.params)
            stats = found.stat_spec.unflatten(found.stats[epoch])
            assert all(torch.equal(stats[name], b.float()) for name, b in state.buffers.items())
            state = train_epoch(net, state, images, recipe, epoch, rng)
    assert buffer[1].stats.shape == (4, 18)
    assert not torch.equal(buffer[1].stats[0], buffer[1].stats[3])


def test_losses_are_finite_and_fall_and_consecutive_rows_differ(straight):
    assert straight.verify()
    for i in range(3):
        expert = straight[i]
        assert expert.loss[3] < expert.loss[0]
        assert all(not torch.equal(a, b) for a, b in zip(expert.params[:-1], expert.params[1:], strict=True))
        assert expert.epoch.tolist() == [0, 1, 2, 3]
    assert not torch.equal(straight[0].params[0], straight[1].params[0])


def test_two_processes_record_the_bits_of_one(images, straight, tmp_path):
    buffer = record(images, NET, tmp_path / "b", count=3, epochs=3, recipe=AST, workers=2)
    assert same(buffer, straight)
    assert names(buffer) == names(straight)
    assert not active_children()


def test_an_expert_does_not_depend_on_how_many_there_are(images, straight, tmp_path):
    buffer = record(images, NET, tmp_path / "b", count=2, epochs=2, recipe=AST)
    assert all(torch.equal(buffer[i].params, straight[i].params[:3]) for i in range(2))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_recording_keeps_whole_epochs_and_the_same_call_ends_with_the_same_bits(
    images, straight, tmp_path, stop_before, number
):
    calls = stop_before({6}, number)  # the last epoch of the second expert
    handler = signal.getsignal(number)
    with pytest.raises(Interrupted, match=rf"{number.name} after 5 of 9 epochs.*\nRepeat"):
        record(images, NET, tmp_path / "b", count=3, epochs=3, recipe=AST)
    assert signal.getsignal(number) is handler
    stopped = ExpertBuffer(tmp_path / "b")
    assert (len(stopped), len(calls)) == (1, 6)
    assert stopped.verify()
    assert names(stopped) == ["expert_00000.safetensors", "manifest.json", "partial_00001.safetensors"]
    buffer = record(images, NET, tmp_path / "b", count=3, epochs=3, recipe=AST)
    assert len(calls) == 6 + 4
    assert same(buffer, straight)
    assert names(buffer) == names(straight)


def test_a_partial_file_that_is_damaged_costs_its_epochs_and_no_bit(images, straight, tmp_path, stop_before):
    calls = stop_before({3})
    with pytest.raises(Interrupted):
        record(images, NET, tmp_path / "b", count=3, epochs=3, recipe=AST)
    path = tmp_path / "b" / "partial_00000.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    buffer = record(images, NET, tmp_path / "b", count=3, epochs=3, recipe=AST)
    assert len(calls) == 3 + 9
    assert same(buffer, straight)


def test_a_signal_reaches_worker_processes(images, tmp_path, monkeypatch):
    sent, epochs, share = [], [], recorder._share
    monkeypatch.setattr(recorder, "_share", lambda session: epochs.append(session.done) or share(session))

    def progress(done, total, values):
        if not sent and bool((epochs[0] > 0).all()):  # both workers have an epoch to keep
            sent.append(done)
            os.kill(os.getpid(), signal.SIGINT)

    recipe = replace(AST, augment="none")
    with pytest.raises(Interrupted, match="SIGINT"):
        record(images, NET, tmp_path / "b", count=2, epochs=3000, recipe=recipe, workers=2, progress=progress)
    assert not active_children()
    assert len(ExpertBuffer(tmp_path / "b")) == 0
    assert [path.name for path in sorted((tmp_path / "b").glob("partial*"))] == [
        "partial_00000.safetensors",
        "partial_00001.safetensors",
    ]


def test_epochs_are_kept_every_so_many_minutes(images, tmp_path, monkeypatch):
    kept = []
    monkeypatch.setattr(training, "save_partial", lambda path, *given: kept.append(path.name))
    record(images, NET, tmp_path / "b", count=2, epochs=3, save_minutes=1e-9)
    assert kept == [f"partial_{i:05d}.safetensors" for i in (0, 0, 1, 1)]
    record(images, NET, tmp_path / "c", count=2, epochs=3)
    assert len(kept) == 4


@pytest.mark.parametrize(("count", "epochs"), [(1, 3), (3, 1), (2, 2)])
def test_an_extended_buffer_has_the_bits_of_a_straight_one(images, straight, tmp_path, count, epochs):
    first = record(images, NET, tmp_path / "b", count=count, epochs=epochs, recipe=AST)
    assert [first.epochs(i) for i in range(len(first))] == [epochs] * count
    assert same(record(images, NET, tmp_path / "b", count=3, epochs=3, recipe=AST), straight)


@pytest.mark.parametrize(("count", "epochs"), [(3, 3), (3, 1), (1, 3), (2, 2)])
def test_what_is_there_is_kept_and_not_trained_again(images, straight, tmp_path, count, epochs, stop_before):
    shutil.copytree(straight.root, tmp_path / "b")
    calls, said = stop_before(()), []
    before = {path.name: path.read_bytes() for path in (tmp_path / "b").iterdir()}
    buffer = record(images, NET, tmp_path / "b", count=count, epochs=epochs, recipe=AST, notice=said.append)
    assert same(buffer, straight)
    assert {path.name: path.read_bytes() for path in (tmp_path / "b").iterdir()} == before
    assert (calls, said) == ([], [])


def test_the_horizon_is_what_a_matcher_reads_and_some_experts_go_to_the_end(images, tmp_path):
    recipe = replace(AST, epochs=4)
    buffer = record(
        images,
        NET,
        tmp_path / "b",
        count=3,
        max_start_epoch=1,
        expert_epochs=2,
        full_experts=1,
        recipe=recipe,
    )
    assert [buffer.epochs(i) for i in range(3)] == [4, 3, 3]
    assert buffer.manifest["plan"] == {
        "count": 3,
        "epochs": 3,
        "max_start_epoch": 1,
        "expert_epochs": 2,
        "full_experts": 1,
        "full_epochs": 4,
    }
    assert buffer.manifest["recipe"] == {**recipe.resolved("digits").to_dict(), "precision": "fp32"}


def test_whitened_images_are_whitened_once_before_the_work(images, tmp_path, monkeypatch):
    monkeypatch.setattr(asked, "WHITENED_AT_ONCE", 37)
    zca = replace(images, spec=replace(images.spec, zca=fit_zca(images.x.float() / 255)))
    found = record(zca, NET, tmp_path / "zca", count=1, epochs=2)
    assert found.manifest["dataset"]["preprocessing"] == "zca"
    plain = Images(zca.model_input(), images.y, images.spec)
    other = record(plain, NET, tmp_path / "plain", count=1, epochs=2)
    torch.testing.assert_close(found[0].params, other[0].params, rtol=1e-4, atol=1e-6)
    monkeypatch.setattr(type(images.spec), "normalise", lambda *given: pytest.fail("whitened in a batch"))
    monkeypatch.setattr(asked, "whitened", lambda source: plain)
    record(zca, NET, tmp_path / "again", count=1, epochs=1)


def test_recording_draws_nothing_global_and_keeps_the_thread_count(images, tmp_path):
    before = torch.get_num_threads()
    with global_rng_untouched():
        record(images, NET, tmp_path / "b", count=1, epochs=1)
    assert torch.get_num_threads() == before


def test_work_is_announced_in_one_line_and_progress_ends_at_the_total(images, tmp_path, monkeypatch):
    monkeypatch.setattr(recorder, "SECONDS_BETWEEN_REPORTS", 0.001)
    said, told, threads = [], [], threading.active_count()
    record(
        images, NET, tmp_path / "b", count=2, epochs=2, recipe=AST, notice=said.append,
        progress=lambda done, total, values: told.append((done, total)),
    )  # fmt: skip
    form = r"2 experts x 2 epochs of 2 steps on 1 worker: about \d+ s, 0\.\d GiB of memory, [\d.]+ kB on disk"
    assert len(said) == 1 and re.fullmatch(form, said[0])
    assert told[-1] == (4, 4)
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    assert threading.active_count() <= threads
    record(images, NET, tmp_path / "b", count=3, epochs=3, recipe=AST, notice=said.append)
    assert said[1].startswith("3 experts with 5 epochs in all of 2 steps")


@pytest.mark.parametrize("encoding", ["delta16", "fp32"])
def test_the_estimate_of_the_disk_is_what_the_files_take(images, tmp_path, monkeypatch, encoding):
    made = []
    monkeypatch.setattr(recorder, "estimate", lambda *given: made.append(estimate(*given)) or made[-1])
    options = {"recipe": AST, "encoding": encoding}
    record(images, [NET, MLP], tmp_path / "b", count=3, epochs=2, **options)
    buffer = record(images, [NET, MLP], tmp_path / "b", count=4, epochs=5, **options)
    written = sum(path.stat().st_size for path in buffer.root.glob("expert*"))
    headers = 8 * 1000
    assert written - headers < made[0].disk_bytes + made[1].disk_bytes < written
    assert made[1].free_bytes > made[1].disk_bytes
    assert made[1].seconds > 0
    assert made[1].memory_bytes > 2**28


def test_an_estimate_reads_well():
    assert recorder.in_words(Estimate(720.0, 5 * 2**27, 12_000_000, 0)) == (
        "12 min, 0.6 GiB of memory, 12 MB on disk"
    )
    assert recorder.in_words(Estimate(41.4, 2**31, 2_340, 0)) == "41 s, 2.0 GiB of memory, 2.34 kB on disk"
    assert recorder.in_words(Estimate(36e3, 2**31, 3_330_000_000, 0)).startswith("10.0 h, ")
    assert recorder.in_words(Estimate(36e3, 2**31, 3_330_000_000, 0)).endswith(", 3.33 GB on disk")


def test_a_disk_without_room_is_refused_before_the_work(images, tmp_path, monkeypatch, stop_before):
    calls = stop_before(())
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 1234, 1234))
    with pytest.raises(UsageError, match=r"1\.23 kB free, \d+(\.\d+)? kB are needed\n.*count"):
        record(images, NET, tmp_path / "b", count=2, epochs=2)
    assert calls == []
    assert not (tmp_path / "b").exists()


def test_a_diverged_expert_is_named(images, tmp_path):
    with pytest.raises(DDError, match=r"^expert 0: .*diverged.*\n.*recipe\.lr"):
        record(images, NET, tmp_path / "b", count=2, epochs=3, recipe=replace(AST, lr=1e30))
    assert len(ExpertBuffer(tmp_path / "b")) == 0


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"count": 0}, "count=0"),
        ({"count": -1}, "count=-1"),
        ({"epochs": 0}, "epochs=0"),
        ({"expert_epochs": 0}, "expert_epochs=0"),
        ({"max_start_epoch": -1}, "max_start_epoch=-1"),
        ({"full_experts": -1}, "full_experts=-1"),
        ({"full_experts": 4}, "full_experts=4"),
        ({"workers": 0}, "workers=0"),
        ({"save_minutes": 0}, "save_minutes=0"),
        ({"recipe": "sgd"}, "'sgd'"),
        ({"encoding": "delta61"}, "'delta61'.*\n.*'delta16'"),
        ({"precision": "fp8"}, "'fp8'"),
        ({"device": "tpu9"}, "tpu9"),
        ({"networks": []}, "empty"),
        ({"networks": [NET, NET]}, "repeats"),
        ({"networks": [NET, MLP], "count": 1}, "count=1"),
        ({"networks": NetSpec("convnt")}, "convnt"),
        ({"networks": NetSpec("mlp", norm="batch")}, "norm"),
        ({"seed": 1}, "seed is 0 there and 1 here"),
        ({"recipe": replace(AST, lr=0.5)}, "recipe.lr is 0.003 there and 0.5 here"),
        ({"precision": "bf16"}, "precision is fp32 there and bf16 here"),
        ({"encoding": "fp32"}, "encoding is delta16 there and fp32 here"),
        ({"networks": MLP}, "networks"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_input_is_refused_and_changes_nothing(images, straight, change, named):
    before = {path.name: path.read_bytes() for path in straight.root.iterdir()}
    given = {"networks": NET, "count": 3, "epochs": 3, "recipe": AST} | change
    with pytest.raises(UsageError, match=named):
        record(images, out=straight.root, **given)
    assert {path.name: path.read_bytes() for path in straight.root.iterdir()} == before


def test_a_source_without_fingerprint_is_known_by_its_content(images, tmp_path):
    bare = replace(images, spec=replace(images.spec, fingerprint=""))
    buffer = record(bare, NET, tmp_path / "b", count=1, epochs=1)
    assert len(buffer.manifest["dataset"]["fingerprint"]) == 64
    with pytest.raises(UsageError, match=r"dataset\.fingerprint"):
        record(bare.take(torch.arange(100)), NET, tmp_path / "b", count=1, epochs=1)


def test_a_source_without_images_is_refused(images, tmp_path):
    with pytest.raises(UsageError, match="no image"):
        record(images.take(torch.arange(0)), NET, tmp_path / "b", count=1)


def test_images_in_any_order_give_the_buffer_that_their_task_takes(images, tmp_path):
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(1))
    mixed = replace(images.take(order), spec=replace(images.spec, fingerprint=""))
    buffer = record(mixed, NET, tmp_path / "b", count=1, epochs=1)
    made = task(mixed, ipc=1, experts=buffer)
    buffer.check(made.source.spec, NET)


def test_an_expert_that_diverges_leaves_the_epochs_of_the_others(images, tmp_path, monkeypatch):
    """The second expert fails at once; what the buffer has of the first stays and it says which failed."""
    epoch = training.train_epoch

    def failing(net, state, source, recipe, number, rng, *rest):
        after = epoch(net, state, source, recipe, number, rng, *rest)
        bad = rng.path == ("expert", 1)
        return replace(after, params=after.params * float("nan")) if bad else after

    monkeypatch.setattr(training, "train_epoch", failing)
    with pytest.raises(DDError, match="expert 1: .*diverged.*\nLower recipe.lr"):
        record(images, NET, tmp_path / "b", count=3, epochs=2)
    assert len(ExpertBuffer(tmp_path / "b")) == 1 and ExpertBuffer(tmp_path / "b").verify()


def test_a_recipe_whose_rate_falls_to_zero_is_trained_for_its_length(images, squeezed, tmp_path):
    assert [squeezed.epochs(i) for i in range(3)] == [3, 3, 3]
    recipe = squeezed.manifest["recipe"]
    assert recipe == {**SQUEEZE.resolved("digits").to_dict(), "precision": "fp32"}
    assert (recipe["schedule"], recipe["epochs"], recipe["augment"]) == ("cosine", 3, "crop")
    assert (squeezed.manifest["plan"]["epochs"], squeezed.manifest["plan"]["full_epochs"]) == (3, 3)
    given = record(images, BATCH, tmp_path / "b", count=1, epochs=2, full_experts=1, recipe=SQUEEZE)
    assert (given.epochs(0), given.manifest["recipe"]["epochs"]) == (2, 2)
    with pytest.raises(UsageError, match="epochs=0"):
        record(images, BATCH, tmp_path / "c", count=1, epochs=0, recipe=SQUEEZE)


def test_squeeze_is_torch_sgd_with_cosine_annealing(images, tmp_path):
    recipe = replace(SQUEEZE, augment="none")
    buffer = record(images, BATCH, tmp_path / "b", count=1, recipe=recipe, seed=5, encoding="fp32")
    rng = Rng(5).fold("expert", 0)
    net = build(BATCH, (1, 8, 8), 10, rng.torch("weights"))
    optimiser = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9, weight_decay=5e-4)
    annealing = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, T_max=3)
    for epoch in range(3):
        order = torch.randperm(101, generator=rng.fold("epoch", epoch).torch("shuffle"))
        for index in order.split(53):
            optimiser.zero_grad()
            F.cross_entropy(net(images.model_input(index)), images.y[index]).backward()
            optimiser.step()
        annealing.step()
        stored = buffer.build(0, epoch + 1).state_dict()
        for name, value in net.state_dict().items():
            torch.testing.assert_close(stored[name], value, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("epochs", [2, 4])
def test_the_length_of_a_falling_rate_is_part_of_the_buffer(images, squeezed, epochs):
    before = {path.name: path.read_bytes() for path in squeezed.root.iterdir()}
    options = {"count": 3, "recipe": SQUEEZE, "encoding": "fp32"}
    with pytest.raises(UsageError, match=f"recipe.epochs is 3 there and {epochs} here") as caught:
        record(images, [BATCH, SHUFFLE], squeezed.root, epochs=epochs, **options)
    assert "\n" not in caught.value.cause
    assert same(record(images, [BATCH, SHUFFLE], squeezed.root, epochs=3, **options), squeezed)
    assert {path.name: path.read_bytes() for path in squeezed.root.iterdir()} == before


def test_more_teachers_extend_a_buffer_of_fixed_length(images, squeezed, tmp_path):
    options = {"recipe": SQUEEZE, "encoding": "fp32"}
    record(images, [BATCH, SHUFFLE], tmp_path / "b", count=2, **options)
    assert same(record(images, [BATCH, SHUFFLE], tmp_path / "b", count=3, **options), squeezed)


@pytest.mark.parametrize("epoch", [3, 5])  # the last of the first teacher, a middle one of the second
def test_interrupted_teachers_go_on_with_the_same_bits(images, squeezed, tmp_path, stop_before, epoch):
    calls = stop_before({epoch})
    given = {"count": 3, "recipe": SQUEEZE, "encoding": "fp32"}
    with pytest.raises(Interrupted, match=f"after {epoch - 1} of 9 epochs"):
        record(images, [BATCH, SHUFFLE], tmp_path / "b", **given)
    assert same(record(images, [BATCH, SHUFFLE], tmp_path / "b", **given), squeezed)
    assert len(calls) == 9 + 1
    assert names(squeezed) == sorted(path.name for path in (tmp_path / "b").iterdir())


def test_running_statistics_of_every_architecture_come_back(images, squeezed):
    recipe = SQUEEZE.resolved("digits")
    for i, spec in enumerate((BATCH, SHUFFLE, BATCH)):
        rng = Rng(0).fold("expert", i)
        net = build(spec, (1, 8, 8), 10, rng.torch("weights"))
        state = initial_state(net)
        for epoch in range(3):
            state = train_epoch(net, state, images, recipe, epoch, rng)
        found = squeezed.build(i, 3)
        assert squeezed.network(i).name == spec.name and squeezed.network(i).norm == "batch"
        buffers = dict(found.named_buffers())
        assert buffers.keys() == state.buffers.keys() and buffers
        assert all(torch.equal(buffers[name], value) for name, value in state.buffers.items())
        assert all(value.abs().max() > 0 for name, value in buffers.items())
