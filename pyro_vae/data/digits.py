"""The digits that scikit-learn ships: data without a download."""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from typing import Any

import numpy as np

from pyro_vae.data.source import Source, select

__all__ = ["BUILT_IN", "read_digits"]

BUILT_IN = ("digits", "digits_binary")
BINARY_SEED = 0  # of the one Bernoulli draw per pixel of digits_binary
SPLIT_SEED = 0  # of the 80/20 split, since there is no official one
FRACTIONS = (0.8, 0.2)


def read_digits(name: str, sites: Collection[str] | None = None) -> Source:
    """1797 rows of 64 counts 0..16 and their labels, in splits ``train``, ``test`` and ``all``."""
    import sklearn  # here, since it takes a second to import
    from sklearn.datasets import load_digits

    counts, labels = load_digits(return_X_y=True)
    counts, labels = counts.astype(np.uint8), labels.astype(np.int64)
    record: dict[str, Any] = {
        "source": f"scikit-learn {sklearn.__version__}, load_digits",
        "sha256": hashlib.sha256(counts.tobytes() + labels.tobytes()).hexdigest(),
        "splits_by": {"seed": SPLIT_SEED, "fractions": list(FRACTIONS)},
    }
    if name == "digits_binary":
        # Drawn for all rows at once, so that a row is the same in every split.
        counts = np.random.RandomState(BINARY_SEED).random_sample(counts.shape) < counts / 16
        step = {
            "step": "binarize",
            "kind": "static",
            "seed": BINARY_SEED,
            "text": "x: one Bernoulli draw per pixel with probability count / 16",
        }
    else:
        step = {"step": "cast", "text": "x: counts 0..16, unscaled"}
    record["steps"] = [{"site": "x", **step}]
    arrays = {"x": counts.astype(np.float64), "y": labels}
    whole = select(name, {"all": arrays}, sites)["all"]
    order = np.random.RandomState(SPLIT_SEED).permutation(len(labels))  # frozen by numpy
    end = int(FRACTIONS[0] * len(labels))
    rows = {"train": order[:end], "test": order[end:], "all": np.arange(len(labels))}
    parts = {
        split: {site: array[chosen] for site, array in whole.items()}
        for split, chosen in rows.items()
    }
    return Source(name, parts, record)
