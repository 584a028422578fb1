"""Imported before torch by each process of tests: captures without what costs time and has no use
in a test."""

from __future__ import annotations

import gc
import logging
import os

# A capture makes millions of objects that live until it ends. At Python's own thresholds the
# collector goes through all of them again and again, which was a tenth. Imports make as many,
# and a sixth of their time was the collector's, so it is told before them.
gc.set_threshold(100_000, 20, 50)

import torch._dynamo  # noqa: E402

# torch writes every graph and guard into this logger as soon as it has a handler, and pytest gives
# one to each logger that does not propagate: a tenth of a capture's time, for text nobody reads.
# Without a handler it writes nothing.
if "TORCH_TRACE" not in os.environ:
    logging.getLogger("torch.__trace").propagate = True
    logging.getLogger("torch.__trace").handlers.clear()

# Dynamo collects garbage after each capture, which is a fiftieth.
torch._dynamo.config.run_gc_after_compile = False
# And it times the guards, behind a flush of all the CPU's caches: that is a tenth where graphs are
# small.
torch._dynamo.guards.profile_guard_manager = lambda *arguments: 0.0
# It words each of a trace's side effects, with its stack, for a log that is off: a sixtieth.
torch._dynamo.config.side_effect_replay_policy = "silent"
