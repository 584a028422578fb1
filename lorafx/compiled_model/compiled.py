"""CompiledModel: the executable that `lorafx.compile` returns."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from types import MethodType
from typing import Any

from torch import Tensor, nn

from lorafx.adapter_store.names import AdapterName
from lorafx.adapter_store.peft_model import without_wrappers
from lorafx.adapter_store.store import AdapterStore
from lorafx.capture.backend import Backend
from lorafx.compiled_model.adapter_methods import AdapterMethods
from lorafx.compiled_model.as_module import AsModule, refusing_backward, signature_of
from lorafx.compiled_model.base_methods import BaseMethods
from lorafx.compiled_model.batching_methods import BatchingMethods
from lorafx.compiled_model.look_methods import LookMethods
from lorafx.compiled_model.names import delegated
from lorafx.compiled_model.warmup import warm_up
from lorafx.errors import CaptureError, ConfigError
from lorafx.generation.alora import forward_of
from lorafx.generation.generate import CompiledGenerate
from lorafx.generation.waves import in_waves
from lorafx.inspection.replay import MadeCall
from lorafx.inspection.viewer.dump import Dumps
from lorafx.interrupts import undisturbed
from lorafx.model.changes_watch import hooks_of
from lorafx.model.keywords import BY_ROW, refuse_slips
from lorafx.model.marks import Attachment
from lorafx.model.sites import Site
from lorafx.program.program import Program
from lorafx.program.stack import refuse_pipeline_slips, unwrapped
from lorafx.runtime.call_inputs import check_tensors
from lorafx.runtime.entry import CompiledForwards, Entry, entered
from lorafx.runtime.idle import Resting
from lorafx.runtime.requests import (
    LastCall,
    Names,
    Requests,
    by_slots,
    check_prompts,
    checked_names,
)
from lorafx.runtime.session import Session
from lorafx.runtime.sharing import join, leave
from lorafx.torch_internals.compat import untraced
from lorafx.weights.merge import merged_of


class CompiledModel(LookMethods, AdapterMethods, BaseMethods, BatchingMethods, AsModule):
    """A model that serves its base and many LoRA adapters in one batch.

    `model` is the model that was given, with the same classes, names, `state_dict()` and
    `save_pretrained()`; attributes that this object lacks are looked up there. Methods of the
    model's own class also take `adapter_names` and use the default of `set_adapter`, as a call
    does: they are compiled where an adapter is wanted, and run as they are where none is. Parts of
    the model (`cm.lm_head`, `cm.get_encoder()`) and `model` itself run as the base when they are
    called directly, and raise where the default adapter changes them. This object is for inference
    only: gradients are off, and `backward` of a loss raises. Calls from several threads wait for
    one another. Its class is a subclass with the name of the model's class, by which transformers'
    pipelines choose, and with the signature of its forward.
    """

    def __new__(cls, program: Program, *_: Any, **__: Any) -> CompiledModel:
        return super().__new__(_class_of(type(program.model)) if cls is CompiledModel else cls)

    def __init__(
        self, program: Program, attachment: Attachment, store: AdapterStore, dynamic: bool | None
    ) -> None:
        super().__init__()
        self._stand_for(program.model)
        self._attachment = attachment
        self._session = Session(program, store, Backend(program, entered), dynamic)
        self._session.backend.recorded = Dumps(self._session)
        self._entries = CompiledForwards(self._session, attachment)
        self._generation = CompiledGenerate(self._entries)
        self._disabling = []
        #: Whether users call the model that was given (`lorafx.attach`), and not this object.
        self.attached = False
        # In containers: an attribute of a module takes a microsecond to set.
        self._last_calls: dict[str, MadeCall] = {}
        #: Those that captured graphs.
        self._capturing_calls: list[MadeCall] = []
        try:
            join(self._session)
        except BaseException:
            attachment.detach()
            raise
        program.runtime.resting = Resting(self._session)
        # Not train(), which has no end where a child holds its parent.
        self.training = program.model.training
        _COMPILED.add(self)

    @untraced
    def forward(
        self,
        *args: Any,
        adapter_names: Sequence[AdapterName] | None = None,
        adapter_slots: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """The model's forward with an adapter for each row.

        Args:
            adapter_names: one name per request, in the order of the batch; None or "__base__" is
                the base model, and {"sql": 0.7, "style": 0.3} a sum of adapters, or one at another
                scale. An aLoRA adapter serves the tokens of its row from the last occurrence of its
                invocation tokens in `input_ids` on. Without `adapter_names` every row uses the
                default of `set_adapter`.
            adapter_slots: integers (B, T), the adapter of each token as an index into
                `adapter_names`, or without it into `adapters`; -1 is the base model. It serves
                packed sequences, and adapters that begin at a token; with a cache, T are the new
                tokens. Of an aLoRA adapter it says itself where it is active. Shape (B,) gives
                one per request, as names do.
            *args, **kwargs: of the model's own forward.

        Raises:
            ConfigError: `adapter_names` is not a list of names; a sum has a weight that is no
                finite number, or an adapter that is not linear in it (DoRA, weights of its own); or
                a keyword is a slip for one of these, or another library's for it, and the model
                declares none of that name.
            BatchError: `adapter_names` or `adapter_slots` does not fit the batch; or an aLoRA
                adapter has no `input_ids` to be looked for in, or a cache whose tokens are not
                known.
            UnknownAdapterError: a name that is not loaded.
            CapacityError: more distinct adapters than slots, unless `Options.overflow` is "waves";
                or a sum of ranks over `max_rank`.
            ProvenanceError, MatchError: this batch cannot be served correctly; the error says why.
            CaptureError: the model was detached, moved, or needs more graphs than allowed.
        """
        self._entries.check_attached()
        refuse_slips(kwargs, self.model.forward, self.model)
        asked: Any = checked_names(adapter_names)
        tokens = None
        if adapter_slots is not None:
            asked, tokens = by_slots(adapter_slots, self.adapters if asked is None else asked)
        elif asked is None:
            refuse_pipeline_slips(self.model)
        by_token = adapter_slots is not None and adapter_slots.dim() == 2

        def call(
            args: Sequence[Any], kwargs: Mapping[str, Any], names: Names | None, tokens: Any
        ) -> Any:
            run = partial(self._run_forward, args, kwargs)
            requests = asked if names is None else names
            return self._session.call(run, requests, tokens=tokens, activated=by_token)

        names = asked.listed if isinstance(asked, Requests) else asked
        given = {"adapter_names": adapter_names, "adapter_slots": adapter_slots}
        made = MadeCall("forward", LastCall.of(args, kwargs), given)
        run = partial(call, args, kwargs, names, tokens)
        if self._session.program.options.overflow == "waves":
            run = partial(in_waves, self._entries, call, args, kwargs, names, tokens)
        return refusing_backward(self._noted(made, run))

    @untraced
    def generate(
        self, *args: Any, adapter_names: Sequence[AdapterName] | None = None, **kwargs: Any
    ) -> Any:
        """transformers' `generate` with an adapter for each prompt.

        Beams and returned sequences of one prompt keep its adapter.

        Args:
            adapter_names: one name per prompt, as in `forward`.
            *args, **kwargs: of the model's own `generate`.

        Raises:
            LorafxError: the model has no `generate`.

        It also raises what `forward` raises.
        """
        self._entries.check_attached()
        generating = getattr(self.model, "generate", self.model.forward)
        refuse_slips(kwargs, generating, self.model, BY_ROW)
        main = getattr(self.model, "main_input_name", "input_ids")
        check_tensors({main: args[0], **kwargs} if args else kwargs)
        asked: Any = checked_names(adapter_names)

        def call(
            args: Sequence[Any], kwargs: Mapping[str, Any], names: Names | None, _: Any
        ) -> Any:
            def run() -> Any:
                self._entries.check_attached()
                return self._generation.generate(*args, **kwargs)

            return self._session.call(run, asked if names is None else names, repeats=True)

        names = asked.listed if isinstance(asked, Requests) else asked
        check_prompts(names, kwargs.get("input_ids", args[0] if args else kwargs.get(main)))
        made = MadeCall("generate", LastCall.of(args, kwargs), {"adapter_names": adapter_names})
        run = partial(in_waves, self._entries, call, args, kwargs, names, generates=True)
        return self._noted(made, run)

    def _noted(self, made: MadeCall, run: Callable[[], Any]) -> Any:
        """What `run` returns, which makes the call. Calls of a replay are not noted."""
        if self._session.backend.replay is not None:
            return run()
        records = self._session.backend.records
        captured = len(records)
        self._last_calls[made.method] = made
        result = run()
        if len(records) != captured:
            self._capturing_calls.append(made)
        return result

    def _run_forward(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """The model's forward for the requests of the running call; the model's call, where hooks
        of the model itself run around its graphs. An attached model was called itself."""
        self._entries.check_attached()  # it may have been detached while the call waited
        forward, session, model = forward_of(self._entries), self._session, self.model
        around = session.program.hook_watch.around and not self.attached
        if not around or not any(hooks_of(model)):
            return forward(*args, **kwargs)
        return session.stand_ins.replacing([(model, "forward", forward)], model, *args, **kwargs)

    def entry(self, module: nn.Module, *, method: MethodType | None = None) -> Entry:
        """The compiled forward of `module`, or another method of it (`CompiledForwards.of`)."""
        return self._entries.of(module, method=method)

    def capture(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Capture the graphs for this call, without adapters and with them, by running it both
        ways."""
        self._entries.check_attached()
        session = self._session

        def both() -> None:
            entry = self.entry(self.model)
            entry(*args, **kwargs)
            session.note(session.running._replace(active=True), lambda: entry(*args, **kwargs))

        with session.lock:
            warming = session.running._replace(warming=True)
            # Rows of the base.
            session.note(warming, lambda: session.call(both, [None], repeats=True))

    def warmup(
        self,
        example_inputs: Mapping[str, Any] | Sequence[Any] | None = None,
        *,
        rank: int | None = None,
        batch_sizes: Sequence[int] = (1, 8),
        lengths: Sequence[int] = (16,),
        generate: bool | Mapping[str, Any] | None = None,
    ) -> None:
        """Capture and compile every graph that serving will need, so that no request waits for it.

        It runs the model's forward, once more with the returned cache and one further token, and
        `generate`: each for every batch size and length, with no adapter, with one, and with a mix.
        Dummy adapters of a small rank stand in for those to come; graphs do not depend on which
        adapters a batch has. Afterwards adapters, the default, slots, pins, random states and the
        buffers of the model are as before, even when this raises. Other calls wait. It takes as
        long as compiling does: 6 graphs for a causal language model on a CPU, and more where one
        request and calls without an adapter have graphs of their own, as on a GPU. On a terminal
        it prints which one is under way.

        Args:
            example_inputs: keyword arguments (or positional ones) of a call, or a list of such
                calls; a graph serves calls with the same arguments. Without them the calls have
                token ids and an attention mask, made from the model's configuration.
            rank: the rank of the dummies; None for 8, or `max_rank` where that is less. Rounded up
                to the least common multiple of the shard counts where a class shards the rank
                (`lorafx.register(rank_shards=...)`).
            batch_sizes: numbers of requests. A batch of one request is captured by itself, and has
                a graph of its own on a GPU. All others share one, whose Triton kernels are planned
                for the first of them: give the sizes that you will serve.
            lengths: numbers of tokens of a prompt, likewise. Prompts of one token have graphs of
                their own: give (16, 1) to include them. If the attention has a window, also give
                one length beyond it.
            generate: None runs forward, and `generate` where the model has it; False runs only
                forward; True, or keyword arguments for it (`{"num_beams": 4}`), runs only
                `generate`.

        Raises:
            ConfigError: an argument that cannot be honoured, or a model whose inputs cannot be
                derived.
            CapacityError: `max_rank` is less than the dummies' rank.
            CaptureError: the model was detached, moved, or needs more graphs than allowed.

        It also raises what the model's own forward raises for these inputs.
        """
        self._entries.check_attached()
        warm_up(
            self,
            example_inputs,
            rank=rank,
            batch_sizes=batch_sizes,
            lengths=lengths,
            generate=generate,
        )

    # --- what it is and does ---

    @property
    def sites(self) -> tuple[Site, ...]:
        """The modules that can carry LoRA, by canonical path with their aliases."""
        return self._session.program.sites

    @property
    def recompiles(self) -> int:
        """Graphs compiled so far."""
        return len(self._session.backend.records)

    def memory(self) -> dict[str, int]:
        """Sizes in bytes: "banks" on the device, "host" copies of adapters, their files on
        "base" parameters, "originals" of merged weights in host memory."""
        base = {id(p): p.numel() * p.element_size() for p in self.model.parameters()}
        merged = merged_of(self._session)
        return {
            **self._session.store.nbytes(),
            "base": sum(base.values()),
            "originals": 0 if merged is None else merged.report.original_bytes,
        }

    def detach(self) -> nn.Module:
        """Take the marks off the model and return it; this object serves no more calls.

        A `peft.PeftModel` that was compiled gets its wrappers back. A merged adapter is removed
        first (`unmerge`). This waits for running calls.

        Raises:
            BatchError: a call is running on this thread.

        It also raises what `unmerge` raises.
        """
        session = self._session
        session.refuse_running("detach()")
        with session.weights_lock, session.lock:
            if self.merged is not None:
                self.unmerge()
            undisturbed(self._attachment.detach)
            leave(session)
        return self.model

    # --- plumbing ---

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model":
                raise
        return delegated(self, name)

    @property
    def detached(self) -> bool:
        """Whether its marks were taken off the model."""
        return not self._attachment.rollback


#: Those that are in use, and some that were detached.
_COMPILED: weakref.WeakSet[CompiledModel] = weakref.WeakSet()

#: Classes of models -> those of their compiled models.
_CLASSES: weakref.WeakKeyDictionary[type, type] = weakref.WeakKeyDictionary()


def _class_of(model: type[nn.Module]) -> type[CompiledModel]:
    if model not in _CLASSES:
        forward = untraced(inspect.unwrap(CompiledModel.forward))
        forward.__signature__ = signature_of(model, forward)
        own = {"__doc__": CompiledModel.__doc__, "forward": forward}
        _CLASSES[model] = type(model.__name__, (CompiledModel,), own)
    return _CLASSES[model]


def compiled_of(model: object) -> CompiledModel | None:
    """What serves `model`, the one that was given to `lorafx.compile` (a PeftModel too) or what
    that returned."""
    if isinstance(model, CompiledModel):
        return model
    if isinstance(model, nn.Module):
        model = without_wrappers(unwrapped(model))
    serving = (found for found in list(_COMPILED) if not found.detached)
    return next((found for found in serving if found.model is model), None)


def attached_models(among: Collection[int] | None = None) -> list[CompiledModel]:
    """What serves the models that `lorafx.attach` marked, among those of these identities."""
    found = [compiled for compiled in list(_COMPILED) if compiled.attached]
    return [
        compiled
        for compiled in found
        if not compiled.detached and (among is None or id(compiled.model) in among)
    ]


def refuse_other(model: object) -> None:
    """Raise ConfigError where `model` is no model."""
    if not isinstance(model, nn.Module):
        raise ConfigError(
            f"{type(model).__name__} is no nn.Module; of a pipeline of diffusers, "
            "lorafx.compile_pipeline(pipe) compiles all models that carry LoRA"
        )


def refuse_compiled(model: nn.Module) -> None:
    """Raise CaptureError where `model` is served by what `lorafx.compile` returned, or is or holds
    that, and ConfigError where it is no model."""
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
