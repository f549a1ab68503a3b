"""The initial weights follow PyTorch's default scheme, drawn from a generator."""

import math

import pytest
import torch
from scipy import stats
from torch import nn

from ddengine.errors import UsageError
from ddengine.nets.core import NORMS, NetSpec, initialise, normalisation


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def default(constructor) -> nn.Module:
    """A module with PyTorch's own initial weights; the global generator is put back."""
    with torch.random.fork_rng():
        torch.default_generator.manual_seed(5)
        return constructor()


LAYERS = {
    "linear": lambda: nn.Linear(53, 1009),
    "conv": lambda: nn.Conv2d(7, 1009, (3, 5)),
    "grouped conv": lambda: nn.Conv2d(14, 1010, 3, groups=2),
    "linear without bias": lambda: nn.Linear(31, 503, bias=False),
}


@pytest.mark.parametrize("layer", LAYERS)
def test_layers_have_the_distribution_of_torchs_default(layer):
    ours, theirs = initialise(default(LAYERS[layer]), generator()), default(LAYERS[layer])
    bound = 1 / math.sqrt(theirs.weight[0].numel())
    for (name, a), (_, b) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        a, b = a.detach().flatten(), b.detach().flatten()
        assert not torch.equal(a, b)
        assert 0.97 * bound < a.abs().max() <= bound and b.abs().max() <= bound, name
        assert stats.kstest(a.numpy(), stats.uniform(-bound, 2 * bound).cdf).pvalue > 1e-3, name
        assert stats.ks_2samp(a.numpy(), b.numpy()).pvalue > 1e-3, name


def test_weights_and_biases_are_independent_draws():
    net = initialise(nn.Sequential(nn.Linear(40, 40), nn.Linear(40, 40)), generator())
    first, second = net[0].weight.detach().flatten(), net[1].weight.detach().flatten()
    assert abs(torch.corrcoef(torch.stack([first, second]))[0, 1]) < 0.1


def test_attention_is_xavier_uniform_as_torchs_default():
    attention = initialise(default(lambda: nn.MultiheadAttention(48, 4)), generator())
    theirs = default(lambda: nn.MultiheadAttention(48, 4))
    a, b = (m.in_proj_weight.detach().flatten().numpy() for m in (attention, theirs))
    assert stats.ks_2samp(a, b).pvalue > 1e-3 and not (a == b).all()
    assert not attention.in_proj_bias.any()


NORM_LAYERS = [
    nn.GroupNorm(3, 6),
    nn.LayerNorm(6),
    nn.LayerNorm(6, bias=False),
    nn.BatchNorm1d(6),
    nn.BatchNorm2d(6),
]


@pytest.mark.parametrize("norm", NORM_LAYERS, ids=str)
def test_norms_start_as_torchs_from_any_content(norm):
    fresh = {key: value.clone() for key, value in norm.state_dict().items()}
    with torch.no_grad():
        for value in norm.state_dict().values():
            value.fill_(7)
    state = initialise(norm, generator()).state_dict()
    assert all(torch.equal(state[key], value) for key, value in fresh.items()) and fresh


def test_bare_parameters_are_normal_with_deviation_two_hundredths():
    class Positions(nn.Module):
        def __init__(self):
            super().__init__()
            self.position = nn.Parameter(torch.zeros(61, 67))

    drawn = initialise(Positions(), generator()).position.detach().flatten()
    assert stats.kstest(drawn.numpy(), stats.norm(0, 0.02).cdf).pvalue > 1e-3


def test_weights_do_not_depend_on_the_memory_format_or_type_of_the_network():
    def plain():
        return nn.Conv2d(5, 7, 3)

    first = initialise(default(plain), generator())
    last = initialise(default(plain).to(memory_format=torch.channels_last), generator())
    double = initialise(default(plain).double(), generator())
    assert torch.equal(first.weight, last.weight) and torch.equal(first.weight.double(), double.weight)


@pytest.mark.parametrize("norm", NORMS)
def test_norm_layers_keep_the_shape_of_a_map(norm):
    x = torch.randn((2, 6, 3, 5), generator=generator())
    assert normalisation(norm, 6)(x).shape == x.shape
    assert (normalisation(norm, 6)(x) is x) == (norm == "none")


@pytest.mark.parametrize(
    ("options", "message"),
    [({"width": 0}, "network.width=0"), ({"depth": -1}, "network.depth=-1"), ({"norm": "btach"}, "'batch'")],
)
def test_specs_refuse_values_out_of_range(options, message):
    with pytest.raises(UsageError, match=message):
        NetSpec("convnet", **options)


def test_unknown_norm_is_refused():
    with pytest.raises(UsageError, match="unknown network.norm 'weight'"):
        normalisation("weight", 6)
