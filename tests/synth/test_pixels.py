"""Free pixels: parameters, codecs, bytes."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ddengine.errors import UsageError
from ddengine.types import DataSpec, SynthSet, Whitening
from synth import Pixels
from synth.pixels import OFF_LEVEL, raw_levels

CODECS = ("fp32", "fp16", "uint8")


def spec_of(shape, k) -> DataSpec:
    return DataSpec("s", shape, tuple(f"c{i}" for i in range(k)), (0.5,) * shape[0], (0.25,) * shape[0])


SETS = {
    "shape": st.tuples(*[st.sampled_from([1, 2, 3, 5, 7])] * 3),
    "m": st.integers(1, 7),
    "k": st.sampled_from([2, 5, 257]),
    "seed": st.integers(0, 2**31),
    "offset": st.floats(-50, 50),
    "contrast": st.sampled_from([0.0, 1e-6, 1.0, 300.0]),
    "y_kind": st.sampled_from(["class", "prob", "logit"]),
    "codec": st.sampled_from(CODECS),
    "rate": st.none() | st.floats(1e-6, 10),
}


def build(shape, m, k, seed, offset, contrast, y_kind, codec, rate) -> Pixels:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn((m, *shape), generator=g) * contrast + offset
    if y_kind == "class":
        labels = torch.randint(0, k, (m,), generator=g)
    else:
        labels = torch.randn((m, k), generator=g)
        labels = labels.softmax(1) if y_kind == "prob" else labels
    return Pixels(x, labels, spec_of(shape, k), y_kind, codec, rate)


def unpacked(pixels: Pixels) -> Pixels:
    return Pixels.unpack(pixels.pack(), {"y_kind": pixels.y_kind}, pixels.spec)


@settings(max_examples=60, deadline=None)
@given(**SETS)
def test_packing_keeps_labels_rate_and_pixels_to_the_precision_of_the_codec(**drawn):
    pixels = build(**drawn)
    back = unpacked(pixels)
    assert (back.codec, back.y_kind, back.spec) == (pixels.codec, pixels.y_kind, pixels.spec)
    x, y = pixels.images.double().numpy(), back.images.double().numpy()
    if pixels.codec == "fp32":
        assert np.array_equal(x, y) and torch.equal(back.labels, pixels.labels)
    elif pixels.codec == "fp16":
        assert np.array_equal(x.astype(np.float16).astype(float), y)
    else:
        half = (x.max((2, 3), keepdims=True) - x.min((2, 3), keepdims=True)) / 255 / 2
        level = (
            OFF_LEVEL / 255 / min(pixels.spec.std)
        )  # as far as pixels may lie from the levels they are kept as
        rounding = 4 * np.finfo(np.float32).eps * np.abs(x).max()
        assert (np.abs(x - y) <= half * (1 + 1e-5) + rounding + level).all()
    if pixels.y_kind == "class":
        assert torch.equal(back.labels, pixels.labels)
    else:
        assert torch.allclose(back.labels, pixels.labels, atol=2e-3, rtol=2e-3)
    assert (back.student_lr is None) == (pixels.student_lr is None)
    assert pixels.student_lr is None or back.student_lr == np.float32(pixels.student_lr)


@settings(max_examples=60, deadline=None)
@given(**SETS)
def test_nbytes_are_the_bytes_of_the_packed_tensors(**drawn):
    pixels = build(**drawn)
    sizes = {name: t.numel() * t.element_size() for name, t in pixels.pack().items()}
    images = sum(size for name, size in sizes.items() if name.startswith("images"))
    labels, extras = sizes["labels"], sizes.get("student_lr", 0)
    total = sum(sizes.values())
    assert pixels.nbytes == {"images": images, "labels": labels, "extras": extras, "total": total}


def test_a_known_image_quantises_by_hand(spec):
    tiny = DataSpec("t", (2, 1, 3), ("a",), (0.0, 0.0), (1.0, 1.0))
    x = torch.tensor([[[[0.0, 1.2, 255.0]], [[-4.0, -4.0, -4.0]]]])
    packed = Pixels(x, torch.tensor([0]), tiny).pack()
    assert packed["images"].tolist() == [[[[0, 1, 255]], [[0, 0, 0]]]]
    assert packed["images.offset"].tolist() == [[0.0, -4.0]] and packed["images.scale"].tolist() == [
        [1.0, 0.0]
    ]
    assert unpacked(Pixels(x, torch.tensor([0]), tiny)).images[0, 1].tolist() == [[-4.0, -4.0, -4.0]]


@pytest.mark.parametrize(("k", "dtype"), [(256, torch.uint8), (257, torch.int16), (40000, torch.int32)])
def test_class_labels_take_the_smallest_type(k, dtype):
    pixels = Pixels(torch.zeros(2, 1, 1, 1), torch.tensor([0, k - 1]), spec_of((1, 1, 1), k))
    assert pixels.pack()["labels"].dtype == dtype
    assert unpacked(pixels).labels.tolist() == [0, k - 1]


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_images_that_are_not_finite_are_refused_with_advice(pixels, codec, bad):
    images = pixels.images.clone()
    images[3, 1, 2, 4] = bad
    with pytest.raises(UsageError, match="diverged") as caught:
        Pixels(images, pixels.labels, pixels.spec, codec=codec).pack()
    assert "Lower the pixel learning rate" in caught.value.remedy


def test_images_too_large_for_half_precision_are_refused(pixels):
    with pytest.raises(UsageError, match="not finite as fp16"):
        Pixels(pixels.images * 1e6, pixels.labels, pixels.spec, codec="fp16").pack()


def test_soft_labels_that_are_not_finite_are_refused(pixels):
    with pytest.raises(UsageError, match="labels are not finite"):
        Pixels(pixels.images, torch.full((11, 5), torch.inf), pixels.spec, "logit").pack()


def test_decode_is_differentiable_in_images_and_soft_labels(pixels):
    free = [pixels.images.clone().requires_grad_(), torch.zeros(11, 5, requires_grad=True)]
    soft = Pixels(pixels.images, torch.ones(11, 5), pixels.spec, "logit")
    images = soft.replace({"images": free[0], "labels": free[1]}).decode(torch.tensor([2, 7, 2]))
    (images.x.sum() + 3 * images.y.sum()).backward()
    assert free[0].grad.flatten(1).mean(1).tolist() == [0, 0, 2, 0, 0, 0, 0, 1, 0, 0, 0]
    assert free[1].grad.mean(1).tolist() == [0, 0, 6, 0, 0, 0, 0, 3, 0, 0, 0]


def test_only_images_and_soft_labels_are_free(pixels):
    soft = Pixels(pixels.images, torch.ones(11, 5), pixels.spec, "prob")
    assert (set(pixels.params()), set(soft.params())) == ({"images"}, {"images", "labels"})
    with pytest.raises(UsageError, match="labels"):
        pixels.replace({"labels": torch.zeros(11)})


def test_replace_leaves_the_original_alone(pixels):
    before = pixels.images.clone()
    other = pixels.replace({"images": pixels.images + 1})
    assert torch.equal(pixels.images, before) and torch.equal(other.images, before + 1)
    assert other.student_lr == pixels.student_lr


def test_pixels_fulfil_the_contract_of_synthetic_sets(pixels):
    assert isinstance(pixels, SynthSet)


@pytest.mark.parametrize(
    "change",
    [{"codec": "jpeg"}, {"y_kind": "prob"}, {"labels": torch.full((11,), 5)}, {"student_lr": -0.1}],
    ids=str,
)
def test_values_out_of_range_are_refused(pixels, change):
    fields = {"images": pixels.images, "labels": pixels.labels, "spec": pixels.spec, **change}
    with pytest.raises(UsageError):
        Pixels(**fields)


@settings(max_examples=40, deadline=None)
@given(shape=SETS["shape"], m=SETS["m"], seed=SETS["seed"], std=st.floats(0.05, 3), mean=st.floats(-1, 1))
def test_images_that_are_uint8_pixels_are_stored_as_those_pixels(shape, m, seed, std, mean):
    spec = replace(spec_of(shape, 3), mean=(mean,) * shape[0], std=(std,) * shape[0])
    pixels = torch.randint(
        0, 256, (m, *shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )
    labels = torch.arange(m) % 3
    made = Pixels(spec.normalise(pixels), labels, spec)
    assert torch.equal(made.pack()["images"], pixels)
    back = unpacked(made)
    assert torch.equal(back.images, made.images)
    assert torch.equal(unpacked(back).images, back.images)  # and once more changes nothing


@pytest.mark.parametrize(("level", "is_pixel"), [(7.0, True), (7.01, False), (-1.0, False), (256.0, False)])
def test_only_whole_levels_of_a_byte_are_pixels(level, is_pixel):
    spec = spec_of((1, 1, 2), 3)
    x = spec.normalise(torch.tensor([[[[3.0, level]]]]) / 255)
    found = raw_levels(x, spec)
    assert found.tolist() == [[[[3, int(level)]]]] if is_pixel else found is None
    assert raw_levels(x * torch.nan, spec) is None


def test_whitened_images_are_no_pixels():
    identity = torch.eye(2)
    spec = replace(spec_of((1, 1, 2), 3), zca=Whitening(torch.zeros(2), identity, identity))
    assert raw_levels(torch.zeros(1, 1, 1, 2), spec) is None
