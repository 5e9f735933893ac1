"""Ways to score experts, each by its name; higher means keep."""

from __future__ import annotations

from functools import reduce
from operator import or_

from moecollab.criteria import caep, channels, outputs, pairs, routing, tokens, weights
from moecollab.criteria.base import Criterion, Needs, groups_of
from moecollab.errors import SettingsError, unknown_name

_registry: dict[str, Criterion] = {}


def register(criterion: Criterion) -> None:
    """Adds a criterion; a name that is taken is refused."""
    if criterion.name in _registry:
        raise SettingsError("criterion", criterion.name, "a name that is not yet registered")
    _registry[criterion.name] = criterion


def names() -> tuple[str, ...]:
    """Names of all criteria, in alphabetical order."""
    return tuple(sorted(_registry))


def get(name: str) -> Criterion:
    """The criterion of this name; an unknown name is answered with near ones."""
    if name not in _registry:
        raise unknown_name("criterion", name, names())
    return _registry[name]


def collects(*wanted: str) -> tuple[str, ...]:
    """What ``extract(collect=…)`` must sum for some criteria.

    Examples
    --------
    >>> collects("reap", "frequency")
    ('routing', 'norms')
    """
    return groups_of(reduce(or_, (get(name).needs for name in wanted), Needs.NOTHING))


_FAMILIES = (routing, outputs, channels, pairs, tokens, weights, caep)
for _criterion in (one for family in _FAMILIES for one in family.CRITERIA):
    register(_criterion)
