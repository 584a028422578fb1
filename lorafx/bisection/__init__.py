"""`lorafx.bisect`: the first pass, then the first site, with wrong values."""
