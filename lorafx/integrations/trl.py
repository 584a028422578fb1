"""TRL's GRPOTrainer, sampled by a compiled model on the weights that are trained.

GRPOTrainer(..., rollout_func=lorafx.Rollout())

prompts ──chat template, tokenizer──▶ ids ──sync(), generate_batch──▶ completions, logprobs
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

from lorafx import api
from lorafx.compiled_model.sampler import Sampler
from lorafx.config import Options
from lorafx.errors import BatchError, ConfigError

if TYPE_CHECKING:
    from transformers import ContinuousBatchingConfig

#: Tokens of a page, and the most of a step, unless more sequences have one each.
_PAGE, _STEP = 16, 1024
#: What `GRPOConfig(generation_kwargs=...)` may set.
_SERVED = {
    *("max_new_tokens", "do_sample", "temperature", "top_k", "top_p", "min_p", "stop_strings"),
    *("repetition_penalty", "bos_token_id", "eos_token_id", "pad_token_id"),
}


class Rollout:
    """A `rollout_func` of TRL's GRPOTrainer: completions come from a `lorafx.sampler` of the model
    that is trained, with its adapter as the last step left it (docs/guides/trl.md).

    The first rollout makes the sampler, which shares the trainer's weights; the trainer and its
    model stay as they are. Tokens are chosen by the trainer's generation configuration, and have
    the log-probabilities by which they were drawn. Equal prompts in a row are computed once.

    Args:
        options, settings: as for `lorafx.sampler`.

    Attributes:
        sampler: the `Sampler`, from the first rollout on.

    A rollout raises what `lorafx.sampler`, `Sampler.sync` and `generate_batch` raise, and:
        ConfigError: the trainer asks for something that is not served. Nothing has changed then.
        BatchError: a request failed.
    """

    sampler: Sampler | None = None

    def __init__(self, options: Options | Mapping[str, Any] | None = None, **settings: Any) -> None:
        self._options, self._settings = options, settings
        self._model: Any = None

    def __call__(self, prompts: Sequence[Any], trainer: Any) -> dict[str, list[Any]]:
        """A completion for each prompt, in the form that TRL takes."""
        _refuse_unserved(trainer)
        model = trainer.accelerator.unwrap_model(trainer.model)
        if self.sampler is None or model is not self._model:
            self.sampler = api.sampler(model, self._options, **self._settings)
            self._model = model
        self.sampler.sync()
        ids = _token_ids(prompts, trainer)
        count = math.gcd(*(len(list(equal)) for _, equal in groupby(ids)))
        config = copy.deepcopy(trainer.generation_config)
        by_request = {"repetition_penalty": config.repetition_penalty, "stop": config.stop_strings}
        config.update(repetition_penalty=None, stop_strings=None)
        outputs = self.sampler.generate_batch(
            ids[::count],
            generation_config=config,
            continuous_batching_config=_cache(trainer, ids),
            tokenizer=trainer.processing_class,
            n=count,
            return_logprobs=True,
            **{name: value for name, value in by_request.items() if value is not None},
        ).values()
        for output in outputs:
            if output.error:
                raise BatchError(f"a completion could not be sampled: {output.error}")
        completions = [output.generated_tokens for output in outputs]
        logprobs = [output.logprobs for output in outputs]
        return {"prompt_ids": ids, "completion_ids": completions, "logprobs": logprobs}


def _refuse_unserved(trainer: Any) -> None:
    from transformers import ProcessorMixin

    asked = ", ".join(sorted((trainer.args.generation_kwargs or {}).keys() - _SERVED))
    for what, found in {
        "use_vllm=True, by which vLLM samples": trainer.use_vllm,
        "tools, after whose answers TRL generates by itself": trainer.tools,
        "a processor of images": isinstance(trainer.processing_class, ProcessorMixin),
        f"generation_kwargs with {asked}": asked,
    }.items():
        if found:
            raise ConfigError(f"lorafx.Rollout does not serve {what}; leave that out")


def _token_ids(prompts: Sequence[Any], trainer: Any) -> list[list[int]]:
    """The prompts as TRL gives them to `generate`."""
    tokenizer = trainer.processing_class
    if isinstance(prompts[0], str):
        return list(tokenizer(text=prompts)["input_ids"])
    settings = {"chat_template": trainer.chat_template, **trainer.chat_template_kwargs}
    settings |= {"add_generation_prompt": True, "tokenize": True, "return_dict": True}
    return list(tokenizer.apply_chat_template(conversation=prompts, **settings)["input_ids"])


def _cache(trainer: Any, ids: Sequence[Sequence[int]]) -> ContinuousBatchingConfig:
    """The trainer's configuration of the cache, or one with room for these prompts alone."""
    from transformers import ContinuousBatchingConfig

    if trainer.continuous_batching_config is not None:
        return trainer.continuous_batching_config
    new = trainer.generation_config.max_new_tokens
    return ContinuousBatchingConfig(
        page_size=_PAGE,
        num_blocks=sum(math.ceil((len(prompt) + new) / _PAGE) for prompt in ids),
        max_batch_tokens=max(_STEP, len(ids)),
    )
