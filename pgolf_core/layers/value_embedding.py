"""Value embeddings: a table of the tokens' own values, added to those of attention in the last layers."""

import torch
from torch import Tensor, nn

from pgolf_core.knobs import ModelConfig
from pgolf_core.parameters import CONTROL, EMBEDDING, PROJECTION, declare


class ValueEmbedding(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.table = declare(nn.Embedding(config.vocab_size, config.ve_dim), EMBEDDING)
        kv_dim = config.num_kv_heads * config.head_dim
        self.proj = declare(nn.Linear(config.ve_dim, kv_dim, bias=False), PROJECTION)
        self.scale = nn.Parameter(torch.tensor(0.1))
        self.layer_scales = nn.Parameter(torch.ones(config.ve_last))
        declare(self, CONTROL)
        nn.init.normal_(self.table.weight, std=0.01)
        nn.init.orthogonal_(self.proj.weight)

    def forward(self, ids: Tensor) -> list[Tensor]:
        """Values (B, T, K·C) of tokens (B, T), for each of the last layers."""
        v = self.proj(self.table(ids))
        return [scale.to(v.dtype) * v for scale in self.scale * self.layer_scales]
