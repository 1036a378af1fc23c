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
OTHER_SIZES = re.compile(r"payload|raw|headroom|margin|left|code", re.IGNORECASE)


def problems(submission: dict, readme: str, logs: list[Log]) -> dict[str, list[str]]:
    """Claims that the logs do not have, about scores, bytes, and steps and parameters."""
    found = []
    for log in logs:
        flags, disagreements = claims.compare(log, submission, logs)
        found += [flag for flag in flags if "before quantisation" in flag]
        found += [problem for problem in disagreements if not problem.startswith("seed ")]
    seeds, by_seed = claims.claims_by_seed(submission)
    if len({log.seed for log in logs if log.final}) == len(logs) >= max(2, len(seeds)):
        found += [problem for kind in claims.SCORES for problem in claims.over_seeds(kind, submission, logs)]
    found += [*_means(submission, by_seed), *_total(submission, by_seed, logs, len(seeds)), *_of_readme(readme, logs)]
    kinds: dict[str, list[str]] = {"scores": [], "bytes": [], "steps and parameters": []}
    for problem in dict.fromkeys(found):
        words = problem.partition(" in ")[0].replace("_", " ")
        kinds["scores" if SCORE.search(words) else "bytes" if SIZE.search(words) else "steps and parameters"].append(
            problem
        )
    return kinds


def _means(submission: dict, by_seed: dict[str, dict]) -> Iterator[str]:
    """Stated means and deviations that the scores claimed for the seeds do not have."""
    scores = [
        {kind: own[kind] for kind in claims.SCORES if claims.is_figure(own.get(kind))} for own in by_seed.values()
    ]
    for kind in claims.SCORES:
        if len(scores) > 1 and all(kind in own for own in scores):
            finals = [
                Score("final", line=1, digits=8, **dict.fromkeys(claims.SCORES, float(own[kind]))) for own in scores
            ]
            as_logged = [Log(scores=[score]) for score in finals]
            yield from (text.replace("logs", "claims") for text in claims.over_seeds(kind, submission, as_logged))


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
    """Rows of the tables whose first column is of seeds: cell by column, and the seed, '' in a row of means."""
    columns: list[str] = []
    for line in readme.splitlines():
        if not line.lstrip().startswith("|"):
            columns = []
            continue
        cells = [cell.replace("*", "").strip("` ") for cell in line.strip().strip("|").split("|")]
        if not columns:
            columns = [cell.lower() for cell in cells]
        elif columns[0].rstrip("s").endswith("seed") and len(cells) == len(columns):
            named = claims.SEED.fullmatch(cells[0])
            if named or re.match(r"mean|average|avg", cells[0], re.IGNORECASE):
                yield dict(zip(columns, cells, strict=True)) | {"seed": named[1] if named else ""}


def _of_readme(readme: str, logs: list[Log]) -> Iterator[str]:
    """Cells of a seed's row that its log does not have, and means that the cells above them do not have."""
    by_seed, above = {str(log.seed): log for log in logs}, {}
    for row in seed_rows(readme):
        log, seed = by_seed.get(row["seed"]), row["seed"]
        for column, cell in row.items():
            figure = FIGURE.search(cell)
            if column == "seed" or figure is None or OTHERS.search(column):
                continue
            claim, said = Decimal(figure[0].replace(",", "")), f"{column} {figure[0]} of seed {seed} in {README}"
            if SCORE.search(column) and 0.2 < claim < 20 and "." in figure[0]:
                own, unit = above.setdefault(column, []), Decimal(1).scaleb(claim.as_tuple().exponent)
                if not seed and len(own) > 1 and abs(claim - sum(own) / len(own)) > max(unit, claims.ROUNDED):
                    yield f"mean {column} {claim} in {README}, {sum(own) / len(own):.5f} is that of the rows above it"
                own += [claim] * bool(seed)
                if log and log.final and not any(abs(claim - Decimal(str(x))) <= unit for x in _scores(log)):
                    yield f"{said}, no such score in its log"
            elif log and SIZE.search(column) and not OTHER_SIZES.search(column) and claim > 1_000_000:
                if int(claim) not in {size.bytes for size in log.sizes} | set(log.artifact.values()):
                    yield f"{said}, {log.artifact.get('total', 'none')} bytes in its log"
            elif log and column in ("step", "steps") and log.steps and claim != log.steps:
                yield f"{said}, {log.steps} in its log"


def _scores(log: Log) -> list[float]:
    found = [x for score in log.scores for x in (score.val_loss, score.val_bpb)]
    found += [row.get(kind) for row in log.rows for kind in claims.SCORES]
    return [x for x in found if x is not None]
