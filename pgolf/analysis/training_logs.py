"""Training logs of the challenge's baseline script, of public records and of pgolf.

`read` parses text into a Log, whose properties interpret it. No figure is corrected: contradictions become sentences
in `flags`.
"""

import json
import math
import re
from dataclasses import dataclass, field
from pathlib import PureWindowsPath

CAP_BYTES = 16_000_000  # the challenge's cap; pgolf's logs name theirs
MAX_LINE = 4096  # longer lines are no metrics, and some patterns take quadratic time

COLOUR = re.compile(r"\x1b\[[\d;]*m")
RANK = re.compile(r"\[(?:rank|default)(\d+)\]: ?")  # torchrun's
STAMP = re.compile(  # of a run script, or of Python's logging
    r"\d{10}\.\d+ |\[?\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d(?:[.,]\d{1,9})?(?:Z|[+-]\d\d:?\d\d)?\]?(?: ?\[?INFO\]?:?)? "
)
RULE = re.compile(r"={20,}")  # separates the trainer's source, the machine and the training
IMPORT = re.compile(r"import [\w.]+|from [\w.]+ import ")
DEFINITION = re.compile(r"(async )?def \w+\(|class \w+.*:$")

NUMBER = r"([-+]?\d+(?:\.\d*)?(?:e[-+]?\d+)?|[-+]?nan|[-+]?inf)"
VALIDATION = rf"(?:sliding )?val_loss[:=]\s*{NUMBER}\s+(?:sliding )?val_bpb[:=]\s*{NUMBER}(?=\s|$)"
STEP = re.compile(rf"(?:step:)?(\d+)/(\d+)\s+(?:{VALIDATION}|(?:train_)?loss:\s*{NUMBER})")
SCORE = re.compile(rf"([A-Za-z][\w.+-]*(?: +[\w.+-]+)*?)(?::done)?\s+(?:stride:\d+\s+)?{VALIDATION}")
SIZE = re.compile(
    r"(?:(Serialized model|Code size|Total submission size)(?: \(?([\w.+-]+)\)?)?: |serialized_model_(\w+):)(\d+) bytes"
)
TOTAL = re.compile(r"(?:budget:(\d+)/(\d+)|Total submission: ([\d,]+))(?=\s|$)")  # of the file and its code
TRAIN_TIME = re.compile(r"train_time:\s*([\d.]+)(ms|s|m)\b")
SECONDS = {"ms": 0.001, "s": 1, "m": 60}

PAIR = r"([A-Za-z_][\w.]*)[:=](\[[^\]]*\]|(?!\w+[:=][^\\/])[^\s\[:=]\S*)"
PAIRS = re.compile(rf"{PAIR}(?: {PAIR})*")
LATE_SETTING = re.compile(r"final_eval_mode:|ttt_\w+:start |ttt_phased: ")  # logged just before the final evaluation
NOT_CONFIG = re.compile(r"val_bpb|val_loss|forecast|nohup|warning|error|note|info|https?|wandb|\w+_time", re.IGNORECASE)
VAL_LOADER = {"pattern": "val_files", "tokens": "val_tokens"}  # names that are ambiguous outside of that line

PREQUANT = re.compile(r"pre[-_ ]?quant|post[-_ ]?ema|^(raw|ema|swa)\b", re.IGNORECASE)
QUANTIZED = re.compile(r"quantized|int\d|roundtrip|ternary|binary|^final", re.IGNORECASE)
NOT_FINAL = re.compile(r"diagnostic|delta|gap", re.IGNORECASE)


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
    seconds: float | None = None
    averaged: bool = False  # averaged weights were quantised
    cut: str = ""  # an incomplete last line
    cap: int = CAP_BYTES
    notes: list[str] = field(default_factory=list)

    @property
    def steps(self) -> int | None:
        return self.rows[-1]["step"] if self.rows else None

    @property
    def validation(self) -> dict:
        """The last validation during training, {} if there was none."""
        return next((row for row in reversed(self.rows) if "val_bpb" in row), {})

    @property
    def after_quantization(self) -> list[Score]:
        """Finite scores of the quantised file, without diagnostics."""
        model = next((size.line for size in self.sizes if size.codec and size.what == "Serialized model"), math.inf)
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
        """Evaluations of the file that were announced but have no score, so the log is incomplete."""
        ttt = self.config.get("ttt_enabled") or any(re.match(r"ttt_\w+\.", name) for name in self.config)
        announced = {"sliding": self.config.get("sliding_window_enabled"), "ttt": ttt}
        if begun := re.match(r"(?:final|quantized|legal)\w*?(?=_exact|\W|$)", self.cut):
            announced[begun[0]] = True
        scored = " ".join(score.label.lower() for score in self.after_quantization)
        return [word for word, wanted in announced.items() if wanted and word not in scored]

    @property
    def artifact(self) -> dict:
        """The file's codec, and its bytes as weights, code and total; keys that the log does not give are missing.

        A total without a codec counts the pre-quant weights, unless it follows the size of the quantised ones.
        """
        model = total = codec = None
        for size in self.sizes:
            if size.what == "Serialized model":
                codec = size.codec
                model, total = (size, None) if codec else (model, total)
            elif size.what == "Total submission size" and (size.codec or codec):
                total = total or size
        totals = {"total": total.bytes} if total else {}
        if not model:
            return {"codec": total.codec} | totals if total else {}
        codes = [s.bytes for s in self.sizes if s.what == "Code size"]
        found = {"codec": model.codec, "weights": model.bytes} | ({"code": codes[-1]} if codes else {})
        if total and (not codes or total.bytes - model.bytes in codes):
            found["code"] = total.bytes - model.bytes
        return found | totals

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
        elif "weights" in file and file["weights"] + file["code"] != total:
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


def _precise(scores: list[Score]) -> Score | None:
    """The last score, or the same score with more digits; None if there is none."""
    return max((s for s in scores if s.name == scores[-1].name), key=lambda s: (s.digits, s.line), default=None)


def _repeated(score: Score, scores: list[Score]) -> Score | None:
    """The earlier score that a line named round trip only prints again: its name tells how it was made."""
    figures = score.val_loss, score.val_bpb, score.digits
    same = [s for s in scores if s.line < score.line and figures == (s.val_loss, s.val_bpb, s.digits)]
    same = [s for s in same if s.name != score.name and "roundtrip" not in s.name]
    return same[-1] if same and "roundtrip" in score.name else None


def read(text: str) -> Log:
    """Parse a log: metrics are recognised at the start of a line, settings only before the first metric."""
    lines, cut = _lines(text)
    log = Log(notes=["the log ends in the middle of a line, which is left out"] if cut else [], cut=cut)
    in_block = False
    for number, line in lines:
        if in_block and (setting := re.fullmatch(r"\s+(\w+):(?: (.*))?", line)):
            log.config[setting[1].lower()] = _typed(setting[2] or "")
            continue
        in_block = line == "Hyperparameters:"
        if match := STEP.match(line):
            _add_step(log, match, number)
        elif match := SCORE.match(line):
            log.scores.append(_score(match, number))
        elif match := SIZE.match(line):
            codec = match[2] or (match[3] or "").replace("_", "+")
            log.sizes.append(Size(match[1] or "Serialized model", codec, int(match[4]), number))
            if cap := re.search(r"\(.*\bcap:(\d+)", line):
                log.cap = int(cap[1])
        elif match := TOTAL.match(line):
            total = int((match[1] or match[3]).replace(",", ""))
            log.sizes.append(Size("Total submission size", "of the artifact", total, number))
            log.cap = int(match[2] or log.cap)
        elif match := re.match(r"stopping_early:\s*(\w+)", line):
            log.stopped_by = "wallclock" if match[1].startswith("wallclock") else match[1]
            log.seconds = _train_seconds(line) or log.seconds
        elif match := re.match(r"Running (Python|PyTorch) (\S+)", line):
            log.environment["torch" if match[1] == "PyTorch" else "python"] = match[2]
        elif match := re.match(r"\|\s+\d+\s+(NVIDIA .*?)\s+(?:On|Off)\s+\|", line):
            log.environment["device_name"] = match[1]
        elif re.match(r"(swa|ema|lawa):applying", line):
            log.averaged = True
        elif LATE_SETTING.match(line) or not (log.rows or log.scores or log.sizes):
            log.config |= _settings(line)
    if log.stopped_by is None and log.rows and log.steps == log.iterations:
        log.stopped_by = "iterations"
    return log


def _lines(text: str) -> tuple[list[tuple[int, str]], str]:
    """Numbered lines without time stamps and source code, and the last line if it is incomplete.

    A last line without a newline is complete if it ends like one: both figures of a score have as many digits.
    """
    raw = text.split("\n")
    plain = ((n, _plain(line)) for n, line in enumerate(raw, 1))
    lines = [(n, line) for n, line in plain if line is not None]
    last = lines[-1][1][-MAX_LINE:] if lines and lines[-1][0] == len(raw) else ""
    if score := re.search(rf"{VALIDATION}(?:\s.*)?$", last):
        complete = _digits(score[1]) == _digits(score[2])
    else:
        complete = re.search(r"\d bytes( \(.*\))?$", raw[-1][-MAX_LINE:])
    cut = last if last and not complete else ""
    sections = [[]]
    for line in lines[: -1 if cut else None]:
        sections[-1].append(line)
        if RULE.fullmatch(line[1]):
            sections.append([])
    return [line for part in sections if not _is_source(part) for line in part if len(line[1]) <= MAX_LINE], cut


def _plain(line: str) -> str | None:
    """A line without the colours, progress bars, ranks and times around it; None for all ranks but the first."""
    line = COLOUR.sub("", line.rstrip().rpartition("\r")[2])
    if rank := RANK.match(line):
        if int(rank[1]):
            return None
        line = line[rank.end() :]
    return line[stamp.end() :] if (stamp := STAMP.match(line)) else line


def _is_source(section: list[tuple[int, str]]) -> bool:
    """True for lines of Python, which import and define."""
    texts = [text for _, text in section]
    return any(map(IMPORT.match, texts)) and any(map(DEFINITION.match, texts))


def _settings(line: str) -> dict:
    """Settings in a line: 'seed:1337', 'iterations:20000 warmup_steps:20', 'train_shards: 80', 'qat:int6 for mlp'.

    Pairs after a heading get its name: 'sdp_backends:cudnn=False flash=True' gives sdp_backends.cudnn and .flash.
    """
    if line.endswith(")"):
        line = re.sub(r"(?<=\d) \((.*)\)$", lambda m: f" {m[1]}" if PAIRS.fullmatch(m[1]) else "", line)
    head, _, rest = line.partition(":")
    under = rest.removeprefix("start ").strip()
    if PAIRS.fullmatch(line) and not rest.startswith("start "):
        found = re.findall(PAIR, line)
        found = [(VAL_LOADER.get(name, name), value) for name, value in found] if head == "val_loader" else found
    elif PAIRS.fullmatch(under):
        heading = "" if head == "environment" else f"{head}."  # environment: pgolf's own knobs
        found = [(heading + name, value) for name, value in re.findall(PAIR, under)]
    elif re.fullmatch(r"[a-z]\w*", head) and re.match(r" ?\S+( \(.*\))?$|[\w.]", rest):
        found = [(head, re.sub(r"^([\d.]+) [a-z ]+$", r"\1", under))]
    else:
        return {}
    # 1/20 is a counter: warmup_step:1/20.
    return {k.lower(): _typed(v) for k, v in found if not (NOT_CONFIG.fullmatch(k) or re.fullmatch(r"\d+/\d+", v))}


def _typed(text: str) -> object:
    try:
        value = json.loads({"True": "true", "False": "false", "None": "null"}.get(text, text))
    except ValueError:
        return text
    return text if isinstance(value, str | dict) or (isinstance(value, float) and not math.isfinite(value)) else value


def _digits(figure: str) -> int:
    return len(figure.partition(".")[2])


def _finite(text: str) -> float | None:
    return value if math.isfinite(value := float(text)) else None


def _train_seconds(line: str) -> float | None:
    match = TRAIN_TIME.search(line)
    return round(float(match[1]) * SECONDS[match[2]], 3) if match else None


def _add_step(log: Log, match: re.Match, number: int) -> None:
    step = int(match[1])
    if log.rows and step < log.steps:  # a second training in the same file, or a resumed one
        log.notes.append(f"line {number} goes back from step {log.steps} to {step}; the steps it replaces are left out")
        log.rows = [row for row in log.rows if row["step"] < step]
        log.scores, log.sizes, log.stopped_by = [], [], None
    named = zip(("val_loss", "val_bpb", "train_loss"), match.groups()[2:], strict=True)
    row = {"step": step} | {name: _finite(figure) for name, figure in named if figure is not None}
    if (seconds := _train_seconds(match.string)) is not None:
        row["train_seconds"] = log.seconds = seconds
    log.rows.append(row)
    log.iterations = int(match[2])


def _score(match: re.Match, number: int) -> Score:
    label, loss, bpb = match.groups()
    stride, ms = re.search(r"stride[:=](\d+)", match.string), re.search(r"eval_time:\s*(\d+)ms", match.string)
    figures = _finite(loss), _finite(bpb), number, _digits(bpb)
    return Score(label, *figures, stride and int(stride[1]), ms and int(ms[1]) / 1000)
