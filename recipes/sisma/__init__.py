"""SISMA on CelebAMask-HQ: prepare the data, train, sample, evaluate."""
