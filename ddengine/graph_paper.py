"""Publications' own ways to judge graph sets, under names that say so: to compare with their rows only."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ddengine.errors import UsageError
from ddengine.graph_train import GraphRecipe
from ddengine.nets.core import NetSpec

PAPER = "paper/mirage"
NETWORKS_TRAINED, KEPT = 10, 5  # of which the best on validation are reported
SEEDS = 5  # networks of each kind where nobody says how many


@dataclass(frozen=True)
class PaperRecipe:
    """What the scripts of a publication set for one dataset: how to train, and the networks' width."""

    recipe: GraphRecipe
    width: int


def _mirage(steps: int, pool: str, dropout: float, weight_decay: float, width: int) -> PaperRecipe:
    return PaperRecipe(GraphRecipe(steps, (0.001,), weight_decay, pool, dropout, balance=False), width)


# The authors' scripts (commit 3c579e1). Layers are taken as many as hops: theirs exceed them on some sets,
# where leaves then get no message. An epoch is a step here, for their distilled sets are one batch.
MIRAGE = {
    "NCI1": _mirage(301, "sum", 0.5, 100.0, 128),
    "IMDB-BINARY": _mirage(1500, "sum", 0.2, 0.1, 64),
    "DD": _mirage(100, "sum", 0.4, 0.01, 64),
    "ogbg-molbace": _mirage(30, "sum", 0.6, 0.01, 128),
    "ogbg-molhiv": _mirage(30, "sum", 0.1, 0.01, 128),
    "ogbg-molbbbp": _mirage(401, "mean", 0.3, 0.001, 128),
}


def paper_recipe(dataset: str) -> PaperRecipe:
    """The recipe of `paper/mirage` for a dataset (UsageError for one that the publication lacks)."""
    if dataset not in MIRAGE:
        raise UsageError(
            f"protocol={PAPER} has no recipe for '{dataset}'; it has those of {', '.join(MIRAGE)}",
            "Give protocol=standard-v1",
        )
    return MIRAGE[dataset]


def as_published(
    networks: Sequence[NetSpec], hops: int | None, dataset: str, recipe: GraphRecipe, seeds: int
) -> tuple[list[NetSpec], GraphRecipe, int]:
    """The networks in the publication's width and as deep as the set's trees have `hops`, where they say
    nothing of it; the publication's recipe and number of networks.

    Raises UsageError for a recipe other than the default, which nobody chose, and for a set that it lacks.
    """
    if recipe != GraphRecipe():
        raise UsageError(f"protocol={PAPER} has a recipe of its own", "Leave recipe.* out")
    if seeds not in (SEEDS, NETWORKS_TRAINED):
        raise UsageError(
            f"protocol={PAPER} trains {NETWORKS_TRAINED} networks, not seeds={seeds}", "Leave seeds out"
        )
    paper = paper_recipe(dataset)
    sized = [replace(net, width=net.width or paper.width, depth=net.depth or hops) for net in networks]
    return sized, paper.recipe, NETWORKS_TRAINED
