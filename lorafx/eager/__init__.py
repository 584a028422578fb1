"""Calls that no graph serves yet, run in eager mode with the owners of rows followed."""
