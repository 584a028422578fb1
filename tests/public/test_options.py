"""Options, the forms of `lora_config`, adapters by name, what explain and the dumps say; passes of
the user's own among lorafx's, and what tells of a pass that is wrong."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from dense_merge import REFERENCE, Case, check_mixed, error, save_adapter
from tiny_models import FAMILIES
from torch import fx, nn

import lorafx
from lorafx.errors import ProvenanceError, VerifyError
from lorafx.op_arguments import bound
from lorafx.program.context import FUSED_OP, SITE_OP, Context

NAMES = ["a1", None, "a3", "a0"]


@pytest.fixture(scope="module")
def inputs():
    torch.manual_seed(0)
    return FAMILIES["plain"].inputs(len(NAMES), 4)


def edits(cm: Any) -> dict[str, int]:
    return {item.name: item.edits for item in cm._session.backend.records[-1].passes}


def forms(cm: Any) -> set[str]:
    return {state.form for state in cm._session.backend.records[-1].states}


# Passes
@pytest.mark.parametrize(
    ("passes", "left"),
    [
        ({}, {"packed", "fused", "mark"}),
        ({"pack": False}, {"fused", "mark"}),
        ({"fuse": False}, {"mark"}),
        ({"plan": False}, {"packed", "fused", "mark"}),
        ({"fuse": False, "pack": False, "plan": False}, {"mark"}),
    ],
)
def test_the_same_numbers_without_a_pass(plain, inputs, passes, left):
    cm = plain.compile(options={"passes": passes})
    check_mixed(cm, plain, NAMES, inputs)
    assert forms(cm) == left
    assert not {name for name, on in passes.items() if not on} & set(edits(cm))


def test_without_provenance_mixed_batches_are_refused(plain, inputs):
    cm = plain.compile(options={"passes": {"provenance": False}})
    check_mixed(cm, plain, ["a1"] * 4, inputs)
    assert torch.equal(cm(**inputs)["logits"], plain.base(**inputs)["logits"])
    with pytest.raises(ProvenanceError, match=r"not proved"):
        cm(**inputs, adapter_names=NAMES)


# Dumps
def dumped(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "graph-0-lora").iterdir())


BEGINS = ["traced", "captured"]  # Dynamo's graph, and AOTAutograd's
STAGES = ["traced", "check_lookups", "detach_results", "fold", "captured", "look_up_slots"]
STAGES += ["write_in_place", "match", "give_out", "provenance", "gate", "rescale"]
STAGES += ["replace_rows", "attend", "attend_dense", "fuse", "pack", "plan", "lower", "products"]
STAGES += ["join", "check_order", "outline", "write_back", "joint_graph", "copy_returned_inputs"]


def test_dumps(plain, inputs, tmp_path, monkeypatch):
    monkeypatch.setenv("LORAFX_DUMP", str(tmp_path / "environment"))
    cm = plain.compile()
    cm(**inputs, adapter_names=NAMES)
    monkeypatch.delenv("LORAFX_DUMP")
    by_option = plain.compile(options={"dump": str(tmp_path / "option")})
    by_option(**inputs, adapter_names=NAMES)
    assert cm.dump(tmp_path / "method") == tmp_path / "method"
    expected = sorted(
        [f"{i:02d}-{name}.py" for i, name in enumerate(STAGES)]
        + [f"{i:02d}-{name}.diff" for i, name in enumerate(STAGES) if name not in BEGINS]
    )
    for folder in ("environment", "option", "method"):
        assert dumped(tmp_path / folder) == expected
        assert "sites: 5" in (tmp_path / folder / "explain.txt").read_text()
        assert {"index.html", "model.txt"} <= {path.name for path in (tmp_path / folder).iterdir()}
    text = (tmp_path / "method" / "graph-0-lora" / "16-pack.diff").read_text()
    assert text.startswith("# graph 0 lora, after pack: 2 edits")
    assert "+" in text
    assert "lorafx.fused_linear" in text


def test_explain(plain, inputs):
    cm = plain.compile(dynamic=True)
    cm(**inputs, adapter_names=NAMES)
    cm(**inputs)
    text = str(cm.explain())
    for line in (
        "sites: 5",
        "up: Linear, 12 -> 20, float32",
        "embed: Embedding, 61 -> 12, float32",
        "8 slots of rank up to 8",
        "(root): [up, gate, head], ",
        "a3: rank 8, 2 sites, slot",
        "a4: rank 1, 1 sites, in host memory",
        "graphs: 2",
        "graph 0 lora",
        "graph 1 base",
        "pack (root): [up, gate]",
        "plan: aten",
        "ids.shape[1] rows for each request",
        "serves calls with adapters, slots per request, the whole call, several requests",
        "compiled in ",
    ):
        assert line in text, line
    assert "refused" not in text


class Chosen(nn.Module):
    """Rows in an order that the caller gives."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
        return self.up(x[order])


def test_explain_tells_of_refusals(tmp_path):
    folder = save_adapter(Chosen(), tmp_path / "a", rank=2, targets=["up"])
    cm = lorafx.compile(Chosen(), {"a": folder}, options=REFERENCE)
    x, order = torch.randn(3, 4), torch.tensor([2, 0, 1])
    cm(x, order, adapter_names=["a"] * 3)
    text = str(cm.explain())
    assert "no row map: " in text
    assert "refused (mixed): up: " in text
    with pytest.raises(ProvenanceError, match="at up it is not proved"):
        cm(x, order, adapter_names=["a", None, "a"])


# Forms of the configuration
def test_example_inputs_that_fail_leave_the_model_unmarked(plain):
    model = plain.model()
    with pytest.raises(TypeError, match="no_such_argument"):
        lorafx.compile(model, plain.folders, example_inputs={"no_such_argument": torch.ones(1)})
    assert not any(module._forward_hooks for module in model.modules())


def test_example_inputs_capture_at_once(plain, inputs):
    for example in (inputs, list(inputs.values())):
        cm = plain.compile(example_inputs=example)
        assert cm.recompiles == 2
        check_mixed(cm, plain, NAMES, inputs)
        assert torch.equal(cm(**inputs)["logits"], plain.base(**inputs)["logits"])
        assert cm.recompiles == 2


def test_forms_of_lora_config(plain, inputs):
    folder = plain.folders["a1"]
    one = {"one": folder}
    config = lorafx.LoraConfig(target_modules="all-linear", max_rank=8, max_adapters=3)
    every = peft.LoraConfig(r=8, lora_alpha=16, target_modules=["up", "gate", "down", "head"])
    cases = [
        ((one,), {}, "one"),
        ((str(folder),), {}, "default"),
        ((folder,), {}, "default"),
        ((config,), {"adapters": one}, "one"),
        ((None,), {"adapters": one}, "one"),
        ((every,), {"adapters": one}, "one"),
        ((every.to_dict(),), {"adapters": one}, "one"),
        (({"r": 8, "lora_alpha": 16, "target_modules": "all-linear"},), {"adapters": one}, "one"),
    ]
    bare = lorafx.compile(plain.model(), options=REFERENCE)
    want = plain.expected(["a1", None, "a1", "a1"], inputs)
    sites = {"up", "gate", "down", "head"}
    assert ({site.path for site in bare.sites}, bare.adapters) == (sites, ())
    for args, kwargs, name in cases:
        cm = lorafx.compile(plain.model(), *args, **kwargs, options=REFERENCE)
        assert cm.adapters == (name,)
        assert {site.path for site in cm.sites} == sites
        if args[0] in (one, folder, config):  # the other forms make the same program
            got = cm(**inputs, adapter_names=[name, "__base__", name, name])["logits"]
            assert error(got, want) <= 1e-5


def test_a_model_in_training_mode_is_warned_about():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Dropout())
    with pytest.warns(lorafx.LorafxWarning, match="training mode") as told:
        cm = lorafx.compile(model, lorafx.LoraConfig(target_modules=["0"]))
    assert [each.filename for each in told] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not cm.eval().training
    with pytest.warns(lorafx.LorafxWarning, match="Sequential is in training mode") as told:
        assert cm.train() is cm
    assert [each.filename for each in told] == [__file__]
    assert cm._orig_mod.training


def test_without_a_compiler_the_model_runs_in_aten(monkeypatch):
    def absent():
        raise lorafx.LoweringError("no C++ compiler was found")

    monkeypatch.setattr("lorafx.runtime.marking.check_compiler", absent)
    model = torch.nn.Sequential(torch.nn.Linear(4, 4)).eval()
    with pytest.warns(lorafx.LorafxWarning, match="no C\\+\\+ compiler"):
        cm = lorafx.compile(copy.deepcopy(model), lorafx.LoraConfig(target_modules=["0"]))
    x = torch.randn(3, 4)
    assert torch.equal(cm(x), model(x))


def doubles(gm: fx.GraphModule, ctx: Context) -> int:
    """Every fused node gives twice its result."""
    for node in gm.graph.find_nodes(op="call_function", target=FUSED_OP):
        with gm.graph.inserting_after(node):
            twice = ctx.call(gm.graph, torch.ops.aten.mul.Tensor, (node, 2.0))
        node.replace_all_uses_with(twice, delete_user_cb=lambda user, own=twice: user is not own)
    return 1


def loses(gm: fx.GraphModule, ctx: Context) -> int:
    """Drops the LoRA of every site that is still a mark."""
    for node in gm.graph.find_nodes(op="call_function", target=SITE_OP):
        node.replace_all_uses_with(bound(node)["y"])
        gm.graph.erase_node(node)
    return 1


def reshapes(gm: fx.GraphModule, ctx: Context) -> int:
    """The graph's output gets another shape."""
    output = gm.graph.output_node()
    (result, *rest) = output.args[0]
    with gm.graph.inserting_before(output):
        flat = ctx.call(gm.graph, torch.ops.aten.view.default, (result, [-1]))
    output.args = ((flat, *rest),)
    return 1


def failing(plain: Case, inputs: Any, **options: Any) -> str:
    with pytest.raises(Exception, match="pass") as caught:
        plain.compile(options=options)(**inputs, adapter_names=NAMES)
    found: BaseException | None = caught.value
    while found is not None and not isinstance(found, VerifyError):
        found = found.__cause__ or getattr(found, "inner_exception", None)
    assert found is not None, caught.value
    return str(found)


def test_passes_of_the_users_own_run_where_they_are_placed(plain, inputs):
    order: list[str] = []

    def noting(name: str) -> Any:
        def run(gm: fx.GraphModule, ctx: Context) -> int:
            sites = len([node for node in gm.graph.nodes if node.target is SITE_OP])
            order.append(f"{name}, {'sites' if sites else 'no sites'}")
            return 0

        return run

    own = {
        "first": lorafx.After("captured", noting("first")),
        "behind_fuse": lorafx.After("fuse", noting("behind fuse")),
        "last": lorafx.After("behind_fuse", noting("last")),
    }
    cm = plain.compile(options={"passes": {**own, "pack": False}})
    check_mixed(cm, plain, NAMES, inputs)
    assert order == ["first, sites", "behind fuse, no sites", "last, no sites"]
    report = [line.split(":")[0] for line in str(cm.explain()).splitlines()]
    at = [report.index(f"  {name}") for name in ("first", "match", "fuse", "behind_fuse", "last")]
    assert at == sorted(at)
    listed = str(lorafx.pipeline(lorafx.Options(passes={**own, "pack": False})))
    assert "  behind_fuse" in listed
    assert listed.splitlines()[-1] == "  pack                  (off)"


def test_what_the_users_own_pass_breaks_is_told(plain, inputs):
    own = {"doubles": lorafx.After("fuse", doubles)}
    message = failing(plain, inputs, verify="numeric", passes=own)
    assert "after pass 'doubles' output 0 differs by" in message
    assert "leave 'doubles' out of Options.passes" in message
    assert "False" not in message, "a pass of the user's own cannot be switched off"
    got = plain.compile(options={"passes": own})(**inputs, adapter_names=NAMES)["logits"]
    assert error(got, plain.expected(NAMES, inputs)) > 1e-2


@pytest.mark.parametrize(
    ("passes", "told"),
    [
        ({"mine": lorafx.After("fuze", doubles)}, r"'mine' is placed after 'fuze'.*nearest"),
        ({"fuse": lorafx.After("match", doubles)}, "'fuse' is the name of a pass of lorafx"),
        ({"read": lorafx.After("match", doubles)}, "'read' is the name of a pass of lorafx"),
        (
            {
                "a": lorafx.After("b", doubles),
                "b": lorafx.After("a", doubles),
            },
            "a, b are placed after one another",
        ),
        ({"mine": True}, r"unknown pass 'mine'.*lorafx.After"),
    ],
)
def test_passes_that_have_no_place(plain, passes, told):
    with pytest.raises(lorafx.ConfigError, match=told):
        plain.compile(options={"passes": passes})
    with pytest.raises(lorafx.ConfigError, match=told):
        lorafx.pipeline(lorafx.Options(passes=passes))


def test_a_pass_that_does_not_say_what_it_did(plain, inputs):
    own = {"silent": lorafx.After("match", lambda gm, ctx: None)}
    with pytest.raises(lorafx.ConfigError, match="'silent' returned None; it has to return how"):
        plain.compile(options={"passes": own})(**inputs, adapter_names=NAMES)


def test_a_pass_of_the_users_own_that_raises_is_told(plain, inputs):
    def raises(gm: fx.GraphModule, ctx: Context) -> int:
        raise RuntimeError("not today")

    cm = plain.compile(options={"passes": {"mine": lorafx.After("match", raises)}})
    told = r"the pass 'mine' failed .*not today.*leave 'mine' out of Options\.passes\."
    with pytest.raises(lorafx.CaptureError, match=told):
        cm(**inputs, adapter_names=NAMES)


def test_lint_names_the_pass_that_lost_a_site(plain, inputs):
    message = failing(plain, inputs, passes={"loses": lorafx.After("provenance", loses)})
    assert message.startswith("pass 'loses' broke a promise of every pass, \"no site is lost\": ")
    assert "gate" in message


def test_lint_names_the_pass_that_changed_an_output(plain, inputs):
    message = failing(plain, inputs, passes={"reshapes": lorafx.After("match", reshapes)})
    assert "pass 'reshapes' broke a promise of every pass, \"the outputs keep" in message


@pytest.mark.parametrize("names", [["a1"] * 4, NAMES])
def test_numeric_verification_passes_what_is_right(plain, inputs, names):
    check_mixed(plain.compile(options={"verify": "numeric"}), plain, names, inputs)
