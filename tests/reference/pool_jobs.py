"""Jobs for worker processes: they find this module on the path, which test modules are not on."""

import os
import signal
import time

import torch

from ddengine.errors import UsageError


def scaled(shared, job):
    if job == 0:
        raise UsageError(f"job {job} is wrong", "Give another")
    return shared * job if job > 0 else os._exit(9)


def threads(shared, job):
    return torch.get_num_threads(), os.getpid()


def waits(shared, job):
    time.sleep(job)
    return job


def naps(shared, job):
    time.sleep(job)
    return signal.getsignal(signal.SIGINT) == signal.SIG_IGN
