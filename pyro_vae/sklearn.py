"""Estimators for scikit-learn: missing cells filled in, embeddings of rows."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, Self

import numpy as np
import torch
from sklearn.base import (
    BaseEstimator,
    ClassNamePrefixFeaturesOutMixin,
    OneToOneFeatureMixin,
    TransformerMixin,
)
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted, validate_data

from pyro_vae.batch import Batch
from pyro_vae.data.mixed import Columns, as_frame
from pyro_vae.evaluation.imputation import Imputation, impute
from pyro_vae.evaluation.predict import encode
from pyro_vae.objectives.specs import parse
from pyro_vae.pairs.table import table
from pyro_vae.training.fit import fit

__all__ = ["VAEImputer", "VAETransformer"]

OBJECTIVE = "iwae:num_particles=10,estimator=dreg"


class _OnTables(TransformerMixin, BaseEstimator):  # type: ignore[misc]
    """What fits ``pairs.table`` to arrays and DataFrames with missing cells."""

    def __init__(
        self,
        latent: int = 8,
        hidden: Sequence[int] = (128, 128),
        *,
        kinds: Mapping[Any, Any] | str | None = None,
        objective: str = OBJECTIVE,
        epochs: int = 200,
        batch_size: int = 100,
        lr: float = 1e-3,
        device: str = "auto",
        random_state: Any = None,
    ) -> None:
        self.latent, self.hidden, self.kinds, self.objective = latent, hidden, kinds, objective
        self.epochs, self.batch_size, self.lr = epochs, batch_size, lr
        self.device, self.random_state = device, random_state

    def fit(self, X: Any, y: Any = None) -> Self:
        """Train on rows ``[N, D]``, an array or a DataFrame, NaN (NA, None) where missing; y is ignored.

        Raises:
            ValueError: what ``Columns.of`` refuses.
        """
        frame = self._frame(X, reset=True)
        kinds = "real" if self.kinds is None and not _is_frame(X) else self.kinds
        self.columns_ = Columns.of(frame, kinds)
        self.seed_ = int(check_random_state(self.random_state).randint(2**31 - 1))
        rows = self.columns_.batch(frame)
        with torch.random.fork_rng():
            torch.manual_seed(self.seed_)
            hidden = tuple(self.hidden)
            model, guide = table(rows, self.latent, hidden, ordinal=self.columns_.ordinal)
        run = fit(
            *(model, guide, rows, parse(self.objective)),
            epochs=self.epochs,
            batch_size=self.batch_size,
            optimizer=functools.partial(torch.optim.Adam, lr=self.lr, fused=True),
            device=self.device,
            seed=self.seed_,
            progress=False,
        )
        self.history_ = run.history
        # float64, so that a row's numbers do not depend on how many rows a matrix product has
        self.model_, self.guide_ = model.to("cpu", torch.float64), guide.to("cpu", torch.float64)
        return self

    def _frame(self, X: Any, reset: bool = False) -> Any:
        """A DataFrame of the columns, as which arrays come too."""
        if _is_frame(X):
            validate_data(self, X, reset=reset, skip_check_array=True)
            if not len(X):
                raise ValueError(f"{type(self).__name__}: came 0 rows, wanted at least 1")
            return X.set_axis([str(name) for name in X.columns], axis=1)
        dtypes = [np.float64, np.float32]
        X = validate_data(self, X, reset=reset, dtype=dtypes, ensure_all_finite="allow-nan")
        return as_frame(X)

    def _rows(self, frame: Any, apart: bool = False) -> Batch:
        """Rows that draw the same numbers, or each its own."""
        index = torch.arange(len(frame)) * int(apart)
        return self.columns_.batch(frame, torch.float64, index=index)

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.allow_nan = True
        tags.input_tags.categorical = True
        return tags


class VAEImputer(OneToOneFeatureMixin, _OnTables):  # type: ignore[misc]
    """Fill the missing cells of a table by a VAE that was fitted to what is there.

    A transformer: ``make_pipeline(VAEImputer(), LinearRegression())``. Arrays of numbers give arrays.
    DataFrames give DataFrames with the same columns in the same types; columns of text and of type
    category are filled with classes, integers with whole numbers. How a cell is filled depends on
    ``random_state`` and its row, not on the rows beside it.

    Args:
        latent, hidden: of ``pairs.table``.
        kinds: column -> ``"real"``, ``"positive"``, ``"count"``, ``"binary"``, ``"category"``,
            ``"ordinal"`` or, for the latter, the list of its values in order; or one kind for all.
            Columns of an array, x0, x1, ..., are real unless said otherwise; those of a DataFrame are
            looked at, see ``Columns.of``.
        objective: a recipe with its arguments, as on the command line.
        epochs, batch_size, lr: of the training, by Adam.
        num_particles: of the importance sampling, see ``impute``.
        loss: ``"l2"``, real and positive cells at their mean, or ``"l1"``, at their median. Counts and
            binary cells are at their median, classes at the most probable one.
        device: as for ``fit``.
        random_state: of initialisation, training and imputation.
    """

    def __init__(
        self,
        latent: int = 8,
        hidden: Sequence[int] = (128, 128),
        *,
        kinds: Mapping[Any, Any] | str | None = None,
        objective: str = OBJECTIVE,
        epochs: int = 200,
        batch_size: int = 100,
        lr: float = 1e-3,
        num_particles: int = 200,
        loss: str = "l2",
        device: str = "auto",
        random_state: Any = None,
    ) -> None:
        super().__init__(
            *(latent, hidden),
            kinds=kinds,
            objective=objective,
            epochs=epochs,
            batch_size=batch_size,
            lr=lr,
            device=device,
            random_state=random_state,
        )
        self.num_particles, self.loss = num_particles, loss

    def transform(self, X: Any) -> Any:
        """The rows, filled.

        Raises:
            ValueError: other columns, a class that no training row had.
        """
        check_is_fitted(self)
        frame = self._frame(X)
        return self._as_came(X, frame, self._imputed(self._rows(frame)).values)

    def draw(self, X: Any, number: int = 20) -> list[Any]:
        """The rows, filled ``number`` times by draws: multiple imputation. Rows draw apart, by their
        place in X.

        Raises:
            ValueError: as ``transform``.
        """
        check_is_fitted(self)
        frame = self._frame(X)
        drawn = self._imputed(self._rows(frame, apart=True), number).draws
        return [
            self._as_came(X, frame, {site: values[i] for site, values in drawn.items()})
            for i in range(number)
        ]

    def _imputed(self, rows: Batch, draws: int = 0) -> Imputation:
        return impute(
            *(self.model_, self.guide_, rows, self.num_particles),
            draws=draws,
            loss=self.columns_.losses(self.loss),
            seed=self.seed_,
        )

    def _as_came(self, X: Any, frame: Any, values: Mapping[str, Any]) -> Any:
        filled = self.columns_.filled(frame, values)
        if _is_frame(X):
            return filled.set_axis(X.columns, axis=1)
        return filled.to_numpy(self._dtype(X))

    def _dtype(self, X: Any) -> Any:
        return np.float32 if getattr(X, "dtype", None) == np.float32 else np.float64


class VAETransformer(ClassNamePrefixFeaturesOutMixin, _OnTables):  # type: ignore[misc]
    """Embed the rows of a table, missing cells and all: the posterior means of a VAE's latents.

    Args:
        latent: dimensions of the embedding.
        hidden, kinds, objective, epochs, batch_size, lr, device, random_state: as for ``VAEImputer``.
    """

    def transform(self, X: Any) -> Any:
        """Embeddings ``[N, latent]``.

        Raises:
            ValueError: other columns, a class that no training row had.
        """
        check_is_fitted(self)
        rows = self._rows(self._frame(X))
        return encode(self.model_, self.guide_, rows, seed=self.seed_)["z"].numpy()

    @property
    def _n_features_out(self) -> int:
        return self.latent


def _is_frame(X: Any) -> bool:
    """Whether X is pandas' own, without importing it."""
    return hasattr(X, "iloc") and hasattr(X, "columns")
