"""lm_eval's model type `local-chat-completions`: a task alone, and with an example as a turn."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from client_checks import GREET, GREETING, MODEL, RECALL, URL, report, same
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager

RECALLED = f"user: {GREET}; assistant: {GREETING}"


def evaluate(question: str, answer: str, **settings) -> None:
    """Whether the model answers so, behind the example of a greeting if there are examples."""
    with tempfile.TemporaryDirectory() as name:
        rows = {"test": (question, answer), "train": (GREET, GREETING)}
        for split, (asked, wanted) in rows.items():
            Path(name, f"{split}.jsonl").write_text(json.dumps({"q": asked, "a": wanted}))
        files = {split: f"{name}/{split}.jsonl" for split in rows}
        task = {
            **{"task": "told", "dataset_path": "json", "dataset_kwargs": {"data_files": files}},
            **{"test_split": "test", "fewshot_split": "train", "output_type": "generate_until"},
            **{"doc_to_text": "{{q}}", "doc_to_target": "{{a}}", "target_delimiter": ""},
            "generation_kwargs": {"until": ["\n"], "max_gen_toks": 200, "temperature": 0},
            "metric_list": [{"metric": "exact_match"}],
        }
        Path(name, "told.yaml").write_text(json.dumps(task))
        found = simple_evaluate(
            "local-chat-completions",
            model_args={"model": MODEL, "base_url": f"{URL}/chat/completions"},
            tasks=["told"],
            task_manager=TaskManager(include_path=name),
            apply_chat_template=True,
            **settings,
        )
    same(found["results"]["told"]["exact_match,none"], 1.0)


report(
    "lm_eval, chat",
    "lm_eval",
    {
        "text": lambda: evaluate(GREET, GREETING),
        "second": lambda: evaluate(RECALL, RECALLED, num_fewshot=1, fewshot_as_multiturn=True),
    },
)
