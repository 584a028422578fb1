"""`lorafx.bisect`: the first pass, then the first site, at which a program's answers are wrong."""
