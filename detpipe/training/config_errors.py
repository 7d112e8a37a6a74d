"""What an error of the configuration parser means, in one line: the key, what was expected, what came.

jsonargparse reports an error once at each level of nesting, as text that holds the text of the level below, and lists
for a type such as ``Augment | None`` why each alternative was refused. Each level is explained here as ``KEY: TEXT``, so
that the keys of the levels join to a path: ``model.backbone.depth: expected a whole number, got 'abc'``.
"""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Iterable
from typing import Any, NamedTuple, get_args

from jsonargparse import ArgumentParser

from detpipe.support.suggest import did_you_mean
from detpipe.training.allowed import may_be_named, paths_of, runs_code

_LONGEST = 600
_SIGNATURES = {  # of stages, whose place other modules may take
    "ProposalSource": ", whose forward takes (images, features, targets)",
    "RoIHead": ", whose forward takes (features, proposals, image_sizes, targets)",
}
_KINDS = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "text",
    "list": "a list",
    "tuple": "a list",
    "dict": "keys with values",
    "NoneType": "null",
}
_UNION = re.compile(
    r"Does not validate against any of the Union subtypes\s+Subtypes:.*?\n\s*Errors:\n(?P<errors>.*?)"
    r"\nGiven value type:.*?\nGiven value: (?P<given>.*)",
    re.DOTALL,
)
_LEVEL = re.compile(r'Parser key "(?P<key>[\w.]+)"(?: element \d+)?:(?P<rest>.*)', re.DOTALL)
_OWN = re.compile(r"(?P<key>[A-Za-z_][\w.]*): (?P<rest>.*)", re.DOTALL)
_NO_PATH = re.compile(r"- Expected a path but .*? either not accessible or invalid\n- ", re.DOTALL)
_UNKNOWN = re.compile(
    r"(?:Group '(?P<group>[\w.]+)' does not accept option|Option) '(?P<key>[^']+)'(?: is not accepted)?"
)
_HELP = re.compile(r"--(?P<key>[\w.]+)\.help: (?P<rest>.*)", re.DOTALL)
_MISSING = re.compile(r"the following arguments are required: (?P<keys>.*)")
_CLASS = re.compile(
    r"Expected a dot import path string: (?P<short>.*)|Problem with given class_path '(?P<full>[^']*)':\s*(?P<why>.*)"
    r"|Import path (?P<other>\S+) does not correspond to a subclass of (?P<base>\w+)",
    re.DOTALL,
)
_DENIED = re.compile(r"Importing '(?P<name>\S+)' is not allowed, denied by ")
_NO_CLASS = re.compile(
    r"(?:Not a valid subclass of|Expected an instantiatable class, but [\w.]*\.)\s?(?P<base>\w+)"
    r"(?: is abstract|\.?(?: Got value: (?P<given>.*?))?\s*\nSubclass types.*)",
    re.DOTALL,
)
_KIND = re.compile(r"Expected a (?P<kind>.+?)(?:\. Got value: (?P<given>.*))?", re.DOTALL)


class _Told(NamedTuple):
    key: str
    text: str


def explain(message: str, parser: ArgumentParser | None = None) -> str:
    """Say what an error of the parser, often of many lines, means in one: ``KEY: TEXT`` where it belongs to a key."""
    told = _explain(message, parser, "")
    line = " ".join((f"{told.key}: {told.text}" if told.key else told.text).split())
    return line if len(line) <= _LONGEST else f"{line[: _LONGEST - 4]} ..."


def _explain(message: str, parser: ArgumentParser | None, at: str) -> _Told:
    text = _NO_PATH.sub("", textwrap.dedent(message.strip("\n")).strip(), count=1)
    if match := _LEVEL.fullmatch(text):
        told = _explain(match["rest"], parser, match["key"])
        if match["key"] == "config":
            return told
        inner = "" if told.key == match["key"] else told.key  # a level may name its key again in its text
        return _Told(f"{match['key']}.{inner}".rstrip("."), told.text)
    if match := _DENIED.search(text):
        return _Told("", _not_allowed(match["name"], parser, at))
    if match := _UNION.fullmatch(text):
        return _of_alternatives(match["errors"], match["given"], parser, at)
    if text.startswith("unrecognized arguments: "):
        return _unrecognized(text.removeprefix("unrecognized arguments: ").split(), parser)
    if match := _UNKNOWN.fullmatch(text):
        return _unknown(f"{match['group']}.{match['key']}" if match["group"] else match["key"], parser)
    if match := _HELP.fullmatch(text):
        return _Told(f"--{match['key']}.help", _explain(match["rest"], parser, match["key"]).text)
    if match := _MISSING.fullmatch(text):
        first, *others = match["keys"].split(", ")
        also = f", and so {'is' if len(others) == 1 else 'are'} {', '.join(others)}" if others else ""
        return _Told(first, f"missing{also}; give it in a configuration file or as an option")
    if match := _CLASS.fullmatch(text):
        return _Told("", _wrong_class(match, parser, at))
    if match := _NO_CLASS.fullmatch(text):
        return _Told("", f"expected class_path (and init_args) of a {match['base']}{_got(match['given'])}")
    if match := re.fullmatch(r"Unable to load config (?P<given>.*?)(?:\n.*)?", text, re.DOTALL):
        return _Told("", f"expected keys with values, got {match['given']}")
    if match := re.fullmatch(r"argument --(?P<key>[\w.]+): expected one argument", text):
        return _Told(match["key"], "the option needs a value after it")
    if match := _KIND.fullmatch(text):
        return _Told("", f"expected {_kind(match['kind'])}{_got(match['given'])}{_near(match['kind'], match['given'])}")
    if match := _OWN.fullmatch(text):
        return _Told(match["key"], match["rest"])
    return _Told("", text)


def _of_alternatives(errors: str, given: str, parser: ArgumentParser | None, at: str) -> _Told:
    """Of the alternatives of a type, tell the one that says more than its name; else list them."""
    items = re.split(r"^- ", textwrap.dedent(errors), flags=re.MULTILINE)
    items = [textwrap.dedent(f"  {item}").strip() for item in items if item.strip()]
    kinds = [match["kind"] for item in items if (match := _KIND.fullmatch(item)) and not _CLASS.fullmatch(item)]
    telling = [item for item in items if not _KIND.fullmatch(item) or _CLASS.fullmatch(item)]
    if telling:
        specific = [item for item in telling if not _NO_CLASS.fullmatch(item)]
        return _explain(f"{(specific or telling)[0]}", parser, at)
    names = [_kind(kind) for kind in kinds]
    return _Told("", f"expected {' or '.join(dict.fromkeys(names))}{_got(given)}{_near(' '.join(kinds), given)}")


def _unrecognized(arguments: list[str], parser: ArgumentParser | None) -> _Told:
    first = arguments[0]
    if first.startswith("-"):
        return _unknown(first.lstrip("-").partition("=")[0], parser)
    if first.endswith((".yaml", ".yml")):
        return _Told(
            "", f"configuration {first} stands after an option; give the configurations first, then the options"
        )
    return _Told("", f"unexpected argument {first!r}; options start with --")


def _unknown(key: str, parser: ArgumentParser | None) -> _Told:
    """Find the first part of a key that does not exist, and what it could have been."""
    known = [] if parser is None else [str(action.dest) for action in parser._actions if action.dest != "help"]
    parts = key.split(".")
    for depth, part in enumerate(parts):
        before = "".join(f"{parent}." for parent in parts[:depth])
        beside = sorted({name.removeprefix(before).partition(".")[0] for name in known if name.startswith(before)})
        if part not in beside:
            near = did_you_mean(part, beside)
            listed = f"; expected {_list(beside)}" if not near and 0 < len(beside) <= 12 else ""
            return _Told(".".join(parts[: depth + 1]), f"unknown key{near}{listed}")
    return _Told(key, "unknown key")


def _wrong_class(match: re.Match[str], parser: ArgumentParser | None, at: str) -> str:
    name = (match["short"] or match["full"] or match["other"]).strip()
    known = sorted(_subclass_names(parser, at))
    near = did_you_mean(name.rpartition(".")[2], known)
    if match["other"]:
        what = f"{name!r} is not a {match['base']}{_SIGNATURES.get(match['base'], '')}"
    elif match["full"]:
        what = f"class {name!r} cannot be used ({match['why'].strip()})"
    else:
        what = f"unknown class {name!r}"
    return f"{what}{near or (f'; expected {_list(known)}, or the full path of a class' if known else '')}"


def _not_allowed(name: str, parser: ArgumentParser | None, at: str) -> str:
    if runs_code(name):
        return f"class {name!r} is not allowed, since a configuration must not run code"
    package, _, rest = name.partition(".")
    last = name.rpartition(".")[2]
    if last in {base.__name__ for base in _bases(parser, at)}:  # what an option below it made of no class
        return f"expected class_path (and init_args) of a {last}"
    near = f"; it is {' or '.join(paths_of(last))}" if package == "detpipe" and paths_of(last) else ""
    if package == "detpipe" and not near:
        near = did_you_mean(last, sorted(_subclass_names(parser, at)))
    trust = f"; if you trust its code, give --trust {name.rpartition('.')[0]}" if rest and not near else ""
    return f"class {name!r} is not one of detpipe's{near or trust}"


def _subclass_names(parser: ArgumentParser | None, key: str) -> set[str]:
    """The short names that a key accepts as class."""
    return {name for base in _bases(parser, key) for name in _below(base)}


def _bases(parser: ArgumentParser | None, key: str) -> list[type]:
    """The classes of which a key takes subclasses."""
    actions = [] if parser is None else [action for action in parser._actions if action.dest == key]
    return [base for action in actions[:1] for base in _classes(getattr(action, "_typehint", None))]


def _classes(hint: Any) -> Iterable[type]:
    if inspect.isclass(hint) and not get_args(hint):
        return [] if hint is type(None) else [hint]
    return [found for part in get_args(hint) for found in _classes(part)]


def _below(base: type) -> set[str]:
    known = not inspect.isabstract(base) and may_be_named(f"{base.__module__}.{base.__qualname__}")
    names = {base.__name__} if known else set()
    return names.union(*(_below(other) for other in base.__subclasses__())) if base is not type else names


def _kind(kind: str) -> str:
    kind = kind.strip()
    if match := re.fullmatch(r"(?:typing\.)?Literal\[(.*)\]", kind):
        return match[1].replace(", ", " or ")
    name = re.sub(r"<class '([\w.]+)'>", r"\1", kind).rpartition(".")[2]
    return _KINDS.get(name, name)


def _near(kind: str, given: str | None) -> str:
    return did_you_mean((given or "").strip(), re.findall(r"'(\w[^']*)'", re.sub(r"<class '[^']*'>", "", kind)))


def _got(given: str | None) -> str:
    """The value, unless it is a parser's own wrapping of all that was given."""
    if given is None:
        return ""
    match = re.fullmatch(r"NestedArg\(key='.*', val='?(.*?)'?\)", given.strip())
    value = match[1] if match else given.strip()
    return f", got {value if len(value) <= 80 else value[:77] + '...'}"


def _list(names: Iterable[str]) -> str:
    return ", ".join(names)
