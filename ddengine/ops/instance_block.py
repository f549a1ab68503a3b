"""A ConvNet's forward on the CPU, block by block: conv, instance norm, ReLU, power sums, pool, in one memory.

`net.features` writes each of these maps anew, and a written map costs more than what is computed on it: the
system has to find new pages for every one. Here the conv's output is worked on in place, a few images at a
time, so that it stays in cache; a block that will be differentiated keeps its normalised map and nothing
else. The weights are constants: gradients go to the images alone.
"""

from collections.abc import Collection
from typing import Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.grad import conv2d_input

from ddengine.nets.convnet import ConvNet
from ddengine.nets.core import check_input

POWERS = (1, 2, 4)
CACHE = 4 << 20  # bytes of the first map of a piece; measured: 8 images of ConvNet-3, width 128, 32 pixels


def applies(net: Any, x: Tensor, p: float | int) -> bool:
    """Whether `features` computes this: an instance-norm ConvNet with fixed weights, on the CPU, |f|^p.

    Not where a compiler is tracing, which fuses what it is given itself.
    """
    return (
        not torch.compiler.is_compiling()
        and isinstance(net, ConvNet)
        and x.device.type == "cpu"
        and p in POWERS
        and all(isinstance(m, nn.GroupNorm) and m.num_groups == m.num_channels for m in net.norms)
        and not any(parameter.requires_grad for parameter in net.parameters())
    )


def features(
    net: ConvNet, x: Float[Tensor, "n c h w"], p: float | int, levels: Collection[int]
) -> tuple[Float[Tensor, "n d"], list[Float[Tensor, "n _"]]]:
    """The embedding, and for each ReLU map in `levels`, in order, the sum over channels of f^p, row by row.

    The same numbers as `net.features` up to rounding, float32 or wider; differentiable once in x.
    """
    check_input(x, net.shape)
    pieces = x.split(images_at_once(net, x))
    room = torch.empty(len(pieces[0]) * _first_map(net, x), dtype=x.dtype)
    found = [_trunk(net, piece, p, levels, room) for piece in pieces]
    if len(found) == 1:
        return found[0]
    return torch.cat([e for e, _ in found]), [torch.cat(s) for s in zip(*(s for _, s in found), strict=True)]


def images_at_once(net: ConvNet, x: Float[Tensor, "n c h w"]) -> int:
    """Images whose first map is at most CACHE bytes, at least one."""
    return max(1, CACHE // (4 * _first_map(net, x)))


def _first_map(net: ConvNet, x: Tensor) -> int:
    conv = cast(nn.Conv2d, net.convs[0])
    grown = 2 * int(conv.padding[0]) - 2
    return conv.out_channels * (x.shape[2] + grown) * (x.shape[3] + grown)


def _trunk(
    net: ConvNet, x: Tensor, p: float | int, levels: Collection[int], room: Tensor
) -> tuple[Tensor, list[Tensor]]:
    sums = []
    for level, pair in enumerate(zip(net.convs, net.norms, strict=True)):
        conv, norm = cast(tuple[nn.Conv2d, nn.GroupNorm], pair)
        power = int(p) if level in levels else None
        if torch.is_grad_enabled() and x.requires_grad:
            x, found = _Block.apply(x, conv, norm, power, room)
        else:
            x, found = _block(x, conv, norm, power, room)
        if found is not None:
            sums.append(found)
    return x.flatten(1), sums


def _block(
    x: Tensor, conv: nn.Conv2d, norm: nn.GroupNorm, power: int | None, room: Tensor
) -> tuple[Tensor, Tensor | None]:
    """The pooled map and the power sums of a block that nobody will differentiate."""
    y = _maps(conv(x))
    inverse = _centre(y, norm.eps, room)
    flat = y.flatten(1, 2)
    torch.addcmul(norm.bias, flat, inverse * norm.weight, out=flat).relu_()
    return _pooled(y), _power_sums(y, power)


class _Block(torch.autograd.Function):
    """`_block` with a derivative for x: all that it keeps is the map after its norm."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, conv: nn.Conv2d, norm: nn.GroupNorm, power: int | None, room: Tensor
    ) -> Any:
        raw = conv(x)
        ctx.rest = conv, norm, power, x.shape, x.dtype, raw.dtype
        y = _maps(raw)
        inverse = _centre(y, norm.eps, room)
        y.flatten(1, 2).mul_(inverse)
        ctx.save_for_backward(y, inverse)
        ctx.room = room[: y.numel()].view_as(y)
        z = torch.addcmul(norm.bias, y, norm.weight, out=ctx.room).relu_()
        return _pooled(z), _power_sums(z, power)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_pooled: Tensor, g_sums: Tensor | None) -> Any:
        y, inverse = ctx.saved_tensors
        conv, norm, power, shape, dtype, narrow = ctx.rest
        g = torch.addcmul(norm.bias, y, norm.weight).relu_()
        positive = g > 0
        _power_gradient(g, power, g_sums)
        h, w = (side // 2 for side in g.shape[1:3])
        inside = g[:, : 2 * h, : 2 * w].unflatten(2, (w, 2)).unflatten(1, (h, 2))
        inside += g_pooled.permute(0, 2, 3, 1)[:, :, None, :, None] / 4
        g.mul_(positive)
        flat, seen = g.flatten(1, 2), y.flatten(1, 2)
        mean = flat.mean(1, keepdim=True)
        along = torch.mul(flat, seen, out=ctx.room.flatten(1, 2)).mean(1, keepdim=True)
        flat.sub_(mean).addcmul_(seen, along, value=-1).mul_(inverse * norm.weight)
        g, weight = g.permute(0, 3, 1, 2).to(narrow), conv.weight.to(narrow)
        return conv2d_input(shape, weight, g, padding=conv.padding).to(dtype), None, None, None, None


def _maps(y: Float[Tensor, "n c h w"]) -> Float[Tensor, "n h w c"]:
    """The same memory with the channels innermost, float32 or wider."""
    y = y.contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1)
    return y.float() if y.dtype in (torch.float16, torch.bfloat16) else y


def _centre(y: Float[Tensor, "n h w c"], eps: float, room: Float[Tensor, " _"]) -> Float[Tensor, "n 1 c"]:
    """Take each map's mean out of it, in place; returns what its deviations have to be multiplied with."""
    flat = y.flatten(1, 2)
    flat.sub_(flat.mean(1, keepdim=True))
    squares = torch.square(flat, out=room[: flat.numel()].view_as(flat))
    return torch.rsqrt(squares.mean(1, keepdim=True).add_(eps))


def _pooled(z: Float[Tensor, "n h w c"]) -> Float[Tensor, "n c _ _"]:
    return F.avg_pool2d(z.permute(0, 3, 1, 2), 2)


def _power_sums(z: Float[Tensor, "n h w c"], power: int | None) -> Float[Tensor, "n h*w"] | None:
    """Sums over channels of z^power, for which z is used up."""
    if power is None:
        return None
    for _ in range(POWERS.index(power)):
        z = z.square_()
    return z.sum(3).flatten(1)


def _power_gradient(z: Float[Tensor, "n h w c"], power: int | None, g: Tensor | None) -> None:
    """Put power * z^(power - 1), times each sum's gradient, in the place of z."""
    if power is None or g is None:
        z.zero_()
        return
    z = z.fill_(1) if power == 1 else z if power == 2 else z.pow_(3)
    z.mul_(g.reshape(*z.shape[:3], 1) * power)
