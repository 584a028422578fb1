"""Shared state: the program in service, its frames, the running call and its rows."""
