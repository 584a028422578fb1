"""CompiledModel: the executable that `lorafx.compile` returns.

One file: one public class, half of which are docstrings, and all of which users read in one place.
"""

from __future__ import annotations

import inspect
import os
import time
import warnings
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import MethodType
from typing import TYPE_CHECKING, Any, Never

from torch import Tensor, nn

from lorafx.adapter_store.names import BASE, AdapterName, members, one_name, with_experts
from lorafx.adapter_store.peft_model import without_wrappers
from lorafx.adapter_store.saved import Source
from lorafx.adapter_store.store import AdapterInfo, AdapterStore, info
from lorafx.compiled_model.as_module import (
    AsModule,
    refusing_backward,
    signature_of,
    special_methods,
)
from lorafx.compiled_model.names import delegated, refuse_arguments
from lorafx.compiled_model.warmup import state_restored, warm_up
from lorafx.errors import BatchError, CaptureError, ConfigError, LorafxWarning, numbered, some
from lorafx.generation.alora import forward_of
from lorafx.generation.generate import CompiledGenerate
from lorafx.generation.waves import in_waves
from lorafx.interrupts import undisturbed
from lorafx.model.attachment import Attachment
from lorafx.model.keywords import BY_ROW, GENERATE, refuse_slips
from lorafx.model.sites import Site
from lorafx.program.program import Program
from lorafx.program.stack import refuse_pipeline_slips, unwrapped
from lorafx.progress import progress
from lorafx.runtime.collection import collection_of_new
from lorafx.runtime.entry import Entry, entered
from lorafx.runtime.example_inputs import as_call
from lorafx.runtime.forwards import CompiledForwards
from lorafx.runtime.gates import requests_with_gates
from lorafx.runtime.kinds import Status
from lorafx.runtime.loading import load_adapter, name_to_load, prepared_unload
from lorafx.runtime.requests import Requests, check_tensors, checked_names
from lorafx.runtime.resting import Resting
from lorafx.runtime.running import refuse_transformed
from lorafx.runtime.session import Session
from lorafx.runtime.sharing import join, leave
from lorafx.runtime.statistics import Statistics
from lorafx.torch_internals.compat import untraced
from lorafx.weights.export_merged import export_merged
from lorafx.weights.loader import Weights, WeightUpdate, update_weights
from lorafx.weights.merge import MergeReport, merge, merged_of, unmerge

if TYPE_CHECKING:
    from transformers.generation.configuration_utils import (
        ContinuousBatchingConfig,
        GenerationConfig,
    )
    from transformers.generation.continuous_batching.requests import GenerationOutput
    from transformers.modeling_utils import PreTrainedModel

    from lorafx.capture.backend import Backend
    from lorafx.generation.continuous.manager import AdapterBatchingManager
    from lorafx.generation.continuous.shares import Share
    from lorafx.inspection.explanation import Explanation
    from lorafx.inspection.profile import Profile
    from lorafx.inspection.why import Why


#: How errors about misspelt keywords say where an engine takes the names of adapters.
_BY_REQUEST = {"adapter": 'the adapter of each request: engine.add_request(ids, adapter="sql")'}


class ActiveAdapters(tuple[str, ...]):
    """Names of adapters: PEFT reads the attribute `active_adapters`, transformers calls it."""

    def __call__(self) -> ActiveAdapters:
        return self


class CompiledModel(AsModule):
    """A model that serves its base and many LoRA adapters in one batch.

    `_orig_mod` is the model that was given; attributes that this object lacks are looked up there,
    and `model` is `_orig_mod` where the model has none. Methods of the model's own class also take
    `adapter_names`, and use the default of `set_adapter` without it. Parts of the model
    (`cm.lm_head`) and `_orig_mod` itself run as the base when they are called directly, and raise
    where the default adapter changes them. It is for inference only: gradients are off, and
    `backward` of a loss raises. Calls from several threads wait for one another. Its class is a
    subclass with the name of the model's class, which transformers' pipelines look at, and with the
    signature of its forward.
    """

    __slots__ = ("_disabling", "attached")

    def __new__(cls, program: Program, *_: Any, **__: Any) -> CompiledModel:
        return super().__new__(_class_of(type(program.model), cls))

    def __init__(
        self, program: Program, attachment: Attachment, store: AdapterStore, dynamic: bool | None
    ) -> None:
        self._orig_mod = program.model
        self._session = Session(program, store, _new_backend, dynamic)
        self._entries = CompiledForwards(self._session, attachment)
        self._generation = CompiledGenerate(self._entries)
        #: The default before each open block of `disable_adapter`; read and written under the lock.
        self._disabling: list[list[str | None]] = []
        #: Whether users call the model that was given (`lorafx.attach`), and not this object.
        self.attached = False
        try:
            join(self._session)
        except BaseException:
            attachment.detach()
            raise
        program.runtime.resting = Resting(self._session)
        _COMPILED.add(self)

    # --- calls ---

    @untraced
    def forward(
        self,
        *args: Any,
        adapter_names: Sequence[AdapterName] | None = None,
        adapter_slots: Tensor | None = None,
        adapter_gates: tuple[Tensor, Tensor] | None = None,
        **kwargs: Any,
    ) -> Any:
        """The model's forward with an adapter for each row.

        Args:
            adapter_names: one name per request, in the order of the batch; None or "__base__" is
                the base model, and {"sql": 0.7, "style": 0.3} a sum of adapters, or one at another
                scale. An aLoRA adapter serves its row from the last occurrence of its invocation
                tokens in `input_ids` on. Without names every row uses the default of `set_adapter`.
            adapter_slots: integers (B, T), the adapter of each token as an index into
                `adapter_names`, or without it into `adapters`; -1 is the base model. With a cache,
                T are the new tokens. Shape (B,) gives one per request, as names do.
            adapter_gates: slots and weights (B, T, k): token t of row b gets the sum over j of
                `weights[b, t, j]`, finite and not negative, times the delta of adapter
                `slots[b, t, j]`, an index as in `adapter_slots`. k is 16 at most. Shape (B, k)
                gives one mix per request.
            *args, **kwargs: of the model's own forward.

        Raises:
            ConfigError: `adapter_names` is not a list of names; a sum has a weight that is not
                finite; a sum or gates have an adapter that is not linear in it (DoRA, weights of
                its own); or a keyword is a slip for one of these, or another library's for it.
            BatchError: names, slots or gates do not fit the batch; or an aLoRA adapter has no
                `input_ids` to be looked for in, or a cache whose tokens are not known.
            UnknownAdapterError: a name that is not loaded.
            CapacityError: more distinct adapters than slots, unless `Options.overflow` is "waves";
                or a sum of ranks over `max_rank`.
            ProvenanceError, MatchError: this batch cannot be served correctly; the error says why.
            CaptureError: the model was detached, moved, or needs more graphs than allowed.
        """
        running, ways = self._session.running, (adapter_names, adapter_slots, adapter_gates)
        if running.inner and running.here and ways == (None, None, None):
            return running.inner(*args, **kwargs)
        serve = self._serving(kwargs, *ways, whole=False)
        return refusing_backward(serve(args, kwargs))

    @untraced
    def __call__(
        self,
        *args: Any,
        adapter_names: Sequence[AdapterName] | None = None,
        adapter_slots: Tensor | None = None,
        adapter_gates: tuple[Tensor, Tensor] | None = None,
        **kwargs: Any,
    ) -> Any:
        """As `forward`, with the hooks of the model around, and what users put in its place."""
        serve = self._serving(kwargs, adapter_names, adapter_slots, adapter_gates, whole=True)
        return refusing_backward(serve(args, kwargs))

    def _serving(
        self,
        kwargs: Mapping[str, Any],
        adapter_names: Sequence[AdapterName] | None,
        adapter_slots: Tensor | None,
        adapter_gates: tuple[Tensor, Tensor] | None,
        *,
        whole: bool,
    ) -> Callable[[Sequence[Any], Mapping[str, Any]], Any]:
        """What serves a call with these adapters, given its arguments."""
        self._entries.check_attached()
        refuse_slips(kwargs, self._orig_mod.forward, self._orig_mod)
        requests = requests_with_gates(adapter_names, adapter_slots, adapter_gates, self.adapters)
        if requests is None:
            refuse_pipeline_slips(self._orig_mod)

        def find() -> Callable[..., Any]:
            self._entries.check_attached()  # it may have been detached while the call waited
            forward = forward_of(self._entries)
            return self._entries.whole(forward) if whole else forward

        return in_waves(self._entries, find, requests)

    @untraced
    def generate(
        self,
        *args: Any,
        adapter_names: Sequence[AdapterName] | None = None,
        adapter_gates: tuple[Tensor, Tensor] | None = None,
        **kwargs: Any,
    ) -> Any:
        """transformers' `generate` with an adapter for each prompt, named as in `forward`, or gates
        (B, k), one mix for each, for all rows that come from it. Raises LorafxError if the model
        has no `generate`, BatchError if it is not proved from which prompt a row comes, and what
        `forward` raises."""
        self._entries.check_attached()
        generating = getattr(self._orig_mod, "generate", self._orig_mod.forward)
        refuse_slips(kwargs, generating, self._orig_mod, GENERATE)
        main = getattr(self._orig_mod, "main_input_name", "input_ids")
        check_tensors({main: args[0], **kwargs} if args else kwargs)
        requests = requests_with_gates(adapter_names, None, adapter_gates, self.adapters)
        if requests is not None:
            if adapter_gates is not None and adapter_gates[0].dim() == 3:
                raise BatchError(
                    "generate() makes tokens, for which adapter_gates of shape (B, T, k) say "
                    "nothing; give (B, k), one mix for each prompt, or call the model itself"
                )
            requests.check_prompts(kwargs.get("input_ids", args[0] if args else kwargs.get(main)))

        def find() -> Callable[..., Any]:
            self._entries.check_attached()
            return self._generation.generate

        return in_waves(self._entries, find, requests, generates=True)(args, kwargs)

    def entry(self, module: nn.Module, *, method: MethodType | None = None) -> Entry:
        """The compiled forward of `module`, or another method of it (`CompiledForwards.of`)."""
        return self._entries.of(module, method=method)

    def capture(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Capture the graphs of this call by running it without adapters and with them."""
        self._entries.check_attached()
        session = self._session

        def run_both_ways() -> None:
            forward = self._entries.whole(self.entry(self._orig_mod))
            forward(*args, **kwargs)
            session.note(session.running._replace(active=True), lambda: forward(*args, **kwargs))

        with session.lock:
            warming = session.running._replace(warming=True)
            requests = Requests((None,), uniform=True)
            session.note(warming, lambda: session.call(lambda: run_both_ways, requests))

    def warmup(
        self,
        example_inputs: Mapping[str, Any] | Sequence[Any] | None = None,
        *,
        batch_sizes: Sequence[int] = (1, 8),
        lengths: Sequence[int] = (16,),
        generate: bool | Mapping[str, Any] | None = None,
    ) -> None:
        """Capture and compile every graph that serving will need, so that no request waits for it.

        It runs the model's forward, once more with the returned cache and one further token, and
        `generate`: each for every batch size and length, with no adapter, with one, and with a mix
        of dummy adapters. Afterwards adapters, the default, slots, pins, random states and the
        buffers of the model are as before, even when this raises. Other calls wait. It takes as
        long as compiling does: 6 graphs for a causal language model on a CPU, more on a GPU.

        Args:
            example_inputs: keyword arguments (or positional ones) of a call; a graph serves calls
                with the same arguments. Without them the calls have token ids and an attention
                mask, made from the model's configuration.
            batch_sizes: numbers of requests. A batch of one request is captured by itself. All
                others share one graph, whose Triton kernels are planned for the first of them: give
                the sizes that you will serve.
            lengths: numbers of tokens of a prompt. Prompts of one token have graphs of their own:
                give (16, 1) to include them; the other lengths share theirs. If the attention has a
                window, also give one length beyond it.
            generate: None runs forward, and `generate` where the model has it; False runs only
                forward; True, or keyword arguments for it (`{"num_beams": 4}`), runs only
                `generate`.

        Raises:
            ConfigError: an argument that cannot be honoured, or a model whose inputs cannot be
                derived.
            CapacityError: `max_rank` is less than the shards of the rank of a class.
            CaptureError: the model was detached, moved, or needs more graphs than allowed.

        It also raises what the model's own forward raises for these inputs.
        """
        self._entries.check_attached()
        sizes: dict[str, Any] = {"batch_sizes": batch_sizes, "lengths": lengths}
        warm_up(self, self.generate, example_inputs, **sizes, generate=generate)

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until no graph is being compiled beside the calls (`Options.start`). Returns whether
        that is so; False if `timeout` seconds have passed. Calls go on meanwhile. A graph is
        compiled from the second call of its kind on: a kind that was called once is not waited for.
        """
        last = None if timeout is None else time.monotonic() + timeout
        tiers = self._entries.tiers
        while tiers is not None and tiers.busy(self._session):
            if last is not None and time.monotonic() >= last:
                return False
            time.sleep(0.02)
        return True

    def status(self) -> Status:
        """How calls are answered at present, by their kinds: eagerly, while a graph is compiled
        beside or for good, or by a graph (`Options.start`). `str()` is text."""
        tiers = self._entries.tiers
        return Status((), self.recompiles) if tiers is None else tiers.status(self._session)

    # --- adapters, also by PEFT's and transformers' names ---

    def set_adapter(self, name: AdapterName | Sequence[str]) -> None:
        """Set the adapter of calls that name none; None is the base model, a mapping a sum as in
        `forward`, a list the sum of these adapters, as in PEFT.

        Raises:
            UnknownAdapterError: the adapter is not loaded.
            ConfigError: another adapter is merged; or as `forward` for a sum.
            CapacityError: as `forward` for a sum.
            BatchError: called from the source that `load_weights` reads, or inside a call.
        """
        session = self._session
        session.refuse_running("set_adapter()")
        if isinstance(name, (list, tuple)):
            name = dict.fromkeys(name, 1.0)
        name = one_name(name, "the default")
        name = None if name == BASE else name
        with session.fetch_adapters(Requests((name,))), session.lock:
            if name is not None:
                session.store[name]
            merged = session.base.merged
            if merged is not None and merged.name != name:
                raise ConfigError(
                    f"{merged.name!r} is merged and serves the calls that name no adapter; "
                    f"call unmerge() before set_adapter({name!r})"
                )
            session.choose(name)

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Inside the block, calls that name no adapter use the base; then the default is restored.

        It is `set_adapter(None)` for the length of a block, in all threads, and raises what that
        raises. Calls that name adapters get them. If blocks overlap, the last one that ends
        restores the default, unless that was unloaded inside.
        """
        session, blocks = self._session, self._disabling
        with session.lock:
            block = [session.default]
            self.set_adapter(None)
            blocks.append(block)
        try:
            yield
        finally:
            with session.lock:
                index = next(i for i, other in enumerate(blocks) if other is block)
                del blocks[index]
                if index < len(blocks):  # of another thread or task, which began inside this one
                    blocks[index][0] = blocks[index][0] or block[0]
                elif block[0] is not None and block[0] in session.store:
                    self.set_adapter(block[0])

    def load_adapter(
        self,
        source: Source,
        name: str | None = None,
        *,
        adapter_name: str | None = None,
        strict: bool | None = None,
        **elsewhere: Never,
    ) -> None:
        """Read an adapter and keep it in host memory; a batch that names it gives it a slot.

        An adapter of the same name is replaced. Calls go on while the files are read; requests of
        a continuous batch that have been added keep the version that they were added with.

        Args:
            source: a folder, a file, a name on the Hugging Face hub, the bytes of a file, tensors
                by name, or an `AdapterSource`, which also says what the files do not: a
                configuration, the dialect, modules that moved (docs/adapters.md).
            name: the name of the adapter in calls; `adapter_name`, PEFT's keyword, is the same.
                Without either it is "default", which replaces no adapter.
            strict: whether the file must have factors for every selected module that the adapter's
                own configuration targets. Otherwise such a module keeps W, with one warning. None
                means `Options.strict`.
            **elsewhere: arguments of PEFT and transformers (`is_trainable`, ...): refused with the
                way out, unless they are False or None.

        Raises:
            CheckpointError, UnsupportedAdapterError, CapacityError: nothing has changed then.
            ConfigError: no name, where one is needed; the adapter of this name is merged, or any
                adapter is merged and this one is DoRA, whose norms come from the base's weights.
            BatchError: the call that is running on this thread serves the adapter of this name.
        """
        refuse_arguments("load_adapter", (), elsewhere)
        name = name_to_load(self._session, name, adapter_name)
        load_adapter(self._session, source, name, strict)

    def unload_adapter(self, name: str) -> None:
        """Unload an adapter and free its slot. If it was the default, or part of a sum that was,
        the base model becomes the default. Raises UnknownAdapterError if it is not loaded,
        ConfigError if it is merged, BatchError if the running call of this thread serves it."""
        session = self._session
        with session.lock:
            session.locks.streams.follow(session.accelerators)
            undisturbed(prepared_unload(session, name))

    def delete_adapter(self, name: str) -> None:
        """As `unload_adapter`, under PEFT's name."""
        self.unload_adapter(name)

    def pin_adapter(self, name: str) -> None:
        """Bring an adapter, or a route and its adapters, into slots now and keep them there. Raises
        UnknownAdapterError if it is not loaded, CapacityError if every slot is pinned, BatchError
        inside a forward on this thread, unless it has a slot."""
        refuse_transformed()
        session = self._session
        session.store.check_known(name)
        # A running call may read the slot that it takes.
        names = with_experts([name])
        with session.store.fetch([*names], resident=True), session.lock:
            if session.running.entries and not names.keys() <= session.store.resident.keys():
                raise BatchError(
                    f"a forward is running on this thread; pin {name!r} when it has returned"
                )
            session.locks.streams.follow(session.accelerators)
            session.store.pin(name)

    def unpin_adapter(self, name: str) -> None:
        """Let what `pin_adapter` keeps by this name be evicted again. Raises UnknownAdapterError if
        it is not loaded."""
        self._session.store.unpin(name)

    def prefetch_adapters(self, names: Iterable[AdapterName]) -> None:
        """Read those of these adapters, or sums, for which host memory had no room
        (`LoraConfig.max_host_bytes`), before a call uses them; calls of other threads go on. They
        stay until others are used more recently. Raises UnknownAdapterError, or CheckpointError if
        a file has changed since it was loaded."""
        refuse_transformed()
        self._session.store.fetch([one_name(name, "prefetch_adapters()") for name in names])

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names of the loaded adapters, in order of loading."""
        return self._session.store.names

    def list_adapters(self) -> list[str]:
        """As `adapters`, in a list."""
        return list(self._session.store.names)

    @property
    def active_adapter(self) -> str | None:
        """The default of `set_adapter`; None is the base. A sum reads "0.7·sql + 0.3·style"."""
        return self._session.default

    @property
    def active_adapters(self) -> ActiveAdapters:
        """The adapters of `active_adapter`: none, one, or those of a sum. It can also be called."""
        default = self._session.default
        return ActiveAdapters(() if default is None else members(default))

    def get_adapter(self, name: str) -> AdapterInfo:
        """Facts about a loaded adapter: source, rank, sites, version, slot, memory. Raises
        UnknownAdapterError if it is not loaded."""
        return info(self._session.store, name)

    @property
    def adapter_versions(self) -> dict[str, int]:
        """The version of each loaded adapter, a number that no other version in this process has.
        It grows when an adapter is replaced. A call serves one version of each."""
        return self._session.store.versions

    # --- base weights ---

    def load_weights(self, weights: Weights, *, strict: bool = True) -> WeightUpdate:
        """Update the base weights in place, under any naming that a trainer produces.

        Nothing is compiled again, and addresses and adapters stay. What depends on the
        weights is updated too: packed and tied weights, views of absorbed ones, norms of DoRA.
        The update waits for running calls. docs/base_weights.md has the namings.

        Args:
            weights: (name, tensor) pairs, a mapping, a safetensors file or folder, or a function
                without arguments that yields pairs, called twice. Each of these is checked as a
                whole before the first write. A generator can be read only once, so its tensors are
                copied to host memory first.
            strict: whether unknown names and parameters that get nothing are errors. Otherwise
                they are reported.

        Returns:
            The names that were loaded, missing and ignored.

        Raises:
            BaseWeightsError: unknown, duplicate or missing names, wrong shapes, another kind of
                numbers (floats for a quantised weight), different values for tied weights, or a
                module that keeps a copy of a weight. It lists all problems, and the old weights
                stay in service.
            ConfigError: `weights` is none of the above, or an adapter is merged.
            BatchError: a call, or another update, is running on this thread.

        It also raises what iterating over `weights` raises. If that happens in the second round
        over a function, or while files are read, weights are partly written, and calls are refused
        until an update succeeds.
        """
        self._entries.check_attached()
        return update_weights(self._session, weights, strict=strict)

    def merge(self, name: str, *, requantize: bool = False) -> MergeReport:
        """Add an adapter to the base weights, in place: calls run at the speed of the base model.

        Until `unmerge`, this adapter serves all calls, whether they name it or nothing; a call that
        names another adapter or the base is refused. Graphs, addresses and the model's own modules
        stay; `_orig_mod`, called directly, is the merged model.

        Args:
            requantize: whether to store W + ΔW in the format of W if W is quantised, which loses a
                part of ΔW, perhaps most of it (`MergeReport`). Otherwise such weights are refused.

        Returns:
            The weights that hold W + ΔW now, the error of rounding to their dtype, and the bytes of
            host memory that the originals take.

        Raises:
            UnknownAdapterError: the adapter is not loaded.
            ConfigError: an adapter is already merged, or another one is the default of
                `set_adapter`.
            BatchError: a call is running on this thread.
            MatchError: a weight cannot take ΔW: it is quantised, tied to one that gets another ΔW,
                shared with another model in service, copied by a module, or the sum is beyond the
                range of its dtype.

        Nothing has changed then.
        """
        self._entries.check_attached()
        return merge(self._session, name, requantize=requantize)

    def unmerge(self, *, force: bool = False) -> None:
        """Put the base's own weights back, bit for bit; adapters can be mixed in batches again.

        Raises:
            ConfigError: no adapter is merged.
            BatchError: a call is running on this thread.
            CaptureError: something other than `load_weights` has written or replaced weights since
                the merge. With `force` those writes are lost, and replaced weights stay.
        """
        unmerge(self._session, force=force)

    @property
    def merged(self) -> str | None:
        """The adapter that is merged into the base weights, if any."""
        merged = self._session.base.merged
        return None if merged is None else merged.name

    def export_merged(
        self, name: str, folder: str | os.PathLike[str], *, max_shard_size: int | str = "5GB"
    ) -> Path:
        """Write the model with an adapter merged, for `from_pretrained`, and return the folder. The
        model stays as it is, and other threads are served meanwhile.

        A transformers model is written by its own `save_pretrained`, with its configurations; any
        other module as one `model.safetensors` with the names of its `state_dict()`. Tied weights
        that the adapter changes differently are written as two.

        The folder is created if it is missing. While this runs it also holds one file for each
        changed weight, so that no second copy of the model is in memory.

        Raises:
            UnknownAdapterError: the adapter is not loaded.
            MatchError: a weight cannot take ΔW (as for `merge`), or the module has no configuration
                that could declare tied weights untied.
            CheckpointError: the folder cannot be written.
        """
        self._entries.check_attached()
        return export_merged(self._session, name, Path(folder), max_shard_size=max_shard_size)

    # --- requests that come and go ---

    @contextmanager
    def continuous_batching(
        self,
        generation_config: GenerationConfig | None = None,
        continuous_batching_config: ContinuousBatchingConfig | None = None,
        *,
        warmup: bool | None = None,
        timeout: float | None = None,
        tokenizer: Any = None,
        shares: Mapping[str | None, Share] | None = None,
        assistant_model: PreTrainedModel | CompiledModel | None = None,
        num_assistant_tokens: int | None = None,
        prompt_lookup_num_tokens: int | None = None,
        **engine: Any,
    ) -> Iterator[AdapterBatchingManager]:
        """transformers' continuous batching, with an adapter for each request.

            with cm.continuous_batching() as engine:
                first = engine.add_request(ids, adapter="sql", max_new_tokens=64)
                for output in engine.request_id_iter(first): ...

        The engine runs in a thread until the block ends; calls of the model take turns with its
        steps. Adapters may be loaded, replaced and unloaded meanwhile. More adapters than there are
        slots take turns.

        Args:
            generation_config: how tokens are chosen, for all requests; None for the model's.
            continuous_batching_config: sizes of pages and batches, for example.
            warmup: compile the two graphs of the engine's steps first. None: only where steps
                would wait for them; otherwise they are begun, and requests are answered meanwhile
                (`Options.start`).
            timeout: seconds to wait at the end of the block for requests that are running, after
                which they fail; None waits for all of them.
            tokenizer: the model's, for requests with `stop` or `bad_words`.
            shares: the weight and the bound of adapters, `{"sql": lorafx.Share(weight=3.0)}`; None
                is the base (docs/continuous_batching.md).
            assistant_model: a smaller model of the same vocabulary, which guesses
                `num_assistant_tokens` tokens (5) of each request; steps verify them together. A
                compiled one uses its adapter of the name of the request's, if it has one.
            prompt_lookup_num_tokens: guess so many tokens by what stood behind the same tokens
                before; None for what the generation_config says.
            **engine: arguments of transformers' manager.

        Raises:
            ConfigError: transformers is too old, the model or the configuration asks for something
                that is not served (CUDA graphs), a share cannot be one, or the assistant_model
                cannot serve.
            UnknownAdapterError: a share is of an adapter that is not loaded.
            CaptureError: the model was detached.
        """
        refuse_slips(engine, self.continuous_batching, ways=_BY_REQUEST)
        self._entries.check_attached()
        try:
            from lorafx.generation.continuous.manager import AdapterBatchingManager
        except ImportError as error:
            raise ConfigError(
                f"continuous batching needs transformers 5.23 or newer (the extra `hf`): {error}"
            ) from error
        draft: Any = assistant_model
        if isinstance(draft, CompiledModel):
            draft._entries.check_attached()
            draft = draft._entries
        manager = AdapterBatchingManager(
            *(self._entries, generation_config, continuous_batching_config, tokenizer, shares),
            assistant_model=draft,
            num_assistant_tokens=num_assistant_tokens,
            prompt_lookup_num_tokens=prompt_lookup_num_tokens,
            **engine,
        )
        try:
            if warmup or (warmup is None and self._entries.tiers is None):
                with progress("compiling the engine's steps, ahead of requests"):
                    manager.warmup()
            manager.compiles_beside = warmup is None and self._entries.tiers is not None
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
        tokenizer: Any = None,
        **request: Any,
    ) -> dict[str, GenerationOutput]:
        """Generate for many prompts by continuous batching.

        Args:
            inputs: the token ids of each prompt.
            adapter_names: the adapter of each prompt, as in `forward`.
            tokenizer: as in `continuous_batching`.
            **request: arguments of `add_request`, for all prompts; `return_logprobs=True` tells the
                log-probability of each token, as it was drawn and raw.

        Returns:
            The outputs by the names of the requests, in the order of the prompts; those of further
            sequences of a prompt (`n`) come before its own. A request that
            failed says so in `error`, and one warning names all of them.

        Raises BatchError if there is not a name for each prompt, or the engine stopped,
        UnknownAdapterError before anything has run, and what `continuous_batching` raises.
        """
        refuse_slips(request, self.generate_batch, ways=BY_ROW)
        names = checked_names(adapter_names)
        if names is not None and len(names) != len(inputs):
            raise BatchError(
                f"adapter_names has {numbered(len(names), 'entry', 'entries')} for "
                f"{numbered(len(inputs), 'prompt')}; give one name, or None for the "
                "base model, per prompt"
            )
        for name in dict.fromkeys(names or ()):
            if name is not None:
                self._session.store.check_known(name)
        if not inputs:
            return {}
        block = self.continuous_batching(
            generation_config, continuous_batching_config, warmup=warmup, tokenizer=tokenizer
        )
        told = progress(f"generating for {len(inputs)} prompts")
        with collection_of_new(), block as engine, told:
            ids = []
            for row, prompt in enumerate(inputs):
                adapter = {} if names is None else {"adapter": names[row]}
                settings: dict[str, Any] = {"max_new_tokens": max_new_tokens, **request, **adapter}
                ids.append(engine.add_request(list(prompt), **settings))
            outputs = engine.collected(ids, request.get("n"))
        failed = [f"{key}: {output.error}" for key, output in outputs.items() if output.error]
        if failed:
            warnings.warn(
                f"{len(failed)} of {len(outputs)} requests failed; {'; '.join(failed)}",
                LorafxWarning,
                stacklevel=2,
            )
        return outputs

    # --- reports ---

    def explain(self) -> Explanation:
        """A report of the present sites, banks, adapters, graphs, packs, row maps, plan and
        refusals: `json()` has its values, and `str()` is text. It waits for running calls."""
        from lorafx.inspection.explaining import explained

        with self._session.lock:
            return explained(self._session, self.status().kinds)

    def why(
        self,
        path: str,
        adapter: str | None = None,
        *,
        inputs: Mapping[str, Any] | Sequence[Any] | None = None,
    ) -> Why:
        """Explain what became of the module at `path` (also of one that only adapters name, such as
        q_proj of a packed qkv_proj): whether it carries LoRA and by which rule, what an adapter has
        for it, in which graphs it is and how, and what refuses it.

        With `adapter` it has the norm of ΔW too, and with `inputs`, the arguments of a call, how
        much the adapter changes the result of the module: ‖delta‖ / ‖y‖ in one eager run of the
        model with this adapter for all requests. `str()` is text, `json()` has the values.

        Raises:
            ConfigError: there is no such module; the error names the nearest paths.
            UnknownAdapterError: the adapter is not loaded.

        With `inputs` it also raises what a call raises.
        """
        from lorafx.inspection.why import why

        call = None if inputs is None else as_call(inputs)
        session = self._session
        session.refuse_running("why()")
        with session.lock:
            return why(session, path, adapter, call)

    def profile(
        self,
        inputs: Mapping[str, Any] | Sequence[Any],
        adapter_names: Sequence[str | None],
        *,
        calls: int = 10,
    ) -> Profile:
        """Measure where the time of a call goes, site by site, beside the byte floor.

        The graphs are captured once more, and their operators run one by one under torch.profiler;
        the base's products and LoRA use the kernels that serve calls. `calls` calls are measured,
        after one that compiles. The call as it is served is timed too. Other calls wait.

        Raises BatchError if no request has an adapter, ConfigError if `calls` is not positive, and
        what a call raises.
        """
        from lorafx.inspection.profiling import profiled

        self._entries.check_attached()
        return profiled(self._entries, self, inputs, list(adapter_names), calls)

    def dump(
        self,
        folder: str | os.PathLike[str],
        inputs: Mapping[str, Any] | Sequence[Any] | None = None,
        adapter_names: Sequence[str | None] | None = None,
    ) -> Path:
        """Write the graphs, before and after each pass, as text and as diffs, with the code that
        was generated for them, `explain.txt`, and `index.html`, which shows all of it in a browser
        (docs/look_inside.md).

        Graphs are kept after each pass only where `Options(dump=...)` or LORAFX_DUMP asked for it
        when they were compiled. With `inputs`, the arguments of a call, the graphs of that call are
        captured once more and run operator by operator, other calls wait, and the dump has their
        stages. Of all others the generated code alone is written, and a warning says so.

        Raises ConfigError if the folder cannot be made, or written to. With `inputs` it also raises
        what a call raises.
        """
        from lorafx.inspection.report import written_into
        from lorafx.inspection.viewer.dump import Dump
        from lorafx.runtime.replay import with_stages_of

        target = Path(folder)
        with written_into(target), self._session.lock:
            records = self._session.records
            if inputs is not None:
                args, kwargs = as_call(inputs)
                call = partial(self, *args, **kwargs, adapter_names=adapter_names)
                with state_restored(self):
                    records = with_stages_of(self._entries, call)
            dump = Dump(target, self._session.program)
            for record in records:
                dump.add(record)
            dump.write(self.explain())
        unseen = [record.title for record in records if not record.stages]
        if unseen:
            warnings.warn(
                f"{target} has no stages of {some(unseen)}, which were not kept: pass the inputs "
                "of a call to dump, which captures its graphs once more; LORAFX_DUMP, or "
                "Options(dump=...), writes graphs after each pass as they are compiled",
                LorafxWarning,
                stacklevel=2,
            )
        return target

    def __getattr__(self, name: str) -> Any:
        if name == "_orig_mod":  # not set yet
            raise AttributeError(name)
        return delegated(self, name)

    def __repr__(self) -> str:
        from lorafx.inspection.explaining import explained

        lines = explained(self._session, self.status().kinds, quick=True).summary
        ways = "explain() says all, why(path) what became of a module, dump(folder) writes graphs"
        inside = [*lines, f"base model: {type(self._orig_mod).__module__}, as cm._orig_mod", ways]
        return "\n".join(["CompiledModel(", *(f"  {line}" for line in inside), ")"])

    # --- state ---

    @property
    def sites(self) -> tuple[Site, ...]:
        """The modules that can carry LoRA, by canonical path with their aliases."""
        return self._session.program.sites

    @property
    def recompiles(self) -> int:
        """Graphs compiled so far."""
        return len(self._session.records)

    def stats(self) -> Statistics:
        """Counts of adapters since the model was compiled."""
        return self._session.counts.statistics(self._session.store)

    def memory(self) -> dict[str, int]:
        """Sizes in bytes: "banks" on the device, "host" copies of adapters, their files on
        "disk", "base" parameters, "originals" of merged weights in host memory."""
        parameter_bytes = {id(p): p.numel() * p.element_size() for p in self._orig_mod.parameters()}
        merged = merged_of(self._session)
        return {
            **self._session.store.nbytes(),
            "base": sum(parameter_bytes.values()),
            "originals": 0 if merged is None else merged.report.original_bytes,
        }

    def detach(self) -> nn.Module:
        """Remove the marks from the model and return it; this object serves no more calls.

        A `peft.PeftModel` that was compiled gets its wrappers back. A merged adapter is removed
        first (`unmerge`). This waits for running calls.

        Raises BatchError if a call is running on this thread, and what `unmerge` raises.
        """
        session = self._session
        session.refuse_running("detach()")
        with session.weights_lock, session.lock:
            if self.merged is not None:
                self.unmerge()
            undisturbed(self._entries.attachment.detach)
            leave(session)
            if self._entries.tiers is not None:
                self._entries.tiers.compilers.end()
        return self._orig_mod

    @property
    def detached(self) -> bool:
        """Whether the marks were removed from the model."""
        return self._entries.detached


def _new_backend(session: Session) -> Backend:
    from lorafx.capture.backend import Backend
    from lorafx.inspection.viewer.dump import Dumps

    return Backend(session.program, entered, observers=[Dumps(session)])


#: All live compiled models, also those that are detached.
_COMPILED: weakref.WeakSet[CompiledModel] = weakref.WeakSet()

#: Classes of models -> classes of their compiled models, by the class that these derive from.
_CLASSES: weakref.WeakKeyDictionary[type, dict[type, type]] = weakref.WeakKeyDictionary()


def _class_of(model: type[nn.Module], kind: type[CompiledModel]) -> type[CompiledModel]:
    classes = _CLASSES.setdefault(model, {})
    if kind not in classes:
        forward = untraced(inspect.unwrap(CompiledModel.forward))
        forward.__signature__ = signature_of(model, forward)
        attributes = {"__doc__": kind.__doc__, "forward": forward, **special_methods(model)}
        classes[kind] = type(model.__name__, (kind,), attributes)
    return classes[kind]


def compiled_of(model: object) -> CompiledModel | None:
    """The compiled model in service for `model`: one that was given to `lorafx.compile`, also as a
    PeftModel, or that it returned."""
    if isinstance(model, CompiledModel):
        return model
    if isinstance(model, nn.Module):
        model = without_wrappers(unwrapped(model))
    serving = (compiled for compiled in list(_COMPILED) if not compiled.detached)
    return next((compiled for compiled in serving if compiled._orig_mod is model), None)


def attached_models(among: Collection[int] | None = None) -> list[CompiledModel]:
    """The compiled models of models that `lorafx.attach` marked, with ids in `among` if given."""
    attached = [compiled for compiled in list(_COMPILED) if compiled.attached]
    return [
        compiled
        for compiled in attached
        if not compiled.detached and (among is None or id(compiled._orig_mod) in among)
    ]


def refuse_other(model: object) -> None:
    """Raise ConfigError unless `model` is an nn.Module."""
    if not isinstance(model, nn.Module):
        raise ConfigError(
            f"{type(model).__name__} is no nn.Module; of a pipeline of diffusers, "
            "lorafx.compile_pipeline(pipe) compiles all models that carry LoRA"
        )


def refuse_compiled(model: nn.Module) -> None:
    """Raise CaptureError if `model` is compiled already, or is or contains a compiled model, and
    ConfigError unless it is an nn.Module."""
    refuse_other(model)
    compiled = compiled_of(model)
    if compiled is not None and compiled.attached:
        raise CaptureError(
            f"this {type(model).__name__} already carries a LoRA mark: lorafx.attach has given it "
            "LoRA, and lorafx.load_adapter(model, ...) takes more adapters. To begin anew, call "
            "lorafx.detach(model) first"
        )
    if compiled is not None:
        raise CaptureError(
            f"lorafx already compiled this {type(model).__name__}; use the compiled model, whose "
            "load_adapter() takes more adapters. To compile it anew, as a notebook's cell does "
            "that runs twice, call lorafx.detach(model) first"
        )
    inside = [path for path, part in model.named_modules() if isinstance(part, CompiledModel)]
    if inside:
        raise CaptureError(
            f"{type(model).__name__} holds a compiled model at {inside[0]}, which has adapters of "
            "its own and would run without those of this call: put that model in its place after "
            "lorafx.detach(), and compile the whole"
        )
