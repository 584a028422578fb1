"""transformers' Trainer and its pipelines, given a compiled model in the place of a merged one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import oracle
import pytest
import torch
import transformers
from dense_merge import REFERENCE, error, save_adapter
from PIL import Image
from tiny import randomise
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn

import lorafx
from lorafx.errors import ConfigError

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning"),
]

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "red", "green", "cat", "dog", "is", "a", "."]


def tokenizer() -> Any:
    """A word each token; beginnings, ends and masks as BERT has them."""
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, "[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    names = ("pad", "unk", "cls", "sep", "mask")
    special = {f"{name}_token": f"[{name.upper()}]" for name in names}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words, **special)


def _model(cls: Any, config: Any, **fields: Any) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = cls(config(**fields)).eval()
    randomise(model)
    return model


def text(cls: Any, **fields: Any) -> nn.Module:
    sizes = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "vocab_size": len(WORDS), "max_position_embeddings": 32}
    return _model(cls, transformers.BertConfig, **sizes, **heads, **fields)


def image(cls: Any, **fields: Any) -> nn.Module:
    sizes = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "image_size": 16, "patch_size": 8}
    return _model(cls, transformers.ViTConfig, **sizes, **heads, **fields)


def images() -> Any:
    return transformers.ViTImageProcessorPil(size={"height": 16, "width": 16})


LABELS = {"id2label": {0: "x", 1: "y", 2: "z"}, "label2id": {"x": 0, "y": 1, "z": 2}}
PICTURE = Image.fromarray(
    numpy.random.default_rng(0).integers(0, 255, (16, 16, 3), dtype=numpy.uint8)
)
SENTENCE = "a red cat is green ."

#: task -> the model, what prepares its inputs, an input, and arguments of the call.
TASKS: dict[str, tuple[Callable[[], nn.Module], dict[str, Callable[[], Any]], Any, dict]] = {
    "text-classification": (
        lambda: text(transformers.BertForSequenceClassification, **LABELS),
        {"tokenizer": tokenizer},
        SENTENCE,
        {"top_k": None},
    ),
    "image-classification": (
        lambda: image(transformers.ViTForImageClassification, **LABELS),
        {"image_processor": images},
        PICTURE,
        {},
    ),
}


def served(base: nn.Module, folder: Path) -> tuple[Any, nn.Module]:
    """The model compiled with an adapter of every linear as its default, and a merged copy."""
    save_adapter(base, folder, rank=3, targets="all-linear", seed=3)
    merged = oracle.merged(base, folder)
    cm = lorafx.compile(base, {"mine": folder}, options=REFERENCE)
    cm.set_adapter("mine")
    return cm, merged


def numbers(answer: Any) -> tuple[list[float], list[str]]:
    """The numbers of a pipeline's answer, and its texts, in order."""
    if isinstance(answer, dict):
        answer = list(answer.values())
    if isinstance(answer, (list, tuple)):
        found = [numbers(part) for part in answer]
        return [n for own, _ in found for n in own], [t for _, own in found for t in own]
    return ([], [answer]) if isinstance(answer, str) else ([float(answer)], [])


@pytest.mark.parametrize("task", TASKS)
def test_a_pipeline_answers_as_with_the_merged_model(task, tmp_path, caplog):
    build, prepare, given, arguments = TASKS[task]
    prepared = {name: make() for name, make in prepare.items()}

    def answer(model: Any) -> tuple[list[float], list[str]]:
        return numbers(transformers.pipeline(task, model=model, **prepared)(given, **arguments))

    base = build()
    plain = answer(base)
    cm, merged = served(base, tmp_path / "mine")
    (got, texts), (want, wanted) = answer(cm), answer(merged)
    assert texts == wanted
    assert error(torch.tensor(got), torch.tensor(want)) <= 1e-5
    assert (want, wanted) != plain, "the adapter changes the answer"
    assert "not supported" not in caplog.text


@pytest.mark.parametrize(("made", "name"), [(True, "adapter_names"), (False, "lora_request")])
def test_names_that_a_pipeline_gives_to_its_tokenizer_are_refused(made, name, tmp_path):
    build, prepare, given, _ = TASKS["text-classification"]
    cm, _ = served(build(), tmp_path / "mine")
    prepared: dict[str, Any] = {key: make() for key, make in prepare.items()}
    asked: dict[str, Any] = {name: ["mine"]}
    pipe: Any = transformers.pipeline(
        "text-classification", model=cm, **prepared, **(asked if made else {})
    )
    for rows in (given, [given, given]):
        with pytest.raises(ConfigError, match=rf"no argument '{name}'.* set_adapter\(name\)"):
            pipe(rows, **({} if made else asked))


class Rows(torch.utils.data.Dataset[Any]):
    """Rows for a Trainer, with a column that no model takes."""

    def __init__(self, **columns: torch.Tensor) -> None:
        self.columns = columns

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def __getitem__(self, row: int) -> dict[str, Any]:
        return {name: values[row] for name, values in self.columns.items()}


def ids() -> torch.Tensor:
    return torch.arange(4, 12).repeat(4, 1)


CLASSES = {"labels": torch.tensor([0, 2, 1, 0])}


@pytest.mark.slow
def test_a_trainer_evaluates_as_with_the_merged_model(tmp_path):
    cm, merged = served(TASKS["text-classification"][0](), tmp_path / "mine")
    other = {"text": torch.zeros(4)}
    rows = Rows(input_ids=ids(), attention_mask=torch.ones(4, 8).long(), **CLASSES, **other)

    def trainer(model: Any) -> transformers.Trainer:
        arguments = transformers.TrainingArguments(
            str(tmp_path / "out"), report_to=[], use_cpu=True
        )
        return transformers.Trainer(model=model, args=arguments, eval_dataset=rows)

    got, want = trainer(cm), trainer(merged)
    assert got.label_names == want.label_names == list(CLASSES)
    loss = torch.tensor(want.evaluate()["eval_loss"])
    assert error(torch.tensor(got.evaluate()["eval_loss"]), loss) <= 1e-5
    cm.set_adapter(None)
    assert error(torch.tensor(got.evaluate()["eval_loss"]), loss) > 1e-3
    cm.set_adapter("mine")
    found, wanted = got.predict(rows), want.predict(rows)
    for mine, theirs in zip(_arrays(found), _arrays(wanted), strict=True):
        assert error(torch.from_numpy(mine), torch.from_numpy(theirs)) <= 1e-5


def _arrays(found: Any) -> list[Any]:
    parts = (found.predictions, found.label_ids)
    return [array for part in parts for array in (part if isinstance(part, tuple) else (part,))]
