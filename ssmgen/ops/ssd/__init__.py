"""Mamba-2's state-space duality: one decay per head, so that a scan is a few products of matrices."""
