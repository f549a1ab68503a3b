"""What all tests share. Nothing of ours is imported here: annotations are checked from the first import on."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "reference"))
