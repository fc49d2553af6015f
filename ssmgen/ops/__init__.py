"""Pure functions on tensors: the scans with their backends, the layers around them, and token orders."""

from ssmgen.ops.label_check import check_labels
from ssmgen.ops.linear_attention.gated_delta_rule import gated_delta_rule
from ssmgen.ops.local.layers import conv_silu, gelu, norm, sum_rows
from ssmgen.ops.scan.backend import Backend, ScanInputs
from ssmgen.ops.scan.dispatch import BackendStatus, backends
from ssmgen.ops.scan.selective_scan import selective_scan
from ssmgen.ops.scan_order import SCAN_ORDERS, ScanOrder, reorder, scan_order
from ssmgen.ops.ssd.ssd import ssd

__all__ = ["SCAN_ORDERS", "Backend", "BackendStatus", "ScanInputs", "ScanOrder", "backends", "check_labels"]
__all__ += [
    "conv_silu",
    "gated_delta_rule",
    "gelu",
    "norm",
    "reorder",
    "scan_order",
    "selective_scan",
    "ssd",
    "sum_rows",
]
