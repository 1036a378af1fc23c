"""BigramHash: an embedding of a token and the one before it, in a table whose rows pairs share by a hash."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pgolf_core.knobs import BOS, ModelConfig
from pgolf_core.parameters import CONTROL, EMBEDDING, PROJECTION, declare


class BigramHash(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.table = declare(nn.Embedding(config.bigram_vocab_size, config.bigram_dim), EMBEDDING)
        self.proj = declare(nn.Linear(config.bigram_dim, config.model_dim, bias=False), PROJECTION)
        self.scale = nn.Parameter(torch.tensor(0.05))
        declare(self, CONTROL)
        nn.init.zeros_(self.table.weight)
        nn.init.orthogonal_(self.proj.weight)
        self.document_mask = config.document_mask

    def rows(self, ids: Tensor) -> Tensor:
        """Rows (B, T) of tokens (B, T); a token without one before it has the last row."""
        last = self.table.num_embeddings - 1
        pairs = torch.bitwise_xor(36313 * ids[:, 1:], 27191 * ids[:, :-1]) % last
        rows = F.pad(pairs, (1, 0), value=last)
        return rows.masked_fill(ids == BOS, last) if self.document_mask else rows

    def forward(self, ids: Tensor) -> Tensor:
        """(B, T) -> (B, T, D)."""
        x = self.proj(self.table(self.rows(ids)))
        return self.scale.to(x.dtype) * x
