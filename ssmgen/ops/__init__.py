"""Pure functions on tensors: the selective scan with its backends, the layers around it, and token orders."""

from ssmgen.ops.label_check import check_labels
from ssmgen.ops.layers import conv_silu, gelu, norm, sum_rows
from ssmgen.ops.scan_order import SCAN_ORDERS, ScanOrder, reorder, scan_order
from ssmgen.ops.selective_scan import BackendStatus, backends, selective_scan

__all__ = [
    "SCAN_ORDERS",
    "BackendStatus",
    "ScanOrder",
    "backends",
    "check_labels",
    "conv_silu",
    "gelu",
    "norm",
    "reorder",
    "scan_order",
    "selective_scan",
    "sum_rows",
]
