"""How soon a process answers, and how fast from then on: lorafx beside PEFT and torch.compile.

    python benchmarks/first_answer.py [--case NAME] [--arm NAME] [--steps] [--out FILE]

Each start is a process of its own. It makes a random model and then has four requests, of two
adapters that PEFT saved (rank 16, B not zero) and of none, answered again and again: calls of
`generate` of a causal model, a prompt of 7 tokens and 64 more, or forwards of a BERT. Time begins
when the libraries are imported and the model is made, so it covers what serving needs besides:
reading of adapters, `lorafx.compile` or PEFT's set-up, late imports.

    first      seconds to the first token (of a BERT, the logits), the median of `--turns` starts,
               which take turns among the arms; `of call` counts from the first call, `from start`
               from the start of the process
    generate   seconds to the 16th and the 64th token of the first `generate`, medians as above, and
               the longest of its steps over the median one
    tokens     answered in the first 10, 30 and 60 seconds (of a BERT, sequences)
    serves     seconds until steps take what they take at the end
    step       of the end, in milliseconds

The arms are PEFT, eagerly; torch.compile of the base without adapters; lorafx as it is by default,
whose folder of saved graphs is empty; lorafx that waits for its graphs; and a second start of
lorafx, which finds those graphs. Answers of lorafx are compared with PEFT's.

Then, in one process, a decode step of lorafx's eager tier over PEFT's of the same batch.
"""

from __future__ import annotations

import argparse
import compileall
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest import mock

RESULTS = Path("benchmarks/results/first_answer.json")
#: Of each model.
SIZES: dict[str, Any] = {
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "vocab_size": 4096,
    "max_position_embeddings": 512,
}
NAMES: tuple[str | None, ...] = ("a", None, "b", "a")
PROMPT, NEW = 7, 64  # tokens
WINDOWS = (10, 30, 60)
FIRSTS = ("first", "of call", "from start")
GENERATES = ("16 tokens", "64 tokens", "longest step")
#: Seconds after which a compiler that has not ended is not waited for.
PATIENCE = 400.0
#: How far logits may be from PEFT's, in their largest.
TOLERANCES = {"float32": 1e-4, "bfloat16": 0.05}
#: What a step may take of the last ones' time when the graphs serve, the median of five.
STEADY = 1.3


# --- models ---


@dataclass(frozen=True)
class Case:
    """A model, and what PEFT adapts. `answers`: "tokens" of `generate`, or "logits" of forwards.
    `int8`: torchao has quantised the weights of its layers."""

    family: str
    layers: int
    targets: str
    answers: str = "tokens"
    dtype: str = "float32"
    int8: bool = False

    def model(self) -> Any:
        import torch
        import transformers

        torch.manual_seed(0)
        sizes = {**SIZES, "num_hidden_layers": self.layers}
        if self.family == "Bert":
            model = transformers.BertForSequenceClassification(transformers.BertConfig(**sizes))
        else:
            sizes["vocab_size"] = 32000
            if self.family == "Qwen3Moe":
                sizes |= {"moe_intermediate_size": 256, "num_experts": 8, "head_dim": 64}
            config = getattr(transformers, f"{self.family}Config")(**sizes)
            model = getattr(transformers, f"{self.family}ForCausalLM")(config)
        model = model.to(getattr(torch, self.dtype)).eval().requires_grad_(False)
        if self.int8:
            from torchao.quantization import Int8WeightOnlyConfig, quantize_

            quantize_(model.model, Int8WeightOnlyConfig())
        return model

    def adapters(self, folder: Path) -> dict[str, str]:
        return {name: str(folder / name) for name in sorted({name for name in NAMES if name})}


CASES = {
    "Llama, 4 layers": Case("Llama", 4, r".*layers.*_proj"),
    "Llama, 4 layers, bfloat16": Case("Llama", 4, r".*layers.*_proj", dtype="bfloat16"),
    "Llama, 4 layers, int8": Case("Llama", 4, r".*layers.*_proj", int8=True),
    "Llama, 16 layers": Case("Llama", 16, r".*layers.*_proj"),
    "Llama, 16 layers, bfloat16": Case("Llama", 16, r".*layers.*_proj", dtype="bfloat16"),
    "Llama, 32 layers": Case("Llama", 32, r".*layers.*_proj"),
    "Qwen3-MoE, 4 layers": Case("Qwen3Moe", 4, r".*_attn\.\w+_proj"),
    "BERT, 12 layers": Case("Bert", 12, r".*\.(query|key|value|dense)", answers="logits"),
}


def save_adapters(case: str, folder: str) -> None:
    """Adapters of the case, as PEFT saves them."""
    import torch
    from peft import LoraConfig, get_peft_model

    for number, path in enumerate(CASES[case].adapters(Path(folder)).values()):
        model = replace(CASES[case], int8=False).model()
        torch.manual_seed(1 + number)
        lora = LoraConfig(r=16, target_modules=CASES[case].targets, init_lora_weights=False)
        get_peft_model(model, lora).save_pretrained(path)


# --- arms ---

#: Sets the model up, and returns it with arguments of its calls and whether it still compiles.
Served = tuple[Any, dict[str, Any], Callable[[], bool]]


def with_peft(model: Any, adapters: dict[str, str]) -> Served:
    from peft import PeftModel

    (first, path), *others = adapters.items()
    served = PeftModel.from_pretrained(model, path, adapter_name=first)
    for name, path in others:
        served.load_adapter(path, name)
    served.eval()
    return served, {"adapter_names": [name or "__base__" for name in NAMES]}, lambda: False


def torch_compiled(model: Any, adapters: dict[str, str]) -> Served:
    import torch

    model.forward = torch.compile(model.forward)
    return model, {}, lambda: False


def with_lorafx(model: Any, adapters: dict[str, str], start: str = "auto") -> Served:
    import lorafx

    served = lorafx.compile(model, adapters, options={"start": start})
    return served, {"adapter_names": list(NAMES)}, lambda: bool(served.status().compiling)


def compiled_by_lorafx(model: Any, adapters: dict[str, str]) -> Served:
    return with_lorafx(model, adapters, "compiled")


ARMS: dict[str, Callable[[Any, dict[str, str]], Served]] = {
    "PEFT": with_peft,
    "torch.compile, no adapters": torch_compiled,
    "lorafx": with_lorafx,
    "lorafx, second start": with_lorafx,
    'lorafx, start="compiled"': compiled_by_lorafx,
}
AFTER = {"lorafx, second start": "lorafx"}  # in the cache folders that this one has filled
#: Those whose first answer waits for a compiler, of which one start is enough.
COMPILES = ("torch.compile, no adapters", 'lorafx, start="compiled"')


# --- one start ---


@dataclass
class Clock:
    """Notes when answers come, as a stopping criterion of `generate`."""

    begin: float
    until: float
    least: int
    #: The end of each step, and whether it was a prompt's, whose time is another.
    steps: list[tuple[float, bool]] = field(default_factory=list)
    prompt: bool = True

    def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
        self.note()
        return input_ids.new_full((len(input_ids),), self.ended, dtype=bool)

    def note(self) -> None:
        self.steps.append((time.perf_counter() - self.begin, self.prompt))
        self.prompt = False

    @property
    def ended(self) -> bool:
        """Whether the last answer came late enough, and what steps take at the end is known."""
        return self.steps[-1][0] >= self.until and len(self.steps) > self.least


def answer(case: str, arm: str, folder: str, seconds: float, started: float) -> dict[str, Any]:
    """One start: when its answers came. `started`: the time when the process was started. With 0
    seconds it ends after the first `generate`, or the first logits."""
    import torch
    import transformers

    if arm == "PEFT":
        import peft  # noqa: F401
    elif "lorafx" in arm:
        import lorafx  # noqa: F401
    chosen = CASES[case]
    model = chosen.model()
    torch.manual_seed(3)
    ids = torch.randint(3, model.config.vocab_size, (len(NAMES), PROMPT))
    given: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    before = time.time() - started
    of_first = NEW if chosen.answers == "tokens" else 1
    clock = Clock(time.perf_counter(), seconds, NEW if seconds else of_first - 1)
    served, names, compiles = ARMS[arm](model, chosen.adapters(Path(folder)))
    set_up = time.perf_counter() - clock.begin
    given |= names
    if chosen.answers == "tokens":
        given |= {"do_sample": False, "pad_token_id": 0, "max_new_tokens": NEW}
        given["stopping_criteria"] = transformers.StoppingCriteriaList([clock])
    first: Any = None
    while first is None or not clock.ended:
        clock.prompt = chosen.answers == "tokens"
        if chosen.answers == "tokens":
            result = served.generate(**given)[:, PROMPT:]
        else:
            with torch.no_grad():
                result = served(**given).logits
            clock.note()
        first = result.tolist() if first is None else first
        if seconds and clock.ended and compiles() and clock.steps[-1][0] < PATIENCE:
            clock.until = min(clock.steps[-1][0] + 5.0, PATIENCE)  # what is ready serves then
    end = clock.steps[0][0]
    times = {"first": end, "of call": end - set_up, "from start": before + end}
    if chosen.answers == "tokens":
        ends = [end for end, _ in clock.steps[:NEW]]
        steps = [end - begin for begin, end in pairwise(ends)]
        longest = max(steps) / statistics.median(steps)
        times |= dict(zip(GENERATES, (ends[15], ends[-1], longest), strict=True))
    return {**times, "arm": arm, "steps": clock.steps, "answer": first}


def figures(row: dict[str, Any], seconds: float) -> dict[str, Any]:
    """What the table shows of a long start."""
    ends = [end for end, _ in row["steps"]]
    found: dict[str, Any] = {
        f"in {window} s": len(NAMES) * sum(end <= window for end in ends)
        for window in WINDOWS
        if window <= seconds
    }
    lengths = [
        (end, end - begin) for (begin, _), (end, prompt) in pairwise(row["steps"]) if not prompt
    ]
    if seconds and row["arm"] != "PEFT" and len(lengths) >= 40:
        steady = statistics.median(length for _, length in lengths[-20:])
        slow = [
            end
            for (end, _), five in zip(lengths[4:], _fives(lengths), strict=True)
            if statistics.median(five) > STEADY * steady
        ]
        found |= {"serves": slow[-1] if slow else ends[0], "step": steady * 1e3}
    return found


def _fives(lengths: Sequence[tuple[float, float]]) -> Iterator[list[float]]:
    for index in range(4, len(lengths)):
        yield [length for _, length in lengths[index - 4 : index + 1]]


# --- the eager tier's step ---


def eager_step(case: str, folder: str, blocks: int) -> list[dict[str, object]]:
    """A decode step of lorafx's eager tier, and of the base, over PEFT's of the same rows."""
    import torch
    from protocol import rows_of
    from transformers import DynamicCache

    from lorafx.runtime.beside import compilers

    chosen = CASES[case]
    adapters = chosen.adapters(Path(folder))
    torch.manual_seed(3)
    prompt = torch.randint(3, 32000, (len(NAMES), PROMPT))

    def decoding(served: Any, names: dict[str, Any]) -> Callable[[], Any]:
        past = DynamicCache(config=served.config)
        served(input_ids=prompt, past_key_values=past, **names)

        def step() -> Any:
            logits = served(input_ids=prompt[:, :1], past_key_values=past, **names).logits
            past.crop(-1)
            return logits

        return step

    # No graph is compiled beside it.
    with torch.no_grad(), mock.patch.object(compilers, "CALLS", sys.maxsize):
        base = decoding(chosen.model(), {})
        peft = decoding(*with_peft(chosen.model(), adapters)[:2])
        served, names, _ = with_lorafx(chosen.model(), adapters, "eager")
        eager = decoding(served, names)
        got, want = eager(), peft()
        bound = TOLERANCES[chosen.dtype] * want.abs().max()
        assert (got - want).abs().max() <= bound, "another answer than PEFT's"
        arms = {"lorafx, eager": eager, "base, no adapters": base}
        title = f"{case}: eager decode step over PEFT's"
        rows = rows_of(title, peft, arms, blocks=blocks, seconds=0.1)
        assert not served.recompiles, "a graph served"
    return rows


# --- all of them ---


def agree(answer: Any, reference: Any, of: str) -> bool:
    """Whether an arm's first answer is PEFT's: the same tokens, or logits up to rounding."""
    if of == "tokens":  # a short start ends with the first token
        rows = zip(answer, reference, strict=True)
        return all(row[: len(want)] == want[: len(row)] for row, want in rows)
    pairs = [
        pair for rows in zip(answer, reference, strict=True) for pair in zip(*rows, strict=True)
    ]
    largest = max(abs(want) for _, want in pairs)
    return all(abs(got - want) <= 1e-4 * largest for got, want in pairs)


def run_case(
    case: str, arms: Sequence[str], seconds: float, turns: int, folder: Path
) -> list[dict[str, object]]:
    from protocol import in_process

    adapters = Path(tempfile.mkdtemp(dir=folder))
    in_process(__file__, "save_adapters", case, str(adapters), cache=adapters)
    caches: dict[str, Path] = {}

    def start(arm: str, seconds: float) -> dict[str, Any]:
        if arm in AFTER and AFTER[arm] not in caches:
            start(AFTER[arm], max(seconds, 1.0))
        cache = caches[AFTER[arm]] if arm in AFTER else Path(tempfile.mkdtemp(dir=folder))
        caches[arm] = cache
        arguments = (__file__, "answer", case, arm, str(adapters), seconds, time.time())
        row: dict[str, Any] = in_process(*arguments, cache=cache, saved_graphs=True)
        return row

    long = {arm: start(arm, seconds) for arm in arms}
    filled = dict(caches)
    firsts = {arm: [row] for arm, row in long.items()}
    for _ in range(turns - 1):
        for arm in arms:
            if arm not in COMPILES:
                caches.update(filled)
                firsts[arm].append(start(arm, 0.0))
    rows: list[dict[str, object]] = []
    for arm, row in long.items():
        of = CASES[case].answers
        medians = {
            name: statistics.median(item[name] for item in firsts[arm])
            for name in (*FIRSTS, *GENERATES)
            if name in row
        }
        shown: dict[str, object] = {**medians, **figures(row, seconds)}
        if "lorafx" in arm and "PEFT" in long:
            reference = long["PEFT"]["answer"]
            shown["as PEFT"] = all(agree(item["answer"], reference, of) for item in firsts[arm])
        every = [item["first"] for item in firsts[arm]]
        rows.append({"case": case, "arm": arm, **shown, "firsts": every})
        print(
            f"{case}, {arm}: " + ", ".join(f"{k} {_short(v)}" for k, v in shown.items()), flush=True
        )
    return rows


def _short(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def table(rows: Sequence[dict[str, object]]) -> str:
    """The starts as a table of Markdown."""
    columns = [*FIRSTS, *GENERATES, *(f"in {window} s" for window in WINDOWS), "serves", "step"]
    lines = [" | ".join(["", *columns]), "|---" * (len(columns) + 1) + "|"]
    for row in rows:
        if "first" in row:
            cells = [_short(row[name]) if name in row else "" for name in columns]
            lines.append(" | ".join([f"{row['case']}: {row['arm']}", *cells]))
    return "\n".join(f"| {line} |" if not line.startswith("|") else line for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--case", choices=CASES, action="append", help="all without it")
    parser.add_argument("--arm", choices=ARMS, action="append", help="all without it")
    parser.add_argument("--seconds", type=float, default=60.0, help="of the long start of an arm")
    parser.add_argument("--turns", type=int, default=5, help="starts for the first token")
    parser.add_argument("--blocks", type=int, default=20, help="of the eager step; 0 for none")
    parser.add_argument("--steps", action="store_true", help="only the eager steps")
    parser.add_argument("--out", type=Path, help=f"a file for the rows, such as {RESULTS}")
    options = parser.parse_args()
    from protocol import in_process, save  # not what a start has imported before its clock begins

    rows: list[dict[str, object]] = []
    for package in ("lorafx", "passes", "kernels"):
        compileall.compile_dir(package, quiet=1)  # as pip does where it installs them
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for case in options.case or CASES:
            if not options.steps:
                arms = options.arm or list(ARMS)
                rows += run_case(case, arms, options.seconds, options.turns, folder)
            if options.blocks and CASES[case].answers == "tokens":
                adapters, cache = tempfile.mkdtemp(dir=folder), Path(tempfile.mkdtemp(dir=folder))
                in_process(__file__, "save_adapters", case, adapters, cache=cache)
                arguments = (__file__, "eager_step", case, adapters, options.blocks)
                steps = in_process(*arguments, cache=cache)
                for row in steps:
                    print(
                        f"{row['case']}, {row['arm']}: {row['median']:.3f} "
                        f"[{row['low']:.3f}, {row['high']:.3f}], {row['milliseconds']:.1f} ms"
                    )
                rows += steps
    if not options.steps:
        print(table(rows))
    if options.out:
        save(options.out, "first answers, four rows of two adapters and none", rows)


if __name__ == "__main__":
    main()
