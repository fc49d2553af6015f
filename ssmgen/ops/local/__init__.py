"""Layers whose output at a token depends on that token and its neighbours alone."""
