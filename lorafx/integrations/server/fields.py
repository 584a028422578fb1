"""The fields of requests: those that the engine takes, those that say how it is answered, and those
that are not served.

One file: one table, of values that ask for nothing, says for all routes which fields are refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import chain
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
)

from lorafx.integrations.server.errors import RequestError
from lorafx.integrations.server.messages import input_messages
from lorafx.integrations.server.settings import ModelSettings
from lorafx.model.keywords import KEYWORDS, intended_keyword
from lorafx.progress import LOG

#: Fields that the engine takes under the same names. It checks their values.
_CHOOSING = (
    "temperature top_k top_p min_p presence_penalty frequency_penalty repetition_penalty "
    "bad_words allowed_token_ids min_tokens ignore_eos seed"
)
#: Fields without an effect on an answer.
_WITHOUT_EFFECT = (
    "cache_salt include_reasoning metadata model moderation prompt_cache_key prompt_cache_options "
    "prompt_cache_retention request_id safety_identifier service_tier session_id store "
    "stream_interval user"
)
_GUIDED = "ebnf guided_choice guided_grammar guided_json guided_regex json_schema regex"
#: Neutral values, and the fields of OpenAI and vLLM that are accepted with these only.
_NEUTRAL: Sequence[tuple[tuple[Any, ...], str]] = (
    (
        (),
        f"{_GUIDED} access_programs audio background_options chat_template "
        "container context_management conversation custom_logit_processor ec_transfer_params "
        "enable_thinking generation_config image kv_transfer_params logprob_token_ids "
        "max_new_tokens max_tool_calls media_io_kwargs mm_processor_kwargs prediction "
        "previous_input_messages previous_response_id prompt_embeds "
        "repetition_detection stop_regex thinking_token_budget truncation_side vllm_xargs "
        "web_search_options",
    ),
    (
        (False,),
        "background enable_response_messages return_hidden_states return_mm_kwargs "
        "return_prompt_text return_token_offsets return_weight_versions use_beam_search "
        "watermarking",
    ),
    ((0,), "priority routed_experts_prompt_start top_logprobs"),
    (([],), "documents functions include logits_processors mcp_servers"),
    ((1,), "length_penalty typical_p"),
    (("tensors",), "mm_payload"),
    ((True,), "spaces_between_special_tokens"),
    (("auto", "none"), "function_call"),
    ((["text"],), "modalities"),
    (("",), "stop suffix"),
    (("disabled",), "truncation"),
    (("medium",), "verbosity"),
)
_INSTEAD = {
    **dict.fromkeys(_GUIDED.split(), "send `structured_outputs`"),
    "chat_template": "start the server with it",
    "enable_thinking": "send it in `chat_template_kwargs`",
    "logprob_token_ids": "ask for the likeliest tokens, by `top_logprobs` or `logprobs`",
    "max_new_tokens": "send `max_tokens`",
    "repetition_detection": "send a `repetition_penalty` or `frequency_penalty`",
    "thinking_token_budget": "bound the whole answer, by `max_tokens`",
}

#: Fields by which other servers (TGI, LoRAX, SGLang, vLLM) take the name of an adapter.
_NAMING = "adapter adapter_id adapter_name lora lora_adapter lora_name lora_path"


#: The field that may also be a list of adapters with their scales.
SUM = "lora"

#: What prompts are made of. --max-body-bytes and the model's positions bound them.
_PROMPTS = frozenset(
    (
        *("prompt", "messages", "input", "instructions", "system", "tokens"),
        *("text_1", "text_2", "query", "documents"),
    )
)


def check_bounds(body: Mapping[str, Any], settings: ModelSettings) -> None:
    """Raise RequestError for more fields, or a larger field, than `settings` allow. It takes no
    longer for a field that is larger."""
    if len(body) > settings.max_fields:
        raise RequestError(
            f"the body has {len(body)} fields, and --max-fields allows {settings.max_fields}"
        )
    for name, value in body.items():
        if name in _PROMPTS:
            continue
        if isinstance(value, list | dict) and len(value) > settings.max_items:
            raise RequestError(
                f"`{name:.80}` has at most {settings.max_items} entries, as --max-items says; got "
                f"{len(value)}",
                f"{name:.80}",
            )
        if _exceeds(value, settings.max_field_size):
            raise RequestError(
                f"`{name:.80}` has more letters and entries than --max-field-size allows, which "
                f"are {settings.max_field_size}",
                f"{name:.80}",
            )


def _exceeds(value: Any, most: int) -> bool:
    """Whether a value of JSON has more than `most` letters and entries, at all depths."""
    pending = [value]
    while pending and most >= 0:
        item = pending.pop()
        most -= len(item) if isinstance(item, str | list | dict) else 0
        if most >= 0 and isinstance(item, list | dict):
            pending += item if isinstance(item, list) else chain(item, item.values())
    return most < 0


def prompts_in(asked: Any) -> int:
    """How many prompts the value of a field holds, which may be none of them."""
    several = isinstance(asked, list) and asked and isinstance(asked[0], str | list)
    return len(asked) if several else 1


def adapters_named(body: Mapping[str, Any]) -> dict[str, str]:
    """The names of adapters in a body beside `model`, by field. Raises RequestError for a field
    that would choose adapters in another way: by numbers, folders, weights or rows."""
    named: dict[str, str] = {}
    for field, value in body.items():
        sums = field == SUM and isinstance(value, list)
        if not _chooses_adapters(field) or sums or value in (None, "", [], {}):
            continue
        if field not in _NAMING.split() or not isinstance(value, str):
            raise RequestError(
                f"`{field:.80}` of this form chooses no adapter here; the field `model` does: send "
                'the name of one as `model`, or "BASE:ADAPTER"; GET /v1/models lists all',
                field,
            )
        named[field] = value
    return named


def summands(body: Mapping[str, Any]) -> dict[str, float]:
    """Names of adapters and their scales, as llama.cpp's server takes them; none without the field.
    Raises RequestError unless it is a list of {"name", "scale"}."""
    asked, scales = body.get(SUM), dict[str, float]()
    for item in asked if isinstance(asked, list) else ():
        named = isinstance(item, dict) and item.keys() == {"name", "scale"}
        if not named or not isinstance(item["name"], str) or item["name"] in scales:
            raise RequestError(
                f'`{SUM}` is a list of {{"name": ADAPTER, "scale": NUMBER}} with a name once, '
                f"beside the base as `model`; got {item!r:.80}",
                SUM,
            )
        scales[item["name"]] = item["scale"]
    return scales


def _chooses_adapters(field: str) -> bool:
    return field in KEYWORDS or intended_keyword(f"{field:.80}") is not None


def _as_many_as_allowed(asked: int | None, info: ValidationInfo) -> int | None:
    most = -1 if info.context is None else info.context["max_logprobs"]
    if asked is not None and 0 <= most < asked:
        raise ValueError(f"at most {most} for a token, as --max-logprobs says")
    return asked


#: How many of the likeliest tokens may be asked for.
_Logprobs = Annotated[int | None, Field(ge=0), AfterValidator(_as_many_as_allowed)]
#: A number of tokens.
_Length = Annotated[int | None, Field(ge=1)]
#: OpenAI's words for how much a model reasons.
_Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None


class GrammarSource(NamedTuple):
    """What an answer has to keep to. `kind` is "json" (a schema), "regex", "choice", "grammar" or
    "calls" (a function of the special tokens); `field` asked for it."""

    field: str
    kind: str
    value: Any


class Fields(BaseModel):
    """The fields of a request that say how it is answered; `choosing` has those that the engine
    takes. A field whose value is null is one that was not sent."""

    model_config = ConfigDict(strict=True, frozen=True, allow_inf_nan=False)
    #: Whether the route generates.
    generates: ClassVar = True

    choosing: Mapping[str, Any] = {}
    stream: bool = False
    add_special_tokens: bool | None = None
    truncate_prompt_tokens: int | None = Field(default=None, ge=-1)
    logit_bias: dict[int, float] = {}

    @classmethod
    def read(cls, body: Mapping[str, Any], max_logprobs: int = 20) -> Self:
        """The fields of a request, with up to `max_logprobs` for a token, -1 for all. Raises
        RequestError if a value is invalid for its field, or would not be honoured. Unknown fields
        are ignored, and logged the first time. `adapters_named` reads those of adapters."""
        sent = {name: value for name, value in body.items() if value is not None}
        choosing = {name: sent.pop(name) for name in sent.keys() & _CHOOSING.split()}
        known = {*cls.model_fields, *_WITHOUT_EFFECT.split()}
        for name in sorted(sent.keys() - known):
            neutral = _NEUTRAL_VALUES.get(name)
            if neutral is None and not _chooses_adapters(name):
                _log_unknown(f"{name:.80}")
            elif neutral is not None and sent.pop(name) not in neutral:
                instead = "".join(f", or send {value!r}" for value in neutral)
                instead = f"; {_INSTEAD[name]}" if name in _INSTEAD else instead
                raise RequestError(f"`{name}` is not served here; leave it out{instead}", name)
        try:
            encoded = json.dumps({**sent, "choosing": choosing}, ensure_ascii=False).encode()
            return cls.model_validate_json(encoded, context={"max_logprobs": max_logprobs})
        except UnicodeEncodeError as error:
            half = error.object[error.start]
            raise RequestError(
                f"the request holds {half!r}, half of a surrogate pair; send whole characters"
            ) from error
        except ValidationError as error:
            problems = error.errors(include_url=False)
            if not problems[0]["loc"]:  # values within values, deeper than pydantic reads
                raise RequestError(f"the body: {problems[0]['msg']}") from error
            name = str(problems[0]["loc"][0])
            if name not in sent:
                raise RequestError(f"`{name}` is missing", name) from error
            why = ", or ".join(dict.fromkeys(p["msg"] for p in problems if p["loc"][0] == name))
            raise RequestError(f"`{name}`: {why}; got {sent[name]!r:.80}", name) from error

    @classmethod
    def schema_of_body(cls, *, named: bool = True) -> dict[str, Any]:
        """The JSON schema of a body, which has to have a `model` if it is `named`."""
        schema = cls.model_json_schema()
        fields = {"model": {"type": "string"}, **schema["properties"]}
        if fields.pop("choosing") and cls.generates:
            fields |= {name: {} for name in _CHOOSING.split()}
        required = [*schema.get("required", ()), *["model"] * named]
        return {"properties": fields, "required": required}

    def grammar(self) -> GrammarSource | None:
        """What the answer has to keep to. Raises RequestError if that is of no known form."""
        raise NotImplementedError

    @property
    def length(self) -> int | None:
        """The most tokens of a sequence; None up to the end of the context."""
        raise NotImplementedError

    @property
    def sequences(self) -> int:
        """How many sequences the request asks for."""
        return 1

    def arguments(self) -> dict[str, Any]:
        """Arguments of the engine's `add_request`."""
        return {**self.choosing, "logit_bias": self.logit_bias}


class SequenceFields(Fields):
    """Fields of /v1/completions and /v1/chat/completions."""

    stream_options: dict[str, bool] = {}
    n: int = Field(default=1, ge=1, le=128)
    best_of: int | None = None
    stop: str | list[str] = []
    stop_token_ids: list[int] = []
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    prompt_logprobs: _Logprobs = None
    return_token_ids: bool = False
    return_tokens_as_token_ids: bool = False
    response_format: dict[str, Any] = {"type": "text"}
    structured_outputs: dict[str, Any] = {}

    @property
    def sequences(self) -> int:
        return self.n

    @property
    def stops(self) -> list[str]:
        """The strings at which a sequence ends."""
        return [text for text in ([self.stop] if isinstance(self.stop, str) else self.stop) if text]

    @property
    def of_tokens(self) -> int | None:
        """How many of the likeliest tokens are sent beside each token; None for no logprobs."""
        raise NotImplementedError

    def arguments(self) -> dict[str, Any]:
        if self.best_of not in (None, self.n):
            raise RequestError("`best_of` is the value of `n`: all sequences are sent", "best_of")
        if self.stream_options and not self.stream:
            raise RequestError("`stream_options` is for streams: send `stream`", "stream_options")
        if self.stream and self.prompt_logprobs is not None:
            raise RequestError("`prompt_logprobs` are not for streams", "prompt_logprobs")
        return super().arguments() | {
            "n": self.n,
            "stop": self.stops,
            "stop_token_ids": self.stop_token_ids,
            "logprobs": self.of_tokens,
            "prompt_logprobs": self.prompt_logprobs,
        }

    def grammar(self) -> GrammarSource | None:
        found = [_format_source("response_format", self.response_format)]
        kinds = {"json", "regex", "choice", "grammar"}
        for kind, value in self.structured_outputs.items():
            if kind == "json_object" and value:
                found.append(GrammarSource("structured_outputs", "json", {"type": "object"}))
            elif kind in kinds and value is not None:
                found.append(GrammarSource("structured_outputs", kind, value))
            elif value:
                raise RequestError(f"`structured_outputs` has no `{kind}`", "structured_outputs")
        sources = [source for source in found if source is not None]
        if len(sources) > 1:
            names = ", ".join(f"`{source.field}`" for source in sources)
            raise RequestError(f"an answer keeps to one grammar; got {names}", sources[1].field)
        return sources[0] if sources else None


class CompletionFields(SequenceFields):
    """Fields of /v1/completions."""

    prompt: Any
    max_tokens: int = Field(default=16, ge=0)
    logprobs: _Logprobs = None
    echo: bool = False

    @property
    def length(self) -> int:
        return self.max_tokens

    @property
    def sequences(self) -> int:
        return self.n * prompts_in(self.prompt)

    @property
    def of_tokens(self) -> int | None:
        return self.logprobs

    def arguments(self) -> dict[str, Any]:
        asked = super().arguments()
        if not self.max_tokens and not self.echo and self.prompt_logprobs is None:
            raise RequestError("`max_tokens` 0 answers nothing without `echo`", "max_tokens")
        scored = self.logprobs if self.echo else None
        if scored is not None or not self.max_tokens:
            asked["prompt_logprobs"] = max(scored or 0, self.prompt_logprobs or 0)
        return asked


class Reasoning(BaseModel):
    """OpenAI's field `reasoning`. No summaries are made, so `summary` may only leave that
    to the server, by "auto"."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")

    effort: _Effort = None
    summary: Literal["auto"] | None = None
    generate_summary: Literal["auto"] | None = None
    context: Literal["auto"] | None = None
    mode: Literal["standard"] | None = None


class MessageFields(Fields):
    """Fields of /v1/chat/completions and /v1/responses."""

    chat_template_kwargs: dict[str, Any] = {}
    reasoning_effort: _Effort = None
    reasoning: Reasoning | None = None
    tools: list[dict[str, Any]] = []
    tool_choice: Literal["auto", "none", "required"] | dict[str, Any] = "auto"
    parallel_tool_calls: bool = True
    add_generation_prompt: bool = True
    continue_final_message: bool = False

    @property
    def effort(self) -> _Effort:
        """How much the model reasons, if its chat template reads that."""
        return self.reasoning_effort or (self.reasoning.effort if self.reasoning else None)

    @property
    def variables(self) -> dict[str, Any]:
        """The variables of the chat template that are sent."""
        effort = {"reasoning_effort": self.effort} if self.effort else {}
        return {**self.chat_template_kwargs, **effort}

    @property
    def choice(self) -> tuple[str, frozenset[str] | None]:
        """How calls are made ("auto", "none", "required", or "named": one call of one tool), and of
        which tools, all if that is None. Raises RequestError if `tool_choice` does not say so."""
        asked = self.tool_choice
        if isinstance(asked, str):
            return asked, None
        inner = asked.get("allowed_tools", asked)  # chats nest what responses do not
        try:
            if asked["type"] == "allowed_tools" and inner["mode"] in ("auto", "required"):
                return inner["mode"], frozenset(map(_name_of, inner["tools"]))
            if asked["type"] == "function":
                return "named", frozenset([_name_of(asked)])
        except (AttributeError, KeyError, TypeError):
            pass
        raise RequestError(
            "`tool_choice` is auto, none, required, a function by its name, or allowed_tools with "
            f"their mode; got {asked!r:.80}",
            "tool_choice",
        )

    @property
    def used_tools(self) -> list[dict[str, Any]] | None:
        """The tools that the model may call, in the form of a chat's. Raises RequestError if they
        are no functions, or `tool_choice` has others."""
        mode, chosen = self.choice
        for tool in self.tools:
            if tool.get("type", "function") != "function" or not _name_of(tool):
                raise RequestError(
                    f"`tools` are functions with a name, which the client runs; {tool!r:.80} is "
                    "not served: leave it out, or describe it as a function",
                    "tools",
                )
        names = frozenset(map(_name_of, self.tools))
        chosen = names if chosen is None else chosen
        missing = sorted(chosen - names)
        if missing or (mode == "required" and not chosen):
            raise RequestError(
                f"`tool_choice` needs {missing or 'any'} among `tools`", "tool_choice"
            )
        used = () if mode == "none" else self.tools
        tools = [_function(tool) for tool in used if _name_of(tool) in chosen]
        return [{"type": "function", "function": tool} for tool in tools] or None


class ChatFields(SequenceFields, MessageFields):
    """Fields of /v1/chat/completions."""

    messages: Any
    max_tokens: _Length = None
    max_completion_tokens: _Length = None
    logprobs: bool = False
    top_logprobs: _Logprobs = None

    @property
    def length(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def of_tokens(self) -> int | None:
        if self.top_logprobs and not self.logprobs:
            raise RequestError("`top_logprobs` needs `logprobs` true", "top_logprobs")
        return (self.top_logprobs or 0) if self.logprobs else None


class ResponseFields(MessageFields):
    """Fields of /v1/responses."""

    input: Any
    instructions: str | None = None
    max_output_tokens: _Length = None
    text: dict[str, Any] = {"format": {"type": "text"}}
    metadata: dict[str, str] = {}

    @property
    def length(self) -> int | None:
        return self.max_output_tokens

    @property
    def messages(self) -> list[dict[str, Any]]:
        """`instructions` and `input` as the messages of a chat. Raises RequestError if they cannot
        be."""
        before = [{"role": "system", "content": self.instructions}] if self.instructions else []
        return before + input_messages(self.input)

    def echoed(self) -> dict[str, Any]:
        """The fields of a response that say what was asked for."""
        tools = [{"strict": None, **_function(tool), "type": "function"} for tool in self.tools]
        names = ("instructions", "max_output_tokens", "metadata", "parallel_tool_calls", "text")
        chosen = {name: self.choosing.get(name) for name in ("temperature", "top_p")}
        asked = {name: getattr(self, name) for name in (*names, "tool_choice")}
        summary = self.reasoning.summary if self.reasoning else None
        reasoning = {"effort": self.effort, "summary": summary}
        return {**asked, **chosen, "reasoning": reasoning, "tools": tools, "truncation": "disabled"}

    def grammar(self) -> GrammarSource | None:
        return _format_source("text", self.text.get("format") or {"type": "text"})


def _function(tool: Mapping[str, Any]) -> dict[str, Any]:
    """What a tool says of its function, in the form of a response's tool or of a chat's."""
    nested = tool.get("function")
    return nested if isinstance(nested, dict) else {k: v for k, v in tool.items() if k != "type"}


def _name_of(tool: Mapping[str, Any]) -> str:
    """The name of a tool's function; "" if it has none."""
    name = _function(tool).get("name")
    return name if isinstance(name, str) else ""


def _format_source(field: str, asked: Any) -> GrammarSource | None:
    """The JSON schema of OpenAI's `response_format`, or of `text.format`; None for text."""
    kind = asked.get("type") if isinstance(asked, dict) else None
    if kind == "text":
        return None
    if kind == "json_object":
        return GrammarSource(field, "json", {"type": "object"})
    schema = asked.get("json_schema", asked) if kind == "json_schema" else None
    if not isinstance(schema, dict) or not isinstance(schema.get("schema"), dict):
        raise RequestError(
            f"`{field}` has the type text, json_object, or json_schema with a `schema`; got "
            f"{asked!r:.80}",
            field,
        )
    return GrammarSource(field, "json", schema["schema"])


def _neutral_values() -> dict[str, list[Any]]:
    """Of each known field the values that ask for nothing. Those of a field that another route
    serves are its defaults."""
    values: dict[str, list[Any]] = {}
    for neutral, names in _NEUTRAL:
        for name in names.split():
            values.setdefault(name, []).extend(neutral)
    for fields in (CompletionFields, ChatFields, ResponseFields):
        for name, field in fields.model_fields.items():
            known = values.setdefault(name, [])
            if not field.is_required() and field.default not in (None, *known):
                known.append(field.default)
    return values


_NEUTRAL_VALUES = _neutral_values()


@lru_cache(maxsize=1024)
def _log_unknown(name: str) -> None:
    LOG.warning("the field %r of requests is not known, and is ignored", name)
