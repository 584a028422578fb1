"""A new user's notebook: habits of PEFT, transformers and torch.compile, one after another.

    python notebook.py EXAMPLES        the folder of examples of the repository

It is a script of its own, so that the same cells run from an installed wheel, far from a checkout.
"""

import copy
import logging
import pickle
import sys
from pathlib import Path

import lorafx

home = Path(sys.argv[1])
assert lorafx.__version__.count(".") == 2
assert "torch" not in sys.modules  # nothing has been asked for yet

import peft  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402

shown: list[str] = []
logging.getLogger("transformers.pipelines").handlers = [logging.Handler()]
logging.getLogger("transformers.pipelines").handlers[0].emit = lambda r: shown.append(r.msg)


def refused(call, *words, error: type[BaseException] = lorafx.LorafxError) -> None:
    """The cell raises, at once, and what it says names the way out."""
    try:
        call()
    except error as found:
        said = str(found)
    else:
        said = ""
    missing = [word for word in words if word not in said]
    assert said, f"nothing was raised: {words}"
    assert not missing, f"{missing} not in: {said}"
    assert len(said) < 600, "a page of text"


load = transformers.AutoModelForCausalLM.from_pretrained
model, plain = load(home / "demo_model").eval(), load(home / "demo_model").eval()
# Calls are of one size here, and a graph of fixed sizes is captured in half the time.
options = {"options": {"lowering": "reference"}, "dynamic": False}
adapters = home / "demo_adapters"
folders = [adapters / "reverse", adapters / "upper"]

# A list of folders, a mode of torch.compile.
refused(lambda: lorafx.compile(model, folders, mode="fastest"), "reduce-overhead")
refused(lambda: lorafx.compile(model, [folders[0]] * 2), "two adapters", "'reverse'")
refused(lambda: lorafx.compile(model, adapters=[torch.ones(9)]), "Tensor", "name -> adapter")
cm = lorafx.compile(model, folders, mode="max-autotune", **options)
ids = torch.arange(3, 15).view(2, 6)
mask = torch.ones_like(ids)


def logits(run=cm, **named):
    with torch.no_grad():
        return run(input_ids=ids, attention_mask=mask, **named).logits


def same(a, b) -> bool:
    return bool((a - b).abs().max() <= 1e-5)


base, mixed = logits(plain), logits(adapter_names=["reverse", "upper"])
assert same(logits(), base)
assert not same(mixed, base)
first, second = (logits(adapter_names=[name] * 2) for name in ("reverse", "upper"))
assert same(mixed, torch.cat((first[:1], second[1:])))

tuned = peft.PeftModel.from_pretrained(copy.deepcopy(plain), adapters / "reverse")
assert same(logits(tuned), first)

# The cell runs again.
refused(lambda: lorafx.compile(model, folders, **options), "load_adapter()", "lorafx.detach(model)")
refused(lambda: lorafx.compile(cm, folders, **options), "already compiled", "lorafx.detach(model)")
refused(lambda: lorafx.attach(model, folders), "lorafx.detach(model)")
assert lorafx.detach(model) is model
refused(logits, "detached", "lorafx.compile")
cm = lorafx.compile(model, adapters=folders, **options)
assert same(logits(cm, adapter_names=["reverse", "upper"]), mixed)

# PEFT's names.
assert cm.list_adapters() == ["reverse", "upper"]
assert (cm.active_adapter, cm.active_adapters, cm.active_adapters()) == (None, (), ())
cm.set_adapter("reverse")
assert (cm.active_adapter, cm.active_adapters) == ("reverse", ("reverse",))
assert same(logits(cm), first)
with cm.disable_adapter():
    assert same(logits(cm), base)
    assert same(logits(cm, adapter_names=["reverse", "upper"]), mixed)
assert same(logits(cm), first)
cm.set_adapter(["upper"])
assert same(logits(cm), second)
refused(lambda: cm.set_adapter(["reverse", "upper"]), "sum of the ranks", "(max_rank=")
refused(lambda: cm.set_adapter([]), "None for the base model")
cm.load_adapter(str(adapters / "reverse"), adapter_name="again")
assert same(logits(cm, adapter_names=["again"] * 2), first)
cm.load_adapter(adapters / "upper")
assert cm.list_adapters() == ["reverse", "upper", "again", "default"]
refused(lambda: cm.load_adapter(adapters / "reverse"), "'default' is loaded already")
refused(lambda: cm.load_adapter(adapters / "reverse", "a", adapter_name="b"), "differ")
refused(lambda: cm.load_adapter(plain, "other"), "folder", "not from a LlamaForCausalLM")
refused(lambda: cm.load_adapter("nobody/nothing", "hub"), "nobody/nothing")
found = cm.get_adapter("again")
assert (found.name, found.slot is None, found.pinned) == ("again", False, False)
assert found.rank == 16
assert found.sites
assert found.source.startswith(str(adapters / "reverse"))
cm.delete_adapter("again")
refused(lambda: cm.get_adapter("again"), "no adapter named 'again'", error=ValueError)
cm.set_adapter(None)
refused(lambda: cm.merge_and_unload(), "export_merged(name, folder)", error=AttributeError)
refused(lambda: cm.peft_config, "get_adapter(name)", error=AttributeError)
assert not hasattr(cm, "add_weighted_adapter")

# transformers' mixin.
refused(lambda: cm.add_adapter(None), "load_adapter(folder, name)")
refused(lambda: cm.disable_adapters(), "set_adapter(None)", "disable_adapter()")
refused(lambda: cm.enable_adapters(), "set_adapter(name)")

# lorafx's other way in.
refused(lambda: lorafx.adapters(cm, ["reverse", None]).__enter__(), "adapter_names=[...]")
refused(lambda: lorafx.adapters(model, "reverse").__enter__(), "adapter_names=[...]")
refused(lambda: lorafx.load_adapter(cm, adapters / "reverse", "x"), "load_adapter(folder, name)")

# torch.compile.
refused(cm.compile, "call it as it is", "mode=...", 'backend="lorafx"')
graphs = cm.recompiles
assert same(logits(torch.compile(cm, backend="eager"), adapter_names=["reverse", "upper"]), mixed)
step = torch.compile(lambda names: logits(cm, adapter_names=names) * 2, backend="eager")
assert same(step(["reverse", "upper"]), mixed * 2)
assert cm.recompiles == graphs

# Copies.
refused(lambda: copy.deepcopy(cm), "before it is compiled", "lorafx.detach(copy.deepcopy(")
refused(lambda: copy.copy(cm), "cannot be copied")
refused(lambda: pickle.dumps(cm), "pickled")
assert same(logits(lorafx.detach(copy.deepcopy(cm._orig_mod))), base)

# transformers' pipeline.
tokenizer = transformers.AutoTokenizer.from_pretrained(home / "demo_model")
pipe = transformers.pipeline("text-generation", model=cm, tokenizer=tokenizer)
cm.set_adapter("reverse")
[said] = pipe("a b", max_new_tokens=3, do_sample=False)
ids = tokenizer("a b", return_tensors="pt")
want = cm.generate(**ids, max_new_tokens=3, do_sample=False, adapter_names=["reverse"])
assert said["generated_text"] == tokenizer.decode(want[0], skip_special_tokens=True)
assert not any("not supported" in text for text in shown), shown
print(repr(cm)[:14], Path(lorafx.__file__).parent)
