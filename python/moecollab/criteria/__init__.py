"""Ways to score experts, each by its name; higher means keep."""

from __future__ import annotations

from functools import reduce
from operator import or_

from moecollab.criteria import (
    caep,
    channels,
    coverage,
    outputs,
    pairs,
    probes,
    routing,
    tokens,
    weights,
)
from moecollab.criteria.base import Criterion, Needs, groups_of
from moecollab.errors import SettingsError, unknown_name
from moecollab.record.sums import GROUPS, stand_for, stand_no_more

__all__ = ["KNOWN_AS", "Criterion", "Needs", "collects", "get", "names", "register", "unregister"]

_registry: dict[str, Criterion] = {}

KNOWN_AS: dict[str, str] = {
    "ean": "ean_sum (REAP's code) or ean_channel (MC-Suite)",
    "ean_ca": "mean_output_norm",
    "euf": "frequency",
    "ewn": "weight_norm",
    "man": "ean_mean",
    "minitron": "reap",
    "rwn": "router_norm",
    "seer_hard": "frequency",
    "seer_soft": "soft_routing (gate_sum for DeepSeek, as He et al. have it)",
    "shape": "shapley",
    "wsr": "stable_rank",
}
"""Names that criteria have elsewhere, in lower case, and what they are called here."""


def register(criterion: Criterion) -> None:
    """Adds a criterion; a name that is taken, also by a group of sums, is refused.

    Examples
    --------
    >>> import numpy as np
    >>> register(Criterion("first_come", Needs.NOTHING, lambda e: -np.indices(e.shape)[1] * 1.0))
    >>> get("first_come").kind
    'no data'
    >>> unregister("first_come")
    """
    if criterion.name in _registry or criterion.name in GROUPS:
        raise SettingsError("criterion", criterion.name, "a name that is not yet taken")
    _registry[criterion.name] = criterion
    stand_for(criterion.name, groups_of(criterion.needs))


def unregister(name: str) -> None:
    """Forgets a criterion; an unknown name is answered with near ones."""
    del _registry[get(name).name]
    stand_no_more(name)


def names() -> tuple[str, ...]:
    """Names of all criteria, in alphabetical order."""
    return tuple(sorted(_registry))


def get(name: str) -> Criterion:
    """The criterion of this name; an unknown name is answered with near ones."""
    if name in _registry:
        return _registry[name]
    known = KNOWN_AS.get(name.lower().replace("-", "_"))
    if known is not None:
        raise SettingsError("criterion", name, f"{known}, as it is called here")
    raise unknown_name("criterion", name, names())


def collects(*wanted: str) -> tuple[str, ...]:
    """Groups of sums that some criteria read; ``extract(collect=…)`` takes their names as well.

    Examples
    --------
    >>> collects("reap", "frequency")
    ('routing', 'norms')
    """
    return groups_of(reduce(or_, (get(name).needs for name in wanted), Needs.NOTHING))


_FAMILIES = (routing, outputs, channels, pairs, tokens, weights, caep, coverage, probes)
for _criterion in (one for family in _FAMILIES for one in family.CRITERIA):
    register(_criterion)
