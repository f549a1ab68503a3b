"""Three small networks with batch norm, built from torchvision's blocks: MobileNetV2 (Sandler et al., CVPR
2018), EfficientNet-B0 (Tan and Le, ICML 2019), ShuffleNetV2 (Ma et al., ECCV 2018).

None of them draws anything while it trains: the dropout and the stochastic depth of torchvision's are left
out. torchvision is imported inside functions, as its import takes seconds.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ddengine.nets.core import Features, Tap, check_input, normalisation
from ddengine.nets.resnet import SMALL

ACTIVATIONS = (nn.ReLU, nn.ReLU6, nn.SiLU)
# rows of torchvision's tables: expansion, channels, blocks, stride of the first one (and the kernel)
MOBILENET = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2),
             (6, 320, 1, 1))  # fmt: skip
EFFICIENTNET = ((1, 16, 1, 1, 3), (6, 24, 2, 2, 3), (6, 40, 2, 2, 5), (6, 80, 3, 2, 3), (6, 112, 3, 1, 5),
                (6, 192, 4, 2, 5), (6, 320, 1, 1, 3))  # fmt: skip
SHUFFLENET = (4, 8, 4)  # units of the three stages
LAST = 1280  # channels of the last map of MobileNetV2


class MobileNetV2(nn.Module):
    """Stem, 17 inverted residual blocks, a 1x1 convolution, global average pool, one linear layer.

    Above 64 pixels of the shorter side it is torchvision's mobilenet_v2: `trunk` is `features` there,
    `classifier` is `classifier.1`. Up to 64 the stem has stride 1, and a block of stride 2 gets stride 1
    where it would leave the shorter side one pixel. The stem has `width` channels; the others are
    torchvision's for width_mult = width / 32, nearest multiples of 8, never under 1280 for the last map. A
    block of stride 1 that keeps the channels has a shortcut.
    """

    @staticmethod
    def defaults(shape: tuple[int, int, int]) -> dict[str, Any]:
        """Options that this network has, and what they are for images of `shape` where nothing is given."""
        return {"width": 32, "norm": "batch"}

    def __init__(self, shape: tuple[int, int, int], classes: int, width: int, norm: str) -> None:
        from torchvision.models.mobilenetv2 import InvertedResidual
        from torchvision.ops import Conv2dNormActivation

        super().__init__()
        self.shape = shape
        layer, multiple = partial(normalisation, norm), width / 32
        conv = partial(Conv2dNormActivation, norm_layer=layer, activation_layer=nn.ReLU6)
        first, *strides = _strides(shape, (2, *(row[3] for row in MOBILENET)))
        layers: list[nn.Module] = [conv(shape[0], width, stride=first)]
        before = width
        for (expansion, channels, blocks, _), stride in zip(MOBILENET, strides, strict=True):
            after = _scaled(channels, multiple)
            for number in range(blocks):
                layers.append(InvertedResidual(before, after, 1 if number else stride, expansion, layer))
                before = after
        last = _scaled(LAST, max(1.0, multiple))
        self.trunk = nn.Sequential(*layers, conv(before, last, kernel_size=1))
        self.classifier = nn.Linear(last, classes)
        _out_of_place(self)

    def features(self, x: Float[Tensor, "n c h w"], tap: Tap | None = None) -> Features:
        """Trunk output [n d], `tap(level, map)` of the 35 ReLU6 maps in order of computation."""
        check_input(x, self.shape)
        walk = _Walk(tap)
        block: Any
        stem, *blocks, last = self.trunk
        x = walk(stem, x)
        for block in blocks:
            x = _residual(block, walk(block.conv, x), x)
        return Features(walk(last, x).mean((2, 3)), walk.taps)

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n k"]:
        """Logits."""
        return self.classifier(self.features(x).embedding)


class EfficientNetB0(nn.Module):
    """Stem, 16 inverted residual blocks with squeeze and excitation, a 1x1 convolution, global average pool,
    one linear layer.

    Above 64 pixels of the shorter side it is torchvision's efficientnet_b0: `trunk` is `features` there,
    `classifier` is `classifier.1`. Up to 64 the stem has stride 1, and a block of stride 2 gets stride 1
    where it would leave the shorter side one pixel. The stem has `width` channels; the others are
    torchvision's for width_mult = width / 32, nearest multiples of 8 (the first block begins with a widening
    to such a multiple where `width` is none). A block of stride 1 that keeps the channels has a shortcut.
    """

    @staticmethod
    def defaults(shape: tuple[int, int, int]) -> dict[str, Any]:
        """Options that this network has, and what they are for images of `shape` where nothing is given."""
        return {"width": 32, "norm": "batch"}

    def __init__(self, shape: tuple[int, int, int], classes: int, width: int, norm: str) -> None:
        from torchvision.ops import Conv2dNormActivation

        super().__init__()
        self.shape = shape
        layer = partial(normalisation, norm)
        conv = partial(Conv2dNormActivation, norm_layer=layer, activation_layer=nn.SiLU)
        first, *strides = _strides(shape, (2, *(row[3] for row in EFFICIENTNET)))
        layers: list[nn.Module] = [conv(shape[0], width, stride=first)]
        before = width
        for (expansion, channels, blocks, _, kernel), stride in zip(EFFICIENTNET, strides, strict=True):
            after = _scaled(channels, width / 32)
            ends = [(before, after, stride), *[(after, after, 1)] * (blocks - 1)]
            layers.append(nn.Sequential(*[_mbconv(expansion, kernel, *end, layer) for end in ends]))
            before = after
        self.trunk = nn.Sequential(*layers, conv(before, 4 * before, kernel_size=1))
        self.classifier = nn.Linear(4 * before, classes)
        _out_of_place(self)

    def features(self, x: Float[Tensor, "n c h w"], tap: Tap | None = None) -> Features:
        """Trunk output [n d], `tap(level, map)` of the SiLU maps in order of computation, 33 at the default
        width; the SiLU inside a squeeze and excitation makes no map and is not among them.
        """
        check_input(x, self.shape)
        walk = _Walk(tap)
        block: Any
        stem, *stages, last = self.trunk
        x = walk(stem, x)
        for stage in stages:
            for block in stage.children():
                x = _residual(block, walk(block.block, x), x)
        return Features(walk(last, x).mean((2, 3)), walk.taps)

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n k"]:
        """Logits."""
        return self.classifier(self.features(x).embedding)


class ShuffleNetV2(nn.Module):
    """Stem, three stages of 4, 8 and 4 shuffle units, a 1x1 convolution, global average pool, one linear
    layer.

    Above 64 pixels of the shorter side it is torchvision's shufflenet_v2_x1_0 (`fc` is `classifier`). Up to
    64 the stem has stride 1, there is no max pool, and the first unit of a stage gets stride 1 where it would
    leave the shorter side one pixel; it keeps its two branches and doubles the channels all the same. The
    stem has `width` channels, the others are in proportion: those of a branch in the first stage are the
    integer nearest to 58 * width / 24, twice and four times that after it; the last map has the integer
    nearest to 1024 * width / 24.
    """

    @staticmethod
    def defaults(shape: tuple[int, int, int]) -> dict[str, Any]:
        """Options that this network has, and what they are for images of `shape` where nothing is given."""
        return {"width": 24, "norm": "batch"}

    def __init__(self, shape: tuple[int, int, int], classes: int, width: int, norm: str) -> None:
        super().__init__()
        self.shape = shape
        first, *strides = _strides(shape, (2, 2, 2, 2))
        self.conv1 = _conv(shape[0], width, 3, first)
        half, before = (58 * width + 12) // 24, width
        for stage, (units, stride) in enumerate(zip(SHUFFLENET, strides, strict=True)):
            after = (2 * half) << stage
            self.add_module(f"stage{stage + 2}", _shuffle_stage(before, after, units, stride))
            before = after
        last = (1024 * width + 12) // 24
        self.conv5 = _conv(before, last, 1, 1)
        self.classifier = nn.Linear(last, classes)
        _normalised(self, norm)
        _out_of_place(self)

    def features(self, x: Float[Tensor, "n c h w"], tap: Tap | None = None) -> Features:
        """Trunk output [n d], `tap(level, map)` of the 37 ReLU maps in order of computation: the stem's, of a
        first unit one of its left and two of its right branch, two of every other unit, the last map.
        """
        check_input(x, self.shape)
        walk = _Walk(tap)
        unit: Any
        x = walk(self.conv1, x)
        x = F.max_pool2d(x, 3, 2, padding=1) if min(self.shape[1:]) > SMALL else x
        for stage in range(2, 2 + len(SHUFFLENET)):
            for unit in self.get_submodule(f"stage{stage}").children():
                left, right = (x, x) if len(unit.branch1) else x.chunk(2, dim=1)
                both = torch.cat((walk(unit.branch1, left), walk(unit.branch2, right)), dim=1)
                x = both.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)  # the halves take turns
        return Features(walk(self.conv5, x).mean((2, 3)), walk.taps)

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n k"]:
        """Logits."""
        return self.classifier(self.features(x).embedding)


class _Walk:
    """Runs the layers of torchvision's sequences one by one, so that `tap` sees each activation map."""

    def __init__(self, tap: Tap | None) -> None:
        self.tap = tap
        self.taps: list[Any] = []

    def __call__(self, layers: nn.Module, x: Tensor) -> Tensor:
        for layer in layers.children():
            x = self(layer, x) if isinstance(layer, nn.Sequential) else layer(x)
            if self.tap is not None and isinstance(layer, ACTIVATIONS):
                self.taps.append(self.tap(len(self.taps), x))
        return x


def _residual(block: Any, change: Tensor, x: Tensor) -> Tensor:
    return x + change if block.use_res_connect else change


def _strides(shape: tuple[int, int, int], wanted: Sequence[int]) -> list[int]:
    """The strides of stem and stages: `wanted` for large images; for small ones 1 for the stem, and 1 where
    a stride of 2 would leave the shorter side one pixel.
    """
    side = min(shape[1:])
    if side > SMALL:
        return list(wanted)
    taken = [1]
    for stride in wanted[1:]:
        taken.append(stride if side > 2 else 1)
        side = -(-side // taken[-1])
    return taken


def _scaled(channels: int, multiple: float) -> int:
    """The channels at a width multiplier by torchvision's rule: the nearest multiple of 8, at least 8."""
    from torchvision.models.efficientnet import MBConvConfig

    return MBConvConfig.adjust_channels(channels, multiple)


def _mbconv(
    expansion: int, kernel: int, before: int, after: int, stride: int, layer: Callable[[int], nn.Module]
) -> nn.Module:
    """One block of EfficientNet without stochastic depth."""
    from torchvision.models.efficientnet import MBConv, MBConvConfig

    config = MBConvConfig(expansion, kernel, stride, before, after, 1)
    config.input_channels = before  # the constructor rounds it
    return MBConv(config, 0.0, layer)


def _conv(before: int, after: int, kernel: int, stride: int) -> nn.Sequential:
    conv = nn.Conv2d(before, after, kernel, stride, kernel // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(after), nn.ReLU())


def _shuffle_stage(before: int, after: int, units: int, stride: int) -> nn.Sequential:
    """A stage of ShuffleNetV2, whose first unit has two branches at any stride."""
    from torchvision.models.shufflenetv2 import InvertedResidual

    first = InvertedResidual(before, after, 2)
    for module in first.modules():
        if isinstance(module, nn.Conv2d) and module.groups > 1:
            module.stride = (stride, stride)
    return nn.Sequential(first, *[InvertedResidual(after, after, 1) for _ in range(units - 1)])


def _normalised(net: nn.Module, norm: str) -> None:
    """Put the layer named `norm` in the place of every batch norm."""
    for module in list(net.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.BatchNorm2d):
                module.add_module(name, normalisation(norm, child.num_features))


def _out_of_place(net: nn.Module) -> None:
    """Let activations leave the maps before them alone: who reads a norm's output finds it as it was."""
    for module in net.modules():
        if isinstance(module, ACTIVATIONS):
            module.inplace = False
