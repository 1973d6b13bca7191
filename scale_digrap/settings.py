"""Typed settings: YAML files and ``key=value`` overrides become dataclasses, each value read by its field's type.

A schema is a dataclass with default values for all its fields. Its annotations decide what a scalar means: a setting of
type ``str`` is the text as it was written, ``float`` takes ``1e-4``, ``Optional`` takes ``null``. :data:`PathText` is
text in which ``~`` is expanded. Interpolations (``${oc.env:NAME}``, ``${run_dir}/x``) are OmegaConf's.

What leaves the process, on a terminal, into a log or a file, goes through :func:`shown`.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import os
import re
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints, is_typeddict

from scale_digrap.errors import ScaleDigrapError
from scale_digrap.runtime.secrets import MASK, is_secret_key, mask_tree
from scale_digrap.runtime.text import TextError, home, one_line, read_text
from scale_digrap.runtime.yaml_text import Scalar, YamlError, dump_yaml, parse_yaml

PathText = Annotated[str, "path"]
"""A folder or file, or an id or URL where these may stand too: ``~`` at its beginning is expanded."""

_MAX_BYTES = 64 << 20
_PURE = re.compile(r"(?:\$\{[^{}$,\s]*\})+")
_MARK = "\ue000"
_SHOWN_CHARACTERS = 200


class ConfigError(ScaleDigrapError):
    """A configuration that cannot be run: says which key, which value, and what to write instead."""


class Interpolated(str):
    """Text that an interpolation was resolved to, with what had been written: that, not the text, is stored."""

    source: str

    def __new__(cls, text: str, source: str) -> Interpolated:
        """Text, and the text with ``${…}`` that it comes from."""
        made = super().__new__(cls, text)
        made.source = source
        return made

    def __getnewargs__(self) -> tuple[str, str]:  # type: ignore[override]
        return str(self), self.source


class InterpolatedList(list):
    """A list that an interpolation was resolved to."""

    source: str = ""


# -- reading -----------------------------------------------------------------------------------------------------------


def read_values(path: str | os.PathLike[str] | None, overrides: Sequence[str], schema: type) -> dict[str, Any]:
    """The values of a YAML file with ``key=value`` overrides applied in order, for :func:`read_structured`.

    Args:
        path: YAML file; None starts from nothing.
        overrides: such as ``optimizer.lr=1e-3``. What follows the ``=`` of a setting that is text is that text, whole;
            of other settings it is YAML.
        schema: of the settings.

    Raises:
        ConfigError: unreadable file, an override that is not ``key=value`` or whose value is not YAML.
    """
    values: dict[str, Any] = {} if path is None else read_yaml(path)
    for item in overrides:
        key, equals, text = item.partition("=")
        if not equals or not key.strip():
            raise ConfigError(f"override {_quoted(item)} is not of the form key=value, for example optimizer.lr=1e-4")
        parts = _parts(key.strip(), item)
        value = _override_value(key.strip(), text, _kind_at(parts, schema))
        values = _merged(values, _nested(parts, value))
    return values


def read_yaml(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The mapping in a YAML file; scalars are as in :mod:`scale_digrap.runtime.yaml_text`.

    Raises:
        ConfigError: no such file, not valid YAML, not a mapping.
    """
    path = Path(home(os.fspath(path)))
    if not path.is_file():
        raise ConfigError(f"configuration file {str(path)!r} does not exist")
    try:
        loaded = parse_yaml(read_text(path, _MAX_BYTES))
    except YamlError as error:
        raise ConfigError(f"{path} is {error}" if str(error).startswith("not ") else f"{path}: {error}") from None
    except TextError as error:
        raise ConfigError(str(error)) from None
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        raise ConfigError(f"{path} must hold key: value pairs at its top level")
    return loaded


def read_structured(values: Mapping[str, Any], schema: type, *, stored: bool = False) -> Any:
    """An object of a schema from nested dictionaries, of :func:`read_values` or of plain values.

    Args:
        values: nested mappings; those that are missing take the schema's defaults.
        schema: a dataclass with default values for all its fields.
        stored: they were stored by :func:`shown`: an interpolation that cannot be resolved here stays as it is, since
            what it stood for may not be needed any more.

    Raises:
        ConfigError: unknown or mistyped key, wrong type, an interpolation that cannot be resolved.
    """
    _check_keys(values, schema, (), schema)
    reader = _Reader()
    made = reader.read(values, schema, ())
    if not reader.waiting:
        return made
    values = _copied(values)
    whole = _whole(made)
    for path, kind, source in sorted(reader.waiting, key=lambda found: found[1] is Any):
        _put(values, path, _Resolved(_resolve(whole, path, kind, source, stored)))
    return _Reader(resolved=True).read(values, schema, ())


@dataclasses.dataclass(frozen=True)
class _Resolved:
    value: Any


class _Reader:
    """Turns a tree into typed values. Interpolations are left as text and noted in ``waiting``."""

    def __init__(self, *, resolved: bool = False) -> None:
        self.waiting: list[tuple[tuple[str | int, ...], Any, str]] = []
        self._interpolations = not resolved

    def read(self, value: Any, kind: Any, path: tuple[str | int, ...]) -> Any:
        if isinstance(value, _Resolved):
            return value.value
        text = value.text if isinstance(value, Scalar) else value
        if self._interpolations and _is_interpolation(text):
            source = text.source if isinstance(text, Interpolated) else text
            self.waiting.append((path, kind, source))
            return source
        kind, is_path, optional, alternatives = _plain_kind(kind)
        if isinstance(value, Scalar) and value == Scalar("") and _is_container(kind) and not optional:
            value = [] if get_origin(kind) is list else {}  # all that stood there is commented out
        if value is None or (isinstance(value, Scalar) and value.is_null and optional):
            if optional or kind is Any:
                return None
            raise _wrong(path, kind, value)
        if alternatives:
            wants_list = isinstance(value, list | tuple)
            chosen = [one for one in alternatives if (get_origin(one) is list) == wants_list]
            # A number before text: text takes everything.
            for one in sorted(chosen or alternatives, key=lambda one: _plain_kind(one)[0] is str):
                try:
                    return self.read(value, one, path)
                except ConfigError as error:
                    last = error
            raise last
        if dataclasses.is_dataclass(kind):
            return self._section(value, kind, path)
        if is_typeddict(kind):
            if not isinstance(value, Mapping):
                raise _wrong(path, kind, value)
            hints = _hints(kind)
            return {name: self.read(item, hints.get(name, Any), (*path, name)) for name, item in value.items()}
        origin = get_origin(kind)
        if origin is list:
            if not isinstance(value, list | tuple):
                raise _wrong(path, kind, value)
            return [self.read(item, get_args(kind)[0], (*path, number)) for number, item in enumerate(value)]
        if origin is dict:
            if not isinstance(value, Mapping):
                raise _wrong(path, kind, value)
            return {str(name): self.read(item, get_args(kind)[1], (*path, str(name))) for name, item in value.items()}
        if kind is Any:
            return self._any(value, path)
        return _scalar(value, kind, path, is_path)

    def _section(self, value: Any, kind: Any, path: tuple[str | int, ...]) -> Any:
        if dataclasses.is_dataclass(value) and isinstance(value, kind):
            return value
        _check_keys(value, kind, tuple(map(str, path)), kind)
        hints = _hints(kind)
        return kind(**{name: self.read(item, hints[name], (*path, name)) for name, item in value.items()})

    def _any(self, value: Any, path: tuple[str | int, ...]) -> Any:
        if isinstance(value, Scalar):
            return value.plain
        if isinstance(value, Mapping):
            return {str(name): self.read(item, Any, (*path, str(name))) for name, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.read(item, Any, (*path, number)) for number, item in enumerate(value)]
        return value


@functools.cache
def _hints(schema: Any) -> dict[str, Any]:
    return get_type_hints(schema, include_extras=True)


def _is_interpolation(value: Any) -> bool:
    text = value.text if isinstance(value, Scalar) else value
    return isinstance(text, str) and "${" in text


def _is_container(kind: Any) -> bool:
    return get_origin(kind) in (list, dict) or dataclasses.is_dataclass(kind) or is_typeddict(kind)


def _plain_kind(kind: Any) -> tuple[Any, bool, bool, list[Any]]:
    """A type without ``Annotated`` and ``Optional``: itself, is it a path, may it be null, what else it may be."""
    is_path = optional = False
    while True:
        origin = get_origin(kind)
        if origin is Annotated:
            is_path = is_path or "path" in kind.__metadata__
            kind = get_args(kind)[0]
        elif origin in (Union, types.UnionType):
            rest = [one for one in get_args(kind) if one is not type(None)]
            optional = optional or len(rest) < len(get_args(kind))
            if len(rest) > 1:
                return Union, is_path, optional, rest
            kind = rest[0]
        else:
            return kind, is_path, optional, []


def _scalar(value: Any, kind: Any, path: tuple[str | int, ...], is_path: bool) -> Any:
    written = value.text if isinstance(value, Scalar) else value
    if kind is str:
        if isinstance(written, os.PathLike):
            written = os.fspath(written)
        elif isinstance(written, int | float) and not isinstance(written, bool):
            written = str(written)
        if not isinstance(written, str):
            raise _wrong(path, kind, value)
        if is_path and written.startswith("~"):
            expanded = home(written)
            return Interpolated(expanded, written.source) if isinstance(written, Interpolated) else expanded
        return written
    found: Any = None
    if kind is bool:
        found = written if isinstance(written, bool) else _BOOLS.get(str(written).lower())
    elif kind is int and not isinstance(written, bool):
        found = written if isinstance(written, int) else _int(written)
    elif kind is float and not isinstance(written, bool):
        found = float(written) if isinstance(written, int | float) else _float(written)
    if found is None:
        raise _wrong(path, kind, value)
    return found


_BOOLS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}


def _int(text: Any) -> int | None:
    """A decimal number, leading zeros or not, or one that says its base: ``0x10``, ``0o10``, ``0b10``."""
    if not isinstance(text, str) or len(text) > 1000 or text != text.strip():
        return None
    try:
        return int(text, 0) if re.match(r"[-+]?0[xXoObB]", text) else int(text)
    except ValueError:
        return None


def _float(text: Any) -> float | None:
    if not isinstance(text, str) or text != text.strip():
        return None
    try:
        return float(re.sub(r"^([-+]?)\.(inf|nan)$", r"\1\2", text, flags=re.IGNORECASE))
    except ValueError:
        return None


def _wrong(path: tuple[str | int, ...], kind: Any, value: Any) -> ConfigError:
    """A value of another type: the key, what it takes, the value, and how to write it."""
    key = ".".join(map(str, path))
    got = _brief(value)
    origin = get_origin(kind)
    if kind is str:
        return ConfigError(
            f"{key} must be text, got {got}: put text with braces, brackets, colons or '#' in it into quotes"
        )
    if origin is list:
        inner = _plain_kind(get_args(kind)[0])[0]
        if isinstance(value, Mapping):
            return ConfigError(f"{key} must be a list, got {got}: write [a, b], text with braces or colons in quotes")
        if inner in (str, int, float):
            return ConfigError(f"{key} must be a list, got {got}: write [{_flow(value)}]")
        return ConfigError(f"{key} must be a list, got {got}: write [{{{_example(inner)}}}]")
    if is_typeddict(kind):
        return ConfigError(f"{key} is a section with keys {', '.join(_hints(kind))}; got {got}")
    if origin is dict:
        inner = _plain_kind(get_args(kind)[1])[0]
        return ConfigError(f"{key} must map names to values, got {got}: write {{NAME: {_value_example(inner)}}}")
    what = {int: "a whole number", float: "a number", bool: "true or false"}.get(kind, str(kind))
    hint = "" if not isinstance(value, list | Mapping) else ", not a list or section"
    return ConfigError(f"{key} must be {what}{hint}, got {got}")


def _value_example(kind: Any) -> str:
    if dataclasses.is_dataclass(kind):
        return f"{{{_example(kind)}}}"
    return "VALUE"


def _example(kind: Any) -> str:
    if not dataclasses.is_dataclass(kind):
        return "NAME: VALUE"
    name, hint = next(iter(_hints(kind).items()))  # type: ignore[arg-type]
    return f"{name}: [a.tar]" if get_origin(hint) is list else f"{name}: VALUE"


def _flow(value: Any) -> str:
    """A value as an item of a list in brackets, in quotes where YAML would read it otherwise."""
    text = _written(value)
    try:
        if parse_yaml(f"[{text}]") == [Scalar(text)]:
            return text
    except YamlError:
        pass
    return "'" + text.replace("'", "''") + "'"


def _brief(value: Any) -> str:
    """What was given, short."""
    return _quoted(_written(value))


def _quoted(text: str) -> str:
    return repr(text if len(text) <= _SHOWN_CHARACTERS else text[: _SHOWN_CHARACTERS - 1] + "…")


def _written(value: Any) -> str:
    if isinstance(value, Scalar):
        return value.text
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{name}: {_written(item)}".rstrip(": ") for name, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_written, value)) + "]"
    return "null" if value is None else str(value)


# -- overrides ---------------------------------------------------------------------------------------------------------


def _parts(key: str, item: str) -> list[str]:
    """The names in ``a.b[c.d].e``."""
    if not re.fullmatch(r"(?:[^.\[\]=]+|\[[^\[\]]+\])(?:\.[^.\[\]=]+|\.?\[[^\[\]]+\])*", key):
        raise ConfigError(f"override {_quoted(item)}: {key!r} is not a key such as optimizer.lr")
    return [inside or name for inside, name in re.findall(r"\[([^\[\]]+)\]|([^.\[\]]+)", key)]


def _kind_at(parts: Sequence[str], schema: Any) -> Any:
    """The type of the setting that a key names; ``Any`` where the schema does not know it."""
    kind: Any = schema
    for part in parts:
        kind = _plain_kind(kind)[0]
        if dataclasses.is_dataclass(kind) or is_typeddict(kind):
            kind = _hints(kind).get(part, Any)  # type: ignore[arg-type]
        elif get_origin(kind) is dict:
            kind = get_args(kind)[1]
        else:
            return Any
    return kind


def _override_value(key: str, text: str, kind: Any) -> Any:
    plain, _, _, alternatives = _plain_kind(kind)
    kinds = alternatives or [plain]
    is_list = text.lstrip().startswith("[") and any(get_origin(one) is list for one in kinds)
    if not is_list and any(_plain_kind(one)[0] is str for one in kinds):
        return _text_value(text)
    try:
        value = parse_yaml(text)
    except YamlError:
        raise ConfigError(
            f"override {_quoted(f'{key}={text}')} is not valid YAML: {_how_to_write(key, text, kinds)}"
        ) from None
    return Scalar("") if value is None else value


def _how_to_write(key: str, text: str, kinds: Sequence[Any]) -> str:
    if any(get_origin(one) is list for one in kinds):
        items = [item.strip() for item in re.split(r",(?![^{]*\})", text.strip().removeprefix("[").removesuffix("]"))]
        if all(items) and any(get_origin(one) is list and _plain_kind(get_args(one)[0])[0] is str for one in kinds):
            return f"put text with braces, colons or '#' in it into quotes: {key}=[{', '.join(map(_flow, items))}]"
        return f"write {key}=[a, b], and text with braces, brackets, colons or '#' in it in quotes: ['a-{{0..3}}.tar']"
    if any(dataclasses.is_dataclass(one) or get_origin(one) is dict for one in kinds):
        return f"write {key}={{NAME: VALUE}}, and text with braces, brackets, colons or '#' in it in quotes"
    return "put text with braces, brackets, colons, quotes or '#' in it into quotes"


def _text_value(text: str) -> Scalar:
    """The text itself; where all of it stands in quotes of YAML's, what they hold."""
    if len(text) >= 2 and text[0] == text[-1] and text[0] in "'\"":
        try:
            value = parse_yaml(text)
        except YamlError:
            return Scalar(text)
        if isinstance(value, Scalar) and value.quoted:
            return value
    return Scalar(text)


def _nested(parts: Sequence[str], value: Any) -> dict[str, Any]:
    for part in reversed(parts):
        value = {part: value}
    return value  # type: ignore[no-any-return]


def _merged(old: Any, new: Any) -> Any:
    if not (isinstance(old, Mapping) and isinstance(new, Mapping)):
        return new
    return {**old, **{name: _merged(old[name], item) if name in old else item for name, item in new.items()}}


# -- interpolations ----------------------------------------------------------------------------------------------------


def _copied(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(name): _copied(item) for name, item in value.items()}
    return [_copied(item) for item in value] if isinstance(value, list | tuple) else value


def _put(values: Any, path: tuple[str | int, ...], value: Any) -> None:
    for part in path[:-1]:
        values = values[part]
    values[path[-1]] = value


def _whole(made: Any) -> Any:
    """A configuration as OmegaConf takes it: its interpolations refer to any key."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        return OmegaConf.create(_sources(made, escape=False))
    except OmegaConfBaseException as error:  # an interpolation that is not closed
        path = getattr(error, "full_key", None) or ""
        node: Any = _sources(made, escape=False)
        for part in re.findall(r"[^.\[\]]+", path):
            node = node[part] if isinstance(node, dict) and part in node else node
        raise ConfigError(
            f"{path}={_brief(node)} cannot be resolved: {str(error).splitlines()[0]}; write \\${{ for text that is not "
            "an interpolation"
        ) from None


def _resolve(whole: Any, path: tuple[str | int, ...], kind: Any, source: str, stored: bool) -> Any:
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    node = whole
    key = ".".join(map(str, path))
    try:
        for part in path:
            node = node[part]
        if OmegaConf.is_config(node):
            node = OmegaConf.to_container(node, resolve=True)
    except OmegaConfBaseException as error:
        if stored:
            return _with_source([source] if get_origin(_plain_kind(kind)[0]) is list else source, source)
        reason = one_line(str(error).splitlines()[0] if str(error) else type(error).__name__)
        raise ConfigError(f"{key}={_quoted(source)} cannot be resolved: {reason}") from None
    if isinstance(node, str) and _plain_kind(kind)[0] is not str and kind is not Any:
        node = Scalar(node)
    found = _Reader(resolved=True).read(node, kind, path)
    if not isinstance(found, str | list | dict | type(None)):
        whole_at = whole
        for part in path[:-1]:
            whole_at = whole_at[part]
        whole_at[path[-1]] = found  # what refers to it gets the number, not its text
    return _with_source(found, source)


def _with_source(found: Any, source: str) -> Any:
    if isinstance(found, str):
        return Interpolated(found, source)
    if isinstance(found, list):
        found = InterpolatedList(found)
        found.source = source
    return found


# -- showing and storing -----------------------------------------------------------------------------------------------


def shown(config: Any) -> dict[str, Any]:
    """A configuration as plain values that may be shown and stored: secrets masked, interpolations unresolved.

    What it gives can be read back by :func:`read_structured` with ``stored=True``: interpolations are resolved anew.
    This is the one way to turn a configuration into something that leaves the process; ``dataclasses.asdict`` is not.
    """
    found: dict[str, Any] = _masked(_sources(config, escape=True))
    return found


def complete(config: Any) -> dict[str, Any]:
    """A configuration as plain values, interpolations unresolved, **secrets included**: only for another process of the
    same run, through a file that nobody else can read."""
    found: dict[str, Any] = _sources(config, escape=True)
    return found


def to_yaml(values: Mapping[str, Any]) -> str:
    """YAML of plain values that :func:`read_yaml` and any other reader take for the same."""
    return dump_yaml(values)


def _sources(value: Any, *, escape: bool) -> Any:
    """Plain values, with ``${…}`` in place of what interpolations were resolved to."""
    if isinstance(value, Interpolated):
        return value.source
    if isinstance(value, InterpolatedList) and value.source:
        return value.source
    if dataclasses.is_dataclass(value):
        return {entry.name: _sources(getattr(value, entry.name), escape=escape) for entry in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(name): _sources(item, escape=escape) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_sources(item, escape=escape) for item in value]
    if isinstance(value, str):
        # Text that only looks like an interpolation: it was never read from a file.
        return re.sub(r"(\\*)\$\{", r"\1\1\\${", value) if escape and "${" in value else str(value)
    return value if value is None or isinstance(value, bool | int | float) else str(value)


def _masked(value: Any, key: str = "") -> Any:
    if isinstance(value, Mapping):
        return {name: _masked(item, str(name)) for name, item in value.items()}
    if isinstance(value, list):
        return [_masked(item, key) for item in value]
    if isinstance(value, str) and "${" in value:
        if is_secret_key(key):
            return value if _PURE.fullmatch(value) else MASK
        return _mask_around(value)
    return mask_tree(value, key)


def _mask_around(source: str) -> str:
    """Text with its secrets masked, in which an interpolation that stands for a whole secret stays: it is none."""
    kept: list[str] = []

    def hide(match: re.Match[str]) -> str:
        kept.append(match[0])
        return f"{_MARK}{len(kept) - 1}{_MARK}"

    def user(match: re.Match[str]) -> str:
        name, _, password = match["user"].rpartition(":")
        secret = password if name else match["user"]
        return match[0] if re.fullmatch(f"(?:{_MARK}\\d+{_MARK})+", secret) else f"{match['scheme']}{MASK}@"

    hidden = _PURE.sub(hide, source)
    hidden = re.sub(
        r"(\$\{oc\.env:\s*)([^,{}]+)(,)([^{}]*)(\})",
        lambda found: (
            found[0]
            if not is_secret_key(found[2].strip()) or found[4].strip() in ("null", "")
            else f"{found[1]}{found[2]}{found[3]}'{MASK}'{found[5]}"
        ),
        hidden,
    )
    hidden = re.sub(r"(?P<scheme>\b[A-Za-z][A-Za-z0-9+.-]*://)(?P<user>[^/\s@?#'\"]*)@", user, hidden)
    if "://" in hidden:
        hidden = re.sub(
            r"([?&;][A-Za-z0-9_.%-]+=)([^&;\s#'\"]*)",
            lambda found: found[0] if re.fullmatch(f"(?:{_MARK}\\d+{_MARK})+", found[2]) else f"{found[1]}{MASK}",
            hidden,
        )
    return re.sub(f"{_MARK}(\\d+){_MARK}", lambda found: kept[int(found[1])], hidden)


# -- keys --------------------------------------------------------------------------------------------------------------


def suggest(name: str, known: Sequence[str] | Any) -> str:
    """``" (did you mean 'x'?)"`` for the nearest known name, or an empty string."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" (did you mean {near[0]!r}?)" if near else ""


def _check_keys(values: Any, schema: type, prefix: tuple[str, ...], root: type) -> None:
    """Raise for the first key of ``values`` that ``schema`` does not know, with the nearest one that it does, or that
    another section of ``root`` does."""
    if not isinstance(values, Mapping):
        given = dataclasses.is_dataclass(values) and not isinstance(values, Scalar)
        if given or values == Scalar("") or _is_interpolation(values):
            return
        raise ConfigError(
            f"{'.'.join(prefix)} is a section with keys {', '.join(_names(schema))}; got the value {_brief(values)}"
        )
    hints = _hints(schema)
    for key, value in values.items():
        path = (*prefix, str(key))
        if key not in hints:
            raise ConfigError(f"unknown key {'.'.join(path)!r}{_suggest_key(str(key), schema, prefix, root)}")
        kind, _, optional, _ = _plain_kind(hints[key])
        if optional and (value is None or (isinstance(value, Scalar) and value.is_null)):
            continue
        if dataclasses.is_dataclass(kind):
            _check_keys(value, kind, path, root)  # type: ignore[arg-type]
        elif get_origin(kind) is dict and isinstance(value, Mapping):
            item = _plain_kind(get_args(kind)[1])[0]
            if dataclasses.is_dataclass(item):
                for name, entry in value.items():
                    _check_keys(entry, item, (*path, str(name)), root)  # type: ignore[arg-type]


def _suggest_key(key: str, schema: type, prefix: tuple[str, ...], root: type) -> str:
    """Nearest key of this section; failing that, the same key in another section."""
    here = difflib.get_close_matches(key, _names(schema), n=1, cutoff=0.6)
    if here:
        return f" (did you mean {'.'.join((*prefix, here[0]))!r}?)"
    elsewhere = [path for path in _all_paths(root) if path.rsplit(".", 1)[-1] == key]
    if elsewhere:
        return f" (did you mean {elsewhere[0]!r}?)"
    return f"; {'.'.join(prefix) or 'the top level'} has {', '.join(_names(schema))}"


def _names(schema: Any) -> list[str]:
    return [entry.name for entry in dataclasses.fields(schema)]


def _all_paths(schema: type, prefix: str = "") -> list[str]:
    paths = []
    kind: Any
    for name, kind in _hints(schema).items():
        paths.append(prefix + name)
        if isinstance(kind, type) and dataclasses.is_dataclass(kind):
            paths += _all_paths(kind, f"{prefix}{name}.")
    return paths
