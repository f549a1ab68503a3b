import resource
import sys

import pytest
import torch

from ddengine.ops.memory import keep_freed_memory


@pytest.mark.skipif(sys.platform != "linux", reason="the setting is glibc's")
def test_large_tensors_come_back_in_pages_that_are_already_there():
    if not keep_freed_memory():
        pytest.skip("this C library has no such setting")
    faults = []
    for _ in range(16):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.empty(23 << 20).fill_(1)
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    pages = (23 << 22) // resource.getpagesize()
    assert sum(faults[8:]) < pages  # the first blocks find their place; without the setting all eight are new


def test_asking_twice_gives_the_same_answer():
    assert keep_freed_memory() is keep_freed_memory()
