"""Distribution matching on rows of a table: the loss knows nothing of images, only of class means.

569 rows of 30 measurements, benign or malignant (scikit-learn's copy of the Wisconsin breast cancer set),
become one made-up row a class. No engine: a loss from `matchers`, tensors, and an optimiser.

    python examples/tabular.py
"""

import numpy as np
import torch
from sklearn.datasets import load_breast_cancer
from sklearn.model_selection import train_test_split
from sklearn.neural_network import MLPClassifier
from sklearn.preprocessing import StandardScaler

from ddengine.rng import Rng
from matchers.distribution import mmd_term


def embedding(x, width, generator):
    """What a random network of two hidden layers makes of rows [n d]."""
    for size in (width, width):
        weights = torch.randn(x.shape[1], size, generator=generator) * (2 / x.shape[1]) ** 0.5
        x = (x @ weights).relu()
    return x


def class_means(values, labels):
    """The mean of each class [k d]."""
    return torch.stack([values[labels == c].mean(0) for c in range(2)])


def score(x, y, x_test, y_test):
    """Mean test accuracy of five small networks trained on rows x."""
    nets = [
        MLPClassifier((32,), solver="lbfgs", alpha=1e-2, random_state=seed).fit(x, y) for seed in range(5)
    ]
    return float(np.mean([net.score(x_test, y_test) for net in nets]))


def main(steps=300, draws=10):
    """Accuracy on held-out rows after training on the distilled rows, on random real ones, and on all."""
    table, labels = load_breast_cancer(return_X_y=True)
    x, x_test, y, y_test = train_test_split(table, labels, test_size=0.3, random_state=0, stratify=labels)
    scaler = StandardScaler().fit(x)
    x, x_test = scaler.transform(x).astype("float32"), scaler.transform(x_test).astype("float32")

    rng, real, classes = Rng(0), torch.from_numpy(x), torch.from_numpy(y)
    picks = [
        [int(rng.fold(i).numpy("row").choice(np.flatnonzero(y == c))) for c in range(2)] for i in range(draws)
    ]
    rows = real[picks[0]].clone().requires_grad_()
    optimiser = torch.optim.Adam([rows], lr=0.05)
    for step in range(steps):

        def means(values, of, step=step):  # the same random network for real and made-up rows
            return class_means(embedding(values, 64, rng.fold("step", step).torch("network")), of)

        loss = mmd_term(means(real, classes), means(rows, torch.arange(2)))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()

    test = (x_test, y_test)
    found = {
        "distilled": score(rows.detach().numpy(), np.arange(2), *test),
        "random": float(np.mean([score(x[pick], y[pick], *test) for pick in picks])),
        "all rows": score(x, y, *test),
    }
    for name, value in found.items():
        print(f"{name:10} {100 * value:.1f} % of test rows")
    return found


if __name__ == "__main__":
    main()
