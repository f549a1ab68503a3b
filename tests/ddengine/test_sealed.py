"""The seal on the test part: nobody reads it before the judge has made all its choices."""

import pytest
from pool_jobs import read_sealed, score_early

import ddengine.bench
from ddengine.bench import Bench, Job, share
from ddengine.data import load
from ddengine.errors import DDError
from ddengine.judge import evaluate
from ddengine.nets import NetSpec
from ddengine.parallel import job_pool
from ddengine.rng import Rng
from ddengine.sealed import Sealed
from ddengine.train import Recipe
from synth import DistilledSet, Pixels
from synth.starts import random

MLP, RECIPE = NetSpec("mlp", width=7), Recipe(steps=2, lrs=(0.01, 0.1))
EARLY = "test part was read before the evaluation had made all its choices"


@pytest.fixture(scope="module")
def digits():
    return load("digits")


@pytest.fixture(scope="module")
def distilled(digits):
    chosen = digits.fit.take(random(digits.fit, 1, Rng(3)))
    pixels = Pixels(chosen.model_input(), chosen.y, digits.fit.spec)
    return DistilledSet.make(pixels, recipe={"network": MLP.to_dict()}, provenance={})


def judged(distilled, digits):
    return evaluate(distilled, digits, networks=[MLP], seeds=1, rows=["random"], recipe=RECIPE)


def test_images_and_labels_stay_behind_the_seal_until_it_is_broken(digits):
    sealed = Sealed(digits.test)
    assert len(sealed) == len(digits.test) and sealed.spec is digits.test.spec
    with pytest.raises(DDError, match=EARLY):
        _ = sealed.images
    sealed.unseal()
    assert sealed.images is digits.test


def test_scoring_rates_on_test_instead_of_validation_fails_loudly(distilled, digits, monkeypatch):
    real, real_set, benches = ddengine.bench.accuracy, Bench.training_set, []
    monkeypatch.setattr(
        Bench, "training_set", lambda self, *row: benches.append(self) or real_set(self, *row)
    )
    monkeypatch.setattr(ddengine.bench, "accuracy", lambda net, images: real(net, benches[-1].test.images))
    with pytest.raises(DDError, match=EARLY):
        judged(distilled, digits)


def test_training_that_looks_at_the_test_part_fails_loudly(distilled, digits, monkeypatch):
    real = Bench.training_set

    def leaked(self, row, index):
        return self.test.images if row == "random" else real(self, row, index)

    monkeypatch.setattr(Bench, "training_set", leaked)
    with pytest.raises(DDError, match=EARLY):
        judged(distilled, digits)


def test_nothing_but_finished_networks_breaks_the_seal(distilled, digits, monkeypatch):
    seen, real = [], ddengine.bench.scored_on_test
    monkeypatch.setattr(ddengine.bench, "scored_on_test", lambda *a: seen.append(a) or real(*a))
    table = judged(distilled, digits)
    assert len(seen) == 2 and all(0 <= row.values[0] <= 1 for row in table.rows)


def test_a_worker_process_cannot_read_it_early_either(distilled, digits):
    parts = distilled.decode(), digits.fit, digits.validation, Sealed(digits.test)
    bench = Bench(*parts, {}, RECIPE, 0, "cpu", "fp32")
    share(bench)
    with pytest.raises(DDError, match=EARLY), job_pool(score_early, bench, 2) as results:
        list(results([Job(MLP, "mlp", "distilled", 0.1)]))


def test_processes_that_started_under_the_seal_see_it_broken(digits):
    sealed = Sealed(digits.test)
    for tensor in sealed.tensors():
        tensor.share_memory_()
    with job_pool(read_sealed, sealed, 2) as results:
        assert all("test part was read" in found for found in results([0, 1]))
        sealed.unseal()
        assert list(results([0, 1])) == [len(digits.test)] * 2
