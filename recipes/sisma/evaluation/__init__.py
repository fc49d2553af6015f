"""Measuring a run, or any folder of images: mask agreement, distances to real images, diversity, and the report."""
