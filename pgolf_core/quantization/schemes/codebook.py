"""codebook: one table for every matrix of a model; weights are indices of its entries, scalars or short vectors.

Every matrix is divided by its own rms, so that one table serves them all. Lloyd's algorithm finds the table; with a
price on bits it becomes the entropy-constrained one of Chou, Lookabaugh & Gray, IEEE Trans. ASSP 37(1), 1989, whose
indices are meant for an entropy coder. `learn` makes the table, `to_codes` and `CodebookTensor.dequantize` use it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from pgolf_core.quantization.stored import FLOATS, checked, stored_form
from pgolf_core.scheme import FitContext, QuantScheme, parse_int, parse_number, register

MAX_SIZE = 4096  # entries; Lloyd's algorithm then still sees 64 vectors for each, and takes a minute
SAMPLE = 2**18  # vectors that Lloyd's algorithm sees: 1,024 per entry for a table of 256
LLOYD_STEPS = 40
SEED_SAMPLE = 2**15  # vectors from which the first entries are drawn
CHUNK_SCORES = 2**20  # float32 scores at a time, 4 MiB: fits the cache, bounds memory
ENCODE_PASSES = 4  # rounds of choosing entries, refitting scale and rates; 16 lower error + price by 0.1 % more
SCALE_RANGE = 2.0  # the refitted scale stays within this factor of the root mean square
SMALLEST = 2.0**-24  # smallest float16; lower bound of a scale that divides


@stored_form("codebook", shared="book")
@dataclass(frozen=True)
class CodebookTensor:
    """indices (rows, cols / dimension): uint8, or int16 for more than 256 entries. scale: float16 ().

    book: float16 (size, dimension), the entries for weights of rms 1.
    """

    indices: Tensor
    scale: Tensor
    book: Tensor

    def arrays(self) -> dict[str, Tensor]:
        return {"index": self.indices, "scale": self.scale, "book": self.book}

    @classmethod
    def from_arrays(cls, arrays: dict[str, Tensor]) -> CodebookTensor:
        """Raises KeyError or ValueError on arrays that do not fit each other, and on indices of no entry."""
        index = checked(arrays, "index", (torch.uint8, torch.int16), -1, -1)
        book = checked(arrays, "book", FLOATS[:1], -1, -1)
        if index.min() < 0 or index.max() >= len(book):
            raise ValueError(f"an index is not in 0..{len(book) - 1}")
        return cls(index, checked(arrays, "scale", FLOATS[:1]), book)

    @property
    def shape(self) -> tuple[int, int]:
        return self.indices.size(0), self.indices.size(1) * self.book.size(1)

    def dequantize(self) -> Tensor:
        """float32 (rows, cols); one rounded product per weight, so the same bits on every machine."""
        return self.book.float()[self.indices.long()].flatten(1) * self.scale.float()


@register
@dataclass(frozen=True)
class CodebookScheme(QuantScheme):
    word = "codebook"
    usage = (
        "codebook:SIZE:DIMENSION or codebook:SIZE:DIMENSION:RATE, one table of up to SIZE ≤ 4096 vectors of "
        "weights for all tensors that have it; RATE prices a bit in σ² (0.06 suits 2.5 bits per weight)"
    )
    scale_free = True
    per_model = True
    size: int
    dimension: int
    rate_weight: float = 0.0

    @classmethod
    def from_args(cls, size: str, dimension: str, rate: str = "0") -> CodebookScheme:
        return cls(parse_int(size, 2, MAX_SIZE), parse_int(dimension, 1, 16), parse_number(rate, 0, 10))

    def fit_all(self, weights: dict[str, Tensor], contexts: dict[str, FitContext]) -> dict[str, CodebookTensor]:
        book = learn(weights.values(), self.size, self.dimension, self.rate_weight)
        return {name: to_codes(w, book, self.rate_weight) for name, w in weights.items()}

    def bits_per_weight(self) -> float:
        """Bound on the entropy of indices.

        With a price of λ·σ² per bit the table settles at the distortion D at which the slope of a Gaussian's
        distortion, 2·ln 2·D, is λ; an entropy-coded table of few dimensions lies 0.2 bit above that D's rate (Gray &
        Neuhoff 1998, Quantization).
        """
        most = math.log2(self.size) / self.dimension
        if not self.rate_weight:
            return most
        return min(most, max(0.0, 0.5 * math.log2(2 * math.log(2) / self.rate_weight)) + 0.2)

    def shared_bytes(self) -> int:
        return 2 * self.size * self.dimension


def to_codes(w: Tensor, book: Tensor, rate_weight: float = 0.0) -> CodebookTensor:
    """The entries and the scale for w (rows, cols) of least squared error + rate_weight · bits.

    The error is a vector's, in units of w's mean square; the bits are -log2 of an index's share among w's own
    indices. At rate_weight 0 every index is the nearest entry's. Raises ValueError for columns that the book's
    dimension does not divide.
    """
    entries = book.float()
    size, dimension = entries.shape
    vectors, rms = as_vectors(w, dimension)
    scale, penalty = rms, torch.zeros(size)
    for _ in range(ENCODE_PASSES):
        index, _ = cheapest(vectors / scale.clamp_min(SMALLEST), entries, penalty)
        penalty = rate_penalty(torch.bincount(index, minlength=size), rate_weight)
        chosen = entries[index]
        fitted = (vectors * chosen).sum() / chosen.square().sum()  # 0 / 0 if all entries chosen are zero
        scale = fitted.nan_to_num(0.0).clamp(rms / SCALE_RANGE, rms * SCALE_RANGE).half().float()
    index, _ = cheapest(vectors / scale.clamp_min(SMALLEST), entries, penalty)
    indices = index.view(w.size(0), -1).to(torch.uint8 if size <= 256 else torch.int16)
    return CodebookTensor(indices, scale.half(), book)


def learn(tensors: Iterable[Tensor], size: int, dimension: int, rate_weight: float = 0.0) -> Tensor:
    """A table of at most `size` vectors of `dimension` weights for all tensors (rows, cols): float16, sorted, distinct.

    There are fewer if the weights hold fewer distinct vectors, or if rate_weight > 0 has emptied cells: under a price
    on bits that is how the rate falls. Equal weights give equal tables. Takes some 5 s for 256 entries on one core,
    whatever the number of weights. Raises ValueError as to_codes.
    """
    generator = torch.Generator().manual_seed(0)
    normalised = [vectors / rms.clamp_min(SMALLEST) for vectors, rms in (as_vectors(w, dimension) for w in tensors)]
    vectors = torch.cat(normalised)
    vectors = vectors[torch.randperm(len(vectors), generator=generator)[:SAMPLE]]
    entries = spread_entries(vectors[:SEED_SAMPLE], size, generator)
    penalty = torch.zeros(len(entries))
    for _ in range(LLOYD_STEPS):
        entries, penalty, _ = lloyd_step(vectors, entries, penalty, rate_weight)
    return entries[penalty.isfinite()].half().unique(dim=0)


def spread_entries(vectors: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """First entries (<= size, dimension), each drawn with probability ∝ squared distance to the others (k-means++)."""
    entries = vectors[:1]
    distance = (vectors - entries).square().sum(dim=1)
    while len(entries) < size and distance.any():
        drawn = vectors[torch.multinomial(distance, 1, generator=generator)]
        entries = torch.cat([entries, drawn])
        distance = torch.minimum(distance, (vectors - drawn).square().sum(dim=1))
    return entries


def lloyd_step(vectors: Tensor, entries: Tensor, penalty: Tensor, rate_weight: float) -> tuple[Tensor, Tensor, float]:
    """Better entries and penalties than those given, and the mean cost of a vector under those given.

    vectors (n, dimension), entries (size, dimension), penalty (size,). An empty cell gets the vector that
    costs most now; under a price on bits it stays empty, because its first index would cost more.
    """
    index, cost = cheapest(vectors, entries, penalty)
    counts = torch.bincount(index, minlength=len(entries))
    sums = torch.stack([torch.bincount(index, part, len(entries)) for part in vectors.double().unbind(1)], dim=1)
    empty = counts == 0
    moved = torch.where(empty[:, None], entries, (sums / counts[:, None]).float())
    if not rate_weight:
        moved[empty] = vectors[cost.topk(int(empty.sum())).indices]
    return moved, rate_penalty(counts, rate_weight), cost.double().mean().item()


def rate_penalty(counts: Tensor, rate_weight: float) -> Tensor:
    """rate_weight times the bits of an index of each of (size,) counts: infinite for a count of 0."""
    return -rate_weight * (counts / counts.sum()).log2() if rate_weight else torch.zeros(len(counts))


def cheapest(vectors: Tensor, entries: Tensor, penalty: Tensor) -> tuple[Tensor, Tensor]:
    """Index (n,) of the entry of least squared error + penalty for each vector, and that cost (n,); as `lloyd_step`."""
    offsets = entries.square().sum(dim=1) + penalty
    indices, costs = [], []
    for x in vectors.split(max(1, CHUNK_SCORES // len(entries))):
        # ‖x − e‖² less ‖x‖², which does not depend on the entry: (rows, size)
        least, index = torch.addmm(offsets, x, entries.T, alpha=-2).min(dim=1)
        indices.append(index)
        costs.append(least + x.square().sum(dim=1))
    return torch.cat(indices), torch.cat(costs)


def as_vectors(w: Tensor, dimension: int) -> tuple[Tensor, Tensor]:
    """w (rows, cols) -> float32 (rows · cols / dimension, dimension), neighbours along a row; root mean square."""
    if w.size(1) % dimension:
        raise ValueError(f"vectors of {dimension} weights do not fit {w.size(1)} columns")
    vectors = w.detach().float().reshape(-1, dimension)
    return vectors, vectors.square().mean().sqrt()
