"""Adapters of other methods than LoRA behind the routes."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import peft
import pytest
from method_files import merged, save
from served import Files, anew, ask, client_of, question, serving, write_files

from lorafx.integrations.server.run import Opened

PATH = "/v1/completions"
_TO = {"target_modules": ["q_proj", "down_proj"]}
CONFIGS: dict[str, peft.PeftConfig] = {
    "lokr": peft.LoKrConfig(r=64, alpha=3, **_TO),
    "oft": peft.OFTConfig(oft_block_size=4, **_TO),
    "loha": peft.LoHaConfig(r=8, alpha=4, **_TO),  # r² is over what factors may have
}


async def answers(server: Opened, names: list[str | None]) -> list[str]:
    """The words for these adapters, while one of them is replaced and another comes and goes."""
    async with client_of(server) as client:

        async def post(path: str, **body: Any) -> Any:
            answer = await client.post(path, json=body)
            assert answer.status_code == 200, answer.text
            return answer

        async def exchange() -> None:
            for _ in range(3):
                load = {"lora_name": "lokr", "lora_path": "lokr", "load_inplace": True}
                await post("/v1/load_lora_adapter", **load)
                await post("/v1/load_lora_adapter", lora_name="more", lora_path="oft")
                await post("/v1/unload_lora_adapter", lora_name="more")

        models = ("tiny" if name is None else f"tiny:{name}" for name in names)
        asked = (post(PATH, model=model, **question(PATH, "w9 w12", 6)) for model in models)
        _, *found = await asyncio.gather(exchange(), *asked)
    return [answer.json()["choices"][0]["text"].strip() for answer in found]


def test_they_are_answered_beside_lora_while_they_are_replaced(tmp_path: Path) -> None:
    files = write_files(tmp_path)
    base, names = files.case.base, [None, "a0", *CONFIGS]
    for name, config in CONFIGS.items():
        folder = save(base, config, files.adapters / name)
        files.case.merged[name] = merged(base, folder).float()
    ids = files.tokenizer("w9 w12")["input_ids"]
    want = [files.text(name, ids, 6) for name in names]
    assert len(set(want)) > 3
    loading = {"allow_runtime_loading": True, "adapter_root": files.adapters}
    with serving(files, max_adapters=3, **loading) as server:
        assert asyncio.run(answers(server, names * 3)) == want * 3


@pytest.mark.parametrize("name", CONFIGS)
def test_a_server_without_room_says_what_makes_it(
    server: Opened, files: Files, tmp_path: Path, name: str
) -> None:
    save(files.case.base, CONFIGS[name], tmp_path / name)
    loader = anew(server, files, allow_runtime_loading=True, adapter_root=tmp_path)
    fields = {"lora_name": name, "lora_path": name}
    answer = ask(loader, "POST", "/v1/load_lora_adapter", **fields)
    assert answer.status_code == 400
    text = answer.json()["error"]["message"]
    assert "start lorafx serve with this adapter among --adapters" in text
    assert "no room for weights of the adapter's own" in text
    assert name not in server.compiled.adapters
