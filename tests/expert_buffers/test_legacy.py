"""Released replay buffers are read as they are, or refused by name; nothing in a hostile file runs."""

import math
import os
import pickle
import zipfile

import pytest
import torch
from torch import nn
from toy_experts import BATCH, NET, SPEC, head, walk

from ddengine.errors import ArtefactError, UsageError
from ddengine.nets import build
from ddengine.rng import Rng
from expert_buffers import ExpertBuffer, ParamSpec, legacy
from expert_buffers.legacy import convert, order_of_use, read_replay_buffer
from expert_buffers.store import open_for_writing, save_expert

NETWORK = build(NET, SPEC.shape, 5, Rng(0).torch("weights"))
OURS = ParamSpec.of(NETWORK)
LAYOUT = order_of_use(NETWORK, SPEC.shape)


def released(seed, epochs=3):
    """An expert as released: a list of checkpoints, each a list of tensors; and its rows [t p] as ours."""
    rows = walk(NET, epochs, seed)[0]
    named = [OURS.unflatten(row) for row in rows]
    return [[found[name].clone() for name in LAYOUT.names] for found in named], rows


def as_released(rows):
    return torch.stack([LAYOUT.flatten(OURS.unflatten(row)) for row in rows])


def released_network():
    """The network as its publications build it: one sequence of layers, then a linear one."""
    layers = []
    for channels, padding in ((1, 1), (3, 1)):
        layers += [nn.Conv2d(channels, 3, 3, padding=padding), nn.GroupNorm(3, 3, affine=True)]
        layers += [nn.ReLU(), nn.AvgPool2d(2, 2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(3 * 2 * 2, 5))


def test_an_imported_expert_computes_what_the_released_network_does(tmp_path, path):
    theirs, x = released_network(), torch.randn(7, *SPEC.shape, generator=torch.Generator().manual_seed(3))
    steps, logits = [], []
    for t in range(3):
        with torch.no_grad():
            for number, p in enumerate(theirs.parameters()):
                p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(100 * t + number)))
            logits.append(theirs(x))
        steps.append([p.detach().clone() for p in theirs.parameters()])
    made = convert([saved(path, [steps])], tmp_path / "out", spec=SPEC, network=NET, encoding="fp32")
    for t in range(3):
        with torch.no_grad():
            assert torch.allclose(made.build(0, t)(x), logits[t], atol=1e-5)
    assert LAYOUT.names[:4] == ("convs.0.weight", "convs.0.bias", "norms.0.weight", "norms.0.bias")
    assert sorted(LAYOUT.names) == sorted(OURS.names) and LAYOUT.names != OURS.names


def saved(path, content, **options):
    torch.save(content, path, **options)
    return path


@pytest.fixture
def path(tmp_path):
    return tmp_path / "replay_buffer_0.pt"


def refused(path, said, **options):
    with pytest.raises(ArtefactError, match=said) as raised:
        read_replay_buffer(path, LAYOUT, **options)
    assert str(path) in raised.value.cause and "\n" not in raised.value.cause


def test_experts_are_read_in_order_with_all_their_checkpoints(path):
    experts = [released(seed, epochs) for seed, epochs in ((0, 3), (1, 1), (2, 5))]
    found = read_replay_buffer(saved(path, [expert for expert, _ in experts]), LAYOUT)
    assert [len(rows) for rows in found] == [4, 2, 6]
    pairs = zip(found, experts, strict=True)
    assert all(torch.equal(rows, as_released(exact)) for rows, (_, exact) in pairs)


def test_rows_do_not_depend_on_the_file_once_read(path):
    expert, rows = released(0)
    (found,) = read_replay_buffer(saved(path, [expert]), LAYOUT)
    path.write_bytes(bytes(path.stat().st_size))
    assert torch.equal(found, as_released(rows))


class Attack:
    """Makes a folder when it is unpickled."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.system, (f"mkdir {self.target}",)


def test_code_in_a_file_is_refused_by_name_and_does_not_run(path, tmp_path):
    target = tmp_path / "ran"
    saved(path, [[[Attack(target)]]])
    refused(path, "it refers to posix system")
    saved(path, [[[Attack(target)]]], pickle_protocol=4)
    refused(path, "it uses the pickle instruction STACK_GLOBAL")
    path.write_bytes(pickle.dumps([Attack(target)], 2))
    refused(path, "it is not a zip archive")
    assert not target.exists()
    torch.load(saved(path, Attack(target)), weights_only=False)
    assert target.exists()  # the attack is a real one


def test_a_file_of_the_old_format_is_refused(path):
    refused(saved(path, [released(0)[0]], _use_new_zipfile_serialization=False), "it is not a zip archive")


def repacked(path, change):
    """The file at `path`, its members passed through `change(name, data)` -> name, data, compression."""
    with zipfile.ZipFile(path) as old:
        members = [(name, old.read(name)) for name in old.namelist()]
    with zipfile.ZipFile(path, "w") as new:
        for name, content in members:
            changed, data, compression = change(name, content)
            new.writestr(changed, data, compression)
    return path


STORED, DEFLATED = zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED
REPACKED = {
    "a member is compressed": lambda n, d: (n, d, DEFLATED if n.endswith("data.pkl") else STORED),
    "a member lies outside": lambda n, d: (n.replace("data/0", "../0"), d, STORED),
    "no replay buffer.*: .*data.pkl": lambda n, d: (n.replace("data.pkl", "other.pkl"), d, STORED),
}


@pytest.mark.parametrize("said", REPACKED)
def test_archives_that_torch_does_not_write_are_refused(path, said):
    saved(path, [released(0)[0]])
    refused(repacked(path, REPACKED[said]), said)


def test_members_that_claim_more_than_the_file_holds_are_refused(path):
    saved(path, [released(0)[0]])
    whole = bytearray(path.read_bytes())
    entry = whole.rindex(b"PK\x01\x02")  # the last of the central directory: both of its sizes
    whole[entry + 20 : entry + 28] = 2 * (2**30).to_bytes(4, "little")
    path.write_bytes(whole)
    refused(path, "no replay buffer")


def test_a_member_name_that_comes_twice_is_refused(path):
    saved(path, [released(0)[0]])
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(path, "a") as archive:
        archive.writestr(archive.namelist()[0], b"")
    refused(path, "its table of members")


@pytest.mark.parametrize("part", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_a_truncated_file_is_refused(path, part):
    whole = saved(path, [released(0)[0]]).read_bytes()
    path.write_bytes(whole[: int(part * len(whole))])
    refused(path, "no replay buffer")


def test_a_file_larger_than_the_limit_or_none_at_all_is_refused(path, tmp_path):
    refused(path, "cannot read")
    saved(path, [released(0)[0]])
    refused(path, "more than 100", limit=100)
    link = tmp_path / "link.pt"
    link.symlink_to(path)
    refused(link, "not a regular file")


def with_last(change):
    """An expert whose last checkpoint is changed."""
    expert, _ = released(0)
    return [*expert[:-1], change(expert[-1])]


def expanded(row):
    return [torch.zeros(1).expand(2**20, 2**20), *row[1:]]


def loose(row):
    """Right shapes over one number."""
    return [torch.zeros(()).expand(p.shape) for p in row]


WRONG = {
    "it is not a list of experts": lambda: {"experts": released(0)[0]},
    "is not a list of experts": list,
    "expert 0 is not a list of two or more": lambda: [released(0)[0][:1]],
    "expert 1 is not a list of two": lambda: [released(0)[0], torch.zeros(3)],
    "checkpoint 0 of expert 0 is not a list of tensors": lambda: [[[1, 2], [3, 4]]],
    "checkpoint 3 of expert 0 is not a list": lambda: [with_last(tuple)],
    "has 9 tensors where the network has 10": lambda: [with_last(lambda row: row[1:])],
    r"has shape \[9, 1, 3, 1\] where .*weight has \[3, 1, 3, 3\]": lambda: [
        with_last(lambda row: [row[0].reshape(9, 1, 3, 1), *row[1:]])
    ],
    "refers to torch DoubleStorage": lambda: [with_last(lambda row: [row[0].double(), *row[1:]])],
    "refers to torch._utils _rebuild_parameter": lambda: [
        with_last(lambda row: [torch.nn.Parameter(row[0]), *row[1:]])
    ],
    "expert 0 is not finite": lambda: [with_last(lambda row: [*row[:-1], row[-1] * math.nan])],
    r"has shape \[1048576, 1048576\]": lambda: [with_last(expanded)],
    "not float32 in storage of its own size": lambda: [with_last(loose)],
    "checkpoint 1 of expert 0 equals the one before: .*released scripts": lambda: [[released(0)[0][0]] * 51],
    "checkpoint 3 of expert 0 equals": lambda: [[*released(0, 2)[0], released(0, 2)[0][-1]]],
    "checkpoints share storage": lambda: [released(0, 1)[0] * 300],
}


@pytest.mark.parametrize("said", WRONG)
def test_content_that_is_no_trajectory_of_this_network_is_refused(path, said):
    refused(saved(path, WRONG[said]()), said)


def test_storage_beyond_the_file_is_never_read(path):
    """The table of tensors says that a storage of a few numbers has millions."""
    saved(path, [released(0)[0]])
    size = LAYOUT.sizes[0]

    def lie(name, content):
        if name.endswith("data.pkl"):
            told = b"K" + bytes([size]) + b"t"  # BININT1 size, end of the storage's description
            assert told in content
            content = content.replace(told, b"J" + (2**30).to_bytes(4, "little") + b"t")
        return name, content, zipfile.ZIP_STORED

    before = path.read_bytes()
    repacked(path, lie)
    assert path.read_bytes() != before
    try:
        (rows,) = read_replay_buffer(path, LAYOUT)
    except ArtefactError as error:
        assert str(path) in error.cause
    else:
        assert torch.equal(rows, as_released(released(0)[1]))


def test_flipped_bits_never_do_more_than_raise_an_artefact_error(path):
    whole = saved(path, [released(0, 1)[0]]).read_bytes()
    generator = torch.Generator().manual_seed(0)
    outcomes = set()
    for place in torch.randint(len(whole), (150,), generator=generator).tolist():
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        try:
            (rows,) = read_replay_buffer(path, LAYOUT)
            outcomes.add(rows.shape == (2, sum(LAYOUT.sizes)) and bool(rows.isfinite().all()))
        except ArtefactError as error:
            outcomes.add(str(path) in error.cause)
    assert outcomes == {True}


@pytest.mark.parametrize("encoding", ["delta16", "fp32"])
def test_an_imported_buffer_is_one_of_ours(tmp_path, encoding):
    paths = [
        saved(tmp_path / f"replay_buffer_{i}.pt", [released(2 * i + j)[0] for j in (0, 1)]) for i in (0, 1)
    ]
    origin = {"name": "toy"}
    buffer = convert(paths, tmp_path / "out", spec=SPEC, network=NET, origin=origin, encoding=encoding)
    assert len(buffer) == 4 and buffer.verify() and buffer.matching(NET) == [0, 1, 2, 3]
    for i in range(4):
        exact, found = released(i)[1], buffer[i]
        error = (found.params - exact).abs().max() / (exact - exact[0]).abs().max()
        assert error == 0 if encoding == "fp32" else error < 2.0**-10
        assert found.loss.shape == found.accuracy.shape == (0,) and found.stats.shape == (4, 0)
    buffer.check(SPEC, NET)
    summary = buffer.summary()
    assert summary["accuracy"] is None and summary["plan"] == {"count": 4, "epochs": 3}
    assert summary["recipe"]["name"] == "imported"
    assert summary["recipe"]["files"] == ["replay_buffer_0.pt", "replay_buffer_1.pt"]
    assert buffer.manifest["experts"]["0"]["loss"] is None and buffer.manifest["origin"] == origin


def test_an_import_that_was_cut_off_goes_on(tmp_path, monkeypatch):
    paths = [saved(tmp_path / f"replay_buffer_{i}.pt", [released(i)[0]]) for i in (0, 1)]
    whole = convert(paths, tmp_path / "whole", spec=SPEC, network=NET)
    with monkeypatch.context() as patch:
        calls = iter([save_expert])
        patch.setattr(legacy, "save_expert", lambda *words: next(calls)(*words))
        with pytest.raises(StopIteration):
            convert(paths, tmp_path / "out", spec=SPEC, network=NET)
    assert len(ExpertBuffer(tmp_path / "out")) == 1
    before = (tmp_path / "out" / "expert_00000.safetensors").stat().st_mtime_ns
    assert convert(paths, tmp_path / "out", spec=SPEC, network=NET).digest == whole.digest
    assert (tmp_path / "out" / "expert_00000.safetensors").stat().st_mtime_ns == before


def test_an_import_of_other_files_is_another_buffer(tmp_path, path):
    convert([saved(path, [released(0)[0]])], tmp_path / "out", spec=SPEC, network=NET)
    saved(path, [released(7)[0]])
    with pytest.raises(UsageError, match="holds another buffer: recipe.sha256"):
        convert([path], tmp_path / "out", spec=SPEC, network=NET)


def test_an_imported_buffer_is_not_continued_by_a_recording(tmp_path, path):
    convert([saved(path, [released(0)[0]])], tmp_path / "out", spec=SPEC, network=NET)
    with pytest.raises(UsageError, match="recipe.name is imported there and mtt here"):
        open_for_writing(tmp_path / "out", head(seed=0))


def test_networks_with_batch_norm_cannot_be_imported(tmp_path, path):
    saved(path, [released(0)[0]])
    with pytest.raises(UsageError, match="no batch-norm statistics\nGive a network without batch norm"):
        convert([path], tmp_path / "out", spec=SPEC, network=BATCH)
    assert not (tmp_path / "out").exists()
