"""All operators with several backends, and the report of what can run."""

from typing import Any

from ssmgen.ops.dispatch import BackendStatus, Operator
from ssmgen.ops.linear_attention.gated_delta_rule import GATED_DELTA_RULE
from ssmgen.ops.local.layers import LOCAL
from ssmgen.ops.scan.selective_scan import SELECTIVE_SCAN
from ssmgen.ops.ssd.ssd import SSD
from ssmgen.registry import closest

_ALL: tuple[Operator[Any], ...] = (SELECTIVE_SCAN, SSD, GATED_DELTA_RULE, *LOCAL)
_OPERATORS = {operator.name: operator for operator in _ALL}
#: The functions of which `backends` reports.
OPERATORS = tuple(_OPERATORS)


def backends(operator: str = "selective_scan") -> dict[str, BackendStatus]:
    """Each backend of an operator with whether it can run here, why not, and the devices for which ``auto`` chooses it.

    Args:
        operator: one of `ssmgen.ops.OPERATORS`.

    Raises:
        ValueError: an unknown operator.
    """
    if operator not in _OPERATORS:
        raise ValueError(f"unknown operator {operator!r}{closest(operator, OPERATORS)} All: {', '.join(OPERATORS)}.")
    return _OPERATORS[operator].report()
