"""Row ownership: labels, rules by op, and their propagation over a graph."""
