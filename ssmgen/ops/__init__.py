"""Pure functions on tensors: the selective scan with its backends, and token orders."""

from ssmgen.ops.label_check import check_labels
from ssmgen.ops.scan_order import SCAN_ORDERS, ScanOrder, reorder, scan_order
from ssmgen.ops.selective_scan import BackendStatus, backends, selective_scan

__all__ = [
    "SCAN_ORDERS",
    "BackendStatus",
    "ScanOrder",
    "backends",
    "check_labels",
    "reorder",
    "scan_order",
    "selective_scan",
]
