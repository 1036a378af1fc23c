"""What a record claims in submission.json and in the tables of its README, against the logs of its seeds."""

import re
from collections.abc import Iterator
from decimal import Decimal

from pgolf.analysis import claims
from pgolf.analysis.training_logs import Log, Score

README = "README.md"
FIGURE = re.compile(r"-?\d[\d,]*(?:\.\d+)?(?![\d%]|\s*[MKk]i?B)")
SCORE = re.compile(r"\bbp[bp]\b|val[_ ]?(?:loss|bpb)|\bnats\b", re.IGNORECASE)
OTHERS = re.compile(
    r"Δ|delta|gain|diff|\bvs\b|base|sota|std|improve|prior|previous|control|ref|#\d|\bpr\b", re.IGNORECASE
)
SIZE = re.compile(r"artifact|bytes|size", re.IGNORECASE)
OWN_SCORE = re.compile(r"(?:pre|post|quant|sliding|roundtrip|int\d|ttt|final)", re.IGNORECASE)
MOST_HEAD = 2000  # characters before the first table
HEADLINE = re.compile(r"val_bpb\W{0,6}(\d\.\d{3,8})")
OTHER_SIZES = re.compile(r"payload|raw|headroom|margin|left|code", re.IGNORECASE)


def problems(submission: dict, readme: str, logs: list[Log]) -> dict[str, list[str]]:
    """Claims that the logs do not have, about scores, bytes, and steps and parameters."""
    found = []
    for log in logs:
        flags, disagreements = claims.compare(log, submission, logs)
        found += [flag for flag in flags if "before quantisation" in flag]
        found += [problem for problem in disagreements if not problem.startswith("seed ")]
        found += [flag for flag in log.flags if flag.startswith("the total of")]
    seeds, by_seed = claims.claims_by_seed(submission)
    if len({log.seed for log in logs if log.final}) == len(logs) >= max(2, len(seeds)):
        found += [problem for kind in claims.SCORES for problem in claims.over_seeds(kind, submission, logs)]
    found += [*_means(submission, by_seed), *_total(submission, by_seed, logs, len(seeds))]
    found += [*_other_scores(submission, by_seed, logs), *_of_readme(readme, logs)]
    found += _against_readme(submission, by_seed, readme, logs)
    kinds: dict[str, list[str]] = {"scores": [], "bytes": [], "steps and parameters": []}
    for problem in dict.fromkeys(found):
        words = problem.partition(" in ")[0].replace("_", " ")
        kind = "scores" if SCORE.search(words) else "bytes" if SIZE.search(words) else "steps and parameters"
        kinds[kind].append(problem)
    return kinds


def _means(submission: dict, by_seed: dict[str, dict]) -> Iterator[str]:
    """Stated means and deviations that the scores claimed for the seeds do not have."""
    for kind in claims.SCORES:
        values = [own[kind] for own in by_seed.values() if claims.is_figure(own.get(kind))]
        if len(values) == len(by_seed) > 1:
            pairs = [dict.fromkeys(claims.SCORES, float(value)) for value in values]
            as_logged = [Log(scores=[Score("final", line=1, digits=8, **pair)]) for pair in pairs]
            yield from (text.replace("logs", "claims") for text in claims.over_seeds(kind, submission, as_logged))


def _other_scores(submission: dict, by_seed: dict[str, dict], logs: list[Log]) -> Iterator[str]:
    """Scores before quantization or adaptation, claimed for a seed, that its log does not have."""
    for log in logs:
        own = by_seed.get(str(log.seed), submission if len(logs) == 1 and len(by_seed) < 2 else {})
        for name, claim in own.items():
            words = name.replace("_", " ")
            score = OWN_SCORE.match(name) and SCORE.search(words) and not OTHERS.search(words)
            if score and isinstance(claim, Decimal) and not _has(log, claim):
                yield f"{name} {claim} of seed {log.seed} in {claims.SUBMISSION}, no such score in its log"


def _total(submission: dict, by_seed: dict[str, dict], logs: list[Log], seeds: int) -> Iterator[str]:
    """A total of several seeds that is neither one of theirs nor their mean."""
    claimed = [own["artifact_bytes"] for own in by_seed.values() if claims.is_figure(own.get("artifact_bytes"))]
    logged = [log.artifact["total"] for log in logs if "total" in log.artifact]
    known = [*claimed, *logged, *(sum(own) / len(own) for own in (claimed, logged) if own)]
    claim, whole = submission.get("bytes_total"), claimed or len(logs) >= max(2, seeds)
    if isinstance(claim, int) and known and whole and not any(abs(claim - figure) < 1 for figure in known):
        listed = ", ".join(f"{figure:,.0f}" for figure in known[:6])
        yield f"bytes_total {claim:,} in {claims.SUBMISSION}, and its seeds have {listed}"


def seed_rows(readme: str) -> Iterator[dict[str, str]]:
    """Rows of the tables whose first column is of seeds: cell by column, the seed ('' of means), the table's line."""
    columns: list[str] = []
    for number, line in enumerate(readme.splitlines()):
        if not line.lstrip().startswith("|"):
            columns = []
            continue
        cells = [cell.replace("*", "").strip("` ") for cell in line.strip().strip("|").split("|")]
        if not columns:
            columns, table = [cell.lower() for cell in cells], str(number)
        elif columns[0].rstrip("s").endswith("seed") and len(cells) == len(columns):
            named = claims.SEED.fullmatch(cells[0])
            if named or re.match(r"mean|average|avg", cells[0], re.IGNORECASE):
                row = dict(zip(columns[1:], cells[1:], strict=True))
                yield row | {"seed": named[1] if named else "", "table": table}


def _of_readme(readme: str, logs: list[Log]) -> Iterator[str]:
    """Cells of a seed's row that its log does not have, and means that the cells above them do not have."""
    by_seed, above = {str(log.seed): log for log in logs}, {}
    for row in seed_rows(readme):
        log, seed = by_seed.get(row["seed"]), row["seed"]
        for column, claim in _figures(row).items():
            said = f"{column} {claim:,} of seed {seed} in {README}"
            if _is_score(column, claim):
                own, unit = above.setdefault((row["table"], column), []), Decimal(1).scaleb(claim.as_tuple().exponent)
                if not seed and len(own) > 1 and abs(claim - sum(own) / len(own)) > max(unit, claims.ROUNDED):
                    yield f"mean {column} {claim} in {README}, {sum(own) / len(own):.5f} is that of the rows above it"
                own += [claim] * bool(seed)
                if log and log.final and not _has(log, claim):
                    yield f"{said}, no such score in its log"
            elif log and SIZE.search(column) and not OTHER_SIZES.search(column) and claim > 1_000_000:
                if int(claim) not in {size.bytes for size in log.sizes} | set(log.artifact.values()):
                    yield f"{said}, {log.artifact.get('total', 0):,} bytes in its log"
            elif log and column in ("step", "steps") and log.steps and claim != log.steps:
                yield f"{said}, {log.steps} in its log"


def _against_readme(submission: dict, by_seed: dict[str, dict], readme: str, logs: list[Log]) -> Iterator[str]:
    """Scores of seeds, and the first val_bpb of the README, on which both texts disagree."""
    rows: dict[str, list[Decimal]] = {}
    for row in seed_rows(readme):
        rows.setdefault(row["seed"], []).extend(c for name, c in _figures(row).items() if _is_score(name, c))
    for seed, own in by_seed.items():
        claim = own.get("val_bpb")
        if rows.get(seed) and claims.is_figure(claim) and not any(_close(cell, claim) for cell in rows[seed]):
            yield f"val_bpb {claim} of seed {seed} in {claims.SUBMISSION}, and not in its row of {README}"
    named = (submission.get(name) for name in ("val_bpb", "mean_val_bpb", "val_bpb_mean"))
    known = [float(claim) for claim in named if claims.is_figure(claim)]
    known += [log.final.val_bpb for log in logs if log.final] if known else []
    headline = HEADLINE.search(readme.partition("\n|")[0][:MOST_HEAD])
    if known and headline and not any(_close(Decimal(headline[1]), figure) for figure in known):
        yield f"val_bpb {headline[1]} at the top of {README}, {known[0]} in {claims.SUBMISSION}"


def _figures(row: dict[str, str]) -> dict[str, Decimal]:
    """The first number of every cell, but of columns that are about other runs or differences."""
    found = {c: FIGURE.search(cell) for c, cell in row.items() if c not in ("seed", "table") and not OTHERS.search(c)}
    return {column: Decimal(figure[0].replace(",", "")) for column, figure in found.items() if figure}


def _is_score(column: str, claim: Decimal) -> bool:
    return bool(SCORE.search(column)) and 0.2 < claim < 20 and claim.as_tuple().exponent < 0


def _close(claim: Decimal, figure: float | Decimal | int) -> bool:
    return claims.near(claim, float(figure), claims.ROUNDED)


def _has(log: Log, claim: Decimal) -> bool:
    """Whether any score in the log is this one, to the claim's digits."""
    found = [x for score in log.scores for x in (score.val_loss, score.val_bpb)]
    found += [row.get(kind) for row in log.rows for kind in claims.SCORES]
    unit = Decimal(1).scaleb(claim.as_tuple().exponent)
    return any(abs(claim - Decimal(str(x))) <= unit for x in found if x is not None)
