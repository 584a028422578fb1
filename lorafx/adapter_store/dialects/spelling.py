"""Names of tensors in adapters' files, by three tables: prefix, spelling of the module, leaf.

    prefix               path of a module                          leaf
    base_model.model.    model.layers.0.self_attn.q_proj           .lora_A.weight
    transformer.         transformer_blocks.0.attn.to_q            .lora_A.default_0.default.weight
    lora_unet_           double_blocks_0_img_attn_proj             .lora_down.weight
    lora_unet_           blocks_22.self_attn.k                     .lora_up.weight
    unet.                down_blocks.0.….attn1.processor.to_q_lora .down.weight
                         layers.0.attn.q_proj                      .lora_a.weight

Behind a prefix that ends in an underscore, dots of the path may be underscores.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

from lorafx.adapter_store.peft_keys import parse
from lorafx.model.saved_names import PREFIX

_COMPONENTS = (
    *("unet", "transformer", "transformer_2", "transformer_3", "prior", "connectors"),
    *("text_encoder", "text_encoder_2", "text_encoder_3", "diffusion_model"),
)
#: Prefix -> the component of a pipeline, "" for its denoiser.
PREFIXES: Mapping[str, str] = {
    **{f"{name}.": name for name in _COMPONENTS},
    "model.diffusion_model.": "diffusion_model",
    "clip_l.": "text_encoder",
    "clip_g.": "text_encoder_2",
    "lora_unet_": "unet",
    "oft_unet_": "unet",
    "lora_transformer_": "transformer",
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
    "lora_te3_": "text_encoder_3",
    "lora_prior_unet_": "prior",
    "lora_prior_te_": "text_encoder",
    "lycoris_": "",
}
#: Components that a file may call each other's names: the pipeline's one denoising model.
DENOISERS = ("unet", "transformer", "diffusion_model")
#: How each leaf ends a name; the name of the group is that of the dialect.
_LEAF = re.compile(
    r"""(?P<module>.+?)(?:
        (?:\.lora_[AB](?:\.weight)?|(?:\.lora|(?<=_lora))\.down(?:\.weight)?)?\.(?P<alpha>alpha)
      | \.(?P<dora>dora_scale)
      | \.lora_(?P<kohya>down|up)\.weight
      | (?:\.lora(?:_linear_layer)?|(?<=_lora)|(?<=_lora[12]))\.(?P<diffusers>down|up)\.weight
      | \.lora_(?P<torchtune>[ab])\.weight
    )""",
    re.VERBOSE,
)
_LETTERS = {"down": "A", "a": "A", "up": "B", "b": "B", "alpha": "alpha", "dora_scale": "m"}
_PREFIX = re.compile("|".join(sorted(map(re.escape, PREFIXES), key=len, reverse=True)))


#: s by `NamedTensor.place`, None where a configuration has it, or α is r.
Scales = Mapping[str, float | None]


class NamedTensor(NamedTuple):
    """A tensor of a file: the `component` that its key names, the `module` behind the prefix, and
    its `letter`: "A", "B", DoRA's "m", B's bias "b", "alpha"; "" where it is no factor.

    Attributes:
        flat: dots of `module` may be underscores.
        leaf: the dialect that spells leaves so; "" if several do.
        embedding: the leaf says that the module is an embedding.
    """

    key: str
    tensor: Tensor
    component: str
    module: str
    letter: str
    flat: bool = False
    leaf: str = ""
    embedding: bool = False

    @property
    def place(self) -> str:
        return f"{self.component}:{self.module}"


def spelt(key: str, tensor: Tensor, dotted: bool = True) -> NamedTensor:
    """The meaning of a key. `dotted`: whether a prefix that ends in a dot may name a component."""
    rest, component, flat = key.removeprefix(PREFIX), "", False
    prefix = _PREFIX.match(rest)
    if prefix is not None and prefix.end() < len(rest) and (dotted or prefix[0].endswith("_")):
        component, flat = PREFIXES[prefix[0]], prefix[0].endswith("_")
        rest = rest[prefix.end() :]
    leaf = _LEAF.fullmatch(rest)
    if leaf is not None and leaf.lastgroup is not None:
        module, letter = _current(leaf["module"], component), _LETTERS[leaf[leaf.lastgroup]]
        return NamedTensor(key, tensor, component, module, letter, flat, leaf.lastgroup)
    factor = parse(rest)
    if factor is None:
        return NamedTensor(key, tensor, component, rest, "", flat)
    bare = "loralib" if rest.rpartition(".")[2] in ("lora_A", "lora_B") else ""
    return NamedTensor(
        key, tensor, component, factor.module, factor.letter, flat, bare, factor.embedding
    )


def _current(module: str, component: str) -> str:
    """The module of an attention's older `processor.to_q_lora`."""
    if not module.endswith("_lora"):
        return module
    owner, _, name = module.removesuffix("_lora").replace(".processor.", ".").rpartition(".")
    if component.startswith("text_encoder"):
        name = f"{name.removeprefix('to_')}_proj"
    elif name == "to_out":
        name = "to_out.0"
    return f"{owner}.{name}".lstrip(".")
