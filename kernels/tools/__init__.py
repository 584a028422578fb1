"""Commands for people with a GPU, or without one: tuning, calibration, compiling ahead of time."""
