"""Methods of a compiled model for continuous batching."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from lorafx.adapter_store.names import AdapterName
from lorafx.errors import BatchError, ConfigError, LorafxWarning
from lorafx.model.keywords import BY_ROW, refuse_slips
from lorafx.progress import progress
from lorafx.runtime.requests import checked_names
from lorafx.runtime.statistics import Statistics

if TYPE_CHECKING:
    from transformers.generation.configuration_utils import (
        ContinuousBatchingConfig,
        GenerationConfig,
    )
    from transformers.generation.continuous_batching.requests import GenerationOutput

    from lorafx.generation.continuous.manager import AdapterBatchingManager
    from lorafx.runtime.entry import CompiledForwards
    from lorafx.runtime.session import Session


#: Where the adapters of an engine are named.
_BY_REQUEST = {"adapter": 'the adapter of each request: engine.add_request(ids, adapter="sql")'}


class BatchingMethods:
    """The part of `CompiledModel` that is about requests that come and go."""

    _session: Session
    _entries: CompiledForwards

    @contextmanager
    def continuous_batching(
        self,
        generation_config: GenerationConfig | None = None,
        continuous_batching_config: ContinuousBatchingConfig | None = None,
        *,
        warmup: bool = True,
        timeout: float | None = None,
        **engine: Any,
    ) -> Iterator[AdapterBatchingManager]:
        """transformers' continuous batching, with an adapter for each request.

            with cm.continuous_batching() as engine:
                first = engine.add_request(ids, adapter="sql", max_new_tokens=64)
                for output in engine.request_id_iter(first): ...

        The engine runs in a thread until the block ends; calls of the model take turns with its
        steps. Adapters may be loaded, replaced and unloaded meanwhile. More adapters than there are
        slots take turns. Requests of different adapters share no blocks of the cache.

        Args:
            generation_config: how tokens are chosen, for all requests; None for the model's.
            continuous_batching_config: sizes of pages and batches, for example.
            warmup: compile the two graphs of the engine's steps first.
            timeout: seconds to wait for the requests that are under way when the block ends, after
                which they fail; None waits for all of them.
            **engine: of transformers' manager.

        Raises:
            ConfigError: transformers is too old, or the model or the configuration asks for
                something that is not served (CUDA graphs).
            CaptureError: the model was detached.
        """
        refuse_slips(engine, self.continuous_batching, ways=_BY_REQUEST)
        self._entries.check_attached()
        manager = _manager()(
            self._entries,
            generation_config,
            continuous_batching_config,
            **engine,
        )
        try:
            if warmup:
                with progress("compiling the engine's steps, ahead of requests"), torch.no_grad():
                    manager.warmup()
            manager.start()
            yield manager
        finally:
            if manager.is_running():
                manager.stop(block=True, timeout=timeout)
            manager.destroy()

    def generate_batch(
        self,
        inputs: Sequence[Sequence[int]],
        adapter_names: Sequence[AdapterName] | None = None,
        generation_config: GenerationConfig | None = None,
        continuous_batching_config: ContinuousBatchingConfig | None = None,
        *,
        max_new_tokens: int | None = None,
        warmup: bool = False,
        **request: Any,
    ) -> dict[str, GenerationOutput]:
        """Generate for many prompts by continuous batching.

        Args:
            inputs: the token ids of each prompt.
            adapter_names: the adapter of each prompt, as in `forward`.
            **request: of `add_request`, for all of them. Otherwise as `continuous_batching`.

        Returns:
            The outputs by the names of the requests, in the order of the prompts; those of further
            sequences of a prompt (`num_return_sequences`) come before its own. A request that
            failed says so in `error`, and one warning names all of them.

        Raises:
            BatchError: `adapter_names` has another length than `inputs`, or the engine stopped.
            UnknownAdapterError: a name that is not loaded. Nothing has run then.

        It also raises what `continuous_batching` raises.
        """
        refuse_slips(request, self.generate_batch, ways=BY_ROW)
        names = checked_names(adapter_names)
        if names is not None and len(names) != len(inputs):
            raise BatchError(
                f"adapter_names has {len(names)} entries, but there are {len(inputs)} prompts; "
                "give one name, or None for the base model, per prompt"
            )
        for name in dict.fromkeys(names or ()):
            if name is not None:
                self._session.store.check_known(name)
        if not inputs:
            return {}
        block = self.continuous_batching(
            generation_config, continuous_batching_config, warmup=warmup
        )
        with block as engine, progress(f"generating for {len(inputs)} prompts"):
            ids = []
            for row, prompt in enumerate(inputs):
                adapter = {} if names is None else {"adapter": names[row]}
                given: dict[str, Any] = {"max_new_tokens": max_new_tokens, **request, **adapter}
                ids.append(engine.add_request(list(prompt), **given))
            outputs = _collected(engine, ids)
        failed = [f"{key}: {output.error}" for key, output in outputs.items() if output.error]
        if failed:
            warnings.warn(
                f"{len(failed)} of {len(outputs)} requests failed; {'; '.join(failed)}",
                LorafxWarning,
                stacklevel=2,
            )
        return outputs

    def stats(self) -> Statistics:
        """What adapters have done since the model was compiled."""
        return self._session.statistics()


def _collected(engine: AdapterBatchingManager, ids: Sequence[str]) -> dict[str, GenerationOutput]:
    from lorafx.generation.continuous.adapter_requests import further

    count = engine.num_return_sequences - 1
    wanted = [name for request in ids for name in (*further(request, count), request)]
    found: dict[str, GenerationOutput] = {}
    while len(found) < len(wanted):
        output = engine.get_result(timeout=1)
        if output is not None and output.is_finished():
            found[output.request_id] = output
        elif output is None and not engine.is_running():
            cause = engine.background_thread_status.fatal_error
            raise BatchError(
                f"the engine stopped with {len(wanted) - len(found)} of {len(wanted)} requests "
                f"unanswered: {cause}"
            ) from cause
    return {key: found[key] for key in wanted}


def _manager() -> type[AdapterBatchingManager]:
    try:
        from lorafx.generation.continuous.manager import AdapterBatchingManager
    except ImportError as error:
        raise ConfigError(
            f"continuous batching needs transformers 5.23 or newer (the extra `hf`): {error}"
        ) from error
    return AdapterBatchingManager
