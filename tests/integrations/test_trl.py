"""GRPOTrainer of TRL with `lorafx.Rollout`: its tokens, their log-probabilities, its training."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from dense_merge import REFERENCE
from tiny_models import FAMILIES
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import lorafx
from lorafx.errors import ConfigError

datasets = pytest.importorskip("datasets")
trl = pytest.importorskip("trl")

pytestmark = pytest.mark.filterwarnings("ignore:You are using 'rollout_func'")

PROMPTS = ["w1 w2 w3", "w4 w5", "w6 w7 w8 w9", "w1"]


def tokenizer(size: int) -> PreTrainedTokenizerFast:
    words = ["<pad>", "<eos>", "<unk>", *(f"w{number}" for number in range(size - 3))]
    vocabulary = {word: number for number, word in enumerate(words)}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    wrapped = PreTrainedTokenizerFast(tokenizer_object=made, **names)
    wrapped.chat_template = "{% for m in messages %}{{ m['content'] }} w10 {% endfor %}"
    return wrapped


def share_of_small_ids(completion_ids: list[list[int]], **_: Any) -> list[float]:
    return [sum(token < 40 for token in ids) / len(ids) for ids in completion_ids]


def trainer(folder: Any, rollout: Any, *, chat: bool = False, **changes: Any) -> Any:
    torch.manual_seed(0)
    model = FAMILIES["llama"].build()
    model.config.eos_token_id = 1
    prompts = [[{"role": "user", "content": text}] for text in PROMPTS] if chat else PROMPTS
    settings: dict[str, Any] = {
        **{"output_dir": str(folder), "use_cpu": True, "bf16": False, "report_to": []},
        **{"per_device_train_batch_size": 4, "num_generations": 4, "max_completion_length": 6},
        **{"save_strategy": "no", "logging_steps": 1, "learning_rate": 0.05, "disable_tqdm": True},
        **changes,
    }
    return trl.GRPOTrainer(
        model=model,
        reward_funcs=share_of_small_ids,
        args=trl.GRPOConfig(**settings),
        train_dataset=datasets.Dataset.from_dict({"prompt": prompts}),
        processing_class=tokenizer(model.config.vocab_size),
        peft_config=peft.LoraConfig(r=3, target_modules=["q_proj", "v_proj", "down_proj"]),
        rollout_func=rollout,
    )


@pytest.mark.parametrize("chat", [False, True])
def test_training_is_that_on_the_same_completions_and_logprobs_are_the_trainer_s(tmp_path, chat):
    training = {"max_steps": 3, "gradient_accumulation_steps": 2, "num_iterations": 2}
    training |= {"gradient_checkpointing": not chat, "temperature": 0.7}
    if chat:
        sizes = {"page_size": 8, "num_blocks": 64, "max_batch_tokens": 32}
        training |= {
            "use_transformers_continuous_batching": True,
            "transformers_continuous_batching_config": sizes,
        }
    rollout, rollouts, differences = lorafx.Rollout(REFERENCE), [], []

    def recorded(prompts: list[Any], of: Any) -> dict[str, Any]:
        output = rollout(prompts, of)
        rollouts.append((output, torch.get_rng_state()))
        assert of.model.training
        assert output["prompt_ids"] == of._tokenize_prompts(prompts)[0]
        for prompt, tokens, logprobs in zip(*output.values(), strict=True):
            assert len(tokens) == len(logprobs)
            ids = torch.tensor([[*prompt, *tokens]])
            with torch.no_grad():
                own = of._get_per_token_logps_and_entropies(
                    of.model, ids, torch.ones_like(ids), len(tokens)
                )[0]
            differences.append(float((own[0] - torch.tensor(logprobs)).abs().max()))
        return output

    def again(*_: Any) -> dict[str, Any]:
        output, state = rollouts.pop(0)
        torch.set_rng_state(state)  # by which TRL shuffles the batch
        return output

    sampled = trainer(tmp_path, recorded, chat=chat, **training)
    sampled.train()
    assert len(rollouts) == 2
    assert max(differences) <= 1e-5
    assert len({tuple(ids) for ids in rollouts[0][0]["completion_ids"]}) > 4
    replayed = trainer(tmp_path, again, chat=chat, **training)
    replayed.train()
    parameters = [(n, p) for n, p in replayed.model.named_parameters() if p.requires_grad]
    assert parameters
    for name, parameter in parameters:
        assert torch.equal(sampled.model.get_parameter(name), parameter)
    rewards, again_rewards = (
        [log["reward"] for log in done.state.log_history if "reward" in log]
        for done in (sampled, replayed)
    )
    assert rewards == again_rewards
    assert 0 < max(rewards) <= 1


def test_tokens_are_chosen_as_the_trainer_s_configuration_says(tmp_path):
    made, own = (trainer(tmp_path, r, top_k=1) for r in (lorafx.Rollout(REFERENCE), None))
    for penalty in (1.0, 50.0):
        for of in (made, own):
            of.generation_config.repetition_penalty = penalty
        want = own._generate(PROMPTS)[1]
        _, tokens, _, _, logprobs, *_ = made._generate(PROMPTS)
        assert tokens == want
        assert max(abs(logprob) for row in logprobs for logprob in row) <= 1e-6
    decode = made.processing_class.decode
    word = decode(tokens[0][2])
    made.generation_config.stop_strings = [word]
    stopped = made._generate(PROMPTS)[1]
    for got, row in zip(stopped, tokens, strict=True):
        ends = [end for end in range(1, len(row)) if word in decode(row[:end])]
        assert got == row[: ends[0] if ends else len(row)]
    assert stopped != tokens


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"generation_kwargs": {"no_repeat_ngram_size": 2}}, "no_repeat_ngram_size"),
        ({"tools": [print]}, "tools"),
        ({"use_vllm": True}, "vLLM"),
    ],
)
def test_what_is_not_served_is_refused_before_a_sampler_is_made(tmp_path, changes, message):
    rollout = lorafx.Rollout(REFERENCE)
    kwargs = {name: value for name, value in changes.items() if name == "generation_kwargs"}
    made = trainer(tmp_path, rollout, **kwargs)
    vars(made).update({name: value for name, value in changes.items() if name not in kwargs})
    with pytest.raises(ConfigError, match=message):
        rollout(PROMPTS, made)
    assert rollout.sampler is None
