"""Whether a finished run is legal: every rule of the challenge tested on its files, its data and its scorer."""

import hashlib
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
from torch import Tensor

from pgolf.analysis import diff
from pgolf.data import audit
from pgolf.data.dataset import Dataset
from pgolf.disk import checksum
from pgolf.runs import integrity
from pgolf.runs.directory import describe_environment
from pgolf.runs.result import ARTIFACT, CHECKPOINT, Result, RunError, finished_run
from pgolf.script.compile import packed_script
from pgolf.submission.conditions import (
    FAIL,
    NOT_TESTED,
    PASS,
    AdaptedPipeline,
    Pipeline,
    Verdict,
    examine,
    judged,
    probe,
)
from pgolf.submission.submit import same_machine, tolerance
from pgolf.training.inputs import open_dataset
from pgolf.training.round_trip import Scored, load_checkpoint, round_trip, score_model
from pgolf_core.config import RunConfig
from pgolf_core.device import cpu_threads, pick_device
from pgolf_core.evaluate import Score
from pgolf_core.export import load, stored_float
from pgolf_core.export_inputs import model_of
from pgolf_core.files import DataError
from pgolf_core.model import roles

OVERLAP, BYTES = ("overlap",), ("shards", "tokenizer", "table", "bytes", "marks")  # names in audit.CHECKS


@dataclass(frozen=True)
class Evidence:
    """What the rules look at: a run's directory, its claims, its data, and the file scored again."""

    run_dir: Path
    result: Result
    config: RunConfig
    dataset: Dataset
    audit: audit.Audit
    weights: dict[str, Tensor]  # read back from the artifact
    score: Score  # the weights scored now
    here: dict  # describe_environment of this machine

    @property
    def tolerance(self) -> float:
        """Between two scores of one file."""
        return tolerance(self.result, self.here)

    @property
    def same_code(self) -> bool:
        return same_machine(self.result, self.here) and self.result.environment.get("code") == self.here["code"]

    @property
    def checkpoint(self) -> Path:
        """Of an export that of the run it was made from."""
        if self.result.kind == "train":
            return self.run_dir / CHECKPOINT
        return self.run_dir.resolve().parents[1] / str(self.result.source) / CHECKPOINT


def of_run(run_dir: Path) -> list[Verdict]:
    """A verdict per rule. Raises RunError if the run has no result, or no artifact with a score."""
    result, config = finished_run(run_dir)
    if result.artifact_sha256 is None or result.kind not in ("train", "export"):
        raise RunError(f"{run_dir}: has no artifact with a score; train it with final_roundtrip_eval=1")
    verdicts = [_file(run_dir, result), _record(run_dir, result, config), *_clocks(result, config)]
    if verdicts[0].outcome == FAIL:
        return [*verdicts, Verdict("all other rules", NOT_TESTED, "", f"{ARTIFACT} is not what the run wrote")]
    try:
        dataset = open_dataset(config)
    except DataError as error:
        return [*verdicts, Verdict("whole validation split", FAIL, "open the data of the run", str(error))]
    found = audit.stored(dataset)
    if found is None:
        found = audit.audit(dataset, seq_len=config.train_seq_len)
        audit.store(dataset, found)
    with cpu_threads(config.cpu_threads):
        device, weights = pick_device(config.train), load(run_dir / ARTIFACT)
        model = model_of(weights, config, device)
        score = score_model(model, config, dataset, roundtrip=True, shipped=True)
        here = describe_environment(device, studies=result.kind == "export")
        evidence = Evidence(run_dir, result, config, dataset, found, weights, score, here)
        verdicts += [rule(evidence) for rule in RULES] + _audited(found)
        scorer = Pipeline if config.adapt == "off" else AdaptedPipeline
        pipeline, window, bos = scorer(model, config, dataset.byte_table), config.eval_window, dataset.tokenizer.bos
        tokens = probe(dataset.validation(config.train_seq_len), window, bos)
        verdicts += [pipeline.against_evaluate(tokens), *examine(pipeline, tokens, window, bos)]
    return verdicts


def _file(run_dir: Path, result: Result) -> Verdict:
    damage = integrity.damage(run_dir, vars(result), thorough=True)
    problems = [f"damaged: {damage}"] if damage else []
    how = "sha256 of artifact, checkpoint and logs against the result"
    return judged("files as the run wrote them", how, problems, f"{ARTIFACT} {result.artifact_sha256[:12]} …")


def _record(run_dir: Path, result: Result, config: RunConfig) -> Verdict:
    """Config, seed and log are this run's."""
    problems = []
    if config.hash != result.config_hash:
        problems.append(f"config.json has hash {config.hash}, the result {result.config_hash}")
    if config.seed != result.seed:
        problems.append(f"seed {config.seed} in config.json, {result.seed} in the result")
    log, lacking = run_dir / "log.txt", []
    if result.kind == "train" and log.exists():
        text = log.read_text(encoding="utf-8", errors="replace")
        facts = [
            f"config:{result.config_hash}",
            f"val_bpb:{result.roundtrip_val_bpb:.8f}",
            f": {result.total_bytes} bytes",
        ]
        lacking = [fact for fact in facts if fact not in text]
    problems += [f"log.txt is of another run: it has no “{fact.strip(': ')}”" for fact in lacking]
    how = "hash of config.json, seed, and log.txt against the result"
    return judged("config, seed and log of one run", how, problems, f"config {config.hash}, seed {config.seed}")


def _clocks(result: Result, config: RunConfig) -> list[Verdict]:
    """Of training with its calibration, and of the evaluation."""
    limit, budget = config.max_wallclock_seconds, result.budget
    rules = ("training clock", "evaluation clock")
    most = min(filter(None, (config.eval_seconds_cap, limit)), default=0.0)
    unlimited = "max_wallclock_seconds=0: this track has no clock"
    evaluation, evaluated = result.eval_seconds or 0.0, Verdict(rules[1], NOT_TESTED, "", unlimited)
    if most:
        late = [f"{evaluation:.1f} s of {most:.0f} s"] if evaluation > most else []
        evaluated = judged(rules[1], "eval_seconds of the result", late, f"{evaluation:.1f} s of {most:.0f} s")
    if not limit:
        return [Verdict(rules[0], NOT_TESTED, "", unlimited), evaluated]
    how = "counted seconds of training and calibration; the last step may cross the limit"
    if "counted" not in budget:
        return [Verdict(rules[0], NOT_TESTED, how, "the result has no budget of seconds"), evaluated]
    counted = f"{budget['counted']:.1f} s of {limit:g} s, {budget['calibration']:.1f} s of it calibration"
    wrong = [f"the budget has a limit of {budget['limit']:g} s"] if budget["limit"] != limit else []
    wrong += [f"over by {result.overtime:.1f} s: {counted}"] if result.overtime else []
    return [judged(rules[0], how, wrong, counted), evaluated]


def _size(e: Evidence) -> Verdict:
    """Byte for byte, from the file on disk and the run's script."""
    script, file = packed_script(e.config), (e.run_dir / ARTIFACT).stat().st_size
    counted, cap, problems = e.result.bytes["code"], e.config.cap_bytes, []
    known = hashlib.sha256(script).hexdigest() == e.result.script_sha256
    total = file + (len(script) if known else counted)
    if total > cap:
        problems.append(f"{total:,} bytes are over the cap of {cap:,} by {total - cap:,}")
    if file + counted != e.result.total_bytes:
        problems.append(f"the result counts {e.result.total_bytes:,} bytes, the files have {file + counted:,}")
    if e.result.cap_bytes != cap:
        problems.append(f"the result's cap is {e.result.cap_bytes:,}, that of config.json {cap:,}")
    if known and len(script) != counted:
        problems.append(f"the script has {len(script):,} bytes, and {counted:,} are counted")
    figures = f"{file:,} of the file + {counted:,} of code = {total:,} of {cap:,} bytes"
    how = f"{ARTIFACT} on disk, and the script that trains, exports and scores, packed"
    return judged(
        "size", how, problems, figures + "; the script is another now, so its bytes are the run's" * (not known)
    )


def _rescored(e: Evidence) -> Verdict:
    r, ours = e.result, (e.score.val_bpb, e.score.val_loss, e.score.tokens, e.score.bytes)
    theirs = (r.roundtrip_val_bpb, r.roundtrip_val_loss, r.roundtrip_tokens, r.roundtrip_bytes)
    text = "{:.8f} bpb, {:.8f} nats per token, {:,} tokens of {:,} bytes"
    same = all(abs(a - b) <= e.tolerance for a, b in zip(ours, theirs, strict=True))
    problems = [] if same else [f"now {text.format(*ours)}; the result says {text.format(*theirs)}"]
    if r.data_fingerprint != e.dataset.fingerprint:
        problems.append(f"{e.dataset.directory.name} is not the data that was scored: its fingerprint is another")
    how = f"read back and scored again, tolerance {e.tolerance:g}"
    return judged("score of the file", how, problems, text.format(*ours))


def _whole_split(e: Evidence) -> Verdict:
    available = e.dataset.description["val_tokens"] - 1
    whole = available // e.config.train_seq_len * e.config.train_seq_len
    problems = [f.message for f in e.audit.findings if f.level == "error" and f.check in ("documents", "published")]
    if e.score.tokens < whole:
        problems.insert(0, f"{e.score.tokens:,} of {available:,} validation tokens are scored")
    published = e.audit.figures.get("published") or "not a published split"
    figures = f"{e.score.tokens:,} of {available:,} tokens in whole windows; {published}"
    return judged("whole validation split", "tokens scored again against those of the shards", problems, figures)


def _averaged(e: Evidence) -> Verdict:
    """Raw or averaged weights: what the knobs ask for, what was scored, and what is in the file."""
    rule, how = "weights scored are weights shipped", "knobs, score of the checkpoint, control tensors of the file"
    said, config, problems = e.result.weights or "raw", e.config, []
    asked = ("ema",) if config.ema_decay else ("swa", "raw") if config.swa_every else ("raw",)  # swa may begin too late
    if not said.startswith(asked):
        problems.append(f"the knobs ask for {asked[0]} weights, and {said} ones were scored")
    if not e.checkpoint.is_file():
        return judged(rule, how, problems, "") if problems else Verdict(rule, NOT_TESTED, how, "there is no checkpoint")
    state, kinds = load_checkpoint(e.checkpoint), roles(config.model)
    device = pick_device(config.train)
    prequant = score_model(model_of(state, config, device), config, e.dataset, roundtrip=True).val_bpb
    if not abs(prequant - e.result.prequant_val_bpb) <= e.tolerance:
        problems.append(f"the checkpoint scores {prequant:.8f} bpb, the result says {e.result.prequant_val_bpb:.8f}")
    controls = [name for name, role in kinds.items() if role.is_control]
    as_stored = {name: stored_float(state[name], kinds[name], config.export).float() for name in controls}
    other = [name for name in controls if not as_stored[name].equal(e.weights[name].float())]
    if other and not config.learn_steps:
        words = "control tensors of the file are not the checkpoint's"
        problems.append(f"{len(other)} of {len(controls)} {words}: {other[0]}")
    return judged(rule, how, problems, f"{said} weights; before quantization {prequant:.8f} bpb")


def _calibration(e: Evidence) -> Verdict:
    """What the export read is training text: made from that again, it is the same file."""
    rule, config = "calibration text", e.config
    if not (config.export.needs_calibration or config.learn_steps):
        return Verdict(rule, PASS, "knobs of the export", "the export reads no text")
    how = "export the checkpoint again, with text of the training shards alone: the same sha256"
    if not e.checkpoint.is_file():
        return Verdict(rule, NOT_TESTED, how, "there is no checkpoint")
    weights = hashlib.sha256(safetensors.torch.save(e.weights)).hexdigest()
    known: Scored = {weights: (e.score, 0.0, {})}  # needs no second score
    with tempfile.TemporaryDirectory() as folder:
        trip = round_trip(load_checkpoint(e.checkpoint), config, e.dataset, Path(folder) / ARTIFACT, scored=known)
    found = f"sha256 {trip.artifact_sha256[:12]} … again, {e.result.artifact_sha256[:12]} … in the run"
    if trip.artifact_sha256 != e.result.artifact_sha256 and not e.same_code:
        return Verdict(rule, NOT_TESTED, how, f"another machine or other code: {found}")
    problems = [] if trip.artifact_sha256 == e.result.artifact_sha256 else [f"other text or other weights: {found}"]
    if config.max_wallclock_seconds and not e.result.budget.get("calibration"):
        problems.append("its seconds are not counted in the training clock")
    return judged(rule, how, problems, found)


def _audited(found: audit.Audit) -> list[Verdict]:
    """Verdicts that the thorough audit of the data gives."""
    overlap = "documents of both splits, hashed and compared"
    spelt = "byte table and documents against the bytes that tokens decode to"
    verdicts = []
    for rule, checks, how in (("no validation text in training", OVERLAP, overlap), ("bytes as decoded", BYTES, spelt)):
        own = [finding for finding in found.findings if finding.check in checks]
        problems = [finding.message for finding in own if finding.level == "error"]
        notes = [finding.message for finding in own if finding.level != "error"]
        verdicts.append(judged(rule, how, problems, "; ".join(notes) or f"thorough audit of {found.figures['folder']}"))
    return verdicts


RULES: tuple[Callable[[Evidence], Verdict], ...] = (_size, _rescored, _whole_split, _averaged, _calibration)


def of_runs(run_dirs: list[Path]) -> list[Verdict]:
    """What several runs must hold together: one configuration, and a seed, a log and a file of each one's own."""
    results = [finished_run(run_dir)[0] for run_dir in run_dirs]
    problems = []
    for other in run_dirs[1:]:
        rows = diff.between(run_dirs[0], other)
        rows = rows[rows.kind.isin(["knob", "outside"]) & ~rows.setting.isin(diff.MACHINE)]
        changes = [f"{row.setting} {row.ours!r} and {row.theirs!r}" for row in rows.itertuples()]
        problems += [f"{run_dirs[0].name} and {other.name}: {', '.join(changes)}"] if changes else []
    seeds = [result.seed for result in results]
    verdicts = [judged("one configuration", "diff of all knobs, data and code", problems, f"{len(run_dirs)} runs")]
    listed = ", ".join(map(str, seeds))
    problems = [] if len(set(seeds)) == len(seeds) else [f"seeds {listed}"]
    verdicts.append(judged("every seed once", "seeds of the results", problems, f"seeds {listed}"))
    marks = {"log.txt": [checksum(d / "log.txt") if (d / "log.txt").exists() else str(d) for d in run_dirs]}
    marks[ARTIFACT] = [result.artifact_sha256 for result in results]
    problems = [f"{name} is the same file in two runs" for name, own in marks.items() if len(set(own)) < len(own)]
    verdicts.append(judged("a log and a file per seed", "sha256", problems, f"{len(run_dirs)} of each"))
    return verdicts


def sentence(verdicts: list[Verdict]) -> str:
    """'legal: 14 of 16 rules hold; not tested: …', or which are broken; only tested conditions make it legal."""
    rules = {kind: list(dict.fromkeys(v.rule for v in verdicts if v.outcome == kind)) for kind in (PASS, FAIL)}
    if rules[FAIL]:
        return f"not legal: {', '.join(rules[FAIL])}"
    word = "legal" if "C1 causality" in rules[PASS] else "no violation found"
    held = f"{word}: {sum(v.outcome == PASS for v in verdicts)} of {len(verdicts)} rules hold"
    untested = ", ".join(dict.fromkeys(v.rule for v in verdicts if v.outcome == NOT_TESTED))
    return f"{held}; not tested: {untested}" if untested else held
