"""A buffer gives back what was recorded, by rows, and nothing that was changed or is for another task."""

import hashlib
import json
import math
import shutil
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from toy_experts import BATCH, NET, RECIPE, SPEC, extended, head, recording, walk, write

from ddengine import data, files
from ddengine.errors import ArtefactError, DDError, UsageError
from ddengine.nets import NetSpec, build
from ddengine.rng import Rng
from ddengine.types import Whitening
from expert_buffers import ExpertBuffer, ParamSpec
from expert_buffers.store import Recording, commit, load_recording, open_for_writing, save_expert

DELTA16_ERROR = 2.0**-10  # of a row's largest delta: half a unit in the last place of float16, and some room


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with three experts of 4, 5 and 6 epochs, one of them with batch norm."""
    root = tmp_path_factory.mktemp("experts") / "buffer"
    write(root, [walk(NET, 4, 0), walk(BATCH, 5, 1), walk(NET, 6, 2)], (NET, BATCH))
    return root


@pytest.fixture
def folder(made, tmp_path):
    return shutil.copytree(made, tmp_path / "copy")


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def seal(manifest):
    rest = {key: value for key, value in manifest.items() if key != "seal"}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"))
    return {**rest, "seal": hashlib.sha256(text.encode()).hexdigest()}


def rewrite(folder, edit, sealed=True):
    """Change the manifest by `edit`, with a valid seal unless told otherwise."""
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    edit(manifest)
    path.write_text(json.dumps(seal(manifest) if sealed else manifest, indent=1) + "\n")


@st.composite
def moves(draw):
    """Rows [t p] near a start, with magnitudes from 1e-12 to 1e6 and rows that did not move."""
    t, p = draw(st.integers(1, 5)), draw(st.integers(1, 7))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    start = torch.randn(p, generator=generator)
    sizes = draw(st.lists(st.sampled_from([0.0, 1e-12, 1e-6, 1e-3, 1.0, 1e6]), min_size=t, max_size=t))
    deltas = [size * torch.randn(p, generator=generator) for size in sizes]
    return torch.stack([start, *(start + delta for delta in deltas)])


@settings(max_examples=60, deadline=None)
@given(moves(), st.integers(0, 3))
def test_rows_come_back_as_precisely_as_their_encoding_says(params, s):
    stats = torch.arange(float(len(params) * s)).reshape(len(params), s)
    zeros = torch.zeros(len(params))
    for encoding in ("delta16", "fp32"):
        stored = recording((params, stats, zeros, zeros), encoding).tensors()
        back = Recording.from_tensors(stored)
        rows = back.rows(range(len(params)))
        assert torch.equal(back.stats, stats) and torch.equal(back.resume["params"], params[-1])
        assert torch.equal(rows[0], params[0])
        if encoding == "fp32":
            assert torch.equal(rows, params)
            continue
        deltas = params - params[0]
        largest = deltas.abs().amax(1, keepdim=True)
        rounding = 2.0**-23 * params[0].abs()
        assert bool(((rows - params).abs() <= DELTA16_ERROR * largest + rounding).all())
        relative = (stored["scale"][:, None] * stored["delta"].float() - deltas[1:]).abs()
        assert bool((relative <= 2.0**-11 * deltas[1:].abs() + 2.0**-33 * largest[1:]).all())


def test_deltas_far_below_float16_keep_its_precision():
    start = torch.zeros(3)
    row = torch.tensor([1e-12, -3e-13, 7e-14])
    made = Recording.begin("delta16", start, torch.empty(0), 0.0, 0.0)
    back = made.append(row, torch.empty(0), 0.0, 0.0, {"params": row}).rows([1])[0]
    assert float((back - row).abs().max() / 1e-12) < 2.0**-11
    assert not bool(row.half().any())  # unscaled, all of them would be lost


def test_each_scale_is_a_power_of_two_and_one_for_a_row_that_stood_still():
    params, stats, loss, accuracy = walk(epochs=3)
    params[2] = params[0]
    scales = recording((params, stats, loss, accuracy)).encoded["scale"]
    assert all(math.frexp(float(scale))[0] == 0.5 for scale in scales)
    assert float(scales[1]) == 1
    tops = recording((params, stats, loss, accuracy)).encoded["delta"].float().abs().amax(1)
    assert 512 <= float(tops[0]) <= 1024 and 512 <= float(tops[2]) <= 1024 and float(tops[1]) == 0


def test_the_largest_and_smallest_floats_survive_scaling():
    start = torch.zeros(2)
    for size in (3e38, 2.0**-126, 1e-44):
        row = torch.tensor([size, -size / 3])
        made = Recording.begin("delta16", start, torch.empty(0), 0.0, 0.0)
        back = made.append(row, torch.empty(0), 0.0, 0.0, {"params": row}).rows([1])[0]
        assert bool(back.isfinite().all())
        assert float((back.double() - row.double()).abs().max()) <= 2.0**-11 * size + 1e-44


@pytest.mark.parametrize("encoding", ["delta16", "fp32"])
def test_a_continued_expert_is_the_straight_one_bit_for_bit(encoding, tmp_path):
    walked = walk(epochs=6)
    straight = recording(walked, encoding).tensors()
    top = head(encoding=encoding)
    (name,) = top["architectures"]
    manifest = open_for_writing(tmp_path, top)
    entry = save_expert(tmp_path, 0, name, recording(walked, encoding, rows=3))
    manifest = commit(tmp_path, manifest, 0, entry, {})
    continued = extended(load_recording(tmp_path, open_for_writing(tmp_path, top), 0), walked).tensors()
    assert straight.keys() == continued.keys()
    assert all(torch.equal(straight[key], continued[key]) for key in straight)
    assert torch.equal(continued["resume.momentum"], -walked[0][-1])


def test_a_recording_does_not_follow_the_weights_it_was_given():
    weights, momentum, stats = torch.ones(4), torch.ones(4), torch.zeros(2)
    for encoding in ("delta16", "fp32"):
        made = Recording.begin(encoding, weights, stats, 1.0, 0.0)
        weights += 1
        stats += 1
        made = made.append(weights, stats, 1.0, 0.0, {"params": weights, "momentum": momentum})
        weights += 1
        stats += 1
        momentum += 1
        assert torch.equal(made.rows([0, 1]), torch.stack([weights - 2, weights - 1]))
        assert torch.equal(made.stats, torch.stack([stats - 2, stats - 1]))
        assert torch.equal(made.resume["params"], weights - 1)
        assert torch.equal(made.resume["momentum"], momentum - 1)


@pytest.mark.parametrize("where", ["params", "stats", "loss", "resume"])
def test_an_expert_that_diverged_is_refused_with_its_epoch(where):
    made = Recording.begin("delta16", torch.ones(3), torch.ones(2), 1.0, 0.0)
    given = {"params": torch.ones(3), "stats": torch.ones(2), "loss": 1.0, "resume": torch.ones(3)}
    given[where] = math.inf if where == "loss" else given[where] * math.nan
    with pytest.raises(DDError, match="expert diverged.*epoch 1 .*\nLower recipe.lr"):
        made.append(given["params"], given["stats"], given["loss"], 0.0, {"params": given["resume"]})


def test_a_delta_that_overflows_is_refused():
    made = Recording.begin("delta16", torch.full((2,), 3e38), torch.ones(1), 1.0, 0.0)
    far = torch.full((2,), -3e38)
    with pytest.raises(DDError, match="expert diverged"):
        made.append(far, torch.ones(1), 1.0, 0.0, {"params": far})


@pytest.fixture(scope="module")
def trained():
    """Parameters after each of 5 epochs of SGD on digits [t p]."""
    fit = data.load("digits").fit
    net = build(NetSpec("convnet", width=8), fit.spec.shape, 10, Rng(3).torch("weights"))
    optimiser = torch.optim.SGD(net.parameters(), lr=0.01)
    x, y, rows = fit.model_input()[::3], fit.y[::3], []
    for epoch in range(6):
        rows.append(nn.utils.parameters_to_vector(net.parameters()).detach().clone())
        for batch in torch.randperm(len(x), generator=Rng(3).fold(epoch).torch("order")).split(64):
            optimiser.zero_grad()
            F.cross_entropy(net(x[batch]), y[batch]).backward()
            optimiser.step()
    return torch.stack(rows)


def difference_errors(stored, exact, m=2):
    """Relative errors of theta_{t+m} - theta_t for every t."""
    right = exact[m:] - exact[:-m]
    return ((stored[m:] - stored[:-m] - right).norm(dim=1) / right.norm(dim=1)).tolist()


def test_differences_of_checkpoints_of_a_trained_network_keep_99_8_percent(trained):
    none = torch.zeros(len(trained))
    made = recording((trained, torch.empty(len(trained), 0), none, none))
    assert max(difference_errors(made.rows(range(len(trained))), trained)) < 0.002


def test_absolute_half_precision_would_lose_differences_of_checkpoints(trained):
    assert min(difference_errors(trained.bfloat16().float(), trained)) > 0.03
    assert min(difference_errors(trained.half().float(), trained)) > 0.005


@pytest.mark.parametrize("encoding", ["delta16", "fp32"])
def test_every_way_of_reading_rows_gives_the_same(encoding, tmp_path):
    walked = walk(BATCH, epochs=5)
    buffer = write(tmp_path / "b", [walk(BATCH, 2, 9), walked], (BATCH,), encoding=encoding)
    whole, expected = buffer[1], recording(walked, encoding)
    assert torch.equal(whole.params, expected.rows(range(6))) and torch.equal(whole.stats, walked[1])
    assert torch.equal(whole.loss, walked[2]) and torch.equal(whole.accuracy, walked[3])
    assert whole.epoch.tolist() == [0, 1, 2, 3, 4, 5] and whole.network == buffer.network(1)
    assert whole.params.dtype == whole.stats.dtype == torch.float32
    for index in ([0], [5], [1, 2, 3], [4, 0, 4], [5, 3], range(6), []):
        params, stats = buffer.rows(1, index)
        assert torch.equal(params, whole.params[list(index)])
        assert torch.equal(stats, whole.stats[list(index)])
    assert torch.equal(buffer[-1].params, whole.params) and torch.equal(
        buffer.rows(-1, [2])[0], whole.params[2:3]
    )


def test_rows_are_the_callers_own(made):
    buffer = ExpertBuffer(made)
    rows, stats = buffer.rows(1, [0, 1])
    kept = rows.clone(), stats.clone()
    rows += 1
    stats += 1
    again = buffer.rows(1, [0, 1])
    assert torch.equal(again[0], kept[0]) and torch.equal(again[1], kept[1])


def test_experts_may_differ_in_epochs_and_architecture(made):
    buffer = ExpertBuffer(made)
    assert len(buffer) == 3 and [buffer.epochs(i) for i in range(3)] == [4, 5, 6]
    assert [buffer.network(i).norm for i in range(3)] == ["instance", "batch", "instance"]
    assert buffer.matching(NET) == [0, 2] and buffer.matching(BATCH) == [1]
    assert buffer.matching(NetSpec("mlp")) == []
    assert sum(buffer.stat_spec(0).sizes) == 0 and sum(buffer.stat_spec(1).sizes) > 0


def test_there_is_no_expert_and_no_epoch_beyond_the_last(made):
    buffer = ExpertBuffer(made)
    for i in (3, -4):
        with pytest.raises(IndexError):
            buffer[i]
        with pytest.raises(IndexError):
            buffer.epochs(i)
    for row in (5, -1):
        with pytest.raises(UsageError, match=f"expert 0 has no checkpoint {row}: .* 4 epochs\n"):
            buffer.rows(0, [0, row])


def test_a_network_takes_weights_and_statistics_of_a_checkpoint(made):
    buffer = ExpertBuffer(made)
    net = buffer.build(1, 3)
    params, stats = buffer.rows(1, [3])
    assert torch.equal(ParamSpec.of(net).flatten(dict(net.named_parameters())), params[0])
    assert torch.equal(ParamSpec.of_buffers(net).flatten(dict(net.named_buffers())), stats[0])
    counters = [b for name, b in net.named_buffers() if name.endswith("num_batches_tracked")]
    assert len(counters) == 2 and all(b.dtype == torch.int64 and b == 3 for b in counters)
    again = build(BATCH, SPEC.shape, 5, Rng(5).torch("weights"))
    x = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    assert buffer.load(again, 1, 3) is again
    assert torch.equal(again.eval()(x), net.eval()(x)) and all(p.requires_grad for p in net.parameters())
    with pytest.raises(UsageError, match="expert 0 is a convnet width=3"):
        buffer.load(again, 0, 0)


def test_a_buffer_that_is_opened_has_read_no_expert(folder):
    path = folder / "expert_00002.safetensors"
    damaged = bytearray(path.read_bytes())
    damaged[-1] ^= 1
    path.write_bytes(damaged)
    buffer = ExpertBuffer(folder)
    assert len(buffer) == 3 and len(buffer[0].params) == 5
    with pytest.raises(ArtefactError, match="expert_00002.safetensors is damaged: its SHA-256"):
        buffer.rows(2, [0])


def test_a_flipped_bit_anywhere_is_found(folder):
    path = folder / "expert_00000.safetensors"
    whole = path.read_bytes()
    generator = torch.Generator().manual_seed(0)
    for place in [0, 9, len(whole) - 1, *torch.randint(len(whole), (40,), generator=generator).tolist()]:
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 16]) + whole[place + 1 :])
        for read in (lambda b: b[0], lambda b: b.verify()):
            with pytest.raises(ArtefactError, match="expert_00000.safetensors is damaged"):
                read(ExpertBuffer(folder))
    path.write_bytes(whole)
    assert len(ExpertBuffer(folder).verify()) == 4


@pytest.mark.parametrize("keep", [0, 7, 100, -1])
def test_a_truncated_or_longer_file_is_refused_before_it_is_read(folder, keep):
    path = folder / "expert_00001.safetensors"
    whole = path.read_bytes()
    for content in (whole[:keep], whole + b"x"):
        path.write_bytes(content)
        with pytest.raises(ArtefactError, match=f"expert_00001.safetensors is damaged: {len(content)} bytes"):
            ExpertBuffer(folder)


def test_files_swapped_between_experts_are_refused(tmp_path):
    write(tmp_path, [walk(seed=0), walk(seed=1)])
    first, second = tmp_path / "expert_00000.safetensors", tmp_path / "expert_00001.safetensors"
    first.rename(tmp_path / "aside")
    second.rename(first)
    (tmp_path / "aside").rename(second)
    buffer = ExpertBuffer(tmp_path)
    for i in range(2):
        with pytest.raises(ArtefactError, match=f"expert_0000{i}.safetensors is damaged: its SHA-256"):
            buffer.rows(i, [0])


def test_a_file_that_is_gone_or_a_link_is_refused(folder):
    path = folder / "expert_00000.safetensors"
    path.rename(folder / "elsewhere")
    with pytest.raises(ArtefactError, match="cannot read .*expert_00000.safetensors"):
        ExpertBuffer(folder)
    path.symlink_to(folder / "elsewhere")
    with pytest.raises(ArtefactError, match="expert_00000.safetensors is damaged: it is not a regular file"):
        ExpertBuffer(folder)


def test_a_folder_without_a_buffer_is_refused(tmp_path):
    with pytest.raises(UsageError, match="there is no folder .*nothing"):
        ExpertBuffer(tmp_path / "nothing")
    with pytest.raises(ArtefactError, match="cannot read .*manifest.json"):
        ExpertBuffer(tmp_path)


def test_any_change_of_the_manifest_breaks_its_seal(folder):
    path = folder / "manifest.json"
    whole = path.read_bytes()
    generator = torch.Generator().manual_seed(0)
    for place in torch.randint(len(whole), (60,), generator=generator).tolist():
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(ArtefactError, match="manifest.json"):
            ExpertBuffer(folder)
    path.write_bytes(whole + b"\n")
    with pytest.raises(ArtefactError, match="its text was changed after it was sealed"):
        ExpertBuffer(folder)


def expert(key, value):
    return lambda m: m["experts"]["0"].update({key: value})


def rename_architecture(manifest):
    manifest["architectures"] = {f"{i}" * 16: v for i, v in enumerate(manifest["architectures"].values())}


BAD = {
    "a file outside the folder": (expert("file", "../expert_00000.safetensors"), "experts.0.file"),
    "another expert's file": (expert("file", "expert_00001.safetensors"), "expert '0' cannot have the file"),
    "too many checkpoints": (expert("checkpoints", 1 << 19), "cannot have .* bytes when its tensors have"),
    "no checkpoint": (expert("checkpoints", 0), "experts.0.checkpoints"),
    "a number as text": (expert("bytes", "12"), "experts.0.bytes"),
    "a truth value": (expert("checkpoints", True), "experts.0.checkpoints"),
    "an endless loss": (expert("loss", 1e300), "experts.0.loss"),
    "half of the measures": (expert("loss", None), "only one of loss and accuracy"),
    "an unknown encoding": (expert("encoding", "int8"), "experts.0.encoding"),
    "an unknown architecture": (expert("architecture", "0" * 16), "names none of the architectures"),
    "an unknown field": (expert("more", 1), "field 'experts.0.more' is unknown"),
    "a missing field": (lambda m: m["experts"]["0"].pop("sha256"), "field 'experts.0.sha256' is missing"),
    "an expert that is none": (lambda m: m["experts"].update({"0": []}), "is not a table"),
    "a key that is no number": (
        lambda m: m["experts"].update({"a\nb": m["experts"]["0"]}),
        "cannot have the file",
    ),
    "a renamed architecture": (rename_architecture, "is not the one that its name says"),
    "no network": (lambda m: m.update(networks=[]), "networks"),
    "a seed that is no number": (lambda m: m.update(seed="7"), "seed"),
    "a shape": (lambda m: m["dataset"].update(shape=[1, 8]), "dataset.shape"),
    "a preprocessing": (lambda m: m["dataset"].update(preprocessing="none"), "dataset.preprocessing"),
    "no plan": (lambda m: m.pop("plan"), "'plan' is missing"),
    "a foreign format": (lambda m: m.update(format="other"), "is no manifest of an expert buffer"),
    "a newer version": (lambda m: m.update(version=2), "version 2, this ddengine reads 1\nUpgrade"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_manifest_that_is_sealed_and_wrong_is_refused(folder, name):
    edit, match = BAD[name]
    rewrite(folder, edit)
    with pytest.raises(ArtefactError, match=match) as raised:
        ExpertBuffer(folder)
    assert "manifest.json" in str(raised.value) and str(raised.value).count("\n") == 1


def test_a_layout_that_is_junk_is_refused(folder):
    def edit(manifest):
        old = next(iter(manifest["architectures"].values()))
        entry = {**old, "parameters": [["a", [2**40, 2**40]]]}
        text = json.dumps(entry, sort_keys=True, separators=(",", ":")).encode()
        manifest["architectures"][hashlib.sha256(text).hexdigest()[:16]] = entry

    rewrite(folder, edit)
    with pytest.raises(ArtefactError, match="manifest.json is damaged: a layout is not a list"):
        ExpertBuffer(folder)


@pytest.mark.parametrize("change", ["missing", "unknown", "shape", "dtype", "nan"])
def test_tensors_that_the_manifest_does_not_describe_are_refused(folder, change):
    """A file with a hash and size of its own that the manifest agrees to, and wrong tensors in it."""
    stored = recording(walk(NET, 4, 0)).tensors()
    edits = {
        "missing": {k: v for k, v in stored.items() if k != "scale"},
        "unknown": {**stored, "more": torch.zeros(1)},
        "shape": {**stored, "delta": stored["delta"][:, 1:].contiguous()},
        "dtype": {**stored, "delta": stored["delta"].float()},
        "nan": {**stored, "start": stored["start"] * math.nan},
    }
    written = files.write_tensors(folder / "expert_00000.safetensors", edits[change])
    rewrite(folder, lambda m: m["experts"]["0"].update(written))
    with pytest.raises(ArtefactError, match="is damaged") as raised:
        ExpertBuffer(folder).verify()
    assert "expert_00000.safetensors" in str(raised.value)
    if change != "nan":
        with pytest.raises(ArtefactError, match="expert_00000.safetensors is damaged: "):
            ExpertBuffer(folder).rows(0, [0])


@pytest.mark.parametrize("change", ["equal rows", "another state", "another start"])
@pytest.mark.parametrize("encoding", ["delta16", "fp32"])
def test_verify_finds_numbers_that_cannot_belong_together(tmp_path, encoding, change):
    params, *rest = walk(epochs=0 if change == "another start" else 3)
    if change == "equal rows":
        params[2] = params[1]
    made = recording((params, *rest), encoding)
    if change != "equal rows":
        made = replace(made, resume={"params": made.resume["params"] * 1.01})
    top = head(encoding=encoding)
    (name,) = top["architectures"]
    entry = save_expert(tmp_path, 0, name, made)
    commit(tmp_path, open_for_writing(tmp_path, top), 0, entry, {})
    said = "checkpoints 1 and 2 are equal" if change == "equal rows" else "the resume state is not that"
    with pytest.raises(ArtefactError, match=f"expert_00000.safetensors is damaged: {said}"):
        ExpertBuffer(tmp_path).verify()


def test_verify_says_what_it_found_right(made):
    assert ExpertBuffer(made).verify() == [
        "manifest.json: ddengine/experts version 1, fields well formed, seal intact",
        "expert_00000.safetensors: 5 checkpoints, sha256 ok",
        "expert_00001.safetensors: 6 checkpoints, sha256 ok",
        "expert_00002.safetensors: 7 checkpoints, sha256 ok",
    ]


def test_a_file_that_the_manifest_does_not_list_is_ignored_and_overwritten(tmp_path):
    top = head()
    (name,) = top["architectures"]
    save_expert(tmp_path, 1, name, recording(walk(seed=5)))
    manifest = commit(
        tmp_path, open_for_writing(tmp_path, top), 0, save_expert(tmp_path, 0, name, recording(walk())), {}
    )
    assert len(ExpertBuffer(tmp_path)) == 1 and (tmp_path / "expert_00001.safetensors").exists()
    entry = save_expert(tmp_path, 1, name, recording(walk(seed=1)))
    commit(tmp_path, manifest, 1, entry, {})
    buffer = ExpertBuffer(tmp_path)
    assert entry["file"] == "expert_00001.safetensors"
    assert torch.equal(buffer[1].params, recording(walk(seed=1)).rows(range(5))) and buffer.verify()


def test_a_kill_before_the_manifest_leaves_the_shorter_expert_valid(tmp_path):
    top, walked = head(), walk(epochs=6)
    (name,) = top["architectures"]
    manifest = open_for_writing(tmp_path, top)
    manifest = commit(tmp_path, manifest, 0, save_expert(tmp_path, 0, name, recording(walked, rows=3)), {})
    longer = extended(load_recording(tmp_path, manifest, 0), walked)
    entry = save_expert(tmp_path, 0, name, longer)
    assert ExpertBuffer(tmp_path).epochs(0) == 2 and ExpertBuffer(tmp_path).verify()
    manifest = commit(tmp_path, manifest, 0, entry, {"epochs": 6})
    assert names(tmp_path) == ["expert_00000_e0006.safetensors", "manifest.json"]
    buffer = ExpertBuffer(tmp_path)
    assert buffer.epochs(0) == 6 and buffer.verify() and buffer.manifest["plan"] == {"epochs": 6}
    (tmp_path / "expert_00000.safetensors").write_bytes(b"left by a kill after the manifest")
    open_for_writing(tmp_path, top)
    assert names(tmp_path) == ["expert_00000_e0006.safetensors", "manifest.json"]


def test_experts_may_be_committed_in_any_order(tmp_path):
    top = head()
    (name,) = top["architectures"]
    manifest = open_for_writing(tmp_path, top)
    for number in (11, 2, 0):
        entry = save_expert(tmp_path, number, name, recording(walk(seed=number)))
        manifest = commit(tmp_path, manifest, number, entry, {})
    buffer = ExpertBuffer(tmp_path)
    assert list(buffer.manifest["experts"]) == ["0", "2", "11"]
    for i, number in enumerate((0, 2, 11)):
        assert torch.equal(buffer[i].params, recording(walk(seed=number)).rows(range(5)))


def test_opening_for_writing_goes_on_with_the_same_buffer_wherever_its_data_lay(made):
    again = open_for_writing(made, head((NET, BATCH), root="elsewhere"))
    assert again == ExpertBuffer(made).manifest


OTHERS = {
    "seed is 7 there and 8 here": {"seed": 8},
    "recipe.lr is 0.01 there and 0.02 here": {"recipe": {**RECIPE, "lr": 0.02}},
    "dataset.name is toy there and other here": {"spec": replace(SPEC, name="other")},
    "encoding is delta16 there and fp32 here": {"encoding": "fp32"},
    r"networks is \[.*\] there and \[.*\] here": {"networks": (NET,)},
}


@pytest.mark.parametrize("first", OTHERS)
def test_opening_for_writing_names_what_differs_in_another_buffer(folder, first):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(UsageError, match=f"out=.* holds another buffer: {first}\nChoose another out=DIR"):
        open_for_writing(folder, head(**{"networks": (NET, BATCH), **OTHERS[first]}))
    assert before == {path.name: path.read_bytes() for path in folder.iterdir()}


def test_opening_for_writing_refuses_networks_whose_parameters_changed(folder):
    top = head((NET, BATCH))
    top["architectures"] = dict(zip("ab", top["architectures"].values(), strict=True))
    with pytest.raises(UsageError, match="the same options and other parameters"):
        open_for_writing(folder, top)


def test_opening_for_writing_refuses_foreign_files_and_removes_temporary_ones(tmp_path):
    (tmp_path / ".tmp-left").write_text("")
    open_for_writing(tmp_path, head())
    assert names(tmp_path) == []
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(
        UsageError, match="not an expert buffer, such as 'thesis.tex'\nChoose another out=DIR"
    ):
        open_for_writing(tmp_path, head())
    with pytest.raises(UsageError, match="thesis.tex is a file"):
        open_for_writing(tmp_path / "thesis.tex", head())


WHITENED = Whitening(torch.zeros(64), torch.eye(64), torch.eye(64))
TASKS = {
    r"recorded on 'toy' \(fingerprint ab12ab12ab12\), this task is 'cifar10' \(cd34\)": (
        replace(SPEC, name="cifar10", fingerprint="cd34"), None,
    ),
    "the buffer was made with standard, this task has zca": (replace(SPEC, zca=WHITENED), None),
    "standard preprocessing has other values than this task's": (replace(SPEC, std=(0.26,)), None),
    r"shape \[1, 8, 8\], this task of \[1, 9, 8\]": (replace(SPEC, shape=(1, 9, 8)), None),
    "5 classes are not the 4 of this task": (replace(SPEC, classes=tuple("abcd")), None),
    "holds convnet width=3 depth=2 norm=instance, convnet width=3 depth=2 norm=batch, "
    "the matcher uses convnet width=5 depth=2 norm=instance": (SPEC, NetSpec("convnet", width=5, depth=2)),
}  # fmt: skip


@pytest.mark.parametrize("first", TASKS)
def test_a_task_that_the_experts_were_not_trained_for_is_refused_by_name(made, first):
    with pytest.raises(UsageError, match=f"{first}\nRecord a buffer for this task"):
        ExpertBuffer(made).check(*TASKS[first])


def test_the_task_that_the_experts_were_trained_for_is_accepted(made, tmp_path):
    buffer = ExpertBuffer(made)
    for network in (None, NET, BATCH, NetSpec("convnet", width=3, depth=2, norm="instance")):
        buffer.check(SPEC, network)
    zca = replace(SPEC, zca=WHITENED)
    whitened = write(tmp_path / "zca", [walk()], spec=zca)
    whitened.check(zca)
    with pytest.raises(UsageError, match="made with zca, this task has standard"):
        whitened.check(SPEC)
    with pytest.raises(UsageError, match="zca preprocessing has other values"):
        whitened.check(replace(SPEC, zca=replace(WHITENED, matrix=2 * torch.eye(64))))


def test_an_empty_buffer_suits_no_task(tmp_path):
    manifest = open_for_writing(tmp_path, head())
    entry = save_expert(tmp_path, 0, next(iter(manifest["architectures"])), recording(walk()))
    commit(tmp_path, manifest, 0, entry, {})
    rewrite(tmp_path, lambda m: m.update(experts={}))
    buffer = ExpertBuffer(tmp_path)
    assert len(buffer) == 0 and buffer.summary()["epochs"] is None
    with pytest.raises(UsageError, match="holds no expert"):
        buffer.check(SPEC)


def test_the_digest_follows_the_content_and_not_the_place(made, folder, tmp_path):
    same = ExpertBuffer(made).digest
    rewrite(folder, lambda m: m.update(origin={"root": "moved"}, plan={"count": 9}))
    assert ExpertBuffer(folder).digest == same
    rewrite(folder, lambda m: m["experts"].pop("2"))
    assert ExpertBuffer(folder).digest != same
    assert write(tmp_path / "a", [walk()]).digest != write(tmp_path / "b", [walk(seed=1)]).digest
    assert write(tmp_path / "c", [walk()]).digest == ExpertBuffer(tmp_path / "a").digest


def test_the_summary_is_plain_json_and_counts_what_is_there(made):
    summary = json.loads(json.dumps(ExpertBuffer(made).summary()))
    assert summary["experts"] == 3 and summary["epochs"] == [4, 6] and summary["dataset"] == "toy"
    assert summary["bytes"] == sum(path.stat().st_size for path in made.glob("*.safetensors"))
    assert summary["accuracy"] == pytest.approx((4 / 5 + 5 / 6 + 6 / 7) / 3)
    assert summary["recipe"] == RECIPE and summary["preprocessing"] == "standard"


def test_few_files_stay_open_however_many_are_read(made, monkeypatch):
    monkeypatch.setattr("expert_buffers.store.HANDLES", 2)
    buffer = ExpertBuffer(made)
    whole = [buffer[i].params for i in range(3)]
    assert len(buffer._handles) == 2
    assert all(torch.equal(buffer.rows(i, [1])[0][0], whole[i][1]) for i in (0, 2, 1, 0))
