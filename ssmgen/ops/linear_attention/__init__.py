"""Linear attention with a decay and the delta rule: a matrix of associations that is corrected, not only added to."""
