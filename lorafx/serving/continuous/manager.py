"""transformers' continuous batching with an adapter for each request."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

from transformers.generation.configuration_utils import ContinuousBatchingConfig, GenerationConfig
from transformers.generation.continuous_batching import ContinuousBatchingManager
from transformers.generation.continuous_batching.continuous_api import ContinuousBatchProcessor
from transformers.generation.continuous_batching.requests import FutureRequestState

from lorafx.adapter_store.store import BASE
from lorafx.errors import BatchError, CapacityError, ConfigError, LorafxError
from lorafx.serving.continuous.packed_call import EAGER, PackedForward
from lorafx.serving.continuous.pages import AdapterPages
from lorafx.serving.continuous.requests import AdapterRequest, Ticket
from lorafx.serving.continuous.scheduling import within_slots

if TYPE_CHECKING:
    from lorafx.serving.compiled import CompiledModel


class Default:
    """The class of `DEFAULT`."""

    def __repr__(self) -> str:
        return "DEFAULT"


#: The adapter of `set_adapter`.
DEFAULT: Final = Default()


class AdapterBatchingManager(ContinuousBatchingManager):
    """transformers' manager for a compiled model; see its documentation for what is not said here.

    Args:
        compiled: the model.
        generation_config: as there; None for the model's.
        config: as there. Flash attention, CUDA graphs, compilation by the engine and asynchronous
            batching are refused; the attention is "sdpa" or "eager".

    Raises:
        ConfigError: the model cannot be served by the engine, or the configuration asks for what is
            refused.
    """

    def __init__(
        self,
        compiled: CompiledModel,
        generation_config: GenerationConfig | None = None,
        config: ContinuousBatchingConfig | None = None,
        **kwargs: Any,
    ) -> None:
        self.compiled = compiled
        model: Any = compiled.model
        given = generation_config or getattr(model, "generation_config", None)
        if given is None:
            raise ConfigError(
                f"{type(model).__name__} has no generation_config, so it cannot generate; give a "
                "generative model of transformers"
            )
        served = _served(config)
        with _possible(model):
            super().__init__(
                model=model, generation_config=given, continuous_batching_config=served, **kwargs
            )
        self._forward: Any = PackedForward(compiled, self._batch)

    def switch_to_cb_friendly_attn(self, model: Any, auto_switch_to_flash: bool = False) -> None:
        """Have the model use an attention that is served."""
        name = model.config._attn_implementation
        if name not in ("eager", EAGER, "sdpa"):
            raise ConfigError(
                f"{type(model).__name__} uses the attention {name!r}; continuous batching with "
                'adapters serves "sdpa" and "eager". Call '
                'model.set_attn_implementation("sdpa") before lorafx.compile'
            )
        super().switch_to_cb_friendly_attn(model, auto_switch_to_flash=False)

    def add_request(
        self,
        input_ids: list[int],
        request_id: str | None = None,
        max_new_tokens: int | None = None,
        streaming: bool = False,
        record_timestamps: bool = False,
        eos_token_id: int | list[int] | None = None,
        *,
        adapter: str | Default | None = DEFAULT,
        **logit_processor_kwargs: Any,
    ) -> str:
        """Queue a request.

        Args:
            adapter: its adapter; None or "__base__" is the base model. The request keeps the
                version that is loaded now: loading another under this name, or unloading it, has no
                effect on requests that have been added. Without it, the default of `set_adapter`.
            Otherwise as transformers' own.

        Returns:
            The name of the request.

        Raises:
            UnknownAdapterError: no adapter of this name is loaded.
            CapacityError: every slot is pinned to another adapter.
            BatchError: the engine is stopping, or has failed.
        """
        denied = self.background_thread_status.can_accept_new_requests()
        if denied is not None:
            raise BatchError(f"the request was not queued. {denied}") from (
                self.background_thread_status.fatal_error
            )
        ticket = self._ticket(adapter)
        if request_id is None:
            with self._request_lock:
                request_id = f"req_{self._request_counter}"
                self._request_counter += 1
        config = self.generation_config
        state = AdapterRequest(
            request_id=request_id,
            initial_tokens=list(input_ids),
            num_children=self.num_return_sequences - 1,
            record_timestamps=record_timestamps,
            max_new_tokens=config.max_new_tokens if max_new_tokens is None else max_new_tokens,
            eos_token_id=config.eos_token_id if eos_token_id is None else eos_token_id,
            streaming=streaming,
            logit_processor_kwargs=logit_processor_kwargs,
            ticket=ticket,
        )
        self.input_queue.put(state, block=True, timeout=10)
        self._wake_up_loop.set()
        return request_id

    def start(self) -> None:
        """Start the engine's thread.

        Raises:
            ConfigError: transformers has no paged cache for this model.
        """
        if self.batch_processor is None:  # here, not in the thread, where nobody sees an error
            self.batch_processor = self._create_batch_processor()
        super().start()

    def warmup(self) -> None:
        """Have the graphs of the engine's steps captured: of several tokens, and of one.

        Raises:
            ConfigError: transformers has no paged cache for this model.
        """
        if self.batch_processor is None:
            self.batch_processor = self._create_batch_processor()
        runner = self.batch_processor.model_runner
        for tokens in (4, 1):
            runner.run_one_warmup(self._forward, num_q_tokens=tokens, max_kv_read=tokens % 4)
        self.batch_processor.cache.reset()
        self.warmed_up = True

    def _ticket(self, adapter: str | Default | None) -> Ticket:
        session = self.compiled._session
        name = session.default if isinstance(adapter, Default) else adapter
        if name is None or name == BASE:
            return Ticket()
        hold = session.store.hold(name)
        pinned = session.store.pinned
        if name not in pinned and len(pinned) >= session.store.max_adapters:
            raise CapacityError(
                f"no slot for {name!r}: all {len(pinned)} are pinned; unpin_adapter() one, or "
                "compile with a larger LoraConfig(max_adapters=...)"
            )
        return Ticket(hold)

    def _batch(self) -> list[FutureRequestState]:
        """The requests of the step that is under way."""
        assert self.batch_processor is not None
        buffers: Any = self.batch_processor.inputs_and_outputs
        return list(buffers.requests_in_batch)

    def _create_batch_processor(self) -> ContinuousBatchProcessor:
        known = self.batch_processor
        with _possible(self.model):
            processor = super()._create_batch_processor()
        if processor is not known:
            scheduler: Any = processor.scheduler
            scheduler.session = self.compiled._session
            cache: Any = processor.cache
            cache.__class__ = AdapterPages  # the engine makes its cache itself
            cache.waiting = lambda request_id: scheduler.waiting_requests.get(request_id)
        return processor

    def _generation_step(self) -> None:
        processor = self.batch_processor
        assert processor is not None
        try:
            processor._generation_step(self._forward)
        except LorafxError as error:
            # The requests of this step fail; the others go on.
            processor.handle_batch_error(error)
            buffers: Any = processor.inputs_and_outputs
            buffers.requests_in_batch = []


@contextmanager
def _possible(model: Any) -> Iterator[None]:
    """Around what transformers makes for its engine.

    Raises:
        ConfigError: it cannot, for this model or with these sizes.
    """
    try:
        yield
    except ValueError as error:
        raise ConfigError(
            f"transformers' engine cannot make a paged cache for {type(model).__name__}: {error}. "
            "Change the ContinuousBatchingConfig if it is about sizes; otherwise call generate()"
        ) from error


#: What an engine's configuration may ask for that is not served here, and what it is then.
_OFF: Mapping[str, Any] = {
    "use_cuda_graph": False,
    "use_async_batching": False,
    "varlen_compile_config": None,
    "decode_compile_config": None,
}


def _served(config: ContinuousBatchingConfig | None) -> ContinuousBatchingConfig:
    """The configuration with what is not served switched off.

    Raises:
        ConfigError: it asks for something of that.
    """
    config = ContinuousBatchingConfig() if config is None else config
    asked = [name for name in _OFF if getattr(config, name) not in (None, False, (False, False))]
    if config.q_padding_interval_size or config.kv_padding_interval_size:
        asked.append("padding intervals (for CUDA graphs)")
    if config.default_compile_level:
        asked.append("default_compile_level")
    if asked:
        raise ConfigError(
            f"the ContinuousBatchingConfig asks for {', '.join(asked)}, which continuous batching "
            "with adapters does not serve: lorafx compiles the model itself. Leave them out"
        )
    scheduler = within_slots(config.scheduler_type)
    return dataclasses.replace(config, **_OFF, auto_switch_to_flash=False, scheduler_type=scheduler)
