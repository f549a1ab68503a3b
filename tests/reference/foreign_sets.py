"""Distilled sets in the exact layouts in which their publications' tools write them."""

import copy
import os
import zipfile

import numpy as np
import torch
from PIL import Image


def mtt(folder, images, labels, step="best", lr=None):
    """images_*.pt and labels_*.pt, and with `lr` the lr_*.pt of FTD, DATM and TESLA's descendants."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(images.cpu(), folder / f"images_{step}.pt")
    torch.save(labels.cpu(), folder / f"labels_{step}.pt")
    if lr is not None:
        torch.save(torch.tensor(lr).detach().cpu(), folder / f"lr_{step}.pt")
    return folder / f"images_{step}.pt"


def dm(folder, experiments, name="res_DM_CIFAR10_ConvNet_2ipc.pt"):
    """res_*.pt: every experiment's images and labels, and accuracies as numpy computed them."""
    folder.mkdir(parents=True, exist_ok=True)
    save = [[copy.deepcopy(x.detach().cpu()), copy.deepcopy(y.detach().cpu())] for x, y in experiments]
    correct, total = np.sum(np.arange(7) % 2 == 0), 7
    accuracies = {"ConvNet": [0.0 + correct / total for _ in experiments], "MLP": []}
    torch.save({"data": save, "accs_all_exps": accuracies}, folder / name)
    return folder / name


def sre2l(folder, pixels, labels):
    """newNNN/classNNN_idNNN.jpg from pixels [n c h w] in [0, 1]."""
    for number, (image, label) in enumerate(zip(pixels, labels.tolist(), strict=True)):
        place = folder / f"new{label:03d}"
        place.mkdir(parents=True, exist_ok=True)
        shown = (image.numpy().transpose(1, 2, 0) * 255).astype(np.uint8)
        Image.fromarray(shown).save(place / f"class{label:03d}_id{number:03d}.jpg")
    return folder


def class_folders(folder, pixels, labels, names):
    """NAME/N.png from uint8 pixels [n c h w]."""
    for number, (image, label) in enumerate(zip(pixels.numpy(), labels.tolist(), strict=True)):
        place = folder / names[label]
        place.mkdir(parents=True, exist_ok=True)
        shown = image[0] if len(image) == 1 else image.transpose(1, 2, 0)
        Image.fromarray(np.ascontiguousarray(shown)).save(place / f"{number:03d}.png")
    return folder


class Attack:
    """Makes a folder when it is unpickled."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.system, (f"mkdir {self.target}",)


def repacked(path, change):
    """The zip at `path`, its members passed through `change(name, data)` -> name, data, compression."""
    with zipfile.ZipFile(path) as old:
        members = [(name, old.read(name)) for name in old.namelist()]
    with zipfile.ZipFile(path, "w") as new:
        for name, content in members:
            changed, data, compression = change(name, content)
            new.writestr(changed, data, compression)
    return path
