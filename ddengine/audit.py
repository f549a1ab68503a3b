"""The privacy audit: what a distilled set, and networks trained on it, give away about the real images.

Two tests, each beside controls that show what leaking and not leaking look like: how near images of the set
lie to real ones, and membership inference on networks trained on the set. They can find a leak, they cannot
exclude one.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ddengine.bench import SUBJECT, Bench, Job, Record, share
from ddengine.composites import Composites
from ddengine.data import Dataset
from ddengine.errors import UsageError, require_positive
from ddengine.membership import MEMBERS, OWN, attack, attack_job, attack_row
from ddengine.neighbours import COPY, compare, equal_draw, grey
from ddengine.nets import build, resolve
from ddengine.nets.core import NetSpec
from ddengine.ops.kd import placed
from ddengine.parallel import job_pool, one_thread
from ddengine.rivals import Judged, label_mode, training_images
from ddengine.rng import Rng
from ddengine.sealed import Sealed
from ddengine.train import Recipe
from ddengine.types import Images
from synth.starts import random_total

FORMAT = "audit-v1"
DRAWS = 5  # of members, and of controls where those are more, that the distances are averaged over
COMPOSITES = 1000  # images of a compensated set that are compared; its bases all are, even if they are more
ROWS = (SUBJECT, "random", "full")  # what networks are trained on
NOTE = (
    "This audit is small. An attack with reference networks for each image, such as LiRA (Carlini et al. "
    "2022), is stronger. The audit can find a leak and cannot exclude one: no guarantee of privacy, such as "
    "differential privacy, is given."
)


@dataclass(frozen=True)
class Audit:
    """What an audit found: rows of `neighbours` and of `membership` as plain JSON values, with their sizes.

    `sizes` counts images: of the set (`trained_on`), compared (`compared`), in the fit part and held out.
    """

    dataset: str
    neighbours: tuple[Record, ...]
    membership: tuple[Record, ...]
    sizes: Mapping[str, int]
    network: NetSpec
    recipe: Recipe
    seed: int
    source_matches: bool | None

    def to_json(self) -> Record:
        """The object that `audit --json` prints: plain JSON values, fractions, no NaN."""
        return {
            "format": FORMAT,
            "dataset": self.dataset,
            "seed": self.seed,
            "sizes": dict(self.sizes),
            "neighbours": {"copy_below": COPY, "draws": DRAWS, "rows": [dict(r) for r in self.neighbours]},
            "membership": {
                "attack": "loss threshold (Yeom et al. 2018)",
                "network": self.network.to_dict(),
                "recipe": self.recipe.to_dict(),
                "rows": [dict(row) for row in self.membership],
            },
            "source_matches": self.source_matches,
            "note": NOTE,
        }


def audit(
    distilled: Judged,
    dataset: Dataset,
    *,
    network: NetSpec,
    recipe: Recipe,
    networks: int = 4,
    seed: int = 0,
    workers: int = 1,
    device: str = "cpu",
    precision: str = "fp32",
    on_progress: Callable[[int, int], None] | None = None,
) -> Audit:
    """Audit `distilled` against the fit part (members) and validation and test together (held out).

    Distances: the set, random real images and held-out images, each beside equal numbers of members and
    controls of the classes that the set has. Membership: `networks` fresh networks on the set, on random
    real images (as many) and on the fit part, all for the recipe's steps, at the rate that validation
    chooses; teachers that are stored in the set are attacked too. The result is a function of all arguments
    but `workers` and `on_progress`, which gets the networks done and their number. Raises UsageError for
    graphs, for another dataset's set, and where there are too few images; DDError when a worker dies.
    """
    subject, held = training_images(distilled), _joined(dataset.validation, dataset.test)
    _check(subject, dataset, held, network, networks, seed)
    labels, teachers = label_mode(distilled.manifest), _teachers(distilled)
    if labels == "dynamic" and not teachers:
        raise UsageError("a set with dynamic labels brings no teachers", "Give a set that stores them")
    rng = Rng(seed).fold("audit")
    settings: dict[str, Any] = {"recipe": recipe, "seed": seed, "device": device, "precision": precision}
    settings |= {"labels": labels, "teachers": teachers}
    with one_thread():
        queries = _queries(subject, rng)
        near = _neighbours(queries, subject, dataset.fit, held, rng, device)
        bench = _bench(subject, dataset, held, networks, rng, settings)
    rows = _membership(bench, network, networks, _rates(distilled, recipe), workers, on_progress)
    sizes = {"trained_on": len(subject), "compared": len(queries)}
    sizes |= {"fit": len(dataset.fit), "held_out": len(held)}
    mine, theirs = subject.spec.fingerprint, dataset.fit.spec.fingerprint
    matches = mine == theirs if mine and theirs else None
    shown, name = resolve(network, dataset.fit.spec.shape), dataset.fit.spec.name
    return Audit(name, tuple(near), tuple(rows), sizes, shown, recipe, seed, matches)


def _teachers(distilled: Judged) -> tuple[nn.Module, ...]:
    """The networks that come with the set: whoever has the set has them too."""
    stored: Callable[[], Sequence[nn.Module]] = getattr(distilled, "teachers", tuple)
    return tuple(stored())


def _joined(*parts: Images) -> Images:
    """The images of several parts as one, sorted by class."""
    x, y = torch.cat([part.x for part in parts]), torch.cat([part.y for part in parts])
    return Images(x, y, parts[0].spec).sorted_by_class()


def _check(
    subject: Images | Composites, dataset: Dataset, held: Images, network: NetSpec, networks: int, seed: int
) -> None:
    spec, mine = dataset.fit.spec, subject.spec
    if (mine.shape, mine.classes) != (spec.shape, spec.classes):
        raise UsageError(
            f"the set holds {mine.shape} images of {len(mine.classes)} classes, "
            f"'{spec.name}' {spec.shape} of {len(spec.classes)}, or their classes differ",
            "Audit the set beside the dataset that it was distilled from",
        )
    present = subject.classes.unique().tolist()
    pools = len(_places(dataset.fit, present)), len(_places(held, present))
    for name, count in (("set", len(subject)), ("fit part", pools[0]), ("held-out part", pools[1])):
        if count < 2:
            raise UsageError(
                f"the {name} has {count} images of the set's classes", "An audit needs 2 of them there"
            )
    if not len(dataset.validation):
        raise UsageError(f"the validation part of '{spec.name}' is empty", "Give a dataset with more images")
    require_positive("networks", networks)
    build(network, spec.shape, len(spec.classes), Rng(seed).torch("check"))  # refused before any is trained


def _queries(subject: Images | Composites, rng: Rng) -> Tensor:
    """The set's images as rows of float64 pixels, clamped to [0, 1], which takes them from no real image.

    Of a compensated set: every base, and a draw of the rest up to COMPOSITES in all.
    """
    if isinstance(subject, Composites):
        bases = len(subject.bases)
        rest = bases + torch.randperm(len(subject) - bases, generator=rng.torch("composites"))
        subject = subject.take(torch.cat([torch.arange(bases), rest[: max(0, COMPOSITES - bases)]]))
    return subject.spec.denormalise(subject.model_input()).clamp(0, 1).flatten(1).double()


def _neighbours(
    queries: Tensor, subject: Images | Composites, fit: Images, held: Images, rng: Rng, device: str
) -> list[Record]:
    """The set, as many random real images, and as many held-out ones, which are then no controls."""
    present = subject.classes.unique().tolist()
    real = _random(fit, present, len(queries), rng.fold("real"))
    out = _random(held, present, min(len(queries), len(_places(held, present)) // 2), rng.fold("held_out"))
    kept = torch.ones(len(held), dtype=torch.bool).index_fill(0, out, False).nonzero().squeeze(1)
    everything = torch.arange(len(held))
    rows = (
        (SUBJECT, queries, everything),
        ("random", grey(fit.x[real]), everything),
        ("held_out", grey(held.x[out]), kept),
    )
    found = []
    for name, x, control in rows:
        classes = held.classes[control]
        pairs = [equal_draw(fit.classes, classes, present, rng.fold(name, i)) for i in range(DRAWS)]
        near = compare(x.to(device), fit.x.to(device), held.x[control].to(device), pairs)
        found.append({"name": name, **near})
    return found


def _places(images: Images, present: Sequence[int]) -> Tensor:
    return torch.isin(images.classes, torch.tensor(present)).nonzero().squeeze(1)


def _random(images: Images, present: Sequence[int], count: int, rng: Rng) -> Tensor:
    """Indices of `count` images of the classes in `present`, evenly spread; all where there are less."""
    places = _places(images, present)
    return places[random_total(images.take(places), min(count, len(places)), rng)]


def _bench(
    subject: Images | Composites, dataset: Dataset, held: Images, networks: int, rng: Rng, settings: Record
) -> Bench:
    """What all networks share, in the set's own model-input space; non-members stand as the test part."""
    fit, validation, held = (
        replace(part, spec=subject.spec) for part in (dataset.fit, dataset.validation, held)
    )
    present = subject.classes.unique().tolist()
    members, others = equal_draw(fit.classes, held.classes, present, rng.fold("membership"))
    picks: dict[Any, Tensor] = {MEMBERS: members}
    for index in (None, *range(networks)):
        here = rng.fold("random", "trial" if index is None else index)
        picks["random", index] = _random(fit, present, len(subject), here)
    return Bench(subject, fit, validation, Sealed(held.take(others)), picks, **settings)


def _rates(distilled: Judged, recipe: Recipe) -> dict[str, tuple[float, ...]]:
    """The rates to try for each row: the recipe's, and one that was learned with the set."""
    learned = distilled.tensors.get("student_lr")
    own = () if learned is None else (float(learned),)
    return {row: tuple(dict.fromkeys((*recipe.lrs, *(own if row == SUBJECT else ())))) for row in ROWS}


def _membership(
    bench: Bench,
    network: NetSpec,
    networks: int,
    rates: Mapping[str, tuple[float, ...]],
    workers: int,
    on_progress: Callable[[int, int], None] | None,
) -> list[Record]:
    """The rows of the attack; teachers that are stored in the set come last."""
    if workers > 1:
        share(bench)
    trials = [Job(network, network.name, row, lr) for row in ROWS if len(rates[row]) > 1 for lr in rates[row]]
    total = len(trials) + networks * len(ROWS)
    records: list[Record] = []
    with job_pool(attack_job, bench, workers) as results:
        for record in results(trials):
            records.append(record)
            _tell(on_progress, len(records), total)
        chosen = {row: _best(records, row, rates[row]) for row in ROWS}
        bench.test.unseal()
        finals = [Job(network, network.name, row, chosen[row], i) for row in ROWS for i in range(networks)]
        for record in results(finals):
            records.append(record)
            _tell(on_progress, len(records), total)
    return _rows(bench, [record for record in records if "attacks" in record], chosen)


def _tell(on_progress: Callable[[int, int], None] | None, done: int, total: int) -> None:
    if on_progress is not None:
        on_progress(done, total)


def _best(tried: Sequence[Record], row: str, rates: Sequence[float]) -> float:
    """The rate with the best validation accuracy, the first of equals; the only one is not tried."""
    mine = [record for record in tried if record["row"] == row]
    return max(mine, key=lambda record: record["validation"])["lr"] if mine else rates[0]


def _rows(bench: Bench, finals: Sequence[Record], chosen: Mapping[str, float]) -> list[Record]:
    others, own = len(bench.test), len(bench.picks["random", 0])
    members = dict.fromkeys(ROWS, len(bench.picks[MEMBERS])) | {OWN: own}
    rows = []
    for row, size in ((SUBJECT, len(bench.distilled)), ("random", own), ("full", len(bench.fit))):
        mine = [record["attacks"] for record in finals if record["row"] == row]
        for name in mine[0]:
            found = attack_row(name, [a[name] for a in mine], members[name], others, chosen[row])
            rows.append({**found, "trained_on": size})
    if bench.teachers:
        with one_thread():
            inside = bench.fit.take(bench.picks[MEMBERS])
            nets = placed(bench.teachers, bench.device)
            mine = [attack(net, inside, bench.test.images) for net in nets]
        found = attack_row("teachers", mine, members[SUBJECT], others, None)
        rows.append({**found, "trained_on": None})
    return rows
