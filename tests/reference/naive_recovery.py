"""Recovery written out: statistics by loops, one compensator after the other, activations copied whole."""

import math

import torch
import torch.nn.functional as F
from torch.nn.modules.batchnorm import _BatchNorm


def naive_statistics(inputs, layers, first_weight=10.0, normalised=False):
    """R of batch-norm inputs [n c h w] against the running statistics of `layers`, by loops in float64."""
    total, weights = 0.0, 0.0
    for number, (x, layer) in enumerate(zip(inputs, layers, strict=True)):
        x = x.double()
        means, variances = [], []
        for channel in range(x.shape[1]):
            values = [float(v) for image in x for v in image[channel].flatten()]
            mean = math.fsum(values) / len(values)
            means.append(mean)
            variances.append(math.fsum((v - mean) ** 2 for v in values) / len(values))
        run_mean, run_var = layer.running_mean.double().tolist(), layer.running_var.double().tolist()
        a = math.sqrt(math.fsum((m - r) ** 2 for m, r in zip(means, run_mean, strict=True)))
        b = math.sqrt(math.fsum((v - r) ** 2 for v, r in zip(variances, run_var, strict=True)))
        if normalised:
            a /= math.sqrt(math.fsum(run_var))
            b /= math.sqrt(math.fsum(r * r for r in run_var))
        weight = first_weight if number == 0 else 1.0
        total, weights = total + weight * (a + b), weights + weight
    return total / weights if normalised else total


def batch_norm_inputs(net, x):
    """The inputs of all batch norms of `net` in the order in which they fire, and the logits."""
    inputs, layers = [], []

    def keep(layer, given, made):
        inputs.append(given[0])
        layers.append(layer)

    modules = [m for m in net.modules() if isinstance(m, _BatchNorm)]
    handles = [m.register_forward_hook(keep) for m in modules]
    logits = net(x)
    for handle in handles:
        handle.remove()
    return inputs, layers, logits


def recover_one(net, images, classes, shifts, steps, lr=0.25, r_bn=1.0, first_weight=10.0):
    """One compensator for one sheet as released: the whole sheet a step, copied and permuted activations.

    `shifts` are the rolls of each step. Returns u [1 c h w] and the losses.
    """
    u = torch.zeros_like(images[:1]).requires_grad_()
    optimiser = torch.optim.Adam([u], lr=lr, betas=(0.5, 0.9), eps=1e-8)
    losses = []
    for step in range(steps):
        optimiser.param_groups[0]["lr"] = lr * 0.5 * (1 + math.cos(math.pi * step / steps))
        x = torch.roll(images + u, shifts[step], (2, 3))
        inputs, layers, logits = batch_norm_inputs(net, x)
        terms = []
        for number, (given, layer) in enumerate(zip(inputs, layers, strict=True)):
            copied = given.permute(1, 0, 2, 3).contiguous().reshape(given.shape[1], -1)
            mean, var = copied.mean(1), copied.var(1, unbiased=False)
            term = (mean - layer.running_mean).norm(2) + (var - layer.running_var).norm(2)
            terms.append(term * (first_weight if number == 0 else 1.0))
        loss = F.cross_entropy(logits, classes) + r_bn * sum(terms)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    return u.detach(), losses
