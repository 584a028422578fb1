"""Graphs that an earlier process compiled: written to a folder, verified and loaded by a later
one."""
