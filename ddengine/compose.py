"""From command-line overrides to one configuration, through hydra; a mistake is one line and a remedy."""

import difflib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import field, fields, is_dataclass, make_dataclass
from functools import partial
from itertools import product
from typing import Any, get_type_hints

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType, Quote, QuotedString
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

import matchers
from ddengine import catalog
from ddengine.config import COMMANDS, DatasetConfig, GraphDatasetConfig, NetworkConfig
from ddengine.data import GRAPH_COLLECTIONS
from ddengine.errors import UsageError, unknown
from ddengine.nets import GRAPH_GRID, GRID, find_network, import_network, is_import_path
from ddengine.ranks import Ranks
from expert_buffers.recipes import RECIPES, ExpertRecipe

GROUPS = ("dataset", "matcher", "network", "recipe", "row")
IMAGES = ("buffer", "import", "import_set", "evaluate", "audit", "downstream_continual", "downstream_nas")
UNFIT = (*((command, True) for command in IMAGES), ("evaluate_graphs", False))  # takes graphs
PATHS = ("out", "dataset.root", "experts", "kept", "protocol")  # taken as typed, so that no path needs quotes


def composed(command: str, overrides: Sequence[str], defaults: Mapping[str, Any] | None = None) -> Any:
    """The checked configuration of `command`: its dataclass, whose matcher node holds name and options.

    `defaults` are values of keys that `overrides` replace; where these choose another dataset or network, the
    defaults of its options go too. Raises UsageError for a syntax error, an unknown key or choice (with the
    nearest known one), a wrong type or a missing value.
    """
    if command != "distill" and Ranks.here().world > 1:
        raise UsageError(f"{_typed(command)} runs in one process", "Start it without torchrun")
    overrides = [_grid(command) if text == "networks=grid" else text for text in overrides]
    _import_networks(_parse(overrides))
    parsed = _parse([*_still_meant(defaults or {}, overrides), *overrides])
    choices = [o for o in parsed if o.key_or_group in _groups(command)]
    plain = [o for o in parsed if o not in choices]
    for choice in choices:
        _check_choice(command, choice)
    _register(choices)
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(catalog.folder().resolve()), version_base="1.3", job_name="ddengine"):
        try:
            made = _compose(command, parsed)
            missing = OmegaConf.missing_keys(made)
            found = None if missing else OmegaConf.to_object(made)
        except (HydraException, OmegaConfBaseException) as error:
            raise _explained(command, choices, plain, error) from error
    for override in plain:
        _check_key(override, made)
    if missing:
        key = min(missing, key=len)
        raise UsageError(f"{_typed(command)} needs {key}", f"Give {_example(key)}")
    return found


def _grid(command: str) -> str:
    """The override for `networks=grid`: the usual networks, each of another family."""
    return f"networks=[{','.join(GRAPH_GRID if command.endswith('_graphs') else GRID)}]"


def _import_networks(overrides: Sequence[Override]) -> None:
    """Import the networks that a person names by import path (never one that an artefact names)."""
    for override in overrides:
        if override.key_or_group in ("network", "networks"):
            value = override.value()
            for name in value if isinstance(value, list) else [value]:
                if is_import_path(str(name)):
                    import_network(str(name))


def spelled(key: str, value: Any) -> str:
    """`key=value` in hydra's grammar, whatever characters a text holds."""
    if not isinstance(value, str):
        return f"{key}={'null' if value is None else str(value).lower()}"
    literal = re.sub(r"(\\*)\$\{", r"\1\1\\${", value)  # no interpolation
    return f"{key}={QuotedString(literal, Quote.single).with_quotes()}"


def _still_meant(defaults: Mapping[str, Any], overrides: Sequence[str]) -> Iterator[str]:
    chosen = {key: value.strip("'\"") for key, _, value in (text.partition("=") for text in overrides)}
    for key, value in defaults.items():
        group = key.split(".")[0]
        if chosen.get(group, defaults.get(group)) == defaults.get(group):
            yield spelled(key, value)


def _typed(command: str) -> str:
    """A command as one types it: some have a configuration for each kind of data."""
    return command.partition("_")[0]


def _example(key: str) -> str:
    if key == "dataset.name":
        return "dataset.name=NAME, a set of the collection such as MUTAG or ogbg_molbace"
    group = key.split(".")[0]
    return f"{group}=NAME, one of: {', '.join(_known(group))}" if group in GROUPS else f"{key}=VALUE"


def _known(group: str) -> list[str]:
    if group == "row":
        return [name for name, _, _ in catalog.configs()]
    return [name for name, _, _ in catalog.listing(f"{group}s")]


def _groups(command: str) -> list[str]:
    """What `command` chooses by name: dataset, matcher, network, recipe, row, or some of them."""
    return [group for entry in COMMANDS[command]().defaults if isinstance(entry, dict) for group in entry]


def _register(choices: Sequence[Override]) -> None:
    """Tell hydra our schemas, one per command and per name of a group, and those of chosen plug-ins."""
    store = ConfigStore.instance()
    for command, schema in COMMANDS.items():
        store.store(name=command, node=schema)
    makers: dict[str, Callable[[str], Any]] = {
        "dataset": _dataset,
        "network": NetworkConfig,
        "matcher": _schema,
        "recipe": _recipe,
    }
    for group, make in makers.items():
        chosen = [str(o.value()) for o in choices if o.key_or_group == group]
        ours = [name for name in catalog.KINDS[f"{group}s"] if not _is_stored(group, name)]
        for name in {*ours, *chosen}:
            store.store(group=group, name=name, node=make(name))


def _dataset(name: str) -> Any:
    return GraphDatasetConfig(name) if name in GRAPH_COLLECTIONS else DatasetConfig(name)


def _is_stored(group: str, name: str) -> bool:
    return f"{name}.yaml" in ConfigStore.instance().repo.get(group, {})


def _schema(name: str) -> Any:
    """A mutable twin of a matcher's options (OmegaConf makes frozen dataclasses read-only), and its name."""
    options = matchers.find(name).options
    return _twin(type(options), [("name", str, field(default=name))])


def _recipe(name: str) -> Any:
    """A mutable twin of an expert recipe, with its values."""
    values = {key: list(v) if isinstance(v, tuple) else v for key, v in vars(RECIPES[name]).items()}
    return _twin(ExpertRecipe, [])(**values)


def _twin(options: type, columns: list[Any]) -> type:
    """A mutable dataclass with `columns`, then the fields and defaults of `options`, groups of them too."""
    hints = get_type_hints(options)
    for f in fields(options):
        kind, value = hints[f.name], f.default  # not a prototype's value: a variant fills in what is open
        if is_dataclass(value):
            kind = _twin(type(value), [])
            columns.append((f.name, kind, field(default_factory=kind)))
        elif isinstance(value, tuple):
            columns.append((f.name, kind, field(default_factory=partial(list, value))))
        else:
            columns.append((f.name, kind, field(default=value)))
    return make_dataclass(f"{options.__name__}Config", columns)


def swept(words: Sequence[str]) -> list[list[str]]:
    """Every combination of the values that words give their keys, as in `seed=0,1` or `seed=range(3)`: the
    words of each, in order. UsageError for what cannot be listed.
    """
    values = []
    for text, override in zip(words, _parse(words, several=True), strict=True):
        if override.is_sweep_override() and not override.is_discrete_sweep():
            raise UsageError(f"'{text}' names a range without steps", "Give values: key=a,b or key=range(3)")
        listed = override.sweep_string_iterator() if override.is_sweep_override() else None
        key = override.key_or_group
        values.append([text] if listed is None else [f"{key}={value}" for value in listed])
    return [list(run) for run in product(*values)]


def _parse(overrides: Sequence[str], several: bool = False) -> list[Override]:
    parser, found = OverridesParser.create(), []
    for text in overrides:
        try:
            found.append(parser.parse_override(_literal(text)))
        except HydraException as error:
            remedy = "Write key=value, for example ipc=10; put odd characters in quotes: key=\"'a (b)'\""
            raise UsageError(f"cannot read the override '{text}'", remedy) from error
        plain = found[-1].type == OverrideType.CHANGE and found[-1].package is None
        if not plain or not found[-1].key_or_group:
            raise UsageError(f"the override '{text}' is not of the form key=value", "Write key=value")
        if found[-1].is_sweep_override() and not several:
            raise UsageError(
                f"'{text}' names several values", "Give one, or -m with distill or buffer to run them all"
            )
    return found


def _literal(text: str) -> str:
    """`text` with its value quoted if it is a path that is neither quoted, null nor an interpolation."""
    key, _, value = text.partition("=")
    typed = key in PATHS and value not in ("", "null") and value[0] not in "'\"" and "${" not in value
    return spelled(key, value) if typed else text


def _check_choice(command: str, choice: Override) -> None:
    group, value = choice.key_or_group, choice.value()
    if group == "dataset" and (command, value in GRAPH_COLLECTIONS) in UNFIT:
        holds, takes = ("graphs", "images") if value in GRAPH_COLLECTIONS else ("images", "graphs")
        said = f"dataset={value} holds {holds}; what is to be done takes {takes}"
        raise UsageError(said, f"Give a dataset of {takes}; ddengine list datasets shows them")
    if isinstance(value, str) and value in catalog.KINDS.get(f"{group}s", ()):
        return
    if group == "network" and isinstance(value, str):
        find_network(value)
        return
    if not isinstance(value, str) or value not in _known(group):
        typed = (choice.input_line or "").partition("=")[2]
        raise unknown(group, typed.strip("'\""), _known(group))


def _keys(node: DictConfig, path: str = "") -> Iterator[str]:
    for key in map(str, node):
        full = f"{path}{key}"
        yield full
        child = node._get_node(key)
        if isinstance(child, DictConfig) and not child._is_none() and not child._is_missing():
            yield from _keys(child, f"{full}.")


def _check_key(override: Override, base: DictConfig) -> None:
    key, known = override.key_or_group, list(_keys(base))
    if key in known:
        return
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    if not near:
        near = difflib.get_close_matches(key.rsplit(".", 1)[-1], known, n=1, cutoff=0.5)
    hint = f"Did you mean '{near[0]}'? " if near else ""
    level = key.rpartition(".")[0]
    while level and not any(k.startswith(f"{level}.") for k in known):
        level = level.rpartition(".")[0]
    beside = [k.rpartition(".")[2] for k in known if k.rpartition(".")[0] == level]
    where = f"Keys of {level}" if level else "Keys"
    raise UsageError(f"unknown key '{key}'", f"{hint}{where}: {', '.join(beside)}")


def _compose(command: str, overrides: Sequence[Override]) -> DictConfig:
    return compose(config_name=command, overrides=[o.input_line or "" for o in overrides])


def _explained(
    command: str, choices: Sequence[Override], plain: Sequence[Override], error: Exception
) -> UsageError:
    """The error that names the one override which does not fit, found by composing each of them alone."""
    group = next((g for g in GROUPS if f"'{g}'" in str(error)), None)
    if "must specify" in str(error) and group is not None:
        return UsageError(f"{_typed(command)} needs {group}", f"Give {_example(group)}")
    culprit = " ".join(o.input_line or "" for o in choices)
    try:
        base = _compose(command, choices)
        for override in plain:
            culprit = override.input_line or ""
            _check_key(override, base)
            OmegaConf.to_container(_compose(command, [*choices, override]), resolve=True)
    except (HydraException, OmegaConfBaseException) as alone:
        return UsageError(f"{culprit}: {_reason(alone)}", _fitting(_reason(alone)))
    return UsageError(_reason(error), f"See ddengine {_typed(command)} --help for the keys")


def _fitting(reason: str) -> str:
    """What to give for a value that does not fit, by the type in OmegaConf's words."""
    kinds = {
        "Integer": "a whole number",
        "Float": "a number",
        "float": "a number",
        "Boolean": "true or false",
    }
    return f"Give {next((text for kind, text in kinds.items() if kind in reason), 'a value of its type')}"


def _reason(error: BaseException) -> str:
    """What the innermost error says, on one line and without hydra's trailer."""
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(str(error).split("full_key:")[0].split())
