"""Small experts that were really trained, by SGD in a plain loop, written as the recorder writes them."""

import torch
import torch.nn.functional as F
import toy_experts

from ddengine.nets import build
from ddengine.rng import Rng
from expert_buffers.params import ParamSpec


def trained(source, network, epochs, seed=0, lr=0.05, momentum=0.9, batch=16):
    """Parameters [t p], statistics [t s], losses and accuracies [t] at the start and after each epoch."""
    net = build(network, source.spec.shape, len(source.spec.classes), Rng(seed).torch("weights"))
    layouts = ParamSpec.of(net), ParamSpec.of_buffers(net)
    optimiser = torch.optim.SGD(net.parameters(), lr, momentum)
    generator = torch.Generator().manual_seed(seed)
    x, y, rows = source.model_input(), source.y.long(), []
    for epoch in range(epochs + 1):
        for index in torch.randperm(len(x), generator=generator).split(batch) if epoch else ():
            optimiser.zero_grad()
            F.cross_entropy(net(x[index]), y[index]).backward()
            optimiser.step()
        params = layouts[0].flatten({name: p.detach() for name, p in net.named_parameters()})
        stats = layouts[1].flatten(dict(net.named_buffers()))
        with torch.no_grad():
            logits = net.eval()(x)
        net.train()
        right = (logits.argmax(1) == y).float().mean()
        rows.append((params.clone(), stats.clone(), F.cross_entropy(logits, y), right))
    return tuple(torch.stack(column) for column in zip(*rows, strict=True))


def write(root, source, *networks, count=2, epochs=4, **options):
    """A buffer of `count` experts of each network on `source`, dealt round robin."""
    dealt = [networks[seed % len(networks)] for seed in range(count * len(networks))]
    walks = [trained(source, network, epochs, seed, **options) for seed, network in enumerate(dealt)]
    return toy_experts.write(root, walks, networks, spec=source.spec)
