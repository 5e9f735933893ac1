"""How many experts every layer has, where layers differ."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray


def counts_from_json(value: Any, n_layers: int) -> tuple[int, ...] | None:  # noqa: ANN401
    """Experts of every layer in plain data, None where all are alike; ValueError if too many."""
    if value is None:
        return None
    found = tuple(map(int, value))
    if len(found) != n_layers:
        raise ValueError(f"{len(found)} numbers for {n_layers} layers")
    return found


def present(self) -> NDArray[np.bool_]:
        """Which sites are experts: bool array of shape (n_layers, n_experts)."""
        return present(self.counts_of_experts, self.n_experts)

    @property
    def n_sites(self) -> int:
        """Number of routed experts over all layers."""
        return sum(self.counts_of_experts)

    @property
    def unrouted(self) -> tuple[tuple[int, int], ...]:
        """(layer, expert) of those that no recorded token went to; none where nothing was recorded.

        Their scores say what they would be worth to this text, which is nothing, and are defined by
        each criterion; another text may use them.
        """
        if not self.counts.any():
            return ()
        where = np.argwhere((self.counts == 0) & self.present).tolist()
        return tuple((self.layers[row], expert) for row, expert in where)

    def table(self) -> pl.DataFrame:
        """One row per expert: layer, expert, score, count and, if known, their spread."""
        held = self.present
        row, expert = np.nonzero(held)
        columns = {
            "layer": np.asarray(self.layers)[row],
            "expert": expert,
            "score": self.values[held],
            "count": self.counts[held],
        }
        if self.spread is None:
            return pl.DataFrame(columns, schema=COLUMNS)
        more = {name: value[held] for name, value in self.spread.arrays().items()}
        return pl.DataFrame(columns | more, schema=COLUMNS | SPREAD_COLUMNS)

    def save(self, path: str | PathLike[str], *, overwrite: bool = False) -> None:
        """Writes the table as Parquet, with all else in the file's metadata."""
        inputs = {} if self.activations is None else {"activations": self.activations}
        about = manifest(KIND, FORMAT, settings=self.settings, inputs=inputs)
        about |= {"criterion": self.criterion, "top_k": self.top_k}
        if self.experts_per_layer is not None:
            about["experts_per_layer"] = list(self.experts_per_layer)
        if self.groups is not None:
            about["router_groups"] = self.groups.as_json()
        if self.spread is not None:
            about["spread"] = self.spread.about()
        buffer = io.BytesIO()
        self.table().write_parquet(buffer, metadata={"moecollab": json.dumps(about)})
        write_bytes(Path(path), buffer.getvalue(), overwrite=overwrite)

    def __repr__(self) -> str:
        n_unrouted = len(self.unrouted)
        noted = f"; {n_unrouted} never routed" if n_unrouted else ""
        if self.spread is not None:
            noted += f"; resamples keep {100 * self.spread.stability:.0f} % the same"
        return (
            f"Scores({self.criterion}: {self.n_layers} layers × {self.n_experts} experts, "
            f"{self.values.min():.4g} to {self.values.max():.4g}{noted})"
        )


def present(counts: Sequence[int], n_experts: int) -> NDArray[np.bool_]:
    """Which sites are experts, given those of every layer: (n_layers, n_experts).

    Examples
    --------
    >>> present((2, 3), 3).tolist()
    [[True, True, False], [True, True, True]]
    """
    held: NDArray[np.bool_] = np.arange(n_experts) < np.asarray(counts)[:, None]
    return held
