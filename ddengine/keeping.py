"""Which networks of an evaluation are kept for the next one, and what their records depend on."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

import torch

from ddengine import __version__
from ddengine.bench import DRAWN_ANEW, SAME_LABELS, SUBJECT, VARIANTS, Bench, Job, Record
from ddengine.kept import Kept, code, content, digest
from ddengine.nets import resolve
from ddengine.parallel import MapJobs


class Keeping:
    """Runs the jobs of a bench, but for those whose records an earlier evaluation left in `kept`."""

    def __init__(self, bench: Bench, kept: Kept | None) -> None:
        self.bench, self.kept = bench, kept
        self.common = {} if kept is None else _common(bench)

    def run(self, results: MapJobs, jobs: Sequence[Job]) -> Iterator[Record]:
        """The records of `jobs` in order; those that were kept say so ("kept": true)."""
        found = [self._found(job) for job in jobs]
        fresh = results([job for job, record in zip(jobs, found, strict=True) if record is None])
        for job, record in zip(jobs, found, strict=True):
            if record is not None:
                yield {**record, "network": job.label, "kept": True}
                continue
            made = next(fresh)
            if self.kept is not None and keepable(job.row):
                self.kept.put(self._depends(job), made)
            yield made

    def _found(self, job: Job) -> Record | None:
        return self.kept.find(self._depends(job)) if self.kept is not None and keepable(job.row) else None

    def _depends(self, job: Job) -> dict[str, Any]:
        """All that the record of `job` depends on, as plain JSON values."""
        row, shape = VARIANTS.get(job.row, job.row), self.bench.fit.spec.shape
        key = row, job.index if row in DRAWN_ANEW else None
        return self.common | {
            "row": job.row,
            "pick": digest(self.bench.picks[key]) if key in self.bench.picks else "all",
            "network": resolve(job.network, shape).to_dict(),
            "recipe": asdict(self.bench.recipe_of(job.row)),
            "lr": job.lr,
            "index": job.index,
        }


def keepable(row: str) -> bool:
    """Whether a row depends on data and recipe alone, and not on a set or on teachers."""
    return VARIANTS.get(row, row) not in (SUBJECT, SAME_LABELS)


def _common(bench: Bench) -> dict[str, Any]:
    """What all records of an evaluation depend on; the seal of the test part stays whole under its hash."""
    return {
        "format": 1,
        "fit": content(bench.fit),
        "validation": content(bench.validation),
        "test": bench.test.hashed(content),
        "seed": bench.seed,
        "robust": [*bench.robust, bench.severity] if bench.robust else [],
        "looks": bench.looks,
        "device": bench.device.partition(":")[0],
        "precision": bench.precision,
        "versions": {"torch": torch.__version__, "ddengine": __version__},
        "code": code(),
    }
