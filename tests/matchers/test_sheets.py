"""Sheets of real images, and the crops that teachers know best."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ddengine.data import load
from ddengine.errors import UsageError
from ddengine.rng import Rng
from ddengine.types import Budget, Images, Task
from matchers.sheets import confident_sheets, real_sheets
from synth.budget import SheetPlan


@pytest.fixture(scope="module")
def task():
    return Task(load("digits").fit, Budget(9))


class Brightness(nn.Module):
    """Says that an image is of class k with a logit that grows with its brightness, at any size."""

    def forward(self, x):
        level = x.flatten(1).mean(1, keepdim=True)
        return level * torch.ones(1, 10) * torch.arange(10)


@pytest.mark.parametrize("selection", ["random", "herding"])
def test_a_sheet_has_one_image_of_each_class_in_label_order(task, selection):
    sheets = real_sheets(task, SheetPlan(5, 3, 2, 0), selection, Rng(0))
    assert sheets.pixels.shape == (53, 1, 8, 8) and sheets.pixels.dtype == torch.uint8
    assert torch.equal(sheets.classes[:50], torch.arange(10).repeat(5))
    assert torch.equal(sheets.sheet, torch.tensor([k for k in range(5) for _ in range(10)] + [5] * 3))
    last = sheets.classes[50:].tolist()
    assert len(set(last)) == 3 and last == sorted(last)


def test_images_are_real_distinct_and_of_their_class(task):
    sheets = real_sheets(task, SheetPlan(5, 3, 5, 0), "random", Rng(0))
    known = {(int(y), x.numpy().tobytes()) for x, y in zip(task.images.x, task.images.y, strict=True)}
    mine = [(int(y), x.numpy().tobytes()) for x, y in zip(sheets.pixels, sheets.classes, strict=True)]
    assert set(mine) <= known and len(set(mine)) == 53


def test_groups_are_runs_of_sheets_and_the_partial_one_is_in_the_last(task):
    sheets = real_sheets(task, SheetPlan(5, 3, 2, 0), "random", Rng(0))
    of_sheet = [set(sheets.group[sheets.sheet == k].tolist()) for k in range(6)]
    assert of_sheet == [{0}, {0}, {0}, {1}, {1}, {1}]
    alone = real_sheets(task, SheetPlan(5, 3, 5, 0), "random", Rng(0))
    assert [int(alone.group[alone.sheet == k][0]) for k in range(6)] == [0, 1, 2, 3, 4, 4]


def test_other_seeds_draw_other_images_and_other_last_classes(task):
    made = [real_sheets(task, SheetPlan(2, 3, 2, 0), "random", Rng(seed)) for seed in range(4)]
    assert len({s.pixels.numpy().tobytes() for s in made}) == 4
    assert len({tuple(s.classes[20:].tolist()) for s in made}) > 1


def test_whole_images_are_those_that_the_teachers_know_best(task):
    sheets = confident_sheets(task, SheetPlan(3, 0, 3, 0), [Brightness()], 1, Rng(0))
    x, first = task.images.model_input(), 0
    for label, count in enumerate(task.images.counts):  # fewer than 300 images in a class: all are scored
        logits = Brightness()(x[first : first + count])
        loss = F.cross_entropy(logits, torch.full((count,), label), reduction="none")
        chosen = sheets.pixels[sheets.classes == label].flatten(1)
        real = task.images.x[first : first + count].flatten(1)
        scores = sorted(float(loss[(real == one).all(1)].min()) for one in chosen)
        assert scores == pytest.approx(sorted(loss.tolist())[:3])
        first += count


def test_a_collage_holds_crops_of_its_class(task):
    sheets = confident_sheets(task, SheetPlan(2, 4, 2, 0), [Brightness()], 2, Rng(0))
    assert sheets.pixels.shape == (24, 1, 8, 8)
    windows = F.unfold(task.images.x.float(), 4).transpose(1, 2)  # [n places 16]
    for image, label in zip(sheets.pixels[:6], sheets.classes[:6], strict=True):
        known = {tuple(w) for w in windows[task.images.y == label].flatten(0, 1).tolist()}
        for top in (0, 4):
            for left in (0, 4):
                assert tuple(image[0, top : top + 4, left : left + 4].flatten().float().tolist()) in known


def test_a_collage_that_does_not_divide_the_image_is_refused(task):
    with pytest.raises(UsageError, match="matcher.parts=3 does not divide images of 8x8"):
        confident_sheets(task, SheetPlan(2, 0, 2, 0), [Brightness()], 3, Rng(0))


def test_a_class_with_too_few_images_for_its_crops_is_named(task):
    with pytest.raises(UsageError, match="class '.*' has .* images, 160 crops are needed"):
        confident_sheets(task, SheetPlan(40, 0, 40, 0), [Brightness()], 2, Rng(0))


def test_images_that_are_not_pixels_are_refused(task):
    images = task.images
    floats = Images(images.model_input(), images.y, images.spec)
    for make in (
        lambda t: real_sheets(t, SheetPlan(1, 0, 1, 0), "random", Rng(0)),
        lambda t: confident_sheets(t, SheetPlan(1, 0, 1, 0), [Brightness()], 1, Rng(0)),
    ):
        with pytest.raises(UsageError, match="sheets of torch.float32 images with class labels"):
            make(Task(floats, Budget(9)))
