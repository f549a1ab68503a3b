from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ddengine import data
from ddengine.data.decode import fit_square, read_image, resize
from ddengine.errors import UsageError

SHARED = Path(__file__).resolve().parents[3].parent / "shared" / "data"


def picture(seed: int, mode: str = "RGB", size: tuple[int, int] = (7, 5)) -> Image.Image:
    draw = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(draw).convert(mode)


def make(root: Path, classes: dict[str, int], mode: str = "RGB", size: tuple[int, int] = (7, 5)) -> Path:
    for label, (name, count) in enumerate(classes.items()):
        folder = root / name
        folder.mkdir(parents=True)
        for i in range(count):
            picture(1000 * label + i + len(str(root)), mode, size).save(folder / f"{i:03d}.png")
    return root


def load(root: Path, **options):
    return data.load("image_folder", root=root, **options)


def refusal(root: Path, **options) -> UsageError:
    with pytest.raises(UsageError) as error:
        load(root, **options)
    assert "\n" not in error.value.cause
    assert error.value.remedy
    return error.value


def test_plain_class_folders_split_eighty_ten_ten(tmp_path):
    made = load(make(tmp_path, {"b": 20, "a": 30}))
    assert made.spec.classes == ("a", "b")
    assert (made.fit.counts, made.validation.counts, made.test.counts) == ([24, 16], [3, 2], [3, 2])
    assert made.spec.shape == (3, 5, 7)


def test_every_file_arrives_with_its_own_pixels_and_label(tmp_path):
    made = load(make(tmp_path, {"x": 4, "y": 5}))
    ours = {
        (int(y), x.numpy().tobytes())
        for part in (made.fit, made.validation, made.test)
        for x, y in zip(part.x, part.y, strict=True)
    }
    theirs = {
        (label, np.array(Image.open(file)).transpose(2, 0, 1).tobytes())
        for label, name in enumerate("xy")
        for file in (tmp_path / name).iterdir()
    }
    assert ours == theirs


def test_official_parts_are_kept_and_val_may_lack_a_class(tmp_path):
    make(tmp_path / "train", {"a": 6, "b": 7, "c": 1})
    make(tmp_path / "val", {"a": 2, "b": 0})
    make(tmp_path / "test", {"a": 3, "b": 2, "c": 2})
    (tmp_path / "docs").mkdir()
    made = load(tmp_path)
    assert (made.fit.counts, made.validation.counts, made.test.counts) == ([6, 7, 1], [2, 0, 0], [3, 2, 2])
    assert made.notes == ("folders beside train/, val/ and test/ are not used: docs",)


def test_without_val_a_tenth_of_train_is_validation(tmp_path):
    make(tmp_path / "train", {"a": 20, "b": 10})
    make(tmp_path / "test", {"a": 3, "b": 2})
    made = load(tmp_path)
    assert (made.fit.counts, made.validation.counts, made.test.counts) == ([18, 9], [2, 1], [3, 2])


def test_a_class_may_be_called_train(tmp_path):
    assert load(make(tmp_path, {"train": 4, "car": 4})).spec.classes == ("car", "train")


def test_grey_files_stay_grey_and_one_colour_file_makes_all_colour(tmp_path):
    root = make(tmp_path, {"a": 4, "b": 4}, "L")
    assert load(root).spec.shape == (1, 5, 7)
    picture(1).save(root / "b" / "colour.png")
    made = load(root)
    assert made.spec.shape == (3, 5, 7)
    same = (made.fit.x[:, 0] == made.fit.x[:, 2]).flatten(1).all(1)
    assert int(same.sum()) >= len(made.fit) - 1


@pytest.mark.parametrize(
    ("mode", "suffix", "channels"),
    [
        ("1", "png", 1), ("L", "png", 1), ("LA", "png", 1), ("I;16", "png", 1), ("I;16", "tif", 1),
        ("P", "png", 3), ("P", "gif", 3), ("RGB", "PNG", 3), ("RGBA", "png", 3), ("RGBA", "webp", 3),
        ("CMYK", "tif", 3), ("CMYK", "jpg", 3), ("RGB", "bmp", 3), ("RGB", "ppm", 3), ("L", "pgm", 1),
        ("YCbCr", "jpeg", 3), ("RGB", "tiff", 3),
    ],
)  # fmt: skip
def test_every_mode_becomes_grey_or_rgb(tmp_path, mode, suffix, channels):
    if mode == "I;16":
        image = Image.fromarray(np.random.default_rng(0).integers(0, 2**16, (5, 7), dtype=np.uint16))
    else:
        image = picture(3, mode)
    image.save(tmp_path / f"x.{suffix}")
    pixels = read_image(tmp_path / f"x.{suffix}", None)
    assert (pixels.shape, pixels.dtype) == ((channels, 5, 7), np.uint8)


def test_sixteen_bit_grey_is_scaled_to_eight_bits(tmp_path):
    levels = np.array([[0, 128, 129, 257 * 100, 65535]], dtype=np.uint16)
    Image.fromarray(levels).save(tmp_path / "x.png")
    assert read_image(tmp_path / "x.png", None)[0, 0].tolist() == [0, 0, 1, 100, 255]


def test_exif_orientation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying on its left side: rotate by 90 degrees clockwise
    picture(4).save(tmp_path / "x.png", exif=exif)
    upright = np.rot90(np.array(picture(4)), -1).transpose(2, 0, 1)
    assert (read_image(tmp_path / "x.png", None) == upright).all()


def test_transparency_is_dropped(tmp_path):
    image = picture(5)
    image.putalpha(0)
    image.save(tmp_path / "x.png")
    assert (read_image(tmp_path / "x.png", None) == np.array(picture(5)).transpose(2, 0, 1)).all()


def test_scaling_keeps_the_centre_and_the_short_side():
    wide = picture(2, size=(63, 21))
    whole = wide.resize((27, 9), Image.Resampling.BICUBIC)
    assert (np.asarray(fit_square(wide, 9)) == np.asarray(whole)[:, 9:18]).all()
    tall = wide.transpose(Image.Transpose.ROTATE_90)
    whole = tall.resize((9, 27), Image.Resampling.BICUBIC)
    assert (np.asarray(fit_square(tall, 9)) == np.asarray(whole)[9:18]).all()


def test_scaling_agrees_with_an_independent_antialiased_bicubic():
    x = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, 3, 23, 23), dtype=np.uint8))
    theirs = torch.nn.functional.interpolate(x.float(), (11, 11), mode="bicubic", antialias=True).clamp(
        0, 255
    )
    assert (resize(x, 11).float() - theirs).abs().max() <= 1.51


def test_files_and_tensors_are_scaled_alike(tmp_path):
    picture(6, size=(31, 17)).save(tmp_path / "x.png")
    x = torch.from_numpy(np.array(picture(6, size=(31, 17))).transpose(2, 0, 1).copy())[None]
    assert (read_image(tmp_path / "x.png", 8) == resize(x, 8)[0].numpy()).all()


def test_mixed_sizes_need_a_size(tmp_path):
    root = make(tmp_path, {"a": 4, "b": 4})
    picture(9, size=(11, 13)).save(root / "b" / "other.png")
    error = refusal(root)
    assert "other.png is 11x13" in error.cause
    assert "dataset.size=N" in error.remedy
    assert load(root, size=6).spec.shape == (3, 6, 6)


@pytest.mark.parametrize("damage", [b"", b"no image", None])
def test_a_corrupt_file_is_named_or_skipped_and_counted(tmp_path, damage):
    root = make(tmp_path, {"a": 6, "b": 6}, size=(40, 40))
    bad = root / "a" / "003.png"
    bad.write_bytes(bad.read_bytes()[:900] if damage is None else damage)
    error = refusal(root)
    assert str(bad) in error.cause
    assert "dataset.on_error=skip" in error.remedy
    made = load(root, on_error="skip")
    assert made.skipped == 1
    assert str(bad) in made.notes[0]
    assert len(made.fit) + len(made.validation) + len(made.test) == 11


def test_a_decompression_bomb_counts_as_corrupt(tmp_path, monkeypatch):
    root = make(tmp_path, {"a": 4, "b": 4})
    picture(9, size=(40, 40)).save(root / "b" / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
    assert "bomb.png" in refusal(root, size=5).cause
    assert load(root, size=5, on_error="skip").skipped == 1


def test_a_broken_link_counts_as_corrupt(tmp_path):
    root = make(tmp_path, {"a": 4, "b": 4})
    (root / "a" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    assert "gone.png" in refusal(root).cause


def test_hidden_and_other_files_are_ignored(tmp_path):
    root = make(tmp_path, {"a": 4, "b": 4, ".cache": 1})
    (root / "a" / ".hidden.png").write_bytes(b"x")
    (root / "a" / "notes.txt").write_text("x")
    (root / "readme.md").write_text("x")
    made = load(root)
    assert len(made.fit) + len(made.validation) + len(made.test) == 8
    assert made.spec.classes == ("a", "b")


def test_folders_that_hold_no_dataset_are_refused(tmp_path):
    assert "No such file" in refusal(tmp_path / "missing").cause
    (tmp_path / "empty").mkdir()
    assert "holds no class folder" in refusal(tmp_path / "empty").cause
    assert "Not a directory" in refusal(make(tmp_path / "f", {"a": 2}) / "a" / "000.png").cause
    assert "one class, 'only'" in refusal(make(tmp_path / "one", {"only": 5})).cause
    assert "one class, 'only'" in refusal(make(tmp_path / "single", {"only": 1})).cause
    assert "none is left for the validation part" in refusal(make(tmp_path / "few", {"a": 1, "b": 2})).cause
    make(tmp_path / "untested" / "train", {"a": 4, "b": 4})
    (tmp_path / "untested" / "test").mkdir()
    assert "none is left for the test part" in refusal(tmp_path / "untested").cause


def test_an_empty_class_is_named(tmp_path):
    assert str(tmp_path / "b") in refusal(make(tmp_path, {"a": 4, "b": 0})).cause


def test_a_class_without_a_readable_image_is_named(tmp_path):
    root = make(tmp_path, {"a": 4, "b": 1})
    (root / "b" / "000.png").write_bytes(b"x")
    assert "class 'b'" in refusal(root, on_error="skip").cause


def test_nothing_readable_at_all_is_refused(tmp_path):
    root = make(tmp_path, {"a": 1, "b": 1})
    for file in root.rglob("*.png"):
        file.write_bytes(b"x")
    assert "none of the 2 image files" in refusal(root, on_error="skip").cause


@pytest.mark.parametrize("part", ["val", "test"])
def test_a_part_may_not_have_classes_of_its_own(tmp_path, part):
    make(tmp_path / "train", {"a": 4, "b": 4})
    make(tmp_path / part, {"a": 2, "z": 2})
    assert "a class 'z' that train/ does not have" in refusal(tmp_path).cause


def test_a_class_name_that_is_no_text_is_refused(tmp_path):
    assert "not plain text" in refusal(make(tmp_path, {"a\nb": 2, "c": 2})).cause


def test_tiny_imagenet_is_read_from_its_own_layout(tmp_path):
    root = tmp_path / "tiny-imagenet-200"
    for name in ("n02", "n01"):
        make(root / "train" / name, {"images": 10}, size=(64, 64))
    make(root / "val", {"images": 3}, size=(64, 64))
    lines = [f"{i:03d}.png\t{name}\t0\t0\t9\t9" for i, name in enumerate(("n01", "n02", "n02"))]
    (root / "val" / "val_annotations.txt").write_text("\n".join(lines) + "\n")
    for given in (tmp_path, root):
        made = data.load("tiny_imagenet", root=given)
        assert made.spec.classes == ("n01", "n02")
        assert (made.fit.counts, made.validation.counts, made.test.counts) == ([9, 9], [1, 1], [1, 2])
        assert made.spec.mean == (0.485, 0.456, 0.406)
    with pytest.raises(UsageError, match="'tiny_imagenet' is not at .*\nUnpack tiny-imagenet-200.zip"):
        data.load("tiny_imagenet", root=tmp_path / "nowhere")


def test_photographs_of_many_sizes_load(tmp_path):
    if not (SHARED / "grocery13").is_dir():
        pytest.skip("the grocery13 photographs are not beside the repository")
    for part in ("train", "val", "test"):
        (tmp_path / part).mkdir()
        for name in ("Orange", "Soy-Milk", "Soyghurt"):
            if (SHARED / "grocery13" / part / name).is_dir():
                (tmp_path / part / name).symlink_to(SHARED / "grocery13" / part / name)
    made = load(tmp_path, size=16)
    assert (made.fit.counts, made.validation.counts, made.test.counts) == (
        [57, 60, 51],
        [5, 0, 10],
        [56, 58, 47],
    )
    assert made.spec.shape == (3, 16, 16)
    assert made.skipped == 0
