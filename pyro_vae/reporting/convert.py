"""Named numpy arrays as ArviZ's container, whichever version of ArviZ is installed."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["SINGLE", "container"]

Groups = Mapping[str, Mapping[str, NDArray[Any]]]
SINGLE = ("observed_data", "constant_data")  # groups without draws


def container(
    groups: Groups,
    dims: Mapping[str, Sequence[str]],
    coords: Mapping[str, Any],
    attrs: Mapping[str, str | int | float],
) -> Any:
    """An ``InferenceData`` (ArviZ 0.x) or ``DataTree`` (ArviZ 1.x) with one chain.

    Args:
        groups: group -> variable -> array ``[draw, *dims]``, ``[*dims]`` in the groups ``SINGLE``.
        dims: variable -> names of its dims, the same in all groups; a group may lack the last ones.
        coords: dim -> labels.
        attrs: of the whole, and of the posterior once more.
    """
    with warnings.catch_warnings():  # 0.23 announces 1.x on import; both are served here
        warnings.filterwarnings("ignore", category=FutureWarning)
        import arviz

    arrays = {
        group: {
            name: np.asarray(array) if group in SINGLE else np.asarray(array)[None]
            for name, array in variables.items()
        }
        for group, variables in groups.items()
        if variables
    }
    names = {name: list(of) for name, of in dims.items()}
    labels = {dim: np.asarray(of) for dim, of in coords.items()}
    if int(arviz.__version__.split(".")[0]) >= 1:
        everywhere = {group: dict(attrs) for group in ("/", "posterior") if group in ("/", *arrays)}
        return arviz.from_dict(arrays, dims=names, coords=labels, attrs=everywhere)
    keywords: dict[str, Any] = {**arrays, "posterior_attrs": dict(attrs), "attrs": dict(attrs)}
    return arviz.from_dict(**keywords, dims=names, coords=labels)
