"""Every input of the committed corpus, through its reader: taken or refused by the reader's own error."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from fuzz import CORPUS, tried
from fuzz_readers import READERS

LARGEST = 2 << 20  # bytes of the whole corpus


def test_the_corpus_has_inputs_of_every_reader_and_is_small():
    assert {path.name for path in CORPUS.iterdir()} == set(READERS)
    assert sum(path.stat().st_size for path in CORPUS.rglob("*") if path.is_file()) < LARGEST


@pytest.mark.parametrize("name", READERS)
def test_inputs_that_fuzzing_found_are_taken_or_refused_and_make_nothing(name, tmp_path):
    refused = 0
    for path in sorted((CORPUS / name).iterdir()):
        refused += tried(READERS[name], path.read_bytes(), tmp_path)
    assert refused < len(list((CORPUS / name).iterdir()))  # its seeds hold what it reads
