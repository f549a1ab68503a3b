"""Distil, train on the set, fine-tune with a little real data, and hand over the set and the network.

python examples/finetune_export.py
"""

import copy
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

import ddengine as dd
from ddengine.data import load
from ddengine.nets import NetSpec
from ddengine.ops.dsa import strategy_for
from ddengine.rng import Rng
from ddengine.train import Recipe, accuracy, train
from synth.exported import export
from synth.starts import random

NETWORK = NetSpec("convnet", width=16, depth=2)


def fine_tuned(net, images, steps, lr=0.01):
    """A copy of the network after `steps` of SGD on all images at once."""
    net = copy.deepcopy(net).train()
    optimiser = torch.optim.SGD(net.parameters(), lr=lr, momentum=0.9)
    for _ in range(steps):
        loss = F.cross_entropy(net(images.model_input()), images.y)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return net.eval()


def main(steps=100, train_steps=200, tune_steps=100, folder=None):
    """Test accuracies before and after fine-tuning, and of the real images alone; writes three files."""
    folder, data = Path(folder or tempfile.mkdtemp()), load("digits")
    matcher = dd.matcher("attention", network=NETWORK, steps=steps, lr=0.5, real_per_class=32)
    distilled = dd.distill(dd.task(data, ipc=1), matcher, out=folder / "run").distilled

    recipe = Recipe(steps=train_steps, augment=strategy_for("digits"))
    few = data.fit.take(random(data.fit, 20, Rng(0).fold("few")))  # 200 real images
    net = train(NETWORK, distilled.decode(), recipe, 0.03, Rng(0))
    tuned = fine_tuned(net, few, tune_steps)
    fresh = train(NETWORK, few, Recipe(steps=1), 1e-6, Rng(0))  # as good as untrained
    found = {
        "trained on the set": accuracy(net, data.test),
        "then on 200 real images": accuracy(tuned, data.test),
        "on 200 real images alone": accuracy(fine_tuned(fresh, few, tune_steps), data.test),
    }
    for name, value in found.items():
        print(f"{name:24} {100 * value:.1f} % of test images")

    for lost in export(distilled, "npz", folder / "digits_1.npz"):
        print(f"digits_1.npz: {lost}")
    save_file(tuned.state_dict(), folder / "network.safetensors")
    example = data.test.model_input(slice(0, 2))
    batch = torch.export.Dim("batch", min=1)
    program = torch.export.export(tuned, (example,), dynamic_shapes={"x": {0: batch}})
    torch.export.save(program, folder / "network.pt2")
    print(f"wrote digits_1.npz, network.safetensors and network.pt2 to {folder}")
    return found


if __name__ == "__main__":
    main()
