"""Options under a pydantic schema: read from YAML and the command line, explained in a help and in one-line messages.

`Schema(Config)` knows every key by its dotted path; a `Reader` fills it. Nothing here knows what the keys mean.
"""

from __future__ import annotations

import argparse
import difflib
import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Literal, NoReturn, TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic.fields import FieldInfo
from yaml.composer import ComposerError

MAX_FILE_BYTES = 65536  # PyYAML reads about 100 kB a second, and a mistake has to be answered within two

# Of numbers without a limit of their own: what follows from a whole one has to fit 64 bits, from another one fp32.
MOST = {"int": 10**15, "float": 1e30}


class UserError(Exception):
    """Something the user can mend. The programs print it as one line and exit with code 2."""


# Keys and flags that would hold a secret, and what is said of them. A number is none: it is a mistyped `tokens`.
_SECRET_NAME = re.compile(r"(?:.*[._-])?(?:tokens?|api_?key|secret|passw(?:or)?d|credentials?)", re.IGNORECASE)
NO_SECRETS = "a token or password belongs in the environment (HF_TOKEN=...) or in .env, never here"


def _is_secret(name: str, value: str = "") -> bool:
    return bool(_SECRET_NAME.fullmatch(name)) and not re.fullmatch(r"'?[-+.\d_eE]+'?", value)


class Parser(argparse.ArgumentParser):
    """A mistake on the command line is a `UserError`: one line, with the nearest flag where one is unknown."""

    def error(self, message: str) -> NoReturn:
        unknown = re.match(r"unrecognized arguments: (--[^ =]+)", message)
        if unknown and _is_secret(unknown[1]):
            raise UserError(f"{unknown[1]}: no such option; {NO_SECRETS}")
        near = difflib.get_close_matches(unknown[1], self._option_string_actions, n=1, cutoff=0.7) if unknown else []
        hint = f"; did you mean {near[0]}?" if near else " (see --help)"
        if unknown and not near and any(action.dest == "overrides" for action in self._actions):
            hint = "; keys are given as section.key=value (see --help)"
        raise UserError(message.replace("\n", "\\n") + hint)


class Section(BaseModel):
    """A frozen group of keys; its docstring's first line is its help."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())


Root = TypeVar("Root", bound=Section)


def shown(value: object) -> str:
    """A value on one line, short, with control characters escaped."""
    text = json.dumps(value) if value is None or isinstance(value, bool) else repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."


def plain(name: str) -> str:
    """A key or file name as it is, or escaped if it cannot be printed."""
    return name if name.isprintable() and len(name) <= 200 else shown(name)


# --- the schema: what a key is, for the help and for messages ---


def _keys(section: type[Section], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    for name, field in section.model_fields.items():
        yield prefix + name, field
        for inner in (field.annotation, *get_args(field.annotation)):
            if isinstance(inner, type) and issubclass(inner, Section):
                yield from _keys(inner, f"{prefix}{name}[]." if _kind(field)[0] is not inner else f"{prefix}{name}.")


def _kind(field: FieldInfo) -> tuple[Any, bool]:
    """The type without None, and whether None is allowed."""
    members = get_args(field.annotation)
    return (members[0], True) if type(None) in members else (field.annotation, False)


def _limited(field: FieldInfo) -> bool:
    return any(hasattr(limit, name) for limit in field.metadata for name in ("le", "lt"))


def _general(key: str) -> str:
    """The path in the schema of a key of a file: `sources[0].path` -> `sources[].path`."""
    return re.sub(r"\[\d+\]", "[]", key)


def _edits(a: str, b: str) -> int:
    """Characters inserted, dropped, replaced or exchanged with their neighbour to turn `a` into `b`."""
    rows = [list(range(len(b) + 1))]
    for i, char in enumerate(a, 1):
        row = [i]
        for j, other in enumerate(b, 1):
            row.append(min(rows[-1][j] + 1, row[-1] + 1, rows[-1][j - 1] + (char != other)))
            if i > 1 and j > 1 and (char, a[i - 2]) == (b[j - 2], other):
                row[-1] = min(row[-1], rows[-2][j - 2] + 1)
        rows.append(row)
    return rows[-1][-1]


def _abbreviates(short: str, name: str) -> bool:
    """Whether each word of `short`, in order, begins one of `name`: n_experts is short for num_experts_per_tok."""
    words = iter(name.split("_"))
    return all(any(own.startswith("n" if word == "num" else word) for own in words) for word in short.split("_"))


@dataclass(frozen=True)
class NullWord:
    """Annotates a key that may be null: another word for it."""

    text: str


class Schema(Generic[Root]):
    """The keys of a tree of sections: `keys` has all paths, sections too; `sources[].path` is one of a list's items."""

    def __init__(self, root: type[Root]) -> None:
        self.root = root
        self.sections = list(root.model_fields)
        self.keys = dict(_keys(root))
        self._parents = {key.rpartition(".")[0] for key in self.keys}

    def holds_keys(self, key: str) -> bool:
        """Whether `key` ("" is the root) is a mapping with keys of this schema."""
        return _general(key) in self._parents

    def takes_text(self, key: str, text: str) -> bool:
        """Whether a plain scalar is text as written: `run.name=007`, `revision: 12e4567` and `*.txt` need no quotes."""
        field = self.keys.get(_general(key).removesuffix("[]"))
        if field is None or text in ("~", "null", "Null", "NULL"):
            return False
        kind, nullable = _kind(field)
        return (kind is str or get_origin(kind) is tuple) and bool(text or not nullable)

    def allowed(self, key: str) -> str:
        """What a key takes, in words: `an integer >= 1, or null`."""
        field = self.keys[_general(key).removesuffix("[]")]
        kind, nullable = _kind(field)
        words: dict[Any, str] = {int: "an integer", float: "a number", bool: "true or false", str: "text"}
        if get_origin(kind) is Literal:
            what = "one of " + ", ".join(get_args(kind))
        elif get_origin(kind) is tuple and get_args(kind)[0] is str:
            what = "text or a list of texts"
        elif get_origin(kind) is tuple:
            what = f"text, or a list of texts and of mappings with the keys {', '.join(get_args(kind)[0].model_fields)}"
        else:
            what = words.get(kind) or "a mapping with the keys " + ", ".join(kind.model_fields)
        signs = {"ge": ">= {}", "gt": "> {}", "le": "<= {}", "lt": "< {}", "multiple_of": "a multiple of {}"}
        limits = [sign.format(getattr(m, s)) for s, sign in signs.items() for m in field.metadata if hasattr(m, s)]
        filled = ", not empty" if any(hasattr(m, "min_length") for m in field.metadata) else ""
        word = "".join(f", {m.text}" for m in field.metadata if isinstance(m, NullWord))
        return f"{what} {' and '.join(limits)}".rstrip() + filled + word + (", or null" if nullable else "")

    def describe(self) -> str:
        """Every key with its default, meaning and what is allowed."""
        lines = []
        for key, field in self.keys.items():
            if key in self.sections:
                lines.append(f"\n{key}: {(_kind(field)[0].__doc__ or '').splitlines()[0]}")
                continue
            value = field.default
            if isinstance(value, tuple):
                value = [
                    item.model_dump(exclude_defaults=True) if isinstance(item, Section) else item for item in value
                ]
            default = "" if field.is_required() else f" = {json.dumps(value)}"
            lines.append(f"  {key}{default}\n      {field.description} ({self.allowed(key)})")
        return "\n".join(lines).lstrip()

    def nearest(self, typed: str) -> list[str]:
        """The keys nearest to a mistyped one: by the path, by the name in another section, by words in its own."""
        typed = _general(typed)[:100]
        parent, dot, leaf = typed.rpartition(".")
        costs = {}
        best: float = len(typed)
        for key in self.keys:
            name, aside = key.rpartition(".")[2], 2 if dot else 0.5
            least = min(abs(len(typed) - len(key)), aside + abs(len(leaf) - len(name)))
            if least <= best and (not dot or "." in key):
                costs[key] = min(_edits(typed, key), aside + _edits(leaf, name))
                best = min(best, costs[key])
        own = [key for key in self.keys if dot and key.rpartition(".")[0] == parent]
        by_words = [key for key in own if _abbreviates(leaf, key.rpartition(".")[2])]
        if by_words and best >= 2:
            return by_words[:4]
        if best <= 2 + len(leaf) // 4:
            return [key for key in costs if costs[key] == best][:4]
        return difflib.get_close_matches(typed, own, 1, 0.75)

    def unknown(self, key: str, value: str, where: str) -> UserError:
        if _is_secret(key, value):
            return UserError(f"{where}: unknown key {plain(key)}; {NO_SECRETS}")
        nearest = self.nearest(key)
        parent = _general(key).rpartition(".")[0]
        if len(nearest) == 1:
            hint = f"did you mean {nearest[0]}? It is {self.allowed(nearest[0])}"
        elif nearest:
            hint = f"did you mean {', '.join(nearest[:-1])} or {nearest[-1]}?"
        elif parent in self._parents and parent:
            hint = f"valid keys are {', '.join(name for name in self.keys if name.rpartition('.')[0] == parent)}"
        else:
            hint = f"valid sections are {', '.join(self.sections)}"
        return UserError(f"{where}: unknown key {plain(key)} = {value}; {hint}")


# --- YAML ---


class _Loader(yaml.SafeLoader):
    """YAML whose plain words are read as in YAML 1.2: 1e-3 is a number; yes, on and dates are text."""

    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        mark = self.peek_event().start_mark
        if self.check_event(yaml.AliasEvent):  # a few nested aliases can stand for billions of values
            raise ComposerError(None, None, "aliases (*name) are not supported", mark)
        if self.depth > 16:
            raise ComposerError(None, None, "it is nested too deeply", mark)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


class _Dumper(yaml.SafeDumper):
    """Quotes the texts that _Loader or another YAML reader would take for something else."""


_SCALARS: dict[str, tuple[str, str, Callable[[str], Any]]] = {  # tag: plain form, first characters, reading
    "null": (r"|~|null|Null|NULL", "~nN", lambda text: None),
    "bool": (r"true|True|TRUE|false|False|FALSE", "tTfF", lambda text: text.lower() == "true"),
    "int": (r"[-+]?\d+(_\d+)*", "-+0123456789", int),
    "float": (
        r"[-+]?(\.\d+|\d+(_\d+)*(\.\d*)?)([eE][-+]?\d+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+.0123456789",
        lambda text: float(re.sub(r"\.(?=[in])", "", text.lower())),
    ),
}
_Loader.yaml_implicit_resolvers = {}
for _tag, (_form, _first, _) in _SCALARS.items():
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"(?:{_form})$"), [*_first, ""])


def dump(section: Section) -> str:
    """Every key as YAML, in the order of the schema."""
    return yaml.dump(section.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1000)


# --- reading ---


class Reader(Generic[Root]):
    """Collects a YAML file and overrides in `tree`, checks their keys, and remembers where each was set."""

    def __init__(self, schema: Schema[Root], path: Path, name: str) -> None:
        self.schema = schema
        self.name = plain(name)
        self.origins: dict[str, str] = {}
        tree = self._parse(self._read(path), "", self.name)
        if tree is None:
            raise UserError(f"{self.name}: is empty; for the defaults leave out --config, or write {{}}")
        if not isinstance(tree, dict):
            raise UserError(f"{self.name}: holds {shown(tree)} in place of sections ({', '.join(schema.sections)})")
        self.tree: dict[str, Any] = {key: value for key, value in tree.items() if value is not None}

    def _read(self, path: Path) -> str:
        try:
            with path.open("rb") as stream:
                raw = stream.read(MAX_FILE_BYTES + 1)
            if len(raw) > MAX_FILE_BYTES:
                raise UserError(f"{self.name}: is larger than {MAX_FILE_BYTES} bytes, too large for a configuration")
            return raw.decode("utf-8-sig")
        except OSError as error:
            raise UserError(f"{self.name}: cannot be read ({error.strerror})") from None
        except UnicodeDecodeError as error:
            raise UserError(f"{self.name}: is not UTF-8 text (byte {error.start})") from None

    def override(self, argument: str) -> None:
        """Take one `section.key=value` of the command line; the value is YAML."""
        where, keys = "command line", self.schema.keys
        key, equals, text = argument.partition("=")
        key = key.strip()
        given = f"{where}: {plain(key)} = {shown(text)}"
        if not equals or not key:
            form = f"{key}=VALUE" if key in keys else "section.key=value, such as train.steps=100"
            raise UserError(f"{where}: {shown(argument)} must have the form {form}")
        if key in self.schema.sections:
            raise UserError(f"{given}: {key} is a section; set one of its keys, as {key}.KEY=VALUE")
        if key not in keys and _is_secret(key, text):
            raise self.schema.unknown(key, shown(text), where)
        whole = next((k for k in keys if key.startswith((f"{k}.", f"{k}[")) and not self.schema.holds_keys(k)), None)
        if whole:
            raise UserError(f"{given}: set {whole} as a whole; it is {self.schema.allowed(whole)}")
        if key not in keys:
            raise self.schema.unknown(key, shown(text), where)
        self.origins[key] = where
        as_written = self.schema.takes_text(key, text) and text[:1] not in ("[", "{", '"', "'")
        value = self._text(text, key, where) if as_written else self._parse(text, key, where)
        *parents, last = key.split(".")
        target = self.tree
        for parent in parents:
            if not isinstance(target.get(parent), dict):
                target[parent] = {}
            target = target[parent]
        target[last] = value

    def _parse(self, text: str, key: str, where: str) -> Any:
        """A YAML document as the value of `key`; of the whole tree if that is empty."""
        given = f"{key} = {shown(text)} " if key else ""
        try:
            node = _Loader(text).get_single_node()
            return None if node is None else self._value(node, key, where)
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            line = f":{mark.line + 1}" if mark and not key else ""
            raise UserError(f"{where}{line}: {given}is not valid YAML: {plain(str(error.problem))}") from None
        except yaml.YAMLError as error:
            problem = getattr(error, "reason", "unreadable")
            raise UserError(f"{where}: {given}is not valid YAML: {plain(str(problem))}") from None

    def _spot(self, node: yaml.Node, where: str) -> str:
        return f"{where}:{node.start_mark.line + 1}" if where == self.name else where

    def _value(self, node: yaml.Node, key: str, where: str) -> Any:
        spot = self._spot(node, where)
        tag = node.tag.removeprefix("tag:yaml.org,2002:")
        if isinstance(node, yaml.CollectionNode) and tag not in ("map", "seq"):
            raise UserError(f"{spot}: {plain(key)} has the tag {plain(node.tag)}; tags are not supported")
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, f"{key}[0]" if self.schema.holds_keys(f"{key}[]") else key, where)
        if isinstance(node, yaml.SequenceNode):
            return [self._value(item, f"{key}[{i}]", where) for i, item in enumerate(node.value)]
        if tag == "str" or (tag in _SCALARS and self.schema.takes_text(key, node.value)):
            return self._text(node.value, key, spot)
        try:
            value = _SCALARS[tag][2](node.value)
            field = self.schema.keys.get(_general(key))
            if field is not None and tag in MOST and MOST[tag] < abs(value) < math.inf and not _limited(field):
                raise UserError(
                    f"{spot}: {plain(key)} = {shown(value)} must be {self.schema.allowed(key)}, and at most {MOST[tag]}"
                )
            return value
        except KeyError:
            raise UserError(
                f"{spot}: {plain(key)} = {shown(node.value)} has the tag {plain(node.tag)}; tags are not supported"
            ) from None
        except ValueError:  # more than 4300 digits, or `!!int abc`
            raise UserError(f"{spot}: {plain(key)} = {shown(node.value)} is not a number one can read") from None

    def _mapping(self, node: yaml.MappingNode, key: str, where: str) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for name_node, value_node in node.value:
            spot, name = self._spot(name_node, where), name_node.value
            if not isinstance(name, str):
                raise UserError(f"{spot}: a key must be a word, not a list or a mapping")
            child = f"{key}.{name}" if key else name
            if name in values:
                raise UserError(f"{spot}: {plain(child)} is given twice; the first is at {self.origins[child]}")
            if self.schema.holds_keys(key) and _general(child) not in self.schema.keys:
                value = shown(value_node.value) if isinstance(value_node.value, str) else "..."
                raise self.schema.unknown(child, value, spot)
            self.origins[child] = spot
            values[name] = self._value(value_node, child, where)
        return values

    @staticmethod
    def _text(text: str, key: str, where: str) -> str:
        if "\0" in text or any("\ud800" <= char <= "\udfff" for char in text):
            raise UserError(f"{where}: {plain(key)} = {shown(text)} holds a character that no text can have")
        return text

    def origin(self, key: str) -> str:
        """Where the value of a key, or of what holds it, was given."""
        while key and key not in self.origins:
            key = key[: max(key.rfind("."), key.rfind("["), 0)]
        return self.origins.get(key, self.name)

    def validate(self) -> Root:
        """The checked options. Raises UserError for the first mistake."""
        try:
            # As JSON, strict: no "12" or 1.0 for an integer, no 1 for true, and still lists for tuples.
            return self.schema.root.model_validate_json(json.dumps(self.tree), strict=True)
        except ValidationError as failure:
            error = failure.errors()[0]
        key = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in error["loc"]).lstrip(".")
        if error["type"] == "value_error":  # of a validator: its message names the keys
            message = str(error.get("ctx", {})["error"])
            named = [self.origins[name] for name in re.findall(r"[\w.]+", message) if name in self.origins]
            raise UserError(f"{', '.join(dict.fromkeys(named)) or self.name}: {message}")
        where, allowed = self.origin(key), self.schema.allowed(key)
        if error["type"] == "missing":
            raise UserError(f"{where}: {key} is missing; it must be {allowed}")
        if error["type"] == "finite_number":
            allowed = allowed.replace("a number", "a finite number")
        raise UserError(f"{where}: {key} = {shown(error['input'])} must be {allowed}")
