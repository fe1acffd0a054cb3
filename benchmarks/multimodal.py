"""What do sites of the same rows tell of each other, by how their experts are put together?

``labels``: dynamically binarized MNIST and its label, JMVAE (Suzuki et al. 2017): joint log p of the
test rows, one fixed draw of their pixels, by K = 1000. Nets and schedule of MultiVae's script:
784-512-512 and 10-512-512, z = 64, and back, ReLU; Adam 1e-3, batch 100, 500 epochs, both KLs warmed up
over 200, alpha = 0.1. The joint encoder has 512 features of each site behind two layers, and one layer
of 512 for both; theirs has one layer before. Their label decoder ends in a softmax, whose output is
taken for logits once more, so that no label has more than e / (e + 9), -1.461 nats: ``squashed`` does
the same, ``jmvae`` has a label likelihood without that limit.

``looks``: digits in two looks, MNIST (static binarization) and MNIST-M, row by row the same digit, and
their label. For every subset of the sites, is what is generated from it of the right class (by
classifiers trained on the same rows), and what is its log p; training with a share of all sites missing.

    PYRO_VAE_DATA=... python -m benchmarks.multimodal labels --model jmvae
    PYRO_VAE_DATA=... python -m benchmarks.multimodal looks --model poe --missing 0.2

Every row takes up where it was stopped; one that is complete is not run again.
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyro
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import pyro_vae as pv
from benchmarks.report import folder_of, keep, kept, write
from pyro_vae import objectives
from pyro_vae.conditionals import Bernoulli, Categorical, Gaussian
from pyro_vae.evaluation.multimodal import coherence, subsets
from pyro_vae.nn import convolutional

BATCH, CLASSES = 100, 10
SITES = ("x", "m", "y")
PUBLISHED = "published: -86.86 (Suzuki et al. 2017), -86.85 +- 0.03 (MultiVae)"
MISSING = (0.0, 0.2, 0.5)


# ---------------------------------------------------------------------------------------------
# An image and its label


def squashed(network: Any, event_shape: Any, data: Any) -> nn.Module:
    """Labels whose logits are probabilities."""
    return Categorical.build(
        lambda outputs: nn.Sequential(network(outputs), nn.Softmax(-1)),
        event_shape,
        classes=CLASSES,
    )


LABELS: dict[str, Any] = {"jmvae": Categorical, "squashed": squashed}


def labels(given: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """One training, or what is left of it, and its evaluation."""
    train, test = (
        pv.data.load("mnist", split, ["x", "y"], binarize="dynamic") for split in ("train", "test")
    )
    test = test.still()
    if given.rows:  # rows that are taken are drawn: for a trial alone
        train, test = (part.rows(slice(0, given.rows)) for part in (train, test))
    per_epoch = -(-len(train) // BATCH)
    warm = objectives.linear(max(1, given.epochs * 2 // 5) * per_epoch)
    alpha = objectives.linear(max(1, given.epochs * 2 // 5) * per_epoch, 0, 0.1)
    pyro.set_rng_seed(given.seed)
    likelihood: dict[str, Any] = {"x": Bernoulli, "y": LABELS[given.model]}
    pair = pv.pairs.multimodal(
        train, latent=64, hidden=(512, 512), guide="joint", likelihood=likelihood
    )
    objective = objectives.jmvae(alpha, warm)
    trained = run(given, folder, pair, train, objective)
    found = subsets(*pair, test, given.particles, seed=given.seed)
    numbers = {f"log_p({name})": it for name, it in found.summary().items()}
    joint = found.joint("x", "y").summary()
    return trained | numbers | {"khat_median": joint["khat_median"], "elbo": joint["elbo"]}


# ---------------------------------------------------------------------------------------------
# Two looks and a label

NETS: dict[str, dict[str, Any]] = {
    "convolutional": {"hidden": (32, 64, 128), "net": convolutional},
    "dense": {"hidden": (400, 400)},
}


def guides(sites: Sequence[str]) -> dict[str, tuple[dict[str, Any], Any]]:
    """How experts are put together, and the objective: one draw of every component."""
    n = len(sites)
    return {
        "poe": ({"guide": "product"}, objectives.mvae(sites)),
        "moe": ({"guide": "mixture"}, pv.elbo(n)),
        "mmvae+": ({"guide": "mixture", "partitioned": True}, pv.elbo(n)),
        "mopoe": ({"guide": "mixture_of_products"}, pv.elbo(2**n - 1)),
        "mvtcae": (
            {"guide": "product", "prior_expert": False},
            objectives.mvtcae(alpha=5 / 6, beta=2.5),
        ),
    }


def digits(split: str, rows: int | None) -> pv.Batch:
    """MNIST, MNIST-M in [0, 1] and the label."""
    one = pv.data.load("mnist", split, ["x", "y"], binarize="static").still()
    two = pv.data.load("mnist_m_subset", split)
    number = min(len(two), rows or len(two))
    one, two = (part.rows(slice(0, number)) for part in (one, two))
    if not torch.equal(one["y"], two["y"].to(one["y"])):
        raise ValueError("the rows of mnist and mnist_m_subset differ in their labels")
    colours = two["x"].permute(0, 3, 1, 2) / 255
    return pv.Batch({"x": one["x"], "m": colours, "y": one["y"]})


def thinned(batch: pv.Batch, share: float, seed: int) -> pv.Batch:
    """Sites of rows made missing with a probability, one of each row kept."""
    generator = torch.Generator().manual_seed(seed)
    lost = torch.rand(len(batch), len(SITES), generator=generator) < share
    spared = torch.randint(len(SITES), (len(batch), 1), generator=generator)
    lost = lost.scatter(1, spared, False)
    for place, site in enumerate(SITES if share else ()):
        dims = (len(batch),) + (1,) * (batch[site].dim() - 1)
        batch = batch.hide(site, lost[:, place].reshape(dims))
    return batch


def looks(given: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """One training, or what is left of it, and its evaluation."""
    whole, test = (digits(split, given.rows) for split in ("train", "test"))
    train = thinned(whole, given.missing, given.seed)
    options, objective = guides(SITES)[given.model]
    pyro.set_rng_seed(given.seed)
    likelihood: dict[str, Any] = {
        "x": Bernoulli,
        "m": functools.partial(Gaussian.build, shared=True),
    }
    private = {"m": given.private} if given.private else 0
    pair = pv.pairs.multimodal(
        train, latent=64, likelihood=likelihood, private=private, **NETS[given.net], **options
    )
    trained = run(given, folder, pair, train, objective)
    device = next(pair[0].parameters()).device
    judges = {
        site: judge(given.out / f"judge_{site}_{len(whole)}.safetensors", whole, site, device)
        for site in ("x", "m")
    }
    named: dict[str, Callable[[Tensor], Tensor]] = {
        site: functools.partial(classes, net, device) for site, net in judges.items()
    }
    accuracy = {
        f"accuracy({site})": float((named[site](test[site]) == test["y"]).double().mean())
        for site in named
    }
    named["y"] = lambda p: p.argmax(-1)
    found = coherence(*pair, test, test["y"], named, seed=given.seed)
    shares = {str(one).partition(":")[0]: [one.share, one.error] for one in found}
    log_p = subsets(*pair, test, given.particles, seed=given.seed, widen=False).summary()
    return trained | accuracy | {"coherence": shares, "log_p": log_p}


class Judge(nn.Sequential):
    """Images ``[n, *event]`` to logits of their classes ``[n, 10]``."""

    def __init__(self, channels: int) -> None:
        super().__init__(
            *(nn.Conv2d(channels, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Flatten(), nn.LazyLinear(128), nn.ReLU(), nn.Linear(128, CLASSES)),
        )

    def forward(self, images: Tensor) -> Tensor:
        out: Tensor = super().forward(images if images.dim() == 4 else images.unsqueeze(1))
        return out


def judge(file: Path, data: pv.Batch, site: str, device: torch.device, epochs: int = 10) -> Judge:
    """A classifier trained on all rows of a site, once."""
    net = Judge(1 if data[site].dim() == 3 else data.shape(site)[1]).to(device)
    net(data[site][:2].to(device))
    if file.exists():
        net.load_state_dict(load_file(file, device=str(device)))
        return net.eval()
    torch.manual_seed(0)
    optimizer = torch.optim.Adam(net.parameters(), 1e-3)
    for _ in range(epochs):
        for rows in torch.randperm(len(data)).split(128):
            images, wanted = data[site][rows].to(device), data["y"][rows].to(device)
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(images), wanted).backward()
            optimizer.step()
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(net.state_dict(), file)
    return net.eval()


@torch.no_grad()
def classes(net: Judge, device: torch.device, images: Tensor) -> Tensor:
    return torch.cat([net(part.to(device)).argmax(-1).cpu() for part in images.split(500)])


# ---------------------------------------------------------------------------------------------
# Rows of the table


def run(
    given: argparse.Namespace, folder: Path, pair: Any, train: pv.Batch, objective: Any
) -> dict[str, Any]:
    """Train, or go on."""
    model, guide = pair
    done = pv.fit(
        model,
        guide,
        train,
        objective,
        epochs=given.epochs,
        batch_size=BATCH,
        optimizer=functools.partial(torch.optim.Adam, lr=given.lr, fused=True),
        compile=given.compile,
        seed=given.seed,
        out=folder,
        resume=(folder / "state.safetensors").exists(),
    )
    last = done.history[-1]
    return {name: getattr(given, name) for name in KEY} | {
        "trained_on": len(train),
        "particles": given.particles,
        "seconds": last["seconds"],
        "train_loss": last["loss"],
        "level": done.level,
    }


class Part(NamedTuple):
    """A part of the table: the first of its models and nets is what is run unless another is asked."""

    measure: Callable[[argparse.Namespace, Path], dict[str, Any]]
    models: tuple[str, ...]
    nets: tuple[str, ...]
    missing: tuple[float, ...]
    epochs: int


KEY = ("part", "model", "net", "missing", "private", "epochs", "seed", "lr", "rows")
PARTS = {
    "labels": Part(labels, tuple(LABELS), ("dense",), (0.0,), 500),
    "looks": Part(looks, tuple(guides(SITES)), tuple(NETS), MISSING, 100),
}


def table(records: Sequence[dict[str, Any]]) -> str:
    """Every row that is meant, those that were not run too."""
    lines = []
    for name, part in PARTS.items():
        lines += [name, "-" * 100]
        for model in part.models:
            for share in part.missing:
                same = {"part": name, "model": model, "missing": share}
                found = [r for r in records if same.items() <= r.items()]
                head = f"{model:<10}" + (f" {share:>4.0%} missing" if len(part.missing) > 1 else "")
                lines += [f"{head}  {line}" for r in found for line in _shown(r)]
                lines += [] if found else [f"{head}  not run"]
        lines.append("")
    return "\n".join([*lines, f"log p in nats, mean ± standard error over test rows; {PUBLISHED}"])


def _shown(record: dict[str, Any]) -> Iterator[str]:
    pace = record["seconds"] / record["epochs"]
    yield (
        f"seed {record['seed']}, {record['net']} nets, private {record['private']}, "
        f"{record['epochs']} epochs of {record['trained_on']} rows, {pace:.1f} s each"
    )
    log_p = record.get("log_p") or {
        name[6:-1]: it for name, it in record.items() if name.startswith("log_p(")
    }
    yield "log p: " + ", ".join(
        f"{name} {it['log_p']:.2f} ± {it['log_p_se']:.2f}" for name, it in log_p.items()
    )
    if "coherence" in record:
        shares = record["coherence"].items()
        yield "coherence: " + ", ".join(f"{name} {share:.1%}" for name, (share, _) in shares)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--model", choices=[m for part in PARTS.values() for m in part.models])
    parser.add_argument("--net", choices=NETS, help="of looks (labels: dense)")
    parser.add_argument("--missing", type=float, default=0.0, help="share of the sites of rows")
    parser.add_argument("--private", type=int, default=0, help="dimensions that MNIST-M has alone")
    parser.add_argument("--epochs", type=int, help="default: 500 and 100")
    parser.add_argument("--particles", type=int, default=1000)
    parser.add_argument("--rows", type=int, help="the first ROWS of each split only")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compile", default="auto")
    parser.add_argument("--out", type=Path, default=Path("runs/multimodal"))
    parser.add_argument("--name", default="multimodal", help="of the files in results/")
    given = parser.parse_args()
    part = PARTS[given.part]
    given.epochs = given.epochs or part.epochs
    for name, known in (("model", part.models), ("net", part.nets)):
        came = getattr(given, name) or known[0]
        setattr(given, name, came)
        if came not in known:
            parser.error(f"--{name}: came {came!r}, wanted one of {list(known)}")
    if given.model == "mmvae+" and not given.private:
        parser.error("--model: came 'mmvae+' without private latents, wanted --private")

    if any(all(r[name] == getattr(given, name) for name in KEY) for r in kept(given.out)):
        print("complete already")
        return
    folder = folder_of(given.out, *(getattr(given, name) for name in KEY))
    folder.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    new = part.measure(given, folder) | {name: getattr(given, name) for name in KEY}
    new["hours"] = (time.monotonic() - started) / 3600
    records = [*kept(given.out), new]
    keep(given.out, records)
    settings = {"optimizer": "Adam", "batch": BATCH, "K": given.particles}
    write(given.name, settings, records, table(records))


if __name__ == "__main__":
    main()
