"""Runs models of other libraries with adapters, on both roads, against each row's merged model.

    PYTHONPATH=tests/helpers python tests/zoo/run.py [LIBRARY ...]

Not a test that `make test` runs: the libraries are not pinned, and some models take a minute. The
models have random weights, and are the smallest of each family, with adapters on all linears or,
where there are none, all convolutions. A row is right if it is as near to float64 as the merged
model in its own dtype is, within a factor. It prints a line for each model and road, and a row of
the table in docs/families.md for each library.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import version
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
    """A model's name, a function that makes it, one that makes its input for so many
    rows."""

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[int], Tensor]


class Verdict(NamedTuple):
    """The outcome, such as "right" or "refused", and why, or how long it took."""

    outcome: str
    text: str


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
        build = partial(library.create_model, name, pretrained=False, num_classes=7)
        try:
            return build(depth=2)  # blocks that are alike
        except (TypeError, IndexError):  # no transformer of one stage
            return build()

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
    for name in ("deeplabv3_mobilenet_v3_large", "fcn_resnet50", "lraspp_mobilenet_v3_large"):
        build = partial(models.get_model, name, weights=None, weights_backbone=None)
        yield Case(name, build, images(64))
    for name in ("mc3_18", "mvit_v2_s", "r2plus1d_18", "s3d", "swin3d_t"):
        size = 224 if name in ("mvit_v2_s", "s3d") else 64

        def clips(rows: int, size: int = size) -> Tensor:
            return torch.randn(rows, 3, 16, size, size)

        yield Case(name, lambda name=name: make(name), clips)


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


def features(*sizes: int) -> Callable[[int], Tensor]:
    return lambda rows: torch.randn(rows, *sizes)


class First(nn.Module):
    """A model of padded sequences, of full length: its first result."""

    def __init__(self, model: nn.Module, lengths: bool = False) -> None:
        super().__init__()
        self.model, self.lengths = model, lengths

    def forward(self, x: Tensor) -> Tensor:
        full = (torch.full((len(x),), x.shape[1], device=x.device),) if self.lengths else ()
        return self.model(x, *full)[0]


def torchaudio() -> Iterator[Case]:
    nets = importlib.import_module("torchaudio.models")
    speech = ("layer_norm", [(16, 10, 5), (16, 3, 2)], True, 32, 0.0, 8, 4, 2, 4)
    ends = (0.0, 64, 0.0, 0.0, True, 0.0, None)
    narrow = {"msk_num_feats": 32, "enc_num_feats": 32, "msk_num_hidden_feats": 32}
    made: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
        "Conformer": (lambda: First(nets.Conformer(16, 4, 32, 2, 3), True), (10, 16)),
        "Wav2Vec2": (lambda: First(nets.wav2vec2_model(*speech, *ends)), (400,)),
        "WavLM": (lambda: First(nets.wavlm_model(*speech, 32, 64, *ends)), (400,)),
        "ConvTasNet": (lambda: nets.ConvTasNet(**narrow, msk_num_layers=2), (1, 400)),
        "DeepSpeech": (lambda: nets.DeepSpeech(16, n_hidden=32), (1, 10, 16)),
        "Wav2Letter": (lambda: nets.Wav2Letter(5, "mfcc", 16), (16, 50)),
        "HDemucs": (lambda: nets.HDemucs(["a", "b"], channels=8, depth=5, nfft=1024), (2, 8192)),
    }
    for name, (build, sizes) in made.items():
        yield Case(name, build, features(*sizes))


def speechbrain() -> Iterator[Case]:
    def part(name: str) -> Any:
        return importlib.import_module(f"speechbrain.{name}")

    lobes, conformer = "lobes.models", "lobes.models.transformer"
    wide = {"channels": [32] * 5, "attention_channels": 16, "lin_neurons": 16}
    tdnn = {"tdnn_channels": [16] * 5, "lin_neurons": 16}
    neurons = {"cnn_channels": [4, 4], "rnn_neurons": 8, "dnn_neurons": 8}
    convolved = {"conv_channels": [16] * 3, "strides": [1] * 3, "num_blocks": 3, "num_layers": 2}
    made: dict[str, Callable[[], nn.Module]] = {
        "ECAPA_TDNN": lambda: part(f"{lobes}.ECAPA_TDNN").ECAPA_TDNN(16, **wide),
        "Xvector": lambda: part(f"{lobes}.Xvector").Xvector(in_channels=16, **tdnn),
        "CRDNN": lambda: part(f"{lobes}.CRDNN").CRDNN(input_shape=[2, 30, 16], **neurons),
        "ContextNet": lambda: part(f"{lobes}.ContextNet").ContextNet(
            input_shape=(2, 30, 16), out_channels=16, kernel_size=3, **convolved
        ),
        "Transformer": lambda: First(
            part(f"{conformer}.Transformer").TransformerEncoder(2, 4, 32, d_model=16)
        ),
        "Conformer": lambda: First(
            part(f"{conformer}.Conformer").ConformerEncoder(
                2, 16, 32, 4, kernel_size=3, attention_type="regularMHA"
            )
        ),
        "HyperConformer": lambda: First(
            part(f"{conformer}.Conformer").ConformerEncoder(
                2, 16, 32, 4, kernel_size=3, attention_type="hypermixing"
            )
        ),
        "Branchformer": lambda: First(
            part(f"{conformer}.Branchformer").BranchformerEncoder(
                2, 16, 4, kernel_size=3, attention_type="regularMHA", csgu_linear_units=32
            )
        ),
        "LiGRU": lambda: First(part("nnet.RNN").LiGRU(16, input_shape=[2, 30, 16])),
    }
    for name, build in made.items():
        yield Case(name, build, features(30, 16))


def esm() -> Iterator[Case]:
    library = importlib.import_module("esm.model.esm2")
    tokens = lambda rows: torch.randint(4, 24, (rows, 9))  # noqa: E731
    yield Case("ESM2", lambda: library.ESM2(2, 32, 4), tokens)


def vit_pytorch() -> Iterator[Case]:
    sizes = {"image_size": 64, "patch_size": 16, "num_classes": 7, "dim": 32, "mlp_dim": 64}
    heads = {"depth": 2, "heads": 4}
    more: dict[str, dict[str, Any]] = {
        "vit.ViT": {},
        "simple_vit.SimpleViT": {},
        "deepvit.DeepViT": {},
        "cait.CaiT": {"cls_depth": 2},
        "parallel_vit.ViT": {},
        "vit_for_small_dataset.ViT": {},
        "vit_with_patch_merger.ViT": {},
        "learnable_memory_vit.ViT": {},
        "simple_vit_with_register_tokens.SimpleViT": {},
        "simple_vit_with_qk_norm.SimpleViT": {},
        "simple_vit_with_fft.SimpleViT": {"freq_patch_size": 16},
        "normalized_vit.nViT": {},
        "rvt.RvT": {},
        "xcit.XCiT": {"cls_depth": 2},
        "local_vit.LocalViT": {},
    }
    for name, options in more.items():
        module, _, cls = name.partition(".")
        build = partial(_vit_of, module, cls, {**sizes, **heads, **options})
        yield Case(name, build, images(64))


def _vit_of(module: str, name: str, options: dict[str, Any]) -> nn.Module:
    return getattr(importlib.import_module(f"vit_pytorch.{module}"), name)(**options)


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
    item.__name__: item
    for item in (
        timm,
        torchvision,
        monai,
        smp,
        open_clip,
        torchaudio,
        speechbrain,
        esm,
        vit_pytorch,
        module_db,
    )
}
#: The names of their packages where these are others.
PACKAGES = {
    "smp": "segmentation_models_pytorch",
    "open_clip": "open_clip_torch",
    "esm": "fair-esm",
    "module_db": "torch",
}
#: Why a call is refused as it must be.
DEPEND = "rows of the base depend on each other"


def tensors_of(result: Any) -> list[Tensor]:
    if isinstance(result, Tensor):
        return [result]
    values = result.values() if isinstance(result, dict) else result
    return [tensor for value in values if value is not None for tensor in tensors_of(value)]


def apart(got: list[Tensor], want: list[Tensor]) -> float:
    """The largest difference, over the largest magnitude. NaNs equal NaNs."""
    most = 0.0
    for a, b in zip(got, want, strict=True):
        if not torch.equal(a.isnan(), b.isnan()):
            return float("inf")
        difference = (a.double() - b.double()).abs().nan_to_num()
        most = max(most, float(difference.max()) / max(1.0, float(b.abs().nan_to_num().max())))
    return most


class Wanted(NamedTuple):
    """Each row of a batch by its merged model, alone and in float64; how far from it the merged
    model is in its own dtype; and how far rows of the base are from themselves alone."""

    rows: list[list[Tensor]]
    rounded: float
    mixed: float


def wanted(base: nn.Module, factors: Any, x: tuple[Tensor, ...]) -> Wanted:
    rows, rounded, mixed = [], 0.0, 0.0
    together = tensors_of(copy.deepcopy(base).double()(*as_double(x)))
    for row, name in enumerate(NAMES):
        alone = tuple(part[row : row + 1] for part in x)
        rounding, exact = copy.deepcopy(base), copy.deepcopy(base).double()
        for twin in (rounding, exact):
            merge(twin, factors.get(name or "", {}))
        rows.append(tensors_of(exact(*as_double(alone))))
        rounded = max(rounded, apart(tensors_of(rounding(*alone)), rows[-1]))
        if name is None:
            mixed = apart([part[row : row + 1] for part in together], rows[-1])
    return Wanted(rows, rounded, mixed)


def as_double(x: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(part.double() if part.is_floating_point() else part for part in x)


@torch.no_grad()
def judged(case: Case, base: nn.Module) -> dict[str, Verdict]:
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
    given = case.inputs(len(NAMES))
    x = tuple(
        part.to(next(base.parameters()).dtype) if part.is_floating_point() else part
        for part in (given if isinstance(given, tuple) else (given,))
    )
    want = wanted(base, factors, x)
    return {road: on_road(road, case, base, factors, x, want) for road in ROADS}


def on_road(
    road: str, case: Case, base: nn.Module, factors: Any, x: tuple[Tensor, ...], want: Wanted
) -> Verdict:
    torch._dynamo.reset()
    model = copy.deepcopy(base)
    sources = {name: source_of(model, item) for name, item in factors.items()}
    options = {"lowering": "reference", "start": road, "cache": None}
    config = lorafx.LoraConfig(max_rank=3, max_adapters=2)
    start = time.perf_counter()
    try:
        cm = lorafx.compile(model, config, adapters=sources, options=options)
        got = tensors_of(cm(*x, adapter_names=NAMES))
    except lorafx.LorafxError as error:
        right = isinstance(error, lorafx.ProvenanceError) and want.mixed > TOLERANCE
        why = DEPEND if right else f"{type(error).__name__}: {str(error)[:600]}"
        return Verdict("refused", why)
    except Exception as error:
        return Verdict("RAISES", f"{type(error).__name__}: {str(error)[:300]}")
    seconds = f"in {time.perf_counter() - start:.1f} s"
    error = max(apart([t[r : r + 1] for t in got], rows) for r, rows in enumerate(want.rows))
    if error > TOLERANCE + TIMES * want.rounded:
        return Verdict("WRONG", f"by {error:.2g} ({want.rounded:.2g})")
    if road == "eager" and cm.recompiles:
        return Verdict("right by a graph", f"{seconds}: {cm.status().kinds[0].reason}")
    return Verdict("right", seconds)


def row_of(library: str, verdicts: dict[str, dict[str, Verdict]], larger: int) -> str:
    """A row of the table in docs/families.md."""
    counts = {road: Counter(v[road].outcome for v in verdicts.values()) for road in ROADS}
    others: dict[str, list[str]] = defaultdict(list)
    for name, by_road in verdicts.items():
        for road, (outcome, why) in by_road.items():
            if outcome not in ("right", "right by a graph"):
                reason = why if why == DEPEND else f"{name}, {road}"
                others[f"{outcome}: {reason}"].append(name)
    cells = [str(counts[road]["right"]) for road in ROADS]
    if graphs := counts["eager"]["right by a graph"]:
        cells[0] += f", and {graphs} by a graph"
    notes = [
        f"{len({*names})} {text}" if DEPEND in text else text for text, names in others.items()
    ]
    notes += [f"{larger} larger ones are left out"] * bool(larger)
    label = f"{library} {version(PACKAGES.get(library, library))}"
    return f"| {label} | {len(verdicts)} | {' | '.join(cells)} | {'; '.join(notes)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("libraries", nargs="*", default=list(LIBRARIES), choices=LIBRARIES)
    parser.add_argument("--like", default="", help="only models whose names contain this")
    parser.add_argument("--dtype", default="float32", help="of the models and their inputs")
    parser.add_argument("--most", type=float, default=30, help="leaves out larger models, millions")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    for library in arguments.libraries:
        verdicts: dict[str, dict[str, Verdict]] = {}
        larger = 0
        for case in LIBRARIES[library]():
            if arguments.like not in case.name:
                continue
            try:
                torch.manual_seed(0)
                base = case.build().eval().requires_grad_(False)
                if sum(item.numel() for item in base.parameters()) > arguments.most * 1e6:
                    larger += 1
                    continue
                verdicts[case.name] = judged(case, base.to(getattr(torch, arguments.dtype)))
            except Exception as error:  # the library's own model does not run here
                print(f"{library} {case.name}: does not run: {error!r:.200}", flush=True)
                continue
            for road, (outcome, text) in verdicts[case.name].items():
                print(f"{library} {case.name}, {road}: {outcome} {text}", flush=True)
        print(row_of(library, verdicts, larger), flush=True)


if __name__ == "__main__":
    main()
