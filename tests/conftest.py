"""What all tests share. Nothing of ours is imported here: annotations are checked from the first import."""

import os
import sys
from pathlib import Path

os.environ.setdefault(
    "OMP_NUM_THREADS", "1"
)  # before torch is imported: small tensors, and the same bits everywhere
sys.path.insert(0, str(Path(__file__).parent / "reference"))
