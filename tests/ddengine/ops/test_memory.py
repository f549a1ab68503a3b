import subprocess
import sys
from pathlib import Path

import pytest

from ddengine.ops.memory import keep_freed_memory

ROOT = Path(__file__).parents[3]
CODE = """
import resource
import torch
from ddengine.ops.memory import keep_freed_memory

kept = {} and keep_freed_memory()
faults = []
for _ in range(16):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.empty(23 << 20).fill_(1)
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(kept, sum(faults[8:]) / ((23 << 22) / resource.getpagesize()))
"""


def fresh_blocks(keep):
    """What the setting answers in a process of its own, and how many of the last eight blocks were new."""
    given = {"cwd": ROOT, "capture_output": True, "text": True, "timeout": 120, "check": True}
    kept, blocks = subprocess.run(
        [sys.executable, "-c", CODE.replace("{}", str(keep))], **given
    ).stdout.split()
    return kept == "True", float(blocks)


@pytest.mark.skipif(not keep_freed_memory(), reason="this C library has no such setting")
def test_large_tensors_come_back_in_pages_that_are_already_there():
    kept, blocks = fresh_blocks(True)
    told, new = fresh_blocks(False)
    assert (kept, told) == (True, False)
    assert new > 0.01  # all eight of them, in large pages or in small ones
    assert blocks < new / 4  # the first blocks find their place


def test_asking_twice_gives_the_same_answer():
    assert keep_freed_memory() is keep_freed_memory()
