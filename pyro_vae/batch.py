"""Rows of named tensors, and the handler that makes a generative program see them as data."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import MaskedDistribution
from pyro.nn import PyroModule
from pyro.poutine.broadcast_messenger import BroadcastMessenger
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import get_plates
from torch import Tensor
from torch.utils._pytree import register_pytree_node

__all__ = ["Batch", "Observed", "flatten", "take"]

PER_ENTRY = ("log_jacobian", "mean", "scale")  # what a step of a record may have entry by entry


class Batch:
    """Rows of named tensors with masks: the only form in which data reach a program.

    Entries that are NaN are *missing*: ``batch["x"]`` never holds NaN (missing entries read as the
    site's ``fill``, a point inside the data's range); ``batch.mask("x")`` is True where observed.

    Args:
        values: site -> array or tensor ``[B, *event]``. Floating numpy arrays take torch's default
            dtype; tensors are kept as they are.
        observed: site -> bool ``[B, *event]``, True where observed. Integer data need it to have
            missing entries at all; for floating data it adds to the NaNs.
        size: number of rows B. Only needed without values: ``Batch(size=n)`` asks a model for n
            fresh rows.
        total: rows N of the data set this batch was cut from (default: B).
        index: ``[B]`` row numbers in that data set (default: 0..B-1).
        weights: ``[B]`` row weights, which act outside the bound.
        fill: site -> number that missing entries read as. Default: 0 where the observed data reach
            both sides of it, else the observed median.
        record: what was done to the data on the way in, in JSON's types. It stays with the rows and
            goes into the run; ``record["steps"]`` says how log densities in other units follow.

    Raises:
        ValueError: sites of different lengths, entries that are not numbers or infinite, a mask of
            the wrong shape, nothing to take the size from.
    """

    size: int
    total: int
    index: Tensor
    weights: Tensor | None
    record: dict[str, Any]

    def __init__(
        self,
        values: Mapping[str, Any] | None = None,
        observed: Mapping[str, Any] | None = None,
        size: int | None = None,
        *,
        total: int | None = None,
        index: Tensor | None = None,
        weights: Any = None,
        fill: Mapping[str, float] | None = None,
        record: Mapping[str, Any] | None = None,
    ) -> None:
        if isinstance(values, Tensor | np.ndarray):
            raise ValueError("Batch: came a bare array, wanted site names: Batch({'x': array})")
        for argument, given in (("observed", observed), ("fill", fill)):
            if given is not None and not isinstance(given, Mapping):
                raise ValueError(
                    f"Batch: {argument}= came as {type(given).__name__}, wanted site names: "
                    f"{argument}={{'x': ...}}"
                )
        tensors = {site: _as_tensor(site, value) for site, value in (values or {}).items()}
        lengths = {site: len(value) for site, value in tensors.items()}
        if size is not None:
            lengths["size="] = size
        if not lengths:
            raise ValueError("Batch: came no values and no size, wanted one: Batch(size=n)")
        if len(set(lengths.values())) > 1:
            raise ValueError(f"Batch: the sites differ in their number of rows: {lengths}")
        for argument, given in (("observed", observed), ("fill", fill)):
            if unknown := set(given or {}) - set(tensors):
                raise ValueError(
                    f"Batch: {argument}= names {sorted(unknown)}, values has {sorted(tensors)}"
                )

        self.size = next(iter(lengths.values()))
        self.total = self.size if total is None else total
        self.record = dict(record or {})
        self._values: dict[str, Tensor] = {}
        self._observed: dict[str, Tensor] = {}
        self._fill = dict(fill or {})
        for site, value in tensors.items():
            mask = _mask(site, value, (observed or {}).get(site))
            if mask is not None:
                here = self._fill.setdefault(site, _interior(value[mask]))
                value = torch.where(mask, value, torch.as_tensor(here, dtype=value.dtype))
                self._observed[site] = mask
            self._values[site] = value
        device = next(iter(self._values.values())).device if self._values else None
        self.index = torch.arange(self.size, device=device) if index is None else index
        if self.index.shape != (self.size,):
            raise ValueError(f"Batch: index= came {list(self.index.shape)}, wanted [{self.size}]")
        self.weights = None if weights is None else _as_tensor("weights", weights)
        if self.weights is not None and self.weights.shape != (self.size,):
            raise ValueError(
                f"Batch: weights= came {list(self.weights.shape)}, wanted [{self.size}]"
            )

    @property
    def sites(self) -> tuple[str, ...]:
        """Names of the sites this batch holds."""
        return tuple(self._values)

    @property
    def incomplete(self) -> tuple[str, ...]:
        """Names of the sites that have missing entries somewhere in their data set."""
        return tuple(self._observed)

    @property
    def fill(self) -> dict[str, float]:
        """Site -> number that missing entries read as (of incomplete sites at least)."""
        return dict(self._fill)

    @property
    def device(self) -> torch.device:
        return self.index.device

    @property
    def mapped(self) -> bool:
        """Whether rows are read from files."""
        return False

    def __contains__(self, site: object) -> bool:
        return site in self._values

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, site: str) -> Tensor:
        """Values ``[B, *event]`` of a site; missing entries read as its fill."""
        if site not in self._values:
            raise KeyError(f"site {site!r} is not in the batch, which has {list(self._values)}")
        return self._values[site]

    def shape(self, site: str) -> tuple[int, ...]:
        """``[B, *event]``, without making the values."""
        return tuple(self[site].shape)

    def mask(self, site: str) -> Tensor:
        """Bool ``[B, *event]``, True where observed (all True for a complete site)."""
        if site in self._observed:
            return self._observed[site]
        return torch.ones_like(self[site], dtype=torch.bool)

    def seen(self, site: str) -> Tensor:
        """Bool ``[B]``, rows in which any entry of a site is observed."""
        return self.mask(site).reshape(self.size, -1).any(1)

    def epoch(self, seed: int, number: int) -> Batch:
        """The rows as they are in an epoch of training: themselves, unless drawn anew in each."""
        return self

    def still(self) -> Batch:
        """The rows as one fixed draw, to judge by: themselves, unless ``rows`` draws anew."""
        return self

    def look(self, rows: int = 10_000) -> Batch:
        """Rows in memory, to look at before training: all of them, unless that is too much."""
        return self.still()

    def rows(self, index: Any) -> Batch:
        """The rows that ``index`` (numbers, slice or bool mask) selects; ``total`` stays N."""
        if isinstance(index, slice):
            return self._map(lambda held: held[index])
        index = torch.atleast_1d(torch.as_tensor(index, device=self.device))
        return self._map(lambda held: pick(held, index))

    def ahead(self, index: Tensor, device: torch.device) -> Batch:
        """Rows on a device, as far as they can be made before their turn.

        What ``rows`` draws from torch's global generator is left to ``rows`` of the result, so that it
        is drawn when its turn has come; a subclass that draws there overrides both.
        """
        return self.rows(index)._map(lambda tensor: sent(tensor, device))

    def tensors(self) -> list[Tensor]:
        """All that is in memory."""
        return [tensor for held in flatten(self)[0] for tensor in tensors(held)]

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Batch:
        """Move to ``device``; ``dtype`` applies to the floating sites."""

        def move(tensor: Tensor) -> Tensor:
            return tensor.to(device, dtype) if tensor.is_floating_point() else tensor.to(device)

        return self._map(move)

    def without(self, sites: str | Iterable[str]) -> Batch:
        """Drop sites: what is absent counts like what is missing in every entry."""
        drop = {sites} if isinstance(sites, str) else set(sites)
        new = self._map(lambda tensor: tensor)
        new._values = {site: value for site, value in self._values.items() if site not in drop}
        new._observed = {site: mask for site, mask in self._observed.items() if site not in drop}
        new._fill = {site: number for site, number in self._fill.items() if site not in drop}
        return new

    def hide(self, site: str, mask: Any) -> Batch:
        """Make the entries missing where ``mask`` (bool, broadcast to ``[B, *event]``) is True."""
        value = self[site]
        hidden = _bools(site, "hide()", torch.as_tensor(mask, device=value.device))
        if 0 < hidden.dim() < value.dim() and len(hidden) == len(value):
            raise ValueError(
                f"site {site!r}: hide() came a mask {list(hidden.shape)}, which may mean rows or "
                f"columns of {list(value.shape)}; give it {value.dim()} dimensions"
            )
        try:
            hidden = hidden.expand(value.shape)
        except RuntimeError:
            raise ValueError(
                f"site {site!r}: hide() came a mask {list(hidden.shape)}, "
                f"wanted {list(value.shape)}"
            ) from None
        observed = self.mask(site) & ~hidden
        new = self._map(lambda tensor: tensor)
        new._fill.setdefault(site, _interior(value[observed]))
        new._values[site] = torch.where(
            observed,
            value,
            torch.as_tensor(new._fill[site], dtype=value.dtype, device=value.device),
        )
        new._observed[site] = observed
        return new

    def with_mask(self, site: str = "x", name: str = "s") -> Batch:
        """Add the mask of a site as data: ``name`` [B, *event], 1 where observed and 0 elsewhere.

        What a model of missing entries observes (``pyro_vae.models.SelectionModel``).
        """
        if self.mapped:
            raise ValueError(
                f"site {site!r}: with_mask() came rows that are read from files when they are taken, "
                "where their mask is not known yet; load them without mmap=True"
            )
        if name in self:
            raise ValueError(
                f"site {name!r}: the batch has it already; give the mask another name="
            )
        new = self._map(lambda tensor: tensor)
        new._values[name] = self.mask(site).to(torch.get_default_dtype())
        return new

    def steps(self, site: str) -> Batch:
        """Split ``[B, T, *event]`` into sites ``site_0 .. site_{T-1}``, each ``[B, *event]``.

        What the record says of the site it then says of each of them.
        """
        new = self.without(site)
        shape = self[site].shape
        if len(shape) < 2:
            raise ValueError(
                f"site {site!r}: steps() came {list(self[site].shape)}, wanted [B, T, *event]"
            )
        for t in range(shape[1]):
            new._values[f"{site}_{t}"] = self[site][:, t]
            if site in self._observed:
                new._observed[f"{site}_{t}"] = self._observed[site][:, t]
                new._fill[f"{site}_{t}"] = self._fill[site]
        new.record = _split_record(self.record, site, shape[1:])
        return new

    def _map(self, move: Callable[[Tensor], Tensor]) -> Batch:
        new = object.__new__(Batch)
        new._values = {site: move(value) for site, value in self._values.items()}
        new._observed = {site: move(mask) for site, mask in self._observed.items()}
        new._fill = dict(self._fill)
        new.index = move(self.index)
        new.weights = None if self.weights is None else move(self.weights)
        new.size, new.total, new.record = len(new.index), self.total, self.record
        return new

    def __repr__(self) -> str:
        shapes = ", ".join(
            f"{site} {list(value.shape)}{' (incomplete)' if site in self._observed else ''}"
            for site, value in self._values.items()
        )
        return f"Batch({self.size} of {self.total} rows: {shapes})"


def pick(held: Any, index: Any) -> Any:
    """``held[index]``; rows of a tensor by their numbers are copied as a whole, which is what takes a
    third of the time on a CPU."""
    on_cpu = isinstance(held, Tensor) and held.is_cpu and isinstance(index, Tensor)
    if on_cpu and index.dtype == torch.int64 and index.dim() == 1:
        return held.index_select(0, torch.where(index < 0, index + len(held), index))
    return held[index]


def take(data: Batch | Tensor, index: Any) -> Any:
    """Rows of a batch or of a bare tensor."""
    return data.rows(index) if isinstance(data, Batch) else pick(data, index)


def ahead(data: Any, index: Tensor, device: torch.device) -> Any:
    """``Batch.ahead``, or rows of a bare tensor on a device."""
    if isinstance(data, Tensor):
        return sent(pick(data, index), device)
    return data.ahead(index, device)


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor on a device; on its way from memory to CUDA the host goes on."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def tensors(data: Any) -> list[Tensor]:
    """``Batch.tensors``; of a bare tensor, itself."""
    return [data] if isinstance(data, Tensor) else data.tensors()


def still(data: Batch | Tensor) -> Any:
    """One fixed draw of a batch; a bare tensor is one."""
    return data.still() if isinstance(data, Batch) else data


def flatten(batch: Batch) -> tuple[list[Any], Any]:
    """A batch's tensors, and what else there is to it (but for the record)."""
    leaves = [*batch._values.values(), *batch._observed.values(), batch.index]
    if batch.weights is not None:  # None would be a leaf, which a map over tensors cannot take
        leaves.append(batch.weights)
    fill = tuple(batch._fill.items())
    return leaves, (batch.sites, batch.incomplete, batch.size, batch.total, fill)


def _unflatten(leaves: Iterable[Any], context: Any) -> Batch:
    sites, incomplete, size, total, fill = context
    leaf = iter(leaves)
    new = object.__new__(Batch)
    new._values = {site: next(leaf) for site in sites}
    new._observed = {site: next(leaf) for site in incomplete}
    new._fill = dict(fill)
    new.size, new.total, new.index, new.weights = size, total, next(leaf), next(leaf, None)
    new.record = {}  # of no use to a program
    return new


register_pytree_node(Batch, flatten, _unflatten, serialized_type_name="pyro_vae.Batch")


def _split_record(record: Mapping[str, Any], site: str, shape: Sequence[int]) -> dict[str, Any]:
    """The record of a batch whose site with event ``[T, *event]`` is now T sites."""
    names = [f"{site}_{t}" for t in range(shape[0])]

    def split(step: Mapping[str, Any]) -> list[Mapping[str, Any]]:
        if step["site"] != site:
            return [step]
        return [_part_of_step(step, name, t, shape) for t, name in enumerate(names)]

    new = dict(record)
    if "steps" in record:
        new["steps"] = [part for step in record["steps"] for part in split(step)]
    if site in record.get("levels", {}):
        others = {other: n for other, n in record["levels"].items() if other != site}
        new["levels"] = others | dict.fromkeys(names, record["levels"][site])
    return new


def _part_of_step(
    step: Mapping[str, Any], name: str, t: int, shape: Sequence[int]
) -> dict[str, Any]:
    """What was done to entry t of a site alone; a bare number is that of all entries."""
    lists = {key: step[key] for key in PER_ENTRY if isinstance(step.get(key), list)}
    parts = {key: np.broadcast_to(values, shape)[t].tolist() for key, values in lists.items()}
    return {**step, "site": name, **parts}


def _as_tensor(site: str, value: Any) -> Tensor:
    tensor = value if isinstance(value, Tensor) else _from_array(site, value)
    if tensor.dim() == 0:
        raise ValueError(f"site {site!r}: came a single number, wanted rows [B, *event]")
    if tensor.is_floating_point() and torch.isinf(tensor).any():
        row = int(torch.isinf(tensor).reshape(len(tensor), -1).any(1).nonzero()[0])
        raise ValueError(f"site {site!r}: infinite entries (first in row {row}); NaN means missing")
    return tensor


def _from_array(site: str, value: Any) -> Tensor:
    try:
        array = np.array(value)  # a copy: the caller's array stays theirs, and writable
    except ValueError:
        raise ValueError(f"site {site!r}: came rows of different shapes, wanted one") from None
    if array.dtype.kind not in "biuf":
        raise ValueError(f"site {site!r}: came entries of type {array.dtype}, wanted numbers")
    if array.dtype.kind == "u" and array.dtype.itemsize > 1:
        array = array.astype(np.int64)  # torch has few kernels for wide unsigned types
    dtype = torch.get_default_dtype() if array.dtype.kind == "f" else None
    return torch.as_tensor(array, dtype=dtype)


def _mask(site: str, value: Tensor, observed: Any) -> Tensor | None:
    """Where a site is observed, or None where nothing is missing and nobody said so."""
    missing = torch.isnan(value) if value.is_floating_point() else None
    if observed is None:
        return ~missing if missing is not None and bool(missing.any()) else None
    mask = observed if isinstance(observed, Tensor) else torch.as_tensor(np.array(observed))
    if mask.shape != value.shape:
        raise ValueError(
            f"site {site!r}: observed= came {list(mask.shape)}, wanted {list(value.shape)}"
        )
    mask = _bools(site, "observed=", mask.to(value.device))
    return mask if missing is None else mask & ~missing


def _bools(site: str, argument: str, mask: Tensor) -> Tensor:
    """Numbers that are a mask by their values; 0.3 would count as True."""
    if mask.dtype != torch.bool and not bool(((mask == 0) | (mask == 1)).all()):
        strange = mask[(mask != 0) & (mask != 1)][0].item()
        raise ValueError(
            f"site {site!r}: {argument} came a mask that holds {strange:g}, wanted bool: mask < 0.3"
        )
    return mask.to(torch.bool)


def _interior(observed: Tensor) -> float:
    """A point inside the range of the data: networks and log densities can take it."""
    if len(observed) == 0 or bool((observed.min() <= 0) & (observed.max() >= 0)):
        return 0.0
    return 1.0 if observed.dtype == torch.bool else float(observed.median())


class Condition(Messenger):
    """Make a program's sites that ``batch`` holds count as data where they are observed.

    * complete site: observed;
    * incomplete site, proposed by the guide (``proposed``): its observed entries are marked in
      ``infer["observed"]``, and whoever replays the guide supplies the merged value;
    * incomplete site otherwise: missing entries are drawn from the site's own distribution (so that
      later sites see a possible value) and masked, so that they contribute 0;
    * ``proposing=True`` (in a guide): data where observed, the guide's own draw elsewhere, and
      ``infer["observed"]`` says where it did not sample.

    Right outside and inside a particle plate: the draw covers every enclosing plate.
    """

    def __init__(
        self, batch: Batch, proposed: Collection[str] = (), proposing: bool = False
    ) -> None:
        super().__init__()
        self.batch, self.proposed, self.proposing = batch, proposed, proposing

    def _pyro_sample(self, msg: Any) -> None:
        site = msg["name"]
        if site not in self.batch or msg["is_observed"] or msg["done"]:
            return
        fn = _in_plates(msg)
        value = self.batch[site]
        check_event(site, fn, value)
        complete = site not in self.batch.incomplete
        mask = None if complete else self.batch.mask(site)
        if complete and not self.proposing:
            msg["value"], msg["is_observed"] = value, True
        elif self.proposing:
            msg["infer"] = {**msg["infer"], "observed": True if complete else mask}
            msg["value"] = (
                value.expand(fn.shape()) if mask is None else torch.where(mask, value, fn())
            )
        elif site in self.proposed:
            msg["infer"] = {**msg["infer"], "observed": mask}
        else:
            assert mask is not None
            msg["fn"] = mask_elementwise(site, fn, mask)
            msg["value"], msg["is_observed"] = torch.where(mask, value, fn()), True
            msg["infer"] = {**msg["infer"], "drawn": mask, "source": fn}


class Observed(PyroModule):
    """A model that runs with every site that its batch holds observed, missing entries masked.

    ``Observed(model)(batch)`` keeps the model's ``.parameters()`` and goes into ``SVI``,
    ``Predictive``, autoguides and ``MCMC`` as it is.

    Raises:
        ValueError: data whose event shape or number of rows differs from the site's, a partly
            missing row under a likelihood that does not factorize.
    """

    def __init__(self, model: Callable[..., Any]) -> None:
        super().__init__()
        if isinstance(model, PyroModule):
            # Past PyroModule's attribute access, which renames its sites from "w" to "model.w".
            self.__dict__["model"] = self._modules["model"] = model
        else:
            self.model = model

    def forward(self, batch: Batch, *args: Any, **kwargs: Any) -> Any:
        with Condition(batch):
            return self.model(batch, *args, **kwargs)


def _in_plates(msg: Any) -> Any:
    """The site's distribution over every plate around it (Pyro has only done the inner ones)."""
    probe = {**msg, "cond_indep_stack": get_plates()}
    BroadcastMessenger._pyro_sample(probe)  # type: ignore[arg-type]
    return probe["fn"]


def check_event(site: str, fn: Any, value: Tensor) -> None:
    """Compare event shapes exactly: ``[B, 1]`` would broadcast silently with an event ``[6]``."""
    came, wanted = tuple(value.shape[1:]), tuple(fn.event_shape)
    if came != wanted:
        raise ValueError(
            f"site {site!r}: data have event shape {list(came)}, the program's distribution has "
            f"{list(wanted)}; reshape the data or change .to_event()"
        )
    rows = fn.batch_shape[-1] if fn.batch_shape else 1
    if rows != len(value):
        raise ValueError(
            f"site {site!r}: data have {len(value)} rows, the program's distribution has {rows}; "
            'is it inside pyro.plate("data", batch.size, dim=-1)?'
        )


def mask_elementwise(site: str, fn: Any, mask: Tensor) -> Any:
    """``fn`` with its log density masked entry by entry; ``mask`` is ``[B, *event]``.

    Raises:
        ValueError: ``fn`` does not factorize over the event and a row is missing in part.
    """
    if isinstance(fn, dist.Independent):
        masked = mask_elementwise(site, fn.base_dist, mask)
        return masked.to_event(fn.reinterpreted_batch_ndims)
    if isinstance(fn, MaskedDistribution) and fn.event_dim:
        return mask_elementwise(site, fn.base_dist, mask).mask(fn._mask)
    if fn.event_dim:
        entries = mask.flatten(-fn.event_dim)
        mask = entries.all(-1)
        if bool((mask != entries.any(-1)).any()):
            raise ValueError(
                f"site {site!r}: {type(fn).__name__} does not factorize over its event "
                f"{list(fn.event_shape)}, and rows are missing in part; use a factorized "
                "likelihood or make such rows missing as a whole"
            )
    return fn.mask(mask)
