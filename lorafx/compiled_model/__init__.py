"""`CompiledModel`: calls, its methods by topic, warm-up, names served, delegated and refused."""
