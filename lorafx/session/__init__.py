"""A model in service: its adapters, the running call, its locks, models that share modules with
it."""
