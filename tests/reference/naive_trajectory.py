"""Trajectory matching the plain way: an unrolled student under autograd, and momentum on what is learned.

Parameters are lists of tensors, the whole path of the student is one graph, and the rate is exp(a). Segments,
batches and augmentations are given from outside, so that nothing here draws.
"""

import math

import torch
import torch.nn.functional as F
from torch.func import functional_call


def split(net, vector):
    """The parameters of `net` that lie behind one another in a vector."""
    tensors, at = [], 0
    for p in net.parameters():
        tensors.append(vector[at : at + p.numel()].reshape(p.shape).clone())
        at += p.numel()
    assert at == len(vector)
    return tensors


def distance(a, b):
    return sum(((p - q) ** 2).sum() for p, q in zip(a, b, strict=True))


def inner_loss(net, names, params, x, y):
    logits = functional_call(net, dict(zip(names, params, strict=True)), (x,))
    if y.is_floating_point():
        return -(torch.softmax(y, 1) * torch.log_softmax(logits, 1)).sum() / len(x)
    return F.cross_entropy(logits, y)


def miss(net, images, labels, a, segment, batches, augment):
    """|student - target|^2 / |start - target|^2 after a student of one step for each batch."""
    names = [name for name, _ in net.named_parameters()]
    start, target = split(net, segment.start), split(net, segment.targets[-1])
    params = [p.requires_grad_() for p in split(net, segment.start)]
    for step, index in enumerate(batches):
        loss = inner_loss(net, names, params, augment(images[index], step), labels[index])
        gradient = torch.autograd.grad(loss, params, create_graph=True)
        params = [p - torch.exp(a) * g for p, g in zip(params, gradient, strict=True)]
    return distance(params, target) / distance(start, target)


def descend(net, images, labels, rate, steps, given, lr, lr_rate, lr_labels, momentum, labels_momentum):
    """Images, labels, a and losses after `steps`; `given(step)` is the segment, batches and augmentation."""
    a = torch.tensor(math.log(rate))
    soft = labels.is_floating_point()
    values = [images, a, labels] if soft else [images, a]
    rates, memory = [lr, lr_rate / rate**2, lr_labels], [momentum, momentum, labels_momentum]
    velocity, losses = [torch.zeros_like(v) for v in values], []
    for step in range(steps):
        live = [v.detach().clone().requires_grad_() for v in values]
        loss = miss(net, live[0], live[2] if soft else labels, live[1], *given(step))
        found = torch.autograd.grad(loss, live)
        velocity = [m * v + g for m, v, g in zip(memory, velocity, found, strict=False)]
        values = [x - r * v for x, r, v in zip(values, rates, velocity, strict=False)]
        losses.append(float(loss.detach()))
    return values[0], values[2] if soft else labels, values[1], losses
