"""States come back from disk as they were, or are refused."""

import json
import os
import stat
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from ddengine import checkpoint, files
from ddengine.errors import ArtefactError, UsageError
from ddengine.types import DataSpec


@dataclass(frozen=True)
class Box:
    step: Any
    value: Any


class Pair(NamedTuple):
    first: Any
    second: Any


SPEC = DataSpec("noise", (1, 2, 3), ("a", "b"), (0.5,), (0.25,))
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool]
TENSORS = st.builds(
    lambda shape, dtype, seed: (8 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))).to(
        dtype
    ),
    st.lists(st.integers(0, 3), max_size=3),
    st.sampled_from(DTYPES),
    st.integers(0, 99),
)
PLAIN = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
)
KEYS = st.one_of(st.text(max_size=4), st.sampled_from(["a/b", "a", "b", "~1", "__metadata__", "", "a~b"]))
STATES = st.recursive(
    TENSORS | PLAIN | st.just(SPEC),
    lambda inner: st.one_of(
        st.dictionaries(KEYS, inner, max_size=4),
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.builds(Box, inner, inner),
        st.builds(Pair, inner, inner),
    ),
    max_leaves=10,
)
STATE = Box(3, {"images": torch.arange(12.0).reshape(3, 4), "speed": (torch.zeros(2), 0.5), "name": "x"})


def blank(state):
    """A state of the same form whose leaves hold other values."""
    values = {k: torch.zeros_like(v) if isinstance(v, Tensor) else 0 for k, v in checkpoint.leaves(state)}
    return checkpoint.rebuild(state, values)


def same(a, b):
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if type(a) is not type(b):
        return False
    if isinstance(a, Box):
        return same(vars(a), vars(b))
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=80, deadline=None)
@given(STATES)
def test_any_nested_state_comes_back_bit_for_bit(tmp_path, state):
    checkpoint.save(tmp_path, 7, state, {"seconds": 1.5})
    loaded, extra = checkpoint.load(tmp_path, 7, blank(state))
    assert same(loaded, state) and extra == {"seconds": 1.5}


def test_a_loaded_state_shares_nothing_with_its_template():
    template = Box(1, torch.zeros(3))
    made = checkpoint.rebuild(template, {"/step": 2, "/value": torch.ones(3)})
    made.value.add_(1)
    assert template.step == 1 and not template.value.any()


def test_two_keys_of_one_spelling_are_not_written(tmp_path):
    with pytest.raises(AssertionError, match="two keys of one spelling"):
        checkpoint.save(tmp_path, 1, {1: 2.0, "1": 3.0}, {})


def test_only_the_last_checkpoints_are_kept(tmp_path):
    for step in (1, 5, 999_999, 1_000_000):
        assert checkpoint.save(tmp_path, step, STATE, {}) == tmp_path / f"step_{step:06d}"
    assert checkpoint.steps(tmp_path) == [1_000_000, 999_999]


def test_a_checkpoint_replaces_later_ones_that_could_not_be_used(tmp_path):
    for step in (10, 20, 30):
        checkpoint.save(tmp_path, step, STATE, {})
    checkpoint.save(tmp_path, 4, STATE, {})
    assert checkpoint.steps(tmp_path) == [4]
    checkpoint.save(tmp_path, 4, Box(4, STATE.value), {})
    assert checkpoint.load(tmp_path, 4, STATE)[0].step == 4


def test_a_checkpoint_has_the_usual_rights(tmp_path):
    (tmp_path / "usual").mkdir()
    folder = checkpoint.save(tmp_path / "deep" / "down", 1, STATE, {})
    assert stat.S_IMODE(folder.stat().st_mode) == stat.S_IMODE((tmp_path / "usual").stat().st_mode)


def test_a_save_that_fails_leaves_the_older_checkpoints_and_nothing_else(tmp_path, monkeypatch):
    checkpoint.save(tmp_path, 1, STATE, {})
    before = (tmp_path / "step_000001" / "manifest.json").read_bytes()

    def full(*args):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(UsageError, match="No space left"):
            checkpoint.save(tmp_path, 2, STATE, {})
    with pytest.raises(ValueError, match="JSON"):
        checkpoint.save(tmp_path, 3, STATE, {"seconds": float("inf")})
    with pytest.raises(UsageError, match="cannot create the folder"):
        checkpoint.save(tmp_path / "step_000001" / "manifest.json", 3, STATE, {})
    assert [path.name for path in tmp_path.iterdir()] == ["step_000001"]
    assert (tmp_path / "step_000001" / "manifest.json").read_bytes() == before


def test_what_a_killed_process_left_is_cleaned_away(tmp_path):
    checkpoint.save(tmp_path, 1, STATE, {})
    (tmp_path / f"{files.TEMPORARY}step_000002").mkdir()
    (tmp_path / f"{files.TEMPORARY}step_000002" / "manifest.json").write_text("{")
    (tmp_path / f"{files.TEMPORARY}abc").write_text("")
    checkpoint.clean(tmp_path)
    checkpoint.clean(tmp_path / "missing")
    assert [path.name for path in tmp_path.iterdir()] == ["step_000001"]
    assert checkpoint.steps(tmp_path / "missing") == []


@pytest.mark.parametrize("name", ["manifest.json", "state.safetensors"])
def test_any_changed_byte_is_refused_or_changes_nothing(tmp_path, name):
    path = checkpoint.save(tmp_path, 3, STATE, {"seconds": 2.5}) / name
    data, refused = path.read_bytes(), 0
    for place in range(len(data)):
        path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        try:
            loaded, extra = checkpoint.load(tmp_path, 3, STATE)
        except ArtefactError as error:
            assert "step_000003" in error.cause and error.remedy
            refused += 1
        else:
            assert same(loaded, STATE) and extra == {"seconds": 2.5}
    assert refused >= 0.8 * len(data)


def test_a_number_changed_in_the_manifest_is_refused(tmp_path):
    path = checkpoint.save(tmp_path, 3, STATE, {}) / "manifest.json"
    assert path.read_text().count('"/step": 3') == 1
    path.write_text(path.read_text().replace('"/step": 3', '"/step": 4'))
    with pytest.raises(ArtefactError, match=r"manifest.json was changed\nRemove it"):
        checkpoint.load(tmp_path, 3, STATE)


@pytest.mark.parametrize(
    "manifest",
    [
        [],
        {},
        {"format": "ddengine/checkpoint", "version": 2},
        {"format": "ddengine/checkpoint", "version": 1},
        None,
    ],
)
def test_a_manifest_that_is_none_is_refused(tmp_path, manifest):
    folder = checkpoint.save(tmp_path, 3, STATE, {})
    if manifest is None:
        (folder / "manifest.json").unlink()
    else:
        (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ArtefactError, match="step_000003"):
        checkpoint.load(tmp_path, 3, STATE)


@pytest.mark.parametrize(
    "template",
    [Box(3, {"images": 1.0}), Box(torch.zeros(1), STATE.value), Box(3, {**STATE.value, "more": 1})],
)
def test_a_state_of_another_form_is_refused(tmp_path, template):
    checkpoint.save(tmp_path, 3, STATE, {})
    with pytest.raises(ArtefactError, match=r"the checkpoint has no '/.*' of the right kind"):
        checkpoint.load(tmp_path, 3, template)


def test_a_kill_while_old_checkpoints_are_removed_leaves_whole_ones_and_is_made_good(tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    def die(*args, **named):
        raise Killed

    for step in (1, 2):
        checkpoint.save(tmp_path, step, Box(step, STATE.value), {})
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(os, "unlink", die)  # in the midst of taking step 1 away
        checkpoint.save(tmp_path, 3, Box(3, STATE.value), {})
    assert checkpoint.steps(tmp_path) == [3, 2]
    assert [checkpoint.load(tmp_path, step, STATE)[0].step for step in (3, 2)] == [3, 2]
    checkpoint.clean(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_000002", "step_000003"]


def test_cleaning_keeps_the_checkpoints_that_a_finished_save_would_keep(tmp_path):
    for step in (1, 2):
        checkpoint.save(tmp_path / "one", step, Box(step, STATE.value), {})
        checkpoint.save(tmp_path / "two", step + 2, Box(step + 2, STATE.value), {})
    for path in (tmp_path / "two").iterdir():  # as a kill before the removal of old ones leaves it
        path.rename(tmp_path / "one" / path.name)
    checkpoint.clean(tmp_path / "one")
    assert checkpoint.steps(tmp_path / "one") == [4, 3]
