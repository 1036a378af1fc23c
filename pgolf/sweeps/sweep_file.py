"""A sweep file → a checked Sweep: every knob, name and notebook parameter, before anything runs.

name: demo                # folder under runs/; default: the file's name
question: one sentence    # what the sweep asks
track: nano
control: control          # the baseline run that others are compared with
nproc: 8                  # processes, one GPU each, that train a run together: the knob world_size of all runs
base: {num_layers: 2}     # knobs of all runs
runs:                     # knobs of each on top of base
  control: {}
  int6: {weight_quantization_bits: 6}
grid: {num_layers: [2, 3], model_dim: [160, 192]}  # every combination is a run too: num_layers2-model_dim160 …
seeds: [1337, 1338]       # every run once per seed: control, control-s1338; the seed of base adds nothing to names
repeats: 2                # every run that many times with the same knobs: control_a, control_b …
stages:                   # after training, in order, on the best run that fits its cap
  - train                 # train.ipynb: always the first, named or not
  - sensitivity: {tokens: 32768}  # sensitivity.ipynb and its parameters

One entry of runs: or grid:, over all seeds and repeats, is a seed group: statistics compare groups, pairing seeds.
"""

import ast
import itertools
import json
import re
import string
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from pgolf.runs import directory
from pgolf.sweeps.proxy import proxy_config, proxy_parameters
from pgolf_core.config import ROOT, ConfigError, RunConfig, did_you_mean

NOTEBOOKS = ROOT / "notebooks"
KEYS = ("name", "question", "track", "control", "nproc", "base", "runs", "grid", "seeds", "repeats", "stages")
SHAPES = {
    "base": (dict, "a mapping of knobs"), "runs": (dict, "a mapping of run names"),
    "grid": (dict, "a mapping from knobs to lists"), "seeds": (list, "a list"), "stages": (list, "a list"),
}  # fmt: skip
SCALES = ("nano",)  # a sweep can be shrunk to these
GIVEN = ("sweep", "run", "track", "knobs")  # parameters that a sweep gives every notebook; stages get `source` too
NEEDED_BY_STAGES = ("final_roundtrip_eval", "save_raw_checkpoint")
LETTERS = string.ascii_lowercase  # suffixes of repeats
NO_FOLDER_NAME = r"[^A-Za-z0-9_.+=-]+"


class SweepError(ValueError):
    """A sweep that cannot run as its file says; the message names everything that is wrong with it."""


@dataclass(frozen=True)
class Stage:
    notebook: str  # without .ipynb; also the name of the stage's run
    parameters: dict


@dataclass(frozen=True)
class Sweep:
    """A checked sweep file: every run's config is resolved, every notebook exists."""

    name: str
    question: str
    baseline: str  # the group that others are compared with (`control:`); '' = none
    runs: dict[str, RunConfig]
    groups: dict[str, str]  # run -> its seed group: the entry of runs: or grid: that it stems from
    changes: dict[str, list[str]]  # group -> knobs that its entry sets: the differences it claims
    train_parameters: dict = field(default_factory=dict)
    stages: tuple[Stage, ...] = ()

    @property
    def directory(self) -> Path:
        return directory.RUNS / self.name

    @property
    def run_dirs(self) -> list[Path]:
        """Folders of all runs and stages."""
        return [self.directory / name for name in [*self.runs, *(stage.notebook for stage in self.stages)]]


class _Loader(yaml.SafeLoader):
    """YAML whose keys are text as written (`010`, `on`), each at most once.

    Plain YAML reads `010` as 8 and lets the second of two equal run names win silently.
    """

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise SweepError(f"line {key.start_mark.line + 1}: a key must be text")
            if key.value in seen:
                raise SweepError(f"line {key.start_mark.line + 1}: {key.value} is there twice")
            seen.add(key.value)
            if key.tag != "tag:yaml.org,2002:merge":
                key.tag = "tag:yaml.org,2002:str"
        return super().construct_mapping(node, deep)


def load_sweep(path: str | Path, knobs: dict | None = None, scale: str = "", seeds: list[int] | None = None) -> Sweep:
    """Read and check a whole sweep file; knobs and seeds override it.

    scale='nano' shrinks every run to a minute on one CPU thread (proxy.proxy_config) and adds -nano to the name; a
    sweep on the nano track is small already.

    Raises FileNotFoundError, or one SweepError that names every problem.
    """
    path = Path(path)
    if scale and scale not in SCALES:
        raise SweepError(_no_such("scale", scale, SCALES))
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (yaml.YAMLError, UnicodeDecodeError, SweepError) as error:
        raise SweepError(f"{path}: {error}") from error
    if not isinstance(content, dict):
        raise SweepError(f"{path}: a sweep is a mapping with runs: or grid:, not {type(content).__name__}")
    content |= {"seeds": seeds} if seeds else {}
    problems = _shape_problems(content)
    sweep = None if problems else _check(content, path.stem, knobs or {}, scale, problems)
    if problems:
        raise SweepError(f"{path}:\n" + "\n".join(f"  - {problem}" for problem in problems))
    return sweep


def _shape_problems(content: dict) -> list[str]:
    """Everything that makes the content no sweep file, whatever its knobs and notebooks."""
    problems = [_no_such("key", key, KEYS) for key in content if key not in KEYS]
    for key, (kind, text) in SHAPES.items():
        if content.get(key) is not None and not isinstance(content[key], kind):
            problems.append(f"{key}: expected {text}, found {content[key]!r}")
    if problems:
        return problems
    runs, grid = content.get("runs") or {}, content.get("grid") or {}
    for name, own in runs.items():
        if not isinstance(own, dict | None):
            problems.append(f"runs: {name}: expected a mapping of knobs, found {own!r}")
    for knob, values in grid.items():
        if not isinstance(values, list) or not values:
            problems.append(f"grid: {knob}: expected a list of values, found {values!r}")
    problems += [f"seeds: {s!r} is no whole number" for s in content.get("seeds") or () if type(s) is not int]
    repeats = content.get("repeats", 1)
    if type(repeats) is not int or not 1 <= repeats <= len(LETTERS):
        problems.append(f"repeats: {repeats!r}: expected a whole number from 1 to {len(LETTERS)}")
    if not (runs or grid):
        problems.append("no runs; give runs: or grid:")
    if content.get("nproc") is not None and any(
        "world_size" in own for own in (content.get("base") or {}, grid, *runs.values()) if isinstance(own, dict)
    ):
        problems.append("nproc and world_size are the same; give one of them")
    return problems


def _check(content: dict, stem: str, knobs: dict, scale: str, problems: list[str]) -> Sweep:
    """The sweep, valid only if no problem was appended."""
    base, seeds = content.get("base") or {}, content.get("seeds") or []
    if (nproc := content.get("nproc")) is not None:
        base = {"world_size": nproc} | base
    entries = _entries(content.get("runs") or {}, content.get("grid") or {})
    baseline = str(content.get("control") or "")
    if baseline and baseline not in dict(entries):
        problems.append(_no_such("control: run", baseline, dict(entries)))
    if seeds:
        problems += [f"{name}: sets seed, and the sweep has seeds" for name, own in entries if "seed" in own]
        problems += ["-k seed: the sweep has seeds; give one or the other"] if "seed" in knobs else []
    runs = _expand(entries, seeds, content.get("repeats", 1), base.get("seed", RunConfig.model_fields["seed"].default))
    groups = {name: group for name, group, _ in runs}
    train_parameters, stages = _stages(content.get("stages") or [], problems)
    sweep_name = str(content.get("name") or stem)
    _check_names(sweep_name, [name for name, *_ in runs] + [stage.notebook for stage in stages], problems)
    track = content.get("track") or ""
    shrink = scale == "nano" and track != "nano"
    own_knobs = {name: {"track": track} | base | own for name, _, own in runs}
    configs = _resolve(own_knobs, groups, knobs, shrink, problems)
    if shrink:
        sweep_name += "-nano"
        stages = tuple(Stage(s.notebook, proxy_parameters(s.parameters)) for s in stages)
    for knob in NEEDED_BY_STAGES if stages else ():
        if lacking := [name for name, config in configs.items() if not getattr(config, knob)]:
            problems.append(f"run {', '.join(lacking)}: {knob}=0, and the stages after training need it")
    changes = {group: sorted(own) for group, own in entries}
    question = str(content.get("question") or "")
    return Sweep(sweep_name, question, baseline, configs, groups, changes, train_parameters, stages)


def _entries(runs: dict, grid: dict) -> list[tuple[str, dict]]:
    """Name and own knobs of each entry of runs:, then of each combination of grid:."""
    entries = [(name, dict(own or {})) for name, own in runs.items()]
    for values in itertools.product(*grid.values()) if grid else ():
        point = dict(zip(grid, values, strict=True))
        name = "-".join(re.sub(NO_FOLDER_NAME, "-", f"{knob}{value}") for knob, value in point.items())
        entries.append((name, point))
    return entries


def _expand(entries: list[tuple[str, dict]], seeds: list[int], repeats: int, usual: int) -> list[tuple[str, str, dict]]:
    """Name, group and own knobs of each run: every entry with every seed, repeated."""
    runs = []
    for (group, own), seed, letter in itertools.product(entries, seeds or [None], LETTERS[:repeats]):
        # The usual seed adds nothing to the name: runs that are complete keep theirs when seeds are added.
        name = group + ("" if seed in (None, usual) else f"-s{seed}") + (f"_{letter}" if repeats > 1 else "")
        runs.append((name, group, own | ({} if seed is None else {"seed": seed})))
    return runs


def _resolve(
    own_knobs: dict[str, dict], groups: dict[str, str], knobs: dict, shrink: bool, problems: list[str]
) -> dict[str, RunConfig]:
    """Every run's config. A problem that several runs share is reported once, naming them all."""
    configs, bad = {}, {}
    for name, own in own_knobs.items():
        try:
            configs[name] = proxy_config(RunConfig(**own), knobs) if shrink else RunConfig(**own | knobs)
        except ConfigError as error:
            for problem in str(error).splitlines()[1:]:
                bad.setdefault(problem.removeprefix("  - "), []).append(name)
    for problem, names in bad.items():
        problems.append(("every run" if names == list(own_knobs) else "run " + ", ".join(names)) + f": {problem}")
    same: dict[str, str] = {}
    for name, config in configs.items():
        if groups[same.setdefault(config.hash, name)] != groups[name]:
            at_scale = " at scale nano, which sets steps, batches and heads itself" if shrink else ""
            problems.append(f"runs {same[config.hash]} and {name} have the same knobs{at_scale}; one is enough")
    return configs


def _check_names(sweep: str, names: list[str], problems: list[str]) -> None:
    """Names are folders: on Windows too, and on disks that ignore case."""
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
        named = {entry: None} if isinstance(entry, str) else entry
        if isinstance(named, dict) and len(named) == 1 and isinstance(next(iter(named.values())), dict | None):
            stages += [Stage(name, dict(parameters or {})) for name, parameters in named.items()]
        else:
            problems.append(f"stages: expected a notebook's name, or name: {{parameter: value}}, found {entry!r}")
    if not stages or stages[0].notebook != "train":
        stages.insert(0, Stage("train", {}))
    _check_stage(stages[0], [*GIVEN], problems)
    for stage in stages[1:]:
        if stage.notebook == "train":
            problems.append("stages: train is the first, and there once")
        else:
            _check_stage(stage, [*GIVEN, "source"], problems)
    return stages[0].parameters, tuple(stages[1:])


def _check_stage(stage: Stage, given: list[str], problems: list[str]) -> None:
    """Problems of a stage's notebook and parameters. given: parameters that the sweep sets."""
    notebook = NOTEBOOKS / f"{stage.notebook}.ipynb"
    if not notebook.is_file():
        known = [path.stem for path in sorted(NOTEBOOKS.glob("*.ipynb"))]
        problems.append(_no_such("stages: notebook", stage.notebook, known) + f" in {NOTEBOOKS}")
        return
    names = parameter_names(notebook)
    problems += [f"{notebook}: its parameters cell has no {name}" for name in given if name not in names]
    for name in stage.parameters:
        if stage.notebook == "train" and name == "nproc":
            problems.append("stages: train: nproc is a key of the sweep, beside base:")
        elif name in given:
            problems.append(f"stages: {stage.notebook}: {name} is given by the sweep")
        elif name not in names:
            problems.append(_no_such(f"stages: {stage.notebook}: parameter", name, names))


def parameter_names(notebook: str | Path) -> list[str]:
    """Names that the notebook's cell tagged `parameters` assigns.

    papermill's own inspection parses comments and annotations, drops some parameters (`float | None`), and only warns
    about a misspelt one.
    """
    cells = json.loads(Path(notebook).read_text(encoding="utf-8"))["cells"]
    sources = ["".join(c["source"]) for c in cells if "parameters" in c["metadata"].get("tags", [])]
    assigned = []
    for statement in ast.parse(sources[0] if sources else "").body:
        assigned += statement.targets if isinstance(statement, ast.Assign) else [getattr(statement, "target", None)]
    return [target.id for target in assigned if isinstance(target, ast.Name)]


def _no_such(what: str, name: str, known: Collection[str]) -> str:
    return f"{what} {name}: no such" + (did_you_mean(name, known) or f"; there are {', '.join(known)}")
