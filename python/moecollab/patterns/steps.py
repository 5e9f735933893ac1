"""Block steps of HSDL on some of the rows, for fits that never hold all of them.

A level is held in its solver's own scale: atoms with a largest entry of at most 1 under absolute
error and with a Euclidean norm of at most 1 under squared error. Rows are coded on the present
atoms; what they add to the next atoms is summed over the blocks. Under squared error the sums are
those of the exact step. Medians have no such sums: there each block says where its own rows would
put the atoms, and the next atoms are the means of these, weighted by use.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import itemgetter
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from moecollab.patterns.codes import Codes
from moecollab.patterns.collaboration import Level
from moecollab.patterns.engines import absolute_codes, squared_codes
from moecollab.patterns.transform import absolute_error
from moecollab.record.rows import Rows

SWEEPS = 2
"""Sweeps over the atoms in one step."""
Arrays: TypeAlias = dict[str, NDArray[Any]]
Vector: TypeAlias = NDArray[np.float64]
Atoms: TypeAlias = NDArray[np.float32]


@dataclass(frozen=True)
class Pull:
    """What a finer level makes of atoms (n_atoms, n_sites) and the weight of each (n_atoms,)."""

    weight: Vector
    atoms: Atoms


@dataclass(frozen=True)
class Stage:
    """A level in its solver's scale: atoms, largest allowed codes, and how the atoms above code."""

    atoms: Atoms
    caps: Vector
    links: Atoms | None = None


@dataclass(frozen=True)
class Levels:
    """All levels, and the mean code of each atom of level 1 over the rows (n_atoms,)."""

    stages: tuple[Stage, ...]
    use: Vector

    def largest(self) -> Vector:
        """Largest entry of each atom of level 1, 1 for an empty one."""
        return _positive(self.stages[0].atoms.max(axis=1, initial=0.0).astype(np.float64))


class Steps(Protocol):
    """What the two losses do differently."""

    @property
    def settings(self) -> Mapping[str, Any]:
        """Settings of the fit."""

    def errors(self, rest: Vector) -> Vector:
        """Error of each row of residuals (n_rows, n_sites)."""

    def length(self, atoms: Atoms) -> Vector:
        """What every atom is divided by to have its full scale: float64 (n_atoms,), above 0."""

    def code(self, rows: Rows, stage: Stage) -> Codes:
        """Codes of rows, from nothing, under the stage's caps."""

    def cost(self, rows: Rows, weight: Vector, stage: Stage, codes: Codes) -> Arrays:
        """Weighted error of coded rows, ``cost``."""

    def share(self, rows: Rows, weight: Vector, stage: Stage, codes: Codes) -> Arrays:
        """What coded rows add: ``cost`` and what the next atoms need."""

    def move(self, stage: Stage, total: Arrays, pull: Pull | None) -> Atoms:
        """The next atoms from what all rows add up to."""


def total(settings: Mapping[str, Any], terms: Iterable[float]) -> float:
    """The objective: dictionary size, sparsity and reconstruction times their weights."""
    names = ("dictionary_size", "sparsity", "reconstruction")
    return sum(float(settings[name]) * term for name, term in zip(names, terms, strict=True))


def steps_of(settings: Mapping[str, Any], threads: int) -> Steps:
    """The steps of a fit's loss."""
    kind = Absolute if settings["loss"] == "l1" else Squared
    return kind(settings, threads)


@dataclass(frozen=True)
class Absolute:
    """Absolute errors: exact coordinate steps by weighted medians on each block."""

    settings: Mapping[str, Any]
    threads: int

    def errors(self, rest: Vector) -> Vector:
        """Absolute errors."""
        found: Vector = np.abs(rest).sum(axis=1)
        return found

    def length(self, atoms: Atoms) -> Vector:
        """Largest entries."""
        return _positive(atoms.max(axis=1, initial=0.0).astype(np.float64))

    def code(self, rows: Rows, stage: Stage) -> Codes:
        """Codes by exact coordinate steps."""
        return absolute_codes(rows, (stage.atoms, stage.caps), self.settings, self.threads)

    def cost(self, rows: Rows, weight: Vector, stage: Stage, codes: Codes) -> Arrays:
        """Absolute errors."""
        return {"cost": np.array([absolute_error(stage.atoms, rows, codes, weight)])}

    def share(self, rows: Rows, weight: Vector, stage: Stage, codes: Codes) -> Arrays:
        """Where these rows would put the atoms."""
        from moecollab._core import step_atoms

        arrays, parts = (rows.indptr, rows.sites, rows.values), _parts(codes)
        moved = step_atoms(arrays, weight, stage.atoms, parts, self.threads)
        return {**self.cost(rows, weight, stage, codes), "moved": moved}

    def move(self, stage: Stage, total: Arrays, pull: Pull | None) -> Atoms:  # noqa: ARG002 (level 1 moves alone)
        """The blocks have said where."""
        found: Atoms = total["moved"].astype(np.float32)
        return found


@dataclass(frozen=True)
class Squared:
    """Squared errors: exact steps on A = Σ w r'r and U = Σ w r'(x − r D)."""

    settings: Mapping[str, Any]
    threads: int

    def errors(self, rest: Vector) -> Vector:
        """Half squared errors."""
        found: Vector = 0.5 * np.square(rest).sum(axis=1)
        return found

    def length(self, atoms: Atoms) -> Vector:
        """Euclidean norms."""
        return _positive(np.linalg.norm(atoms.astype(np.float64), axis=1))

    def code(self, rows: Rows, stage: Stage) -> Codes:
        """Codes by coordinate descent on the Gram matrix."""
        return squared_codes(rows, (stage.atoms, stage.caps), self.settings, self.threads)

    def cost(self, rows: Rows, weight: Vector, stage: Stage, codes: Codes) -> Arrays:
        """Half squared errors."""
        return {"cost": self.share(rows, weight, stage, codes)["cost"]}

    def share(self, rows: Rows, weight: Vector, stage: Stage, codes: Codes) -> Arrays:
        """A, U and half the squared error."""
        from moecollab._core import sum_square

        arrays, parts = (rows.indptr, rows.sites, rows.values), _parts(codes)
        found = sum_square(arrays, weight, stage.atoms, parts, self.threads)
        second, drawn = found["second"].astype(np.float64), found["pull"].astype(np.float64)
        return {"cost": found["cost"][1:], "second": second, "pull": drawn}

    def move(self, stage: Stage, total: Arrays, pull: Pull | None) -> Atoms:
        """The exact step, with the finer level's pull as one more row for each atom."""
        from moecollab._core import step_square

        second, drawn = total["second"].copy(), total["pull"].copy()
        if pull is not None:
            second[np.diag_indices(len(second))] += pull.weight
            drawn += pull.weight[:, None] * (pull.atoms.astype(np.float64) - stage.atoms)
        unit = _positive(np.array([second.max(initial=0.0)]))[0]
        second, drawn = (np.ascontiguousarray(part / unit, np.float32) for part in (second, drawn))
        return step_square(stage.atoms, second, drawn, SWEEPS, self.threads)


def enter(levels: Sequence[Level], n_rows: int, steps: Steps) -> Levels:
    """Levels of a fit to so many rows, in their solver's scale."""
    found: list[Stage] = []
    above = np.ones(0)
    for level in levels:
        length = steps.length(level.atoms)
        atoms = (level.atoms / length[:, None]).astype(np.float32)
        if level.links is None:
            found.append(Stage(atoms, level.peak * length))
        else:
            links = (level.links * length / above[:, None]).astype(np.float32)
            found.append(_with_links(Stage(atoms, length), links))
        above = length
    return Levels(tuple(found), levels[0].usage * steps.length(levels[0].atoms) / n_rows)


def leave(levels: Levels, n_rows: int) -> list[Level]:
    """The way back, to largest entries of 1."""
    found: list[Level] = []
    above = np.ones(0)
    for stage in levels.stages:
        largest = _positive(stage.atoms.max(axis=1, initial=0.0).astype(np.float64))
        atoms = (stage.atoms / largest[:, None]).astype(np.float32)
        if stage.links is None:
            found.append(Level(atoms, levels.use * largest * n_rows, stage.caps * largest))
        else:
            links = (stage.links * largest / above[:, None]).astype(np.float32)
            peak = links.max(axis=0, initial=0.0).astype(np.float64)
            usage = found[-1].usage @ links.astype(np.float64)
            found.append(Level(atoms, usage, peak, links))
        above = largest
    return found


def pull_of(levels: Levels) -> Pull | None:
    """What level 2 makes of the atoms of level 1."""
    if len(levels.stages) < 2 or levels.stages[1].links is None:
        return None
    return Pull(levels.use, levels.stages[1].links @ levels.stages[1].atoms)


def full_scale(stage: Stage, steps: Steps) -> tuple[Stage, Vector]:
    """Every atom at its full scale and codes inversely; the factors of the codes, at most 1."""
    factor = np.minimum(steps.length(stage.atoms), 1.0)
    atoms = np.ascontiguousarray(stage.atoms / factor[:, None], np.float32)
    return replace(stage, atoms=atoms, caps=stage.caps * factor), factor


def step_finer(levels: Levels, steps: Steps) -> Levels:
    """Levels below new atoms of level 1: coded anew, and moved one step where that is better."""
    found = list(levels.stages[:1])
    for at, stage in enumerate(levels.stages[1:], start=2):
        below = levels.stages[at] if at < len(levels.stages) else None
        task = Task(found[-1].atoms, _weight(found, levels.use), below)
        found.append(follow(stage, task, steps))
    return Levels(tuple(found), levels.use)


@dataclass(frozen=True)
class Task:
    """What a finer level has to explain: atoms with their weights; and the level below it."""

    above: Atoms
    weight: Vector
    below: Stage | None = None

    def cost(self, made: Stage, steps: Steps) -> float:
        """The objective of a level, and of the one below as far as this one changes it."""
        found = total(steps.settings, _finer_terms(made, self.above, self.weight, steps))
        if self.below is None:
            return found
        weight = _weight([made], np.zeros(0))
        return found + total(steps.settings, _finer_terms(self.below, made.atoms, weight, steps))

    def pull(self, made: Stage) -> Pull | None:
        """Where the level below wants a level's atoms."""
        if self.below is None:
            return None
        return Pull(_weight([made], np.zeros(0)), _links(self.below) @ self.below.atoms)


def follow(stage: Stage, task: Task, steps: Steps) -> Stage:
    """Block steps of one finer level until they gain less than the tolerance."""
    rows = Rows.of(task.above)

    def better(made: Stage) -> tuple[float, Stage]:
        coded = _with_links(made, _dense(steps.code(rows, made), made))
        return min(((task.cost(each, steps), each) for each in (made, coded)), key=itemgetter(0))

    cost, best = better(stage)
    for _ in range(steps.settings["max_iterations"]):
        shares = steps.share(rows, task.weight, best, _codes(best))
        atoms = steps.move(best, shares, task.pull(best))
        moved, factor = full_scale(replace(best, atoms=atoms), steps)
        now = better(_with_links(moved, (_links(best) * factor).astype(np.float32)))
        gain = cost - now[0]
        if gain > 0:
            cost, best = now
        if gain <= steps.settings["tolerance"] * cost:
            break
    return best


def weighted_median(values: Atoms, weight: Vector, old: Atoms) -> Atoms:
    """Median over the first axis, the one nearest to `old` if there are several.

    Values (n, n_atoms, n_sites), weights (n, n_atoms); without any weight the old values stay.
    """
    order = np.argsort(values, axis=0, kind="stable")
    ranked = np.take_along_axis(values, order, axis=0)
    sums = np.cumsum(
        np.take_along_axis(np.broadcast_to(weight[..., None], values.shape), order, 0), 0
    )
    half = 0.5 * sums[-1:]
    low = np.take_along_axis(ranked, (sums >= half).argmax(axis=0)[None], 0)[0]
    high = np.take_along_axis(ranked, (sums > half).argmax(axis=0)[None], 0)[0]
    return np.where(sums[-1] > 0, old.clip(low, high), old)


def terms(levels: Levels, error: float, steps: Steps) -> tuple[float, float, float]:
    """Dictionary size, sparsity and reconstruction over all levels (eqs. 4 to 7), in float64.

    `error` is the mean error of the rows at level 1.
    """
    stages = levels.stages
    found = np.array([stages[0].caps.sum(), levels.use.sum(), error])
    for at, stage in enumerate(stages[1:], start=1):
        weight = _weight(stages[:at], levels.use)
        found += _finer_terms(stage, stages[at - 1].atoms, weight, steps)
    size, sparsity, reconstruction = found.tolist()
    return size, sparsity, reconstruction


def _weight(stages: Sequence[Stage], use: Vector) -> Vector:
    """Weights of the last level's atoms as rows of the next: use over the number of rows above."""
    links = stages[-1].links
    return use if links is None else links.sum(axis=0, dtype=np.float64) / len(links)


def _finer_terms(stage: Stage, above: Atoms, weight: Vector, steps: Steps) -> tuple[float, ...]:
    links = _links(stage).astype(np.float64)
    rest = above - links @ stage.atoms.astype(np.float64)
    use, errors = links.sum(axis=1), steps.errors(rest)
    return float(stage.caps.sum()), float(weight @ use), float(weight @ errors)


def _links(stage: Stage) -> Atoms:
    return np.zeros((0, len(stage.atoms)), np.float32) if stage.links is None else stage.links


def _with_links(stage: Stage, links: Atoms) -> Stage:
    return replace(stage, links=links, caps=links.max(axis=0, initial=0.0).astype(np.float64))


def _dense(codes: Codes, stage: Stage) -> Atoms:
    found: Atoms = codes.matrix(len(stage.atoms)).toarray()
    return found


def _codes(stage: Stage) -> Codes:
    links = Rows.of(_links(stage))
    return Codes(links.indptr, links.sites, links.values)


def _parts(codes: Codes) -> tuple[NDArray[np.int64], NDArray[np.uint32], NDArray[np.float32]]:
    return codes.indptr, codes.atom, codes.value


def _positive(values: Vector) -> Vector:
    return np.where(values > 0, values, 1.0)
