"""Token n-gram tilt: raise the probability of the token that followed the same context before, then normalise.

    p'(x) = p(x) · exp(boost · 1[x = hint]) / Z,   Z = 1 + p(hint) · (exp(boost) − 1)

p' is the softmax of the logits with boost added to the hint's, so it sums to one. The hint of a target is the most
frequent continuation of its context in the text before it; the longest confident context proposes it. A target enters
the table after its own hint is made, whatever window, batch or rank scores it. Every rank makes all hints, so the
number of ranks changes no bit; the time counts as scoring time. Source: pull request #1514 of the public records. Its
tilts within and at the start of words are left out: they read the class of the target, which a legal score may not.
"""

import numpy as np
import torch
from torch import Tensor

from pgolf_core.knobs import EvalConfig

LONGEST = 16  # tokens of context
MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # of the polynomial hash of a context, modulo 2^64
# (shortest context, least share of continuations, least count) for a hint to be confident, as in #1514.
CONFIDENT = ((14, 0.5, 2), (11, 0.6, 2), (0, 0.7, 3))


def hints_of(tokens: Tensor, config: EvalConfig) -> Tensor:
    """The hint of each target of tokens (n,): (n - 1,) int64 on their device, -1 = none. Target i is token i + 1."""
    text = tokens.cpu().numpy().astype(np.uint64)
    hints = np.full(len(text) - 1, -1)
    for order in range(LONGEST, config.eval_tilt_order - 1, -2):
        if len(text) <= order:
            continue
        context = np.zeros(len(text) - order, dtype=np.uint64)  # of target order - 1 and later ones
        for i in range(order):
            context = context * MULTIPLIER + text[i : i + len(context)] + np.uint64(1)
        share, count = next((share, count) for least, share, count in CONFIDENT if order >= least)
        proposed, open_ = proposals(context, text[order:].astype(np.int64), share, count), hints[order - 1 :]
        hints[order - 1 :] = np.where(open_ < 0, proposed, open_)
    return torch.from_numpy(hints).to(tokens.device)


def proposals(context: np.ndarray, target: np.ndarray, share: float, count: int) -> np.ndarray:
    """The most frequent target of each context (n,) at earlier places: (n,) int64, -1 if it is not confident."""
    hints = np.full(len(context), -1)
    by_time = np.argsort(context, kind="stable")  # equal contexts together, in the order of the text
    again = context[by_time[1:]] == context[by_time[:-1]]
    by_time = by_time[np.append(again, False) | np.append(False, again)]  # a context that occurs once has no hint
    n = len(by_time)
    if n == 0:
        return hints
    follows, (begin, before) = target[by_time], _groups(context[by_time])
    # Times that each target was seen after its context, itself included.
    pairs = np.lexsort((follows, begin))
    seen = np.empty(n, dtype=np.int64)
    seen[pairs] = _groups(begin[pairs] * (int(target.max()) + 1) + follows[pairs])[1] + 1
    # Running maxima within each context: counts of a later one are above all of an earlier one.
    highest = np.maximum.accumulate(begin * (n + 1) + seen)
    rises = np.diff(highest, prepend=-1) > 0
    leader = np.maximum.accumulate(np.where(rises, np.arange(n), 0))
    times = earlier(highest) - begin * (n + 1)
    confident = (before > 0) & (times >= count) & (times >= share * before)
    hints[by_time] = np.where(confident, follows[earlier(leader)], -1)
    return hints


def earlier(values: np.ndarray) -> np.ndarray:
    """Values moved on by one place: a target sees the table as it was before the target was added."""
    return np.roll(values, 1)


def _groups(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where the group of each value begins, and how many of the group stand before it; equal values stand together."""
    places = np.arange(len(values))
    begin = np.maximum.accumulate(np.where(np.append(True, values[1:] != values[:-1]), places, 0))
    return begin, places - begin


def tilted(logits: Tensor, hints: Tensor, boost: float) -> Tensor:
    """Logits (..., V) with boost added to those of hints (...); a hint of -1 adds nothing."""
    weight = boost * (hints >= 0).to(logits.dtype)
    return logits.scatter_add(-1, hints.clamp_min(0)[..., None], weight[..., None])
