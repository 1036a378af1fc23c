"""Lines of a training log: what surrounds them, and the figures and settings in one.

Every pattern takes time proportional to a line's length: no two neighbouring parts can share the same characters, and
numbers have a bounded number of digits.
"""

import json
import math
import re

MAX_LINE = 4096  # longer lines are no metrics
LARGEST = 2**63 - 1  # what a column of a table holds

COLOUR = re.compile(r"\x1b\[[\d;]*+m")
RANK = re.compile(r"\[(?:rank|default)(\d{1,9})\]: ?")  # torchrun's
STAMP = re.compile(  # of a run script, or of Python's logging
    r"\d{10}\.\d{1,9} |\[?\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d(?:[.,]\d{1,9})?(?:Z|[+-]\d\d:?\d\d)?\]?"
    r"(?: ?\[?INFO\]?:?)? "
)
RULE = re.compile(r"={20,}")  # separates the trainer's source, the machine and the training
IMPORT = re.compile(r"import [\w.]+|from [\w.]+ import ")
DEFINITION = re.compile(r"(async )?def \w+\(|class \w.*:$")

NUMBER = r"([-+]?(?:\d{1,15}(?:\.\d{0,30})?(?:e[-+]?\d{1,3})?|nan|inf))(?![\w.])"
FIGURE = re.compile(rf"(?<!\S)(val_loss|val_bpb|train_loss|loss)[:=][ \t]*+{NUMBER}", re.IGNORECASE)
STEP = re.compile(r"(step[:=] ?)?(\d{1,12})(?:/(\d{1,12}))?(?=[\s:,])")
COUNTER = re.compile(r"\d/\d|\d%|\[")  # of a progress line
WORD = re.compile(r"[\w.+()/-]+")
STRIDE = re.compile(r"stride[:=](\d{1,12})(?!\d)")
EVAL_TIME = re.compile(r"\b(?:eval(?:_time)?|elapsed)[:=] ?(\d{1,12}(?:\.\d{1,9})?)(ms|s)\b")
TRAIN_TIME = re.compile(r"train_time: ?(\d{1,12}(?:\.\d{0,9})?)(ms|s|m)\b")
SECONDS = {"ms": 0.001, "s": 1, "m": 60}

SIZE = re.compile(r" {0,4}([A-Za-z][^:]{0,60}): ?(\d[\d,]{0,18})(?![\d,])(?!\.\d)( ?bytes\b)?")
SIZES = re.compile(r"([\w.+-]{1,40}):(\d{1,15}) code:(\d{1,15}) total:(\d{1,15})(?=\s|$)")
BUDGET = re.compile(r"budget:(\d{1,15})/(\d{1,15})(?=\s|$)")
CAP = re.compile(r"\bcap:(\d{1,15})(?!\d)")
WHOLE = re.compile(r"(?:\d bytes|bytes \([^()]*\)|\d(?:ms|s|m)|MiB|MB\)?|\}|===)$")  # the end of a line that is not cut

PAIR = r"([A-Za-z_][\w.]*+)[:=](\[[^\]]*+\]|(?!\w++[:=][^\\/])[^\s\[:=]\S*+)"
PAIRS = re.compile(rf"{PAIR}(?: {PAIR})*+")
ONE_PAIR = re.compile(PAIR)
SETTING = re.compile(r"\s+(\w+):(?: (.*))?")  # in a block
SEED = re.compile(r"(?:random[ _])?seed ?[:=] ?(\d{1,18})\s*", re.IGNORECASE)
ONE_VALUE = re.compile(r" ?\S++( \(.*\))?$|[\w.]")
COUNTED = re.compile(r"([\d.]+) [a-z ]+")
PROGRESS = re.compile(r"\d+/\d+")  # warmup_step:1/20
NAME = re.compile(r"[a-z]\w*")
NOT_CONFIG = re.compile(
    r"val_bpb|val_loss|step|forecast|nohup|warning|error|note|info|https?|wandb|\w+_time", re.IGNORECASE
)
VAL_LOADER = {"pattern": "val_files", "tokens": "val_tokens"}  # names that are ambiguous outside of that line


def numbered(text: str) -> tuple[list[tuple[int, str]], str]:
    """Numbered lines without time stamps and source code, and the last line if it is incomplete.

    A last line without a newline is complete if it ends like one: both figures of a score have as many digits.
    """
    raw = text.split("\n")
    plain = ((n, _plain(line)) for n, line in enumerate(raw, 1))
    lines = [(n, line) for n, line in plain if line is not None]
    last = lines[-1][1][-MAX_LINE:] if lines and lines[-1][0] == len(raw) else ""
    if "val_bpb" in (found := figures(last)):
        complete = digits(found["val_bpb"]) in (digits(found.get("val_loss", "")), 8)
    else:
        complete = WHOLE.search(raw[-1][-MAX_LINE:])
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
    texts = [text[:MAX_LINE] for _, text in section]
    return any(map(IMPORT.match, texts)) and any(map(DEFINITION.match, texts))


def figures(line: str) -> dict[str, str]:
    """The losses in a line as they are written, by name; `loss` is a training loss."""
    found = {name.lower(): figure for name, figure in FIGURE.findall(line)}
    return ({"train_loss": found.pop("loss")} if "loss" in found else {}) | found


def label(line: str) -> str | None:
    """The words before a score's figures; None if the line is of another kind.

    'ttt_sliding:done val_loss=…' gives ttt_sliding, 'final_window stride:64 val_loss:…' final_window.
    """
    head = line[: FIGURE.search(line).start()]
    words = []
    for word in head.split():
        name, sign, _ = word.partition(":" if ":" in word else "=")
        if sign:
            words = words or [name]
            break
        words.append(word)
    known = words and line[:1].isascii() and line[:1].isalpha() and not COUNTER.search(head)
    return " ".join(words) if known and all(map(WORD.fullmatch, words)) else None


def settings(line: str) -> dict:
    """Settings in a line: 'seed:1337', 'iterations:20000 warmup_steps:20', 'train_shards: 80', 'qat:int6 for mlp'.

    Pairs after a heading get its name: 'sdp_backends:cudnn=False flash=True' gives sdp_backends.cudnn and .flash.
    """
    count, opened, added = line.removesuffix(")").partition(" (")  # model_params:27 (unique_layers:9 loops:1)
    if opened and line[-1] == ")" and count[-1:].isdigit():
        line = f"{count} {added}" if PAIRS.fullmatch(added) else count
    head, _, rest = line.partition(":")
    under = rest.removeprefix("start ").strip()
    if PAIRS.fullmatch(line) and not rest.startswith("start "):
        found = ONE_PAIR.findall(line)
        found = [(VAL_LOADER.get(name, name), value) for name, value in found] if head == "val_loader" else found
    elif PAIRS.fullmatch(under):
        heading = "" if head == "environment" else f"{head}."  # environment: pgolf's own knobs
        found = [(heading + name, value) for name, value in ONE_PAIR.findall(under)]
    elif NAME.fullmatch(head) and ONE_VALUE.match(rest):
        found = [(head, counted[1] if (counted := COUNTED.fullmatch(under)) else under)]
    else:
        return {}
    return {k.lower(): typed(v) for k, v in found if not (NOT_CONFIG.fullmatch(k) or PROGRESS.fullmatch(v))}


def typed(text: str) -> object:
    """A number, truth value, None or list of these if the text is one that a table can hold, else the text."""
    try:
        value = json.loads({"True": "true", "False": "false", "None": "null"}.get(text, text))
    except (ValueError, RecursionError):
        return text
    plain = all(map(_fits, value)) if isinstance(value, list) else _fits(value)
    return value if plain else text


def _fits(value: object) -> bool:
    if isinstance(value, float):
        return math.isfinite(value)
    return value is None or (isinstance(value, int) and abs(value) <= LARGEST)


def digits(figure: str) -> int:
    return len(figure.partition(".")[2])


def finite(text: str) -> float | None:
    return value if math.isfinite(value := float(text)) else None


def seconds(pattern: re.Pattern, line: str) -> float | None:
    match = pattern.search(line)
    return round(float(match[1]) * SECONDS[match[2]], 3) if match else None
