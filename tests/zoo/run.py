"""Runs models of other libraries with adapters, on both roads, against each row's merged model.

    PYTHONPATH=tests/helpers python tests/zoo/run.py [LIBRARY ...]

Not a test that `make test` runs: the libraries are not pinned, and some models take a minute. The
models have random weights, and are the smallest of each family, with adapters on all linears or,
where there are none, all convolutions. A row is right if it is as near to float64 as the merged
model in float32 is, within a factor. It prints a line for each model, and one for docs/families.md
for each library.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from adapters_in_memory import factors_of, merge, source_of
from torch import Tensor, nn

import lorafx

NAMES = ["a", None, "b"]
ROADS = ("eager", "compiled")
#: The error allowed beside that of the merged model in float32, and times it.
TOLERANCE, TIMES = 1e-5, 4


class Case(NamedTuple):
    """A model's name, a function that makes it, and one that makes its input for so many rows."""

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[int], Tensor]


def images(size: int, channels: int = 3, dims: int = 2) -> Callable[[int], Tensor]:
    return lambda rows: torch.randn(rows, channels, *[size] * dims)


def smallest(names: list[str], build: Callable[[str], nn.Module]) -> str | None:
    """The name of the model with the fewest parameters; None if none can be made."""
    sizes = {}
    for name in names:
        try:
            with torch.device("meta"):
                sizes[name] = sum(p.numel() for p in build(name).parameters())
        except Exception:  # of a library's own: it wants something that is not installed
            continue
    return min(sizes, key=lambda name: sizes[name], default=None)


def timm() -> Iterator[Case]:
    library = importlib.import_module("timm")

    def make(name: str) -> nn.Module:
        return library.create_model(name, pretrained=False, num_classes=7)

    for family in library.list_modules():
        name = smallest(library.list_models(module=family)[:12], make)
        if name is not None:
            size = library.get_pretrained_cfg(name).input_size[-1]
            yield Case(f"{family}: {name}", lambda name=name: make(name), images(size))


def torchvision() -> Iterator[Case]:
    models = importlib.import_module("torchvision.models")
    families: dict[str, list[str]] = {}
    for name in models.list_models(module=models):
        families.setdefault(models.get_model_builder(name).__module__, []).append(name)

    def make(name: str) -> nn.Module:
        return models.get_model(name, weights=None, num_classes=7)

    for names in families.values():
        name = smallest(names, make)
        if name is not None:
            size = 299 if "inception" in name else 224
            yield Case(name, lambda name=name: make(name), images(size))


def monai() -> Iterator[Case]:
    nets = importlib.import_module("monai.networks.nets")
    flat = {"spatial_dims": 2, "in_channels": 1, "out_channels": 3}
    widths = {"channels": (8, 16, 32), "strides": (2, 2)}
    made: dict[str, Callable[[], nn.Module]] = {
        "UNet": lambda: nets.UNet(**flat, **widths),
        "AttentionUnet": lambda: nets.AttentionUnet(**flat, **widths),
        "BasicUNet": lambda: nets.BasicUNet(**flat),
        "SegResNet": lambda: nets.SegResNet(**flat, init_filters=8),
        "DenseNet121": lambda: nets.DenseNet121(**flat),
        "SwinUNETR": lambda: nets.SwinUNETR(1, 3, spatial_dims=2, feature_size=12),
        "UNETR": lambda: nets.UNETR(1, 3, 64, feature_size=8, hidden_size=48, spatial_dims=2),
        "ViT": lambda: nets.ViT(1, 64, 16, spatial_dims=2, hidden_size=48, num_heads=4),
    }
    for name, build in made.items():
        yield Case(name, build, images(64, 1))


def smp() -> Iterator[Case]:
    library = importlib.import_module("segmentation_models_pytorch")
    for name in ("Unet", "UnetPlusPlus", "MAnet", "Linknet", "FPN", "PSPNet", "PAN", "DeepLabV3",
                 "DeepLabV3Plus", "UPerNet", "Segformer"):  # fmt: skip
        build = partial(getattr(library, name), "resnet18", encoder_weights=None, classes=3)
        yield Case(name, build, images(64))


def open_clip() -> Iterator[Case]:
    library = importlib.import_module("open_clip")
    for name in ("ViT-S-32-alt", "RN50", "convnext_tiny"):
        yield Case(name, lambda name=name: library.create_model(name).visual, images(224))


class Between(nn.Module):
    """A module of torch between two linears."""

    def __init__(self, module: nn.Module, features: int, out: int) -> None:
        super().__init__()
        self.before, self.module = nn.Linear(features, features), module
        self.after = nn.Linear(out, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.module(self.before(x)))


def module_db() -> Iterator[Case]:
    """torch's own samples of modules that take one batched tensor and return one."""
    database = importlib.import_module("torch.testing._internal.common_modules").module_db
    for info in database:
        samples = info.module_inputs_func(
            info, device="cpu", dtype=torch.float32, requires_grad=False, training=False
        )
        for number, sample in enumerate(samples):
            made, given = sample.constructor_input, sample.forward_input
            x = given.args[0] if len(given.args) == 1 and not given.kwargs else None
            if not isinstance(x, Tensor) or not x.is_floating_point() or x.dim() < 2:
                continue
            try:
                module = info.module_cls(*made.args, **made.kwargs).eval()
                y = module(x)
            except Exception:  # a sample of an error
                continue
            if not isinstance(y, Tensor) or y.dim() != x.dim() or len(y) != len(x):
                continue
            sizes = tuple(x.shape[1:])
            yield Case(
                f"{info.name} {number}",
                lambda m=module, i=x.shape[-1], o=y.shape[-1]: Between(copy.deepcopy(m), i, o),
                lambda rows, sizes=sizes: torch.randn(rows, *sizes),
            )


LIBRARIES: dict[str, Callable[[], Iterator[Case]]] = {
    item.__name__: item for item in (timm, torchvision, monai, smp, open_clip, module_db)
}


def tensors_of(result: Any) -> list[Tensor]:
    if isinstance(result, Tensor):
        return [result]
    values = result.values() if isinstance(result, dict) else result
    return [tensor for value in values if value is not None for tensor in tensors_of(value)]


def apart(got: list[Tensor], want: list[Tensor]) -> float:
    return max(
        float((a.double() - b.double()).abs().max()) / max(1.0, float(b.abs().max()))
        for a, b in zip(got, want, strict=True)
    )


@torch.no_grad()
def judged(case: Case) -> dict[str, str]:
    """By road: "right", "WRONG ..." or the first words of an error."""
    torch.manual_seed(0)
    base = case.build().eval().requires_grad_(False)
    sites = [(p, m) for p, m in base.named_modules() if isinstance(m, nn.Linear)]
    convolutions = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    sites = sites or [
        (path, module)
        for path, module in base.named_modules()
        if isinstance(module, convolutions) and module.groups == 1 and {*module.dilation} == {1}
    ]

    def normal(shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape) * (0.3 / max(shape[1:], default=1) ** 0.5)

    factors = {
        name: {path: factors_of(module, rank, normal) for path, module in sites}
        for rank, name in ((2, "a"), (3, "b"))
    }
    x = case.inputs(len(NAMES))
    exact, rounded = [], 0.0
    for row, name in enumerate(NAMES):
        twin = copy.deepcopy(base)
        merge(twin, factors.get(name or "", {}))
        plain = tensors_of(twin(x[row : row + 1]))
        exact.append(tensors_of(twin.double()(x[row : row + 1].double())))
        rounded = max(rounded, apart(plain, exact[-1]))
    verdicts = {}
    for road in ROADS:
        torch._dynamo.reset()
        model = copy.deepcopy(base)
        sources = {name: source_of(model, item) for name, item in factors.items()}
        options = {"lowering": "reference", "start": road, "cache": None}
        config = lorafx.LoraConfig(max_rank=3, max_adapters=2)
        start = time.perf_counter()
        try:
            cm = lorafx.compile(model, config, adapters=sources, options=options, dynamic=False)
            got = tensors_of(cm(x, adapter_names=NAMES))
        except Exception as error:
            kind = "refused" if isinstance(error, lorafx.LorafxError) else "RAISES"
            verdicts[road] = f"{kind}: {type(error).__name__}: {str(error)[:300]}"
            continue
        error = max(apart([t[r : r + 1] for t in got], rows) for r, rows in enumerate(exact))
        right = error <= TOLERANCE + TIMES * rounded
        graph = " by a graph" if road == "eager" and cm.recompiles else ""
        seconds = time.perf_counter() - start
        verdicts[road] = (
            f"right{graph} in {seconds:.1f} s" if right else f"WRONG by {error:.2g} ({rounded:.2g})"
        )
    return verdicts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("libraries", nargs="*", default=list(LIBRARIES), choices=LIBRARIES)
    parser.add_argument("--like", default="", help="only models whose names contain this")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    for library in arguments.libraries:
        counts: dict[str, Counter[str]] = {road: Counter() for road in ROADS}
        for case in LIBRARIES[library]():
            if arguments.like not in case.name:
                continue
            try:
                verdicts = judged(case)
            except Exception as error:  # the library's own model does not run here
                print(f"{library} {case.name}: does not run: {error!r:.200}", flush=True)
                continue
            for road, verdict in verdicts.items():
                counts[road][verdict.partition(" ")[0].rstrip(":")] += 1
                print(f"{library} {case.name}, {road}: {verdict}", flush=True)
        cells = (f"{n['right']} of {sum(n.values())}" for n in counts.values())
        print(f"| {library} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
