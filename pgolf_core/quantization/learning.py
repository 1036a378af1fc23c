"""Learned rounding: levels and float tensors that follow the predictions of the raw weights on training text.

The solver rounds matrix by matrix. Here all levels move together, as in AdaRound (Nagel et al. 2020,
https://arxiv.org/abs/2004.10568), towards what the whole model should predict (distillation: Hinton et al. 2015,
https://arxiv.org/abs/1503.02531). Gradients pass the rounding straight through (Bengio et al. 2013,
https://arxiv.org/abs/1308.3432). Step sizes stay as allocation chose them.
"""

import copy
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from pgolf_core.knobs import ExportConfig
from pgolf_core.quantization.calibration import PIECE
from pgolf_core.quantization.grids import UNCLIPPED
from pgolf_core.quantization.primitives import QuantizedTensor
from pgolf_core.quantization.stored import Quantized

MAX_START_ERROR = 0.45  # steps; latent weights begin no farther from their levels
FLOAT_RATE = 1e-3  # Adam's rate of the tensors that stay float
WARMDOWN = 0.7  # share of the updates over which rates fall to 0
CHECKED_BATCHES = 4  # their predictions decide whether the learned levels are better
HALVINGS = 8  # the rounding offset is found to 2^-8 of where it was


class Student:
    """A copy of the raw model whose matrices are rounded; `latents` are the weights before that, in steps."""

    def __init__(self, model: nn.Module, quantized: Quantized):
        self.model, self.quantized, self.offset = copy.deepcopy(model).eval(), quantized, 0.5
        self.device, self.packing = next(model.parameters()).device, 0.0  # packing: seconds of shrink_to
        self.parameters = dict(self.model.named_parameters())
        self.steps, self.added, self.latents = {}, {}, {}
        for name, tensor in quantized.tensors.items():
            assert isinstance(tensor, QuantizedTensor), f"{name} has no levels to learn"
            residual = quantized.residuals.get(name)
            self.added[name] = residual.dequantize().to(self.device) if residual else 0.0
            self.steps[name] = tensor.step_size().expand(tensor.shape).to(self.device)
            levels = tensor.q.float().to(self.device)
            exact = (self.parameters[name].detach() - self.added[name]) / self.steps[name]
            self.latents[name] = levels + (exact - levels).clamp(-MAX_START_ERROR, MAX_START_ERROR)
        self.floats = {name: p for name, p in self.parameters.items() if name in quantized.floats}
        with torch.no_grad():
            for name, p in self.floats.items():
                p.copy_(quantized.floats[name])

    def levels(self, name: str) -> Tensor:
        """sign(x) · ⌊|x| + offset⌋ of the latents x: an offset of 1/2 rounds to the nearest, a smaller one inwards."""
        latent = self.latents[name]
        return latent.sign() * torch.floor(latent.abs() + self.offset).clamp(max=UNCLIPPED)

    @torch.no_grad()
    def round(self) -> None:
        """Put the rounded weights into the model."""
        for name, step in self.steps.items():
            self.parameters[name].copy_(self.levels(name) * step + self.added[name])

    def pass_gradients(self) -> None:
        """Gradients of the rounded weights become those of the latents."""
        for name, step in self.steps.items():
            self.latents[name].grad, self.parameters[name].grad = self.parameters[name].grad * step, None

    def stored(self) -> Quantized:
        tensors = {}
        for name, tensor in self.quantized.tensors.items():
            levels = self.levels(name).cpu()
            dtype = torch.int8 if levels.abs().max() <= 127 else torch.int16
            tensors[name] = replace(tensor, q=levels.to(dtype))
        floats = self.quantized.floats | {
            name: p.detach().cpu().to(self.quantized.floats[name].dtype) for name, p in self.floats.items()
        }
        return replace(self.quantized, tensors=tensors, floats=floats)

    def shrink_to(self, cap: int, file_bytes: Callable[[Quantized], int]) -> None:
        """Lower the rounding offset as far as the file needs it to fit the cap, to 2^-HALVINGS; at most to 0."""
        began = time.perf_counter()

        def fits(offset: float) -> bool:
            self.offset = offset
            return file_bytes(self.stored()) <= cap

        high, low = self.offset, 0.0
        if not fits(high):
            for _ in range(HALVINGS):
                middle = (low + high) / 2
                low, high = (middle, high) if fits(middle) else (low, middle)
            self.offset = low
        self.packing += time.perf_counter() - began


@dataclass
class Teacher:
    """The raw model, which is left as it is, and training text, (B, T) int64 ids each.

    seconds: spent on that text by `learn`, so without the search for the file's size.
    """

    model: nn.Module
    text: Sequence[Tensor]
    seconds: float = 0.0

    def learn(self, quantized: Quantized, config: ExportConfig, file_bytes: Callable[[Quantized], int]) -> Quantized:
        """A stored model of the same steps whose predictions are closer to the raw model's; one update per batch.

        Its file and code, `file_bytes`, take at most config.cap_bytes: half-way and at the end the rounding offset is
        lowered until they do. Warns and returns `quantized` if nothing better was found.
        """
        began = time.perf_counter()
        student = Student(self.model, quantized)
        before = self.divergence(student)
        self.update(student, config, file_bytes)
        learned = student.stored()
        better = self.divergence(Student(self.model, learned)) < before
        self.seconds += time.perf_counter() - began - student.packing
        if better and file_bytes(learned) <= config.cap_bytes:
            return learned
        found = "levels of fewer bytes" if better else "better levels"
        warnings.warn(
            f"learn_rate={config.learn_rate:g}: {len(self.text)} steps found no {found}, so the solver's for cap_bytes="
            f"{config.cap_bytes} are kept; lower it or raise learn_steps",
            stacklevel=2,
        )
        return quantized

    def update(self, student: Student, config: ExportConfig, file_bytes: Callable[[Quantized], int]) -> None:
        """Adam on the latents and float tensors, the rates falling linearly to 0 over WARMDOWN of the text."""
        latents, floats = list(student.latents.values()), list(student.floats.values())
        groups = [dict(params=latents, lr=config.learn_rate), dict(params=floats, lr=FLOAT_RATE)]
        optimizer = torch.optim.Adam(groups, betas=(0.9, 0.95))
        rates = [group["lr"] for group in optimizer.param_groups]
        for step, ids in enumerate(self.text):
            if step == len(self.text) // 2:
                student.shrink_to(config.cap_bytes, file_bytes)
            factor = min(1.0, (1 - step / len(self.text)) / WARMDOWN)
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * factor
            self.add_gradients(student, ids)
            optimizer.step()
            optimizer.zero_grad()
        student.shrink_to(config.cap_bytes, file_bytes)

    @torch.no_grad()
    def divergence(self, student: Student) -> float:
        """Nats per token between its predictions and the raw model's, on the first CHECKED_BATCHES."""
        student.round()
        batches = self.text[:CHECKED_BATCHES]
        total = sum(divergence.item() for ids in batches for divergence in self._divergences(student, ids))
        return total / sum(ids.numel() for ids in batches)

    @torch.enable_grad()
    def add_gradients(self, student: Student, ids: Tensor) -> None:
        student.round()
        for divergence in self._divergences(student, ids):
            (divergence / ids.numel()).backward()
        student.pass_gradients()

    def _divergences(self, student: Student, ids: Tensor) -> Iterator[Tensor]:
        """Kullback–Leibler divergences from the raw model's predictions, each summed over a piece of ids, 0-d."""
        sequences = max(1, PIECE // ids.size(1)) if student.device.type == "cpu" else len(ids)
        for piece in ids.to(student.device).split(sequences):
            with torch.no_grad():
                expected = self.model(piece).log_softmax(-1)
            predicted = student.model(piece).log_softmax(-1)
            yield (expected.exp() * (expected - predicted)).sum()
