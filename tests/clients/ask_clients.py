"""Have each client ask the server, and write what works into benchmarks/results/clients.json.

`make test-clients` runs this. It ends with 1 if a check of a client failed.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
CHECKS = ("text", "stream", "tools", "forced", "structured", "second")


@contextmanager
def server() -> Iterator[str]:
    """The address of a server, which has ended behind the block."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, str(HERE / "obedient_server.py"), str(port)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert process.stdout is not None
    try:
        while "ready after" not in (line := process.stdout.readline()):
            if not line:
                raise SystemExit("the server has not started")
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(60)


def asked(client: Path, url: str, venv: Path) -> list[dict[str, Any]]:
    """What a client reports."""
    own = venv / client.stem.removeprefix("with_") / "bin" / "python"
    python = own if own.exists() else venv / "bin" / "python"
    command = ["node", client.name] if client.suffix == ".mjs" else [str(python), str(client)]
    variables = {
        **{"LORAFX_SERVER": url, "PYTHONPATH": str(HERE), "HF_HOME": str(venv / "hub")},
        **{"HF_HUB_OFFLINE": "1", "LITELLM_LOCAL_MODEL_COST_MAP": "True"},
    }
    done = subprocess.run(
        command, env={**os.environ, **variables}, cwd=venv, capture_output=True, text=True
    )
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not rows:
        raise SystemExit(f"{client.name}: {done.stderr}")
    return rows


def main(venv: Path) -> None:
    for file in HERE.glob("*.mjs"):  # Node looks for packages beside the file
        shutil.copy(file, venv)
    clients = [*sorted(HERE.glob("with_*.py")), venv / "openai.mjs", venv / "ai_sdk.mjs"]
    rows = []
    with server() as url:
        for client in clients:
            for row in asked(client, url, venv):
                print(json.dumps(row), flush=True)
                rows.append(row)
    node = subprocess.check_output(["node", "--version"], text=True).strip()
    tried = {"date": date.today().isoformat(), "node": node}
    tried |= {name: metadata.version(name) for name in ("torch", "transformers", "llguidance")}
    result = {"title": "clients of the server", "machine": tried, "rows": rows}
    path = ROOT / "benchmarks" / "results" / "clients.json"
    path.write_text(json.dumps(result, indent=1))
    if any(row.get(check, "yes") != "yes" for row in rows for check in CHECKS):
        raise SystemExit(1)


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
