"""Optional packages, which extras of the installation bring."""

import importlib
import importlib.util
from types import ModuleType


def require(module: str, extra: str) -> ModuleType:
    """Import an optional package.

    Raises:
        ImportError: the package is not installed; names the extra that brings it.
    """
    if importlib.util.find_spec(module.partition(".")[0]) is None:
        raise ImportError(f"this needs {module}, which is not installed: pip install 'ssmgen[{extra}]'")
    return importlib.import_module(module)
