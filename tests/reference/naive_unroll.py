"""Training on synthetic images and its derivatives the long way: dense Jacobians, carried forwards in time.

What is differentiated is q = (all pixels, all soft labels, rate). With S_t = d theta_t / dq, B_t = d b_t / dq

    B_{t+1} = mu B_t + d(c g_t)/dq + c H_t S_t + omega S_t
    S_{t+1} = S_t - rate B_{t+1} - b_{t+1} d rate / dq

so nothing is run backwards in time. Float64 throughout; `loss(theta, x, y)` is any smooth function.
"""

from dataclasses import dataclass, field
from math import prod

import torch
import torch.nn.functional as F
from torch.autograd.functional import jacobian


@dataclass
class Training:
    """How the student is trained; `augment(x, step)` changes the images of a step."""

    loss: object
    batches: list
    momentum: float = 0.0
    weight_decay: float = 0.0
    scale: float = 1.0
    augment: object = field(default=lambda x, step: x)


def pieces(theta, shapes):
    """The tensors of `shapes` that lie behind one another in a vector."""
    parts = theta.split([prod(shape) for shape in shapes])
    return [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]


def cross_entropy(logits, y):
    """Mean cross-entropy against class numbers, or against rows of probabilities."""
    log_p = logits - logits.logsumexp(1, keepdim=True)
    if not y.is_floating_point():
        y = F.one_hot(y, logits.shape[1]).to(logits)
    return -(y * log_p).sum(1).mean()


def smooth_loss(filters, shape, classes):
    """Cross-entropy of conv 3x3 - GELU - average pool 2 - linear, and the length of its parameters."""
    channels, height, width = shape
    flat = filters * (height // 2) * (width // 2)
    shapes = [(filters, channels, 3, 3), (filters,), (classes, flat), (classes,)]

    def loss(theta, x, y):
        kernel, bias, weight, offset = pieces(theta, shapes)
        h = F.avg_pool2d(F.gelu(F.conv2d(x, kernel, bias, padding=1)), 2)
        return cross_entropy(h.flatten(1) @ weight.T + offset, y)

    return loss, sum(prod(s) for s in shapes)


def gradient(training, theta, x, y, step):
    """The scaled gradient g_t [p] of one step, differentiable in everything."""
    index = training.batches[step]
    live = theta if theta.requires_grad else theta.detach().requires_grad_()
    value = training.scale * training.loss(live, training.augment(x[index], step), y[index])
    return torch.autograd.grad(value, live, create_graph=True)[0]


def train(training, start, x, y, rate):
    """theta_0..theta_T and b_1..b_T, as values."""
    theta, b, states, buffers = start, torch.zeros_like(start), [start], []
    for step in range(len(training.batches)):
        g = gradient(training, theta, x, y, step).detach()
        b = training.momentum * b + g + training.weight_decay * theta
        theta = theta - rate * b
        states.append(theta)
        buffers.append(b)
    return states, buffers


def miss(states, points):
    """Sum of weight |theta_s - target|^2 / distance over points (s, target, distance, weight)."""
    total = 0.0
    for step, target, distance, weight in points:
        total += weight * float(((states[step] - target) ** 2).sum()) / float(distance)
    return total


def sensitivities(training, start, x, y, rate, hessian=True):
    """S_0..S_T [p q]; without `hessian` every H_t is left out of the recursion."""
    soft = y.is_floating_point()
    states, buffers = train(training, start, x, y, rate)
    q = x.numel() + (y.numel() if soft else 0) + 1
    s = [torch.zeros(len(start), q, dtype=start.dtype)]
    moved = torch.zeros_like(s[0])
    for step, theta in enumerate(states[:-1]):
        free = (theta, x, y) if soft else (theta, x)
        found = jacobian(lambda t, a, b=y, step=step: gradient(training, t, a, b, step), free, vectorize=True)
        h, *direct = [block.flatten(1) for block in found]
        direct = torch.cat([*direct, torch.zeros(len(start), 1, dtype=start.dtype)], 1)
        through = h @ s[-1] if hessian else 0.0
        moved = training.momentum * moved + direct + through + training.weight_decay * s[-1]
        after = s[-1] - rate * moved
        after[:, -1] -= buffers[step]
        s.append(after)
    return states, s


def gradients(training, start, x, y, rate, points, hessian=True):
    """The miss and its gradients for pixels, soft labels (None for class numbers) and rate."""
    states, s = sensitivities(training, start, x, y, rate, hessian)
    row = sum(2 * w / d * (states[t] - target) @ s[t] for t, target, d, w in points)
    pixels, labels = row[: x.numel()].reshape(x.shape), row[x.numel() : -1]
    soft = y.is_floating_point()
    return miss(states, points), pixels, labels.reshape(y.shape) if soft else None, row[-1]


def slope(f, at, direction, h):
    """The central difference of `f` at a point along a direction."""
    return (f(at + h * direction) - f(at - h * direction)) / (2 * h)
