import json
from dataclasses import dataclass, field, replace

import pytest
import torch
from global_rng import global_rng_untouched

from ddengine.audit import COMPOSITES, audit
from ddengine.data import Dataset, load
from ddengine.errors import DDError, UsageError
from ddengine.graphs import Graphs
from ddengine.membership import attack
from ddengine.nets import NetSpec, build
from ddengine.rng import Rng
from ddengine.train import Recipe
from ddengine.types import DataSpec, Images
from synth import DistilledSet, Pixels
from synth.compensated import Compensated
from synth.starts import random
from synth.subset import Subset
from synth.teachers import flat_teacher

MLP = NetSpec("mlp", width=13)
TINY = Recipe(steps=4, lrs=(0.05,), batch_size=64, augment="none")


@pytest.fixture(scope="module")
def digits():
    """A part of the digits, so that each test is short."""
    whole = load("digits")
    every = lambda images, step: images.take(torch.arange(0, len(images), step))
    return replace(whole, fit=every(whole.fit, 3), test=every(whole.test, 2))


def made(synth, **recipe):
    return DistilledSet.make(synth, recipe=recipe, provenance={})


@pytest.fixture(scope="module")
def means(digits):
    x = torch.stack([digits.fit.model_input()[digits.fit.y == c].mean(0) for c in range(10)])
    return made(Pixels(x, torch.arange(10), digits.fit.spec))


def audited(distilled, dataset, **changes):
    return audit(distilled, dataset, **{"network": MLP, "recipe": TINY, "networks": 2, **changes}).to_json()


@pytest.fixture(scope="module")
def found(means, digits):
    return audited(means, digits)


def by_name(rows):
    return {row["name"]: row for row in rows}


def test_the_result_is_plain_json_with_its_sizes_and_the_note(found, digits):
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    held = len(digits.validation) + len(digits.test)
    assert found["sizes"] == {"trained_on": 10, "compared": 10, "fit": len(digits.fit), "held_out": held}
    assert [row["name"] for row in found["neighbours"]["rows"]] == ["distilled", "random", "held_out"]
    names = [row["name"] for row in found["membership"]["rows"]]
    assert names == ["distilled", "random", "random_own", "full"]
    assert (found["dataset"], found["seed"], found["source_matches"]) == ("digits", 0, True)
    assert found["membership"]["recipe"]["steps"] == 4 and "no guarantee" in found["note"]


def test_members_and_non_members_are_as_many_of_each_class(found, digits):
    held = torch.cat([digits.validation.y, digits.test.y])
    counts = [torch.bincount(y, minlength=10) for y in (digits.fit.y, held)]
    want = int(torch.minimum(*counts).sum())
    rows = by_name(found["membership"]["rows"])
    assert {row["non_members"] for row in rows.values()} == {want}
    assert [rows[name]["members"] for name in ("distilled", "random", "full")] == [want] * 3
    assert (rows["random_own"]["members"], rows["random"]["trained_on"]) == (10, 10)
    assert rows["full"]["trained_on"] == len(digits.fit)
    assert by_name(found["neighbours"]["rows"])["distilled"]["pool"] == want


def test_random_real_images_are_all_copies_and_held_out_ones_are_not(found):
    rows = by_name(found["neighbours"]["rows"])
    assert [rows[name]["copies"] for name in ("distilled", "random", "held_out")] == [0, 10, 0]
    assert rows["random"]["distance"]["fit"]["max"] == 0
    assert rows["distilled"]["distance"]["fit"]["min"] > 0.01


def test_planted_copies_are_found_also_after_normalising_and_back(digits, means):
    images = means.decode()
    x = images.x.clone()
    x[[2, 5, 7]] = digits.fit.model_input(torch.tensor([11, 50, 301]))
    planted = made(Pixels(x, images.y, digits.fit.spec, codec="fp32"))
    row = audited(planted, digits, networks=1)["neighbours"]["rows"][0]
    assert row["copies"] == 3 and row["distance"]["fit"]["min"] < 1e-6


def test_a_stored_subset_is_all_copies(digits):
    subset = made(Subset.of(digits.fit, random(digits.fit, 2, Rng(3))))
    assert audited(subset, digits, networks=1)["neighbours"]["rows"][0]["copies"] == 20


def toy(count, name):
    """Noise with labels of no meaning: what is known of one image can only be remembered."""
    spec = DataSpec("noise", (1, 16, 17), tuple("abcdefghijklm"), (0.5,), (0.29,))
    generator = Rng(8).torch(name)
    x = torch.randint(0, 256, (count, 1, 16, 17), generator=generator, dtype=torch.uint8)
    return Images(x, torch.randint(0, 13, (count,), generator=generator), spec).sorted_by_class()


def test_held_out_noise_is_nearer_to_members_half_of_the_time_and_memorised_noise_is_found():
    noise = Dataset(toy(240, "fit"), toy(120, "validation"), toy(280, "test"))
    whole = made(Pixels(noise.fit.model_input(), noise.fit.y, noise.fit.spec, codec="fp32"))
    learns = Recipe(steps=60, lrs=(0.05,), augment="none", weight_decay=0.0, schedule="constant")
    result = audited(whole, noise, network=NetSpec("mlp", width=64), recipe=learns, networks=1)
    control = by_name(result["neighbours"]["rows"])["held_out"]["nearer"]
    assert control["ci95"][0] < 0.5 < control["ci95"][1]
    rows = by_name(result["membership"]["rows"])
    for name in ("distilled", "random_own", "full"):
        assert rows[name]["tpr"]["mean"] > 0.3 and rows[name]["auc"]["mean"] > 0.9
        assert rows[name]["advantage"]["mean"] > 0.6
        assert rows[name]["accuracy"]["members"] > 0.9 > 0.5 > rows[name]["accuracy"]["non_members"]


def test_same_seed_same_audit_another_seed_another(found, means, digits):
    assert audited(means, digits) == found
    other = audited(means, digits, seed=1)
    for part in ("neighbours", "membership"):
        assert other[part]["rows"] != found[part]["rows"]


def test_two_workers_give_the_bits_of_one(found, means, digits):
    assert audited(means, digits, workers=2) == found


def test_global_generators_the_set_and_threads_are_left_alone(means, digits):
    before = {name: tensor.clone() for name, tensor in means.tensors.items()}, torch.get_num_threads()
    with global_rng_untouched():
        audited(means, digits, networks=1)
    assert all(torch.equal(tensor, before[0][name]) for name, tensor in means.tensors.items())
    assert torch.get_num_threads() == before[1]


def test_validation_chooses_the_rate_under_the_seal_and_a_learned_one_is_tried(digits, means):
    images, progress = means.decode(), []
    learned = made(Pixels(images.x, images.y, digits.fit.spec, student_lr=0.0625))
    note = lambda done, total: progress.append((done, total))
    recipe = replace(TINY, steps=25, lrs=(1e3, 0.05))
    rows = audited(learned, digits, networks=1, recipe=recipe, on_progress=note)["membership"]["rows"]
    assert rows[0]["lr"] in (0.05, 0.0625)
    assert {row["lr"] for row in rows[1:]} == {0.05}
    assert progress == [(i, 10) for i in range(1, 11)]  # 3 + 2 + 2 trials, 3 networks


def test_a_set_of_some_classes_is_compared_with_these_alone(digits):
    some = digits.fit.take((digits.fit.y < 2).nonzero().squeeze(1)[:9])
    some = made(Pixels(some.model_input(), some.y, digits.fit.spec))
    result = audited(some, digits, networks=1)
    held = torch.cat([digits.validation.y, digits.test.y])
    want = sum(min(int((y == c).sum()) for y in (digits.fit.y, held)) for c in some.decode().y.unique())
    assert result["neighbours"]["rows"][0]["pool"] == want
    assert result["membership"]["rows"][0]["non_members"] == want


def compensated(digits, bases, m, teachers=()):
    chosen = digits.fit.take(random(digits.fit, bases // 10, Rng(5)))
    u = torch.randn((1, m, 1, 8, 8), generator=Rng(5).torch("u")) / 5
    return Compensated(
        bases=chosen.x,
        classes=chosen.y,
        compensators=u,
        group=torch.zeros(bases, dtype=torch.long),
        spec=digits.fit.spec,
        teachers=tuple(map(flat_teacher, teachers)),
    )


def test_every_base_of_a_compensated_set_is_compared_and_composites_up_to_a_limit(digits):
    result = audited(made(compensated(digits, 110, 11)), digits, networks=1)
    assert result["sizes"]["trained_on"] == 110 * 12 and result["sizes"]["compared"] == COMPOSITES == 1000
    assert result["neighbours"]["rows"][0]["copies"] == 110
    assert by_name(result["membership"]["rows"])["random"]["trained_on"] == len(digits.fit)


def test_teachers_that_come_with_a_set_label_and_are_attacked_themselves(digits):
    teacher = build(MLP, (1, 8, 8), 10, Rng(9).torch("teacher")).eval()
    recipe = {"labels": "dynamic", "teachers": [MLP.to_dict()]}
    stored = made(compensated(digits, 10, 2, [teacher]), **recipe)
    rows = by_name(audited(stored, digits, recipe=replace(TINY, loss="kl"))["membership"]["rows"])
    assert (rows["teachers"]["networks"], rows["teachers"]["lr"]) == (1, None)
    x, y = (torch.cat([getattr(part, name) for part in (digits.validation, digits.test)]) for name in "xy")
    held = Images(x, y, digits.spec)
    near = attack(stored.teachers()[0], digits.fit, held)
    assert rows["teachers"]["auc"]["mean"] == pytest.approx(near["auc"], abs=0.05)
    assert rows["teachers"]["accuracy"]["members"] == pytest.approx(near["accuracy_members"], abs=0.05)
    without = {name: tensor for name, tensor in stored.tensors.items() if "teachers" not in name}
    bare = DistilledSet(without, stored.manifest | {"recipe": {"labels": "dynamic"}})
    with pytest.raises(UsageError, match="brings no teachers"):
        audited(bare, digits)


def test_the_set_brings_its_own_preprocessing(digits, means):
    whitened = load("digits", preprocessing="zca")
    white = made(
        Pixels(whitened.fit.model_input()[:40], whitened.fit.y[:40], whitened.fit.spec, codec="fp32")
    )
    row = audited(white, digits, networks=1)["neighbours"]["rows"][0]
    assert (row["images"] == 40 and row["distance"]["fit"]["max"] < 1e-3) or row["copies"] > 10


@dataclass(frozen=True)
class Stub:
    """A set as far as the audit sees it."""

    content: object
    tensors: dict = field(default_factory=dict)
    manifest: dict = field(default_factory=dict)
    nbytes: dict = field(default_factory=dict)

    def decode(self):
        return self.content


def test_sets_of_graphs_of_other_classes_and_empty_parts_are_refused(digits, means):
    with pytest.raises(UsageError, match="holds graphs"):
        audited(Stub(object.__new__(Graphs)), digits)
    spec = replace(digits.fit.spec, classes=tuple("abcdefghij"))
    other = made(Pixels(means.decode().x, torch.arange(10), spec))
    with pytest.raises(UsageError, match="their classes differ"):
        audited(other, digits)
    nothing = digits.fit.take(torch.tensor([], dtype=torch.long))
    with pytest.raises(UsageError, match="validation part of 'digits' is empty"):
        audited(means, replace(digits, validation=nothing))
    with pytest.raises(UsageError, match="held-out part has 0 images"):
        audited(means, replace(digits, validation=nothing, test=nothing))
    with pytest.raises(UsageError, match="the set has 1 images"):
        audited(made(Pixels(means.decode().x[:1], torch.zeros(1).long(), digits.fit.spec)), digits)
    with pytest.raises(UsageError, match="networks=0"):
        audited(means, digits, networks=0)
    with pytest.raises(DDError, match="unknown network"):
        audited(means, digits, network=NetSpec("convnett"))


def test_data_that_the_set_was_not_made_from_is_told(means, digits):
    fit = replace(digits.fit, spec=replace(digits.fit.spec, fingerprint="other"))
    assert audited(means, replace(digits, fit=fit), networks=1)["source_matches"] is False
