"""The same two-site model, nets, data and objective here and in MultiVae: how good, how fast?

MNIST (static binarization) and its label, MVAE (Wu and Goodman 2018): a product of Gaussian experts and
the ELBOs of both sites and of each alone. 784-512-512-20 and 10-512-512-20 and back, ReLU; Adam 1e-3,
batch 128. Both start from the same weights, each is trained by its own trainer, and what comes out is
judged by the same evaluation here, on the first 2000 test rows. The draws of a training alone move its
log p by several nats: look at the means over seeds. Seconds are of the whole training, compiling
included.

MultiVae brings torchvision, whose operators a CPU build of torch does not load: make an environment for
it beside the project's own, with this project's dependencies too.

    pip install multivae && PYRO_VAE_DATA=... python -m benchmarks.beside_multivae --epochs 20
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

import pyro_vae as pv
from benchmarks.report import keep, kept, write
from pyro_vae.conditionals import Bernoulli, Categorical, StandardNormal
from pyro_vae.evaluation.likelihood import mean_and_error
from pyro_vae.evaluation.multimodal import subsets
from pyro_vae.guides import ExpertsGuide
from pyro_vae.models import MultimodalModel
from pyro_vae.nn import OneHot, mlp
from pyro_vae.objectives import mvae

SITES, SIZES, LATENT, HIDDEN = ("x", "y"), {"x": 784, "y": 10}, 20, 512
LR, BATCH, K, TEST = 1e-3, 128, 500, 2000
KEY = ("library", "seed", "epochs", "rows")


class Expert(nn.Module):
    """N(m, exp(v)), the mean and the log variance side by side in what a net returns."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Any:
        loc, log_variance = self.net(x).chunk(2, -1)
        return dist.Normal(loc, (log_variance / 2).exp()).to_event(1)


def nets(seed: int) -> tuple[dict[str, nn.Module], dict[str, nn.Module]]:
    """Encoders and decoders, by site."""
    torch.manual_seed(seed)
    up, down = dict[str, nn.Module](), dict[str, nn.Module]()
    for site, size in SIZES.items():
        up[site] = mlp((size, HIDDEN, HIDDEN, 2 * LATENT))
        down[site] = mlp((LATENT, HIDDEN, HIDDEN, size))
    return up, down


def pair(up: dict[str, nn.Module], down: dict[str, nn.Module]) -> tuple[Any, Any]:
    """Programs around the nets."""
    prior = StandardNormal(LATENT)
    likelihoods = {"x": Bernoulli(down["x"], (784,)), "y": Categorical(down["y"], (), 10)}
    experts = {"x": Expert(up["x"]), "y": Expert(nn.Sequential(OneHot(10, 0), up["y"]))}
    guide = ExpertsGuide(experts, prior, prior_expert=True)
    return MultimodalModel(prior, likelihoods), guide


def ours(up: Any, down: Any, train: pv.Batch, epochs: int, seed: int) -> str:
    run = pv.fit(
        *pair(up, down),
        train,
        mvae(SITES),
        epochs=epochs,
        batch_size=BATCH,
        optimizer=lambda parameters: torch.optim.Adam(parameters, lr=LR),
        seed=seed,
        progress=False,
    )
    return run.level.partition(":")[0]


def theirs(up: Any, down: Any, train: pv.Batch, epochs: int, seed: int) -> str:
    """Their model and trainer with the very nets, which are trained in place."""
    # torchvision asks for these when it is imported, a CPU build of torch can't load them
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, name):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    from multivae.data.datasets import MultimodalBaseDataset
    from multivae.models import MVAE, MVAEConfig
    from multivae.models.base import ModelOutput
    from multivae.models.nn.default_architectures import BaseDecoder, BaseEncoder
    from multivae.trainers import BaseTrainer, BaseTrainerConfig

    class Encoder(BaseEncoder):  # type: ignore[misc]
        def __init__(self, net: nn.Module) -> None:
            super().__init__()
            self.net, self.latent_dim = net, LATENT

        def forward(self, x: Tensor) -> Any:
            loc, log_variance = self.net(x).chunk(2, -1)
            return ModelOutput(embedding=loc, log_covariance=log_variance)

    class Decoder(BaseDecoder):  # type: ignore[misc]
        def __init__(self, net: nn.Module) -> None:
            super().__init__()
            self.net, self.latent_dim = net, LATENT

        def forward(self, z: Tensor) -> Any:
            return ModelOutput(reconstruction=self.net(z))

    logging.disable(logging.INFO)
    config = MVAEConfig(
        n_modalities=2,
        latent_dim=LATENT,
        input_dims={site: (size,) for site, size in SIZES.items()},
        decoders_dist={"x": "bernoulli", "y": "categorical"},
        warmup=0,
    )
    model = MVAE(config, {s: Encoder(up[s]) for s in SITES}, {s: Decoder(down[s]) for s in SITES})
    data = {"x": train["x"], "y": one_hot(train["y"], 10).float()}
    with tempfile.TemporaryDirectory() as folder:
        options = BaseTrainerConfig(
            output_dir=folder,
            per_device_train_batch_size=BATCH,
            num_epochs=epochs,
            learning_rate=LR,
            seed=seed,
        )
        BaseTrainer(model, MultimodalBaseDataset(data), training_config=options).train()
    return "eager"


LIBRARIES = {"pyro_vae": ours, "multivae": theirs}


def flat(split: str, rows: int | None) -> pv.Batch:
    batch = pv.data.load("mnist", split, list(SITES), binarize="static").still()
    batch = batch.rows(slice(0, rows or len(batch)))
    return pv.Batch({"x": batch["x"].flatten(1), "y": batch["y"]})


def measure(given: argparse.Namespace, library: str, seed: int) -> dict[str, Any]:
    train, test = flat("train", given.rows), flat("test", min(TEST, given.rows or TEST))
    up, down = nets(seed)
    started = time.perf_counter()
    level = LIBRARIES[library](up, down, train, given.epochs, seed)
    seconds = time.perf_counter() - started
    for net in (*up.values(), *down.values()):
        net.eval()
    found = subsets(*pair(up, down), test, K, seed=seed).summary()
    return {"library": library, "seed": seed, "epochs": given.epochs, "rows": given.rows} | {
        "level": level,
        "seconds": seconds,
        "log_p": found,
    }


def told(values: Sequence[float]) -> str:
    """Mean ± standard error over seeds, each of which is a training of its own."""
    mean, error = mean_and_error(torch.tensor(values, dtype=torch.float64))
    each = ", ".join(f"{value:.2f}" for value in values)
    return f"{mean:.2f} ± {error:.2f} (by seed {each})" if len(values) > 1 else f"{mean:.2f}"


def table(records: list[dict[str, Any]]) -> str:
    lines = [
        "library    seed   level      train s   s/epoch   log p, mean ± standard error over test rows"
    ]
    for r in sorted(records, key=lambda r: (r["seed"], r["library"])):
        names = ", ".join(
            f"{n} {it['log_p']:.2f} ± {it['log_p_se']:.2f}" for n, it in r["log_p"].items()
        )
        lines.append(
            f"{r['library']:<10} {r['seed']:>3}    {r['level']:<9} {r['seconds']:8.1f}   "
            f"{r['seconds'] / r['epochs']:7.2f}   {names}"
        )
    by = {(r["library"], r["seed"]): r for r in records}
    both = [
        (it, by["multivae", s])
        for (name, s), it in by.items()
        if name == "pyro_vae" and ("multivae", s) in by
    ]
    if both:
        times = [theirs["seconds"] / ours["seconds"] for ours, theirs in both]
        lines.append(f"seconds, MultiVae over pyro_vae: {told(times)}")
    for name in both[0][0]["log_p"] if both else ():
        gains = [
            ours["log_p"][name]["log_p"] - theirs["log_p"][name]["log_p"] for ours, theirs in both
        ]
        lines.append(f"log p({name}), pyro_vae minus MultiVae: {told(gains)}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--rows", type=int, help="the first ROWS of each split only")
    parser.add_argument("--out", type=Path, default=Path("runs/beside_multivae"))
    parser.add_argument("--name", default="beside_multivae", help="of the files in results/")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    for seed in range(given.seeds):
        for library in LIBRARIES:
            row = (library, seed, given.epochs, given.rows)
            if any(tuple(r[name] for name in KEY) == row for r in kept(given.out)):
                continue
            keep(given.out, [*kept(given.out), measure(given, library, seed)])
    records = kept(given.out)
    write(given.name, {"batch": BATCH, "optimizer": f"Adam {LR}", "K": K}, records, table(records))


if __name__ == "__main__":
    main()
