"""Sets that other tools wrote are read in their exact layouts, value by value, or refused by name."""

import hashlib
import zipfile
from dataclasses import replace

import numpy as np
import pytest
import torch
from foreign_sets import Attack, class_folders, dm, mtt, repacked, sre2l
from PIL import Image

from ddengine.errors import ArtefactError, DDError, UsageError
from ddengine.rng import Rng
from ddengine.types import Whitening
from synth import DistilledSet
from synth.foreign import FORMATS, as_distilled, read_foreign
from synth.foreign_space import infer_space

SHAPE, K, IPC = (3, 7, 5), 5, 2
STORED, DEFLATED = zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED


def normal(*shape, seed=0):
    return torch.randn(shape, generator=Rng(seed).torch("images"))


IMAGES, LABELS = normal(K * IPC, *SHAPE), torch.arange(K).repeat_interleave(IPC)
PIXELS = torch.randint(0, 256, (K * IPC, *SHAPE), generator=Rng(1).torch("p"), dtype=torch.uint8)


def by_hand(pixels, spec):
    """(pixel / 255 - mean) / std in float64, channel by channel."""
    out = pixels.double() / 255
    for c in range(len(spec.mean)):
        out[:, c] = (out[:, c] - spec.mean[c]) / spec.std[c]
    return out


def whitened(spec):
    g, d = Rng(2).torch("zca"), 3 * 7 * 5
    matrix = torch.eye(d) + 0.01 * torch.randn((d, d), generator=g)
    return replace(spec, zca=Whitening(torch.rand(d, generator=g), matrix, matrix.inverse()))


@pytest.mark.parametrize("given", ["images", "both", "folder"])
def test_mtt_is_read_from_its_images_both_files_or_their_folder(tmp_path, spec, given):
    path = mtt(tmp_path / "run", IMAGES, LABELS.flip(0))
    mtt(tmp_path / "run", IMAGES * 2, LABELS, step=5000)
    labels = path.with_name("labels_best.pt")
    paths = {"images": [path], "both": [labels, path], "folder": [path.parent]}[given]
    found = read_foreign(paths, "mtt", spec)
    assert torch.equal(found.images.x, IMAGES) and torch.equal(found.images.y, LABELS.flip(0))
    assert found.images.y_kind == "class" and found.student_lr is None
    assert found.files == {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in (path, labels)
    }
    assert any("of 2 sets" in note and "images_best.pt" in note for note in found.notes) == (
        given == "folder"
    )


def test_of_a_folder_without_a_best_set_the_last_iteration_is_taken(tmp_path, spec):
    for number in (900, 5000, 1000):
        mtt(tmp_path, IMAGES * number, LABELS, step=number)
    assert torch.equal(read_foreign([tmp_path], "mtt", spec).images.x, IMAGES * 5000)


def test_soft_labels_and_the_learned_rate_come_with_a_set(tmp_path, spec):
    logits = normal(K * IPC, K, seed=3).requires_grad_()
    path = mtt(tmp_path, IMAGES, logits, lr=0.0321)
    found = read_foreign([path], "tesla", spec)
    assert found.images.y_kind == "logit" and torch.equal(found.images.y, logits.detach())
    assert found.student_lr == pytest.approx(0.0321, rel=1e-6) and set(found.files) == {
        "images_best.pt", "labels_best.pt", "lr_best.pt",
    }  # fmt: skip
    path = mtt(tmp_path, IMAGES, logits.detach().softmax(1))
    found = read_foreign([path], "tesla", spec, lr=0.5)
    assert found.images.y_kind == "prob" and found.student_lr == 0.5
    assert any("not the 0.0321" in note for note in found.notes)


def test_without_labels_images_are_taken_class_by_class_or_refused(tmp_path, spec):
    path = mtt(tmp_path, IMAGES, LABELS)
    path.with_name("labels_best.pt").unlink()
    found = read_foreign([path], "mtt", spec)
    assert found.images.y.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert any("without a labels file" in note for note in found.notes)
    torch.save(IMAGES[:7], path)
    with pytest.raises(UsageError, match="no labels file .* 7 images .* 5 classes"):
        read_foreign([path], "mtt", spec)


def test_images_that_mtt_brought_back_from_zca_are_pixels(tmp_path, spec):
    path = mtt(tmp_path, IMAGES, LABELS, step=100)
    back = PIXELS / 255 * 1.2 - 0.1
    torch.save(back, tmp_path / "images_zca_100.pt")
    found = read_foreign([tmp_path / "images_zca_100.pt"], "mtt", spec)
    assert torch.allclose(found.images.x.double(), by_hand(back * 255, spec), atol=1e-5)
    assert torch.equal(found.images.y, LABELS) and any("not clamped" in note for note in found.notes)
    assert torch.equal(read_foreign([path.parent], "mtt", spec).images.x, IMAGES)


@pytest.mark.parametrize("format", ["dm", "datadam"])
@pytest.mark.parametrize("experiment", [None, 0, 2])
def test_dm_is_read_with_its_numpy_accuracies(tmp_path, spec, format, experiment):
    path = dm(tmp_path, [(normal(K * IPC, *SHAPE, seed=s), LABELS) for s in range(3)])
    found = read_foreign([path], format, spec, experiment=experiment)
    assert torch.equal(found.images.x, normal(K * IPC, *SHAPE, seed=2 if experiment is None else experiment))
    assert torch.equal(found.images.y, LABELS) and any("holds 3 experiments" in note for note in found.notes)


def test_an_experiment_that_is_not_there_is_a_usage_error(tmp_path, spec):
    path = dm(tmp_path, [(IMAGES, LABELS)])
    with pytest.raises(UsageError, match="experiment=1 of .*which has 1"):
        read_foreign([path], "dm", spec, experiment=1)
    with pytest.raises(UsageError, match="experiment=1 is for"):
        read_foreign([mtt(tmp_path, IMAGES, LABELS)], "mtt", spec, experiment=1)


def test_sre2l_folders_are_read_by_number_as_pillow_decodes_them(tmp_path, spec):
    folder = sre2l(tmp_path / "syn", PIXELS / 255, LABELS)
    found = read_foreign([folder], "sre2l", spec)
    files = sorted(folder.rglob("*.jpg"))
    pixels = np.stack([np.asarray(Image.open(file)).transpose(2, 0, 1) for file in files])
    assert torch.equal(found.images.x, spec.normalise(torch.from_numpy(pixels)))
    assert torch.allclose(found.images.x.double(), by_hand(torch.from_numpy(pixels), spec), atol=1e-5)
    assert found.images.y.tolist() == LABELS.tolist() and any("'ant'" in note for note in found.notes)


def test_image_folders_are_read_by_class_name_in_the_datasets_order(tmp_path, spec):
    other = replace(spec, classes=("zebra", "ant", "7", "bee", "elk"))
    folder = class_folders(tmp_path / "set", PIXELS, LABELS, other.classes)
    (folder / "README.md").write_text("not an image")
    found = read_foreign([folder], "imagefolder", other)
    assert torch.equal(found.images.x, other.normalise(PIXELS)) and torch.equal(found.images.y, LABELS)


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("compressed", [False, True])
def test_npz_is_read_in_its_layouts(tmp_path, spec, layout, compressed):
    x = PIXELS.numpy() if layout == "nchw" else PIXELS.numpy().transpose(0, 2, 3, 1)
    write = np.savez_compressed if compressed else np.savez
    write(tmp_path / "set.npz", x=x, y=LABELS.numpy().astype(np.uint16), student_lr=np.float32(0.25), more=x)
    found = read_foreign([tmp_path / "set.npz"], "npz", spec)
    assert torch.equal(found.images.x, spec.normalise(PIXELS)) and torch.equal(found.images.y, LABELS)
    assert found.student_lr == 0.25


def test_grey_npz_has_no_axis_of_channels(tmp_path, digits):
    x = digits.x[:20, 0].numpy()
    np.savez(tmp_path / "set.npz", x=np.asfortranarray(x), y=digits.y[:20].numpy().astype(">i4"))
    found = read_foreign([tmp_path / "set.npz"], "npz", digits.spec)
    assert torch.equal(found.images.x, digits.spec.normalise(digits.x[:20]))
    assert any("9 classes have no image, such as '1'" in note for note in found.notes)


@pytest.mark.parametrize(
    "content",
    [{"x": IMAGES, "y": LABELS}, {"images": IMAGES, "labels": LABELS}, (IMAGES, LABELS), [IMAGES, LABELS]],
)
def test_torch_is_read_as_a_table_or_a_pair(tmp_path, spec, content):
    torch.save(content, tmp_path / "set.pt")
    found = read_foreign([tmp_path / "set.pt"], "torch", spec)
    assert torch.equal(found.images.x, IMAGES) and torch.equal(found.images.y, LABELS)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_images_of_other_precisions_become_float32(tmp_path, spec, dtype):
    torch.save((IMAGES.to(dtype), LABELS.int()), tmp_path / "set.pt")
    found = read_foreign([tmp_path / "set.pt"], "torch", spec)
    assert torch.equal(found.images.x, IMAGES.to(dtype).float()) and found.images.x.dtype == torch.float32


INFERRED = [
    ((-2.1, 2.3), "normalised"),
    ((-0.3, 0.9), "normalised"),
    ((-0.01, 1.9), "normalised"),
    ((0.0, 1.0), "pixels"),
    ((0.1, 0.95), "pixels"),
    ((0.0, 0.5), None),
    ((-0.1, 1.1), None),
    ((0.0, 255.0), None),
    ((0.2, 1.2), None),
]


@pytest.mark.parametrize(("ends", "space"), INFERRED)
def test_the_space_is_told_from_the_range_or_asked_for(ends, space):
    x = torch.tensor(ends).reshape(1, 1, 1, 2)
    if space is None:
        with pytest.raises(UsageError, match="may be pixels or model input"):
            infer_space(x, False)
    else:
        assert infer_space(x, False)[0] == space
        assert infer_space(x, True)[0] == {"normalised": "zca", "pixels": "pixels"}[space]


def test_each_space_is_brought_to_model_input(tmp_path, spec):
    path, zca = tmp_path / "set.pt", whitened(spec)
    flat = (PIXELS.double() / 255).flatten(1) - zca.zca.mean.double()
    by_zca = (flat @ zca.zca.matrix.double()).reshape(PIXELS.shape)
    cases = [
        (PIXELS / 255, "pixels", spec, by_hand(PIXELS, spec)),
        (PIXELS / 255, "auto", zca, by_zca),
        (PIXELS, "auto", zca, by_zca),
        (by_hand(PIXELS, spec).float(), "normalised", zca, by_zca),
        (IMAGES, "zca", zca, IMAGES.double()),
        (IMAGES, "auto", zca, IMAGES.double()),
        (PIXELS / 255, "normalised", spec, (PIXELS / 255).double()),
    ]
    for x, space, of, expected in cases:
        torch.save((x, LABELS), path)
        found = read_foreign([path], "torch", of, space=space)
        assert torch.allclose(found.images.x.double(), expected, atol=2e-5) and found.notes
    assert any("dataset's matrix" in n for n in read_foreign([path], "torch", zca, space="zca").notes)


def test_spaces_that_cannot_be_are_usage_errors(tmp_path, spec):
    path = tmp_path / "set.pt"
    torch.save((PIXELS, LABELS), path)
    with pytest.raises(UsageError, match="uint8 pixels, which are not normalised"):
        read_foreign([path], "torch", spec, space="normalised")
    torch.save((PIXELS.float(), LABELS), path)
    with pytest.raises(UsageError, match="from 0 to 25. are no pixels in"):
        read_foreign([path], "torch", spec, space="pixels")
    with pytest.raises(UsageError, match="which is not whitened\nGive dataset.preprocessing=zca"):
        read_foreign([path], "torch", spec, space="zca")
    with pytest.raises(UsageError, match="unknown source.space 'zcaa'"):
        read_foreign([path], "torch", spec, space="zcaa")


def of_format(folder, format, images=IMAGES, labels=LABELS):
    """A set in the layout of `format`: its path."""
    if format in ("mtt", "tesla"):
        return mtt(folder, images, labels)
    if format in ("dm", "datadam"):
        return dm(folder, [(images, labels)])
    if format == "npz":
        np.savez(folder / "set.npz", x=images.numpy(), y=labels.numpy())
        return folder / "set.npz"
    if format == "torch":
        torch.save({"x": images, "y": labels}, folder / "set.pt")
        return folder / "set.pt"
    pixels = torch.full_like(images, 99, dtype=torch.uint8)
    if format == "sre2l":
        return sre2l(folder / "set", pixels / 255, labels)
    return class_folders(folder / "set", pixels, labels, tuple("abcdefg"))


@pytest.mark.parametrize("format", FORMATS)
def test_another_shape_than_the_datasets_is_refused_with_both(tmp_path, spec, format):
    named = replace(spec, classes=tuple("abcde"))
    path = of_format(tmp_path, format, images=normal(10, 3, 7, 6))
    with pytest.raises(UsageError, match=r"(\[3, 7, 6\]|6 x 7).*\[3, 7, 5\]"):
        read_foreign([path], format, named)


@pytest.mark.parametrize("format", ["mtt", "tesla", "dm", "datadam"])
def test_a_set_of_fewer_classes_is_refused_where_tools_make_all(tmp_path, spec, format):
    path = of_format(tmp_path, format, labels=LABELS.clamp(max=3))
    with pytest.raises(UsageError, match="images of 4 classes, 'small' has 5"):
        read_foreign([path], format, spec)


def test_soft_labels_of_another_number_of_classes_are_refused_with_both(tmp_path, spec):
    path = mtt(tmp_path, IMAGES, normal(10, 7))
    with pytest.raises(UsageError, match="labels of 7 classes, the dataset has 5"):
        read_foreign([path], "mtt", spec)


@pytest.mark.parametrize("format", ["sre2l", "imagefolder"])
def test_folders_of_no_class_are_refused(tmp_path, spec, format):
    folder = class_folders(tmp_path / "set", PIXELS, LABELS, ("ant", "bee", "cat", "dog", "eel"))
    with pytest.raises(UsageError, match="eel is no class of 'small', which has 5"):
        read_foreign([folder], format, spec)
    (folder / "eel").rename(folder / "new000")
    with pytest.raises(UsageError, match="two folders of one class"):
        read_foreign([folder], format, spec)


TENSORS = ("mtt", "tesla", "dm", "datadam", "torch")


@pytest.mark.parametrize("format", [*TENSORS, "npz"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_are_not_finite_are_refused(tmp_path, spec, format, bad):
    images = IMAGES.clone()
    images[3, 1, 2, 4] = bad
    with pytest.raises(ArtefactError, match="not finite"):
        read_foreign([of_format(tmp_path, format, images)], format, spec)


@pytest.mark.parametrize("format", [*TENSORS, "npz"])
@pytest.mark.parametrize("label", [-1, K, 2**40])
def test_labels_out_of_range_are_refused(tmp_path, spec, format, label):
    labels = LABELS.clone()
    labels[7] = label
    path = of_format(tmp_path, format, labels=labels)
    with pytest.raises(ArtefactError, match=r"labels lie in .* not in 0..4") as raised:
        read_foreign([path], format, spec)
    assert str(path.parent) in raised.value.cause


HOSTILE = {
    "it refers to posix system": lambda t: (IMAGES, Attack(t)),
    "no storage of their own size": lambda t: (torch.zeros(1).expand(10**6, *SHAPE), LABELS),
    "10 images and 9 labels": lambda t: (IMAGES, LABELS[:9]),
    "its images are torch.int64": lambda t: (IMAGES.long(), LABELS),
    "its images are no tensor": lambda t: ([1, 2], LABELS),
    r"the shape \[10, 105\]": lambda t: (IMAGES.flatten(1), LABELS),
    r"the shape \[0, 3, 7, 5\]": lambda t: (IMAGES[:0], LABELS[:0]),
    "its labels are torch.float32": lambda t: (IMAGES, LABELS.float()),
    "neither a table of tensors nor a pair": lambda t: (IMAGES, LABELS, 3),
    "needs one of the keys 'x' and 'images'": lambda t: {"y": LABELS},
    "needs one of the keys 'y' and 'labels'": lambda t: {"x": IMAGES, "y": LABELS, "labels": LABELS},
    "learned learning rate is not": lambda t: {"x": IMAGES, "y": LABELS, "student_lr": torch.tensor(-0.1)},
    "not of the kind 'prob'": lambda t: {"x": IMAGES, "y": IMAGES[:, 0, 0], "y_kind": "prob"},
    "kind of its labels is no text": lambda t: {"x": IMAGES, "y": IMAGES[:, 0, 0], "y_kind": ["logit"]},
    "mean, std and zca": lambda t: {"x": IMAGES, "y": LABELS, "mean": [0.1], "std": [1.0]},
    "mean, std and zca are": lambda t: {"x": IMAGES, "y": LABELS, "mean": [0.1, 0.1, float("nan")]},
    "refers to torch BoolStorage": lambda t: (IMAGES > 0, LABELS),
    "refers to torch._utils _rebuild_sparse_tensor": lambda t: (IMAGES.to_sparse(), LABELS),
}


@pytest.mark.parametrize("said", HOSTILE)
def test_hostile_and_wrong_tensors_are_refused_and_no_code_runs(tmp_path, spec, said):
    target, path = tmp_path / "ran", tmp_path / "set.pt"
    torch.save(HOSTILE[said](target), path)
    with pytest.raises(ArtefactError, match=said) as raised:
        read_foreign([path], "torch", spec)
    assert str(path) in raised.value.cause and "\n" not in raised.value.cause and not target.exists()


def test_classes_that_a_file_tells_must_be_the_datasets(tmp_path, spec):
    torch.save(
        {"x": IMAGES, "y": LABELS, "classes": ["ant", "cat", "bee", "dog", "elk"]}, tmp_path / "set.pt"
    )
    with pytest.raises(UsageError, match="not the 5 of 'small' by name and order"):
        read_foreign([tmp_path / "set.pt"], "torch", spec)


@pytest.mark.parametrize("format", TENSORS)
def test_compressed_linked_missing_and_legacy_files_are_refused(tmp_path, spec, format):
    path = of_format(tmp_path, format)
    link = tmp_path / "images_1.pt"
    link.symlink_to(path)
    for wrong, said in ((link, "not a regular file"), (tmp_path / "none.pt", "is missing")):
        with pytest.raises(ArtefactError, match=said):
            read_foreign([wrong], format, spec)
    repacked(path, lambda n, d: (n, d, DEFLATED))
    with pytest.raises(ArtefactError, match="compressed"):
        read_foreign([path], format, spec)
    torch.save((IMAGES, LABELS), path, _use_new_zipfile_serialization=False)
    with pytest.raises(ArtefactError, match="torch before 1.6: load and save it again with a newer torch"):
        read_foreign([path], format, spec)


def header(shape, descr="<f4"):
    """A .npy member that claims a shape and holds four bytes."""
    text = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode() + b"\0\0\0\0"


NPZ = {
    "in 4 bytes": lambda n, d: (n, header((2**40, 3, 7, 5)), STORED),
    "an array of": lambda n, d: (n, header((-1, -1)), STORED),
    "an array of object": lambda n, d: (n, header((1,), "|O"), STORED),
    "no arrays 'x' and 'y', nor 'images'": lambda n, d: (n.replace("x.npy", "other.npy"), d, STORED),
    "is no distilled set": lambda n, d: (n, b"\x93NUMPY\x09\x00" + d[8:], STORED),
    "is no distilled set.*magic": lambda n, d: (n, b"rubbish" * 9, STORED),
}


@pytest.mark.parametrize("said", NPZ)
def test_npz_headers_that_lie_are_refused(tmp_path, spec, said):
    path = repacked(of_format(tmp_path, "npz"), NPZ[said])
    with pytest.raises(ArtefactError, match=said):
        read_foreign([path], "npz", spec)


def test_npz_arrays_may_be_called_images_and_labels(tmp_path, spec):
    np.savez(tmp_path / "ours.npz", x=IMAGES.numpy(), y=LABELS.numpy())
    np.savez(tmp_path / "other.npz", images=IMAGES.numpy(), labels=LABELS.numpy())
    ours, other = (read_foreign([tmp_path / name], "npz", spec) for name in ("ours.npz", "other.npz"))
    assert torch.equal(ours.images.x, other.images.x) and torch.equal(ours.images.y, other.images.y)


def test_objects_bombs_and_doubled_members_in_npz_are_refused(tmp_path, spec, monkeypatch):
    path, target = tmp_path / "set.npz", tmp_path / "ran"
    np.savez(path, x=np.array([Attack(target)], object), y=LABELS.numpy())
    with pytest.raises(ArtefactError, match="an array of object"):
        read_foreign([path], "npz", spec)
    np.savez(path, x=IMAGES.numpy(), y=LABELS.numpy(), student_lr=np.array("text"))
    with pytest.raises(ArtefactError, match="its array 'student_lr' is <U4"):
        read_foreign([path], "npz", spec)
    np.savez_compressed(path, x=np.zeros((10, 3, 7, 5)), y=LABELS.numpy())
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(path, "a") as archive:
        archive.writestr("x.npy", b"")
    with pytest.raises(ArtefactError, match="comes twice"):
        read_foreign([path], "npz", spec)
    np.savez_compressed(path, x=np.zeros((10, 3, 7, 5)), y=LABELS.numpy())
    monkeypatch.setattr("synth.foreign_arrays.LIMIT", 8000)
    with pytest.raises(ArtefactError, match="claim more than 8000 bytes"):
        read_foreign([path], "npz", spec)
    assert not target.exists()


def test_damaged_and_linked_images_are_refused(tmp_path, spec):
    folder = class_folders(tmp_path / "set", PIXELS, LABELS, spec.classes)
    path = folder / "bee" / "002.png"
    whole = path.read_bytes()
    for damaged in (b"", whole[:40], b"rubbish", whole[:-30]):
        path.write_bytes(damaged)
        with pytest.raises(ArtefactError, match=r"bee/002.png"):
            read_foreign([folder], "imagefolder", spec)
    path.unlink()
    path.symlink_to(folder / "ant" / "000.png")
    with pytest.raises(ArtefactError, match="not a regular file"):
        read_foreign([folder], "imagefolder", spec)
    path.unlink()
    (folder / "cat").rename(tmp_path / "cat")
    (folder / "cat").symlink_to(tmp_path / "cat")
    with pytest.raises(ArtefactError, match="it is a link"):
        read_foreign([folder], "imagefolder", spec)


@pytest.mark.parametrize("format", ["mtt", "dm", "npz", "torch"])
def test_truncations_and_flipped_bits_do_no_more_than_raise_our_errors(tmp_path, spec, format):
    path = of_format(tmp_path, format)
    whole = path.read_bytes()
    places = torch.randint(len(whole), (60,), generator=Rng(7).torch(format)).tolist()
    damaged = [whole[: len(whole) * i // 11] for i in range(11)]
    damaged += [whole[:p] + bytes([whole[p] ^ (1 << p % 8)]) + whole[p + 1 :] for p in places]
    refused = 0
    for content in damaged:
        path.write_bytes(content)
        try:
            found = read_foreign([path], format, spec)
            assert found.images.x.shape == IMAGES.shape and bool(found.images.x.isfinite().all())
        except DDError as error:
            assert isinstance(error, ArtefactError | UsageError) and "\n" not in error.cause
            refused += 1
    assert refused >= 11


def test_storage_beyond_the_file_is_never_read(tmp_path, spec):
    """The table of tensors says that a storage, and the tensor on it, have 2**30 numbers."""
    path = tmp_path / "set.pt"
    torch.save((torch.zeros(200), LABELS), path)
    told, large = b"K\xc8", b"J" + (2**30).to_bytes(4, "little")
    repacked(path, lambda n, d: (n, d.replace(told, large), STORED))
    with zipfile.ZipFile(path) as archive:
        assert large in archive.read(next(n for n in archive.namelist() if n.endswith("data.pkl")))
    with pytest.raises(ArtefactError, match="is no distilled set"):
        read_foreign([path], "torch", spec)


WRONG_PATHS = [
    ("mtt", 0),
    ("mtt", 3),
    ("dm", 0),
    ("dm", 2),
    ("npz", 2),
    ("torch", 2),
    ("sre2l", 2),
    ("imagefolder", 0),
]


@pytest.mark.parametrize(("format", "count"), WRONG_PATHS)
def test_another_number_of_files_is_a_usage_error(tmp_path, spec, format, count):
    with pytest.raises(UsageError, match="was given\nGive"):
        read_foreign([tmp_path / f"{i}.pt" for i in range(count)], format, spec)


def test_an_imported_set_is_one_of_ours(tmp_path, spec):
    path = mtt(tmp_path, IMAGES, normal(10, K, seed=5), lr=0.02)
    foreign = read_foreign([path], "tesla", spec)
    made = as_distilled(foreign, network={"name": "convnet"}, origin={"name": "small"}, format="tesla")
    loaded = DistilledSet.load(made.save(tmp_path / "out"))
    images = loaded.decode()
    assert torch.equal(images.x, IMAGES) and torch.equal(images.y, foreign.images.y)
    assert images.y_kind == "logit" and float(loaded.tensors["student_lr"]) == foreign.student_lr
    recipe, provenance = loaded.manifest["recipe"], loaded.manifest["provenance"]
    assert recipe["network"] == {"name": "convnet"} and recipe["dataset"] == {"name": "small"}
    assert provenance["format"] == "tesla" and provenance["files"] == dict(foreign.files)
    assert provenance["notes"] == list(foreign.notes) and "tesla" in provenance["matcher"]["type"]


def test_uint8_pixels_decode_to_exactly_the_normalised_pixel(tmp_path, spec):
    folder = class_folders(tmp_path / "set", PIXELS, LABELS, spec.classes)
    foreign = read_foreign([folder], "imagefolder", spec)
    made = as_distilled(foreign, network={"name": "convnet"}, origin={"name": "small"}, format="imagefolder")
    assert torch.equal(made.decode().x, spec.normalise(PIXELS)) and made.manifest["budget"]["ipc"] == IPC
    back = spec.denormalise(made.decode().x) * 255
    assert torch.equal(back.round().to(torch.uint8), PIXELS)
    (name,) = foreign.files
    assert name == "set/, 10 files" and len(foreign.files[name]) == 64
    (folder / "ant" / "000.png").rename(folder / "ant" / "900.png")
    assert read_foreign([folder], "imagefolder", spec).files[name] != foreign.files[name]
