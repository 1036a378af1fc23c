"""Documents for a corpus that is built in a second, and texts that are hard to tokenize."""

import numpy as np

from pgolf.data.embedded_corpus import Document

HARD_TEXTS = [
    "",
    " ",
    "   leading, and  multiple   spaces ",
    "tabs\tand\n\nlines\r\n",
    "🐈👩‍👩‍👧 𝕏 日本語の文章 中文 한국어 עברית",
    "\u2581 U+2581 \u2581\u2581 and \u2585 and <0x0A> <s> </s> <unk>",
    "ﬁ ① Å \u00a0\u3000 e\u0301 ½ ２",
    "\x00 \x01\x7f\u200b\ufeff\ufffd",
    "x" * 3000,
]
MORE_HARD_TEXTS = [*HARD_TEXTS, "🇪🇺 Ελληνικά 한국어, naïve café 7 日 7 é \U0010ffff", "日" * 300]


def small_documents(large: bool = False) -> list[Document]:
    words = ["loss", "step", "weight", "byte", "scale", "token", "model", "prune", "round", "trip", "shard"]
    random = np.random.default_rng(0)
    return [Document(f"d{i}", " ".join(random.choice(words, 40))) for i in range(300 if large else 260)]
