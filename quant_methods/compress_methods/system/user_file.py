"""Reading YAML, JSON and CSV that others write: recipes, deployments, the hardware table,
config.json, reports. One reader with limits, so that whatever stands in a file is a value or one
line."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import yaml

from compress_methods.errors import CompressError, named

YAML_BYTES, JSON_BYTES = 2**20, 2**28
MAX_DEPTH, MAX_NODES, MAX_DIGITS = 64, 100_000, 64
PLAIN_TAGS = {
    f"tag:yaml.org,2002:{n}" for n in ("null", "bool", "int", "float", "str", "seq", "map")
}
MERGE = "tag:yaml.org,2002:merge"
LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
UNREADABLE = (
    yaml.YAMLError,
    ValueError,  # numbers and their constructors, not UTF-8
    LookupError,
    AttributeError,
    TypeError,
    RecursionError,
)
"""What libraries raise for text that is not what it says."""


class _Refused(Exception):
    """What is wrong, in words; becomes the caller's error."""


def read_yaml(path: Path, error: type[CompressError]) -> Any:
    """What a YAML file holds; `error` names the file, and the key where one is at fault."""
    text = _text(path, YAML_BYTES, error)
    try:
        _check_events(text)
        loader = LOADER(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            _check_node(node)
            value = loader.construct_document(node)
        finally:
            loader.dispose()
        _check_value(value)
        return value
    except _Refused as problem:
        raise error(f"{path}: {problem}") from None
    except UNREADABLE as problem:
        raise error(f"{path}: not readable as YAML ({_reason(problem)})") from problem


def read_json_value(path: Path, error: type[CompressError]) -> Any:
    """What a JSON file holds; `error` names the file, and the key where one is at fault."""
    text = _text(path, JSON_BYTES, error)
    try:
        value = json.loads(text, parse_int=_integer)
        _check_value(value)
        return value
    except _Refused as problem:
        raise error(f"{path}: {problem}") from None
    except UNREADABLE as problem:
        raise error(f"{path}: not readable as JSON ({_reason(problem)})") from problem


def csv_rows(path: Path, error: type[CompressError]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows of a CSV file by the names in its first line, each with `file:line`; `error` where it
    cannot be read."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            for number, row in enumerate(csv.DictReader(file), 2):
                yield f"{path}:{number}", row
    except FileNotFoundError:
        raise error(f"{path}: no such file") from None
    except OSError as problem:
        raise error(named(problem, path)) from problem
    except (csv.Error, UnicodeDecodeError) as problem:
        raise error(f"{path}: not readable as CSV ({problem})") from problem


def require_path(path: str | Path, error: type[CompressError], where: str = "") -> None:
    """Raise `error` for a path that no file system or report can hold; `where` is what names it."""
    where = where and f"{where}: "
    try:
        os.fsencode(path).decode("utf-8")
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return
    except OSError as problem:
        shown = str(path) if len(str(path)) <= 80 else f"{str(path)[:80]}..."
        raise error(f"{where}{shown}: {problem.strerror}") from None
    except ValueError:
        raise error(
            f"{where}{str(path)[:80]!a}: a path with bytes that are not UTF-8 or zero"
        ) from None


def _text(path: Path, limit: int, error: type[CompressError]) -> str:
    require_path(path, error)
    try:
        if path.exists() and not path.is_file():
            raise error(f"{path}: not a file")
        with path.open("rb") as file:
            data = file.read(limit + 1)
    except FileNotFoundError:
        raise error(f"{path}: no such file") from None
    except OSError as problem:
        raise error(f"{named(problem, path)}") from problem
    if len(data) > limit:
        raise error(f"{path}: more than {limit:,} bytes, expected a file that people write")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as problem:
        raise error(f"{path}: not readable, not UTF-8 (byte {problem.start})") from None


def _reason(problem: Exception) -> str:
    if isinstance(problem, RecursionError):
        return "nested too deep"
    return " ".join(str(problem).split())[:300] or type(problem).__name__


def _integer(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise _Refused(f"a number of {len(digits)} digits, expected at most {MAX_DIGITS}")
    return int(digits)


def _check_events(text: str) -> None:
    """Refuse depth, and aliases whose values multiply, before anything is made of them."""
    sizes: dict[str, int] = {}  # nodes that an alias stands for
    open_nodes: list[tuple[str | None, int]] = []
    count = 0
    for event in yaml.parse(text, LOADER):
        if isinstance(event, yaml.AliasEvent):
            if event.anchor not in sizes:
                raise _Refused(f"*{event.anchor} stands for itself or for nothing")
            count += sizes[event.anchor]
        elif isinstance(event, yaml.CollectionStartEvent):
            count += 1
            open_nodes.append((event.anchor, count))
            sizes.pop(event.anchor or "", None)
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, began = open_nodes.pop()
            if anchor is not None:
                sizes[anchor] = count - began + 1
        elif isinstance(event, yaml.ScalarEvent):
            count += 1
            if event.anchor is not None:
                sizes[event.anchor] = 1
        if count > MAX_NODES:
            raise _Refused(f"more than {MAX_NODES:,} values, aliases included")
        if len(open_nodes) > MAX_DEPTH:
            raise _Refused(f"nested deeper than {MAX_DEPTH}")


def _check_node(root: Any) -> None:
    """Refuse values of other kinds than JSON has, and keys that are given twice."""
    left = [(root, "")]
    seen = set()
    while left:
        node, where = left.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        if node.tag not in PLAIN_TAGS and node.tag != MERGE:
            _refuse_tag(node, where)
        if isinstance(node, yaml.ScalarNode):
            if node.tag.endswith((":int", ":float")) and len(node.value) > MAX_DIGITS:
                raise _Refused(
                    f"{where or 'value'}: a number of {len(node.value)} digits, expected at most "
                    f"{MAX_DIGITS}"
                )
        elif isinstance(node, yaml.SequenceNode):
            left += [(item, f"{where}[{i}]") for i, item in enumerate(node.value)]
        else:
            left += _pairs(node, where)


def _pairs(node: Any, where: str) -> Iterator[tuple[Any, str]]:
    keys = set()
    for key, value in node.value:
        if not isinstance(key, yaml.ScalarNode):
            raise _Refused(f"line {key.start_mark.line + 1}: a key that is no plain text")
        name = f"{where}.{key.value}" if where else key.value
        if (key.tag, key.value) in keys:
            raise _Refused(f"line {key.start_mark.line + 1}: {name} is given twice")
        keys.add((key.tag, key.value))
        yield key, name
        yield value, name


def _refuse_tag(node: Any, where: str) -> NoReturn:
    kind = node.tag.rpartition(":")[2]
    what = {"timestamp": "a date; write it in quotes", "binary": "binary data"}
    raise _Refused(
        f"line {node.start_mark.line + 1}: {where or 'value'} is "
        f"{what.get(kind, f'of the kind {kind!r}')}, expected text, a number, a list or a mapping"
    )


def _check_value(root: Any) -> None:
    """Refuse depth, and text that UTF-8 cannot hold."""
    left: list[tuple[Any, str, int]] = [(root, "", 0)]
    while left:
        value, where, depth = left.pop()
        if depth > MAX_DEPTH:
            raise _Refused(f"{where[:40]}: nested deeper than {MAX_DEPTH}")
        if isinstance(value, dict):
            for key, item in value.items():
                name = f"{where}.{key}" if where else str(key)
                left += [(key, name, depth + 1), (item, name, depth + 1)]
        elif isinstance(value, list):
            left += [(item, where, depth + 1) for item in value]
        elif isinstance(value, str) and not value.isascii():
            try:
                value.encode()
            except UnicodeEncodeError:
                raise _Refused(f"{where!a}: half a character ({ascii(value)[:40]})") from None
