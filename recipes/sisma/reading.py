"""Configuration and record files as plain values: nothing in them is expanded, looked up or executed.

Anything else, such as ``${...}``, aliases and tags of YAML, is an error that names the file and the key.
"""

from pathlib import Path
from typing import Any

from ssmgen import reading
from ssmgen.extras import require

_LARGEST = 100_000  # bytes of a YAML file; those of runs have some 2,000
_DEEPEST = 12


class UsageError(ValueError):
    """An invalid command line or configuration."""


def read_yaml(file: Path) -> tuple[dict[str, Any], str]:
    """The mapping in a YAML file, whose scalars other than null are their text, and the whole text.

    Raises:
        FileNotFoundError: no such file.
        UsageError: not a mapping in UTF-8 from names to plain values; names the file, and the key if it is known.
    """
    with file.open("rb") as stream:
        content = stream.read(_LARGEST + 1)
    if len(content) > _LARGEST:
        raise UsageError(f"{file}: is larger than {_LARGEST:,} bytes; this is no configuration")
    try:
        text = content.decode("utf-8-sig")  # editors on Windows may add a byte-order mark
    except UnicodeDecodeError as error:
        raise UsageError(f"{file}: is not text in UTF-8 ({error})") from error
    value = parse_yaml(text, str(file))
    if not isinstance(value, dict):
        found = "is empty" if value is None else f"holds {'a list' if isinstance(value, list) else 'one value'}"
        raise UsageError(f"{file}: {found}, expected lines of key: value")
    return value, text


def parse_yaml(text: str, where: str) -> Any:
    """The value of a YAML text, as in `read_yaml`; errors begin with ``where``."""
    yaml = require("yaml", extra="train")
    try:
        depth = 0
        for event in yaml.parse(text, Loader=yaml.SafeLoader):  # before anything recursive: it may be deep
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > _DEEPEST:
                raise UsageError(f"{where}: is nested more than {_DEEPEST} deep")
            if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
                raise UsageError(f"{where}: has an anchor or alias; write the value itself")
            if getattr(event, "tag", None) is not None:
                raise UsageError(f"{where}: has the tag {event.tag}; write the value without it")
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except (yaml.YAMLError, ValueError) as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(f"{where}: is not valid YAML ({' '.join(str(error).split())})") from error
    return None if root is None else _plain(root, where, "", yaml)


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not a regular file, or holds no JSON object; names the file.
    """
    content = reading.read_json(file)
    if not isinstance(content, dict):
        raise ValueError(f"{file}: holds {type(content).__name__}, expected a JSON object")
    return content


def reject_expansion(text: str, where: str) -> None:
    """Reject ``${...}``, which OmegaConf would replace by other settings or by variables of the environment."""
    if "${" in text:
        raise UsageError(f"{where}: ${{...}} is not expanded here; write the value itself")


def _plain(node: Any, where: str, key: str, yaml: Any) -> Any:
    here = f"{where}: {key}" if key else where
    if isinstance(node, yaml.SequenceNode):
        return [_plain(child, where, f"{key}[{index}]", yaml) for index, child in enumerate(node.value)]
    if isinstance(node, yaml.ScalarNode):
        reject_expansion(node.value, here)
        return None if node.tag.endswith(":null") and not node.style else node.value
    values: dict[str, Any] = {}
    for name, child in node.value:
        if not isinstance(name, yaml.ScalarNode) or name.tag != "tag:yaml.org,2002:str":
            raise UsageError(f"{here}: line {name.start_mark.line + 1} has a key that is no name")
        reject_expansion(name.value, f"{where}: {name.value}")
        if name.value in values:
            raise UsageError(f"{here}: {name.value} is set twice")
        values[name.value] = _plain(child, where, f"{key}.{name.value}" if key else name.value, yaml)
    return values
