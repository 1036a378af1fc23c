"""Learned rounding: levels and float tensors that follow the predictions of the raw weights on training text.

The solver rounds matrix by matrix. Here all levels move together, as in AdaRound (Nagel et al. 2020,
https://arxiv.org/abs/2004.10568), towards what the whole model should predict (distillation: Hinton et al. 2015,
https://arxiv.org/abs/1503.02531). Gradients pass the rounding straight through (Bengio et al. 2013,
https://arxiv.org/abs/1308.3432). Step sizes stay as allocation chose them.
"""

import copy
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from pgolf_core.knobs import ExportConfig
from pgolf_core.quantization.calibration import PIECE
from pgolf_core.quantization.primitives import QuantizedTensor
from pgolf_core.quantization.stored import Quantized

START = 0.45  # steps between a latent weight and its level, at most, before the first update
FLOAT_RATE = 1e-3  # Adam's rate of the tensors that stay float
WARMDOWN = 0.7  # share of the updates over which rates fall to 0
CHECKED = 4  # batches on which the learned levels are compared with those they began as
HALVINGS = 8  # of the interval in which the dead zone is sought


class Student:
    """A copy of the raw model whose matrices are rounded; `latents` are the weights before that, in steps."""

    def __init__(self, model: nn.Module, quantized: Quantized):
        self.model, self.quantized, self.dead_zone = copy.deepcopy(model).eval(), quantized, 0.0
        self.device = next(model.parameters()).device
        self.parameters = dict(self.model.named_parameters())
        self.steps, self.added, self.latents = {}, {}, {}
        for name, tensor in quantized.tensors.items():
            assert isinstance(tensor, QuantizedTensor), f"{name} has no levels to learn"
            residual = quantized.residuals.get(name)
            self.added[name] = residual.dequantize().to(self.device) if residual else 0.0
            self.steps[name] = tensor.step_size().expand(tensor.shape).to(self.device)
            levels = tensor.q.float().to(self.device)
            exact = (self.parameters[name].detach() - self.added[name]) / self.steps[name]
            self.latents[name] = levels + (exact - levels).clamp(-START, START)
        self.floats = {name: p for name, p in self.parameters.items() if name in quantized.floats}
        with torch.no_grad():
            for name, p in self.floats.items():
                p.copy_(quantized.floats[name])

    def levels(self, name: str) -> Tensor:
        """Whole float32 numbers; a latent that lies in the dead zone beyond a half goes to the level nearer to 0."""
        latent = self.latents[name]
        return latent.sign() * torch.floor((latent.abs() + 0.5 - self.dead_zone).clamp_min(0))

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

    def fit(self, cap: int, file_bytes: Callable[[Quantized], int]) -> None:
        """Widen the dead zone as far as the file needs it to fit the cap, to 2^-HALVINGS of the way; at most to 1/2."""

        def fits(dead_zone: float) -> bool:
            self.dead_zone = dead_zone
            return file_bytes(self.stored()) <= cap

        low, high = self.dead_zone, 0.5
        if fits(low):
            return
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            low, high = (low, middle) if fits(middle) else (middle, high)
        self.dead_zone = high


@dataclass
class Teacher:
    """The raw model, which is left as it is, and training text, (B, T) int64 ids each; seconds: spent learning."""

    model: nn.Module
    text: Sequence[Tensor]
    seconds: float = 0.0

    def learn(self, quantized: Quantized, config: ExportConfig, file_bytes: Callable[[Quantized], int]) -> Quantized:
        """A stored model of the same steps, which predicts more as the raw one does; for each batch one update.

        Its file and code, `file_bytes`, take at most config.cap_bytes: once half-way and once at the end a dead zone
        around zero is widened until they do. Warns and returns `quantized` if nothing better was found.
        """
        began = time.perf_counter()
        student = Student(self.model, quantized)
        rates = [(student.latents.values(), config.learn_rate), (student.floats.values(), FLOAT_RATE)]
        optimizer = torch.optim.Adam([dict(params=list(p), lr=rate) for p, rate in rates if p], betas=(0.9, 0.95))
        base = [group["lr"] for group in optimizer.param_groups]
        before = self.divergence(student)
        for step, ids in enumerate(self.text):
            if step == len(self.text) // 2:
                student.fit(config.cap_bytes, file_bytes)
            factor = min(1.0, (1 - step / len(self.text)) / WARMDOWN)
            for group, rate in zip(optimizer.param_groups, base, strict=True):
                group["lr"] = rate * factor
            self.add_gradients(student, ids)
            optimizer.step()
            optimizer.zero_grad()
        student.fit(config.cap_bytes, file_bytes)
        learned, after = student.stored(), self.divergence(student)
        self.seconds += time.perf_counter() - began
        if after < before and file_bytes(learned) <= config.cap_bytes:
            return learned
        warnings.warn(
            f"learn_rate={config.learn_rate:g}: {len(self.text)} steps found no better levels of at most cap_bytes="
            f"{config.cap_bytes} than the solver's, which are kept; lower it or raise learn_steps",
            stacklevel=2,
        )
        return quantized

    @torch.no_grad()
    def divergence(self, student: Student) -> float:
        """Nats per token by which the student's predictions are off, on the first CHECKED batches."""
        student.round()
        batches = self.text[:CHECKED]
        return sum(self._divergence(student, ids).item() for ids in batches) / sum(ids.numel() for ids in batches)

    def add_gradients(self, student: Student, ids: Tensor) -> None:
        student.round()
        few = max(1, PIECE // ids.size(1)) if student.device.type == "cpu" else len(ids)
        for part in ids.split(few):
            (self._divergence(student, part) / ids.numel()).backward()
        student.pass_gradients()

    def _divergence(self, student: Student, ids: Tensor) -> Tensor:
        """Kullback–Leibler divergence from the raw model's predictions, summed over tokens, 0-d."""
        ids = ids.to(student.device)
        with torch.no_grad():
            expected = self.model(ids).log_softmax(-1)
        predicted = student.model(ids).log_softmax(-1)
        return (expected.exp() * (expected - predicted)).sum()
