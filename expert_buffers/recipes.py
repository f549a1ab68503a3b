"""How experts are trained: the published recipes by name, and their mathematics as functions of tensors.

`mtt`: Cazenavette et al., CVPR 2022. `ftd`: Du et al., CVPR 2023, on adaptive GSAM (Kwon et al., ICML 2021;
Zhuang et al., ICLR 2022). `ast`: the released code of alignment with smooth trajectories. `squeeze`: teachers
with batch norm to recover images from (SRe2L, Yin et al., NeurIPS 2023; INFER, Zhang et al. 2024).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ddengine.errors import UsageError, require, require_positive, unknown
from ddengine.ops import dsa

SCHEDULES = ("constant", "cosine")
NAMED = ("auto", "mild")  # augmentations that depend on the dataset
TINY = 1e-12  # added to the norm that the climb of GSAM is divided by, as released


@dataclass(frozen=True)
class ExpertRecipe:
    """SGD over whole epochs, the last incomplete batch kept, and what the recipes add to it.

    `epochs` is the nominal length of a full expert; `augment` a DSA string, "none", "auto" for the papers'
    choice by dataset, or "mild" for one of crop and flip an image (crop alone for digits). `rho` > 0 takes
    the adaptive GSAM direction with `alpha` of the orthogonal part, two gradients a step. The cross-entropy
    of epoch e is scaled by `loss_ramp[e]`, by 1 after it; `penalty` times the gradient penalty is added to
    it. From epoch `lr_drop_epoch` on (counted from 0) the rate is lr * lr_drop, with a fresh momentum.
    `schedule` "cosine" lets the rate fall to zero over `epochs`, epoch by epoch: an expert is then trained
    for just so long.
    Raises UsageError naming recipe.KEY for a value out of range.
    """

    name: str = "mtt"
    lr: float = 0.01
    momentum: float = 0.0
    weight_decay: float = 0.0
    batch_size: int = 256
    epochs: int = 50
    augment: str = "auto"
    rho: float = 0.0
    alpha: float = 0.0
    loss_ramp: tuple[float, ...] = ()
    penalty: float = 0.0
    lr_drop: float = 1.0
    lr_drop_epoch: int | None = None
    schedule: str = "constant"

    def __post_init__(self) -> None:
        for key in ("lr", "batch_size", "epochs", "lr_drop"):
            require_positive(f"recipe.{key}", getattr(self, key))
        for key in ("weight_decay", "rho", "alpha", "penalty"):
            require_positive(f"recipe.{key}", getattr(self, key), zero=True)
        for key in ("batch_size", "epochs", "lr_drop_epoch"):
            value = getattr(self, key)
            if value is not None and not isinstance(value, int):
                raise UsageError(f"recipe.{key}={value} is not a whole number", "Give a whole number")
        if self.lr_drop_epoch is not None:
            require_positive("recipe.lr_drop_epoch", self.lr_drop_epoch)
        if not 0 <= self.momentum < 1:
            raise UsageError(f"recipe.momentum={self.momentum} is out of range", "Give 0 <= momentum < 1")
        require(self.schedule, SCHEDULES, "recipe.schedule")
        for scale in self.loss_ramp:
            require_positive("recipe.loss_ramp", scale)
        if self.augment not in NAMED:
            dsa.parse(self.augment)

    def resolved(self, dataset: str) -> "ExpertRecipe":
        """The recipe with the augmentation of `dataset` in place of "auto" or "mild"."""
        found = {"auto": dsa.strategy_for(dataset), "mild": "crop" if dataset in dsa.DIGITS else "crop_flip"}
        return replace(self, augment=found.get(self.augment, self.augment))

    def to_dict(self) -> dict[str, Any]:
        """What decides the weights of an expert, as plain JSON values: the nominal length only where the rate
        follows it.
        """
        needless = ("epochs", "schedule") if self.schedule == "constant" else ()
        values = {key: value for key, value in asdict(self).items() if key not in needless}
        return values | {"loss_ramp": list(self.loss_ramp)}


RECIPES = {
    # MTT, released buffer script: lr .01, no momentum, no weight decay, constant rate, batch 256, 50 epochs
    "mtt": ExpertRecipe("mtt"),
    # FTD: the same under GSAM; rho .01 of its command (not the script's default, 2), alpha .3 of its rows
    # for CIFAR-10 at 1 and 10 images a class and of DATM
    "ftd": ExpertRecipe("ftd", rho=0.01, alpha=0.3),
    # AST, released code: c_e on the first ten epochs, lambda 2, rate x 0.6 after epoch 50 // 2 + 1 = 26
    "ast": ExpertRecipe(
        "ast",
        lr=0.003,
        momentum=0.9,
        weight_decay=1e-3,
        loss_ramp=(0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95),
        penalty=2.0,
        lr_drop=0.6,
        lr_drop_epoch=27,
    ),
    # INFER, released CIFAR script: lr .1, momentum .9, weight decay 5e-4, batch 128, cosine, crop and flip
    # (here one of the two an image); 10 epochs in place of 200, since over-trained teachers are harder to
    # recover images from
    "squeeze": ExpertRecipe(
        "squeeze",
        lr=0.1,
        momentum=0.9,
        weight_decay=5e-4,
        batch_size=128,
        epochs=10,
        augment="mild",
        schedule="cosine",
    ),
}


def find_recipe(recipe: "str | ExpertRecipe") -> ExpertRecipe:
    """The recipe called so, or the recipe itself (UsageError lists the known names)."""
    if isinstance(recipe, ExpertRecipe):
        return recipe
    if recipe not in RECIPES:
        raise unknown("recipe", recipe, RECIPES)
    return RECIPES[recipe]


def rate(recipe: ExpertRecipe, epoch: int) -> float:
    """The learning rate of an epoch, counted from 0."""
    dropped = recipe.lr_drop_epoch is not None and epoch >= recipe.lr_drop_epoch
    lr = recipe.lr * recipe.lr_drop if dropped else recipe.lr
    if recipe.schedule == "constant":
        return lr
    return lr * (1 + math.cos(math.pi * min(epoch / recipe.epochs, 1))) / 2


def loss_scale(ramp: Sequence[float], epoch: int) -> float:
    """The factor c_e of the cross-entropy in an epoch: the ramp, then 1 (AST's clipping loss)."""
    return ramp[epoch] if epoch < len(ramp) else 1.0


def climb(w: Float[Tensor, " p"], g: Float[Tensor, " p"], rho: float | int) -> Float[Tensor, " p"]:
    """The adaptive ascent rho * w^2 g / (|| |w| g || + 1e-12), one norm over all parameters (ASAM)."""
    return w.square() * g * (rho / ((w.abs() * g).norm() + TINY))


def orthogonal_part(g: Float[Tensor, " p"], onto: Float[Tensor, " p"]) -> Float[Tensor, " p"]:
    """What of `g` is orthogonal to `onto`: g - <g, onto> / ||onto||^2 * onto; all of it for onto = 0."""
    square = onto.square().sum()
    return g - (g * onto).sum() / square.clamp_min(torch.finfo(g.dtype).tiny) * onto


def gsam_direction(
    gradient: Callable[[Tensor], Tensor], w: Float[Tensor, " p"], rho: float | int, alpha: float | int
) -> Float[Tensor, " p"]:
    """The direction that GSAM descends: g_p - alpha * g_orthogonal, with g_p the gradient at w + climb.

    `gradient` maps flat weights to the flat gradient of the loss there. rho = 0 is the plain gradient at one
    call; alpha = 0 is adaptive SAM.
    """
    g = gradient(w)
    if rho == 0:
        return g
    above = gradient(w + climb(w, g, rho))
    return above if alpha == 0 else above - alpha * orthogonal_part(g, above)


def gradient_penalty(logits: Callable[[Tensor], Tensor], x: Float[Tensor, "n c h w"]) -> Float[Tensor, ""]:
    """mean((||d sum_k f_k(x) / dx||_2 - 1)^2) with the norm over channels alone, so one value a pixel (AST).

    Differentiable with respect to the weights inside `logits`.
    """
    x = x.detach().requires_grad_()
    (slope,) = torch.autograd.grad(logits(x).float().sum(), x, create_graph=True)
    return (slope.norm(dim=1) - 1).square().mean()


def sgd_step(
    w: Float[Tensor, " p"],
    g: Float[Tensor, " p"],
    velocity: Float[Tensor, " p"] | None,
    lr: float | int,
    momentum: float | int = 0.0,
    weight_decay: float | int = 0.0,
) -> tuple[Float[Tensor, " p"], Float[Tensor, " p"] | None]:
    """Weights and velocity after one step of torch.optim.SGD; without a velocity it is the first one."""
    if weight_decay:
        g = g.add(w, alpha=weight_decay)
    if momentum:
        g = velocity = g if velocity is None else velocity.mul(momentum).add(g)
    return w.add(g, alpha=-lr), velocity if momentum else None
