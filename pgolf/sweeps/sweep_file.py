"""A sweep file → a checked Sweep: every knob, name and notebook parameter, before anything runs.

name: demo                # folder under runs/; default: the file's name
question: one sentence    # what the sweep asks
track: nano
control: control          # the run that others are compared with
nproc: 8                  # processes, a GPU each, that train a run together: the knob world_size of all runs
base: {num_layers: 2}     # knobs of all runs
runs:                     # knobs of each on top of base
  control: {}
  int6: {weight_quantization_bits: 6}
grid: {num_layers: [2, 3], model_dim: [160, 192]}  # every combination is a run too: num_layers2-model_dim160 …
seeds: [1337, 1338]       # every run once for each: control, control-s1338; the seed of base adds nothing to names
repeats: 2                # every run so often with the same knobs: control_a, control_b …
stages:                   # after training, in order, on the best run that fits its cap
  - train                 # train.ipynb: always the first, named or not
  - sensitivity: {tokens: 32768}  # sensitivity.ipynb and its parameters

What one entry of runs: or grid: makes, over all seeds and repeats, is an arm: statistics compare arms, pairing seeds.
"""

import ast
import difflib
import itertools
import json
import re
import string
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from pgolf.runs import directory
from pgolf.sweeps.proxy import at_nano, budgets_at_nano
from pgolf_core.config import ROOT, ConfigError, RunConfig

NOTEBOOKS = ROOT / "notebooks"
KEYS = ("name", "question", "track", "control", "nproc", "base", "runs", "grid", "seeds", "repeats", "stages")
SCALES = ("nano",)  # what a sweep can be shrunk to
GIVEN = ("sweep", "run", "track", "knobs")  # parameters that a sweep gives every notebook; to stages `source` too


class SweepError(ValueError):
    """A sweep that cannot run as its file says; the message names everything that is wrong with it."""


@dataclass(frozen=True)
class Stage:
    notebook: str  # its name without .ipynb, and that of the stage's run
    parameters: dict


@dataclass(frozen=True)
class Sweep:
    """A checked sweep file: every run's config is resolved, every notebook there."""

    name: str
    question: str
    control: str  # the arm that others are compared with; '' = none
    runs: dict[str, RunConfig]
    arms: dict[str, str]  # run -> the entry that it stems from
    changes: dict[str, list[str]]  # arm -> knobs that its entry sets: what it claims to change
    train_parameters: dict = field(default_factory=dict)
    stages: tuple[Stage, ...] = ()

    @property
    def directory(self) -> Path:
        return directory.RUNS / self.name


class _OnceLoader(yaml.SafeLoader):
    """YAML in which a key may stand only once: the second of two equal run names would silently win."""

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key, _ in node.value:
            if key.value in seen:
                raise SweepError(f"line {key.start_mark.line + 1}: {key.value} is there twice")
            if isinstance(key, yaml.ScalarNode):
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def load_sweep(path: str | Path, knobs: dict | None = None, scale: str = "", seeds: list[int] | None = None) -> Sweep:
    """Read and check a whole sweep file; knobs and seeds are stronger than all of it.

    scale='nano' shrinks every run to a minute on one CPU thread, as scale.at_nano says, and adds -nano to the name;
    a sweep on the nano track is small as it stands.

    Raises FileNotFoundError, or one SweepError that names every problem.
    """
    path = Path(path)
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _OnceLoader)
    except (yaml.YAMLError, UnicodeDecodeError, SweepError) as error:
        raise SweepError(f"{path}: {error}") from error
    if not isinstance(content, dict):
        raise SweepError(f"{path}: a sweep is a mapping with runs: or grid:, not {type(content).__name__}")
    problems: list[str] = []
    if scale and scale not in SCALES:
        raise SweepError(_no_such("scale", scale, SCALES))
    sweep = _check(content | ({"seeds": seeds} if seeds else {}), path.stem, knobs or {}, scale, problems)
    if problems:
        raise SweepError(f"{path}:\n" + "\n".join(f"  - {p}" for p in problems))
    return sweep


def _check(content: dict, stem: str, knobs: dict, scale: str, problems: list[str]) -> Sweep | None:
    """The sweep, None or anything once problems is not empty: every problem found is appended to it."""
    problems += [_no_such("key", key, KEYS) for key in content if key not in KEYS]
    for key, kind, text in [
        ("base", dict, "a mapping of knobs"), ("runs", dict, "a mapping of run names"),
        ("grid", dict, "a mapping from knobs to lists"), ("seeds", list, "a list"), ("stages", list, "a list"),
    ]:  # fmt: skip
        if content.get(key) is not None and not isinstance(content[key], kind):
            problems.append(f"{key}: expected {text}, found {content[key]!r}")
    if problems:
        return None
    base, named, grid = content.get("base") or {}, content.get("runs") or {}, content.get("grid") or {}
    seeds = content.get("seeds") or []
    problems += [f"runs: {name}: expected a mapping of knobs, found {v!r}" for name, v in named.items()
                 if not isinstance(v, dict | None)]  # fmt: skip
    problems += [f"grid: {knob}: expected a list of values, found {v!r}" for knob, v in grid.items()
                 if not isinstance(v, list) or not v]  # fmt: skip
    problems += [f"seeds: {seed!r} is no whole number" for seed in seeds if type(seed) is not int]
    repeats = content.get("repeats", 1)
    if type(repeats) is not int or not 1 <= repeats <= len(string.ascii_lowercase):
        problems.append(f"repeats: {repeats!r}: expected a whole number from 1 to {len(string.ascii_lowercase)}")
    if not (named or grid):
        problems.append("no runs; give runs: or grid:")
    if (nproc := content.get("nproc")) is not None:
        if any("world_size" in own for own in (base, grid, *(v for v in named.values() if isinstance(v, dict)))):
            problems.append("nproc and world_size are the same; give one of them")
        base = {"world_size": nproc} | base
    if problems:
        return None

    wanted = [(str(name), dict(v or {})) for name, v in named.items()]
    for values in itertools.product(*grid.values()) if grid else ():
        point = dict(zip(grid, values, strict=True))
        wanted.append(("-".join(f"{knob}{value}" for knob, value in point.items()), point))
    control = str(content.get("control") or "")
    if control and control not in dict(wanted):
        problems.append(_no_such("control: run", control, list(dict(wanted))))
    if seeds:
        problems += [f"{name}: sets seed, and the sweep has seeds" for name, own in wanted if "seed" in own]
        problems += ["-k seed: the sweep has seeds; give one or the other"] if "seed" in knobs else []
    arms, runs_of = {}, []
    usual = base.get("seed", RunConfig.model_fields["seed"].default)
    for arm, own in wanted:
        for seed in seeds or [None]:
            for letter in string.ascii_lowercase[:repeats]:
                # A name stays what it is when seeds are added: what is complete is not done again.
                name = arm + ("" if seed in (None, usual) else f"-s{seed}") + (f"_{letter}" if repeats > 1 else "")
                arms[name] = arm
                runs_of.append((name, own | ({} if seed is None else {"seed": seed})))

    train_parameters, stages = _stages(content.get("stages") or [], problems)
    sweep_name = str(content.get("name") or stem)
    _check_names(sweep_name, [name for name, _ in runs_of] + [stage.notebook for stage in stages], problems)
    track = {"track": content.get("track") or ""}
    shrink = scale == "nano" and track["track"] != "nano"
    configs = _resolve(track | base, dict(runs_of), arms, knobs, shrink, problems)
    if shrink:
        sweep_name += "-nano"
        stages = tuple(Stage(s.notebook, budgets_at_nano(s.parameters)) for s in stages)
    for knob in ("final_roundtrip_eval", "save_raw_checkpoint") if stages else ():
        if lacking := [name for name, config in configs.items() if not getattr(config, knob)]:
            problems.append(f"run {', '.join(lacking)}: {knob}=0, and the stages after training need it")
    changes = {arm: sorted(str(knob) for knob in own) for arm, own in wanted}
    question = str(content.get("question") or "")
    return Sweep(sweep_name, question, control, configs, arms, changes, train_parameters, stages)


def _resolve(
    base: dict, wanted: dict[str, dict], arms: dict[str, str], knobs: dict, shrink: bool, problems: list[str]
) -> dict[str, RunConfig]:
    """Every run's config. A problem that several runs share is said once, naming them all."""
    configs, bad = {}, {}
    for name, own in wanted.items():
        own = {str(knob): value for knob, value in (base | own).items()}
        try:
            configs[name] = at_nano(RunConfig(**own), knobs) if shrink else RunConfig(**own | knobs)
        except ConfigError as error:
            for problem in str(error).splitlines()[1:]:
                bad.setdefault(problem.removeprefix("  - "), []).append(name)
    for problem, names in bad.items():
        problems.append(("every run" if names == list(wanted) else "run " + ", ".join(names)) + f": {problem}")
    same: dict[str, str] = {}
    for name, config in configs.items():
        if arms[same.setdefault(config.hash, name)] != arms[name]:
            at_scale = " at scale nano, which sets steps, batches and heads itself" if shrink else ""
            problems.append(f"runs {same[config.hash]} and {name} have the same knobs{at_scale}; one is enough")
    return configs


def _check_names(sweep: str, names: list[str], problems: list[str]) -> None:
    """Names are folders: on Windows too, and on disks that do not tell A from a."""
    for name in [sweep, *names]:
        reserved = re.fullmatch(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", name.lower())
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.+=-]*(?<!\.)", name) or len(name) > 100 or reserved:
            problems.append(
                f"name {name!r}: cannot be a folder everywhere; use letters, digits, . _ + = -, at most 100 of them"
            )
    seen: dict[str, str] = {}
    for name in names:
        if name.lower() in seen:
            problems.append(f"name {name}: used twice" + (f" (as {seen[name.lower()]})" * (seen[name.lower()] != name)))
        seen[name.lower()] = name


def _stages(entries: list, problems: list[str]) -> tuple[dict, tuple[Stage, ...]]:
    """Parameters of train.ipynb, and the stages after it."""
    stages = []
    for entry in entries:
        match entry:
            case str():
                stages.append(Stage(entry, {}))
            case dict() if len(entry) == 1 and isinstance(next(iter(entry.values())), dict | None):
                [(name, parameters)] = entry.items()
                stages.append(Stage(str(name), dict(parameters or {})))
            case _:
                problems.append(f"stages: expected a notebook's name, or name: {{parameter: value}}, found {entry!r}")
    if not stages or stages[0].notebook != "train":
        stages.insert(0, Stage("train", {}))
    for i, stage in enumerate(stages):
        if i and stage.notebook == "train":
            problems.append("stages: train is the first, and there once")
            continue
        notebook = NOTEBOOKS / f"{stage.notebook}.ipynb"
        if not notebook.is_file():
            there = [p.stem for p in sorted(NOTEBOOKS.glob("*.ipynb"))]
            problems.append(_no_such("stages: notebook", stage.notebook, there) + f" in {NOTEBOOKS}")
            continue
        given = [*GIVEN, "source"] if i else [*GIVEN]
        names = parameter_names(notebook)
        problems += [f"{notebook}: its parameters cell has no {name}" for name in given if name not in names]
        for name in stage.parameters:
            if not i and name == "nproc":
                problems.append("stages: train: nproc is a key of the sweep, beside base:")
            elif name in given:
                problems.append(f"stages: {stage.notebook}: {name} is given by the sweep")
            elif name not in names:
                problems.append(_no_such(f"stages: {stage.notebook}: parameter", name, names))
    return stages[0].parameters, tuple(stages[1:])


def parameter_names(notebook: str | Path) -> list[str]:
    """Names that the notebook's cell tagged `parameters` assigns.

    papermill's own inspection reads comments and annotations and drops some (`float | None`), and of a
    misspelt parameter it only warns.
    """
    cells = json.loads(Path(notebook).read_text(encoding="utf-8"))["cells"]
    sources = ["".join(c["source"]) for c in cells if "parameters" in c["metadata"].get("tags", [])]
    names = []
    for statement in ast.parse(sources[0] if sources else "").body:
        targets = statement.targets if isinstance(statement, ast.Assign) else [getattr(statement, "target", None)]
        names += [target.id for target in targets if isinstance(target, ast.Name)]
    return names


def _no_such(what: str, name: object, there: list[str] | tuple[str, ...]) -> str:
    nearest = difflib.get_close_matches(str(name), there, n=1, cutoff=0.5)
    return f"{what} {name}: no such" + (
        f"; did you mean {nearest[0]}?" if nearest else f"; there are {', '.join(there)}"
    )
