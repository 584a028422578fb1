"""A model that is served: its adapters, the running call, its locks, models beside it."""
