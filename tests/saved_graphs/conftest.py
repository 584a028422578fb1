"""Graphs are saved from torch 2.13 on."""

from lorafx.compat import can_save_graphs

collect_ignore_glob = [] if can_save_graphs() else ["test_*.py"]
