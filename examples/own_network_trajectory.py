"""Trajectory matching on a network and on data of one's own: my_network.py, and arrays in an .npz file.

python examples/own_network_trajectory.py
"""

import tempfile
from pathlib import Path

import numpy as np
from sklearn.datasets import load_digits

import ddengine as dd
from ddengine.data import load
from ddengine.nets import NetSpec, import_network
from ddengine.rng import Rng
from ddengine.train import Recipe, accuracy, train
from expert_buffers import record
from synth.starts import random

NETWORK = "my_network:SmallNet"  # MODULE:NAME; importing runs its code, so it has to be given by hand


def write_data(path):
    """Arrays as anyone has them: uint8 images [n h w] and class numbers; a test part is split off them."""
    images, labels = load_digits(return_X_y=True)
    np.savez(path, x_train=(images.reshape(-1, 8, 8) * 15.9375).astype(np.uint8), y_train=labels)


def main(experts=6, steps=150, train_steps=200, folder=None):
    """Accuracy on test images after training on the ten distilled ones, and on ten random real ones."""
    folder = Path(folder or tempfile.mkdtemp())
    write_data(folder / "mine.npz")
    import_network(NETWORK)
    data, network = load("npz", root=folder / "mine.npz"), NetSpec(NETWORK)

    # experts: networks trained on all the data, with their weights after every epoch
    buffer = record(data.fit, network, folder / "experts", count=experts, max_start_epoch=4, expert_epochs=2)
    task = dd.task(data, ipc=1, experts=buffer)
    inner = {"steps": 10, "rate": 0.02}  # the student: ten steps on the set, for two epochs of the expert
    matcher = dd.matcher("trajectory", network=network, steps=steps, lr=20.0, inner=inner, augment="none")
    distilled = dd.distill(task, matcher, out=folder / "run").distilled

    picks = random(data.fit, 1, Rng(0))
    recipe = Recipe(steps=train_steps, augment="none")
    found = {}
    for name, images in (("distilled", distilled.decode()), ("random", data.fit.take(picks))):
        nets = [train(network, images, recipe, 0.03, Rng(seed)) for seed in range(3)]
        found[name] = sum(accuracy(net, data.test) for net in nets) / len(nets)
        print(f"{name:10} {100 * found[name]:.1f} % of test images, mean of 3 networks, 1 image a class")
    return found


if __name__ == "__main__":
    main()
