"""Files with factors for several models of a pipeline: which of them this model is."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

from lorafx.errors import CheckpointError

#: What diffusers' pipelines call their models, and what files of the first implementations do.
COMPONENTS = (
    "unet",
    "transformer",
    "transformer_2",
    "transformer_3",
    "text_encoder",
    "text_encoder_2",
    "text_encoder_3",
    "prior",
    "connectors",
    "diffusion_model",
)


def component_of(
    groups: Mapping[str, Collection[str]],
    exists: Callable[[str], bool],
    asked: str | None,
    where: str,
) -> str | None:
    """The component that the model is, by the paths in it that the file has for each; None where
    none of them is in the model, and there are several.

    Raises:
        CheckpointError: several fit, or the one that was asked for is not in the file.
    """
    if asked is not None:
        if asked not in groups:
            raise CheckpointError(
                f"{where} has no factors for the component {asked!r}; it has some for "
                f"{', '.join(sorted(groups))}"
            )
        return asked
    if len(groups) == 1:
        return next(iter(groups))
    fit = [name for name, paths in groups.items() if any(map(exists, paths))]
    whole = [name for name in fit if all(map(exists, groups[name]))]
    fit = whole if len(whole) == 1 else fit
    if len(fit) > 1:
        raise CheckpointError(
            f"{where} has factors for {' and '.join(fit)}, which both fit this model; say which by "
            f"AdapterSource(..., component={fit[0]!r})"
        )
    return fit[0] if fit else None
