"""``trainer.json``: the small part of a checkpoint, read without torch and without trust."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scale_digrap.errors import ScaleDigrapError
from scale_digrap.runtime.files import UntrustedFileError, open_inside
from scale_digrap.runtime.secrets import MASK, is_secret_key
from scale_digrap.runtime.text import TextError, one_line, parse_json, printable, read_at_most
from scale_digrap.training.run_folder import META

if TYPE_CHECKING:
    from scale_digrap.config import Config

VERSION = 2
_MAX_BYTES = 1 << 26
_INTERPOLATION = re.compile(r"\$\{([^{}$]*)\}")


class CheckpointError(ScaleDigrapError):
    """A checkpoint that cannot be written or read."""


class OtherVersionError(CheckpointError):
    """A checkpoint that another version of the package has written; it may well be whole."""


@dataclass(frozen=True)
class RunState:
    """The small part of a checkpoint, the same on all ranks: ``trainer.json``."""

    version: int
    step: int
    samples: int
    optimizer: str
    loader: dict[str, Any]
    base: str
    """Fingerprint of the pre-trained weights that the run began with."""
    frozen: bool
    """Some weights are not in the checkpoint and come from the base."""
    anchors: bool
    """The anchors are in the checkpoint; else they are the base's weights."""
    engine: str
    ranks: int
    config: dict[str, Any]
    """As the run was configured, with secrets masked and interpolations as they were written."""
    versions: dict[str, str]


def read_meta(path: Path) -> RunState:
    """A checkpoint's ``trainer.json``.

    Raises:
        CheckpointError: not there, damaged, or of another version.
    """
    name = printable(str(path / META))
    try:
        with open_inside(path, META) as file:
            data = read_at_most(file, _MAX_BYTES)
    except UntrustedFileError as error:
        raise CheckpointError(str(error)) from None
    except OSError as error:
        raise CheckpointError(f"cannot read {name}: {error.strerror or error}") from None
    if len(data) > _MAX_BYTES:
        raise CheckpointError(f"{name} is larger than {_MAX_BYTES:,} bytes: it is damaged")
    try:
        values = parse_json(data, name)
    except TextError as error:
        raise CheckpointError(f"{error}: it is damaged") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{name} is damaged: it holds {_shown(values)}, not the state of a run")
    unknown = sorted(set(values) - {field.name for field in fields(RunState)})
    if values.get("version") != VERSION or unknown:
        what = f"{unknown[0]!r}" if unknown else f"version {_shown(values.get('version'))}, not {VERSION}"
        raise OtherVersionError(
            f"{path} was written by another version of scale_digrap ({META} has {one_line(what, 60)}): use that one"
        )
    for field in fields(RunState):
        if field.name not in values:
            raise CheckpointError(f"{name} is damaged: {field.name!r} is missing")
        wanted, fits = _KINDS[str(field.type)]
        if not fits(values[field.name]):
            raise CheckpointError(
                f"{name} is damaged: {field.name!r} should be {wanted}, and is {_shown(values[field.name])}"
            )
    return RunState(**{field.name: values[field.name] for field in fields(RunState)})


def stored_config(path: Path, state: RunState) -> Config:
    """The configuration in a checkpoint. Of this machine it reads variables of the environment, secret ones excepted.

    Raises:
        CheckpointError: it is not one of this version.
    """
    from scale_digrap.config import config_from_dict

    try:
        return config_from_dict(_without_secrets(state.config), stored=True)
    except Exception as error:  # ConfigError, and whatever values of other types provoke
        name = printable(str(path / META))
        raise CheckpointError(f"{name}: its configuration is damaged: {one_line(error)}") from None


def configured(state: RunState, *keys: str) -> str:
    """A value of a checkpoint's configuration for people, ``?`` where it is not there."""
    value: Any = state.config
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return "?" if value is None else _shown(value) if not isinstance(value, str) else one_line(value, 300)


def _without_secrets(value: Any) -> Any:
    """Interpolations as a run stores them, but for those that a configuration from someone else could steal with.

    ``${oc.env:AWS_SECRET_ACCESS_KEY}`` in a prompt would write this user's secret into the exported folder.
    """
    if isinstance(value, dict):
        return {key: _without_secrets(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_without_secrets(inner) for inner in value]
    if not isinstance(value, str) or "${" not in value:
        return value
    plain = _INTERPOLATION.sub(lambda found: MASK if _is_secret(found[1]) else found[0], value)
    # A name that is itself put together could be that of anything.
    return MASK if "${" in _INTERPOLATION.sub("", plain) else plain


def _is_secret(inside: str) -> bool:
    resolver, colon, name = inside.partition(":")
    if not colon:
        return False  # another key of the configuration
    return resolver.strip() != "oc.env" or is_secret_key(name.partition(",")[0].strip())


def _shown(value: Any) -> str:
    return one_line(repr(value), 60)


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 53


def _is_strings(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(inner, str) for inner in value.values())


_KINDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "int": ("a count", _is_count),
    "str": ("text", lambda value: isinstance(value, str)),
    "bool": ("true or false", lambda value: isinstance(value, bool)),
    "dict[str, Any]": ("an object", lambda value: isinstance(value, dict)),
    "dict[str, str]": ("an object of texts", _is_strings),
}
