"""Experiments that show what each part of SISMA buys: ``python -m benchmarks.fidelity EXPERIMENT``."""
