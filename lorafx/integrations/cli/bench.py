"""`lorafx bench`: lorafx, the base and PEFT side by side, on the user's own model and adapters."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Annotated, Any

import typer

from lorafx.integrations.cli.options import (
    Adapters,
    AsJson,
    Dtype,
    LanguageModel,
    LoweringOption,
    adapters_in,
    loaded,
    show_json,
    show_table,
)
from lorafx.progress import progress


def bench(
    model: LanguageModel,
    adapters: Adapters,
    batch: Annotated[int, typer.Option(help="Requests of a batch.")] = 8,
    length: Annotated[
        list[int] | None, typer.Option(help="Tokens of a request: 1 and 128; may be repeated.")
    ] = None,
    blocks: Annotated[int, typer.Option(help="Blocks of interleaved measurements.")] = 20,
    seconds: Annotated[float, typer.Option(help="Of one measurement.")] = 0.1,
    dtype: Dtype = None,
    peft: Annotated[bool, typer.Option(help="Whether PEFT is measured beside.")] = True,
    lowering: LoweringOption = "auto",
    as_json: AsJson = False,
) -> None:
    """Measure MODEL with your adapters: time over that of the base compiled by torch.compile.

    Each length is one forward without a cache, of a batch whose requests take turns with the
    adapters. lorafx compiles first; PEFT runs the same mixed batch in eager mode. All ratios are of
    one run, with the 95 % interval; the line "base" is the base against itself, the noise.

    Example: lorafx bench meta-llama/Llama-3.2-1B --adapters ./adapters --batch 8 --length 128
    """
    from lorafx.errors import ConfigError
    from lorafx.integrations.cli.measuring import compare

    if min(batch, blocks, *(length or (1,))) < 1 or seconds <= 0:
        raise ConfigError("--batch, --length, --blocks and --seconds must be positive")
    module = loaded(model, dtype)
    import torch

    import lorafx

    sources = adapters_in(adapters)
    vocabulary = getattr(module.config, "vocab_size", None)
    if vocabulary is None:
        raise ConfigError(
            f"{type(module).__name__} takes no token ids; bench is for language models"
        )
    with progress(f"adding {len(sources)} adapters"):
        options = {"lowering": lowering, "start": "compiled"}
        compiled = lorafx.compile(copy.deepcopy(module), dict(sources), options=options)
    names = list(sources)
    mixed = [names[row % len(names)] for row in range(batch)]
    several = f"{len(set(mixed))} adapters"
    # Name of an arm -> the model that it calls, and the adapters of its rows.
    arms: dict[str, tuple[Any, Sequence[str | None]]] = {
        "lorafx, no adapter": (compiled, [None] * batch),
        f"lorafx, {names[0]} alone": (compiled, names[:1] * batch),
    }
    if len(set(mixed)) > 1:
        arms[f"lorafx, {several}"] = (compiled, mixed)
    peft_model = _peft_model(module, sources, mixed) if peft else None
    if peft_model is not None:
        arms[f"PEFT, {several}"] = (peft_model, mixed)
    base_model = module if lowering == "reference" else torch.compile(copy.deepcopy(module))
    eager = {f"PEFT, {several}", *(["base"] if lowering == "reference" else [])}
    cases: list[dict[str, Any]] = []
    for tokens in length or (1, 128):
        title = f"{batch} requests of {tokens} tokens"
        ids = torch.randint(0, int(vocabulary), (batch, tokens), device=module.device)
        calls = {name: functools.partial(_logits, *arm, ids) for name, arm in arms.items()}
        base = functools.partial(_logits, base_model, None, ids)
        ratios = compare(base, calls, blocks=blocks, seconds=seconds, itself="base", title=title)
        rows = [
            {"ratio" if k == "median" else k: v for k, v in asdict(ratio).items()}
            | {"served": "eager" if ratio.arm in eager else "compiled"}
            for ratio in ratios
        ]
        case: dict[str, Any] = {"batch": batch, "tokens": tokens, "arms": rows}
        if peft_model is not None:
            got, want = (_logits(run, mixed, ids) for run in (compiled, peft_model))
            case["difference"] = float((got - want).abs().max() / want.abs().max())
        cases.append(case)
    machine = _machine(torch, module, sources)
    if as_json:
        show_json({"model": model, **machine, "cases": cases})
        return
    for case in cases:
        cells = [
            (
                arm["arm"],
                arm["served"],
                f"{arm['milliseconds']:.2f}",
                f"{arm['ratio']:.3f}",
                f"{arm['low']:.3f} - {arm['high']:.3f}",
            )
            for arm in case["arms"]
        ]
        title = f"{case['batch']} requests of {case['tokens']} tokens"
        show_table(title, ("what", "served", "ms", "over base", "95 %"), cells)
        if "difference" in case:
            print(f"largest difference of lorafx from PEFT's logits: {case['difference']:.1e}")
    print(*(f"{name}: {value}" for name, value in machine.items()), sep="\n")


def _logits(run: Any, names: Sequence[str | None] | None, ids: Any) -> Any:
    """The logits of one forward, after the device has computed them."""
    import torch

    kwargs = {} if names is None else {"adapter_names": names}
    with torch.no_grad():
        logits = run(input_ids=ids, use_cache=False, **kwargs).logits
    if ids.is_cuda:
        torch.cuda.synchronize()
    return logits


def _peft_model(module: Any, sources: Mapping[str, str], mixed: list[str]) -> Any | None:
    """The model with PEFT's layers; None, after a warning, if PEFT cannot serve the batch."""
    import torch

    try:
        from peft import PeftModel

        first, *following = sources
        with progress(f"adding {len(sources)} adapters by PEFT"):
            model = PeftModel.from_pretrained(copy.deepcopy(module), sources[first], first).eval()
            for name in following:
                model.load_adapter(sources[name], name)
        _logits(model, mixed, torch.zeros(len(mixed), 1, dtype=torch.long, device=module.device))
    except Exception as error:  # of any class: PEFT cannot serve all adapters that lorafx serves
        warnings.warn(f"PEFT is not measured: {error!s:.300}", stacklevel=2)
        return None
    return model


def _machine(torch: Any, module: Any, adapters: Iterable[str]) -> dict[str, str]:
    from datetime import date
    from importlib import metadata

    device = module.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    packages = ("lorafx", "torch", "transformers")
    return {
        "device": f"{name}, {torch.get_num_threads()} threads",
        "dtype": str(module.dtype).removeprefix("torch."),
        "versions": ", ".join(f"{package} {metadata.version(package)}" for package in packages),
        "adapters": ", ".join(adapters),
        "date": date.today().isoformat(),
    }
