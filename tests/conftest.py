"""What all tests share. Nothing of ours is imported here: annotations are checked from the first import."""

import os
import sys
import tarfile
from pathlib import Path

import pytest

os.environ.setdefault(
    "OMP_NUM_THREADS", "1"
)  # before torch is imported: small tensors, and the same bits everywhere
sys.path.insert(0, str(Path(__file__).parent / "reference"))
GRAPHS = Path(__file__).parents[2] / "shared" / "data" / "graphs.tar.xz"


@pytest.fixture(scope="session", autouse=True)
def kept_rows(tmp_path_factory):
    """Rows that evaluations keep go to a folder of this test run, never to the user's cache."""
    os.environ["DDENGINE_CACHE"] = str(tmp_path_factory.mktemp("rows"))


@pytest.fixture(scope="session")
def graph_sets(tmp_path_factory):
    """A folder with MUTAG, NCI1, PROTEINS, DD and IMDB-BINARY as TU text and ogbg_molbace as OGB csv."""
    if not GRAPHS.exists():
        pytest.skip("the real graph sets (graphs.tar.xz) are not beside the repository")
    folder = tmp_path_factory.mktemp("graph_sets")
    with tarfile.open(GRAPHS) as archive:
        archive.extractall(folder, filter="data")
    return folder / "graphs"
