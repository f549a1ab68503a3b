"""What every network of the registry does, and what each of them is."""

import numpy as np
import pytest
import torch
from torch import nn
from torchvision.models import resnet18

from ddengine.errors import UsageError
from ddengine.nets import NETWORKS, NetSpec, Network, build, count_parameters
from ddengine.nets.classic import pooling
from ddengine.nets.core import normalisation
from ddengine.nets.vit import Block, patch_size

NARROW = {
    "convnet": {"width": 5}, "mlp": {"width": 7}, "lenet": {}, "alexnet": {"width": 6}, "vgg11": {"width": 3},
    "resnet18": {"width": 3}, "vit": {"width": 10, "depth": 2},
    "mobilenet_v2": {"width": 3}, "efficientnet_b0": {"width": 3}, "shufflenet_v2": {"width": 2},
}  # fmt: skip
SHAPES = [(1, 8, 8), (1, 28, 28), (3, 32, 32), (3, 64, 64), (2, 11, 17), (3, 13, 8)]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def network(name: str, shape: tuple[int, int, int] = (3, 32, 32), classes: int = 7, **options) -> nn.Module:
    return build(NetSpec(name, **{**NARROW[name], **options}), shape, classes, generator())


def images(n: int, shape: tuple[int, int, int], seed: int = 1) -> torch.Tensor:
    return torch.randn((n, *shape), generator=generator(seed))


def map_shapes(net: nn.Module, shape: tuple[int, int, int], n: int = 2) -> list[tuple[int, ...]]:
    return net.features(images(n, shape), lambda level, z: tuple(z.shape)).taps


def test_narrow_options_cover_the_registry():
    assert set(NARROW) == set(NETWORKS)


@pytest.mark.parametrize("name", NARROW)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_classifier_of_the_embedding_gives_the_logits(name, shape):
    net, x = network(name, shape), images(3, shape)
    embedding, taps = net.features(x)
    assert isinstance(net, Network) and taps == []
    assert embedding.shape == (3, net.classifier.in_features)
    logits = net(x)
    assert logits.shape == (3, 7)
    torch.testing.assert_close(embedding @ net.classifier.weight.T + net.classifier.bias, logits)
    assert embedding.std(0).max() > 1e-3, "the embedding tells images apart"


@pytest.mark.parametrize("name", NARROW)
def test_tap_sees_every_level_once_in_order_as_maps(name):
    net, seen = network(name), []

    def tap(level, z):
        seen.append(z)
        return f"map {level}"

    taps = net.features(images(2, (3, 32, 32)), tap).taps
    assert taps == [f"map {level}" for level in range(len(seen))] and seen
    assert all(z.ndim == 4 and len(z) == 2 for z in seen)
    assert name in ("vit", "efficientnet_b0") or all(z.min() >= 0 for z in seen)


@pytest.mark.parametrize("name", NARROW)
def test_networks_leave_no_hooks(name):
    net = network(name)
    net.features(images(2, (3, 32, 32)), lambda level, z: None)
    assert not any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in net.modules())


@pytest.mark.parametrize("name", NARROW)
def test_gradients_reach_every_parameter_and_the_images(name):
    net, x = network(name), images(5, (3, 32, 32)).requires_grad_()
    net(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in net.parameters())
    assert x.grad.abs().sum() > 0


@pytest.mark.parametrize("name", NARROW)
def test_gradients_can_be_differentiated_again(name):
    net, x = network(name, (2, 8, 8)), images(3, (2, 8, 8)).requires_grad_()
    grads = torch.autograd.grad(net(x).square().sum(), list(net.parameters()), create_graph=True)
    (second,) = torch.autograd.grad(sum(g.square().sum() for g in grads), x)
    assert second.isfinite().all() and second.abs().sum() > 0


@pytest.mark.parametrize("name", NARROW)
def test_images_of_another_shape_are_refused(name):
    with pytest.raises(UsageError, match=r"\(3, 32, 31\) do not fit a network built for \(3, 32, 32\)"):
        network(name)(images(2, (3, 32, 31)))


@pytest.mark.parametrize("name", ["convnet", "alexnet", "vgg11", "resnet18"])
def test_instance_norm_sees_each_image_alone_and_batch_norm_does_not(name):
    x = images(3, (2, 8, 8))
    for norm, alone in (("instance", True), ("layer", True), ("batch", False)):
        net = network(name, (2, 8, 8), norm=norm)
        together = net(x)
        single = torch.cat([net(torch.stack([image, image]))[:1] for image in x])
        assert torch.allclose(together, single, atol=1e-5) == alone, norm


def test_instance_norm_is_the_affine_instance_norm_of_torch():
    x = images(2, (5, 3, 7))
    torch.testing.assert_close(normalisation("instance", 5)(x), nn.InstanceNorm2d(5, affine=True)(x))


@pytest.mark.parametrize(
    ("shape", "expected"), [((3, 32, 32), 320_010), ((1, 28, 28), 317_706)], ids=["cifar", "mnist"]
)
def test_convnet_has_the_published_number_of_parameters(shape, expected):
    assert count_parameters(build(NetSpec(), shape, 10, generator())) == expected


def test_convnet_maps_halve_from_32_on_grey_28_pixel_images():
    assert map_shapes(network("convnet", (1, 28, 28)), (1, 28, 28)) == [(2, 5, s, s) for s in (32, 16, 8)]


@pytest.mark.parametrize(("size", "deepest"), [(8, 3), (11, 3), (17, 4)])
def test_convnet_refuses_a_depth_that_pools_the_image_away(size, deepest):
    net = network("convnet", (3, size, 64), depth=deepest)
    assert net(images(2, (3, size, 64))).shape == (2, 7)
    with pytest.raises(UsageError, match=f"at most network.depth={deepest}"):
        network("convnet", (3, size, 64), depth=deepest + 1)


def test_mlp_is_matrices_with_relu_between_them():
    net, x = network("mlp", (2, 8, 9), depth=4), images(3, (2, 8, 9))
    z = x.numpy().reshape(3, -1)
    for layer in net.hidden:
        z = np.maximum(z @ layer.weight.detach().numpy().T + layer.bias.detach().numpy(), 0)
    np.testing.assert_allclose(net.features(x).embedding.detach(), z, atol=1e-5)
    assert map_shapes(net, (2, 8, 9)) == [(2, 7, 1, 1)] * 3


def test_mlp_of_one_layer_is_logistic_regression():
    net = network("mlp", (2, 8, 9), depth=1)
    assert map_shapes(net, (2, 8, 9)) == [] and count_parameters(net) == (2 * 8 * 9 + 1) * 7


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32)], ids=["mnist", "cifar"])
def test_lenet_is_lenet5_on_the_published_sizes(shape):
    assert map_shapes(network("lenet", shape), shape) == [
        (2, 6, 28, 28), (2, 16, 10, 10), (2, 120, 1, 1), (2, 84, 1, 1)
    ]  # fmt: skip
    weights = (25 * shape[0] + 1) * 6 + (25 * 6 + 1) * 16 + (16 * 25 + 1) * 120 + 121 * 84 + 85 * 7
    assert count_parameters(network("lenet", shape)) == weights


def test_alexnet_and_vgg11_have_the_published_maps_and_widths():
    for shape in ((1, 28, 28), (3, 32, 32)):
        net = build(NetSpec("alexnet"), shape, 10, generator())
        wide = [(128, 32), (192, 16), (256, 8), (192, 8), (192, 8)]
        assert map_shapes(net, shape, 1) == [(1, c, s, s) for c, s in wide]
        assert net.classifier.in_features == 192 * 4 * 4
        net = build(NetSpec("vgg11"), shape, 10, generator())
        deep = [(64, 32), (128, 16), (256, 8), (256, 8), (512, 4), (512, 4), (512, 2), (512, 2)]
        assert map_shapes(net, shape, 1) == [(1, c, s, s) for c, s in deep]
        assert net.classifier.in_features == 512


def test_poolings_keep_two_pixels_between_convolutions():
    wanted = (True, True, False, True, False, True, False, True)
    assert pooling((1, 8, 8), wanted) == ([True, True, False, False, False, False, False, True], 1)
    assert pooling((3, 11, 17), wanted) == ([True, True, False, False, False, False, False, True], 1 * 2)
    assert pooling((3, 64, 64), wanted) == (list(wanted), 4)


def test_large_resnet18_computes_what_torchvisions_does_with_the_same_weights():
    shape = (3, 67, 73)
    net = build(NetSpec("resnet18"), shape, 5, generator())
    with torch.device("meta"):
        theirs = resnet18(num_classes=5)
    state = {name.replace("classifier", "fc"): value.clone() for name, value in net.state_dict().items()}
    theirs.load_state_dict(state, strict=True, assign=True)
    x = images(2, shape)
    torch.testing.assert_close(net(x), theirs(x))
    torch.testing.assert_close(net.eval()(x), theirs.eval()(x))


def test_resnet18_maps_are_the_stem_and_two_of_each_block():
    small = [(2, c, s, s) for c, s in ((3, 32), (6, 16), (12, 8), (24, 4)) for _ in range(4)]
    assert map_shapes(network("resnet18"), (3, 32, 32)) == [(2, 3, 32, 32), *small]
    sides = [z[2:] for z in map_shapes(network("resnet18", (1, 8, 9)), (1, 8, 9))]
    assert sides[0] == (8, 9) and sides[-1] == (2, 3), "no stage leaves one pixel"
    large = map_shapes(network("resnet18", (3, 65, 71)), (3, 65, 71))
    assert large[0] == (2, 3, 33, 36) and large[1] == (2, 3, 17, 18) and large[-1] == (2, 24, 3, 3)


def test_vit_block_computes_what_torchs_encoder_layer_does():
    ours = Block(12, 3)
    theirs = nn.TransformerEncoderLayer(12, 3, 48, 0.0, "gelu", batch_first=True, norm_first=True)
    names = {
        "norm1": "norm1", "norm2": "norm2", "self_attn.in_proj_": "qkv.", "self_attn.out_proj": "out",
        "linear1": "up", "linear2": "down",
    }  # fmt: skip
    with torch.no_grad():
        for name, value in ours.named_parameters():
            prefix = next(their for their, our in names.items() if name.startswith(our))
            value.copy_(torch.randn(value.shape, generator=generator(len(name))) * 0.3)
            theirs.get_parameter(prefix + name.removeprefix(names[prefix])).copy_(value)
    x = torch.randn((2, 5, 12), generator=generator())
    torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.parametrize(
    ("shape", "grid"),
    [((1, 28, 28), (7, 7)), ((3, 11, 17), (3, 5)), ((3, 64, 61), (16, 16)), ((3, 65, 40), (9, 5))],
)
def test_vit_taps_are_token_grids_of_padded_patches(shape, grid):
    assert map_shapes(network("vit", shape), shape) == [(2, 10, *grid)] * 2


def test_vit_padding_is_zeros_at_the_right_and_the_bottom():
    net, x = network("vit", (1, 11, 10)), images(2, (1, 11, 10))
    whole = torch.zeros(2, 1, 12, 12)
    whole[:, :, :11, :10] = x
    wide = network("vit", (1, 12, 12))
    wide.load_state_dict(net.state_dict())
    torch.testing.assert_close(net(x), wide(whole))


def test_patches_double_where_a_side_would_have_more_than_16():
    assert [patch_size(s, 8) for s in (8, 64, 65, 128, 129, 224)] == [4, 4, 8, 8, 16, 16]


def test_vit_refuses_a_width_that_its_heads_do_not_divide():
    assert network("vit", width=96).blocks[0].heads == 3 and network("vit", width=50).blocks[0].heads == 1
    with pytest.raises(UsageError, match=r"network.width=100 does not divide into 3 heads\n.*width=96"):
        network("vit", width=100)
