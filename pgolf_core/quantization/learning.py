"""Learned rounding: levels and float tensors that follow the raw weights' predictions, or the text, on training text.

Quantizers round matrix by matrix. Here all levels move together, as in AdaRound (Nagel et al. 2020,
https://arxiv.org/abs/2004.10568), towards what the whole model should predict (distillation: Hinton et al. 2015,
https://arxiv.org/abs/1503.02531). Gradients pass the rounding straight through (Bengio et al. 2013,
https://arxiv.org/abs/1308.3432). Step sizes stay in the proportions that were chosen.
"""

import copy
import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pgolf_core.device import autocast
from pgolf_core.knobs import ExportConfig
from pgolf_core.quantization.calibration import PIECE
from pgolf_core.quantization.grids import UNCLIPPED
from pgolf_core.quantization.primitives import QuantizedTensor
from pgolf_core.quantization.stored import Quantized
from pgolf_core.scheme import ExportError

MAX_START_ERROR = 0.45  # latent weights begin no farther from their levels, in the distance of two levels
FLOAT_RATE = 1e-3  # Adam's rate of the tensors that stay float
WARMDOWN = 0.7  # share of the updates over which rates fall to 0
CHECKED_BATCHES = 4  # their predictions decide whether the learned levels are better
MIN_FILL, MAX_TRIES = 0.995, 8  # share of the cap that a file should take, and files that are made for it
MIN_USED = 0.95  # share of the cap; the solver takes less with the finest steps alone

FileBytes = Callable[[Quantized], int]


class Student:
    """A copy of the raw model whose matrices are rounded; `latents` are the weights before, in steps of `quantized`."""

    def __init__(self, model: nn.Module, quantized: Quantized):
        self.model, self.quantized = copy.deepcopy(model).eval(), quantized
        self.device, self.packing = next(model.parameters()).device, 0.0  # packing: seconds of fit_to
        self.parameters = dict(self.model.named_parameters())
        self.limits = {}  # largest levels: steps without an axis clip nothing, other grids end where they now do
        self.binary = set()  # names of tensors whose levels are −1 and 1
        for name, tensor in quantized.tensors.items():
            if not isinstance(tensor, QuantizedTensor):
                raise ExportError(f"learn_steps learns levels, and tensor {name} has none; take a quantizer of a grid")
            self.limits[name] = UNCLIPPED if tensor.axis is None else tensor.q.abs().max().item()
            if tensor.axis is not None and (tensor.q.abs() == 1).all():
                self.binary.add(name)
        self.tensors, self.steps, self.added, self.latents = {}, {}, {}, {}
        self.rescale(1.0)
        for name, tensor in quantized.tensors.items():
            if name in quantized.residuals:
                self.added[name] = quantized.residuals[name].dequantize().to(self.device)
            levels = tensor.q.float().to(self.device)  # type: ignore[attr-defined]
            exact = (self.parameters[name].detach() - self.added.get(name, 0.0)) / self.steps[name]
            farthest = MAX_START_ERROR * (2 if name in self.binary else 1)
            self.latents[name] = levels + (exact - levels).clamp(-farthest, farthest)
        self.floats = {name: p for name, p in self.parameters.items() if name in quantized.floats}
        with torch.no_grad():
            for name, p in self.floats.items():
                p.copy_(quantized.floats[name])

    def rescale(self, factor: float) -> None:
        """Make the steps `factor` times those of `quantized`."""
        self.factor = factor
        for name, tensor in self.quantized.tensors.items():
            assert isinstance(tensor, QuantizedTensor)
            scale = (tensor.scale.float() * factor).to(tensor.scale.dtype)
            self.tensors[name] = replace(tensor, scale=scale)
            self.steps[name] = self.tensors[name].step_size().to(self.device)

    def levels(self, name: str) -> Tensor:
        if name in self.binary:
            return torch.where(self.latents[name] < 0, -1.0, 1.0)
        return (self.latents[name] / self.factor).round_().clamp_(-self.limits[name], self.limits[name])

    @torch.no_grad()
    def round(self) -> None:
        """Put the rounded weights into the model."""
        for name, step in self.steps.items():
            weight = self.levels(name).mul_(step)
            self.parameters[name].copy_(weight + self.added[name] if name in self.added else weight)

    def pass_gradients(self) -> None:
        """Gradients of the rounded weights become those of the latents."""
        for name, step in self.steps.items():
            gradient, self.parameters[name].grad = self.parameters[name].grad, None
            self.latents[name].grad = gradient.mul_(step).div_(self.factor)

    def stored(self) -> Quantized:
        tensors = {}
        for name, tensor in self.tensors.items():
            levels = self.levels(name).cpu()
            dtype = torch.int8 if levels.abs().max() <= 127 else torch.int16
            tensors[name] = replace(tensor, q=levels.to(dtype))
        floats = self.quantized.floats | {
            name: p.detach().cpu().to(self.quantized.floats[name].dtype) for name, p in self.floats.items()
        }
        return replace(self.quantized, tensors=tensors, floats=floats)

    @torch.no_grad()
    def fit_to(self, cap: int, file_bytes: FileBytes) -> None:
        """Rescale all steps alike until the file takes MIN_FILL to all of the cap, or as near as MAX_TRIES find."""
        began, fits, over = time.perf_counter(), None, None  # these two: (octaves of the factor, bytes)
        octaves, target = math.log2(self.factor), (1 + MIN_FILL) / 2 * cap
        weights = sum(latent.numel() for latent in self.latents.values())
        for _ in range(MAX_TRIES):
            self.rescale(2**octaves)
            found = octaves, file_bytes(self.stored())
            if found[1] > cap:
                over = found
            else:
                fits = found
                if found[1] >= MIN_FILL * cap:
                    break
            if fits and over:
                share = (over[1] - target) / (over[1] - fits[1])
                octaves = over[0] + min(0.9, max(0.1, share)) * (fits[0] - over[0])
            else:  # half a bit per weight and octave
                octaves += max(-0.5, min(0.5, 16 * (found[1] - target) / weights))
        else:
            self.rescale(2 ** (fits or over)[0])
        self.packing += time.perf_counter() - began


@dataclass
class Teacher:
    """The raw model, which is left as it is, and training text, (B, T) int64 ids each.

    dtype: of matrix products. seconds: spent on that text by `learn`, so without the search for the file's size.
    """

    model: nn.Module
    text: Sequence[Tensor]
    dtype: torch.dtype = torch.float32
    seconds: float = 0.0

    def learn(self, quantized: Quantized, config: ExportConfig, file_bytes: FileBytes) -> Quantized:
        """A stored model of the same grids whose predictions are closer to the raw model's; one update per batch.

        file_bytes: of file and code. Where allocation=solve used the cap, all steps are made coarser or finer by one
        factor, half-way and at the end, so that it is used again. Warns and returns `quantized` if nothing better was
        found, or nothing that fits.
        """
        used = config.allocation == "solve" and file_bytes(quantized) >= MIN_USED * config.cap_bytes
        began = time.perf_counter()
        student = Student(self.model, quantized)
        before = self.loss(student, config.learn_labels)
        self.update(student, config, file_bytes if used else None)
        learned = student.stored()
        better = self.loss(Student(self.model, learned), config.learn_labels) < before
        self.seconds += time.perf_counter() - began - student.packing
        if better and file_bytes(learned) <= config.cap_bytes:
            return learned
        found = "levels of fewer bytes" if better else "better levels"
        warnings.warn(
            f"learn_rate={config.learn_rate:g}: {len(self.text)} steps found no {found}, so those before are kept; "
            "lower it or raise learn_steps",
            stacklevel=2,
        )
        return quantized

    def update(self, student: Student, config: ExportConfig, file_bytes: FileBytes | None) -> None:
        """Adam on the latents and float tensors, the rates falling linearly to 0 over WARMDOWN of the text."""
        latents, floats = list(student.latents.values()), list(student.floats.values())
        groups = [dict(params=latents, lr=config.learn_rate), dict(params=floats, lr=FLOAT_RATE)]
        optimizer = torch.optim.Adam(groups, betas=(0.9, 0.95), fused=True)
        rates = [group["lr"] for group in optimizer.param_groups]
        for step in range(len(self.text)):
            if file_bytes and step == len(self.text) // 2:
                student.fit_to(config.cap_bytes, file_bytes)
            factor = min(1.0, (1 - step / len(self.text)) / WARMDOWN)
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * factor
            self.add_gradients(student, step, config.learn_labels)
            optimizer.step()
            optimizer.zero_grad()
        if file_bytes:
            student.fit_to(config.cap_bytes, file_bytes)

    @torch.no_grad()
    def loss(self, student: Student, labels: float) -> float:
        """What `add_gradients` lowers, in nats per token, on the first CHECKED_BATCHES."""
        student.round()
        batches = self.text[:CHECKED_BATCHES]
        total = sum(nats.item() for pair in enumerate(batches) for nats in self._nats(student, *pair, labels))
        return total / len(batches)

    @torch.enable_grad()
    def add_gradients(self, student: Student, step: int, labels: float) -> None:
        """Add the gradients of this step's batch."""
        student.round()
        for nats in self._nats(student, step, self.text[step], labels):
            nats.backward()
        student.pass_gradients()

    def _nats(self, student: Student, step: int, ids: Tensor, labels: float) -> Iterator[Tensor]:
        """Parts of the mean nats per token of ids, 0-d. A share `labels` of the steps learns from the text.

        The others have the cross-entropy with the raw model's predictions: the divergence up to a constant. So that
        model need not run on all, which would take a third more time.
        """
        taught = round((step + 1) * (1 - labels)) > round(step * (1 - labels))
        for piece in _pieces(ids, student.device):
            with autocast(student.device, self.dtype):
                if taught:
                    with torch.no_grad():
                        expected = self.model(piece).softmax(-1).flatten(0, 1)  # (B·T, V)
                    nats = F.cross_entropy(student.model(piece).flatten(0, 1), expected)
                else:
                    nats = student.model.loss(piece[:, :-1], piece[:, 1:])  # type: ignore[operator]
            yield nats * (len(piece) / len(ids))


def _pieces(ids: Tensor, device: torch.device) -> Sequence[Tensor]:
    """Sequences (B, T) in equal parts: of about PIECE tokens on a CPU, all at once elsewhere."""
    return ids.to(device).chunk(-(-ids.numel() // PIECE) if device.type == "cpu" else 1)
