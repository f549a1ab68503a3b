"""Membership inference by the loss (Yeom et al. 2018): do networks tell what they were trained from?

The score of an image is minus the cross-entropy of its true label; members should score higher. This is the
attack and the job of training one network and attacking it; worker processes load nothing else of an audit.
"""

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ddengine.bench import Bench, Job, Record, run_job
from ddengine.neighbours import clopper_pearson
from ddengine.ops.batches import layout, resident
from ddengine.rng import Rng
from ddengine.tables import spread
from ddengine.train import train
from ddengine.types import Images

FPR = 0.01
MEMBERS = ("members", None)  # the key of a bench's picks that says which fit images are attacked
OWN = "random_own"  # networks of the row `random`, attacked on the images that trained them


def auc(members: Float[np.ndarray, " m"], others: Float[np.ndarray, " n"]) -> float:
    """The chance that a member scores above a non-member; ties count half (area under the ROC curve)."""
    ranked = np.sort(others)
    below, upto = (np.searchsorted(ranked, members, side=side) for side in ("left", "right"))
    return float((below + upto).sum() / (2 * len(members) * len(others)))


def tpr_at_low_fpr(members: Float[np.ndarray, " m"], others: Float[np.ndarray, " n"]) -> float:
    """The share of members found where at most 1 of 100 non-members is called a member.

    Called a member is what scores above the threshold, a non-member's score: ties are never members, and
    under 100 non-members none may be called one (Carlini et al. 2022 on why a low FPR is what counts).
    """
    threshold = np.sort(others)[::-1][len(others) // 100]
    return float((members > threshold).mean())


def advantage(members: Float[np.ndarray, " m"], others: Float[np.ndarray, " n"]) -> float:
    """TPR - FPR, which is 2 x balanced accuracy - 1 (Yeom et al. 2018), in -1..1, 0 for guessing.

    The threshold is the best of one half of the images (every other one) and is scored on the other half,
    both ways, so that chance gives 0 and not the largest of many differences. Needs two images of each side.
    """
    halves = [(members[i::2], others[i::2]) for i in (0, 1)]
    return fmean(_gap(*halves[1 - i], _best_threshold(*halves[i])) for i in (0, 1))


def _best_threshold(members: np.ndarray, others: np.ndarray) -> float:
    """In the middle between two scores, or the highest score; the lowest of equals."""
    places = np.unique(np.concatenate([members, others]))
    cuts = np.append((places[:-1] + places[1:]) / 2, places[-1])
    below = [np.searchsorted(np.sort(side), cuts, side="right") / len(side) for side in (members, others)]
    return float(cuts[np.argmax(below[1] - below[0])])


def _gap(members: np.ndarray, others: np.ndarray, threshold: float) -> float:
    return float((members > threshold).mean() - (others > threshold).mean())


@torch.no_grad()
def label_scores(net: nn.Module, images: Images, batch: int = 500) -> tuple[Float[np.ndarray, " n"], float]:
    """Minus the cross-entropy of each image's class in eval mode (float64), and the share classified right.

    What is not a number, from a network that diverged, scores minus infinity. The network's mode is kept.
    """
    device, training = next(net.parameters()).device, net.training
    data, parts = resident(images, device), []
    net.eval()
    for start in range(0, len(data), batch):
        x = data.model_input(slice(start, start + batch))
        parts.append(net(x.contiguous(memory_format=layout(device, net))).double())
    net.train(training)
    logits: Tensor = torch.cat(parts)
    loss = F.cross_entropy(logits, data.classes.long(), reduction="none")
    scores = (-loss).nan_to_num(nan=-torch.inf, neginf=-torch.inf)
    return scores.cpu().numpy(), (logits.argmax(1) == data.classes).double().mean().item()


def attack(net: nn.Module, members: Images, others: Images) -> dict[str, float]:
    """AUC, TPR at 1 % FPR and advantage of the attack by the loss, and the accuracy on both sides."""
    (inside, right), (outside, right_outside) = label_scores(net, members), label_scores(net, others)
    return {
        "auc": auc(inside, outside),
        "tpr": tpr_at_low_fpr(inside, outside),
        "advantage": advantage(inside, outside),
        "accuracy_members": right,
        "accuracy_others": right_outside,
    }


def attack_job(bench: Bench, job: Job) -> Record:
    """Train one network and attack it; a trial for the rate is the judge's own.

    The bench's test part is the non-members, sealed until all trials are over; its picks name the members.
    `attacks` has a result under the row's name, and for `random` a second on the images that the network saw.
    Streams depend on (seed, network, index), not on the row.
    """
    if job.index is None:
        return run_job(bench, job)
    rng = Rng(bench.seed).fold("audit", job.network.name, job.index)
    images, labeler = bench.training_set(job.row, job.index), bench.labeler(job.row)
    net = train(job.network, images, bench.recipe, job.lr, rng, bench.device, bench.precision, labeler)
    others = bench.test.images
    attacks = {job.row: attack(net, bench.fit.take(bench.picks[MEMBERS]), others)}
    if job.row == "random":
        assert isinstance(images, Images)
        attacks[OWN] = attack(net, images, others)
    return {"row": job.row, "index": job.index, "lr": job.lr, "attacks": attacks}


def attack_row(
    name: str, attacks: Sequence[Mapping[str, float]], members: int, others: int, lr: float | None
) -> dict[str, Any]:
    """One row of the audit, as plain JSON values: means over networks of what `attack` found.

    The networks share their images, so the interval of the TPR is that of one network at the mean count.
    """
    values = {key: [found[key] for found in attacks] for key in attacks[0]}
    stats = {key: _spread(values[key]) for key in ("auc", "tpr", "advantage")}
    ci95 = clopper_pearson(stats["tpr"]["mean"] * members, members)
    return {
        "name": name,
        "networks": len(attacks),
        "members": members,
        "non_members": others,
        "lr": lr,
        "auc": stats["auc"],
        "tpr": {"fpr": FPR, **stats["tpr"], "ci95": list(ci95)},
        "advantage": stats["advantage"],
        "accuracy": {
            "members": fmean(values["accuracy_members"]),
            "non_members": fmean(values["accuracy_others"]),
        },
    }


def _spread(values: Sequence[float]) -> dict[str, Any]:
    mean, std, _ = spread(values)
    return {"mean": mean, "std": std, "values": list(values)}
