"""Property: whatever subset, order, naming and faults, the numbers land right, or all faults are
listed and nothing has changed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packed_models import MAPPING, MIXER
from torch import Tensor, nn

import lorafx
from lorafx.errors import BaseWeightsError
from lorafx.layers import FusedMoE, MergedColumnParallelLinear

EXPERTS, WIDTH, INNER = 3, 16, 5


class Experts(nn.Module):
    """Routed experts as transformers stores them, (E, out, in) or, transposed, (E, in, out)."""

    def __init__(self, transposed: bool, interleaved: bool) -> None:
        super().__init__()
        self.is_transposed, self.is_concatenated = transposed, not interleaved
        up, down = (EXPERTS, 2 * INNER, WIDTH), (EXPERTS, WIDTH, INNER)
        if transposed:
            up, down = (up[0], up[2], up[1]), (down[0], down[2], down[1])
        self.gate_up_proj = nn.Parameter(torch.randn(up))
        self.down_proj = nn.Parameter(torch.randn(down))
        self.gate_up_proj_bias = nn.Parameter(torch.randn(EXPERTS, 2 * INNER))


class Mixed(nn.Module):
    """One of each: tied, aliased, packed, apart, fused experts of three kinds, a buffer."""

    packed_modules_mapping = MAPPING

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, WIDTH)
        self.head = nn.Linear(WIDTH, 11, bias=False)
        self.head.weight = self.embed.weight
        self.shared = nn.Linear(WIDTH, WIDTH)
        self.alias = self.shared
        self.q_proj = nn.Linear(WIDTH, 6)
        self.k_proj = nn.Linear(WIDTH, 4)
        self.v_proj = nn.Linear(WIDTH, 4)
        self.in_proj_qkvz = MergedColumnParallelLinear(WIDTH, MIXER, bias=False)
        self.plain = Experts(transposed=False, interleaved=False)
        self.odd = Experts(transposed=True, interleaved=True)
        self.fused = FusedMoE(EXPERTS, 2, WIDTH, INNER)
        self.register_buffer("steps", torch.zeros(3))
        self.scalar = nn.Parameter(torch.tensor(0.5))

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.shared(self.embed(ids)))


@pytest.fixture(scope="module")
def served() -> Any:
    torch.manual_seed(0)
    config = lorafx.LoraConfig(target_modules=["shared", "q_proj", "k_proj", "v_proj"])
    return lorafx.compile(Mixed().eval(), config, options={"lowering": "reference"})


def experts_forms(path: str, w: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> list[Any]:
    """Ways to name the gate (E, I, H), up and down (E, H, I) projections of experts at `path`."""
    w13 = torch.cat([w["gate_proj"], w["up_proj"]], 1)
    each = {
        f"{path}.{e}.{name}.weight": tensor[e] for e in range(EXPERTS) for name, tensor in w.items()
    }
    words = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
    forms = [
        own,
        each,
        {f"{path}.{words[name]}": tensor for name, tensor in w.items()},
        {f"{path}.{name}.weight": tensor for name, tensor in w.items()},
        {f"{path}.base_layer.w13_weight": w13, f"{path}.w2_weight": w["down_proj"]},
    ]
    return forms[:-1] if path == "odd" else forms


def groups(seed: int) -> tuple[dict[str, Tensor], list[list[dict[str, Tensor]]]]:
    """(the state that is wanted, for each part of it the forms that it may come in)."""
    torch.manual_seed(seed)
    state = {name: torch.randn_like(t) for name, t in Mixed().state_dict().items()}
    state["head.weight"] = state["embed.weight"]
    for kind in ("weight", "bias"):
        state[f"alias.{kind}"] = state[f"shared.{kind}"]
    both = {"embed.weight": state["embed.weight"], "head.weight": state["embed.weight"].clone()}
    found: list[list[dict[str, Tensor]]] = [
        [both, {"embed.weight": state["embed.weight"]}, {"head.weight": state["embed.weight"]}],
        [{"scalar": state["scalar"]}],
        [{"steps": state["steps"]}],
    ]
    for kind in ("weight", "bias"):
        shared = state[f"shared.{kind}"]
        found.append([{f"shared.{kind}": shared}, {f"alias.{kind}": shared}])
        apart = {f"{letter}_proj.{kind}": state[f"{letter}_proj.{kind}"] for letter in "qkv"}
        found.append([apart, {f"qkv_proj.{kind}": torch.cat(list(apart.values()))}])
    mixer = state["in_proj_qkvz.weight"]
    qkv, z = mixer.split([sum(MIXER[:3]), MIXER[3]])
    found.append(
        [
            {"in_proj_qkvz.weight": mixer},
            {"in_proj_qkv.weight": qkv, "in_proj_z.weight": z},
        ]
    )
    for path in ("plain", "odd", "fused"):
        own = {n: t for n, t in state.items() if n.startswith(f"{path}.") and "bias" not in n}
        up, down = own.values()
        if path == "odd":
            up, down = up.mT, down.mT
        halves = (up[:, ::2], up[:, 1::2]) if path == "odd" else up.chunk(2, 1)
        projections = dict(zip(("gate_proj", "up_proj", "down_proj"), (*halves, down), strict=True))
        found.append(experts_forms(path, projections, own))
        if path != "fused":
            bias = state[f"{path}.gate_up_proj_bias"]
            found.append([{f"{path}.gate_up_proj_bias": bias}])
    return state, found


NOWHERE = "plain.3.nothing"
PREFIXES = ["", "base_model.model.", "_orig_mod.", "module.", "module.base_model.model._orig_mod."]


@settings(max_examples=25)
@given(data=st.data())
def test_any_update(served: Any, data: st.DataObject) -> None:
    state, parts = groups(data.draw(st.integers(0, 10**6), "seed"))
    chosen = [data.draw(st.sampled_from(forms)) for forms in parts]
    left_out = data.draw(st.sets(st.sampled_from(range(len(chosen))), max_size=3), "left out")
    left_out -= {2}  # a buffer may be left out
    pairs = [
        (data.draw(st.sampled_from(PREFIXES)) + name, tensor)
        for index, form in enumerate(chosen)
        if index not in left_out
        for name, tensor in form.items()
    ]
    pairs = data.draw(st.permutations(pairs))
    faults: dict[str, str] = {}
    for fault in data.draw(st.sets(st.sampled_from(["unknown", "shape", "twice"])), "faults"):
        at = data.draw(st.integers(0, len(pairs) - 1))
        name, tensor = pairs[at]
        if name in faults:
            continue
        if fault == "unknown":
            pairs.insert(at, (NOWHERE, tensor))
            faults[NOWHERE] = "no place in the model"
        elif fault == "shape":
            pairs[at] = (name, torch.zeros(*tensor.shape, 2))
            faults[name] = "the checkpoint's tensor has shape"
        else:
            pairs.insert(at, (name, tensor))
            faults[name] = "a duplicate"
    strict = data.draw(st.booleans(), "strict")
    source = {
        "list": pairs,
        "generator": (pair for pair in pairs),
        "function": lambda: iter(pairs),
    }[data.draw(st.sampled_from(["list", "generator", "function"]), "source")]

    before = {name: tensor.clone() for name, tensor in served.model.state_dict().items()}
    absent = [fills for index in left_out if (fills := _fills(parts[index], state))]
    bad = set(faults) - (set() if strict else {NOWHERE})
    if bad or (strict and absent):
        with pytest.raises(BaseWeightsError) as raised:
            served.load_weights(source, strict=strict)
        problems = raised.value.problems
        for name in bad:
            assert any(p.startswith(name) and faults[name] in p for p in problems), (name, problems)
        for names in absent if strict else ():
            assert any(f"{name}: nothing in the checkpoint" in problems for name in names)
        wanted = before
    else:
        report = served.load_weights(source, strict=strict)
        assert report.ignored == ((NOWHERE,) if NOWHERE in faults else ())
        covered = {
            name
            for index in set(range(len(parts))) - left_out
            for name in _fills(parts[index], state)
        }
        wanted = {name: state[name] if name in covered else before[name] for name in before}
    for name, tensor in served.model.state_dict().items():
        assert torch.equal(tensor, wanted[name]), name


def _fills(forms: list[dict[str, Tensor]], state: Mapping[str, Tensor]) -> set[str]:
    """The names in the model of what a part gives values to."""
    return {name for form in forms for name in form if name in state}
