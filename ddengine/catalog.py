"""Names and one-line descriptions of what there is, without importing torch: what `list` and help read."""

import re
from importlib.util import find_spec
from pathlib import Path

from ddengine import data, plugins
from ddengine.origins import ROOT

MATCHERS = {
    "attention": "attention matching (DataDAM): class means of spatial attention and embedding",
    "distribution": "distribution matching (DM): class means of the embedding",
    "characteristic": "characteristic functions of embeddings (NCFM), without its learned frequency sampler",
    "trajectory": "trajectory matching (MTT, with DATM, AST, FTD and TESLA as options); needs experts",
    "compensator": "real images, compensators shared by all classes, soft labels (INFER, and its rivals)",
    "computation_tree": "graphs: computation trees with their evidence, or frequent sets of them (Mirage)",
    "tree_herding": "graphs: real graphs whose mean histogram of computation trees follows the class's",
    "random": "random real images or graphs, class by class",
    "herding": "real images or graphs whose running mean follows the class mean (herding)",
    "kmeans": "the real image nearest each k-means centre of its class",
    "kcenter": "greedy farthest-point real images or graphs (k-centre)",
}
NETWORKS = {
    "convnet": "ConvNet-D of the distillation papers: width 128, depth by image size, instance norm",
    "mlp": "three linear layers",
    "lenet": "LeNet",
    "alexnet": "AlexNet in its small-image form",
    "vgg11": "VGG-11",
    "resnet18": "ResNet-18, small-image stem up to 64 pixels, torchvision's above",
    "vit": "a small vision transformer",
    "mobilenet_v2": "MobileNetV2, stem of stride 1 up to 64 pixels, torchvision's above",
    "efficientnet_b0": "EfficientNet-B0 without random depth, stem of stride 1 up to 64 pixels",
    "shufflenet_v2": "ShuffleNetV2 x1.0, no stem stride or pool up to 64 pixels, torchvision's above",
}
GRAPH_NETWORKS = {
    "gcn": "graphs: graph convolution, symmetric norm; needs degrees in the colours (matcher.degree=true)",
    "gin": "graphs: graph isomorphism network, the default for graphs: 2 layers of width 64",
    "gine": "graphs: GIN that reads edge labels",
    "sage": "graphs: GraphSAGE, mean of neighbours",
    "gat": "graphs: graph attention",
    "gatv2": "graphs: graph attention of the second kind",
}
RECIPES = {
    "mtt": "experts by plain SGD at a constant rate (MTT)",
    "ftd": "experts by adaptive GSAM, flat minima at two gradients a step (FTD, DATM)",
    "ast": "smooth experts: momentum, early loss ramp, gradient penalty, rate drop (AST)",
    "squeeze": "teachers with batch norm: momentum, cosine to zero over 10 epochs (SRe2L, INFER)",
}
PROTOCOLS = {
    "standard-v1": "ours: rates chosen on validation, the last step scored on test once, equal steps",
    "paper/dm": "images: 20 networks of 1,001 passes at one rate, a tenth from the middle on (DM)",
    "paper/datadam": "images: 10 networks of 1,801 passes at one rate, a tenth from the middle on (DataDAM)",
    "paper/mtt": "images: 5 networks of 1,001 passes at the learned rate, a tenth from the middle on (MTT)",
    "paper/infer": "images: soft labels, 400 passes, the best of 40 looks at the test part (INFER)",
    "paper/mirage": "graphs: 10 networks, of which the best 5 on validation are reported (Mirage)",
}
KINDS = {
    "matchers": MATCHERS,
    "datasets": data.DESCRIPTIONS,
    "networks": {**NETWORKS, **GRAPH_NETWORKS},
    "recipes": RECIPES,
    "protocols": PROTOCOLS,
}


def listing(kind: str) -> list[tuple[str, str, str]]:
    """(name, origin, description) of all there is of a kind; the origin of a plug-in is its distribution and
    version. A plug-in whose name is one of ours is not reached by it, and is left out.

    The last two of the networks stand for names that are too many to list.
    """
    ours = [(name, "ddengine", text) for name, text in KINDS[kind].items()]
    plugged = [p for p in plugins.of(kind) if p.name not in KINDS[kind]]
    others = [(p.name, p.origin, p.description) for p in plugged]
    return ours + others + (_by_other_names() if kind == "networks" else [])


def _by_other_names() -> list[tuple[str, str, str]]:
    theirs = f"any of torchvision's {_classifiers()} classifiers, such as resnet50, swin_t or vit_b_16"
    yours = "your own class or factory, in this folder or installed, such as my_nets:MyNet"
    return [("TORCHVISION_NAME", "torchvision", theirs), ("MODULE:NAME", "yours", yours)]


def _classifiers() -> int:
    """How many torchvision has, read off its files because an import would take seconds."""
    spec = find_spec("torchvision")
    folders = list(spec.submodule_search_locations or []) if spec else []
    files = [path for folder in folders for path in (Path(folder) / "models").glob("*.py")]
    return sum(
        len(re.findall(r"^@register_model\(", path.read_text("utf-8"), re.MULTILINE)) for path in files
    )


def folder() -> Path:
    """The folder of the shipped configurations: `ddengine/conf` if installed, `configs/` in a source tree."""
    installed = Path(__file__).parent / "conf"
    return installed if installed.is_dir() else ROOT / "configs"


def configs() -> list[tuple[str, str, str]]:
    """The shipped result rows: name, origin, and the first comment line of the file."""
    found = []
    for path in sorted((folder() / "row").glob("*.yaml")):
        comments = [
            line.lstrip("# ") for line in path.read_text("utf-8").splitlines() if line.startswith("#")
        ]
        said = [comment for comment in comments if not comment.startswith("@package")]
        found.append((path.stem, "ddengine", said[0] if said else ""))
    return found
