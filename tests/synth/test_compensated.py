"""Bases and compensators as a set: composites, bytes, codecs, what comes back from the stored form."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ddengine.errors import ArtefactError, UsageError
from ddengine.nets import NetSpec, build
from ddengine.rng import Rng
from ddengine.types import DataSpec, Whitening
from synth import Compensated, DistilledSet, Pixels, flat_teacher
from synth.composite_sheet import added_pixels, composite_sheet
from synth.packing import decode_compensators, encode_compensators

SHAPE, CLASSES = (3, 7, 5), ("ant", "bee", "cat", "dog", "elk")
SPEC = DataSpec("small", SHAPE, CLASSES, (0.5, 0.4, 0.3), (0.2, 0.25, 0.3), "a" * 64, "CC0-1.0")
NO_NOTES = {"recipe": {}, "provenance": {}}
B, G, M = 11, 3, 2
NETWORK = NetSpec("convnet", width=4, depth=1, norm="batch")


def compensated(*, real: bool = True, soft: bool = True, m: int = M, seed: int = 0, **options) -> Compensated:
    g = Rng(seed).torch("set")
    pixels = torch.randint(0, 256, (B, *SHAPE), generator=g, dtype=torch.uint8)
    return Compensated(
        pixels if real else torch.randn((B, *SHAPE), generator=g),
        torch.randint(0, len(CLASSES), (B,), generator=g),
        0.3 * torch.randn((G, m, *SHAPE), generator=g),
        torch.cat([torch.arange(G), torch.randint(0, G, (B - G,), generator=g)]),
        SPEC,
        labels=3 * torch.randn((B * (m + 1), len(CLASSES)), generator=g) if soft else None,
        **options,
    )


def with_teachers(synth: Compensated, count: int = 2) -> Compensated:
    spec = replace(SPEC, shape=(3, 8, 9))
    nets = [build(NETWORK, spec.shape, len(CLASSES), Rng(i).torch("net")) for i in range(count)]
    for net in nets:
        net.train()(torch.randn((4, *spec.shape), generator=Rng(9).torch("x")))  # moves the statistics
    grow = Rng(8).torch("grow")
    bases = torch.randint(0, 256, (B, *spec.shape), generator=grow, dtype=torch.uint8)
    u = 0.1 * torch.randn((G, M, *spec.shape), generator=grow)
    return replace(synth, bases=bases, compensators=u, spec=spec, teachers=tuple(map(flat_teacher, nets)))


def named(count: int = 2) -> dict:
    return {"teachers": [NETWORK.to_dict()] * count}


def stored(synth: Compensated) -> Compensated:
    return Compensated.unpack(synth.pack(), {}, synth.spec)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(
        a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8)
    )


def test_composites_are_sums_clipped_where_the_bases_are_pixels():
    synth = compensated()
    images = synth.decode()
    assert len(images) == synth.count == B * (M + 1)
    for v in range(M + 1):
        for i in range(B):
            x = synth.bases[i].double() / 255
            if v:
                x = (x + synth.compensators[synth.group[i], v - 1].double()).clamp(0, 1)
            mean, std = (torch.tensor(t, dtype=torch.float64)[:, None, None] for t in (SPEC.mean, SPEC.std))
            assert torch.allclose(images.x[v * B + i].double(), (x - mean) / std, atol=1e-6)
    assert torch.equal(images.y, synth.labels) and images.y_kind == synth.y_kind == "logit"


def test_composites_of_free_bases_are_sums_in_model_input():
    synth = compensated(real=False, soft=False)
    images = synth.decode()
    for v in range(M + 1):
        added = synth.compensators[synth.group, v - 1] if v else 0
        assert torch.allclose(images.x[v * B : (v + 1) * B], synth.bases + added, atol=1e-6)
    assert torch.equal(images.y, synth.classes.repeat(M + 1)) and images.y_kind == synth.y_kind == "class"


@pytest.mark.parametrize("real", [True, False])
@pytest.mark.parametrize("codec", ["int8", "fp16"])
@pytest.mark.parametrize("through", ["memory", "file"])
def test_a_zero_compensator_decodes_to_its_base_bit_for_bit(real, codec, through, tmp_path):
    synth = compensated(real=real, codec=codec)
    u = synth.compensators.clone()
    u[:, 1] = 0
    synth = replace(synth, compensators=u)
    if through == "file":
        synth = DistilledSet.load(DistilledSet.make(synth, **NO_NOTES).save(tmp_path / "set")).synth
    x = synth.decode().x
    assert same_bits(x[2 * B :], x[:B]) and not torch.equal(x[B : 2 * B], x[:B])
    if real:
        assert same_bits(x[:B], SPEC.normalise(compensated().bases))


@pytest.mark.parametrize("real", [True, False])
def test_without_compensators_a_set_is_its_bases(real):
    synth = compensated(real=real, m=0)
    assert synth.count == B and set(synth.pack()) & {"compensators", "group", "compensators.scale"} == set()
    assert torch.equal(synth.decode().x, SPEC.normalise(synth.bases) if real else synth.bases)
    ready = synth.quantised()
    assert same_bits(stored(ready).decode().x, ready.decode().x)
    assert ready.compensators.shape == synth.compensators.shape and torch.equal(ready.group, synth.group)


@settings(max_examples=60, deadline=None)
@given(
    real=st.booleans(),
    soft=st.booleans(),
    codec=st.sampled_from(["int8", "fp16"]),
    label_codec=st.sampled_from(["fp32", "fp16", "int8", "int4"]),
    base_codec=st.sampled_from(["fp32", "fp16", "uint8"]),
    m=st.integers(0, 3),
    teachers=st.integers(0, 2),
    statistics=st.integers(0, 5),
    student_lr=st.none() | st.just(0.0123),
)
def test_reported_bytes_are_those_of_the_stored_tensors(
    real, soft, codec, label_codec, base_codec, m, teachers, statistics, student_lr
):
    vectors = ((torch.ones(13), torch.ones(statistics)),) * teachers
    synth = compensated(
        real=real, soft=soft, m=m, codec=codec, label_codec=label_codec, base_codec=base_codec,
        teachers=vectors, student_lr=student_lr,
    )  # fmt: skip
    packed = synth.pack()
    sizes = {name: t.numel() * t.element_size() for name, t in packed.items()}
    assert synth.nbytes["total"] == sum(sizes.values())
    for part in ("images", "labels"):
        assert synth.nbytes[part] == sum(n for name, n in sizes.items() if name.split(".")[0] == part)
    assert Compensated.problem(packed, synth.y_kind, SPEC) is None
    made = DistilledSet.make(synth, **NO_NOTES)
    assert made.nbytes == synth.nbytes and made.manifest["count"] == synth.count


@settings(max_examples=40, deadline=None)
@given(
    real=st.booleans(),
    codec=st.sampled_from(["int8", "fp16"]),
    base_codec=st.sampled_from(["fp32", "fp16", "uint8"]),
    size=st.sampled_from([0.0, 1e-7, 1e-3, 1.0, 30.0]),
    shift=st.sampled_from([0.0, 0.37, -1e3]),
    seed=st.integers(0, 2**31),
)
def test_labels_of_a_quantised_set_describe_the_pixels_that_will_be_decoded(
    real, codec, base_codec, size, shift, seed
):
    synth = compensated(real=real, soft=False, codec=codec, base_codec=base_codec, seed=seed)
    synth = replace(synth, compensators=size * synth.compensators)
    if not real:
        synth = replace(synth, bases=size * synth.bases + shift)
    ready = synth.quantised()
    labelled = replace(ready, labels=torch.zeros((ready.count, 5)))
    assert same_bits(stored(labelled).decode().x, ready.decode().x)
    assert same_bits(stored(replace(synth, labels=labelled.labels)).decode().x, ready.decode().x)
    near = 1e-3 * abs(shift) + 6e-2 * size + 1e-6
    assert torch.allclose(ready.bases.float(), synth.bases.float(), atol=near)
    assert (ready.codec, ready.base_codec, ready.count) == (codec, base_codec, synth.count)


def test_the_error_of_eight_bit_compensators_is_at_most_half_a_step():
    u = (
        torch.randn((2, 3, 3, 5, 7), generator=Rng(0).torch("u"))
        * torch.tensor([1e-4, 0.3, 20.0])[:, None, None]
    )
    packed = encode_compensators(u, "int8")
    step = packed["compensators.scale"].double()[..., None, None]
    assert bool(((decode_compensators(packed).double() - u.double()).abs() <= step / 2 + 1e-12).all())
    assert bool((step.squeeze() <= (u.abs().amax((3, 4)) / 127 * 1.001).clamp(min=2.0**-14)).all())
    assert bool((decode_compensators(encode_compensators(-u, "int8")) == -decode_compensators(packed)).all())


def test_channels_of_zeros_have_no_scale():
    u = torch.randn((1, 2, *SHAPE), generator=Rng(0).torch("u"))
    u[0, 1, 2] = 0
    packed = encode_compensators(u, "int8")
    assert packed["compensators.scale"][0, 1, 2] == 0 and not decode_compensators(packed)[0, 1, 2].any()


@pytest.mark.parametrize("real", [True, False])
def test_decode_computes_only_what_is_asked_for(real):
    synth = compensated(real=real)
    pick = torch.tensor([B * M + 3, 0, B + 5, 0])
    whole, some = synth.decode(), synth.decode(pick)
    assert torch.equal(some.x, whole.x[pick]) and torch.equal(some.y, whole.y[pick])
    spoiled = replace(synth, compensators=synth.compensators.index_fill(1, torch.tensor([0]), torch.nan))
    assert bool(spoiled.decode(torch.arange(B * 2, B * 3)).x.isfinite().all())


def test_derivatives_are_those_of_the_sums():
    synth = compensated(real=False, soft=False)
    pick = torch.tensor([1, B + 2, 2 * B, 2])
    free = [synth.bases.double().requires_grad_(), synth.compensators.double().requires_grad_()]
    decoded = lambda x, u: synth.replace({"bases": x, "compensators": u}).decode(pick).x
    assert torch.autograd.gradcheck(decoded, free, fast_mode=True)


@pytest.mark.parametrize("real", [True, False])
@pytest.mark.parametrize("soft", [True, False])
def test_what_is_free_gets_gradients_and_can_be_replaced(real, soft):
    synth = compensated(real=real, soft=soft)
    names = ["compensators"] if real else ["bases", "compensators", *(["labels"] if soft else [])]
    free = {name: p.double().requires_grad_() for name, p in synth.params().items()}
    assert list(free) == names
    pick = torch.tensor([1, B + 2, 2 * B])
    images = synth.replace({n: p.float() for n, p in free.items()}).decode(pick)
    (images.x.square().sum() + images.y.float().square().sum()).backward()
    assert all(bool(p.grad.abs().sum() > 0) for p in free.values())
    with pytest.raises(UsageError, match="unknown free tensor 'group'"):
        synth.replace({"group": synth.group})


def test_the_gradient_of_a_compensator_is_the_sum_over_its_composites():
    synth = compensated(real=False, soft=False)
    weight = torch.randn((B * (M + 1), *SHAPE), generator=Rng(3).torch("w"))
    u = synth.compensators.clone().requires_grad_()
    (synth.replace({"compensators": u}).decode().x * weight).sum().backward()
    for g in range(G):
        for j in range(M):
            expected = weight[(j + 1) * B : (j + 2) * B][synth.group == g].sum(0)
            assert torch.allclose(u.grad[g, j], expected, atol=1e-5)


BAD = {
    "codec": ({"codec": "int4"}, "unknown compensator codec"),
    "label codec": ({"label_codec": "uint8"}, "unknown label codec"),
    "base codec": ({"base_codec": "int8"}, "unknown base codec"),
    "class": ({"classes": torch.full((B,), 5)}, "class labels outside"),
    "group": ({"group": torch.full((B,), G)}, "groups outside 0..2"),
    "labels": ({"labels": torch.zeros((B, 5))}, "labels"),
    "labels of too few classes": (
        {"labels": torch.zeros((B * (M + 1), 4))},
        r"soft labels of shape \(0, 4\)",
    ),
    "rate": ({"student_lr": -1.0}, "student_lr=-1"),
    "teacher shape": ({"teachers": ((torch.ones((2, 2)), torch.ones(3)),)}, "teachers of shapes"),
    "empty teacher": ({"teachers": ((torch.ones(0), torch.ones(3)),)}, "teachers of shapes"),
}


@pytest.mark.parametrize("case", BAD)
def test_parts_that_disagree_are_refused(case):
    changes, words = BAD[case]
    with pytest.raises(UsageError, match=words):
        replace(compensated(), **changes)


@pytest.mark.parametrize("codec", ["int8", "fp16"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e8])
def test_compensators_that_are_not_finite_as_stored_are_refused(codec, value):
    synth = compensated(codec=codec)
    u = synth.compensators.clone()
    u[1, 0, 2, 3, 1] = value
    with pytest.raises(UsageError, match=f"not finite as .*{codec}"):
        replace(synth, compensators=u).pack()


@pytest.mark.parametrize("base_codec", ["fp32", "fp16", "uint8"])
def test_bases_and_teachers_that_are_not_finite_are_refused(base_codec):
    synth = compensated(real=False, base_codec=base_codec)
    bases = synth.bases.clone()
    bases[3, 1, 2, 2] = torch.nan
    teachers = ((torch.tensor([1.0, 1e6]), torch.zeros(0)),)
    for bad in (replace(synth, bases=bases), replace(synth, teachers=teachers)):
        with pytest.raises(UsageError, match="not finite"):
            bad.pack()


def test_a_set_of_everything_comes_back_from_disk(tmp_path):
    synth = with_teachers(compensated(label_codec="int4", student_lr=0.5))
    made = DistilledSet.make(synth, recipe=named(), provenance={})
    loaded = DistilledSet.load(made.save(tmp_path / "set"))
    assert same_bits(loaded.decode().x, made.decode().x) and same_bits(loaded.decode().y, made.decode().y)
    assert same_bits(loaded.decode().x, synth.quantised().decode().x)
    back = loaded.synth
    assert torch.equal(back.bases, synth.bases) and torch.equal(back.classes, synth.classes)
    assert torch.equal(back.group, synth.group) and back.student_lr == 0.5
    assert (back.codec, back.label_codec, len(back.teachers)) == ("int8", "int4", 2)
    ready = loaded.composites()
    pick = torch.tensor([5, B * M, B])
    assert same_bits(ready.take(pick).x, loaded.decode(pick).x) and len(ready) == loaded.manifest["count"]


def test_the_budget_counts_stored_images_not_composites():
    made = DistilledSet.make(compensated(), **NO_NOTES)
    synth = made.synth
    image = synth.bases[0].numel()
    held = -(-(made.nbytes["total"] - synth.teacher_bytes) // (5 * image))
    assert made.manifest["budget"]["ipc"] == held and made.manifest["count"] == B * (M + 1)
    told = DistilledSet.make(compensated(), recipe={}, provenance={"budget": {"ipc": 9, "nbytes": None}})
    assert told.manifest["budget"]["ipc"] == 9


def test_teachers_come_back_with_their_statistics(tmp_path):
    synth = with_teachers(compensated())
    loaded = DistilledSet.load(DistilledSet.make(synth, recipe=named(), provenance={}).save(tmp_path / "set"))
    x = loaded.decode().x
    for teacher, (params, statistics) in zip(loaded.teachers(), synth.teachers, strict=True):
        assert not teacher.training
        assert torch.equal(flat_teacher(teacher)[0], params.half().float())
        assert torch.equal(flat_teacher(teacher)[1], statistics)
        one = teacher(x[3:4])
        assert torch.allclose(teacher(x)[3:4], one, atol=1e-5)
    assert len(synth.teachers[0][1]) == 2 * 4  # one layer of four channels: means and variances


def test_the_layout_of_teachers_is_that_of_expert_buffers():
    from expert_buffers.params import ParamSpec

    net = build(NETWORK, (3, 8, 9), 5, Rng(0).torch("net"))
    params, statistics = flat_teacher(net)
    assert torch.equal(params, ParamSpec.of(net).flatten(dict(net.named_parameters())).detach())
    floats = {n: b for n, b in net.named_buffers() if b.is_floating_point()}
    assert torch.equal(statistics, torch.cat([b.flatten() for b in floats.values()]))
    assert len(floats) < len(dict(net.named_buffers()))


def test_sets_without_teachers_have_none():
    plain = Pixels(torch.zeros((2, *SHAPE)), torch.tensor([0, 1]), SPEC)
    for synth in (compensated(), plain):
        made = DistilledSet.make(synth, **NO_NOTES)
        assert made.teachers() == []
    assert made.composites() is None


WRONG_TEACHERS = {
    "too few": [NETWORK.to_dict()],
    "not a list": NETWORK.to_dict(),
    "another size": [NETWORK.to_dict(), NetSpec("convnet", width=5, depth=1, norm="batch").to_dict()],
    "no statistics": [NETWORK.to_dict(), NetSpec("convnet", width=4, depth=1, norm="instance").to_dict()],
    "unknown network": [{"name": "nothing"}] * 2,
    "unknown field": [{"name": "convnet", "x": 1}] * 2,
    "not a table": ["convnet", "convnet"],
    "wrong type": [{"name": "convnet", "width": "4"}] * 2,
    "huge": [{"name": "convnet", "width": 2**22, "depth": 1, "norm": "batch"}] * 2,
}


@pytest.mark.parametrize("case", WRONG_TEACHERS)
def test_teachers_that_the_manifest_does_not_describe_are_refused(case):
    synth = with_teachers(compensated())
    made = DistilledSet.make(synth, recipe={"teachers": WRONG_TEACHERS[case]}, provenance={})
    with pytest.raises(ArtefactError) as caught:
        made.teachers()
    assert "teacher" in caught.value.cause and "\n" not in caught.value.cause


def test_the_preview_shows_bases_and_sums(tmp_path):
    synth = replace(compensated(), labels=None)
    composite_sheet(synth, tmp_path / "with.png")
    composite_sheet(replace(compensated(m=0), labels=None), tmp_path / "without.png")
    with Image.open(tmp_path / "with.png") as full, Image.open(tmp_path / "without.png") as plain:
        assert full.height > plain.height + G * 3 * 48 and plain.height > 5 * 48


def test_compensators_are_shown_in_units_of_pixels():
    synth = compensated(real=False)
    std = torch.tensor(SPEC.std)[:, None, None]
    assert torch.allclose(added_pixels(synth), synth.compensators * std, atol=1e-6)
    d = 3 * 7 * 5
    matrix = torch.randn((d, d), generator=Rng(0).torch("zca")) / 9 + torch.eye(d)
    white = replace(SPEC, zca=Whitening(torch.rand(d), matrix, matrix.inverse()))
    shown = added_pixels(replace(synth, spec=white)).reshape(-1, d)
    assert torch.allclose(shown, synth.compensators.reshape(-1, d) @ matrix.inverse(), atol=1e-3)
    assert torch.equal(added_pixels(compensated()), compensated().compensators)


def test_the_card_says_what_a_composite_is(tmp_path):
    recipe = {**named(), "labels": "dynamic"}
    synth = with_teachers(compensated(soft=False))
    made = DistilledSet.make(synth, recipe=recipe, provenance={})
    card = (made.save(tmp_path / "set") / "README.md").read_text()
    for words in (
        "33 training images", "11 real bases, 3 groups of 2 int8 compensators",
        "compensators, class numbers for labels, 2 teachers",
        "A composite is a base image plus a compensator", "what the stored teachers say", "composites()",
        f"extras {synth.nbytes['extras']}", f"total {synth.nbytes['total']}",
    ):  # fmt: skip
        assert words in card
