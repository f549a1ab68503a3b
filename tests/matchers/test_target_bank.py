"""The bank of real targets: which step has which pair, one value from wherever it comes, names, damage."""

import json
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ddengine.errors import UsageError
from ddengine.nets import NetSpec
from ddengine.rng import Rng
from ddengine.types import Budget, DataSpec, Images, Task
from matchers import descent, target_bank
from matchers.attention import AttentionMatching, AttentionOptions
from matchers.distribution import DistributionMatching, DistributionOptions
from matchers.target_bank import BLOCK, TargetBank, data_facts, pair

NET = NetSpec("convnet", width=5, depth=2)
QUICK = AttentionOptions(steps=10, real_per_class=7, lr=3.0, bank="on", bank_reuse=3)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def few(monkeypatch, tmp_path):
    """Blocks of two pairs, so that a pair comes again after two steps, and a folder of the test's own."""
    monkeypatch.setattr(target_bank, "BLOCK", 2)
    monkeypatch.setenv("DDENGINE_CACHE", str(tmp_path / "cache"))


def task(ipc=2, seed=0, precision="fp32"):
    """Random uint8 images of three classes, class-sorted, of unequal sizes."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(0, 256, (41, 1, 8, 9), dtype=torch.uint8, generator=generator)
    y = torch.arange(3).repeat_interleave(torch.tensor([11, 13, 17]))
    spec = DataSpec("noise", (1, 8, 9), ("a", "b", "c"), (0.5,), (0.25,))
    return Task(Images(x, y, spec), Budget(ipc), precision=precision)


def run(problem, steps=7, options=QUICK, state=None, seed=3):
    """The last state and the losses of a run in a workspace of its own."""
    matcher, rng, losses = AttentionMatching(options, NET), Rng(seed), []
    work = matcher.prepare(problem, rng)
    state = matcher.init(problem, rng) if state is None else state
    while state.step < steps:
        state, metrics = matcher.step(state, work, rng)
        losses.append(float(metrics["loss"]))
    work.close()
    return state, losses


def same(a, b):
    return torch.equal(a.synth.images, b.synth.images) and torch.equal(
        a.velocity["images"], b.velocity["images"]
    )


@pytest.fixture
def computed(monkeypatch):
    """How often real targets were computed."""
    made, count = descent.real_targets, Counter()

    def counted(*rest):
        count["real"] += 1
        return made(*rest)

    monkeypatch.setattr(descent, "real_targets", counted)
    return count


def entries(tmp_path, suffix):
    return sorted((tmp_path / "cache" / "bank").glob(f"*.{suffix}"))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 9), st.integers(1, 7), st.integers(0, 5))
def test_every_pair_of_a_block_is_used_equally_often_and_no_two_steps_in_a_row_share_one(block, reuse, past):
    before, target_bank.BLOCK = target_bank.BLOCK, block
    try:
        first = past * block * reuse
        found = [pair(count, reuse) for count in range(first, first + block * reuse)]
    finally:
        target_bank.BLOCK = before
    numbers = [number for number, _ in found]
    assert Counter(numbers) == {past * block + i: reuse for i in range(block)}
    assert block == 1 or all(a != b for a, b in pairwise(numbers))
    assert all(began == first + numbers.index(number) for number, began in found)


@pytest.mark.parametrize(("networks", "reuse"), [(1, 5), (2, 3), (3, 3), (23, 4), (120, 5)])
def test_the_share_that_is_computed_is_that_of_pairs_seen_first(networks, reuse):
    first = {pair(count, reuse)[0] for count in range(networks)}
    assert target_bank.computed_share(networks, reuse) == len(first) / networks


def test_blocks_are_long_enough_for_steps_in_a_row_to_differ():
    assert BLOCK >= 20


def test_a_run_computes_each_pair_once(tmp_path, computed):
    run(task(), steps=7)
    assert computed["real"] == 3  # pairs 0 1 0 1 0 1, then 2
    assert len(entries(tmp_path, "json")) == len(entries(tmp_path, "safetensors")) == 3


def test_computed_read_and_remembered_targets_are_the_same_bits(tmp_path, computed, monkeypatch):
    fresh, losses = run(task())
    count = computed["real"]
    read, again = run(task())
    assert computed["real"] == count and again == losses and same(read, fresh)
    monkeypatch.setattr(target_bank, "MEMORY", 1)  # one entry is remembered, and the pairs take turns
    monkeypatch.setenv("DDENGINE_CACHE", str(tmp_path / "other"))
    unremembered, third = run(task())
    assert third == losses and same(unremembered, fresh)
    monkeypatch.setattr(TargetBank, "_read", lambda *rest: None)
    computed.clear()
    always, fourth = run(task())
    assert computed["real"] == 7 and fourth == losses and same(always, fresh)


def test_other_sizes_and_starts_and_rates_find_the_targets(computed):
    run(task())
    count = computed["real"]
    run(task(ipc=3), options=replace(QUICK, start="noise", lr=1.0, momentum=0.0, scale=7.0))
    assert computed["real"] == count


@pytest.mark.parametrize(
    "other",
    [
        {"options": replace(QUICK, p=1)},
        {"options": replace(QUICK, layers=(1,))},
        {"options": replace(QUICK, sam_weight=0)},
        {"options": replace(QUICK, augment="crop")},
        {"options": replace(QUICK, real_per_class=5)},
        {"options": replace(QUICK, bank_real=5)},
        {"options": replace(QUICK, chunk=3)},
        {"seed": 4},
        {"problem": task(seed=1)},
        {"problem": task(precision="bf16")},
    ],
    ids=str,
)
def test_whatever_a_target_depends_on_gives_it_another_name(computed, other):
    run(task(), steps=2)
    assert computed["real"] == 2
    run(**{"problem": task(), "steps": 2, **other})
    assert computed["real"] == 4


def test_other_networks_and_another_way_into_model_input_are_other_facts():
    images = task().images
    plain = data_facts(images)
    assert plain == data_facts(images.take(torch.arange(41)))
    for change in ({"mean": (0.4,)}, {"std": (0.3,)}, {"classes": ("a", "b", "d")}):
        assert data_facts(replace(images, spec=replace(images.spec, **change))) != plain


def test_resumed_is_straight_with_and_without_the_folder(tmp_path, monkeypatch):
    straight, losses = run(task(), steps=9)
    for folder in ("cache", "empty"):
        monkeypatch.setenv("DDENGINE_CACHE", str(tmp_path / folder))
        for stop in (1, 3, 4, 8):
            half, first = run(task(), steps=stop)
            whole, rest = run(task(), steps=9, state=half)
            assert first + rest == losses and same(whole, straight)


@pytest.mark.parametrize("damage", ["cut", "flipped", "foreign", "not json", "no tensors", "list"])
def test_a_damaged_entry_is_computed_again_with_a_notice(tmp_path, computed, damage):
    straight, losses = run(task(), steps=1)
    (said,), (held,) = entries(tmp_path, "json"), entries(tmp_path, "safetensors")
    good = said.read_bytes(), held.read_bytes()
    record = json.loads(good[0])
    spoilt = {
        "foreign": {**record, "depends": {**record["depends"], "seed": 99}},
        "no tensors": {**record, "tensors": None},
        "list": [record],
    }
    if damage == "cut":
        held.write_bytes(good[1][:-3])
    elif damage == "flipped":
        held.write_bytes(good[1][:-3] + bytes(b ^ 1 for b in good[1][-3:]))
    else:
        said.write_text("{" if damage == "not json" else json.dumps(spoilt[damage]))
    with pytest.warns(UserWarning, match=r"damaged.*; these targets are computed again"):
        again, same_losses = run(task(), steps=1)
    assert same_losses == losses and same(again, straight) and computed["real"] == 2
    assert (said.read_bytes(), held.read_bytes()) == good


def test_tensors_without_their_record_are_not_believed(tmp_path, computed):
    run(task(), steps=1)
    entries(tmp_path, "json")[0].unlink()
    run(task(), steps=1)
    assert computed["real"] == 2 and len(entries(tmp_path, "json")) == 1


FACTS = st.dictionaries(st.text(max_size=4), st.integers() | st.text(max_size=4) | st.none(), max_size=5)


@settings(max_examples=50, deadline=None)
@given(FACTS, FACTS, st.integers(0, 2**63), st.integers(0, 3))
def test_only_equal_facts_and_draws_share_an_entry(one, other, seed, iteration):
    def value(number):
        return lambda: [torch.tensor([float(number)])]

    def kept(bank, draws, at, number):
        return float(bank.targets(draws, at, CPU, value(number))[0])

    bank, turned = TargetBank(one, None), TargetBank(dict(reversed(one.items())), None)
    turned._known = TargetBank(other, None)._known = bank._known
    draws = Rng(seed).fold("bank", 5)
    assert kept(bank, draws, iteration, 1) == kept(turned, draws, iteration, 2) == 1
    another = TargetBank(other, None)
    another._known = bank._known
    assert kept(another, draws, iteration, 3) == (1 if one == other else 3)
    assert kept(bank, Rng(seed + 1).fold("bank", 5), iteration, 4) == 4
    assert kept(bank, Rng(seed).fold("bank", "5"), iteration, 5) == 5
    assert kept(bank, draws, iteration + 1, 6) == 6


def test_memory_is_bounded_and_keeps_what_was_used_last(monkeypatch):
    monkeypatch.setattr(target_bank, "MEMORY", 3 * 40)
    bank, made = TargetBank({}, None), []

    def entry(number):
        def make():
            made.append(number)
            return [torch.full((10,), float(number))]

        return bank.targets(Rng(number), 0, CPU, make)[0]

    for number in (1, 2, 3, 1, 4):
        assert torch.equal(entry(number), torch.full((10,), float(number)))
    assert made == [1, 2, 3, 4] and sum(t[0].nbytes for t in bank._known.values()) == 120
    entry(1)
    entry(2)
    assert made == [1, 2, 3, 4, 2]
    bank.close()
    assert not bank._known


def test_distribution_matching_has_the_targets_of_attention_matching_without_its_term(computed):
    shared = {"steps": 5, "real_per_class": 7, "lr": 0.3, "bank": "on", "bank_reuse": 2}
    attention = AttentionOptions(sam_weight=0, mmd_weight=1, scale=1, **shared)
    a, _ = run(task(), steps=5, options=attention)
    count = computed["real"]
    matcher, rng = DistributionMatching(DistributionOptions(**shared), NET), Rng(3)
    state, work = matcher.init(task(), rng), matcher.prepare(task(), rng)
    while state.step < 5:
        state, _ = matcher.step(state, work, rng)
    assert same(a, state) and computed["real"] == count


def test_several_networks_a_step_are_pairs_of_their_own(computed):
    state, losses = run(task(), steps=3, options=replace(QUICK, networks_per_step=2))
    assert computed["real"] == 2 and len(set(losses)) == 3 and state.step == 3


def test_a_folder_that_cannot_be_made_is_refused(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DDENGINE_CACHE", str(tmp_path / "file"))
    with pytest.raises(UsageError, match=r"cannot create .*bank.*\nSet DDENGINE_CACHE"):
        AttentionMatching(QUICK, NET).prepare(task(), Rng(0))


def test_targets_of_a_network_that_is_not_ours_are_remembered_only(tmp_path, monkeypatch):
    monkeypatch.setattr(target_bank, "NETWORKS", {})
    work = AttentionMatching(QUICK, NET).prepare(task(), Rng(0))
    assert "real targets are not kept: convnet" in work.notes[0]
    run(task(), steps=2)
    assert not (tmp_path / "cache").exists()


def test_without_a_bank_nothing_is_kept(tmp_path):
    run(task(), steps=2, options=replace(QUICK, bank="off"))
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"bank": "disk"}, "unknown matcher.bank 'disk'"),
        ({"bank_reuse": 0}, "matcher.bank_reuse=0"),
        ({"bank_real": 0}, "matcher.bank_real=0"),
    ],
)
def test_options_out_of_range_are_refused_by_name(options, said):
    with pytest.raises(UsageError, match=said):
        AttentionOptions(**options)
    with pytest.raises(UsageError, match=said):
        DistributionOptions(**options)


def test_the_folder_is_the_users_cache_unless_told(tmp_path, monkeypatch):
    assert target_bank.bank_folder() == tmp_path / "cache" / "bank"
    monkeypatch.delenv("DDENGINE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert target_bank.bank_folder() == tmp_path / "xdg" / "ddengine" / "bank"


def test_all_modules_that_targets_come_from_are_in_the_hash_of_the_code(monkeypatch):
    seen = []
    monkeypatch.setattr(Path, "read_bytes", lambda path: seen.append(path) or b"")
    target_bank._code.__wrapped__()
    covered = {path.name for path in seen if path.parent.name == "matchers"}
    assert {"descent.py", "networks.py", "class_means.py", "target_bank.py", "attention.py"} <= covered
    assert {"store.py", "segment.py"} <= {path.name for path in seen if path.parent.name == "expert_buffers"}
