"""A sample of tests/faults/damage.py: flipped bits, cut files and claims of a gigabyte, for every kind."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from claims import CLAIMS, excess, measured
from damage import damaged, failures, make, outcome, totals
from kinds import KINDS, STATE, STEP

from ddengine import checkpoint


@pytest.mark.parametrize("kind", KINDS)
def test_flipped_bits_and_cuts_are_refused_by_name_or_change_nothing(kind):
    found = damaged([kind], flipped=24, cut=8)
    assert failures(found) == []
    counts = totals(found, "flips")
    assert sum(counts.values()) >= 24
    assert sum(totals(found, "cuts").values()) >= 8
    assert max(counts, key=counts.get) == ("disbelieved" if kind == "kept row" else "refused")


def test_a_change_that_no_hash_sees_counts_as_unnoticed(tmp_path):
    """The measure itself, on a checkpoint of another state whose seal agrees with it."""
    whole = make("checkpoint", tmp_path)
    (path,) = (path for path in whole.data if path.name == "manifest.json")
    checkpoint.save(tmp_path / "other", STEP, {**STATE, "rate": 0.25}, {"seconds": 1.5})
    other = (tmp_path / "other" / path.parent.name / path.name).read_bytes()
    assert outcome(whole, path, other, "rate") == ("unnoticed", "rate")
    assert outcome(whole, path, whole.data[path], "nothing") == ("harmless", "")
    assert outcome(whole, path, b"{}", "all")[0] == "refused"


@pytest.mark.parametrize("claim", CLAIMS)
def test_a_small_file_that_claims_a_gigabyte_takes_no_memory(claim):
    assert excess(claim, measured(CLAIMS[claim])) == []
