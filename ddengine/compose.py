"""From command-line overrides to one configuration, through hydra; a mistake is one line and a remedy."""

import difflib
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import field, fields, make_dataclass
from functools import partial
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
from ddengine.config import COMMANDS, DatasetConfig, NetworkConfig
from ddengine.errors import UsageError, unknown

PATHS = ("out", "dataset.root")  # taken as typed, so that no path needs quotes


def composed(command: str, overrides: Sequence[str], defaults: Mapping[str, Any] | None = None) -> Any:
    """The checked configuration of `command`: its dataclass, whose matcher node holds name and options.

    `defaults` are values of keys that `overrides` replace; where these choose another dataset or network, the
    defaults of its options go too. Raises UsageError for a syntax error, an unknown key or choice (with the
    nearest known one), a wrong type or a missing value.
    """
    parsed = _parse([*_still_meant(defaults or {}, overrides), *overrides])
    choices = [o for o in parsed if o.key_or_group in _groups(command)]
    _register({str(o.value()) for o in choices})
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(catalog.folder().resolve()), version_base="1.3", job_name="ddengine"):
        for choice in choices:
            _check_choice(choice)
        plain = [o for o in parsed if o not in choices]
        base = _compose(command, choices)
        for override in plain:
            _check_key(override, base)
        made = _compose(command, [*choices, *plain])
    missing = OmegaConf.missing_keys(made)
    if missing:
        key = min(missing, key=len)
        raise UsageError(f"{command} needs {key}", f"Give {_example(key)}")
    return OmegaConf.to_object(made)


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


def _example(key: str) -> str:
    known = _choices().get(key.split(".")[0])
    return f"{key.split('.')[0]}=NAME, one of: {', '.join(known)}" if known else f"{key}=VALUE"


def _choices() -> dict[str, list[str]]:
    return {
        "dataset": [name for name, _, _ in catalog.listing("datasets")],
        "network": [name for name, _, _ in catalog.listing("networks")],
        "matcher": matchers.names(),
        "row": [name for name, _, _ in catalog.configs()],
    }


def _groups(command: str) -> list[str]:
    """What `command` chooses by name: dataset, matcher, network, row, or some of them."""
    return [group for entry in COMMANDS[command]().defaults if isinstance(entry, dict) for group in entry]


def _register(chosen: Collection[str]) -> None:
    """Tell hydra our schemas: one per command, dataset, network and matcher (of plug-ins the chosen ones)."""
    store, known = ConfigStore.instance(), _choices()
    for command, schema in COMMANDS.items():
        store.store(name=command, node=schema)
    for name in known["dataset"]:
        store.store(group="dataset", name=name, node=DatasetConfig(name=name))
    for name in known["network"]:
        store.store(group="network", name=name, node=NetworkConfig(name=name))
    for name in known["matcher"]:
        if name in matchers.MATCHERS or name in chosen:
            store.store(group="matcher", name=name, node=_schema(name))


def _schema(name: str) -> Any:
    """A mutable twin of a matcher's options (OmegaConf makes frozen dataclasses read-only), and its name."""
    try:
        options = matchers.find(name).options
    except Exception as error:
        cause = f"the plug-in matcher '{name}' does not load: {error}"
        raise UsageError(cause, "Repair or remove the package that provides it") from error
    hints = get_type_hints(type(options))
    columns: list[Any] = [("name", str, field(default=name))]
    for f in fields(options):
        value = f.default  # not the prototype's value: a variant may fill in what is left open
        default = (
            field(default_factory=partial(list, value)) if isinstance(value, tuple) else field(default=value)
        )
        columns.append((f.name, hints[f.name], default))
    return make_dataclass(f"{type(options).__name__}Config", columns)


def _parse(overrides: Sequence[str]) -> list[Override]:
    parser, found = OverridesParser.create(), []
    for text in overrides:
        try:
            found.append(parser.parse_override(_literal(text)))
        except HydraException as error:
            remedy = "Write key=value, for example ipc=10; put odd characters in quotes: key=\"'a (b)'\""
            raise UsageError(f"cannot read the override '{text}'", remedy) from error
        if found[-1].type != OverrideType.CHANGE or found[-1].package is not None:
            raise UsageError(f"the override '{text}' is not of the form key=value", "Write key=value")
        if found[-1].is_sweep_override():
            raise UsageError(f"'{text}' names several values", "Run the command once for each value")
    return found


def _literal(text: str) -> str:
    """`text` with its value quoted if it is a path that is neither quoted, null nor an interpolation."""
    key, _, value = text.partition("=")
    typed = key in PATHS and value not in ("", "null") and value[0] not in "'\"" and "${" not in value
    return spelled(key, value) if typed else text


def _check_choice(choice: Override) -> None:
    known, value = _choices()[choice.key_or_group], choice.value()
    if not isinstance(value, str) or value not in known:
        raise unknown(choice.key_or_group, "null" if value is None else value, known)


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
    top = ", ".join(k for k in known if "." not in k)
    raise UsageError(f"unknown key '{key}'", f"{hint}Keys: {top}")


def _compose(command: str, overrides: Sequence[Override]) -> DictConfig:
    try:
        return compose(config_name=command, overrides=[o.input_line or "" for o in overrides])
    except (HydraException, OmegaConfBaseException) as error:
        choices = [o for o in overrides if o.key_or_group in _groups(command)]
        raise _explained(command, choices, [o for o in overrides if o not in choices], error) from error


def _explained(
    command: str, choices: Sequence[Override], plain: Sequence[Override], error: Exception
) -> UsageError:
    """The error that names the one override which does not fit, found by composing each of them alone."""
    for override in plain:
        try:
            compose(config_name=command, overrides=[o.input_line or "" for o in (*choices, override)])
        except (HydraException, OmegaConfBaseException) as alone:
            cause = f"{override.input_line}: {_reason(alone)}"
            return UsageError(cause, "Give a value of the type that the key has")
    group = next((g for g in ("dataset", "matcher", "network") if f"'{g}'" in str(error)), None)
    if "must specify" in str(error) and group is not None:
        return UsageError(f"{command} needs {group}", f"Give {_example(group)}")
    return UsageError(_reason(error), f"See ddengine {command} --help for the keys")


def _reason(error: BaseException) -> str:
    """What the innermost error says, on one line and without hydra's trailer."""
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(str(error).split("full_key:")[0].split())
