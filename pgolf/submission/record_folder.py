"""Whether a record folder holds what it claims, own or foreign: by reading its logs and files, not by running it."""

import math
import re
from dataclasses import dataclass
from decimal import Decimal
from itertools import combinations
from pathlib import Path, PurePosixPath

from pgolf.analysis import claims, diff
from pgolf.analysis.records import NAMED_SEED, Source, logs_below
from pgolf.analysis.training_logs import CAP_BYTES, CODE, Log, LogError
from pgolf.data.audit import PUBLISHED
from pgolf.disk import checksum, open_regular
from pgolf.submission import record_claims
from pgolf.submission.conditions import FAIL, NOT_TESTED, Verdict, judged

SCRIPT = "train_gpt.py"
ARTIFACTS = ("*.pgolf", "*.ptz")  # files of weights that some folders ship
SECONDS = 600.0  # limit of training, and of evaluation
LAST_STEPS = 2  # a script looks at its clock once per step, one step late
SPLIT_BYTES, SPLIT_TOLERANCE = 151_080_000, 0.01  # UTF-8 of the published validation split
UNTIMED = re.compile(r"non[-_ ]?record|unlimited", re.IGNORECASE)
MEAN_OF = re.compile(r"\b(\d{1,2})[- ]seed (?:mean|average)", re.IGNORECASE)
AVERAGED = re.compile(r"\b(?:ema|swa|lawa)\b[^\n]{0,40}(?:appl|load|swap|weights|averag)", re.IGNORECASE)
HASH = re.compile(r"[0-9a-f]{12}")  # name of a config in logs of pgolf
TOTAL_EVAL = re.compile(r"total_eval_time: ?(\d{1,9}(?:\.\d{1,9})?)s")


@dataclass(frozen=True)
class Folder:
    """A record folder as read. logs, texts: of the claimed seeds, or all if no seeds are claimed, by file name."""

    path: Path
    submission: dict
    readme: str
    seeds: list[str]  # listed by submission.json, else by a table of the README
    logs: dict[str, Log]
    texts: dict[str, str]

    @property
    def timed(self) -> bool:
        """False for tracks without a clock."""
        return not UNTIMED.search(f"{self.submission.get('track', '')} {self.path.resolve().parent.name}")

    @property
    def script(self) -> int | None:
        """Bytes of train_gpt.py on disk."""
        file = self.path / SCRIPT
        return file.stat().st_size if file.is_file() else None

    @property
    def counted(self) -> set[int]:
        """Bytes of code in the logs, packed or not."""
        found = {size.bytes for log in self.logs.values() for size in log.sizes if size.what == CODE}
        return found | {log.artifact["code"] for log in self.logs.values() if "code" in log.artifact}


def of_folder(path: Path) -> list[Verdict]:
    """A verdict per rule that reading can test. LogError if the folder has neither claims nor logs."""
    sources, content, readme = logs_below(path, {}, []), claims.read_claims(path), readme_of(path)
    if content is None and not sources and not readme:
        raise LogError(f"{path}: neither a run nor a record: no result.json, no {claims.SUBMISSION}, README or log")
    submission = claims.parsed(content)
    seeds, by_seed = claims.claims_by_seed(submission or {})
    seeds = seeds or [*dict.fromkeys(row["seed"] for row in record_claims.seed_rows(readme) if row["seed"])]
    chosen = _chosen(sources, seeds, by_seed, (submission or {}).get("val_bpb"))
    logs = {str(file.relative_to(path.resolve())): source for file, source in sources.items() if source in chosen}
    texts = {name: source.content.decode(errors="replace") for name, source in logs.items()}
    logs = {name: source.log for name, source in logs.items()}
    folder = Folder(path, submission or {}, readme, seeds, logs, texts)
    verdicts = [rule(folder) for rule in RULES] + _claimed(folder) + _text(folder)
    if submission is None:
        verdicts.insert(0, Verdict("readable claims", FAIL, f"parse {claims.SUBMISSION}", "it is no JSON object"))
    how = "a record's script is not run; `pgolf legality RUN` tests a run of pgolf"
    return [*verdicts, Verdict("C1 to C4, data, calibration", NOT_TESTED, how, "only reading, no running")]


def readme_of(path: Path) -> str:
    """Text of README.md, whatever the case of its name; '' without one."""
    for file in sorted(path.iterdir()):
        if file.name.lower() == "readme.md" and file.is_file():
            with open_regular(file, claims.MAX_CLAIMS) as content:
                return content.read().decode("utf-8", errors="replace")
    return ""


def _chosen(sources: dict[Path, Source], seeds: list[str], by_seed: dict[str, dict], claim: object) -> list[Source]:
    """The log of each listed seed, of several the one that its claims agree with, else the one nearest to the top.

    Without a list of seeds all logs, unless some share a seed and one alone has the score that the record claims.
    """
    logs, found = sorted(sources.values(), key=lambda source: len(source.given.parts)), []
    for seed in seeds:
        own = [source for source in logs if str(source.log.seed) == seed]
        best = claims.log_of_seed(seed, by_seed.get(seed, {}), [source.log for source in own])
        found += [s for s in own if s.log is best][:1] or [s for s in own if s.log.final][:1] or own[:1]
    if seeds or len({source.log.seed for source in logs}) == len(logs) or not claims.is_figure(claim):
        return found or logs
    scored = [s for s in logs if s.log.final and claims.near(Decimal(claim), s.log.final.val_bpb, claims.ROUNDED)]
    return scored if len(scored) == 1 else logs


def _complete(folder: Folder) -> Verdict:
    problems = [] if folder.logs else ["no training log in this folder"]
    for name, log in folder.logs.items():
        if not log.final:
            stops = f" and stops at step {log.steps} of {log.iterations}" if log.rows and not log.stopped_by else ""
            problems.append(f"{name} has no score of the quantized file{stops}")
    return judged("complete logs", "a final score at the end of each", problems, f"{len(folder.logs)} logs")


def _seed_in(name: str) -> int | None:
    named = NAMED_SEED.search(Path(name).stem)
    return int(named[1]) if named else None


def _every_seed(folder: Folder) -> Verdict:
    logged = [str(log.seed) for log in folder.logs.values()]
    missing = [seed for seed in folder.seeds if seed not in logged]
    problems = [f"no log of seed {', '.join(missing[:20])}, which is claimed"] if missing else []
    for name, log in folder.logs.items():
        if _seed_in(name) not in (None, log.seed):
            problems.append(f"{name} is a log of seed {log.seed}")
    words = " ".join(value for value in folder.submission.values() if isinstance(value, str))
    several = max((int(count) for count in MEAN_OF.findall(words)), default=1)
    if not folder.seeds and several > len(set(logged)):
        problems.append(f"a mean of {several} seeds is claimed, and {len(set(logged))} is logged")
    seeds = (
        f"seeds {', '.join(logged)}"
        if None not in {log.seed for log in folder.logs.values()}
        else "not all logs name one"
    )
    return judged("a log of every seed", "seeds claimed against seeds logged", problems, seeds)


def _distinct(folder: Folder) -> Verdict:
    """Logs of two seeds with equal curves, or an equal final score to its last digit, are of one training."""
    problems = []
    for (a, ours), (b, theirs) in combinations(folder.logs.items(), 2):
        x, y = ([{k: v for k, v in row.items() if k != "train_seconds"} for row in log.rows] for log in (ours, theirs))
        finals = [(s.val_loss, s.val_bpb) if s and s.digits > 5 else log for log in (ours, theirs) for s in [log.final]]
        two = (_seed_in(a), ours.seed) != (_seed_in(b), theirs.seed)
        if two and ((len(x) > 2 and x == y) or finals[0] == finals[1]):
            problems.append(f"{a} and {b} are logs of one training")
    return judged("a training per log", "losses and scores of each two logs", problems, f"{len(folder.logs)} logs")


def _one_configuration(folder: Folder) -> Verdict:
    problems = []
    for (a, ours), (b, theirs) in combinations(folder.logs.items(), 2):
        x, y = ours.config, theirs.config
        differ = [name for name in x if name in y and x[name] != y[name] and not _only_names(name, x[name], y[name])]
        said = [f"{name} {x[name]} and {y[name]}" for name in differ]
        codes = [max((size.bytes for size in log.sizes if size.what == CODE), default=0) for log in (ours, theirs)]
        said += [f"code of {codes[0]:,} and {codes[1]:,} bytes"] if all(codes) and codes[0] != codes[1] else []
        problems += [f"{a} and {b}: {', '.join(said[:5])}"] if said else []
    how = "settings and bytes of code in each two logs"
    return judged("one configuration", how, problems, f"{len(folder.logs)} logs")


def _only_names(setting: str, x: object, y: object) -> bool:
    """True for a seed, the hash of a config with it, the name of a run, or one file name in two folders."""
    moved = all(isinstance(value, str) and "/" in value for value in (x, y))
    last = setting.rpartition(".")[2]
    same_file = moved and PurePosixPath(x).name == PurePosixPath(y).name
    hashes = last == "config" and all(HASH.fullmatch(str(value)) for value in (x, y))
    return same_file or last == "seed" or hashes or bool(diff.IDENTITY.fullmatch(last))


def _size(folder: Folder) -> Verdict:
    """Artifact and code by the logs, by the claims, and by the files in the folder."""
    cap, script = max((log.cap for log in folder.logs.values()), default=CAP_BYTES), folder.script or 0
    problems, totals = [], []
    for name, log in folder.logs.items():
        weights = log.artifact.get("weights", 0)
        totals.append(max(log.artifact.get("total", 0), weights + log.artifact.get("code", 0)))
        on_disk = f"; with {SCRIPT} as it is on disk {weights + script:,}" if weights and script else ""
        if totals[-1] > cap:
            problems.append(
                f"{name}: {totals[-1]:,} bytes are over the cap of {cap:,} by {totals[-1] - cap:,}{on_disk}"
            )
        elif weights and script not in folder.counted and weights + script > cap:
            problems.append(f"{name}: {weights:,} bytes and {SCRIPT} of {script:,} are over the cap of {cap:,}")
    _, by_seed = claims.claims_by_seed(folder.submission)
    for where, own in {"": folder.submission, **{f" of seed {seed}": own for seed, own in by_seed.items()}}.items():
        stated = {k: own.get(k) for k in ("bytes_total", "artifact_bytes", "artifact_bytes_max")}
        over = {k: v for k, v in stated.items() if claims.is_figure(v) and v > cap}
        problems += [f"{k} {v:,}{where} in {claims.SUBMISSION} is over the cap of {cap:,}" for k, v in over.items()]
    shipped = [file for pattern in ARTIFACTS for file in folder.path.rglob(pattern)]
    claimed = folder.submission.get("artifact_sha256")
    if len(shipped) == 1 and isinstance(claimed, str) and checksum(shipped[0]) != claimed:
        problems.append(f"{shipped[0].name} has not the artifact_sha256 of {claims.SUBMISSION}")
    for file in shipped:
        if (total := file.stat().st_size + script) > cap:
            problems.append(f"{file.name} and {SCRIPT} have {total:,} bytes on disk, over the cap by {total - cap:,}")
    figures = f"{', '.join(f'{total:,}' for total in totals)} of {cap:,} bytes"
    return judged("size", "totals of logs, claims and files on disk", problems, figures)


def _code(folder: Folder) -> Verdict:
    rule, how = "code as counted", f"bytes of {SCRIPT} on disk against those in the logs"
    if folder.script is None or not folder.counted:
        return Verdict(rule, NOT_TESTED, how, f"no {SCRIPT}" if folder.script is None else "no log counts code")
    figures = f"{folder.script:,} bytes on disk, {', '.join(f'{n:,}' for n in sorted(folder.counted))} in the logs"
    return judged(rule, how, [figures] if folder.script > max(folder.counted) else [], figures)


def _clock(folder: Folder, rule: str, how: str, seconds: dict[str, float], slack: dict[str, float]) -> Verdict:
    """Seconds per log against the limit; slack: seconds that a log may be over."""
    if not folder.timed or not seconds:
        return Verdict(rule, NOT_TESTED, how, "no log has them" if folder.timed else "this track has no clock")
    late = [f"{name}: {s:.1f} s of {SECONDS:.0f} s" for name, s in seconds.items() if s > SECONDS + slack.get(name, 0)]
    return judged(rule, how, late, f"{', '.join(f'{s:.1f}' for s in seconds.values())} s of {SECONDS:.0f} s")


def _training_clock(folder: Folder) -> Verdict:
    seconds = {name: log.seconds for name, log in folder.logs.items() if log.seconds is not None}
    slack = {name: LAST_STEPS * s / max(1, folder.logs[name].steps or 1) for name, s in seconds.items()}
    how = f"training seconds in the logs; the last {LAST_STEPS} steps may cross the limit"
    return _clock(folder, "training clock", how, seconds, slack)


def _evaluation_clock(folder: Folder) -> Verdict:
    """Of the scoring that gave the final score; others that a script makes besides are not counted."""
    seconds = {}
    for name, log in folder.logs.items():
        own = [s.seconds for s in log.scores if log.final and s.name == log.final.name and s.seconds is not None]
        own += map(float, TOTAL_EVAL.findall(folder.texts[name]))
        seconds |= {name: max(own)} if own else {}
    return _clock(folder, "evaluation clock", "seconds of the final score in the logs", seconds, {})


def _averaged(folder: Folder) -> Verdict:
    rule, how, problems, asked = "averaged weights used", "ema_decay against what the log says", [], 0
    for name, log in folder.logs.items():
        decay, on = log.config.get("ema_decay"), log.config.get("ema_enabled", log.config.get("use_ema", True))
        if isinstance(decay, float) and 0 < decay < 1 and on:
            asked += 1
            if not (log.averaged or AVERAGED.search(folder.texts[name])):
                problems.append(f"{name}: ema_decay {decay}, and no average was applied: raw weights were scored")
    if not asked:
        return Verdict(rule, NOT_TESTED, how, "no log has an ema_decay")
    return judged(rule, how, problems, f"applied in {asked} logs")


def _claimed(folder: Folder) -> list[Verdict]:
    found = record_claims.problems(folder.submission, folder.readme, list(folder.logs.values()))
    how = f"{claims.SUBMISSION}{' and tables of the README' * bool(folder.readme)} against {len(folder.logs)} logs"
    if not folder.logs:
        return [Verdict(f"{kind} as logged", NOT_TESTED, how, "no log") for kind in found]
    return [judged(f"{kind} as logged", how, problems, "agree") for kind, problems in found.items()]


def _text(folder: Folder) -> list[Verdict]:
    """Tokens of the validation split, and the bytes that scores were divided by."""
    rules, how = ("whole validation split", "bytes of the published text"), "tokens · val_loss / ln 2 / val_bpb"
    tokens = {name: log.config.get("val_tokens") for name, log in folder.logs.items()}
    tokens = {name: count for name, count in tokens.items() if isinstance(count, int) and count > 0}
    own = "data_fingerprint" in folder.submission or any("fingerprint" in log.config for log in folder.logs.values())
    if own or not tokens:
        why = "data of pgolf's own; test the run" if own else "no log has val_tokens"
        return [Verdict(rule, NOT_TESTED, how, why) for rule in rules]
    known = {count: name for name, (_, _, count) in PUBLISHED.items()}
    parts, miscounts, figures = [], [], []
    for name, count in tokens.items():
        score = folder.logs[name].final
        size = count * score.val_loss / math.log(2) / score.val_bpb if score and score.val_loss else None
        share = size / SPLIT_BYTES if size else 1.0
        figures.append(f"{count:,} tokens{f' of {size / 1e6:.2f} MB' if size else ''}")
        if count not in known and share < 1 - SPLIT_TOLERANCE:
            parts.append(f"{name}: {count:,} tokens, {share:.0%} of the split's {SPLIT_BYTES / 1e6:.2f} MB")
        elif abs(share - 1) > SPLIT_TOLERANCE and not known.get(count, "").endswith("march17"):
            miscounts.append(f"{name}: divided by {size / 1e6:.2f} MB, and the text has {SPLIT_BYTES / 1e6:.2f} MB")
    return [judged(rules[0], how, parts, figures[0]), judged(rules[1], how, miscounts, figures[0])]


RULES = (
    *(_complete, _every_seed, _distinct, _one_configuration, _size, _code),
    *(_training_clock, _evaluation_clock, _averaged),
)
