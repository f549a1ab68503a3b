"""A distilled replay memory: classes come in groups, and what is kept of each group is distilled from it.

python examples/replay_memory.py
"""

import ddengine as dd
from ddengine.continual import continual, staged_memory
from ddengine.continual_table import table_text
from ddengine.data import load
from ddengine.nets import NetSpec
from ddengine.ops.dsa import strategy_for
from ddengine.train import Recipe

NETWORK = NetSpec("convnet", width=16, depth=2)


def main(steps=40, train_steps=100, orders=3):
    """Mean accuracy on all classes so far, after each group: with distilled and with random real images."""
    data = load("digits")

    def distil(images):
        """What a learner keeps of a group of classes, made from the images of this group alone."""
        matcher = dd.matcher("attention", network=NETWORK, steps=steps, lr=0.5, real_per_class=32)
        return dd.distill(dd.task(images, ipc=1), matcher).distilled.decode()

    table = continual(
        data,
        {"distilled": staged_memory(data.fit, distil)},
        network=NETWORK,
        recipe=Recipe(steps=train_steps, lrs=(0.03,), augment=strategy_for("digits")),
        steps=5,  # groups of two classes
        orders=orders,
        rows=("random",),
    ).to_json()
    print(table_text(table))
    return table


if __name__ == "__main__":
    main()
