"""match: every use of a selected weight gets its delta, or a refusal."""
