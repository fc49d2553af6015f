"""Downloads from the Hugging Face hub."""

import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

#: ``owner/name`` of a repository.
HUB_ID = re.compile(r"\w[\w.-]*/[\w.-]+")


def hub_library() -> ModuleType:
    """huggingface_hub, without its telemetry: requests then do not name the versions and programs of this machine."""
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"  # read when it is imported, as diffusers may have done already
    import huggingface_hub
    from huggingface_hub import constants

    constants.HF_HUB_DISABLE_TELEMETRY = True
    return huggingface_hub


def local_folder(source: str) -> Path | None:
    """The folder that a source names, or None for a hub id.

    Raises:
        FileNotFoundError: neither of them.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    if path.exists() or not HUB_ID.fullmatch(source):
        raise FileNotFoundError(f"{source}: no such folder, and not a hub id of the form owner/name")
    return None


def download_file(repository: str, name: str) -> Path:
    """One file of a repository, from the local cache if it is there; raises the errors of `download_folder`."""
    try:
        return Path(hub_library().hf_hub_download(repository, name))
    except Exception as error:
        raise _failure(repository, error) from error


def download_folder(
    repository: str,
    patterns: Sequence[str],
    *,
    revision: str | None = None,
    local_files_only: bool = False,
    folder: Path | None = None,
) -> Path:
    """A copy of the files of a repository that match one of ``patterns``.

    Args:
        repository: ``owner/name``.
        patterns: shell patterns of the wanted files.
        revision: branch, tag or commit; the main branch if None.
        local_files_only: use the local cache only.
        folder: where to put the copy; in the local cache if None.

    Raises:
        FileNotFoundError: the repository does not exist, or it cannot be reached and no copy is in the local cache.
    """
    print(f"looking for {repository} on the hub, or in its local cache", file=sys.stderr)
    try:
        given: dict[str, Any] = {"revision": revision, "local_files_only": local_files_only, "local_dir": folder}
        copy = hub_library().snapshot_download(repository, allow_patterns=list(patterns), **given)
    except Exception as error:
        raise _failure(repository, error) from error
    return folder or Path(copy)


def _failure(repository: str, error: Exception) -> FileNotFoundError:
    """One error for those of the hub, the HTTP library and the file system."""
    return FileNotFoundError(f"{repository}: no such folder here, and could not be fetched from the hub: {error}")
