"""Read YAML of strangers: plain data only, no key twice, and no file that takes long or much memory to read.

A few hundred bytes of YAML stand for gigabytes where aliases refer to aliases, and numbers of many digits take minutes. Sizes are
therefore counted on the stream of events, with every alias as large as what it refers to, before anything is built.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from detpipe.support.errors import DetpipeError
from detpipe.support.files import refuse_special

MOST_BYTES = 2**21
MOST_NODES = 100_000  # keys and values, each alias counted in full
DEEPEST = 50
LONGEST_NUMBER = 100  # characters
_NUMBER = re.compile(r"[-+]?[.\d][-+.:_\deE]*")
LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

Visit = Callable[[str, str], None]  # dotted key and place of each entry, to refuse it


def load_yaml(path: Path, kind: type[DetpipeError], visit: Visit | None = None) -> Any:
    """Read a UTF-8 YAML file, with or without a byte order mark; ``visit`` gets the dotted key of every entry and its place.

    Raises:
        FileNotFoundError: there is no such file.
        DetpipeError: of the kind given: it is no regular file, is no UTF-8 or no YAML, has a tag or gives a key twice, or is
            larger than any such file has reason to be; file and line are named.
    """
    refuse_special(path, kind)
    if path.is_file() and path.stat().st_size > MOST_BYTES:
        raise kind(f"{path}: has {path.stat().st_size} bytes; YAML is read up to {MOST_BYTES}")
    try:
        return parse_yaml(path.read_text(encoding="utf-8-sig"), str(path), kind, visit)
    except (DetpipeError, FileNotFoundError):
        raise
    except OSError as error:
        raise kind(f"{path}: cannot be read ({error.strerror or error})") from error
    except (yaml.YAMLError, ValueError) as error:
        raise kind(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error


def parse_yaml(text: str, name: str, kind: type[DetpipeError], visit: Visit | None = None) -> Any:
    """Parse YAML that has been read already, as :func:`load_yaml` does, or raise a YAMLError; ``name`` stands in messages."""
    _check_size(text, name, kind)
    reader = LOADER(text)
    node = reader.get_single_node()
    if node is None:
        return None
    _check_node(node, name, "", kind, visit or (lambda key, where: None))
    return reader.construct_document(node)


def _check_size(text: str, name: str, kind: type[DetpipeError]) -> None:
    """Count nodes and levels, event by event."""
    sizes: dict[str, int] = {}  # of what an anchor names
    open_: list[tuple[str | None, int]] = [(None, 0)]  # anchor and nodes so far of each collection around
    if len(text) > MOST_BYTES:
        raise kind(f"{name}: has {len(text)} characters; YAML is read up to {MOST_BYTES}")
    for event in yaml.parse(text, Loader=LOADER):
        anchor, size = getattr(event, "anchor", None), 0
        if isinstance(event, yaml.AliasEvent):
            size = sizes.get(event.anchor, MOST_NODES)  # one that refers to what it stands in has no end
        elif isinstance(event, yaml.ScalarEvent):
            size = 1
        elif isinstance(event, yaml.CollectionStartEvent):
            open_.append((anchor, 1))
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, size = open_.pop()
        if anchor is not None and size and not isinstance(event, yaml.AliasEvent):
            sizes[anchor] = size
        open_[-1] = (open_[-1][0], open_[-1][1] + size)
        if len(open_) > DEEPEST or open_[-1][1] >= MOST_NODES:
            line = event.start_mark.line + 1
            raise kind(
                f"{name}, line {line}: more than {MOST_NODES} keys and values, aliases counted in full, or more than "
                f"{DEEPEST} levels; no such file needs that"
            )


def _check_node(node: yaml.Node, name: str, parent: str, kind: type[DetpipeError], visit: Visit) -> None:
    """Refuse tags, keys that are given twice, and numbers without end."""
    where = f"{name}, line {node.start_mark.line + 1}"
    if node.tag not in yaml.SafeLoader.yaml_constructors:
        raise kind(f"{where}: tags are not allowed, got {node.tag}")
    if isinstance(node, yaml.ScalarNode) and len(node.value) > LONGEST_NUMBER and _NUMBER.fullmatch(node.value):
        raise kind(f"{where}: a number of {len(node.value)} characters; a number has up to {LONGEST_NUMBER}")
    seen: set[str] = set()
    for item in () if isinstance(node, yaml.ScalarNode) else node.value:
        key, value = item if isinstance(node, yaml.MappingNode) else (None, item)
        inner = parent
        if key is not None:
            where = f"{name}, line {key.start_mark.line + 1}"
            if not isinstance(key, yaml.ScalarNode):
                raise kind(f"{where}: expected text as key, got a {key.id}")
            if key.value in seen:
                raise kind(f"{where}: key {key.value!r} is given twice; remove one")
            seen.add(key.value)
            _check_node(key, name, parent, kind, visit)
            visit(f"{parent}{key.value}", where)
            inner = f"{parent}{key.value}."
        _check_node(value, name, inner, kind, visit)
