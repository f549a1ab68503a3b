"""A sample of the scripts `kill.py` and `full.py`: one command, killed and refused at a few of its points."""

import json
import os
import subprocess
import sys
from pathlib import Path

FAULTS = Path(__file__).parent
SCRIPT = """
import sys
sys.path.insert(0, sys.argv[1])
import full, kill
kill.main(["--cases=attention", "--kills=2", "--points=5", f"--results={sys.argv[2]}/kill.json"])
full.main(["--cases=random", "--points=1", f"--results={sys.argv[2]}/full.json"])
"""


def test_what_was_killed_or_had_no_room_ends_with_the_bits_of_a_straight_run(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(FAULTS), str(tmp_path)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    killed = json.loads((tmp_path / "kill.json").read_text())["cases"]["attention"]
    assert killed["problems"] == [] and killed["random_kills"] == 2
    assert sum(killed["points"].values()) >= 4 and killed["identical"] > sum(killed["points"].values())
    full = json.loads((tmp_path / "full.json").read_text())["cases"]["random"]
    assert full["problems"] == [] and set(full["refused"]) == {"ENOSPC", "EDQUOT", "EROFS", "EACCES"}
    assert full["identical"] == sum(full["refused"].values())
