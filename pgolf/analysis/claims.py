"""The claims of a record's submission.json, held against its logs."""

import json
import re
import statistics
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path

from pgolf.analysis.training_logs import CODE, Log
from pgolf.disk import open_regular

SUBMISSION = "submission.json"
MAX_CLAIMS = 2**20  # bytes
SCORES = ("val_loss", "val_bpb")
PER_SEED = ("seed_results", "seeds", "val_bpb_seeds", "per_seed")
SEED = re.compile(r"(?:seed[ _-]?)?(\d{1,18})", re.IGNORECASE)
ROUNDED = Decimal("0.00005")  # half of the fourth decimal
MANY_SEEDS = re.compile(r"\b\d{1,3}[- ]seed")
PARAMETERS = ("model_params", "params", "parameters", "num_params", "total_params")


def read_claims(record: Path) -> bytes | None:
    """The bytes of submission.json; None if there is none, and no bytes if it cannot be read or is no such file."""
    try:
        with open_regular(record / SUBMISSION, MAX_CLAIMS) as file:
            return file.read()
    except FileNotFoundError:
        return None
    except OSError:
        return b""


def parsed(claims: bytes | None) -> dict | None:
    """The mapping, with floats as Decimal so that their digits are known; None if it is no mapping."""
    try:
        content = json.loads("{}" if claims is None else claims.decode("utf-8-sig"), parse_float=_decimal)
    except (ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None


def _decimal(text: str) -> Decimal | str:
    """A figure with its digits; absurd ones remain text."""
    return Decimal(text) if len(text) < 40 and 1e-15 < abs(float(text)) < 1e15 else text


def claims_by_seed(submission: dict) -> tuple[list[str], dict[str, dict]]:
    """The seeds that it lists, and its claims about each."""
    results = submission.get("results")
    submission = (results if isinstance(results, dict) else {}) | submission
    seeds, claims = {}, {}
    for entries in (submission.get(name) for name in PER_SEED):
        if isinstance(entries, list):
            named = [(entry.get("seed") if isinstance(entry, dict) else entry, entry) for entry in entries]
            entries = {str(seed): entry for seed, entry in named if isinstance(seed, str | int)}
        for name, own in entries.items() if isinstance(entries, dict) else ():
            if seed := SEED.fullmatch(name.strip()):
                seeds[seed[1]] = True
                own = own if isinstance(own, dict) else {"val_bpb": own} if isinstance(own, Decimal) else {}
                claims[seed[1]] = own | claims.get(seed[1], {})
    return list(seeds), claims


def compare(log: Log, submission: dict, others: list[Log]) -> tuple[list[str], list[str]]:
    """Flags, and disagreements of submission.json with this log, to the digits that both give.

    others: all logs of the record. A claim about a seed agrees if it does with one of the seed's logs. The top-level
    figures count only if the record has one log; with several they are means, or another seed's.
    """
    seed = str(log.seed)
    seeds, by_seed = claims_by_seed(submission)
    words = " ".join(value for value in submission.values() if isinstance(value, str))
    means = any("_std" in name or "std_" in name for name in submission) or MANY_SEEDS.search(words)
    claims = {f"seed_results {seed} {name}": v for name, v in by_seed.get(seed, {}).items()}
    if len(others) < 2 and not means and (not seeds or seeds == [seed]):
        claims |= submission
    flags, found = [], []
    for name, claim in claims.items():
        if not is_figure(claim):
            continue
        answers = [_judge(other, name, claim) for other in [log, *(o for o in others if str(o.seed) == seed)]]
        if ("", "") not in answers:
            flags += [flag for flag, _ in answers[:1] if flag]
            found += [problem for _, problem in answers[:1] if all(problem for _, problem in answers)]
    codes = [size.bytes for other in others for size in other.sizes if size.what == CODE]
    codes += [other.artifact.get("code") for other in others]
    if any(codes) and is_figure(code := submission.get("bytes_code")) and code not in codes:
        found.append(f"bytes_code {code} in {SUBMISSION}, {codes[0]} in the log")
    found += _parameters(submission, others)
    if seeds and log.seed is not None and seed not in seeds:
        found.append(f"seed {seed} is not among those of {SUBMISSION}: {', '.join(seeds[:20])}")
    return flags, found


def is_figure(claim: object) -> bool:
    return isinstance(claim, int | Decimal) and not isinstance(claim, bool) and abs(claim) < 10**15


def _judge(log: Log, name: str, claim: int | Decimal) -> tuple[str, str]:
    """A flag and a disagreement about one claim; '' if there is none."""
    kind, said = name.split()[-1], f"{name} {claim} in {SUBMISSION}"
    score, before, file = log.final, log.before_quantization, log.artifact
    if kind in SCORES:
        prequant = getattr(before, kind) if before else log.validation.get(kind)
        is_prequant = prequant is not None and _agree(claim, prequant, before.digits if before else 4)
        if not score:
            problem = f"{said}, no score after quantisation in the log"
            return (f"{said} is the score before quantisation", "") if is_prequant else ("", problem)
        others = [s for s in log.after_quantization if getattr(s, kind) is not None]
        agreed = [s.label for s in others if s.name != score.name and _agree(claim, getattr(s, kind), s.digits)]
        if getattr(score, kind) is None or _agree(claim, getattr(score, kind), score.digits):
            return "", ""
        if agreed:
            return f"{said} is that of {agreed[-1]}, and {score.label} is the last", ""
        return "", f"{said}, {getattr(score, kind)} in the log" + ": it is the score before quantisation" * is_prequant
    total, steps = file.get("total"), log.steps
    logged = {"artifact_bytes": total, "bytes_total": total, "steps": steps, "step_stop": steps}.get(kind)
    if logged is None or _agree(claim, logged, 0) or _is_rounded(claim, logged):
        return "", ""
    return "", f"{said}, {logged} in the log" + ": it is the file without its code" * (claim == file.get("weights"))


def _parameters(submission: dict, logs: list[Log]) -> list[str]:
    logged = [count for log in logs if isinstance(count := log.parameters, int)]
    for name in PARAMETERS:
        claim = submission.get(name)
        known = logged and is_figure(claim) and claim > 10_000  # millions may be counted in millions
        if known and not any(claim == count or _is_rounded(claim, count) for count in logged):
            return [f"{name} {claim} in {SUBMISSION}, {logged[0]} in the log"]
    return []


def _agree(claim: int | Decimal, logged: float, digits: int) -> bool:
    """True if both are equal when rounded to the digits that both have."""
    given = max(0, -claim.as_tuple().exponent) if isinstance(claim, Decimal) else 0
    return abs(claim - Decimal(str(logged))) <= Decimal(5).scaleb(-min(given, digits) - 1)


def _is_rounded(claim: int | Decimal, logged: int) -> bool:
    """True for a claim of at least thousands that is the logged figure rounded: 27,000,000 of 26,993,756."""
    zeros = len(str(claim)) - len(str(claim).rstrip("0")) if isinstance(claim, int) else 0
    return zeros > 2 and abs(claim - logged) * 2 < 10**zeros


def of_record(record: Path, logs: list[Log]) -> list[str]:
    """Remarks on seeds that submission.json lists without a log, and on its means and deviations over seeds."""
    submission = parsed(read_claims(record)) or {}
    seeds, claims = claims_by_seed(submission)
    missing = [seed for seed in seeds if seed not in {str(log.seed) for log in logs}]
    if missing:
        return [f"{record.name}: no log of seed {', '.join(missing[:20])}, which {SUBMISSION} lists"]
    chosen = [log_of_seed(seed, claims[seed], logs) for seed in seeds]
    if len(seeds) < 2 or None in chosen:
        return []
    return [f"{record.name}: {problem}" for kind in SCORES for problem in over_seeds(kind, submission, chosen)]


def over_seeds(kind: str, submission: dict, logs: list[Log]) -> Iterator[str]:
    """Stated means and deviations of a score that no label's scores give; logs: one of each seed.

    A figure under the score's own name may be the mean or that of one seed.
    """
    results = submission.get("results")
    submission = (results if isinstance(results, dict) else {}) | submission
    runs = [{"": log.final} | {score.name: score for score in log.after_quantization} for log in logs]
    scores = [{name: getattr(score, kind) for name, score in run.items()} for run in runs]
    series = [[run.get(name) for run in scores] for name in scores[0]]
    series = [values for values in series if None not in values]
    means = [statistics.fmean(values) for values in series]
    spreads = [spread(values) for values in series for spread in (statistics.stdev, statistics.pstdev)]
    single = [value for run in scores for value in run.values() if value is not None]
    stated = {kind: means + single} | dict.fromkeys((f"mean_{kind}", f"{kind}_mean"), means)
    stated |= dict.fromkeys((f"std_{kind}", f"{kind}_std"), spreads)
    for name, known in stated.items():
        claim = submission.get(name)
        if known and isinstance(claim, Decimal):
            what, slack = ("standard deviation", claim / 20) if "std" in name else ("mean", ROUNDED)
            if not any(near(claim, figure, slack) for figure in known):
                yield f"{name} {claim} in {SUBMISSION}, {known[0]:.8f} is the {what} of its {len(logs)} seeds' logs"


def log_of_seed(seed: str, claims: dict, logs: list[Log]) -> Log | None:
    """The scored log of a seed, of several the one that its claims agree with; None if that is none or not one."""
    own = [log for log in logs if str(log.seed) == seed and log.final]
    if len(own) > 1:
        scores = {kind: claims[kind] for kind in SCORES if is_figure(claims.get(kind))}
        own = [log for log in own if scores and not any(_judge(log, *claim)[1] for claim in scores.items())]
    return own[0] if len(own) == 1 else None


def near(claim: Decimal, figure: float, slack: Decimal) -> bool:
    """True if they differ by a unit of the claim's last digit or by the slack: scores may be rounded before a mean."""
    return abs(claim - Decimal(str(figure))) <= max(Decimal(1).scaleb(claim.as_tuple().exponent), slack)
