"""How well are missing cells filled, beside what else there is?

Tables of numbers, half of the cells missing completely at random: RMSE of the missing cells in units of
the observed cells' standard deviation, for column means, 5 nearest neighbours, scikit-learn's
IterativeImputer (Bayesian ridge), the same with random forests (20 trees, 5 rounds), and a VAE
(``pairs.table`` under IWAE, mean of ``members`` trainings). Scaling uses observed cells only. What the
VAE chooses (likelihood, number of steps) it chooses by a twentieth of the observed cells, hidden from
its training for that; the missing cells' truth is looked at once, at the end.

Adult, whose cells are missing in part: a fifth of the others is hidden on purpose. Accuracy on
categories, RMSE on numbers, and the share of cells inside 90 % intervals, raw and after the widths were
scaled by what half of the hidden cells ask for, on the other half.

MNIST, statically binarized, half of the training pixels missing: NLL of whole test digits beside that of
the same net trained on whole digits, and a figure of imputations.

    PYRO_VAE_DATA=... python -m benchmarks.imputation --data banknote --seeds 0,1,2,3,4

Rows that are complete are not run again; the table says which were not run.
"""

from __future__ import annotations

import argparse
import copy
import functools
import os
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import torch

import pyro_vae as pv
from benchmarks.report import RESULTS, keep, kept, write
from pyro_vae import conditionals
from pyro_vae.data.mixed import Columns
from pyro_vae.evaluation.imputation import impute

Array = Any
TABLES = {"banknote": 4, "wine_white": 11, "letter": 16, "spam": 57}  # features, first in the file
MISSING, HELD, K = 0.5, 0.05, 500
LOOKS = 20  # at the cells held out, in a training
LIKELIHOODS = {"gaussian": conditionals.Gaussian, "student": conditionals.StudentT}
PUBLISHED = (
    "published MSE with 50 % MCAR (Mattei & Frellsen 2019), other draws of the cells: banknote MIWAE "
    ".446, missForest .676, kNN .744; white wine .735, .798, .929"
)


def arrays(name: str) -> dict[str, Array]:
    folder = os.environ.get("PYRO_VAE_DATA")
    if not folder:
        raise SystemExit("set PYRO_VAE_DATA to the folder with uci_tabular.npz and adult.npz")
    with np.load(Path(folder) / f"{name}.npz", allow_pickle=False) as file:
        return {key: file[key] for key in file.files}


# --- tables of numbers --------------------------------------------------------------------------


def holed(name: str, seed: int, rows: int | None) -> tuple[Array, Array]:
    """Whole rows and the same with holes, in units of the observed cells."""
    whole = arrays("uci_tabular")[name][:rows, : TABLES[name]]
    holes = np.where(np.random.default_rng(seed).random(whole.shape) < MISSING, np.nan, whole)
    center, scale = np.nanmean(holes, 0), np.nanstd(holes, 0)
    scale = np.where(scale > 0, scale, 1.0)
    return (whole - center) / scale, (holes - center) / scale


def rmse(filled: Array, whole: Array, where: Array) -> float:
    return float(np.sqrt(np.mean((filled - whole)[where] ** 2)))


def column_means(
    holes: Array, seed: int, given: argparse.Namespace
) -> tuple[Array, dict[str, Any]]:
    return np.where(np.isnan(holes), np.nanmean(holes, 0), holes), {}


def neighbours(holes: Array, seed: int, given: argparse.Namespace) -> tuple[Array, dict[str, Any]]:
    from sklearn.impute import KNNImputer

    return KNNImputer(n_neighbors=5).fit_transform(holes), {}


def ridge(holes: Array, seed: int, given: argparse.Namespace) -> tuple[Array, dict[str, Any]]:
    return _iterative(holes, seed, None, 10)


def forest(holes: Array, seed: int, given: argparse.Namespace) -> tuple[Array, dict[str, Any]]:
    from sklearn.ensemble import RandomForestRegressor

    return _iterative(holes, seed, RandomForestRegressor(20, n_jobs=1, random_state=seed), 5)


def _iterative(
    holes: Array, seed: int, estimator: Any, rounds: int
) -> tuple[Array, dict[str, Any]]:
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.experimental import enable_iterative_imputer  # noqa: F401
    from sklearn.impute import IterativeImputer

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        imputer = IterativeImputer(estimator, max_iter=rounds, random_state=seed)
        return imputer.fit_transform(holes), {}


def vae(holes: Array, seed: int, given: argparse.Namespace) -> tuple[Array, dict[str, Any]]:
    """Of each likelihood a training; that which fills held-out cells best, and its sisters of other
    seeds."""
    rng = np.random.default_rng([seed, 1])
    seen = ~np.isnan(holes)
    held = seen & (rng.random(holes.shape) < HELD)
    tried = {name: _trained(holes, held, name, 1000 * seed, given) for name in given.likelihoods}
    best = min(tried, key=lambda name: tried[name][1])
    pairs = [tried[best]] + [
        _trained(holes, held, best, 1000 * seed + i, given) for i in range(1, given.members)
    ]
    batch = pv.Batch({"real": holes})
    filled = [
        impute(*pair, batch, K, seed=seed).values["real"].double().numpy() for pair, *_ in pairs
    ]
    made = np.where(seen, holes, np.mean(filled, 0))
    return made, {
        "likelihood": best,
        "held_out": {name: value for name, (_, value, _) in tried.items()},
        "steps_taken": [step for *_, step in pairs],
    }


def _trained(
    holes: Array, held: Array, likelihood: str, seed: int, given: argparse.Namespace
) -> tuple[tuple[Any, Any], float, int]:
    """A pair as it was when it filled held-out cells best, their RMSE and the step."""
    batch = pv.Batch({"real": np.where(held, np.nan, holes)})
    pyro.set_rng_seed(seed)
    latent = given.latent or max(2, min(16, holes.shape[1]))
    hidden = (given.width, given.width)
    model, guide = pv.pairs.table(batch, latent, hidden, real=LIKELIHOODS[likelihood])
    per_epoch = -(-len(holes) // given.batch_size)
    epochs = max(1, round(given.steps / per_epoch))
    every = max(1, epochs // LOOKS)
    rows = torch.from_numpy(np.flatnonzero(held.any(1)))[:2000]
    found: dict[str, Any] = {"rmse": np.inf}

    def look(run: pv.Run, record: dict[str, float]) -> None:
        if record["epoch"] % every and record["epoch"] != epochs:
            return
        filled = impute(model, guide, batch.rows(rows), 100).values["real"].double().numpy()
        now = rmse(filled, holes[rows], held[rows])
        if now < found["rmse"]:
            state = copy.deepcopy((model.state_dict(), guide.state_dict()))
            found.update(rmse=now, step=int(record["step"]), state=state)

    pv.fit(
        *(model, guide, batch, pv.iwae(20, estimator="dreg")),
        epochs=epochs,
        batch_size=given.batch_size,
        optimizer=functools.partial(torch.optim.Adam, lr=given.lr, fused=True),
        ema=0.999,
        callbacks=[look],
        compile=given.compile,
        seed=seed,
        progress=False,
    )
    for module, state in zip((model, guide), found["state"], strict=True):
        module.load_state_dict(state)
    return (model, guide), found["rmse"], found["step"]


METHODS: dict[str, Callable[..., tuple[Array, dict[str, Any]]]] = {
    "mean": column_means,
    "knn": neighbours,
    "ridge": ridge,
    "forest": forest,
    "vae": vae,
}


def number_row(data: str, method: str, seed: int, given: argparse.Namespace) -> dict[str, Any]:
    whole, holes = holed(data, seed, given.rows)
    started = time.monotonic()
    filled, more = METHODS[method](holes, seed, given)
    seconds = time.monotonic() - started
    return {"rmse": rmse(filled, whole, np.isnan(holes)), "seconds": seconds, **more}


# --- adult --------------------------------------------------------------------------------------

KINDS = {"capital_gain": "count", "capital_loss": "count"}
CONTINUOUS = ("age", "fnlwgt", "hours_per_week")
ADULT = ("mode", "vae")


def adult(rows: int | None) -> Any:
    import pandas as pd

    held = arrays("adult")
    numbers = pd.DataFrame(held["num_train"][:rows].astype(float), columns=held["num_names"])
    for place, name in enumerate(held["cat_names"]):
        codes = held["cat_train"][:rows, place]
        texts = held[f"values_{name}"].astype(object)
        numbers[name] = pd.Series(np.where(codes < 0, None, texts[codes.clip(0)]), dtype=object)
    return numbers


def adult_row(data: str, method: str, seed: int, given: argparse.Namespace) -> dict[str, Any]:
    frame = adult(given.rows)
    hidden = (np.random.default_rng(seed).random(frame.shape) < 0.2) & frame.notna().to_numpy()
    holes = frame.mask(hidden)
    started = time.monotonic()
    columns = Columns.of(holes, KINDS)
    filled, found = ADULT_METHODS[method](holes, columns, seed, given)
    record: dict[str, Any] = {"seconds": time.monotonic() - started}
    hits, squares = [], {}
    for place, name in enumerate(frame.columns):
        at = hidden[:, place]
        if name in columns.classes:
            hits.append((filled[name][at].to_numpy() == frame[name][at].to_numpy()).mean())
        else:
            scale = holes[name].std()
            squares[name] = rmse(filled[name].to_numpy(), frame[name].to_numpy(), at) / scale
    record |= {"accuracy": float(np.mean(hits)), "rmse": float(np.mean(list(squares.values())))}
    record["rmse_of"] = squares
    if found is not None:
        record |= _coverage(frame, hidden, columns, found, seed)
    return record


def _mode(holes: Any, columns: Columns, seed: int, given: argparse.Namespace) -> tuple[Any, None]:
    best = {n: holes[n].mode()[0] if n in columns.classes else holes[n].mean() for n in holes}
    return holes.fillna(best), None


def _adult_vae(
    holes: Any, columns: Columns, seed: int, given: argparse.Namespace
) -> tuple[Any, Any]:
    batch = columns.batch(holes)
    pyro.set_rng_seed(seed)
    model, guide = pv.pairs.table(batch, given.latent or 16, (given.width, given.width))
    pv.fit(
        *(model, guide, batch, pv.iwae(10, estimator="dreg")),
        steps=given.steps,
        batch_size=given.batch_size,
        optimizer=functools.partial(torch.optim.Adam, lr=given.lr, fused=True),
        ema=0.999,
        compile=given.compile,
        seed=seed,
        progress=False,
    )
    found = impute(model, guide, batch, 200, interval=0.9, seed=seed)
    return columns.filled(holes, found.values), found


ADULT_METHODS: dict[str, Callable[..., tuple[Any, Any]]] = {"mode": _mode, "vae": _adult_vae}


def _coverage(
    frame: Any, hidden: Array, columns: Columns, found: Any, seed: int
) -> dict[str, dict[str, float]]:
    """Share of hidden cells inside the intervals; then with widths scaled by the factor that covers
    90 % of one half, on the other half."""
    halves = np.random.default_rng([seed, 2]).random(len(frame)) < 0.5
    raw, calibrated = {}, {}
    for name in CONTINUOUS:
        place = columns.sites["real"].index(name)
        at = hidden[:, frame.columns.get_loc(name)]
        low, high = (bound["real"][at, place].numpy() for bound in (found.lower, found.upper))
        off = np.abs(frame[name].to_numpy()[at] - (low + high) / 2) / ((high - low) / 2)
        raw[name] = float((off <= 1).mean())
        factor = np.quantile(off[halves[at]], 0.9)
        calibrated[name] = float((off[~halves[at]] <= factor).mean())
    return {"coverage": raw, "calibrated": calibrated}


# --- digits -------------------------------------------------------------------------------------

MNIST = ("complete", "half_missing")
TRAINED = ("vae", *MNIST)


def mnist_row(data: str, method: str, seed: int, given: argparse.Namespace) -> dict[str, Any]:
    train, test = (pv.data.load("mnist_static_binary", split, ["x"]) for split in ("train", "test"))
    train, test = (pv.Batch({"x": part["x"].flatten(1)[: given.rows]}) for part in (train, test))
    draw = torch.Generator().manual_seed(seed)
    if method == "half_missing":
        train = train.hide("x", torch.rand(train["x"].shape, generator=draw) < MISSING)
    started = time.monotonic()
    pyro.set_rng_seed(seed)
    model, guide = pv.pairs.missing(train, "masked", latent=20, hidden=(200, 200))
    pv.fit(
        *(model, guide, train, pv.iwae(5, estimator="dreg")),
        steps=given.steps,
        batch_size=given.batch_size,
        optimizer=functools.partial(torch.optim.Adam, lr=given.lr, fused=True),
        compile=given.compile,
        seed=seed,
        progress=False,
    )
    seconds = time.monotonic() - started
    judged = pv.evaluate(model, guide, test, 1000, seed=seed).summary()
    few = test.rows(slice(0, 20))
    few = few.hide("x", torch.rand(few["x"].shape, generator=draw) < MISSING)
    found = impute(model, guide, few, 1000, seed=seed)
    whole = test["x"][:20]
    figure = pv.plots.reconstructions(
        whole.numpy(), found.values["x"].numpy(), few.mask("x").numpy(), image_shape=(28, 28)
    )
    pv.plots.save(figure, given.results / f"{given.name}_mnist_{method}.png")
    error = (found.values["x"].round() != whole)[~few.mask("x")].double().mean()
    names = {name: judged[name] for name in ("log_p", "log_p_se", "khat_median")}
    return {"seconds": seconds, "wrong_pixels": float(error), **names}


# --- rows ---------------------------------------------------------------------------------------

PARTS: dict[str, tuple[Callable[..., dict[str, Any]], tuple[str, ...]]] = {
    **{name: (number_row, tuple(METHODS)) for name in TABLES},
    "adult": (adult_row, ADULT),
    "mnist": (mnist_row, MNIST),
}


def mean_of(records: list[dict[str, Any]], what: str) -> str:
    values = np.array([record[what] for record in records])
    if len(values) == 1:
        return f"{values[0]:.4f}"
    return f"{values.mean():.4f} ± {values.std(ddof=1) / len(values) ** 0.5:.4f}"


def table(records: list[dict[str, Any]]) -> str:
    """Mean ± standard error over seeds; what was not run says so."""
    lines = [f"{'data':<11} {'method':<13} seeds  result", "-" * 78]
    for data, (_, methods) in PARTS.items():
        for method in methods:
            here = [r for r in records if (r["data"], r["method"]) == (data, method)]
            lines.append(f"{data:<11} {method:<13} {len(here):>5}  {_result(data, here)}")
    note = "RMSE in standard deviations of the observed cells, mean ± standard error over seeds"
    return "\n".join([*lines, "", f"{note}; {PUBLISHED}"])


def _result(data: str, here: list[dict[str, Any]]) -> str:
    if not here:
        return "not run"
    hours = f"{sum(r['seconds'] for r in here) / 3600:.2f} h"
    if here[0]["method"] in TRAINED:
        budgets = {f"{r['steps']} steps of {r['batch_size']} rows" for r in here}
        hours += f" ({', '.join(sorted(budgets))})"
    if data == "mnist":
        text = f"NLL <= {-here[0]['log_p']:.2f} ± {here[0]['log_p_se']:.2f} nats (over rows)"
        return f"{text}, wrong missing pixels {mean_of(here, 'wrong_pixels')}, {hours}"
    if data == "adult":
        text = f"accuracy {mean_of(here, 'accuracy')}, RMSE {mean_of(here, 'rmse')}"
        for what in ("coverage", "calibrated"):
            if what in here[0]:
                shares = {n: np.mean([r[what][n] for r in here]) for n in CONTINUOUS}
                text += f", {what} " + " ".join(f"{n} {share:.3f}" for n, share in shares.items())
        return f"{text}, {hours}"
    return f"RMSE {mean_of(here, 'rmse')}, {hours}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", nargs="+", choices=PARTS, default=["banknote"])
    parser.add_argument("--methods", nargs="+", help="default: all that the data have")
    parser.add_argument("--seeds", type=lambda s: [int(i) for i in s.split(",")], default=[0])
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--members", type=int, default=3, help="trainings that are averaged")
    parser.add_argument("--likelihoods", nargs="+", choices=LIKELIHOODS, default=list(LIKELIHOODS))
    parser.add_argument("--latent", type=int, help="default: as many as columns, 2 to 16")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--rows", type=int, help="the first ROWS only")
    parser.add_argument("--compile", default="auto")
    parser.add_argument("--out", type=Path, default=Path("runs/imputation"))
    parser.add_argument("--name", default="imputation", help="of the files in results/")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of table and figures")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    names = ("steps", "members", "latent", "width", "batch_size", "lr", "rows")
    settings = {name: getattr(given, name) for name in names}

    todo = [
        (d, m, s) for d in given.data for s in given.seeds for m in given.methods or PARTS[d][1]
    ]
    for data, method, seed in todo:
        if method not in PARTS[data][1]:
            raise SystemExit(f"{data}: came method {method}, wanted one of {PARTS[data][1]}")
        same = {"data": data, "method": method, "seed": seed, "rows": given.rows}
        if any(all(r[key] == value for key, value in same.items()) for r in kept(given.out)):
            continue
        record = {**settings, **same, **PARTS[data][0](data, method, seed, given)}
        records = [*kept(given.out), record]
        keep(given.out, records)
        common = {"K of tables": K, "held out": HELD}
        write(given.name, common, records, table(records), given.results, show=False)
        print(f"{data} {method} {seed}: {_result(data, [record])}", flush=True)
    print(table(kept(given.out)))


if __name__ == "__main__":
    main()
