"""The byte planner: never above the budget, true to what is stored, and the published table."""

from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from ddengine.errors import UsageError
from ddengine.types import Budget, DataSpec
from synth.budget import SheetPlan, nominal_bytes, plan, published_sheets
from synth.compensated import Compensated
from synth.labels import LABEL_CODECS, label_row_bytes
from synth.store import DistilledSet


def spec_of(classes: int, shape: tuple[int, int, int] = (3, 32, 32)) -> DataSpec:
    names = tuple(f"{c:04d}" for c in range(classes))
    return DataSpec("planned", shape, names, (0.5,) * shape[0], (0.25,) * shape[0])


def built(made: SheetPlan, spec: DataSpec, m: int, label_codec: str | None, codec: str) -> Compensated:
    """The set that a plan promises, of zeros."""
    k = len(spec.classes)
    classes = torch.cat([torch.arange(k).repeat(made.sheets), torch.arange(made.last)])
    sheet = torch.arange(len(classes)) // k
    group = (sheet * made.groups // made.sheets).clamp(max=made.groups - 1)
    n = len(classes) * (m + 1)
    return Compensated(
        torch.zeros((len(classes), *spec.shape), dtype=torch.uint8),
        classes,
        torch.zeros((made.groups, m, *spec.shape)),
        group,
        spec,
        labels=None if label_codec is None else torch.zeros((n, k)),
        codec=codec,
        label_codec=label_codec or "int8",
    )


@settings(max_examples=120, deadline=None)
@given(
    k=st.integers(1, 13),
    shape=st.tuples(st.sampled_from([1, 3]), st.integers(1, 5), st.integers(1, 5)),
    ipc=st.integers(1, 30),
    m=st.integers(0, 4),
    groups=st.none() | st.integers(1, 9),
    label_codec=st.none() | st.sampled_from(LABEL_CODECS),
    codec=st.sampled_from(["int8", "fp16"]),
    teacher=st.sampled_from([0, 1, 29]),
    fraction=st.booleans(),
)
def test_a_planned_set_is_never_above_its_budget_and_has_the_bytes_of_the_plan(
    k, shape, ipc, m, groups, label_codec, codec, teacher, fraction
):
    spec = spec_of(k, shape)
    nominal = nominal_bytes(Budget(ipc=ipc), spec)
    pixels = shape[0] * shape[1] * shape[2]
    assert nominal == ipc * k * pixels
    row = 0 if label_codec is None else label_row_bytes(k, label_codec)
    kept = (
        plan_or_none(nominal, spec, m, groups, row, 2 * teacher, 2 * pixels, fraction)
        if codec == "fp16"
        else plan_or_none(nominal, spec, m, groups, row, 2 * teacher, None, fraction)
    )
    assume(kept is not None)
    synth = built(kept, spec, m, label_codec, codec)
    if teacher:
        synth = replace(synth, teachers=((torch.ones(teacher), torch.zeros(0)),))
    assert synth.nbytes["total"] == kept.nbytes <= nominal
    assert DistilledSet.make(synth, recipe={}, provenance={}).nbytes == synth.nbytes
    assert kept.last == 0 if not fraction else kept.last < k
    more = replace(kept, sheets=kept.sheets + 1, last=0)
    more = replace(more, groups=more.sheets if groups is None else min(groups, more.sheets))
    teachers = synth.teachers
    assert replace(built(more, spec, m, label_codec, codec), teachers=teachers).nbytes["total"] > nominal
    if fraction and kept.last < k - 1:
        fuller = built(replace(kept, last=kept.last + 1), spec, m, label_codec, codec)
        assert replace(fuller, teachers=teachers).nbytes["total"] > nominal


def plan_or_none(nominal, spec, m, groups, row, fixed, compensator, fraction):
    try:
        return plan(nominal, spec, m, groups, row, fixed, None, compensator, fraction)
    except UsageError as error:
        needed = int(error.cause.split("it needs ")[1].split(" ")[0])
        assert needed > nominal
        return None


PUBLISHED = [
    (10, 4, 10, 7), (10, 4, 50, 35), (100, 4, 10, 9), (100, 4, 50, 48), (100, 4, 100, 96),
    (200, 4, 10, 9), (200, 4, 50, 49), (1000, 3, 10, 9), (1000, 3, 50, 49), (10, 4, 1, 0),
]  # fmt: skip


@pytest.mark.parametrize(("classes", "teachers", "ipc", "sheets"), PUBLISHED)
def test_the_published_table_counts_images_alone(classes, teachers, ipc, sheets):
    assert published_sheets(ipc, classes, teachers) == sheets


@pytest.mark.parametrize(("classes", "teachers", "ipc", "sheets"), PUBLISHED[:-1])
def test_a_plan_with_hard_labels_has_the_published_sheets(classes, teachers, ipc, sheets):
    side = 64 if classes >= 200 else 32
    spec, pixels = spec_of(classes, (3, side, side)), 3 * side * side
    made = plan(nominal_bytes(Budget(ipc=ipc), spec), spec, teachers, None, 0, compensator_bytes=pixels)
    assert (made.sheets, made.groups) == (sheets, sheets)
    assert plan(nominal_bytes(Budget(ipc=ipc), spec), spec, teachers, None, 0).sheets == sheets


def test_sharing_compensators_leaves_room_for_more_sheets():
    spec = spec_of(10)
    own = plan(307200, spec, 4, None, label_row_bytes(10, "int8"))
    shared = plan(307200, spec, 4, 1, label_row_bytes(10, "int8"))
    assert (own.sheets, own.groups, shared.sheets, shared.groups) == (7, 7, 9, 1)
    assert 0 < shared.last < 10 and shared.nbytes <= 307200


def test_a_number_of_groups_is_an_upper_bound():
    spec = spec_of(10)
    assert plan(307200, spec, 4, 50, 0) == plan(307200, spec, 4, None, 0)


def test_more_than_256_groups_have_wider_numbers():
    spec = spec_of(3, (1, 2, 2))
    sheet = 3 * (4 + 1 + 1) + (4 + 2)
    assert plan(256 * sheet, spec, 1, None, 0, fraction=False) == SheetPlan(256, 0, 256, 256 * sheet)
    wide = 257 * (sheet + 3)
    assert plan(wide, spec, 1, None, 0, fraction=False) == SheetPlan(257, 0, 257, wide)
    assert plan(wide - 1, spec, 1, None, 0, fraction=False).sheets == 256


def test_nothing_is_paid_for_groups_where_there_are_no_compensators():
    spec = spec_of(5, (1, 3, 3))
    assert plan(10 * 5 * 10, spec, 0, None, 0).nbytes == 10 * 5 * (9 + 1)
    assert plan(10 * 5 * 10, spec, 0, None, 0).sheets == 10


def test_the_budget_of_bytes_is_itself():
    assert nominal_bytes(Budget(nbytes=12345), spec_of(10)) == 12345


def test_a_budget_too_small_says_what_it_needs_and_what_helps():
    spec = spec_of(10)
    needed = 10 * (3072 + 2 + 5 * 14) + 4 * (3072 + 6)
    with pytest.raises(UsageError) as caught:
        plan(30720, spec, 4, 1, 14)
    for words in ("30720", "10 classes", "4 compensators", str(needed)):
        assert words in caught.value.cause
    assert "a larger ipc or budget.nbytes" in caught.value.remedy
    assert plan(needed, spec, 4, 1, 14) == SheetPlan(1, 0, 1, needed)


@pytest.mark.parametrize(
    "wrong", [{"groups": 0}, {"per_group": -1}, {"labels": -1}, {"fixed": -1}, {"image_bytes": 0}], ids=str
)
def test_numbers_out_of_range_are_refused(wrong):
    given_ = {"per_group": 2, "groups": 1, "labels": 0, **wrong}
    with pytest.raises(UsageError, match=f"{next(iter(wrong))}=.* is out of range"):
        plan(10**6, spec_of(10), **given_)


def test_a_limit_caps_the_sheets_and_the_bytes_are_those_of_the_capped_set():
    spec = DataSpec("noise", (1, 8, 8), tuple("abcde"), (0.5,), (0.5,))
    free, capped = (plan(10_000, spec, 2, None, 9, limit=limit) for limit in (None, 7))
    assert free.sheets > 7 and (capped.sheets, capped.last, capped.groups) == (7, 0, 7)
    least = plan(capped.nbytes, spec, 2, None, 9)
    assert (least.sheets, least.last, least.nbytes) == (7, 0, capped.nbytes)
    assert plan(capped.nbytes - 1, spec, 2, None, 9).sheets == 6
