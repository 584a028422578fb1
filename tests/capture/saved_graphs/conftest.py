"""Graphs are saved from torch 2.13 on."""

from lorafx.torch_internals.versions import saves_graphs

collect_ignore_glob = [] if saves_graphs() else ["test_*.py"]
