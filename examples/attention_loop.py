"""Attention matching in a plain PyTorch loop: one import has the loss, everything else is ordinary code.

python examples/attention_loop.py
"""

import torch

from ddengine.data import load
from ddengine.nets import NetSpec, build
from ddengine.ops.dsa import strategy_for
from ddengine.rng import Rng
from ddengine.train import Recipe, accuracy, train
from ddengine.types import Images
from matchers.attention import Statistics, attention_matching_loss, image_statistics
from synth.starts import random

NETWORK = NetSpec("convnet", width=32, depth=2)
EMBEDDING = 0.16  # weight of the embedding term: the paper's 0.01 at 2,048 features, of which there are 128


def class_statistics(net, x):
    """Mean attention maps and embedding of each class; `x` has as many images of each, class after class."""
    maps, embedding = image_statistics(net, x)
    *maps, embedding = (each.unflatten(0, (10, -1)).mean(1) for each in (*maps, embedding))
    return Statistics(tuple(maps), embedding)


def main(steps=150, train_steps=200):
    """Accuracy on test images after training on the ten distilled ones, and on ten random real ones."""
    data, rng = load("digits"), Rng(0)
    picks = random(data.fit, 1, rng.fold("start"))
    x = data.fit.model_input(picks).requires_grad_()
    optimiser = torch.optim.SGD([x], lr=0.5, momentum=0.5)

    for step in range(steps):
        mine = rng.fold("step", step)
        net = build(NETWORK, data.spec.shape, 10, mine.torch("network"))  # a fresh one each time
        real = data.fit.model_input(torch.cat(data.fit.draw(mine.torch("real"), range(10), 32)))
        with torch.no_grad():
            target = class_statistics(net, real)
        loss = attention_matching_loss(target, class_statistics(net, x), EMBEDDING)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()

    labels, recipe = data.fit.y[picks], Recipe(steps=train_steps, augment=strategy_for("digits"))
    found = {}
    for name, images in (("distilled", x.detach()), ("random", data.fit.model_input(picks))):
        nets = [
            train(NETWORK, Images(images, labels, data.spec), recipe, 0.03, Rng(seed)) for seed in range(3)
        ]
        found[name] = sum(accuracy(net, data.test) for net in nets) / len(nets)
        print(f"{name:10} {100 * found[name]:.1f} % of test images, mean of 3 networks, 1 image a class")
    return found


if __name__ == "__main__":
    main()
