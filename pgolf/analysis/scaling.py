"""How a score falls with parameters and tokens, and how a run will end: laws of a family of runs of one recipe.

Law: bpb = E + A · N^−α + B · D^−β of N parameters and D tokens (Hoffmann et al. 2022), fitted to log bpb with the
Huber loss. Forecast of an unfinished run: learning rates fall at the end, so a run's curve alone does not determine its
final score. It is compared with finished runs of the family at the same share of their steps: log(final score / score
at that share) is regressed on log N, log D, (log D)² and the log of the score at that share; the interval is the 95 %
prediction interval.
"""

import itertools
import math
from dataclasses import dataclass
from functools import partial

import numpy as np
import pandas as pd
from scipy import optimize

from pgolf.analysis.statistics import ALPHA, t_limit
from pgolf.runs.result import RunError
from pgolf.runs.table import load_metrics

SHARE = 0.3  # forecasts are tested at this share of the steps
DRAWS, SEED = 100, 0  # bootstrap samples
HUBER = 0.003  # log bpb, beyond which a residual counts linearly
STARTS = list(itertools.product((0.3, 0.7), (0.2, 0.6), (0.2, 0.6)))  # E as a share of the lowest score, α, β
UPPER = [np.inf, np.inf, np.inf, 2.0, 2.0]  # bounds: E, A, B, α, β
MIN_RUNS = 6


@dataclass(frozen=True)
class Law:
    """A fitted law. numbers: (5,), E, A, B, α, β. draws: (DRAWS, 5), those of each bootstrap sample.

    noise: standard deviation of log residuals. units: geometric means of parameters and tokens; N and D are in them.
    """

    numbers: np.ndarray
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


def finished(runs: pd.DataFrame) -> pd.DataFrame:
    """The rows of `family` with a final score."""
    return runs[(runs.status == "complete") & runs.bpb.notna()]


def fit_law(parameters, tokens, bpb, draws: int = DRAWS) -> Law:
    """The law of finished runs. draws: bootstrap samples, the fitted scores with residuals drawn with replacement.

    A residual is of one seed, so it holds seed noise and misfit. Raises RunError for fewer than MIN_RUNS runs, two
    sizes or two lengths.
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
    spread = math.sqrt(len(bpb) / free)  # the fit of five numbers made the residuals smaller
    samples = [fitted * np.exp(spread * random.choice(residuals, len(bpb))) for _ in range(draws)]
    # Starts vary: if the runs do not determine the law, the minimum is a flat valley, and fits end all over it.
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
    """Geometric mean of validation bpb over the last third of a share of the steps; nan beyond the curve.

    Single validations of one run vary by more than runs of a family differ.
    """
    if not len(curve) or curve.index[0] > share * 2 / 3 + 1e-9 or curve.index[-1] < share - 1e-9:
        return math.nan
    at = np.linspace(share * 2 / 3, share, 9)
    return float(np.exp(np.interp(at, curve.index, np.log(curve)).mean()))


def forecast(done: pd.DataFrame, run: pd.Series, share: float) -> tuple[float, float, float]:
    """The final score of a run by its curve up to a share of its steps: predicted, low and high of 95 %.

    done: rows of `finished`; run: a row of `family`. nan if the run's curve does not reach that share, or if fewer than
    MIN_RUNS finished ones do.
    """
    rows = pd.concat([done, run.to_frame().T], ignore_index=True)
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
    """Which coefficients of constant, log N, log D, log² D and level these sizes and lengths determine."""
    sizes, lengths = len(set(n)), len(set(d))
    return [True, sizes > 1, lengths > 1, lengths > 2, True]


def _regress(x: np.ndarray, y: np.ndarray, new: np.ndarray) -> tuple[float, float, float]:
    """Least squares of y (rows,) on x (rows, features): value and 95 % prediction interval at `new` (1, features)."""
    weights, _, rank, _ = np.linalg.lstsq(x, y, rcond=None)
    value, free = (new @ weights).item(), len(y) - rank
    if free < 1:
        return value, math.nan, math.nan
    error = math.sqrt(((y - x @ weights) ** 2).sum() / free * (1 + (new @ np.linalg.pinv(x.T @ x) @ new.T).item()))
    half = float(t_limit(free)) * error
    return value, value - half, value + half


def held_out(runs: pd.DataFrame, share: float = SHARE) -> pd.DataFrame:
    """Every finished run forecast from the runs of all other configs, so that no run of its size and length is known.

    Columns: run, parameters, tokens, bpb, predicted, low, high, error (relative), covered.
    """
    rows = finished(runs)
    return _judged(rows, [forecast(rows[rows.config != run.config], run, share) for _, run in rows.iterrows()])


def unfinished(runs: pd.DataFrame, least: float = 0.1) -> pd.DataFrame:
    """Forecasts of runs that go on or broke off after `least` of their steps: run, share, predicted, low, high."""
    done = finished(runs)
    rows = runs[(runs.status != "complete") & runs.curve.map(lambda curve: len(curve) and curve.index[-1] >= least)]
    shares = rows.curve.map(lambda curve: curve.index[-1]).astype(float)
    found = [forecast(done, run, share) for (_, run), share in zip(rows.iterrows(), shares, strict=True)]
    return _judged(rows, found).assign(share=shares)


def extrapolated(runs: pd.DataFrame) -> pd.DataFrame:
    """The largest runs by the law of the smaller ones, and the longest by that of the shorter: as held_out, beyond."""
    done, found = finished(runs), []
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
