"""Pipelines whose images have adapters of their own, against diffusers with one adapter."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import permutations
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import tiny_pipelines as tiny
import torch
from dense_merge import REFERENCE, TOLERANCE, error
from diffusers import EulerAncestralDiscreteScheduler, StableDiffusionXLImg2ImgPipeline
from safetensors.torch import load_file
from torch import Tensor

import lorafx
from lorafx.errors import (
    BatchError,
    CaptureError,
    CheckpointError,
    ConfigError,
    MatchError,
    ReplacedModuleError,
    UnknownAdapterError,
)
from lorafx.runtime.loading import load_parts

#: Eager mode beside moves what a pipeline has between two calls of its models.
pytestmark = pytest.mark.filterwarnings("ignore")

PARTS = {
    "sdxl": ("unet", "text_encoder", "text_encoder_2"),
    "sd3": ("transformer",),
    "flux": ("transformer", "text_encoder"),
}
PROMPTS = ["ab", "cd", "efg", "h"]
NEGATIVE = ["x", "y", "z", "w"]


def embeddings(prompts: int) -> dict[str, Tensor]:
    """For a pipeline without encoders, as another one has computed them."""
    torch.manual_seed(1)
    found = {}
    for begin in ("", "negative_"):
        found[f"{begin}prompt_embeds"] = torch.randn(prompts, 6, 16)
        found[f"{begin}pooled_prompt_embeds"] = torch.randn(prompts, 16)
    return found


def one(value: Any, row: int) -> Any:
    """A prompt's own share of an argument."""
    return value[row : row + 1] if isinstance(value, (list, Tensor)) else value


MIXED: list[Any] = ["both", {"both": 0.5, "denoiser": 0.8}, None, {"denoiser": -0.5}]


@dataclass
class Pair:
    """A compiled pipeline, and the same one with diffusers' own adapters."""

    kind: str
    cp: Any
    own: tiny.Adapted
    folders: dict[str, Path] = field(default_factory=dict)

    def inputs(self, prompts: int, given: dict[str, Any]) -> dict[str, Any]:
        if self.kind == "sd3":
            return {**embeddings(prompts), **given}
        length = {"max_sequence_length": 6} if self.kind == "flux" else {}
        return {"prompt": PROMPTS[:prompts], **length, **given}

    def call(self, names: Any, prompts: int = 0, images: int = 1, **given: Any) -> Any:
        prompts = prompts or len(names)
        size = tiny.SIZES[self.kind]
        call = {**tiny.CALL, "height": size, "width": size, **self.inputs(prompts, given)}
        generator = tiny.noise(range(prompts * images))
        call |= {"generator": generator, "num_images_per_prompt": images}
        return self.cp(adapter_names=names, **call)

    def check(self, names: list[Any], images: int = 1, **given: Any) -> Tensor:
        """A batch is, image by image, what diffusers makes of its prompt and adapters alone."""
        got = self.call(names, len(names), images, **given).images
        inputs = self.inputs(len(names), given)
        for row, name in enumerate(names):
            own = range(row * images, (row + 1) * images)
            alone = {key: one(value, row) for key, value in inputs.items()}
            alone["num_images_per_prompt"] = images
            want = self.own.images(name, own, **alone)
            assert error(got[own.start : own.stop], want) <= TOLERANCE
            if name is not None:
                assert error(want, self.own.images(None, own, **alone)) > 100 * TOLERANCE
        return got


@pytest.fixture(scope="module")
def pair(road_of_module: str, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Pair]:
    made: dict[str, Pair] = {}
    # All first: transformers notes each class of models where graphs have a guard on it.
    pipes = {kind: tiny.pipeline(kind) for kind in tiny.PIPELINES}

    def of(kind: str) -> Pair:
        if kind not in made:
            pipe, folder = pipes[kind], tmp_path_factory.mktemp(kind)
            parts = {"both": PARTS[kind], "denoiser": PARTS[kind][:1], "other": PARTS[kind]}
            folders = {
                name: tiny.save_lora(pipe, folder / name, seed, own, rank=2 + seed)
                for seed, (name, own) in enumerate(parts.items())
            }
            own = tiny.Adapted(kind, copy.deepcopy(pipe), {})
            own.pipe.set_progress_bar_config(disable=True)
            own.loads(folders)
            config = lorafx.LoraConfig(max_rank=8)
            given = {name: folders[name] for name in ("both", "denoiser")}
            if kind == "flux":  # what diffusers itself has loaded is taken over
                with tiny.logged_errors_only():
                    pipe.load_lora_weights(str(given.pop("both")), adapter_name="both")
            options = {**REFERENCE, "start": "compiled" if kind == "sd3" else road_of_module}
            cp = lorafx.compile_pipeline(pipe, given, lora_config=config, options=options)
            made[kind] = Pair(kind, cp, own, folders)
        return made[kind]

    return of


@pytest.mark.parametrize(
    ("kind", "call"),
    [
        ("sdxl", {}),  # rows without a prompt are zeros
        ("sdxl", {"negative_prompt": NEGATIVE}),
        ("sdxl", {"guidance_scale": 1.0}),
        pytest.param("sd3", {}, marks=pytest.mark.slow),
        ("flux", {}),
        ("flux", {"negative_prompt": NEGATIVE, "true_cfg_scale": 2.0}),
        ("flux", {"negative_prompt": NEGATIVE[0], "true_cfg_scale": 2.0}),
    ],
)
def test_a_mixed_batch(kind: str, call: dict[str, Any], pair: Callable[[str], Pair]) -> None:
    pair(kind).check(MIXED, **call)


@pytest.mark.parametrize("kind", ["sdxl", "sd3", "flux"])
def test_adapters_take_turns_without_recompiling(kind: str, pair: Callable[[str], Pair]) -> None:
    both = pair(kind)
    cp = both.cp
    both.check(MIXED)
    captured = {name: cm.recompiles for name, cm in cp.models.items()}
    images = 1 if kind == "sd3" else 2  # embeddings that are given are not repeated
    both.check(["both", None], images=images)
    cp.load_adapter(both.folders["other"], "other")
    both.check(["other", "both", {"other": 0.4}])
    cp.unload_adapter("other")
    assert cp.adapters == ("both", "denoiser")
    both.check([None, "denoiser", "both"], images=images)
    both.check(["both", "both"])
    assert {name: cm.recompiles for name, cm in cp.models.items()} == captured


def test_embeddings_that_were_made_in_inference_mode(pair: Callable[[str], Pair]) -> None:
    with torch.inference_mode():
        given = embeddings(4)
    pair("sd3").check(MIXED, **given)


def test_a_scheduler_that_adds_noise_at_each_step(
    pair: Callable[[str], Pair], monkeypatch: pytest.MonkeyPatch
) -> None:
    both = pair("sdxl")
    for pipe in (both.cp.pipe, both.own.pipe):
        monkeypatch.setattr(pipe, "scheduler", EulerAncestralDiscreteScheduler())
    both.check(["both", None, "denoiser"])


def test_another_pipeline_over_the_same_models(pair: Callable[[str], Pair]) -> None:
    both = pair("sdxl")
    parts = {k: v for k, v in both.cp.pipe.components.items() if v is not None}
    pipe = StableDiffusionXLImg2ImgPipeline(**parts, add_watermarker=False)
    own = StableDiffusionXLImg2ImgPipeline(
        **{name: getattr(both.own.pipe, name) for name in parts}, add_watermarker=False
    )
    images = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    settings = {"strength": 1.0, "num_inference_steps": 2, "output_type": "latent"}
    cp = lorafx.CompiledPipeline(pipe, both.cp.models)
    names = ["both", {"denoiser": 0.7}]

    def call(**negative: Any) -> Tensor:
        given = {"prompt": PROMPTS[:2], "image": images, "generator": tiny.noise(range(2))}
        return cp(**given, adapter_names=names, **settings, **negative).images

    got, captured = call(negative_prompt=NEGATIVE[:2]), cp.recompiles
    alone = tiny.Adapted("sdxl", own, {})
    for row, name in enumerate(names):
        inputs = {"prompt": PROMPTS[row : row + 1], "negative_prompt": NEGATIVE[row : row + 1]}
        inputs |= {"image": images[row : row + 1], **settings, "height": None, "width": None}
        want = alone.images(name, range(row, row + 1), **inputs)
        assert error(got[row : row + 1], want) <= TOLERANCE
    # Two noises are in the rows without a prompt, and no embeddings.
    with pytest.raises(BatchError, match=r"unet .* is called with 4 rows for 2 prompts.*row 0, 1"):
        call()
    assert cp.recompiles == captured


@contextmanager
def encoding(pipe: Any, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """The pipeline's own step between its text encoders and the denoiser, with what is changed."""
    encode = type(pipe).encode_prompt

    def changed(self: Any, *args: Any, **kwargs: Any) -> Any:
        embeddings, pooled, ids = encode(self, *args, **kwargs)
        return change(embeddings), change(pooled), ids

    pipe.encode_prompt = changed.__get__(pipe)
    try:
        yield
    finally:
        del pipe.encode_prompt


def test_rows_in_another_order_keep_their_adapters(pair: Callable[[str], Pair]) -> None:
    """The proof follows the embeddings: nothing is assumed about the pipeline."""
    both, names = pair("flux"), ["both", None, "denoiser"]
    with encoding(both.cp.pipe, lambda rows: rows.flip(0)):
        got = both.call(names).images
    for row, image in ((0, 2), (2, 0)):
        inputs = {key: one(value, row) for key, value in both.inputs(3, {}).items()}
        want = both.own.images(names[row], range(image, image + 1), **inputs)
        assert error(got[image : image + 1], want) <= TOLERANCE


def test_rows_that_nothing_explains_are_refused(pair: Callable[[str], Pair]) -> None:
    both = pair("flux")
    with encoding(both.cp.pipe, lambda rows: torch.tensor(rows.tolist())):
        with pytest.raises(
            BatchError, match=r"transformer \(Flux.* 2 rows for 2 prompts.*row 0, 1"
        ):
            both.call(["both", None])
        assert both.call(["both", "both"]).images.shape[0] == 2


def test_the_pipeline_is_what_it_was(pair: Callable[[str], Pair]) -> None:
    both = pair("flux")
    pipe = both.cp.pipe
    assert type(pipe.transformer) is type(both.own.pipe.transformer)
    assert "forward" not in vars(pipe.transformer)
    assert both.cp.scheduler is pipe.scheduler
    seen: list[Any] = []
    handle = pipe.transformer.register_forward_hook(lambda module, *_: seen.append(module))
    both.call(["both", None])
    handle.remove()
    assert seen == [pipe.transformer] * tiny.CALL["num_inference_steps"]
    # The adapter that was active is the default, of which the pipeline alone knows nothing.
    assert torch.equal(both.call(None, 2).images, both.call(["both", "both"]).images)
    with pytest.raises(MatchError, match=r"outside the compiled model's own calls.*'both'"):
        pipe(**tiny.CALL, prompt="ab", height=16, width=16, max_sequence_length=6)


def test_an_adapter_is_loaded_into_all_models_or_none(pair: Callable[[str], Pair]) -> None:
    both = pair("sdxl")
    file = both.folders["other"] / "pytorch_lora_weights.safetensors"
    tensors = load_file(file)
    broken = next(key for key in tensors if key.startswith("text_encoder_2.") and "lora_A" in key)
    tensors[broken] = tensors[broken][:, :-1].contiguous()
    for name in ("both", "new"):
        with pytest.raises(CheckpointError, match=r"text_model.*lora_A"):
            both.cp.load_adapter(tensors, name)
    assert both.cp.adapters == ("both", "denoiser")
    both.check(["both", None])


def test_locks_of_several_models_are_always_taken_in_one_order(
    pair: Callable[[str], Pair], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise a call and an adapter that is loaded meanwhile may wait for one another."""
    both = pair("sdxl")
    sessions = {name: cm._session for name, cm in both.cp.models.items()}
    taken: list[str] = []

    def entered(lock: Any, name: str) -> None:
        taken.append(name)
        lock.__enter__()

    for name, session in sessions.items():
        lock = MagicMock(wraps=session.locks.calls)
        lock.__enter__.side_effect = partial(entered, session.locks.calls, name)
        lock.__exit__.side_effect = session.locks.calls.__exit__
        monkeypatch.setattr(session.locks, "calls", lock)
    orders = []
    for given in permutations(sessions.values()):
        taken.clear()
        load_parts([(session, None) for session in given], "absent")
        orders.append(list(taken))
    taken.clear()
    both.call(["both", None])
    orders.append(list(dict.fromkeys(taken)))
    assert orders == [list(sessions)] * 7


def test_one_file_of_kohyas(pair: Callable[[str], Pair]) -> None:
    """Without its configuration α is in the file, and parts are named by kohya's prefixes."""
    both = pair("sdxl")
    tensors = tiny.as_kohya(both.folders["other"] / "pytorch_lora_weights.safetensors", alpha=3)
    both.cp.load_adapter(tensors, "other")
    both.check(["other", None])
    both.cp.unload_adapter("other")


def rand(*shape: int) -> Tensor:
    return 0.3 * torch.randn(*shape)


#: Of keys, by component.
_PREFIXES = {
    "sdxl": {"unet": "lora_unet_", "text_encoder": "lora_te1_"},
    "flux": {"transformer": "transformer."},
}


def of_method(method: str, n: int, k: int, *kernel: int) -> tuple[dict[str, Tensor], Tensor]:
    """Tensors by the ends of LyCORIS's keys, and ΔW by its formula."""
    if method == "lokr":
        w = {"lokr_w1": rand(2, 2), "lokr_w2": rand(n // 2, k // 2, *kernel)}
        return w, torch.kron(w["lokr_w1"].view(2, 2, *[1] * len(kernel)), w["lokr_w2"])
    if method == "diff":
        return {"diff": (diff := rand(n, k, *kernel))}, diff
    pairs = [(rand(n, 2), rand(2, k * math.prod(kernel))) for _ in range(2)]
    w = {f"hada_w{i + 1}_{x}": t for i in range(2) for x, t in zip("ab", pairs[i], strict=True)}
    return {**w, "alpha": torch.tensor(2.0)}, math.prod(a @ b for a, b in pairs)


@torch.no_grad()
@pytest.mark.parametrize(
    ("kind", "start"),
    [
        ("sdxl", "eager"),
        ("flux", "eager"),
        # Methods in graphs: tests/adapter_store/methods; parts in graphs: `test_a_mixed_batch`.
        pytest.param("sdxl", "compiled", marks=pytest.mark.slow),
        pytest.param("flux", "compiled", marks=pytest.mark.slow),
    ],
)
def test_files_of_lycoris(kind: str, start: str, tmp_path: Path) -> None:
    """All methods in each file, each in turn, at linears and convolutions."""
    torch.manual_seed(5)
    pipe = tiny.pipeline(kind)
    base = copy.deepcopy(pipe)
    files: dict[str, dict[str, Tensor]] = {}
    merged: dict[str | None, Any] = {None: base}
    ends = ("to_q", "to_v", "ff.net.2", "q_proj", "fc1", "conv1", "conv_shortcut")
    for first in range(2):
        files[f"a{first}"], merged[f"a{first}"] = {}, copy.deepcopy(pipe)
        for part, prefix in _PREFIXES[kind].items():
            modules = getattr(merged[f"a{first}"], part).named_modules()
            ours = [(path, module) for path, module in modules if path.endswith(ends)]
            for number, (path, module) in enumerate(ours, first):
                method = ("lokr", "loha", "diff")[number % 3]
                tensors, delta = of_method(method, *module.weight.shape)
                module.weight += delta.view(module.weight.shape)
                path = path.replace(".", "_") if prefix.endswith("_") else path
                files[f"a{first}"] |= {f"{prefix}{path}.{end}": t for end, t in tensors.items()}
    folder = tiny.save_lora(pipe, tmp_path, 1, PARTS[kind])
    adapters = {**files, "lora": folder}
    cp = lorafx.compile_pipeline(pipe, adapters, options={**REFERENCE, "start": start})
    names, size = ["a0", None, "a1", "lora"], tiny.SIZES[kind]
    call = {**tiny.CALL, "height": size, "width": size}
    call |= {"max_sequence_length": 6} if kind == "flux" else {}
    got = cp(prompt=PROMPTS, generator=tiny.noise(range(4)), adapter_names=names, **call).images
    for row, name in enumerate(names[:3]):
        given = {"prompt": PROMPTS[row], "generator": tiny.noise(range(row, row + 1)), **call}
        want = merged[name](**given).images
        assert error(got[row : row + 1], want) <= TOLERANCE
        assert name is None or error(want, base(**given).images) > 100 * TOLERANCE


def test_what_is_refused(pair: Callable[[str], Pair]) -> None:
    both = pair("flux")
    cp = both.cp
    with pytest.raises(BatchError, match="adapter_names has 2 entries, but prompt has 1"):
        both.call(["both", None], 1)
    with pytest.raises(UnknownAdapterError, match=r"no adapter 'bot'.*both"):
        both.call(["bot", None])
    with pytest.raises(ConfigError, match=r"joint_attention_kwargs=\{'scale': 0.5\}"):
        both.call(["both"], joint_attention_kwargs={"scale": 0.5})
    for method in ("load_lora_weights", "set_adapters", "fuse_lora", "unload_lora_weights"):
        with pytest.raises(
            CaptureError, match=rf"{method}\(\) is about .* use load_adapter\(source"
        ):
            getattr(cp, method)("somewhere")
    own = cp.pipe.text_encoder
    cp.pipe.text_encoder = copy.deepcopy(own)
    try:
        with pytest.raises(ReplacedModuleError, match=r"text_encoder of the FluxPipeline"):
            both.call(["both"])
    finally:
        cp.pipe.text_encoder = own


def test_a_part_for_a_model_that_is_not_loaded(pair: Callable[[str], Pair]) -> None:
    """The pipeline without its encoders has the embeddings from elsewhere."""
    both = pair("sd3")
    tensors = load_file(both.folders["other"] / "pytorch_lora_weights.safetensors")
    path = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
    tensors |= {f"{path}.lora_{x}.weight": torch.ones(2, 2) for x in "AB"}
    with pytest.warns(lorafx.LorafxWarning, match="text_encoder, without which the pipeline was"):
        both.cp.load_adapter(tensors, "part")
    assert both.cp.adapters[-1] == "part"
    both.cp.unload_adapter("part")
