"""Training logs of the challenge's baseline script, of public records and of pgolf.

`read` parses text into a Log, whose properties interpret it. No figure is corrected: contradictions become sentences
in `flags`.
"""

import math
import re
from dataclasses import dataclass, field, replace
from pathlib import PureWindowsPath

from pgolf.analysis import log_lines

CAP_BYTES = 16_000_000  # the challenge's cap; pgolf's logs name theirs
MOST = 2000  # entries kept of a kind, settings included: no log needs more, and a hostile one has millions

MODEL, CODE, TOTAL = "Serialized model", "Code size", "Total submission size"
RAW = re.compile(r"raw|fp\d+|bf16|float", re.IGNORECASE)  # in place of a codec: weights before quantisation
STOPPED = re.compile(r"stopping_early:\s*(\w+)(?:.*\bstep: ?(\d{1,12})/)?")
VERSION = re.compile(r"Running (Python|PyTorch) (\S+)")
DEVICE = re.compile(r"\|\s+\d+\s+(NVIDIA(?: [^\s|]+)+)\s{2,}(?:On|Off)\s")
AVERAGED = re.compile(r"(?:swa|ema|lawa):applying")
LATE_SETTING = re.compile(r"final_eval_mode:|ttt\w*:start |ttt_phased: ")  # logged just before the final evaluation
TTT_BEGUN = re.compile(r"ttt\w*\.")  # in a setting's name

PREQUANT = re.compile(r"pre[-_ ]?quant|post[-_ ]?ema|^(raw|ema|swa)\b", re.IGNORECASE)
QUANTIZED = re.compile(r"quantized|int\d|roundtrip|ternary|binary|^final|^legal_ttt", re.IGNORECASE)
NOT_FINAL = re.compile(r"diagnostic|delta|gap", re.IGNORECASE)
EVALUATION = re.compile(r"(?:final|quantized|legal)\w*?(?=_exact|\W|$)")


class LogError(ValueError):
    """A log cannot be imported; the message names it and says why."""


@dataclass(frozen=True)
class Score:
    label: str
    val_loss: float | None  # nats per token; None if the log says nan
    val_bpb: float | None
    line: int
    digits: int  # decimals of val_bpb
    stride: int | None = None
    seconds: float | None = None

    @property
    def name(self) -> str:
        """The label without the suffix of the more precise of two lines."""
        return self.label.removesuffix("_exact")


@dataclass(frozen=True)
class Size:
    what: str  # Serialized model, Code size, Total submission size
    codec: str  # the label's addition, mostly a codec; may be ''
    bytes: int
    line: int

    @property
    def is_packed(self) -> bool:
        """True if a codec is named."""
        return bool(self.codec) and not RAW.search(self.codec)


@dataclass
class Log:
    """The content of a log, in its order."""

    config: dict = field(default_factory=dict)
    rows: list[dict] = field(default_factory=list)  # as in metrics.jsonl
    scores: list[Score] = field(default_factory=list)
    sizes: list[Size] = field(default_factory=list)
    environment: dict = field(default_factory=dict)
    iterations: int | None = None
    stopped_by: str | None = None
    stopped_at: int | None = None  # step
    seconds: float | None = None
    averaged: bool = False  # averaged weights were quantised
    adapted: bool = False  # test-time training changed the weights before they were quantised
    cut: str = ""  # an incomplete last line
    cap: int = CAP_BYTES
    notes: list[str] = field(default_factory=list)

    @property
    def steps(self) -> int | None:
        return max([row["step"] for row in self.rows[-1:]] + [self.stopped_at or 0]) or (0 if self.rows else None)

    @property
    def seed(self) -> int | None:
        """The seed, wherever among the settings it stands: lr:embed=0.035 batch:786432 seed:1337."""
        named = [value for name, value in self.config.items() if name.rpartition(".")[2] == "seed"]
        seed = self.config.get("seed", named[-1] if named else None)
        return seed if isinstance(seed, int) and not isinstance(seed, bool) else None

    @property
    def parameters(self) -> int | None:
        counts = [self.config.get(name) for name in ("model_params", "params")]
        return next((count for count in counts if isinstance(count, int)), None)

    @property
    def validation(self) -> dict:
        """The last validation during training, {} if there was none."""
        return next((row for row in reversed(self.rows) if "val_bpb" in row), {})

    @property
    def after_quantization(self) -> list[Score]:
        """Finite scores of the quantised file, without diagnostics.

        Scores behind the file's size are of the file, and so are those of a log that only evaluates one.
        """
        model = min((size.line for size in self._packed), default=math.inf if self.rows or self.sizes else 0)
        scores = [s for s in self.scores if s.val_bpb is not None and not NOT_FINAL.search(s.label)]
        return [s for s in scores if not PREQUANT.search(s.label) and (QUANTIZED.search(s.label) or s.line > model)]

    @property
    def before_quantization(self) -> Score | None:
        """The last pre-quant score, as precise as logged."""
        return _precise([s for s in self.scores if s.val_bpb is not None and PREQUANT.search(s.label)])

    @property
    def final(self) -> Score | None:
        """The last score of the file, as precise as logged; None if the log ends before it."""
        scores = self.after_quantization
        last = None if self.lacking else _precise(scores)
        return last and (_repeated(last, scores) or last)

    @property
    def lacking(self) -> list[str]:
        """Evaluations of the file that began and have no score, so the log is incomplete."""
        begun = {"ttt"} if not self.adapted and any(map(TTT_BEGUN.match, self.config)) else set()
        if cut := EVALUATION.match(self.cut):
            begun.add(cut[0])
        scored = " ".join(score.label.lower() for score in self.scores)
        return [word for word in sorted(begun) if word not in scored]

    @property
    def _packed(self) -> list[Size]:
        """Sizes of quantised models and of files that hold one: no total is one that raw weights alone exceed."""
        raw = min((s.bytes for s in self.sizes if s.what == MODEL and not s.is_packed), default=math.inf)
        models = [s for s in self.sizes if s.what == MODEL and s.is_packed]
        return models + [s for s in self.sizes if s.what == TOTAL and s.is_packed | (s.codec == "") and s.bytes < raw]

    @property
    def artifact(self) -> dict:
        """The file's codec, and its bytes as weights, code and total; keys that the log does not give are missing.

        The total is the last one, and that of the last model: behind it, or the sum of it and of code.
        """
        models, totals = ([s for s in self._packed if s.what == what] for what in (MODEL, TOTAL))
        codes = [s.bytes for s in self.sizes if s.what == CODE]
        model = models[-1] if models else None
        if model:
            totals = [t for t in totals if t.line > model.line or t.bytes - model.bytes in codes]
        total = totals[-1] if totals else None
        if model and total and total.bytes - model.bytes not in codes:
            model = next((m for m in reversed(models) if total.bytes - m.bytes in codes), model)
        found = {"codec": (model or total).codec} if model or total else {}
        found |= {"weights": model.bytes} if model else {}
        if model and total and (not codes or total.bytes - model.bytes in codes):
            found["code"] = total.bytes - model.bytes
        elif model and codes:
            found["code"] = codes[-1]
        return found | ({"total": total.bytes} if total else {})

    @property
    def protocol(self) -> str:
        """How the final score was made: its label, and its stride if the log gives one."""
        score, knob = self.final, None
        if "ttt" in score.name:
            knob = "ttt_sliding.stride"
        elif "final_eval_mode" in self.config:
            knob = "stride"
        elif "sliding" in score.name:
            knob = "eval_stride"
        stride = next((s.stride for s in self.scores if s.name == score.name and s.stride), self.config.get(knob))
        return score.label + (f", stride {stride}" if stride else "")

    @property
    def tokenizer(self) -> str | None:
        return PureWindowsPath(str(self.config.get("tokenizer_path", ""))).name or None

    @property
    def data_fingerprint(self) -> str:
        """The text as far as a log names it: tokenizer and number of tokens, so only logs are comparable with it."""
        if "fingerprint" in self.config:  # a log of pgolf
            return f"log: data {self.config['fingerprint']}"
        return f"log: {self.tokenizer or '?'}, {self.config.get('val_tokens', '?')} val tokens"

    @property
    def flags(self) -> list[str]:
        """Facts that a reader of the figures has to know, one sentence each."""
        file, scores, found = self.artifact, self.after_quantization, list(self.notes)
        total = file.get("total")
        for name in dict.fromkeys(score.name for score in scores):
            score = _precise([s for s in scores if s.name == name])
            if other := _repeated(score, scores):
                found.append(f"{score.label} only repeats {other.label}")
        if total and total > self.cap:
            found.append(f"{total:,} bytes are over the cap of {self.cap:,}")
        if "weights" in file and not total:
            found.append("the log states no total of file and code")
        elif "weights" in file and not self._accounts_for(total - file["weights"] - file["code"]):
            parts = f"{file['weights']:,} and {file['code']:,} of code"
            found.append(f"the total of {total:,} bytes is not the file's {parts}")
        found += [f"{s.label} is nan" for s in self.scores if s.val_bpb is None]
        found += [f"{word} was to evaluate the file, and the log has no score of it" for word in self.lacking]
        if not scores:
            found.append("the log has no score after quantisation")
        if self.averaged and not self.before_quantization:
            found.append("averaged weights were quantised, and the score before quantisation is not theirs")
        if self.final and "?" in self.data_fingerprint:
            found.append(
                "the log does not tell both tokenizer and validation tokens: nothing shows what it compares with"
            )
        return found

    def _accounts_for(self, rest: int) -> bool:
        """True if a log names what its total holds besides weights and code."""
        return rest == 0 or rest in (s.bytes for s in self.sizes if s.what not in (MODEL, CODE, TOTAL))


def _precise(scores: list[Score]) -> Score | None:
    """The last score, or the same score with more digits; None if there is none."""
    same = [s for s in scores if s.name == scores[-1].name]
    best = max(same, key=lambda s: (s.digits, s.line), default=None)
    if best and best.val_loss is None:  # the more precise line may give bpb alone
        best = replace(best, val_loss=next((s.val_loss for s in same if s.val_loss is not None), None))
    return best


def _repeated(score: Score, scores: list[Score]) -> Score | None:
    """The earlier score that a line named round trip only prints again: its name tells how it was made."""
    figures = score.val_loss, score.val_bpb, score.digits
    same = [s for s in scores if s.line < score.line and figures == (s.val_loss, s.val_bpb, s.digits)]
    same = [s for s in same if s.name != score.name and "roundtrip" not in s.name]
    return same[-1] if same and "roundtrip" in score.name else None


def read(text: str) -> Log:
    """Parse a log: metrics are recognised at the start of a line, settings only before the first metric."""
    lines, cut = log_lines.numbered(text)
    log = Log(notes=["the log ends in the middle of a line, which is left out"] if cut else [], cut=cut)
    in_block = False
    for number, line in lines:
        if in_block and (setting := log_lines.SETTING.fullmatch(line)):
            _configure(log, {setting[1].lower(): log_lines.typed(setting[2] or "")})
            continue
        in_block = line == "Hyperparameters:"
        if _add_metric(log, line, number) or _add_size(log, line, number):
            continue
        if seed := log_lines.SEED.fullmatch(line):
            log.config["seed"] = log_lines.typed(seed[1])
        elif LATE_SETTING.match(line) or not (log.rows or log.scores):
            _configure(log, log_lines.settings(line))
        _add_fact(log, line)
    if log.stopped_by is None and log.rows and log.rows[-1]["step"] == log.iterations:
        log.stopped_by = "iterations"
    return log


def _configure(log: Log, found: dict) -> None:
    if len(log.config) < MOST:
        log.config |= found


def _keep(entries: list, entry: object) -> None:
    """Append; the last ones are kept."""
    entries.append(entry)
    if len(entries) > MOST:
        del entries[: MOST // 2]


def _add_metric(log: Log, line: str, number: int) -> bool:
    """Add a step or a score; returns whether the line is one."""
    found = log_lines.figures(line)
    step = log_lines.STEP.match(line) if found else None
    if step and (step[1] or step[3]):
        _add_step(log, int(step[2]), step[3] and int(step[3]), line, number)
    elif "val_bpb" in found and (label := log_lines.label(line)):
        stride = log_lines.STRIDE.search(line)
        loss, bpb = found.get("val_loss", "nan"), found["val_bpb"]
        figures = log_lines.finite(loss), log_lines.finite(bpb), number, log_lines.digits(bpb)
        seconds = log_lines.seconds(log_lines.EVAL_TIME, line)
        _keep(log.scores, Score(label, *figures, stride and int(stride[1]), seconds))
    else:
        return False
    return True


def _add_step(log: Log, step: int, iterations: int | None, line: str, number: int) -> None:
    found = log_lines.figures(line)
    if log.sizes and iterations != log.iterations and "val_loss" not in found:
        return  # of another loop: of test-time training
    if log.rows and step < log.rows[-1]["step"]:  # a second training in the same file, or a resumed one
        last = log.rows[-1]["step"]
        note = f"line {number} goes back from step {last} to {step}; the steps it replaces are left out"
        _keep(log.notes, note)
        log.rows = [row for row in log.rows if row["step"] < step]
        log.scores, log.sizes, log.stopped_by, log.stopped_at = [], [], None, None
        log.averaged = log.adapted = False
    row = {"step": step} | {name: log_lines.finite(figure) for name, figure in found.items()}
    if (seconds := log_lines.seconds(log_lines.TRAIN_TIME, line)) is not None:
        row["train_seconds"] = log.seconds = seconds
    log.rows.append(row)
    log.iterations = iterations or log.iterations


def _add_size(log: Log, line: str, number: int) -> bool:
    """Add the sizes in a line; returns whether there are any."""
    found = []
    if match := log_lines.SIZES.match(line):
        what, *figures = match.groups()
        found = [(f"{MODEL} {what.removesuffix('_model').replace('_', '+')}", *figures[:1])]
        found += zip((CODE, TOTAL), figures[1:], strict=True)
    elif match := log_lines.BUDGET.match(line):
        found = [(TOTAL, match[1])]
        log.cap = int(match[2])
    elif match := log_lines.SIZE.match(line):
        found = [(match[1], match[2])] if match[3] or match[1].lower().startswith("total submission") else []
        if cap := log_lines.CAP.search(line):
            log.cap = int(cap[1])
    for name, figure in found:
        _keep(log.sizes, _size(name, int(figure.replace(",", "")), number))
    return bool(found)


def _size(name: str, figure: int, number: int) -> Size:
    """A size whose name ends in what it is of: 'Serialized model int8+zlib', 'total_submission_with_table'."""
    words = re.split(r"[ _]", name.lower())
    if words[0] == "serialized" and words[1:2] in (["model"], ["artifact"]):
        return Size(MODEL, "+".join(words[2:]).partition("+(")[0].strip("()"), figure, number)
    if words[:2] == ["code", "size"]:
        return Size(CODE, " ".join(words[2:]).strip("()"), figure, number)
    known = ("total", "submission", "artifact", "size")
    if words[:2] == ["submission", "size"] or (words[0] == "total" and {"submission", "artifact"} & set(words)):
        return Size(TOTAL, " ".join(word for word in words if word not in known).strip("()"), figure, number)
    return Size(name, "", figure, number)


def _add_fact(log: Log, line: str) -> None:
    if match := STOPPED.match(line):
        log.stopped_by = "wallclock" if match[1].startswith("wallclock") else match[1]
        log.stopped_at = match[2] and int(match[2])
        log.seconds = log_lines.seconds(log_lines.TRAIN_TIME, line) or log.seconds
    elif match := VERSION.match(line):
        log.environment["torch" if match[1] == "PyTorch" else "python"] = match[2]
    elif match := DEVICE.match(line):
        log.environment["device_name"] = match[1]
    elif AVERAGED.match(line):
        log.averaged = True
    elif log.rows and "ttt" in line.lower() and not log._packed:
        log.adapted = True
