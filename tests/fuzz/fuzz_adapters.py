"""Coverage-guided fuzzing of adapters: `python tests/fuzz/fuzz_adapters.py [libFuzzer flags]`.

The first byte of an input says what the rest stands for: the configuration's text, one of its
fields, the safetensors file, the pickle, a pattern, or one file in any dialect. Whatever it is,
reading gives an adapter or a LorafxError; libFuzzer's own limits on time (-timeout) and memory
(-rss_limit_mb) stand for the rest. Sound files are the first inputs. An input that fails is
written to the working directory; given as an argument it runs alone.
"""

from __future__ import annotations

import json
import sys
import tempfile
import warnings
from pathlib import Path

import atheris
import torch
from safetensors.torch import save

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))
with atheris.instrument_imports(include=["lorafx.adapter_store", "lorafx.model.targets"]):
    from hostile_adapters import CONFIG, PICKLED, SAFETENSORS, SETTINGS, read, small, write

    from lorafx.adapter_store.peft_config import PeftConfig
    from lorafx.adapter_store.peft_reader import read_adapter
    from lorafx.adapter_store.saved import AdapterSource
    from lorafx.errors import LorafxError
    from lorafx.model.targets import Pattern

warnings.simplefilter("ignore")
FIELDS = sorted(SETTINGS)
KINDS = (CONFIG, SAFETENSORS, PICKLED, "field", "pattern", "dialect")
MODEL, SITES = small()
#: Of dialects whose files do not say all; by the first byte.
CONFIGS = (None, {"lora_parameters": {"rank": 2, "scale": 2.0}}, {"lora_alpha": 4}, {"r": 2})
#: The ends of A's and B's keys in each dialect, and what stands before the path.
DIALECTS = (
    ("lora_a", "lora_b", ""),
    ("lora_A", "lora_B", ""),
    ("lora_A.weight", "lora_B.weight", ""),
    ("lora.down.weight", "lora.up.weight", "unet."),
    ("lora_down.weight", "lora_up.weight", "lora_unet_"),
)
PATHS = [path for path, _ in MODEL.named_modules()]


def one_input(data: bytes, folder: Path) -> None:
    """Read what `data` stands for; `folder` holds a sound adapter."""
    if len(data) < 2:
        return
    kind, rest = KINDS[data[0] % len(KINDS)], data[1:]
    if kind == "pattern":
        pattern = Pattern(rest.decode(errors="replace"))
        for path in PATHS:
            pattern.fullmatches(path)
    elif kind == "dialect":
        config = CONFIGS[rest[0] % len(CONFIGS)]
        read_adapter(AdapterSource(rest[1:], config=config), "a", SITES, model=MODEL, max_rank=64)
    elif kind == "field":
        field = FIELDS[rest[0] % len(FIELDS)]
        try:
            value = json.loads(rest[1:])
        except (ValueError, RecursionError):
            value = rest[1:].decode(errors="replace")
        config = PeftConfig.read({**SETTINGS, field: value})
        for path in PATHS:
            config.matches(path)
            config.scale(path, config.rank(path) or 1)
    else:
        sound = {name: (folder / name).read_bytes() for name in (CONFIG, SAFETENSORS, PICKLED)}
        with tempfile.TemporaryDirectory(dir=folder) as inner:
            if kind == PICKLED:
                del sound[SAFETENSORS]
            for name, content in {**sound, kind: rest}.items():
                (Path(inner) / name).write_bytes(content)
            read(Path(inner), MODEL, SITES)


def seeds(folder: Path, corpus: Path) -> None:
    """The sound files, and each field's value, as inputs."""
    corpus.mkdir()
    for kind, name in enumerate((CONFIG, SAFETENSORS, PICKLED)):
        (corpus / name).write_bytes(bytes([kind]) + (folder / name).read_bytes())
    for index, field in enumerate(FIELDS):
        value = json.dumps(SETTINGS[field]).encode()
        (corpus / field).write_bytes(bytes([KINDS.index("field"), index]) + value)
    for index, (a, b, begin) in enumerate(DIALECTS):
        path = "layers_0_q_proj" if begin.endswith("_") else "layers.0.q_proj"
        pair = {f"{begin}{path}.{a}": torch.ones(2, 6), f"{begin}{path}.{b}": torch.ones(5, 2)}
        if a == "lora_a":
            pair = {key: tensor.mT.contiguous() for key, tensor in pair.items()}
        if index == 4:
            pair[f"{begin}{path}.alpha"] = torch.tensor(2.0)
        start = bytes([KINDS.index("dialect"), (1, 2, 3, 0, 0)[index]])
        (corpus / f"dialect{index}").write_bytes(start + save(pair, {"adapter_config": "{}"}))
    for index, text in enumerate(
        (r"^(?!.*vision).*\.(q|v)_proj$", r"(.*\.)?(layers\.(1[6-9]|2\d))")
    ):
        (corpus / f"pattern{index}").write_bytes(bytes([KINDS.index("pattern")]) + text.encode())


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write(folder, pickled=True)
        write(folder)
        seeds(folder, folder / "corpus")

        def run(data: bytes) -> None:
            try:
                one_input(data, folder)
            except LorafxError:
                return

        flags = ["-timeout=5", "-rss_limit_mb=4096", "-max_len=16384", *sys.argv[1:]]
        alone = [flag for flag in flags if not flag.startswith("-")]
        atheris.Setup([sys.argv[0], *flags, *([] if alone else [str(folder / "corpus")])], run)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
