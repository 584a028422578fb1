"""On Ray Serve with autoscaling: a second replica comes with the load and goes with it."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from ray import serve
from served import write_files
from served_on_ray import COMPLETIONS, cluster, inside, prompts

pytestmark = pytest.mark.slow  # a cluster, and replicas that come and go


def running(count: int) -> None:
    """Wait until so many replicas run, and no others."""
    deadline = time.monotonic() + 240
    while True:
        states = serve.status().applications["default"].deployments["Replica"].replica_states
        if {state: number for state, number in states.items() if number} == {"RUNNING": count}:
            return
        assert time.monotonic() < deadline, states
        time.sleep(0.2)


def test_replicas_come_and_go_with_the_load(tmp_path):
    files = write_files(tmp_path, num_hidden_layers=1, max_position_embeddings=256)
    scaling = {
        **{"min_replicas": 1, "max_replicas": 2, "target_ongoing_requests": 2},
        **{"upscale_delay_s": 0.5, "downscale_delay_s": 3, "look_back_period_s": 1},
        "metrics_interval_s": 0.2,
    }
    adapters, new = (None, "a0", "a1", "a2"), 100
    with (
        cluster(files, deployment={"autoscaling_config": scaling}) as served,
        ThreadPoolExecutor(8) as clients,
    ):
        running(1)
        stopped = False

        def client(number: int) -> tuple[str | None, str, str]:
            """Ask until the load has brought a second replica; the last answer."""
            adapter = adapters[number % 4]
            for words in prompts(1000, seed=number):
                text = served.ask(COMPLETIONS, adapter, words, new, stream=number % 2 == 0)
                if stopped:
                    return adapter, words, text
            raise AssertionError("the load did not bring a second replica")

        load = [clients.submit(client, number) for number in range(8)]
        try:
            running(2)
        finally:
            stopped = True
        for adapter, words, text in [asked.result(120) for asked in load]:
            assert text == served.want(COMPLETIONS, adapter, words, new)
        # Whoever asks while one of them goes is answered too.
        want = served.want(COMPLETIONS, "a1", "w9 w12", 5)
        deadline = time.monotonic() + 120
        while len(inside(lambda replica: 0)) > 1:
            assert time.monotonic() < deadline
            assert served.ask(COMPLETIONS, "a1", "w9 w12", 5, False) == want
        running(1)
