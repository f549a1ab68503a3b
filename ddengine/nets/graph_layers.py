"""Message-passing layers on one level of a colour DAG, for several networks at once.

A layer takes one row for each colour of the level below and gives one row for each colour of its own level:
what the layer of the same name gives at every node of that colour. Messages count with their multiplicity.

Letters as in `graph_plan`; i and d are the numbers of a row before and after. Rows of all networks lie side
by side, [c s d], so that one pass over the entries serves all of them.
"""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from ddengine.errors import UsageError
from ddengine.nets.graph_plan import Hop, product

SLOPE = 0.2  # of the leaky ReLU under attention scores: Velickovic et al., ICLR 2018, section 2.1
EPSILON, MOMENTUM = 1e-5, 0.1  # of batch norm, as torch has them


class StackedLinear(nn.Module):
    """s linear maps side by side: weights [s i d], biases [s d] or None. Nothing is drawn before `draw`.

    `glorot` draws weights uniform in +-sqrt(6 / (i + d)), else in +-1/sqrt(i); biases in +-1/sqrt(i).
    """

    def __init__(
        self, copies: int, inputs: int, outputs: int, bias: bool = True, glorot: bool = False
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(copies, inputs, outputs))
        self.bias = nn.Parameter(torch.zeros(copies, outputs)) if bias else None
        self.bound = math.sqrt(6 / (inputs + outputs)) if glorot else 1 / math.sqrt(inputs)

    def draw(self, copy: int, generator: torch.Generator) -> None:
        """Initial weights of one network, from a CPU generator."""
        bounds = [(self.weight, self.bound)]
        if self.bias is not None:
            bounds.append((self.bias, 1 / math.sqrt(self.weight.shape[1])))
        with torch.no_grad():
            for parameter, bound in bounds:
                drawn = torch.empty(parameter.shape[1:]).uniform_(-bound, bound, generator=generator)
                parameter[copy] = drawn

    def project(self, h: Float[Tensor, "c #s i"]) -> Float[Tensor, "c s d"]:
        """h times the weights, without the bias."""
        stacked = h.expand(-1, len(self.weight), -1).transpose(0, 1)
        return torch.bmm(stacked, self.weight).transpose(0, 1)

    def shifted(self, h: Float[Tensor, "c s d"]) -> Float[Tensor, "c s d"]:
        """h plus the biases."""
        return h if self.bias is None else h + self.bias

    def forward(self, h: Float[Tensor, "c #s i"]) -> Float[Tensor, "c s d"]:
        """The linear maps."""
        if self.bias is None:
            return self.project(h)
        stacked = h.expand(-1, len(self.weight), -1).transpose(0, 1)
        return torch.baddbmm(self.bias[:, None], stacked, self.weight).transpose(0, 1)


class StackedBatchNorm(nn.Module):
    """Batch norm over nodes: a colour counts as often as nodes have it. Running statistics as torch's."""

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, copies: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(copies, width))
        self.bias = nn.Parameter(torch.zeros(copies, width))
        self.register_buffer("running_mean", torch.zeros(copies, width))
        self.register_buffer("running_var", torch.ones(copies, width))

    def forward(self, h: Float[Tensor, "c s d"], counts: Float[Tensor, " c"]) -> Float[Tensor, "c s d"]:
        """Normalised rows; `counts` are the nodes of each colour. UsageError where training sees one node."""
        if not self.training:
            return (h - self.running_mean) * (self.weight / (self.running_var + EPSILON).sqrt()) + self.bias
        nodes = counts.sum()
        if nodes < 2:
            raise UsageError(
                "batch norm over 1 node has no variance", "Give more nodes, or network.norm=none"
            )
        mean = torch.tensordot(counts / nodes, h, 1)
        centred = h - mean
        var = torch.tensordot(counts / nodes, centred.square(), 1)
        with torch.no_grad():
            self.running_mean.lerp_(mean, MOMENTUM)
            self.running_var.lerp_(var * (nodes / (nodes - 1)), MOMENTUM)
        return centred * (self.weight / (var + EPSILON).sqrt()) + self.bias


class GIN(nn.Module):
    """MLP((1 + eps) h_v + sum of h_u), linear-ReLU-linear, eps learned from 0: Xu et al., ICLR 2019, eq. 4.1.

    The MLP's first map is linear, so it is applied below, where colours are fewer, before the sum; a node's
    own row, which counts once, carries the bias.
    """

    def __init__(self, copies: int, inputs: int, width: int, edge_width: int) -> None:
        super().__init__()
        self.eps = nn.Parameter(torch.zeros(copies, 1))
        self.first = StackedLinear(copies, inputs, width)
        self.second = StackedLinear(copies, width, width)

    def forward(self, h: Float[Tensor, "b #s i"], hop: Hop) -> Float[Tensor, "c s d"]:
        """Rows of the next level."""
        z = self.first.project(h)
        own = self.first.shifted((1 + self.eps) * z)
        return self.second(product(hop.update, torch.cat([own, z])).relu())


class GINE(nn.Module):
    """GIN with messages relu(h_u + W e), W e as wide as h_u: Hu et al., ICLR 2020 (arXiv 1905.12265)."""

    def __init__(self, copies: int, inputs: int, width: int, edge_width: int) -> None:
        super().__init__()
        self.eps = nn.Parameter(torch.zeros(copies, 1))
        self.edge = StackedLinear(copies, edge_width, inputs)
        self.first = StackedLinear(copies, inputs, width)
        self.second = StackedLinear(copies, width, width)

    def forward(self, h: Float[Tensor, "b #s i"], hop: Hop) -> Float[Tensor, "c s d"]:
        """Rows of the next level."""
        sender, label, update = hop.pairs
        messages = (product(sender, h) + product(label, self.edge(hop.edges[:, None]))).relu()
        own = self.first.shifted((1 + self.eps) * self.first.project(h))
        return self.second(product(update, torch.cat([own, self.first.project(messages)])).relu())


class SAGE(nn.Module):
    """W1 mean(h_u) + W2 h_v, the mean of no message 0: Hamilton et al., NeurIPS 2017, algorithm 1."""

    def __init__(self, copies: int, inputs: int, width: int, edge_width: int) -> None:
        super().__init__()
        self.neighbours = StackedLinear(copies, inputs, width)
        self.self = StackedLinear(copies, inputs, width, bias=False)

    def forward(self, h: Float[Tensor, "b #s i"], hop: Hop) -> Float[Tensor, "c s d"]:
        """Rows of the next level."""
        mean = product(hop.children, self.neighbours.project(h)) / hop.degree.clamp(min=1)[:, None, None]
        return self.neighbours.shifted(mean) + product(hop.own, self.self(h))


class GCN(nn.Module):
    """Sum of W h_u / sqrt((deg_u + 1)(deg_v + 1)), v among its senders: Kipf & Welling, ICLR 2017, eq. 2."""

    def __init__(self, copies: int, inputs: int, width: int, edge_width: int) -> None:
        super().__init__()
        self.linear = StackedLinear(copies, inputs, width, bias=False, glorot=True)
        self.bias = nn.Parameter(torch.zeros(copies, width))

    def forward(self, h: Float[Tensor, "b #s i"], hop: Hop) -> Float[Tensor, "c s d"]:
        """Rows of the next level."""
        assert hop.degree_below is not None, "networks refuse trees that do not tell degrees"
        z = self.linear.project(h)
        below, here = _inverse_root(hop.degree_below), _inverse_root(hop.degree)
        return here * product(hop.children, below * z) + here**2 * product(hop.own, z) + self.bias


class GAT(nn.Module):
    """Attention with scores leaky(a1 W h_u + a2 W h_v), v among its senders: Velickovic et al., ICLR 2018.

    One head; ELU follows, as in the paper.
    """

    def __init__(self, copies: int, inputs: int, width: int, edge_width: int) -> None:
        super().__init__()
        self.linear = StackedLinear(copies, inputs, width, bias=False, glorot=True)
        self.sender = StackedLinear(copies, width, 1, bias=False, glorot=True)
        self.receiver = StackedLinear(copies, width, 1, bias=False, glorot=True)
        self.bias = nn.Parameter(torch.zeros(copies, width))

    def forward(self, h: Float[Tensor, "b #s i"], hop: Hop) -> Float[Tensor, "c s d"]:
        """Rows of the next level."""
        z = self.linear.project(h)
        receiver = product(hop.own, self.receiver.project(z))
        sender = self.sender.project(z)
        score = product(hop.senders, sender) + product(hop.receivers, receiver)
        alone = product(hop.own, sender) + receiver
        return attend(F.leaky_relu(score, SLOPE), F.leaky_relu(alone, SLOPE), z, hop) + self.bias


class GATv2(nn.Module):
    """Attention with scores a leaky(W1 h_u + W2 h_v), v among its senders: Brody et al., ICLR 2022, eq. 7.

    One head; ELU follows.
    """

    def __init__(self, copies: int, inputs: int, width: int, edge_width: int) -> None:
        super().__init__()
        self.sender = StackedLinear(copies, inputs, width, glorot=True)
        self.receiver = StackedLinear(copies, inputs, width, glorot=True)
        self.attention = StackedLinear(copies, width, 1, bias=False, glorot=True)
        self.bias = nn.Parameter(torch.zeros(copies, width))

    def forward(self, h: Float[Tensor, "b #s i"], hop: Hop) -> Float[Tensor, "c s d"]:
        """Rows of the next level."""
        sender, receiver = self.sender(h), product(hop.own, self.receiver(h))
        pairs = product(hop.senders, sender) + product(hop.receivers, receiver)
        score = self.attention.project(F.leaky_relu(pairs, SLOPE))
        alone = self.attention.project(F.leaky_relu(product(hop.own, sender) + receiver, SLOPE))
        return attend(score, alone, sender, hop) + self.bias


def attend(
    score: Float[Tensor, "r s 1"], alone: Float[Tensor, "c s 1"], value: Float[Tensor, "b s d"], hop: Hop
) -> Float[Tensor, "c s d"]:
    """Means of the senders' values with weights ~ multiplicity x exp(score), and of a node's own value with
    exp(alone), once.
    """
    rows = hop.level.row[:, None, None].expand_as(score)
    top = alone.detach().scatter_reduce(0, rows, score.detach(), "amax")
    weight = hop.times[:, None, None] * (score - product(hop.receivers, top)).exp()
    once = (alone - top).exp()
    sums = hop.receivers.transposed
    summed = once * product(hop.own, value) + product(sums, weight * product(hop.senders, value))
    return summed / (once + product(sums, weight))


def _inverse_root(degree: Tensor) -> Tensor:
    return (degree + 1).rsqrt()[:, None, None]


def draw_weights(net: nn.Module, generators: Sequence[torch.Generator]) -> None:
    """Initial weights of network i from generator i, layer by layer: a network alone gets the same bits."""
    for copy, generator in enumerate(generators):
        for module in net.modules():
            if isinstance(module, StackedLinear):
                module.draw(copy, generator)
