"""What makes HSDL an estimator of scikit-learn: parameters by name, fit, then transform."""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING, Any, Self

from moecollab.errors import MissingInputError, SettingsError
from moecollab.record.activations import Activations
from moecollab.record.rows import Matrix, Rows

if TYPE_CHECKING:
    from os import PathLike

    from moecollab.patterns.collaboration import Collaboration


class Estimator:
    """Parameters by name, and codes as a sparse matrix.

    Works in ``sklearn.base.clone``, ``Pipeline`` and searches without inheriting from
    scikit-learn. After :meth:`fit` the result is in ``collaboration_`` too.
    """

    collaboration_: Collaboration
    threads: int | None

    if TYPE_CHECKING:

        def fit(
            self,
            acts: Activations | Rows | Matrix,
            y: object = None,
            *,
            checkpoint: str | PathLike[str] | None = None,
        ) -> Collaboration:
            """Groups of experts in activations."""

    def get_params(self, deep: bool = True) -> dict[str, Any]:  # noqa: ARG002
        """Every parameter by name, as scikit-learn asks for them."""
        return {field.name: getattr(self, field.name) for field in fields(self)}  # type: ignore[arg-type]

    def set_params(self, **params: Any) -> Self:  # noqa: ANN401 (each has its own type)
        """Changes parameters by name.

        Raises
        ------
        SettingsError
            When there is no such parameter, or a value is out of range.
        """
        known = self.get_params()
        for name in params:
            if name not in known:
                raise SettingsError("parameter", name, f"one of {', '.join(known)}")
        type(self)(**(known | params))
        for name, value in params.items():
            setattr(self, name, value)
        return self

    def fit_transform(self, acts: Activations | Rows | Matrix, y: object = None) -> Matrix:
        """Fits, and returns how the fitted rows are written in atoms of level 1.

        Returns
        -------
        float32 scipy.sparse.csr_array of shape (n_rows, n_atoms)
        """
        collab = self.fit(acts, y)
        if collab.stop_reason == "interrupted":  # perhaps before all rows were coded
            return self.transform(acts)
        return collab.codes.matrix(len(collab.levels[0].atoms))

    def transform(self, acts: Activations | Rows | Matrix) -> Matrix:
        """How other rows are written in the fitted atoms of level 1.

        Returns
        -------
        float32 scipy.sparse.csr_array of shape (n_rows, n_atoms)

        Raises
        ------
        MissingInputError
            When nothing has been fitted.
        """
        if not hasattr(self, "collaboration_"):
            raise MissingInputError("HSDL is not fitted yet; call fit first")
        rows = acts if isinstance(acts, Activations | Rows) else Rows.of(acts)
        collab = self.collaboration_
        return collab.transform(rows, threads=self.threads).matrix(len(collab.levels[0].atoms))

    def __sklearn_is_fitted__(self) -> bool:
        """Whether there is a result."""
        return hasattr(self, "collaboration_")

    def __sklearn_tags__(self) -> Any:  # noqa: ANN401 (scikit-learn's own type)
        """What scikit-learn wants to know: a transformer of non-negative, maybe sparse input."""
        from sklearn.utils import InputTags, Tags, TargetTags, TransformerTags

        return Tags(
            estimator_type=None,
            target_tags=TargetTags(required=False),
            transformer_tags=TransformerTags(preserves_dtype=["float32"]),
            input_tags=InputTags(sparse=True, positive_only=True),
        )
