import copy
import io
import os
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ddengine import data
from ddengine.data import image_folder, index
from ddengine.data.disk import DiskPixels, Reader
from ddengine.errors import UsageError
from ddengine.judge import evaluate
from ddengine.kept import content
from ddengine.loop import distill
from ddengine.nets.core import NetSpec
from ddengine.ops.batches import resident
from ddengine.rng import Rng
from ddengine.train import Recipe
from ddengine.types import Budget, Task
from expert_buffers import record
from matchers import make
from matchers.subset import SELECTIONS
from matchers.target_bank import data_facts
from synth import DistilledSet
from synth.subset import Subset

CLASSES, EACH = 23, 7


def tree(root, classes=CLASSES, each=EACH, mode="RGB", sizes=((11, 5), (7, 13), (9, 9))):
    """Class folders of noise in PNG and JPEG files of several sizes."""
    draw = np.random.default_rng(classes * each)
    for c in range(classes):
        folder = root / f"class {c:02d}"
        folder.mkdir(parents=True)
        for i in range(each):
            w, h = sizes[(c + i) % len(sizes)]
            made = Image.fromarray(draw.integers(0, 256, (h, w, 3), dtype=np.uint8)).convert(mode)
            made.save(folder / f"{i}.{('png', 'jpg')[i % 2]}")
    return root


def load(root, memory, **options):
    return data.load("image_folder", root=root, memory=memory, **{"size": 6, **options})


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tree(tmp_path_factory.mktemp("tree"))


@pytest.fixture(scope="module")
def both(root):
    return load(root, "ram"), load(root, "disk")


def parts(dataset):
    return dataset.fit, dataset.validation, dataset.test


def same(ram, disk):
    """Whether two datasets agree in all that they hold."""
    pairs = zip(parts(ram), parts(disk), strict=True)
    return ram.spec == disk.spec and all(torch.equal(a.x, b.x[:]) and torch.equal(a.y, b.y) for a, b in pairs)


def test_the_parts_lie_on_disk_and_are_those_of_the_set_in_memory(both):
    ram, disk = both
    assert all(isinstance(part.x, DiskPixels) for part in parts(disk))
    assert all(type(part.x) is torch.Tensor for part in parts(ram))
    assert same(ram, disk)
    assert [sum(part.counts) for part in parts(disk)] == [115, 23, 23]


@pytest.mark.parametrize("given", ["train test", "train val", "train val test"])
def test_official_parts_are_those_of_the_set_in_memory(tmp_path, given):
    for number, part in enumerate(given.split()):
        tree(tmp_path / part, 3, 5 + 2 * number)
    assert same(load(tmp_path, "ram"), load(tmp_path, "disk"))


@pytest.mark.parametrize("colour", [0, 11, 20])
def test_one_colour_file_among_grey_ones_makes_all_colour(tmp_path, colour):
    tree(tmp_path, 3, 7, "L")
    assert load(tmp_path, "disk").spec.shape == (1, 6, 6)
    path = sorted(tmp_path.glob("*/*"))[colour]
    Image.fromarray(np.random.default_rng(5).integers(0, 256, (9, 8, 3), dtype=np.uint8)).save(path)
    ram, disk = load(tmp_path, "ram"), load(tmp_path, "disk")
    assert disk.spec.shape == (3, 6, 6)
    assert same(ram, disk)


def test_equal_images_and_a_constant_channel_are_as_in_memory(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        for i in range(5):
            Image.new("RGB", (6, 6), (40 * (i // 2), 7, i % 2)).save(tmp_path / name / f"{i}.png")
    ram, disk = load(tmp_path, "ram"), load(tmp_path, "disk")
    assert same(ram, disk)
    assert "channel 1 is constant" in disk.notes[0]
    assert disk.notes[:-1] == ram.notes


def test_all_sampling_calls_give_the_bits_of_the_set_in_memory(both):
    ram, disk = (dataset.fit for dataset in both)
    drawn = [images.draw(Rng(3).torch("draw"), [22, 0, 5], 3) for images in (ram, disk)]
    pick = torch.cat(drawn[1])
    assert torch.equal(torch.cat(drawn[0]), pick)
    assert torch.equal(ram.model_input(pick), disk.model_input(pick))
    assert torch.equal(ram.model_input(slice(31, 67)), disk.model_input(slice(31, 67)))
    assert torch.equal(ram.take(pick).x, disk.take(pick).x)
    assert torch.equal(ram.take(pick).y, disk.take(pick).y)
    for where in (4, -1, slice(None, None, 3), ram.y == 7, [5, 5, 2], pick.int(), torch.zeros(0).long()):
        assert torch.equal(ram.x[where], disk.x[where]), where
    assert torch.equal(torch.cat(list(ram.x.split(29))), torch.cat(list(disk.x.split(29))))
    assert (len(disk), disk.counts, disk.x.dtype) == (len(ram), ram.counts, torch.uint8)
    assert disk.sorted_by_class() is disk
    assert content(ram) == content(disk)


@pytest.mark.parametrize("name", sorted(SELECTIONS))
def test_selections_are_those_of_the_set_in_memory(both, name):
    ram, disk = (SELECTIONS[name](dataset.fit, 2, Rng(1)) for dataset in both)
    assert torch.equal(ram, disk)


@pytest.mark.parametrize("name", ["attention", "distribution", "random"])
def test_matchers_make_the_same_set_from_disk(root, name):
    options = {} if name == "random" else {"steps": 2, "real_per_class": 3, "chunk": 11}
    network = None if name == "random" else NetSpec("convnet", 4, 1)
    matcher, found = make(name, network, **options), []
    for dataset in (load(root, "ram", size=8), load(root, "disk", size=8)):
        task, rng = Task(dataset.fit, Budget(ipc=1)), Rng(2)
        work, state = matcher.prepare(task, rng), matcher.init(task, rng)
        for _ in range(matcher.steps(task)):
            state, _ = matcher.step(state, work, rng)
        found.append(matcher.finish(state, work, rng).decode())
    assert torch.equal(found[0].x, found[1].x)


@pytest.mark.parametrize("ask", [
    lambda x: x.float(), lambda x: x + 1, lambda x: torch.cat([x, x]), lambda x: x.numpy(),
    lambda x: x[:, 0], lambda x: x.to(torch.float32), lambda x: x.split(1, dim=1), lambda x: x.mean(),
])  # fmt: skip
def test_what_needs_all_images_is_refused_in_one_line(both, ask):
    with pytest.raises(UsageError, match=r"needs all 115 images in memory \(12420 bytes\)") as error:
        ask(both[1].fit.x)
    assert "dataset.memory=ram" in error.value.remedy
    assert "\n" not in error.value.cause


def test_whitening_is_refused_before_anything_is_computed(root):
    with pytest.raises(UsageError, match="zca needs all 115 images in memory"):
        load(root, "disk", preprocessing="zca")


def test_a_large_part_stays_on_disk_and_a_small_one_is_read(both, monkeypatch):
    fit = both[1].fit
    pick = torch.arange(0, 115, 2)
    monkeypatch.setattr("ddengine.data.disk.TAKEN", len(pick) * 108)
    assert type(fit.take(pick).x) is torch.Tensor
    monkeypatch.setattr("ddengine.data.disk.TAKEN", len(pick) * 108 - 1)
    kept = fit.take(pick)
    assert isinstance(kept.x, DiskPixels)
    assert torch.equal(kept.x[:], fit.x[pick])
    assert torch.equal(kept.take(torch.tensor([3, 1])).x, fit.x[pick[[3, 1]]])
    chosen = fit.x.chosen(pick)  # however few
    assert isinstance(chosen, DiskPixels) and torch.equal(chosen[:], fit.x[pick])


def test_a_bank_knows_images_on_disk_by_the_index_of_their_files(root, tmp_path, monkeypatch):
    monkeypatch.setenv("DDENGINE_CACHE", str(tmp_path / "cache"))
    fit, some = load(root, "disk", size=9).fit, torch.arange(0, 115, 2)
    facts = data_facts(fit)
    assert facts == data_facts(load(root, "disk", size=9).fit)
    assert facts != data_facts(replace(fit, x=fit.x.chosen(some), y=fit.y[some]))
    assert facts != data_facts(load(root, "disk").fit)
    matcher = make("distribution", NetSpec(width=2, depth=1), steps=3, real_per_class=5, bank="on")
    assert distill(Task(fit, Budget(1)), matcher).steps == 3
    assert list((tmp_path / "cache" / "bank").glob("*.safetensors"))


def test_copies_moves_and_other_processes_read_the_same_files(both):
    fit = both[1].fit
    expected = fit.x[10:14]
    for other in (pickle.loads(pickle.dumps(fit.x)), copy.deepcopy(fit.x), fit.x.to("cpu"), fit.x.detach()):
        assert torch.equal(other[10:14], expected)
    assert fit.x.share_memory_() is fit.x
    assert "DiskPixels" in repr(fit)
    assert fit.x.to("meta").device.type == "meta"
    assert torch.equal(resident(fit, torch.device("cpu")).x[10:14], expected)
    reading, writing = os.pipe()
    if os.fork() == 0:
        os.write(writing, fit.x[10:14].numpy().tobytes())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        assert pipe.read() == expected.numpy().tobytes()


def test_a_reader_keeps_no_more_than_it_may(root):
    paths = [str(path) for path in sorted(root.glob("*/*"))]
    reader = Reader(paths, (3, 6, 6), 6, held=20 * 108)
    whole = np.concatenate([reader.read(np.array([i])) for i in range(len(paths))])
    order = np.random.default_rng(0).permutation(len(paths))
    for _ in range(3):
        reader.ahead(order)
        for piece in np.array_split(order, 11):
            assert np.array_equal(reader.read(piece), whole[piece])
            assert len(reader._kept) <= 10
            assert len(reader._coming) <= 10


def test_what_was_drawn_is_decoded_before_it_is_asked_for(root, monkeypatch):
    fit = load(root, "disk").fit
    picks = torch.cat(fit.draw(Rng(0).torch("draw"), range(CLASSES), 2))
    for future in list(fit.x.reader._coming.values()):
        future.result()
    monkeypatch.setattr("ddengine.data.disk.attempt", lambda path, size: "asked for again")
    assert len(fit.x[picks]) == 46


def test_a_slice_brings_the_next_one(root, monkeypatch):
    fit = load(root, "disk").fit
    first = fit.x[0:9]
    for future in list(fit.x.reader._coming.values()):
        future.result()
    monkeypatch.setattr("ddengine.data.disk.attempt", lambda path, size: "asked for again")
    assert len(first) == len(fit.x[9:18]) == 9
    with pytest.raises(UsageError, match="asked for again"):
        fit.x[60]


def test_a_file_that_changed_under_the_command_is_named(tmp_path):
    fit = load(tree(tmp_path, 2, 5), "disk").fit
    path = Path(fit.x.reader.paths[fit.x.rows[2]])
    path.write_bytes(b"no image")
    with pytest.raises(UsageError, match=f"cannot read the image {path}") as error:
        fit.x[2]
    assert "changed since the command began" in error.value.remedy
    assert len(fit.x[0:2]) == 2


# --- the index


def test_a_second_start_decodes_nothing(tmp_path, monkeypatch):
    first = load(tree(tmp_path, 5, 7), "disk")
    monkeypatch.setattr(index, "attempt", lambda path, size: pytest.fail(f"decoded {path}"))
    again = load(tmp_path, "disk")
    assert again.spec == first.spec
    assert [part.x.rows.tolist() for part in parts(again)] == [part.x.rows.tolist() for part in parts(first)]
    assert again.notes == first.notes


@pytest.mark.parametrize("change", ["content", "time", "added", "removed", "renamed", "size", "class"])
def test_any_change_of_the_files_is_seen(tmp_path, change):
    tree(tmp_path, 3, 7)
    before = load(tmp_path, "disk")
    path = sorted(tmp_path.glob("*/*.png"))[4]
    if change == "content":
        Image.new("RGB", (9, 9), (1, 2, 3)).save(path)
    elif change == "time":
        stamp = path.stat().st_mtime_ns
        whole = io.BytesIO(path.read_bytes())
        Image.open(whole).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(path)
        os.utime(path, ns=(stamp + 10**9, stamp + 10**9))
    elif change == "added":
        Image.new("RGB", (9, 9), (1, 2, 3)).save(path.parent / "more.png")
    elif change == "removed":
        path.unlink()
    elif change == "renamed":
        path.rename(path.parent / "zz.png")
    elif change == "class":
        path.rename(tmp_path / "class 02" / "zz.png")
    size = 5 if change == "size" else 6
    ram, disk = load(tmp_path, "ram", size=size), load(tmp_path, "disk", size=size)
    assert same(ram, disk)
    assert (disk.spec == before.spec) == (change == "renamed")


def _kept_files():
    folder = index.index_folder()
    newest = max(folder.glob("*.json"), key=lambda path: path.stat().st_mtime_ns)
    return newest, newest.with_suffix(".safetensors")


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("damage", ["torn", "flipped", "empty", "gone"])
def test_a_damaged_index_is_made_anew(tmp_path, which, damage):
    first = load(tree(tmp_path, 2, 5), "disk")
    path = _kept_files()[which]
    whole = path.read_bytes()
    place = len(whole) - 20
    bad = {"torn": whole[:place], "empty": b"", "flipped": whole[:place] + b"~~~" + whole[place + 3 :]}
    path.unlink() if damage == "gone" else path.write_bytes(bad[damage])
    again = load(tmp_path, "disk")
    assert same(load(tmp_path, "ram"), again)
    assert again.spec == first.spec
    assert path.read_bytes() == whole


def test_without_a_place_for_it_the_index_is_made_each_time(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DDENGINE_CACHE", str(tmp_path / "file"))
    tree(tmp_path / "tree", 2, 5)
    assert same(load(tmp_path / "tree", "ram"), load(tmp_path / "tree", "disk"))


def test_the_index_lies_in_the_users_cache_by_default(monkeypatch, tmp_path):
    monkeypatch.delenv("DDENGINE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert index.index_folder() == tmp_path / "ddengine" / "index"


# --- damage and refusals


def test_unreadable_files_are_left_out_as_in_memory(tmp_path):
    tree(tmp_path, 3, 7)
    names = sorted(tmp_path.glob("*/*"))
    for number in (0, 8, 13):
        names[number].write_bytes(b"damaged")
    ram, disk = load(tmp_path, "ram", on_error="skip"), load(tmp_path, "disk", on_error="skip")
    assert same(ram, disk)
    assert disk.skipped == ram.skipped == 3
    assert disk.notes[0] == ram.notes[0]
    again = load(tmp_path, "disk", on_error="skip")
    assert again.notes == disk.notes


@pytest.mark.parametrize("memory", ["ram", "disk"])
def test_an_unreadable_file_stops_the_load(tmp_path, memory):
    path = sorted(tree(tmp_path, 3, 7).glob("*/*"))[8]
    path.write_bytes(b"damaged")
    with pytest.raises(UsageError, match=f"cannot read the image {path}") as error:
        load(tmp_path, memory)
    assert "dataset.on_error=skip" in error.value.remedy


@pytest.mark.parametrize("memory", ["ram", "disk"])
def test_several_sizes_need_one_to_be_given(tmp_path, memory):
    with pytest.raises(UsageError, match="images of several sizes"):
        load(tree(tmp_path, 3, 7), memory, size=None)


def test_one_size_needs_none(tmp_path):
    tree(tmp_path, 3, 5, sizes=((7, 5),))
    ram, disk = load(tmp_path, "ram", size=None), load(tmp_path, "disk", size=None)
    assert disk.spec.shape == (3, 5, 7)
    assert same(ram, disk)


@pytest.mark.parametrize("memory", ["ram", "disk"])
def test_a_class_without_a_readable_file_is_named(tmp_path, memory):
    for path in sorted(tree(tmp_path, 3, 4).glob("class 01/*")):
        path.write_bytes(b"damaged")
    with pytest.raises(UsageError, match="class 'class 01' of image_folder has no training image"):
        load(tmp_path, memory, on_error="skip")


@pytest.mark.parametrize("memory", ["ram", "disk"])
def test_a_folder_without_a_readable_file_is_refused(tmp_path, memory):
    for path in sorted(tree(tmp_path, 2, 3).glob("*/*")):
        path.write_bytes(b"damaged")
    with pytest.raises(UsageError, match="none of the 6 image files can be read"):
        load(tmp_path, memory, on_error="skip")


def test_sets_that_are_no_folder_of_files_cannot_stay_on_disk():
    with pytest.raises(UsageError, match="dataset=digits cannot stay on disk"):
        data.load("digits", memory="disk")


def test_where_images_lie_is_one_of_three_words():
    with pytest.raises(UsageError, match="unknown dataset.memory 'gpu'"):
        data.load("digits", memory="gpu")


def test_a_set_stays_on_disk_by_itself_where_memory_is_short(root, monkeypatch):
    need = CLASSES * EACH * 108 * image_folder.SHARE
    monkeypatch.setattr(image_folder, "available_memory", lambda: need)
    assert type(load(root, "auto").fit.x) is torch.Tensor
    monkeypatch.setattr(image_folder, "available_memory", lambda: need - 1)
    assert isinstance(load(root, "auto").fit.x, DiskPixels)
    assert type(load(root, "ram").fit.x) is torch.Tensor


# --- judge and experts


def test_the_judge_comes_to_the_same_numbers(root):
    network, tables = NetSpec("convnet", 3, 1), []
    recipe = Recipe(steps=2, lrs=(0.1,), batch_size=31, augment="none")
    for memory in ("ram", "disk"):
        dataset = load(root, memory, size=8)
        picked = Subset.of(dataset.fit, torch.arange(0, 115, 5))
        made = DistilledSet.make(picked, recipe={"protocol": "standard-v1"}, provenance={})
        table = evaluate(
            made, dataset, networks=[network], seeds=1, rows=("random", "herding", "full"), recipe=recipe
        )
        tables.append([(row.name, row.values, row.trials, row.nbytes) for row in table.rows])
    assert tables[0] == tables[1]
    assert [row[0] for row in tables[0]] == ["distilled", "random", "herding", "full"]


def test_experts_are_the_same(root, tmp_path):
    made = []
    for memory in ("ram", "disk"):
        fit = load(root, memory, size=8).fit
        network = NetSpec("convnet", 3, 1)
        made.append(record(fit, network, tmp_path / memory, count=1, epochs=1, expert_epochs=1))
    assert made[0].digest == made[1].digest
