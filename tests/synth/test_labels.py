"""Codecs of label logits: bytes, errors, odd and constant rows, what is refused; top-k labels."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from ddengine.errors import UsageError
from ddengine.rng import Rng
from synth.labels import (
    LABEL_CODECS,
    check_topk,
    decode_labels,
    decode_topk,
    encode_labels,
    encode_topk,
    label_codec,
    label_row_bytes,
    stored_labels_problem,
)

ULP32 = 2.0**-23


def logits(n: int, k: int, scale: float = 3.0, shift: float = 0.0) -> torch.Tensor:
    return scale * torch.randn((n, k), generator=Rng(1).torch("z")) + shift


@settings(max_examples=80, deadline=None)
@given(
    n=st.integers(0, 5),
    k=st.integers(1, 19),
    exponent=st.floats(-9, 4),
    shift=st.floats(-30000, 30000, width=32),
    codec=st.sampled_from(["int8", "int4"]),
    seed=st.integers(0, 2**31),
)
def test_the_error_of_affine_rows_is_at_most_half_a_step(n, k, exponent, shift, codec, seed):
    g = torch.Generator().manual_seed(seed)
    z = ((torch.rand((n, k), generator=g) - 0.5) * 10.0**exponent + shift).clamp(-65504, 65504)
    stored = encode_labels(z, codec)
    offset, scale = (stored[f"labels.{name}"].double() for name in ("offset", "scale"))
    levels = 255 if codec == "int8" else 15
    rounding = 2 * ULP32 * (offset.abs() + levels * scale)
    error = (decode_labels(stored, k).double() - z.double()).abs()
    assert bool((error <= (scale / 2 + rounding)[:, None]).all())
    assert bool((offset[:, None] <= z.double()).all())
    assert bool(((offset + levels * scale + rounding)[:, None] >= z.double()).all())


@settings(max_examples=40, deadline=None)
@given(n=st.integers(0, 5), k=st.integers(1, 19), codec=st.sampled_from(LABEL_CODECS))
def test_rows_have_the_bytes_they_are_said_to_have(n, k, codec):
    stored = encode_labels(logits(n, k), codec)
    assert sum(t.numel() * t.element_size() for t in stored.values()) == n * label_row_bytes(k, codec)
    assert stored_labels_problem(stored, n, k) is None
    assert decode_labels(stored, k).shape == (n, k) and decode_labels(stored, k).dtype == torch.float32
    assert k == 1 or label_codec(stored, k) == codec


def test_scales_are_no_larger_than_they_need_to_be():
    z = logits(53, 10)
    stored = encode_labels(z, "int8")
    needed = (z.amax(1).double() - stored["labels.offset"].double()) / 255
    assert bool((stored["labels.scale"].double() <= needed * (1 + 2**-10)).all())


def test_float_codecs_are_the_numbers_themselves():
    z = logits(7, 5)
    assert torch.equal(decode_labels(encode_labels(z, "fp32"), 5), z)
    expected = torch.from_numpy(z.numpy().astype(np.float16).astype(np.float32))
    assert torch.equal(decode_labels(encode_labels(z, "fp16"), 5), expected)


@pytest.mark.parametrize("codec", ["int8", "int4"])
@pytest.mark.parametrize("value", [0.0, -0.375, 1 / 3, -1000.1, 65504.0, -65504.0, 1e-9])
@pytest.mark.parametrize("k", [1, 2, 7])
def test_a_constant_row_stays_constant_and_exact_to_a_float16(codec, value, k):
    decoded = decode_labels(encode_labels(torch.full((3, k), value), codec), k)
    assert bool((decoded == decoded[0, 0]).all())
    if float(np.float16(value)) == value:
        assert decoded[0, 0].item() == value
    else:
        assert abs(decoded[0, 0].item() - value) <= float(np.spacing(np.float16(abs(value)))) / 2


def test_codes_of_four_bits_lie_two_in_a_byte_the_first_in_the_low_half():
    z = torch.tensor([[0.0, 15.0, 4.0, 9.0, 2.0]])  # offset 0 and scale 1: codes are the numbers
    stored = encode_labels(z, "int4")
    assert stored["labels"].tolist() == [[0 | 15 << 4, 4 | 9 << 4, 2]]
    assert torch.equal(decode_labels(stored, 5), z)


@settings(max_examples=40, deadline=None)
@given(k=st.integers(1, 12), codec=st.sampled_from(["int8", "int4"]), seed=st.integers(0, 2**31))
def test_storing_what_was_stored_moves_nothing_further_than_one_rounding(k, codec, seed):
    z = torch.randn((5, k), generator=torch.Generator().manual_seed(seed))
    once = decode_labels(encode_labels(z, codec), k)
    again = encode_labels(once, codec)
    assert bool(((decode_labels(again, k) - once).abs() <= again["labels.scale"].float()[:, None] / 2).all())


@pytest.mark.parametrize("codec", ["fp16", "int8", "int4"])
def test_logits_that_float16_cannot_hold_are_refused_with_the_remedy(codec):
    z = torch.tensor([[0.0, 65505.0]])
    with pytest.raises(UsageError, match=rf"65505 is outside float16.*{codec}(.|\n)*fp32"):
        encode_labels(z, codec)
    assert torch.equal(decode_labels(encode_labels(z, "fp32"), 2), z)


@pytest.mark.parametrize("codec", LABEL_CODECS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_logits_that_are_not_finite_are_refused(codec, value):
    with pytest.raises(UsageError, match="not finite"):
        encode_labels(torch.tensor([[0.0, value]]), codec)


def test_an_unknown_codec_is_refused():
    for call in (lambda: encode_labels(logits(2, 3), "int3"), lambda: label_row_bytes(3, "int3")):
        with pytest.raises(UsageError, match="unknown label codec 'int3'"):
            call()


def divergence(z: torch.Tensor, other: torch.Tensor, temperature: float) -> float:
    """Mean KL(softmax(z / T) || softmax(other / T)), float64."""
    p, q = (F.log_softmax(t.double() / temperature, 1) for t in (z, other))
    return float((p.exp() * (p - q)).sum(1).mean())


def test_fewer_bits_cost_more_and_eight_are_nearly_free():
    z = logits(350, 10, 4.0)
    lost = [divergence(z, decode_labels(encode_labels(z, codec), 10), 1) for codec in LABEL_CODECS]
    assert lost[0] == 0 and lost == sorted(lost) and lost[2] < 1e-4 < lost[3] < 1e-1


def test_topk_keeps_the_largest_and_the_mass_of_the_rest():
    z = logits(11, 13)
    stored = encode_topk(z, 3)
    decoded = decode_topk(stored, 13)
    assert stored["values"].shape == (11, 3) and stored["indices"].dtype == torch.uint8
    for row, back in zip(z, decoded, strict=True):
        order = row.argsort(descending=True)
        assert torch.equal(back[order[:3]], row[order[:3]].half().float())
        mean = float(np.log(np.mean(np.exp(row[order[3:]].double().numpy()))))
        assert back[order[3:]].unique().tolist() == [pytest.approx(mean, abs=2e-3)]


def test_topk_of_many_classes_has_wider_indices():
    z = logits(2, 300)
    stored = encode_topk(z, 5)
    assert stored["indices"].dtype == torch.int16
    assert torch.equal(decode_topk(stored, 300).topk(5).indices, z.topk(5).indices)


def test_topk_loses_more_at_a_high_temperature_where_eight_bits_lose_nothing():
    z = logits(200, 10, 4.0)
    top, full = decode_topk(encode_topk(z, 3), 10), decode_labels(encode_labels(z, "int8"), 10)
    cost = {t: t**2 * divergence(z, top, t) for t in (1, 30)}
    assert cost[30] > 5 * cost[1] and cost[30] > 1000 * 900 * divergence(z, full, 30)


@pytest.mark.parametrize("top_k", [0, 5, 6])
def test_topk_of_none_or_all_classes_is_refused(top_k):
    with pytest.raises(UsageError, match=f"top_k={top_k} of 5"):
        encode_topk(logits(2, 5), top_k)


def test_topk_is_refused_at_a_high_temperature_with_the_reason():
    with pytest.raises(UsageError, match=r"top-3 labels at temperature 20.*tail(.|\n)*int8"):
        check_topk(3, 20.0)
    with pytest.raises(UsageError, match="temperature 4.5"):
        check_topk(3, 4.5)
    with pytest.raises(UsageError, match="top_k=0"):
        check_topk(0, 1)
    assert check_topk(3, 4) is None


def test_damaged_labels_are_found():
    n, k = 7, 5
    for codec in ("int8", "int4"):
        good = encode_labels(logits(n, k), codec)
        bad = {
            "one row of": {**good, "labels": good["labels"][:-1]},
            "labels are torch.int32": {**good, "labels": good["labels"].int()},
            "labels.scale is not": {**good, "labels.scale": good["labels.scale"].float()},
            "labels.scale is negative": {**good, "labels.scale": -good["labels.scale"]},
            "labels.offset is not": {**good, "labels.offset": good["labels.offset"] * torch.inf},
        }
        for words, tensors in bad.items():
            assert words in (stored_labels_problem(tensors, n, k) or "")
    half = encode_labels(logits(n, k), "fp16")
    assert "not finite" in (stored_labels_problem({"labels": half["labels"] * torch.nan}, n, k) or "")
    assert "not [8, 5]" in (stored_labels_problem(half, 8, k) or "")
