"""Jobs for worker processes: they find this module on the path, which test modules are not on."""

import os
import signal
import time

import torch
from torch import nn

from ddengine.bench import scored_on_test
from ddengine.errors import DDError, UsageError
from ddengine.nets import NetSpec, build
from ddengine.rng import Rng


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


def score_early(bench, job):
    return scored_on_test(nn.Linear(1, 1), bench, Rng(0))


def read_sealed(sealed, number):
    try:
        return len(sealed.images.y)
    except DDError as error:
        return error.cause


def gradient(shared, job):
    """The gradient of a convolution, whose threads and mutexes a copy of this process must not wait for."""
    x = torch.linspace(-1, shared, 8 * 3 * 32 * 32).reshape(8, 3, 32, 32).requires_grad_()
    weight = torch.linspace(-1, 1, 16 * 3 * 9).reshape(16, 3, 3, 3)
    return torch.autograd.grad(torch.conv2d(x, weight).relu().pow(job).mean(), x)[0]


def built(shape, job):
    """The first weights of a network for images of `shape` that is built by its name."""
    name, seed = job
    return next(build(NetSpec(name), shape, 5, torch.Generator().manual_seed(seed)).parameters()).detach()
