"""Graph networks of torch_geometric layers that compute node by node, with the weights of one of ours."""

import torch
from torch import nn
from torch.nn import functional as F
from torch_geometric.nn import (
    GATConv,
    GATv2Conv,
    GCNConv,
    GINConv,
    GINEConv,
    SAGEConv,
    global_add_pool,
    global_mean_pool,
)


def _mlp(inputs, width):
    return nn.Sequential(nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, width))


def _linear(ours, theirs):
    pairs = [(ours.weight, theirs.weight)]
    return pairs if ours.bias is None else [*pairs, (ours.bias, theirs.bias)]


def _gin(ours, conv):
    pairs = [(ours.eps, conv.eps), *_linear(ours.first, conv.nn[0]), *_linear(ours.second, conv.nn[2])]
    return [*pairs, *_linear(ours.edge, conv.lin)] if isinstance(conv, GINEConv) else pairs


def _gat(ours, conv):
    scores = [(ours.sender.weight, conv.att_src), (ours.receiver.weight, conv.att_dst)]
    return [*_linear(ours.linear, conv.lin), *scores, (ours.bias, conv.bias)]


def _gatv2(ours, conv):
    maps = [*_linear(ours.sender, conv.lin_l), *_linear(ours.receiver, conv.lin_r)]
    return [*maps, (ours.attention.weight, conv.att), (ours.bias, conv.bias)]


# name -> (torch_geometric's layer for numbers of a node before and after and of an edge, pairs of parameters)
LAYERS = {
    "gin": (lambda a, b, e: GINConv(_mlp(a, b), train_eps=True), _gin),
    "gine": (lambda a, b, e: GINEConv(_mlp(a, b), train_eps=True, edge_dim=e), _gin),
    "sage": (
        lambda a, b, e: SAGEConv(a, b),
        lambda ours, conv: [*_linear(ours.neighbours, conv.lin_l), *_linear(ours.self, conv.lin_r)],
    ),
    "gcn": (
        lambda a, b, e: GCNConv(a, b),
        lambda ours, conv: [*_linear(ours.linear, conv.lin), (ours.bias, conv.bias)],
    ),
    "gat": (lambda a, b, e: GATConv(a, b), _gat),
    "gatv2": (lambda a, b, e: GATv2Conv(a, b), _gatv2),
}


class Twin(nn.Module):
    """The node-level network; `pairs` are (stacked parameter of ours, parameter here)."""

    def __init__(self, nets, copy):
        super().__init__()
        make, pair = LAYERS[nets.spec.name]
        width, depth, data = nets.spec.width, nets.spec.depth, nets.data
        sizes = [data.width, *[width] * depth]
        self.name, self.pool, self.copy = nets.spec.name, nets.pool, copy
        self.convs = nn.ModuleList(make(sizes[i], width, data.edge_width) for i in range(depth))
        self.norms = nn.ModuleList(nn.BatchNorm1d(width) for _ in nets.norms)
        self.classifier = nn.Linear(width, len(data.classes))
        self.double()
        self.pairs = [p for ours, conv in zip(nets.layers, self.convs, strict=True) for p in pair(ours, conv)]
        for ours, norm in zip(nets.norms, self.norms, strict=True):
            self.pairs += [(ours.weight, norm.weight), (ours.bias, norm.bias)]
        self.pairs += _linear(nets.classifier, self.classifier)
        for ours, theirs in self.pairs:
            theirs.data.copy_(self.as_theirs(ours.detach(), theirs))

    def as_theirs(self, ours, theirs):
        """What a stacked tensor of ours holds for this network, laid out as torch_geometric has it."""
        return ours[self.copy].T.reshape(theirs.shape) if ours.ndim == 3 else ours[self.copy]

    def forward(self, graphs):
        """Logits of the graphs."""
        h = graphs.spec.features(graphs.x).double()
        edges = graphs.spec.edge_features(graphs.edge_attr).double()
        for number, conv in enumerate(self.convs):
            more = {"edge_attr": edges} if self.name == "gine" else {}
            h = conv(h, graphs.edge_index, **more)
            if self.norms:
                h = self.norms[number](h)
            h = F.elu(h) if self.name.startswith("gat") else torch.relu(h)
        pool = global_mean_pool if self.pool == "mean" else global_add_pool
        return self.classifier(pool(h, graphs.batch, size=len(graphs)))
