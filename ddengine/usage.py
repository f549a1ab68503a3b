"""What the command line takes: commands, keys and flags as tables, and the help that is made of them.

Nothing here imports torch, numpy or hydra.
"""

import textwrap
from collections.abc import Iterator
from typing import Any

COMMANDS = {
    "demo": ("", "distil the embedded digits and judge the result: under two minutes, no network"),
    "distill": ("", "distil a dataset; the same command resumes after an interruption"),
    "buffer": ("", "record expert trajectories; the same command goes on, or extends the buffer"),
    "import": ("FILE ...", "make a set or an expert buffer of other tools' files: --from FORMAT"),
    "export": ("PATH", "write a set as other tools take it: --to imagefolder|npz|torch|hf"),
    "evaluate": ("PATH", "judge a distilled set or a run by the fair protocol"),
    "estimate": ("COMMAND", "memory, time and disk of distill, buffer or evaluate PATH before they run"),
    "downstream": ("TASK PATH", "continual: a memory for class-incremental learning; nas: ranking networks"),
    "audit": ("PATH", "what a set gives away: nearest training images, membership inference"),
    "report": ("PATH ...", "show runs, sets or kept evaluations: tables, learning curves, also as a page"),
    "inspect": ("PATH", "show what is in a distilled set, a run or an expert buffer"),
    "verify": ("PATH", "check hashes, shapes and ranges of a set or a buffer; safe on untrusted files"),
    "list": ("KIND", "list matchers, datasets, networks, recipes, protocols or configs"),
    "doctor": ("", "show versions, devices and what is wrong with the installation"),
}
DATASET = (
    "dataset=NAME dataset.root=PATH dataset.size=PIXELS dataset.preprocessing=standard|zca "
    "dataset.on_error=raise|skip dataset.download=true|false dataset.memory=auto|ram|disk"
)
GRAPHS = (
    "dataset=tu|ogb dataset.name=NAME dataset.root=PATH dataset.discretise=quantile|kmeans|none "
    "dataset.bins=N dataset.split=N dataset.download=true|false"
)
NETWORK = "network=NAME network.width=N network.depth=N network.norm=NAME"
TRACK = "track=tensorboard|mlflow|wandb|[tensorboard,mlflow]"
PLACE = "device=auto|cpu|cuda precision=auto|fp32|bf16"
RECIPE = (
    "recipe.steps=N recipe.lrs=[0.01,0.03] recipe.optimiser=sgd|adamw recipe.momentum=X "
    "recipe.weight_decay=X recipe.batch_size=N recipe.loss=ce|kl recipe.temperature=X "
    "recipe.squared=true|false recipe.mix=none|mixup|cutmix recipe.mix_alpha=X "
    "recipe.augment=auto|none|color_crop_flip recipe.augment_mode=batch|item recipe.ema=X"
)
GRAPH_KEYS = {
    "distill": GRAPHS,
    "evaluate": f"{GRAPHS} networks=[gin,gcn] protocol=standard-v1|paper/mirage seeds=N seed=N "
    "rows=[random_bytes,full] recipe.steps=N recipe.lrs=[0.001,0.005] recipe.weight_decay=X "
    f"recipe.pool=mean|sum recipe.dropout=X recipe.balance=true|false workers=N out=DIR {TRACK}",
}
BUFFERS = ("replay_buffer",)  # formats of expert buffers; the others are of distilled sets
FORMATS = (*BUFFERS, "mtt", "tesla", "dm", "datadam", "sre2l", "imagefolder", "npz", "torch")
KEYS = {
    "distill": f"{DATASET} matcher=NAME matcher.OPTION=VALUE {NETWORK} ipc=N budget.nbytes=N "
    f"experts=DIR synth=pixels|factored|compensated seed=N out=DIR {PLACE} deterministic=true|false "
    f"workers=N replicas=N {TRACK} checkpoint.steps=N checkpoint.minutes=N row=NAME",
    "buffer": f"{DATASET} {NETWORK} networks=[a,b] recipe=mtt|ftd|ast|squeeze recipe.OPTION=VALUE "
    "count=N epochs=N max_start_epoch=N expert_epochs=N full_experts=N encoding=delta16|fp32 "
    f"seed=N out=DIR {PLACE} workers=N {TRACK} checkpoint.minutes=N",
    "import": f"{DATASET} {NETWORK} out=DIR encoding=delta16|fp32 (of a buffer) "
    "source.space=auto|pixels|normalised|zca source.lr=X source.experiment=N (of a set) "
    f"--from: {' '.join(FORMATS)}",
    "export": "out=DIR (imagefolder, hf) | NAME.npz | NAME.pt (torch)",
    "downstream": f"{DATASET} rows=[random,herding,full] ipc=N {RECIPE} seeds=N seed=N {PLACE} workers=N "
    f"out=DIR continual: {NETWORK} steps=5 orders=3 nas: widths=[8,16,32] depths=[1,2,3] "
    "norms=[none,instance] reference.steps=N reference.OPTION=VALUE (as recipe.OPTION)",
    "audit": f"{DATASET} {NETWORK} seeds=N seed=N {RECIPE} {PLACE} workers=N out=DIR",
    "evaluate": f"{DATASET} {NETWORK} networks=[a,b]|grid protocol=NAME|FILE.yaml seeds=N seed=N "
    f"rows=[random,random_same_labels,full] experts=DIR {RECIPE} robust=[gaussian_noise,contrast,pgd] "
    f"severity=1|2|3|4|5 kept=auto|none|DIR {PLACE} workers=N out=DIR {TRACK}",
    "demo": "out=DIR seed=N seeds=N",
}
FLAGS = ("--json", "--help", "-h")
MULTIRUN = {"--multirun": "every combination of keys such as seed=0,1,2", "-m": "the same"}
OWN_FLAGS = {  # of one command, without a value
    "report": {"--compare": "two runs against one another"},
    "distill": MULTIRUN,
    "buffer": MULTIRUN,
}
MULTIRUN_KEYS = (
    "launcher=local|slurm jobs=N slurm.partition=NAME slurm.account=NAME slurm.minutes=N slurm.cpus=N "
    "slurm.gpus=N slurm.memory_gb=N"
)
VALUED = {  # flags that take a value
    "report": {"--html": "FILE"},
    "import": {"--from": "FORMAT"},
    "export": {"--to": "FORMAT"},
}


def overview() -> str:
    """The commands, one line each."""
    rows = [(" ".join((name, argument)).strip(), text) for name, (argument, text) in COMMANDS.items()]
    lines = [f"  {head:21} {text}" for head, text in rows]
    return "\n".join(
        [
            "ddengine COMMAND [key=value ...] [--json]",
            "",
            *lines,
            "",
            "ddengine COMMAND --help shows a command's keys. Result on stdout, progress on stderr.",
            "Exit codes: 0 done, 1 the run failed, 2 usage, 3 an artefact failed verification,",
            "130 interrupted. DDENGINE_DEBUG=1 adds a traceback to an error.",
        ]
    )


def help_text(command: str) -> str:
    """A command's form, keys and flags."""
    argument, text = COMMANDS[command]
    head = " ".join(filter(None, ("ddengine", command, argument)))
    valued = "".join(f"{flag} {kind}, " for flag, kind in VALUED.get(command, {}).items())
    valued += "".join(f"{flag} ({said}), " for flag, said in OWN_FLAGS.get(command, {}).items())
    parts = [head, f"{text[0].upper()}{text[1:]}.", f"Flags: --json (one object on stdout), {valued}--help"]
    if command in KEYS:
        keys = textwrap.wrap(KEYS[command], 90, break_long_words=False, break_on_hyphens=False)
        parts.insert(2, "\n  ".join(["Keys:", *keys]))
    if OWN_FLAGS.get(command) is MULTIRUN:
        keys = textwrap.wrap(MULTIRUN_KEYS, 90, break_long_words=False, break_on_hyphens=False)
        parts.insert(3, "\n  ".join(["With -m:", *keys]))
    if command in GRAPH_KEYS:
        keys = textwrap.wrap(GRAPH_KEYS[command], 90, break_long_words=False, break_on_hyphens=False)
        parts.insert(3, "\n  ".join(["For graphs:", *keys]))
    if command == "estimate":
        parts.append("Keys: those of the command, as in: ddengine estimate distill dataset=digits ipc=1")
        parts.append("Nothing is written. Exit code 1 says that it would not fit, and what to change.")
    if command == "distill":
        parts.append("The options of a matcher: ddengine distill matcher=NAME --help")
        parts.append("In several processes: torchrun --nproc-per-node=N -m ddengine distill replicas=N ...")
    return "\n\n".join(parts)


def matcher_options(name: str) -> str:
    """The options of a matcher with their defaults, and the head of its documentation."""
    from dataclasses import is_dataclass

    import matchers

    def lines(options: Any, path: str) -> Iterator[str]:
        for key in options.__dataclass_fields__:
            value = getattr(options, key)
            said = "null" if value is None else str(value).lower() if isinstance(value, bool) else value
            yield from lines(value, f"{path}{key}.") if is_dataclass(value) else [f"  {path}{key}={said}"]

    options = matchers.find(name).options
    return "\n\n".join(["", f"Options of {name} with their defaults:", "\n".join(lines(options, "matcher."))])
