"""Models that transformers cuts among ranks by tensor parallelism, and what a rank does with them;
see `two_ranks`."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from transformers.distributed import DistributedConfig

import lorafx

Batch = tuple[Tensor, list[str | None]]


def placed(rank: int, size: int, folder: Path, **settings: Any) -> Any:
    """The saved model, cut by its own plan."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
    settings = {"tp_size": size, "tp_plan": "auto", **settings}
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, distributed_config=DistributedConfig(**settings)
    )
    return model.eval().requires_grad_(False)


@torch.no_grad()
def serve(
    rank: int,
    size: int,
    folder: Path,
    folders: Mapping[str, Path],
    batches: Sequence[Batch],
    options: Mapping[str, Any],
    changes: Mapping[str, Tensor] | None = None,
    settings: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Logits of each batch. With `changes`, also tokens of the first one, logits of the base while
    each adapter is merged, and those of the batches after an update of weights and back."""
    model = placed(rank, size, folder, **(settings or {}))
    state = {name: whole(value) for name, value in model.state_dict().items()}
    # Sizes are fixed where nothing is generated: graphs for any cost twice as much.
    cm = lorafx.compile(model, folders, options=dict(options), dynamic=changes is not None)

    def logits() -> list[Tensor]:
        return [cm(input_ids=ids, adapter_names=names).logits for ids, names in batches]

    found: dict[str, Any] = {"logits": logits()}
    ids, names = batches[0]
    found["status"] = str(cm.status())
    if changes is not None:
        found["tokens"] = cm.generate(ids, adapter_names=names, max_new_tokens=4, do_sample=False)
        found["merged"] = {name: run_merged(cm, name, ids) for name in folders}
        cm.load_weights(changes, strict=False)
        found["updated"] = logits()
        cm.load_weights(model.state_dict())
        cm.load_weights(state)
        found["back"] = logits()
    cm.detach()
    after = model.state_dict()
    assert list(after) == list(state)
    assert all(torch.equal(whole(after[name]), value) for name, value in state.items())
    found["base"] = model(input_ids=ids).logits
    return found


@torch.no_grad()
def serve_more(rank: int, size: int, folder: Path, folders: Mapping[str, Path]) -> dict[str, Any]:
    """What else ranks do together: warm-up, a static cache, another adapter under a name, slots per
    token, and a merged model on disk, in `folder` / "merged"."""
    model = placed(rank, size, folder)
    options = {"lowering": "reference", "base_graphs": False}
    cm = lorafx.compile(model, {"first": folders["all"]}, options=options)
    generate = {"max_new_tokens": 3, "do_sample": False, "cache_implementation": "static"}
    cm.warmup(batch_sizes=[2], lengths=[5], generate=generate)
    found: dict[str, Any] = {"compiled": -cm.recompiles}
    ids = torch.arange(1, 11).view(2, 5)
    for kind in ("all", "copies"):
        cm.load_adapter(folders[kind], "first")
        found[kind] = cm.generate(ids, adapter_names=["first", None], **generate)
    found["compiled"] += cm.recompiles
    slots = torch.tensor([[-1, -1, 0, 0, 0], [0] * 5])
    found["slots"] = cm(input_ids=ids, adapter_names=["first"] * 2, adapter_slots=slots).logits
    cm.merge("first")
    model.save_pretrained(folder / "merged")
    cm.unmerge()
    return found


def whole(tensor: Tensor) -> Tensor:
    """A copy of all of a tensor."""
    placed: Any = tensor
    return (placed.full_tensor() if hasattr(placed, "full_tensor") else tensor).clone()


def run_merged(cm: lorafx.CompiledModel, name: str, ids: Tensor) -> Tensor:
    cm.merge(name)
    logits: Tensor = cm(input_ids=ids).logits
    cm.unmerge()
    return logits


class _Failing(dict[str, Tensor]):
    """An adapter that cannot be read, with an error that cannot be sent to other ranks."""

    class Lost(Exception):
        def __reduce__(self) -> Any:
            raise TypeError("not picklable")

    def items(self) -> Any:
        raise self.Lost("the disk is gone")


def refusals(rank: int, size: int, folder: Path, folders: Mapping[str, Path]) -> dict[str, str]:
    """What is refused, by what was tried; every rank goes on after each."""
    model = placed(rank, size, folder)
    found = {}

    def note(name: str, action: Callable[[], object]) -> None:
        try:
            action()
        except (lorafx.LorafxError, _Failing.Lost) as error:
            found[name] = f"{type(error).__name__}: {error}"

    own = folders["some"] if rank == 0 else folder / "missing"
    note("compile", lambda: lorafx.compile(model, {"some": own}))
    note(
        "embedding",
        lambda: lorafx.compile(model, lorafx.LoraConfig(target_modules=["embed_tokens"])),
    )
    options = {"lowering": "reference"}
    cm = lorafx.compile(model, {"some": folders["some"]}, options=options)
    note("load_adapter", lambda: cm.load_adapter(own, "other"))
    found["adapters"] = str(list(cm.adapters))
    note("bias", lambda: cm.load_adapter(folders["biased"], "other"))
    note("engine", lambda: cm.generate_batch([[1, 2]], ["some"]))
    note("export", lambda: cm.export_merged("some", folder / "never"))
    note("replaced", lambda: cm.load_adapter(own, "some"))
    note("unpicklable", lambda: cm.load_adapter(_Failing() if rank else folders["some"], "other"))
    note("twice", lambda: lorafx.compile(model.model, lorafx.LoraConfig()))
    cm.load_adapter(folders["some"], "other")
    found["adapters after"] = str(list(cm.adapters))
    cm.detach()
    gathered = transformers.AutoModelForCausalLM.from_pretrained(folder)
    fully_shard(gathered.model.layers[0])
    note("fsdp", lambda: lorafx.compile(gathered, {"some": folders["some"]}))
    mesh = init_device_mesh("cpu", (size,))
    own_plan = torch.nn.Sequential(torch.nn.Linear(4, 4))
    parallelize_module(own_plan, mesh, {"0": ColwiseParallel()})
    note("plan", lambda: lorafx.compile(own_plan, lorafx.LoraConfig(target_modules=["0"])))
    return found


def refused_experts(rank: int, size: int, folder: Path, folders: Mapping[str, Path]) -> str:
    model = placed(rank, size, folder, ep_size=size, ep_implementation="all_to_all")
    try:
        lorafx.compile(model, folders)
    except lorafx.LorafxError as error:
        return str(error)
    return "compiled"
