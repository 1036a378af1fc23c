"""Documents for a corpus that is built in a second."""

import numpy as np

from pgolf.data.embedded_corpus import Document


def small_documents(large: bool = False) -> list[Document]:
    words = ["loss", "step", "weight", "byte", "scale", "token", "model", "prune", "round", "trip", "shard"]
    random = np.random.default_rng(0)
    return [Document(f"d{i}", " ".join(random.choice(words, 40))) for i in range(300 if large else 260)]
