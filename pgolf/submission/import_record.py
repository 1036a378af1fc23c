"""A public record folder becomes runs with claims, findings, and a sweep file that repeats it.

In runs/<record>/ lie the runs of its logs, legality_<record>.json with the findings, and repeat_<record>.yaml. No code
of the folder is run.
"""

import json
import re
import textwrap
from dataclasses import asdict, dataclass
from pathlib import Path

from pgolf.analysis import claims, records
from pgolf.analysis.log_lines import typed
from pgolf.analysis.records import Imported, Source
from pgolf.analysis.training_logs import LogError
from pgolf.disk import open_regular, read_json
from pgolf.runs.directory import folder_name
from pgolf.submission import foreign_script, record_folder
from pgolf.submission.conditions import Verdict
from pgolf.submission.foreign_knobs import TRACK, Mapped, mapped
from pgolf_core.config import ConfigError, RunConfig
from pgolf_core.files import atomic_write
from pgolf_core.knobs import DataConfig, EvalConfig, ExportConfig, ModelConfig, RegularizerConfig, TrainConfig
from pgolf_core.model import skeleton

LEGALITY = "legality_"  # begins the names of files of findings
OWN = ["config.json"]  # tells everything of a record that `pgolf submission` wrote
OF_A_RUN = {"seed", "world_size", "track"}
OF_PROCESSES = {"world_size", "grad_accum_steps"}  # the defaults of scripts are those of one process
GROUPS = (ModelConfig, DataConfig, TrainConfig, RegularizerConfig, ExportConfig, EvalConfig)
CODE_ALONE = (
    "Only code tells mlp_slope, orthogonal_init, smear_gate, document_mask, muon_polar_express and the order of text, "
    "and there is no script here: compare them with the record's."
)
FINEWEB = "Its text is FineWeb: -k data_path=FOLDER names shards of it, else the embedded corpus is used."
BLOCK = re.compile(r"^ *(```|~~~)[^\n]*\n(.*?)^ *\1", re.MULTILINE | re.DOTALL)
SETTING = re.compile(r"""\b([A-Z][A-Z0-9_]{2,40})=(?:"([^"$\n]*)"|'([^'$\n]*)'|([^\s"'$\\]+))""")
WIDTH, LONGEST = 118, 60  # characters of a line of comments, and of a value in one


@dataclass(frozen=True)
class ImportedRecord:
    folder: Path
    runs: list[Imported]
    remarks: list[str]
    verdicts: list[Verdict]
    sweep: Path
    said: str  # whether the sweep file loads, and whether its model is the record's


def records_in(start: Path) -> list[Path]:
    """The record folders in and below a folder: those with a submission.json, else the folder itself. LogError."""
    if not start.is_dir():
        raise LogError(f"{start}: no such folder; a lone log is read by `pgolf import-log`")
    inside = sorted(path.parent for path in start.rglob(claims.SUBMISSION) if path.is_file())
    return [start] if start in inside or not inside else inside


def import_record(folder: Path, sweep: str | None, root: Path) -> ImportedRecord:
    """Import one record folder into root; a sweep file that is there already stays. Raises LogError, as import_logs.

    sweep: folder below root; default: the record's name. Everything is read before anything is written.
    """
    verdicts, sources = record_folder.of_folder(folder), records.logs_below(folder, {}, [])
    name = folder_name(folder.resolve().name)
    content, said = _sweep(folder, name, [*sources.values()])
    runs, remarks = [], [f"{folder}: no training log, so no run"]
    if sources:
        runs, remarks = records.import_logs([folder], sweep or name, root)
    place = root / folder_name(sweep or name)
    place.mkdir(parents=True, exist_ok=True)
    found = {"source": str(folder), "verdicts": [asdict(verdict) for verdict in verdicts]}
    atomic_write(place / f"{LEGALITY}{name}.json", json.dumps(found, indent=1))
    file = place / f"{folder_name(f'repeat_{name}')}.yaml"
    if not file.exists():
        atomic_write(file, content)
    elif file.read_text(encoding="utf-8") != content:
        said += " It was there already, and stays as it is: delete it to have it written again."
    return ImportedRecord(folder, runs, remarks, verdicts, file, said)


def _sweep(folder: Path, name: str, sources: list[Source]) -> tuple[str, str]:
    """The text of the sweep file, and a sentence or two about it."""
    submission = claims.parsed(claims.read_claims(folder)) or {}
    source = max(sources, key=lambda s: (bool(s.log.final), len(s.log.config)), default=None)
    own, log = _own_config(folder), source.log if source else None
    if own:
        done, read = Mapped({name: (getattr(own, name), "") for name in own.model_dump(exclude=OF_A_RUN)}), OWN
        track, nproc = own.track, own.world_size
    else:
        settings, unread, code, read = _settings(folder, source)
        done, track, nproc = mapped(settings, unread, code, log), TRACK, settings.get("world_size", 8)
    knobs = {knob: value for knob, (value, _) in done.knobs.items()}
    try:
        config = RunConfig({}, track=track, world_size=nproc, **knobs)
        said, knobs = _compared(config, log.parameters if log else None), config.model_dump()
    except ConfigError as error:
        said = f"The file does not load as it is: {' '.join(str(error).split())}."
    base = RunConfig({}, track=track).model_dump()
    equal = {knob: done.knobs[knob][1] for knob in sorted(done.knobs) if knobs[knob] == base[knob]}
    changed = [[k for k in group.model_fields if k in done.knobs and k not in equal] for group in GROUPS]
    score = submission.get("val_bpb")
    title = f"{name}, {f'{score} bits per byte' if claims.is_figure(score) else 'no score claimed'}"
    lines = [
        *_heading(f"Record {title}.", said, done, equal, read), f'question: "Does it repeat here: {title}?"',
        *[f"track: {track}"] * bool(track), "control: record", f"nproc: {nproc}",
        f"seeds: {_seeds(submission, sources)}", "base:" if any(changed) else "base: {}",
    ]  # fmt: skip
    for group in filter(None, changed):
        for knob in group:
            note = _plain(done.knobs[knob][1])
            lines.append(f"  {knob}: {json.dumps(knobs[knob], default=str)}" + f"  # {note}" * bool(note))
        lines.append("")
    return "\n".join([*lines, "runs:", "  record: {}", ""]), said


def _own_config(folder: Path) -> RunConfig | None:
    """The config of a record that `pgolf submission` wrote; None of another's."""
    content = read_json(folder / "config.json") or {}
    try:
        return RunConfig({}, **content) if RunConfig.model_fields.keys() <= content.keys() else None
    except ConfigError:
        return None


def _seeds(submission: dict, sources: list[Source]) -> list[int]:
    """Claimed seeds, else logged ones, else that of the trainers' default."""
    claimed = [int(seed) for seed in claims.claims_by_seed(submission)[0] if len(seed) < 10]
    logged = sorted({s.log.seed for s in sources if s.log.final and s.log.seed is not None})
    return claimed or logged or [RunConfig.model_fields["seed"].default]


def _settings(folder: Path, source: Source | None) -> tuple[dict[str, object], dict[str, str], str, list[str]]:
    """Settings by name: those of the log, else of the README's command, else the code's defaults.

    Then those that only running would tell, the code ('' if there is none), and what was read.
    """
    try:
        with open_regular(folder / record_folder.SCRIPT, foreign_script.MAX_SOURCE) as file:
            code = foreign_script.unpacked(file.read())
    except OSError:
        printed = source.content.decode(errors="replace") if source else ""
        code = printed if foreign_script.has_class(printed) else ""
    defaults, unread = foreign_script.settings_in(code)
    defaults = {name: value for name, value in defaults.items() if name not in OF_PROCESSES}
    readme = record_folder.readme_of(folder)
    commands = [block for _, block in BLOCK.findall(readme) if record_folder.SCRIPT in block]
    given = [(name.lower(), "".join(value)) for name, *value in SETTING.findall("".join(commands[:1]))]
    settings = defaults | {name: typed(text) for name, text in given} | (source.log.config if source else {})
    read = ["log"] * bool(source) + ["README"] * bool(readme) + ["script"] * bool(code)
    return settings, unread, code, read


def _compared(config: RunConfig, theirs: int | None) -> str:
    """Whether the model has as many parameters as the log says."""
    ours = sum(p.numel() for p in skeleton(config.model).parameters())
    said = f"GPT has {ours:,} parameters with these knobs"
    if theirs is None:
        return f"{said}; no log says how many the record has."
    why = "something of its model is missing here, so this is not the record yet"
    return f"{said}, as many as its log says." if ours == theirs else f"{said}, and its log says {theirs:,}: {why}."


def _plain(value: object) -> str:
    """A value in a comment: printable, on one line, not too long."""
    text = ascii(value).strip("'\"")
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}~"


def _heading(title: str, said: str, done: Mapped, equal: dict[str, str], read: list[str]) -> list[str]:
    """Comments: all that is not a knob below."""
    within, missing = (
        ", ".join(f"{_plain(name)}={_plain(value)}" for name, value in sorted(settings.items()))
        for settings in (done.within, done.missing)
    )
    same = ", ".join(f"{knob} ({_plain(note)})" if note else knob for knob, note in equal.items())
    told = f"Read, not run: its {', '.join(read)}. Behind a value: the name that it has there, or where it is from."
    parts = [
        f"{title} Written by `pgolf import-record`. {told}", said,
        FINEWEB if read != OWN else "", CODE_ALONE if "script" not in read and read != OWN else "",
        f"As our defaults: {same}." if same and read != OWN else "",
        f"Within knobs of other names: {within}." if within else "",
        f"No counterpart here: {missing}." if missing else "",
        f"Off there, without counterpart here: {', '.join(map(_plain, sorted(done.off)))}." if done.off else "",
        f"Paths and facts of its runs: {', '.join(map(_plain, sorted(done.facts)))}." if done.facts else "",
    ]  # fmt: skip
    wrapped = (textwrap.wrap(part, WIDTH, break_on_hyphens=False) for part in parts if part)
    return [f"# {line}" for lines in wrapped for line in lines]
