"""How a score falls with parameters and tokens, and how a run will end: laws of a family of runs of one recipe.

Law: bpb = E + A · N^−α + B · D^−β of N parameters and D tokens (Hoffmann et al. 2022), fitted to log bpb with Huber's
loss. Forecast of an unfinished run: runs of these tracks end with falling rates, so no curve in steps alone tells the
end. Finished runs of the family at the same share of their schedule do: log(end / score at that share) is regressed on
log N, log D, its square and the log of the score, and the interval is that of a new observation.
"""

import itertools
import math
from dataclasses import dataclass
from functools import partial

import numpy as np
import pandas as pd
from scipy import optimize, special  # scipy.stats takes seconds to import

from pgolf.analysis.statistics import ALPHA
from pgolf.runs.result import RunError
from pgolf.runs.table import load_metrics

SHARE = 0.3  # of the steps, at which forecasts are tested
DRAWS, SEED = 100, 0  # bootstrap samples
HUBER = 0.003  # log bpb, beyond which a residual counts linearly
STARTS = list(itertools.product((0.3, 0.7), (0.2, 0.6), (0.2, 0.6)))  # E as a share of the lowest score, α, β
UPPER = [np.inf, np.inf, np.inf, 2.0, 2.0]
MIN_RUNS = 6


@dataclass(frozen=True)
class Law:
    """A fitted law. draws: its five numbers of each bootstrap sample (DRAWS, 5). noise: rms of log residuals."""

    numbers: np.ndarray  # E, A, B, α, β with N and D in units of their geometric means
    draws: np.ndarray
    noise: float
    units: tuple[float, float]

    def at(self, parameters, tokens) -> np.ndarray:
        """bpb of a run of this many parameters and tokens."""
        return _law(self.numbers, parameters / self.units[0], tokens / self.units[1])

    def interval(self, parameters: float, tokens: float) -> tuple[float, float]:
        """Where 95 % of runs of this size and length end: bootstrap of the fit, and the noise of one run."""
        ends = np.array([_law(own, parameters / self.units[0], tokens / self.units[1]) for own in self.draws])
        noise = np.random.default_rng(SEED).normal(0, self.noise, (50, len(ends)))
        low, high = np.quantile(ends * np.exp(noise), [ALPHA / 2, 1 - ALPHA / 2])
        return float(low), float(high)

    def ranges(self) -> dict[str, tuple[float, float, float]]:
        """E, α and β: value, low and high of the bootstrap's 95 %."""
        low, high = np.quantile(self.draws, [ALPHA / 2, 1 - ALPHA / 2], axis=0)
        return {name: (self.numbers[i], low[i], high[i]) for name, i in (("E", 0), ("α", 3), ("β", 4))}


def family(runs: pd.DataFrame) -> pd.DataFrame:
    """The trained runs of a scaling study, finished or not, one row each.

    runs: the study's rows of load_runs; a config is called <size>-<length>. Columns: run, config (equal but for the
    seed), size, status, parameters, tokens (of the whole schedule), bpb, total_bytes, and curve: validation bpb by
    share of the steps, after the first.
    """
    rows, curves = runs[runs.kind.isna() | (runs.kind == "train")], []
    for path, steps in zip(rows.path, rows.iterations, strict=True):
        own = load_metrics(path).reindex(columns=["step", "val_bpb"]).apply(pd.to_numeric, errors="coerce").dropna()
        own = own[(own.step > 0) & (own.val_bpb > 0)].drop_duplicates("step", keep="last").sort_values("step")
        curves.append(pd.Series(own.val_bpb.to_numpy(float), own.step.to_numpy(float) / steps))
    table = rows[["run", "status"]].assign(
        config=rows.arm, size=rows.arm.str.rpartition("-")[0], curve=pd.Series(curves, rows.index, dtype=object),
        tokens=rows.iterations.astype(float) * rows.train_batch_tokens.astype(float),
        **{name: rows[name].astype(float) for name in ("parameters", "bpb", "total_bytes")},
    )  # fmt: skip
    finite = table.bpb.where(np.isfinite(table.bpb))
    return table.assign(bpb=finite, parameters=table.groupby("size").parameters.transform("max"))


def fit_law(parameters, tokens, bpb, draws: int = DRAWS) -> Law:
    """The law of finished runs. draws: bootstrap samples: residuals, drawn with replacement, on the fitted scores.

    A residual is one seed's, so the draws vary the seeds and the misfit together. Raises RunError for fewer than
    MIN_RUNS runs, two sizes or two lengths.
    """
    parameters, tokens, bpb = (np.asarray(values, float) for values in (parameters, tokens, bpb))
    if len(bpb) < MIN_RUNS or min(len(set(parameters)), len(set(tokens))) < 2:
        raise RunError(
            f"{len(bpb)} finished runs: a law needs {MIN_RUNS} or more, of two sizes and two lengths or more"
        )
    units = tuple(float(np.exp(np.log(values).mean())) for values in (parameters, tokens))
    n, d = parameters / units[0], tokens / units[1]
    fits = [_fit(n, d, bpb, _start(bpb, *start)) for start in STARTS]
    numbers, _ = min(fits, key=lambda fit: fit[1])
    fitted = _law(numbers, n, d)
    residuals, random = np.log(bpb / fitted), np.random.default_rng(SEED)
    free = max(1, len(bpb) - 5)
    spread = math.sqrt(len(bpb) / free)  # of residuals, which the five numbers made smaller
    samples = [fitted * np.exp(spread * random.choice(residuals, len(bpb))) for _ in range(draws)]
    # Starts vary: along a flat valley, of a law that these runs do not pin down, each sample ends elsewhere.
    starts = random.integers(len(STARTS), size=draws)
    drawn = np.array([_fit(n, d, own, _start(own, *STARTS[i]))[0] for own, i in zip(samples, starts, strict=True)])
    return Law(numbers, drawn, float(np.sqrt((residuals**2).sum() / free)), units)


def _law(numbers, n, d):
    e, a, b, alpha, beta = numbers
    return e + a * n**-alpha + b * d**-beta


def _start(bpb: np.ndarray, share: float, alpha: float, beta: float) -> list[float]:
    rest = (bpb.mean() - share * bpb.min()) / 2
    return [share * bpb.min(), rest, rest, alpha, beta]


def _fit(n, d, bpb, start) -> tuple[np.ndarray, float]:
    """E, A, B, α, β and the cost of the best fit from a start."""
    found = optimize.least_squares(
        lambda numbers: np.log(_law(numbers, n, d) / bpb), np.clip(start, 1e-6, UPPER), bounds=(1e-9, UPPER),
        loss="huber", f_scale=HUBER, x_scale=np.maximum(np.abs(start), 1e-2), max_nfev=400,
    )  # fmt: skip
    return found.x, found.cost


def byte_line(runs: pd.DataFrame) -> pd.DataFrame:
    """Bytes of the file as a line in parameters: parameters, total_bytes, low, high of 95 % of new runs.

    The rows reach twice the largest size.
    """
    own = runs.dropna(subset=["parameters", "total_bytes"])
    at = np.linspace(own.parameters.min(), 2 * own.parameters.max(), 30)
    features = partial(np.vander, N=2)
    found = [_regress(features(own.parameters), own.total_bytes, features(one)) for one in at[:, None]]
    return pd.DataFrame(found, columns=["total_bytes", "low", "high"]).assign(parameters=at)


def score_at(curve: pd.Series, share: float) -> float:
    """Validation bpb up to a share of the steps: its geometric mean over the last third; nan beyond the curve.

    The scores of one run jump by more than runs of a family differ, so one score is a worse guide.
    """
    if not len(curve) or curve.index[0] > share * 2 / 3 + 1e-9 or curve.index[-1] < share - 1e-9:
        return math.nan
    at = np.linspace(share * 2 / 3, share, 9)
    return float(np.exp(np.interp(at, curve.index, np.log(curve)).mean()))


def forecast(finished: pd.DataFrame, run: pd.Series, share: float) -> tuple[float, float, float]:
    """The score that a run will end with, by its curve up to a share of its steps: predicted, low and high of 95 %.

    finished, run: rows of `family`. nan if a curve does not reach back to that share, or for too few finished runs.
    """
    rows = pd.concat([finished[finished.bpb.notna()], run.to_frame().T], ignore_index=True)
    at = np.array([score_at(curve, share) for curve in rows.curve])
    known = ~np.isnan(at)
    if known.sum() <= MIN_RUNS or not known[-1]:
        return math.nan, math.nan, math.nan
    n, d, ends = (np.log(rows[name].astype(float).to_numpy()[known]) for name in ("parameters", "tokens", "bpb"))
    level = np.log(at[known])
    features = np.column_stack([np.ones(len(d)), n, d, d**2, level])[:, _told(n[:-1], d[:-1])]
    predicted = _regress(features[:-1], (ends - level)[:-1], features[-1:])
    return tuple(math.exp(level[-1] + value) for value in predicted)


def _told(n: np.ndarray, d: np.ndarray) -> list[bool]:
    """Which of constant, log N, log D, log² D and level a family of these sizes and lengths can tell."""
    sizes, lengths = len(set(n)), len(set(d))
    return [True, sizes > 1, lengths > 1, lengths > 2, True]


def _regress(x: np.ndarray, y: np.ndarray, new: np.ndarray) -> tuple[float, float, float]:
    """Least squares: the value at one new row, and the ends of the interval of 95 % for a new observation."""
    weights, _, rank, _ = np.linalg.lstsq(x, y, rcond=None)
    value, free = (new @ weights).item(), len(y) - rank
    if free < 1:
        return value, math.nan, math.nan
    error = math.sqrt(((y - x @ weights) ** 2).sum() / free * (1 + (new @ np.linalg.pinv(x.T @ x) @ new.T).item()))
    half = float(special.stdtrit(free, 1 - ALPHA / 2)) * error
    return value, value - half, value + half


def held_out(runs: pd.DataFrame, share: float = SHARE) -> pd.DataFrame:
    """Every finished run forecast from the runs of all other configs, so that no run of its size and length is known.

    Columns: run, parameters, tokens, bpb, predicted, low, high, error (relative), covered.
    """
    rows = runs[(runs.status == "complete") & runs.bpb.notna()]
    return _judged(rows, [forecast(rows[rows.config != run.config], run, share) for _, run in rows.iterrows()])


def unfinished(runs: pd.DataFrame, least: float = 0.1) -> pd.DataFrame:
    """Forecasts of runs that go on or broke off after `least` of their steps: run, share, predicted, low, high."""
    done = runs[runs.status == "complete"]
    rows = runs[(runs.status != "complete") & runs.curve.map(lambda curve: len(curve) and curve.index[-1] >= least)]
    shares = rows.curve.map(lambda curve: curve.index[-1]).astype(float)
    found = [forecast(done, run, share) for (_, run), share in zip(rows.iterrows(), shares, strict=True)]
    return _judged(rows, found).assign(share=shares)


def extrapolated(runs: pd.DataFrame) -> pd.DataFrame:
    """The largest runs by the law of the smaller ones, and the longest by that of the shorter: as held_out, beyond."""
    done, found = runs[(runs.status == "complete") & runs.bpb.notna()], []
    for beyond, column in (("size", "parameters"), ("length", "tokens")):
        last = done[column] == done[column].max()
        rows, known = done[last], done[~last]
        try:
            law = fit_law(known.parameters, known.tokens, known.bpb)
        except RunError:  # too few are left
            continue
        ends = [(law.at(n, d), *law.interval(n, d)) for n, d in zip(rows.parameters, rows.tokens, strict=True)]
        found.append(_judged(rows, ends).assign(beyond=beyond))
    return pd.concat(found) if found else _judged(done[:0], []).assign(beyond="")


def _judged(rows: pd.DataFrame, found: list[tuple[float, float, float]]) -> pd.DataFrame:
    """Forecasts (predicted, low, high) beside the scores that came true; those that are not known are left out."""
    names = ("predicted", "low", "high")
    columns = dict(zip(names, np.array(found, float).reshape(-1, 3).T, strict=True))
    table = rows[["run", "parameters", "tokens", "bpb"]].assign(**columns)
    covered = (table.low <= table.bpb) & (table.bpb <= table.high)
    return table.assign(error=table.predicted / table.bpb - 1, covered=covered).dropna(subset="predicted")
