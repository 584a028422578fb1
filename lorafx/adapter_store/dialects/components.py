"""Files with factors for several models of a pipeline: which of them this model is."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

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

#: What files call the model that removes the noise, whatever its pipeline calls it.
DENOISERS = ("unet", "transformer", "diffusion_model")


def component_of(
    groups: Mapping[str, Collection[str]],
    tests: Sequence[Callable[[str], bool]],
    asked: str | None,
    where: str,
) -> str | None:
    """The component that the model is, by the names that the file has for each: the one of which
    the model has some, or all. None where it has none of them, and there are several components.

    `tests` say whether the model has a name, the strictest first: a later one counts where none of
    the names passes those before it.

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
    for has in tests:
        fit = [component for component, names in groups.items() if any(map(has, names))]
        whole = [component for component in fit if all(map(has, groups[component]))]
        fit = whole if len(whole) == 1 else fit
        if len(fit) > 1:
            raise CheckpointError(
                f"{where} has factors for {' and '.join(fit)}, which both fit this model; say "
                f"which by AdapterSource(..., component={fit[0]!r})"
            )
        if fit:
            return fit[0]
    return None
