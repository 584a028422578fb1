"""A package of a small model: another process without transformers runs it, and so does C++.

Of a Llama it takes AOTInductor three times as long: `test_bfloat16`, slowly."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import method_files
import peft
import pytest
import torch
from dense_merge import TOLERANCE, Case, build_case, check_bfloat16, error, save_adapter, valid
from tiny_models import VOCAB, Family, token_inputs
from toolchain import needs_compiler
from torch import Tensor, nn
from waiting import LONG

import lorafx
from lorafx.kernels.cpu.compiler import find_compiler

pytestmark = [pytest.mark.any_sizes, needs_compiler]

ROOT = Path(__file__).parents[2]
CONFIG = lorafx.LoraConfig(max_adapters=3, max_rank=8)


class Small(nn.Module):
    """Attention to what the mask leaves, and a feed-forward, between an embedding and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens, self.lm_head = nn.Embedding(VOCAB, 24), nn.Linear(24, VOCAB)
        for name in "qkvo":
            self.add_module(f"{name}_proj", nn.Linear(24, 24, bias=False))
        self.up_proj, self.down_proj = nn.Linear(24, 40), nn.Linear(40, 24)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        x = self.embed_tokens(input_ids)
        scores = (self.q_proj(x) @ self.k_proj(x).mT) / 5
        shares = scores.masked_fill(attention_mask[:, None] == 0, -1e4).softmax(-1)
        x = x + self.o_proj(shares @ self.v_proj(x))
        return {"logits": self.lm_head(x + self.down_proj(torch.relu(self.up_proj(x))))}


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    ends, mlp = ["embed_tokens", "o_proj", "lm_head"], ["up_proj", "down_proj"]
    targets = (["q_proj", "v_proj"], "all-linear", mlp, ends, ["k_proj"])
    return build_case(Family(lambda **_: Small(), targets), tmp_path_factory.mktemp("case"))


@pytest.fixture(scope="module")
def path(case: Case, tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.manual_seed(3)
    model = case.model()
    path = tmp_path_factory.mktemp("package") / "small.pt2"
    written = lorafx.export(model, CONFIG, token_inputs(3, 5), path, adapters=case.folders)
    assert not any(module._forward_hooks for module in model.modules())
    return written


@pytest.fixture(scope="module")
def package(path: str) -> lorafx.Package:
    return lorafx.load(path)


@pytest.fixture
def fresh(package: lorafx.Package, case: Case) -> lorafx.Package:
    """The package with the adapters of the case, a0 to a4."""
    for name in package.adapters:
        package.unload_adapter(name)
    for name, folder in case.folders.items():
        package.load_adapter(folder, name)
    return package


def check(case: Case, names: Sequence[str | None], inputs: dict[str, Tensor], got: Tensor) -> None:
    want = case.expected(names, inputs)
    assert error(valid(inputs, got), valid(inputs, want)) <= TOLERANCE
    base = case.expected([None] * len(names), inputs)
    changed = [error(want[row], base[row]) > 100 * TOLERANCE for row in range(len(names))]
    assert changed == [name is not None for name in names]


@pytest.mark.parametrize("name", ["oft", "lokr"])
def test_other_methods_have_no_room(
    package: lorafx.Package, case: Case, name: str, tmp_path: Path
) -> None:
    configs = {"oft": peft.OFTConfig(oft_block_size=4, target_modules=["q_proj"])}
    configs["lokr"] = peft.LoKrConfig(r=64, alpha=3, target_modules=["q_proj"])
    folder, before = method_files.save(case.base, configs[name], tmp_path), package.adapters
    with pytest.raises(lorafx.CapacityError, match=r"no room .*q_proj; packages .*export_merged"):
        package.load_adapter(folder, name)
    assert package.adapters == before


@pytest.mark.parametrize(
    ("names", "length"),
    [
        (["a1", None, "a0"], 5),
        (["a3", "a3", None, "a1", "a3"], 7),
        ([None, None], 4),
        (["a3"], 6),
        (["a2", "a3"], 1),
        (["a1"], 1),
    ],
)
def test_rows_are_those_of_dense_merges(
    fresh: lorafx.Package, case: Case, names: list[str | None], length: int
) -> None:
    inputs = token_inputs(len(names), length)
    check(case, names, inputs, fresh(**inputs, adapter_names=names)["logits"])


def test_adapters_take_turns_in_the_slots(fresh: lorafx.Package, case: Case) -> None:
    inputs = token_inputs(3, 5)
    for names in (["a0", "a1", "a2"], ["a3", None, "a4"], ["a1", "a2", "a3"]):
        check(case, names, inputs, fresh(**inputs, adapter_names=names)["logits"])
    with pytest.raises(lorafx.CapacityError, match="3 slots"):
        fresh(**token_inputs(4, 5), adapter_names=["a0", "a1", "a2", "a3"])


def test_a_smaller_adapter_takes_the_slot_of_a_larger_one(
    fresh: lorafx.Package, case: Case
) -> None:
    inputs = token_inputs(1, 5)
    fresh(**inputs, adapter_names=["a1"])  # rank 5, on all linears
    fresh.load_adapter(case.folders["a0"], "a1")  # rank 2, on two of them
    check(case, ["a0"], inputs, fresh(**inputs, adapter_names=["a1"])["logits"])


def test_a_row_does_not_depend_on_its_neighbours(fresh: lorafx.Package) -> None:
    inputs = token_inputs(3, 5)
    one = fresh(**inputs, adapter_names=["a1", "a0", None])["logits"]
    other = fresh(**inputs, adapter_names=["a1", "a3", "a3"])["logits"]
    assert torch.equal(one[0], other[0])


@pytest.mark.slow
def test_bfloat16(tmp_path: Path) -> None:
    """Quick is Inductor's graph of this model: `test_bfloat16` of test_attention_on_cpu.py."""

    def serve(
        base: nn.Module,
        folders: dict[str, Path],
        inputs: dict[str, Tensor],
        names: list[str | None],
    ) -> Tensor:
        example, path = {**inputs, "use_cache": False}, tmp_path / "llama.pt2"
        package = lorafx.load(lorafx.export(base, folders, example, path))
        for name, folder in folders.items():
            package.load_adapter(folder, name)
        logits: Tensor = package(**inputs, adapter_names=names)["logits"]
        return logits

    check_bfloat16(tmp_path, serve)


def test_sums_of_adapters(fresh: lorafx.Package, case: Case) -> None:
    inputs = token_inputs(2, 5)
    names: list[Any] = [{"a0": 1.0}, {"a0": 0.5}]
    got = fresh(**inputs, adapter_names=names)["logits"]
    check(case, ["a0"], {k: v[:1] for k, v in inputs.items()}, got[:1])
    assert not torch.allclose(got[1], fresh(**inputs, adapter_names=["a0", "a0"])["logits"][1])


@pytest.mark.parametrize(
    ("change", "kind", "match"),
    [
        ({"input_ids": None}, lorafx.ConfigError, "input_ids is a NoneType"),
        ({"input_ids": torch.full((2, 5), VOCAB)}, lorafx.OutOfRangeError, "input_ids points"),
        ({"input_ids": torch.full((2, 5), -1)}, lorafx.OutOfRangeError, f"{VOCAB} entries"),
        ({"input_ids": torch.ones(2, 5)}, lorafx.BatchError, "give int64 on a CPU"),
        ({"input_ids": torch.ones(3, 5).long()}, lorafx.BatchError, "batch = 3"),
        ({"input_ids": torch.ones(5).long()}, lorafx.BatchError, "has shape"),
        ({"input_ids": torch.ones(2, 0).long()}, lorafx.BatchError, "holds nothing"),
        (
            {"labels": torch.ones(2, 5).long()},
            lorafx.ConfigError,
            "unexpected keyword argument 'labels'",
        ),
        ({"adapter_names": ["a0"]}, lorafx.BatchError, "1 entry, but the batch has 2"),
        ({"adapter_names": []}, lorafx.BatchError, "adapter_names is empty"),
        ({"adapter_names": "a0"}, lorafx.ConfigError, "must be a list"),
        ({"adapter_names": ["a0", "sql"]}, lorafx.UnknownAdapterError, "no adapter named 'sql'"),
    ],
)
def test_bad_calls_are_refused_and_good_ones_served_after(
    fresh: lorafx.Package,
    case: Case,
    change: dict[str, Any],
    kind: type[lorafx.LorafxError],
    match: str,
) -> None:
    inputs = token_inputs(2, 5)
    with pytest.raises(kind, match=match):
        fresh(**{**inputs, **change})
    with pytest.raises(lorafx.ConfigError, match="missing a required argument: 'attention_mask'"):
        fresh(inputs["input_ids"])
    check(case, ["a0", None], inputs, fresh(*inputs.values(), adapter_names=["a0", None])["logits"])


def test_adapters_that_do_not_fit_are_refused(
    fresh: lorafx.Package, case: Case, tmp_path: Path
) -> None:
    saved = {
        f"base_model.model.model.layers.0.self_attn.z_proj.lora_{letter}.weight": torch.ones(shape)
        for letter, shape in (("A", (2, 24)), ("B", (24, 2)))
    }
    elsewhere = lorafx.AdapterSource(saved, config={"r": 2, "lora_alpha": 2})
    for source, kind, match in (
        (tmp_path, lorafx.CheckpointError, "adapter_config.json|no adapter"),
        (elsewhere, lorafx.CheckpointError, "z_proj"),
        (
            save_adapter(case.base, tmp_path / "wide", rank=9, targets=["q_proj"], seed=1),
            lorafx.CapacityError,
            "9",
        ),
    ):
        with pytest.raises(kind, match=match):
            fresh.load_adapter(source, "new")
    with pytest.raises(lorafx.UnknownAdapterError):
        fresh.unload_adapter("new")


def test_what_is_no_package_is_refused(tmp_path: Path) -> None:
    for name, content in (("absent.pt2", None), ("text.pt2", b"text")):
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(lorafx.CheckpointError, match="cannot be loaded as a package"):
            lorafx.load(tmp_path / name)


ALONE = """
import sys
import torch
import lorafx

package = lorafx.load(sys.argv[1])
*folders, inputs, outputs = sys.argv[2:]
for name, folder in zip("ab", folders):
    package.load_adapter(folder, name)
inputs = torch.load(inputs)
results = [package(**inputs, adapter_names=["a", None, "b"])["logits"]]
package.load_adapter(folders[0], "b")
results.append(package(**inputs, adapter_names=["a", None, "b"])["logits"])
torch.save(results, outputs)
compiler = ("lorafx.api", "lorafx.capture", "lorafx.compiled_model", "lorafx.pass_order")
found = {"transformers", "peft", "torch._inductor.compile_fx", *compiler} & set(sys.modules)
assert not found, found
"""


def test_a_process_without_transformers_and_the_compiler(
    path: str, case: Case, tmp_path: Path
) -> None:
    inputs = token_inputs(3, 6)
    torch.save(inputs, tmp_path / "inputs.pt")
    folders = [case.folders["a1"], case.folders["a3"]]
    files = [path, *folders, tmp_path / "inputs.pt", tmp_path / "outputs.pt"]
    subprocess.run([sys.executable, "-c", ALONE, *map(str, files)], check=True, timeout=LONG)
    mixed, exchanged = torch.load(tmp_path / "outputs.pt")
    check(case, ["a1", None, "a3"], inputs, mixed)
    check(case, ["a1", None, "a1"], inputs, exchanged)


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """examples/package.cpp, built."""
    built, folder = tmp_path_factory.mktemp("built") / "package", Path(torch.__file__).parent
    libraries = ["-ltorch", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{folder / 'lib'}"]
    subprocess.run(
        [
            *(find_compiler(), "-std=c++20", "-O0", str(ROOT / "examples" / "package.cpp")),
            *(f"-I{folder / 'include'}", f"-L{folder / 'lib'}", "-o", str(built), *libraries),
        ],
        check=True,
        timeout=LONG,
    )
    return built


def run_in_cpp(
    program: Path, path: str, banks: Path, inputs: list[Tensor], folder: Path
) -> subprocess.CompletedProcess[str]:
    torch.save(inputs, folder / "inputs.pt")
    files = [path, banks, folder / "inputs.pt", folder / "outputs.pt"]
    return subprocess.run(
        [program, *files], capture_output=True, text=True, timeout=LONG, env={**os.environ}
    )


@pytest.mark.slow
def test_cpp_runs_it_and_exchanges_adapters(
    program: Path, path: str, fresh: lorafx.Package, case: Case, tmp_path: Path
) -> None:
    inputs = token_inputs(4, 6)
    for names in (["a1", "a0"], ["a3", "a1"]):
        slots = fresh.save_banks(tmp_path / "banks.pt", names)
        rows = [names[0], None, names[1], names[0]]
        numbers = [-1 if name is None else slots[name] for name in rows]
        given = [torch.tensor(numbers, dtype=torch.int32), *inputs.values()]
        done = run_in_cpp(program, path, tmp_path / "banks.pt", given, tmp_path)
        assert not done.returncode, done.stderr
        (logits,) = torch.load(tmp_path / "outputs.pt", weights_only=False)
        check(case, rows, inputs, logits)


@pytest.mark.slow
def test_cpp_gets_an_error_for_a_slot_or_an_id_out_of_range(
    program: Path, path: str, fresh: lorafx.Package, tmp_path: Path
) -> None:
    fresh.save_banks(tmp_path / "banks.pt", ["a0"])
    ids, mask = token_inputs(2, 5).values()
    for slot, tokens, message in (
        (3, ids, "a slot is outside of -1 to 2"),
        (0, ids + VOCAB, "input_ids points outside"),
    ):
        given = [torch.tensor([slot, -1], dtype=torch.int32), tokens, mask]
        done = run_in_cpp(program, path, tmp_path / "banks.pt", given, tmp_path)
        assert done.returncode == 1
        assert message in done.stderr
