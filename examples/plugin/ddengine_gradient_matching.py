"""Gradient matching (DC, Zhao, Mopuri and Bilen, ICLR 2021; with DSA, Zhao and Bilen, ICML 2021).

The images of each class give a network the gradient that real images of the class give it:

    L = sum_k sum_l d(grad_l CE(A(real_k)), grad_l CE(A(syn_k))),
    d(G, H) = sum_i (1 - G_i . H_i / (|G_i| |H_i|))                                        (DC, eq. 10)

over layers l and their output nodes i, A one siamese augmentation a class ("none" is DC, a DSA string DSA).
A network is drawn, trained on the set between `matches` steps of the pixels, and replaced by a fresh one.
Pixel SGD, rate .1, momentum .5, 256 real images a class, 1,000 networks; the network's rate is .01 (released
code of DC and DSA, as are the options whose source is not named).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.func import functional_call

from ddengine.errors import UsageError, require, require_positive
from ddengine.nets import NetSpec, build, has_batch_norm, reinitialise, resolve
from ddengine.ops import dsa
from ddengine.rng import Rng
from ddengine.types import Accepts, Metrics, SynthSet, Task, Workspace
from matchers.parametrised import FormOptions, form, per_class
from synth import STARTS, start_images
from synth.pixels import CODECS

EPSILON = 1e-6  # added to the product of two norms, as in the released code
INNER = 500  # steps on the set for one network: 10 x 50, 20 x 25 and 50 x 10 at those IPC

Weights = dict[str, Tensor]


@dataclass(frozen=True)
class GradientOptions:
    """Options of the `gradient` matcher.

    `matches` steps of the pixels on one network are, where None, as many as images per class, and `inner`
    steps of the network between two of them 500 / `matches`; at one match the network is never trained.
    """

    steps: int = 1000
    lr: float | int = 0.1
    momentum: float | int = 0.5
    real_per_class: int = 256
    matches: int | None = None
    inner: int | None = None
    network_lr: float | int = 0.01
    augment: str = "auto"
    start: str = "real"
    codec: str = "uint8"
    synth: FormOptions = FormOptions()

    def __post_init__(self) -> None:
        for key in ("steps", "lr", "real_per_class", "matches", "inner", "network_lr"):
            if getattr(self, key) is not None:
                require_positive(f"matcher.{key}", getattr(self, key))
        require_positive("matcher.momentum", self.momentum, zero=True)
        require(self.start, STARTS, "matcher.start")
        require(self.codec, CODECS, "matcher.codec")
        if self.augment != "auto":
            dsa.parse(self.augment)


@dataclass(frozen=True)
class GradientState:
    """Steps done, the set, the velocity of its free tensors, and the weights that the next step matches on.

    `weights` are empty where every step draws a network of its own.
    """

    step: int
    synth: SynthSet
    velocity: dict[str, Tensor]
    weights: Weights


@dataclass(frozen=True)
class GradientMatching:
    """Gradient matching of pixels over networks that train on them (see the head of this file)."""

    options: GradientOptions = GradientOptions()
    network: NetSpec = NetSpec()

    accepts: ClassVar[Accepts] = Accepts(source="images", bf16=False)

    def steps(self, task: Task) -> int:
        """Steps of the pixels: the option."""
        return self.options.steps

    def prepare(self, task: Task, rng: Rng) -> Workspace:
        """Data and one network on the device; UsageError for a network with batch norm."""
        spec, full = task.images.spec, resolve(self.network, task.images.spec.shape)
        net = build(full, spec.shape, len(spec.classes), rng.torch("structure")).eval().to(task.device)
        if has_batch_norm(net):
            raise UsageError(
                f"gradient matching takes no network with batch norm, {full.name} has it",
                "Give network.norm=instance, or another network",
            )
        return Workspace(task, task.images.to(task.device), {"net": net})

    def init(self, task: Task, rng: Rng) -> GradientState:
        """Pixels at the chosen start, at rest, and the first network."""
        o = self.options
        count = per_class(task, o.synth, o.codec)
        x = start_images(o.start, task.images, count, rng.fold("start")).to(task.device)
        synth = form(task, x, o.synth, o.codec, rng)
        velocity = {key: torch.zeros_like(value) for key, value in synth.params().items()}
        kept = self._loops(task)[0] > 1
        weights = drawn(self.prepare(task, rng).extra["net"], rng.fold("network", 0)) if kept else {}
        return GradientState(0, synth, velocity, weights)

    def step(self, state: GradientState, work: Workspace, rng: Rng) -> tuple[GradientState, Metrics]:
        """One step of the pixels on this network; then the network trains on them, or another is drawn."""
        o, net = self.options, work.extra["net"]
        matches, inner = self._loops(work.task)
        number, match = divmod(state.step, matches)
        weights = state.weights or drawn(net, rng.fold("network", number))
        gradient, loss = self._gradient(state.synth, work, weights, rng.fold("step", state.step))
        velocity = {key: o.momentum * state.velocity[key] + g for key, g in gradient.items()}
        moved = {
            key: (value - o.lr * o.synth.relative_rate(key) * velocity[key]).detach()
            for key, value in state.synth.params().items()
        }
        synth = state.synth.replace(moved)
        if match + 1 < matches:
            seen, strategy, here = synth.decode(), self._strategy(work), rng.fold("train", state.step)
            weights = trained(net, weights, seen.x, seen.y, inner, o.network_lr, strategy, here)
        elif matches > 1:
            weights = drawn(net, rng.fold("network", number + 1))
        state = GradientState(state.step + 1, synth, velocity, weights if matches > 1 else {})
        return state, {"loss": loss}

    def finish(self, state: GradientState, work: Workspace, rng: Rng) -> SynthSet:
        """The set as it stands; it is quantised when it is packed."""
        return state.synth

    def _loops(self, task: Task) -> tuple[int, int]:
        """Steps of the pixels on one network, and of the network between two of them."""
        matches = self.options.matches or task.ipc
        return matches, self.options.inner or max(1, INNER // matches)

    def _strategy(self, work: Workspace) -> str:
        return (
            dsa.strategy_for(work.data.spec.name) if self.options.augment == "auto" else self.options.augment
        )

    def _gradient(
        self, synth: SynthSet, work: Workspace, weights: Weights, rng: Rng
    ) -> tuple[dict[str, Tensor], Tensor]:
        """The gradient of the loss for the free tensors, class by class, and the loss."""
        spec, net = work.data.spec, work.extra["net"]
        classes = range(len(spec.classes))
        params = dsa.sample(rng.torch("augment"), self._strategy(work), len(classes), spec.shape[1:])
        real = work.data.draw(rng.torch("real"), classes, self.options.real_per_class)
        free = {key: value.detach().requires_grad_() for key, value in synth.params().items()}
        gradient = {key: torch.zeros_like(value) for key, value in free.items()}
        labels, total = synth.decode().y, torch.zeros((), device=work.task.device)
        for label in classes:
            row = params[torch.tensor([label])]
            images = work.data.model_input(real[label].to(total.device))
            target = class_gradient(net, weights, dsa.apply(images, row), label)
            x = synth.replace(free).decode((labels == label).nonzero().flatten()).x
            ours = class_gradient(net, weights, dsa.apply(x, row), label, differentiable=True)
            loss = gradient_distance(target, ours)
            for key, g in zip(free, torch.autograd.grad(loss, list(free.values())), strict=True):
                gradient[key] += g
            total += loss.detach()
        return gradient, total


def gradient_distance(real: Sequence[Tensor], synthetic: Sequence[Tensor]) -> Float[Tensor, ""]:
    """Sum over layers and output nodes of one minus the cosine of two gradients (DC, eq. 10).

    Gradients have the shapes of weights, the output nodes first. Those of one number a node, biases and the
    scales of norms, have no direction and are left out. Raises UsageError for lists that do not correspond.
    """
    shapes = [[tuple(g.shape) for g in gradients] for gradients in (real, synthetic)]
    if shapes[0] != shapes[1]:
        raise UsageError(f"gradients of shapes {shapes[0]} and {shapes[1]}", "Give those of the same weights")
    total = synthetic[0].new_zeros(())
    for pair in zip(real, synthetic, strict=True):
        if pair[0].ndim > 1:
            g, h = (gradient.flatten(1) for gradient in pair)
            cosine = (g * h).sum(1) / (g.norm(dim=1) * h.norm(dim=1) + EPSILON)
            total = total + (1 - cosine).sum()
    return total


def class_gradient(
    net: nn.Module, weights: Weights, x: Float[Tensor, "n c h w"], label: int, *, differentiable: bool = False
) -> tuple[Tensor, ...]:
    """The gradient of the mean cross-entropy of images of one class, for every weight."""
    free = {key: weight.detach().requires_grad_() for key, weight in weights.items()}
    targets = torch.full((len(x),), label, device=x.device)
    loss = F.cross_entropy(functional_call(net, free, (x,)), targets)
    return torch.autograd.grad(loss, list(free.values()), create_graph=differentiable)


def trained(
    net: nn.Module,
    weights: Weights,
    x: Float[Tensor, "m c h w"],
    labels: Int[Tensor, " m"],
    steps: int,
    lr: float | int,
    strategy: str,
    rng: Rng,
) -> Weights:
    """The weights after `steps` steps of SGD on the whole set, each under an augmentation of its own."""
    size = (x.shape[2], x.shape[3])
    for step in range(steps):
        params = dsa.sample(rng.torch(f"augment {step}"), strategy, len(x), size, one_op=True)
        free = {key: weight.detach().requires_grad_() for key, weight in weights.items()}
        loss = F.cross_entropy(functional_call(net, free, (dsa.apply(x, params),)), labels)
        gradients = torch.autograd.grad(loss, list(free.values()))
        weights = {
            key: (weight - lr * g).detach() for (key, weight), g in zip(free.items(), gradients, strict=True)
        }
    return weights


def drawn(net: nn.Module, rng: Rng) -> Weights:
    """The weights of a fresh network of the form of `net`."""
    fresh: Mapping[str, Tensor] = dict(reinitialise(net, rng.torch("weights")).named_parameters())
    return {key: weight.detach().clone() for key, weight in fresh.items()}


GRADIENT_MATCHING = GradientMatching()
