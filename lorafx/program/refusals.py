"""Why sites cannot be served: values that become errors where an adapter of a batch touches one."""

from __future__ import annotations

from dataclasses import dataclass

from lorafx.errors import LorafxError, MatchError, ProvenanceError
from lorafx.model.extras import EXTRAS, When
from lorafx.model.sites import Site

UNSEEN = (
    "the memory of a tensor was handed to numpy between two graphs, or written into where torch "
    "does not see it (by its address, DLPack, an extension; such code may have a copy, h.clone())"
)


@dataclass(frozen=True)
class Refusal:
    """Why a graph cannot serve some sites in batches `when`: "always" (adapters touch the site),
    "mixed" (rows use different adapters), "dora", "own" and "bias" (adapters rescale the site's
    output, replace rows of its weight, or add a bias)."""

    sites: tuple[Site, ...]
    when: When
    reason: str

    @property
    def paths(self) -> tuple[str, ...]:
        return tuple(site.path for site in self.sites)


@dataclass(frozen=True)
class LastingRefusal:
    """A `Refusal` with the paths of its sites, which outlives a graph; also that of eager mode."""

    sites: tuple[str, ...]
    when: When
    reason: str

    def error(self, names: str = "", *, unseen: bool = False, eagerly: bool = False) -> LorafxError:
        """The error of a batch with adapters at the sites, or at those of these `names`; `unseen`:
        its memory left torch's sight; `eagerly`: eager mode has tried it."""
        names = names or ", ".join(path or "the model" for path in self.sites)
        if self.when in EXTRAS:
            extra = EXTRAS[self.when]
            return MatchError(
                f"{extra.unapplied.format(names)}: {self.reason}. Merge the adapter into a copy of "
                f"the base model, or train it without {extra.training}"
            )
        if self.when == "always":
            return MatchError(
                f"LoRA cannot be applied at {names}: {self.reason}. Leave the module out by "
                "exclude_modules, or unload the adapters that touch it"
            )
        eager = "use Options(start='eager'), which follows rows by their values, "
        return ProvenanceError(
            f"this batch mixes adapters, and at {names} it is not proved which request a row "
            f"belongs to: {UNSEEN if unseen else self.reason}. Run one adapter per batch, "
            f"{'' if eagerly else eager}declare which dimension of an argument holds the requests "
            "by LoraConfig(row_dims=...), or leave the module out by exclude_modules"
        )
