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
over_cap: skip            # a run whose forecast is over its cap is listed, not trained; default: refuse the sweep
stages:                   # after training, on the best run that fits its cap; several at a time
  - train                 # train.ipynb: always the first, named or not
  - sensitivity: {tokens: 32768}  # sensitivity.ipynb and its parameters

One entry of runs: or grid:, over all seeds and repeats, is a seed group: statistics compare groups, pairing seeds.
"""

import ast
import itertools
import json
import math
import re
import string
from collections import defaultdict
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StrictInt, ValidationError

from pgolf.runs import directory
from pgolf.runs.directory import folder_name
from pgolf.sweeps.proxy import proxy_config, proxy_parameters
from pgolf_core.config import PREFIX, ROOT, ConfigError, RunConfig, did_you_mean, environment_knobs, shown

NOTEBOOKS = ROOT / "notebooks"
GIVEN = ("sweep", "run", "track", "knobs")  # parameters that a sweep gives every notebook; stages get `source` too
NEEDED_BY_STAGES = ("final_roundtrip_eval", "save_raw_checkpoint")
MAX_BYTES, MAX_DEPTH, MAX_VALUES, MAX_RUNS = 1_000_000, 20, 20_000, 1_000
MAX_NAMED = 10  # problems, or names in one of them
OTHER_NUMBER = re.compile(r"[-+]?0[0-7_]+|.*:.*")  # octal and base 60, which YAML 1.1 knows
MERGE, TEXT = "tag:yaml.org,2002:merge", "tag:yaml.org,2002:str"
Keys = TypeVar("Keys", bound=BaseModel)
LETTERS = string.ascii_lowercase  # suffixes of repeats


class SweepError(ValueError):
    """A sweep that cannot run as its file says; the message names everything that is wrong with it."""


@dataclass(frozen=True)
class Sweep:
    """A checked sweep file: every run's config is resolved, every notebook exists."""

    name: str
    question: str
    baseline: str  # the group that others are compared with (`control:`); '' = none
    runs: dict[str, RunConfig]
    groups: dict[str, str]  # run -> its seed group: the entry of runs: or grid: that it stems from
    changes: dict[str, list[str]]  # group -> knobs that its entry sets: the differences it claims
    skips_over_cap: bool
    train_parameters: dict
    stages: dict[str, dict]  # notebook without .ipynb, also the name of the stage's run -> its parameters
    family: str = ""  # name of the transfer or scaling study that it belongs to
    scale: str = ""  # its scale in a transfer study

    @property
    def directory(self) -> Path:
        return directory.RUNS / self.name

    @property
    def run_dirs(self) -> list[Path]:
        """Folders of all runs and stages."""
        return [self.directory / name for name in [*self.runs, *self.stages]]


def _stage(entry: object) -> tuple[str, dict]:
    match entry:
        case str():
            return entry, {}
        case dict() if len(entry) == 1 and isinstance(next(iter(entry.values())), dict | None):
            ((notebook, parameters),) = entry.items()
            return notebook, parameters or {}
    raise ValueError("expected a notebook's name, or name: {parameter: value}")


Knobs = Annotated[dict[str, Any], BeforeValidator(lambda knobs: {} if knobs is None else knobs)]


class SweepKeys(BaseModel):
    """The keys of a sweep file and their types; RunConfig checks the knobs."""

    model_config = ConfigDict(extra="forbid", coerce_numbers_to_str=True)
    name: str = ""
    question: str = ""
    track: str = ""
    control: str = ""
    nproc: Any = None
    base: Knobs = {}
    runs: dict[str, Knobs] = {}
    grid: dict[str, Annotated[list, Field(min_length=1)]] = {}
    seeds: list[StrictInt] = []
    repeats: Annotated[StrictInt, Field(ge=1, le=len(LETTERS))] = 1
    over_cap: Literal["refuse", "skip"] = "refuse"
    stages: list[Annotated[tuple[str, dict], BeforeValidator(_stage)]] = []


class _Loader(yaml.SafeLoader):
    """YAML whose keys are text, each at most once, and whose numbers are what they look like.

    Plain YAML reads `010` as 8, `2:00` as 120 and `on` as true, and lets the second of two equal names win silently.
    """

    def compose_mapping_node(self, anchor):
        node, seen = super().compose_mapping_node(anchor), set()
        for i, (key, value) in enumerate(node.value):
            line = f"line {key.start_mark.line + 1}"
            if not isinstance(key, yaml.ScalarNode):
                raise SweepError(f'{line}: a key must be text; quote what begins with a bracket: "{{{{ x }}}}"')
            if key.value in seen:
                raise SweepError(f"{line}: {key.value[:100]} is there twice")
            seen.add(key.value)
            if key.tag != MERGE:
                if str(read := self.construct_object(key)) != key.value:
                    raise SweepError(f'{line}: the key {key.value[:100]} is {shown(read)} in YAML: write "{key.value}"')
                node.value[i] = yaml.ScalarNode(TEXT, key.value, key.start_mark, key.end_mark), value
        return node

    def construct_object(self, node, deep=False):
        line = f"line {node.start_mark.line + 1}"
        try:
            read = super().construct_object(node, deep)
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            if isinstance(error, SweepError):
                raise
            raise SweepError(f"{line}: {shown(node.value)} is no {node.tag.rpartition(':')[2]}") from error
        is_plain, text = isinstance(node, yaml.ScalarNode) and node.style is None, str(node.value)[:100]
        if isinstance(read, int) and read.bit_length() > 64:
            raise SweepError(f"{line}: {text} is larger than any knob")
        if is_plain and isinstance(read, int | float) and OTHER_NUMBER.fullmatch(node.value):
            raise SweepError(f'{line}: {text} is {shown(read)} in YAML: write that, or "{text}"')
        return read


def _check_size(text: str) -> None:
    """SweepError if the file, with every alias written out, is deeper or larger than any sweep is."""
    anchors, opened, total = {}, [], 0  # anchor -> values below it and their depth; the same of each open node
    for event in yaml.parse(text, yaml.SafeLoader):
        line = f"line {event.start_mark.line + 1}"
        if isinstance(event, yaml.CollectionEndEvent):
            anchor, values, depth = opened.pop()
        elif isinstance(event, yaml.CollectionStartEvent):
            opened.append([event.anchor, 1, 1])
            if len(opened) > MAX_DEPTH:
                raise SweepError(f"{line}: nested more than {MAX_DEPTH} deep")
            continue
        elif isinstance(event, yaml.AliasEvent):
            if any(event.anchor == anchor for anchor, *_ in opened):
                raise SweepError(f"{line}: *{event.anchor[:100]} holds itself")
            anchor, (values, depth) = None, anchors.get(event.anchor, (1, 1))
        elif isinstance(event, yaml.ScalarEvent):
            anchor, values, depth = event.anchor, 1, 1
        else:
            continue
        anchors |= {anchor: (values, depth)} if anchor else {}
        if opened:
            opened[-1][1:] = opened[-1][1] + values, max(opened[-1][2], depth + 1)
        total = max(total, values)
        if total > MAX_VALUES or len(opened) + depth > MAX_DEPTH:
            raise SweepError(f"{line}: more than {MAX_VALUES:,} values, or {MAX_DEPTH} levels, once aliases are read")


def read_yaml(path: str | Path, expected: str = "a sweep is a mapping with runs: or grid:") -> dict:
    """The mapping in a YAML file, its name by default the file's. Raises FileNotFoundError or SweepError.

    expected: what the error says the file should be.
    """
    path = Path(path)
    try:
        if path.stat().st_size > MAX_BYTES:
            raise SweepError(f"more than {MAX_BYTES:,} bytes: no sweep")
        text = path.read_text(encoding="utf-8")
        _check_size(text)
        content = yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        mark, begun = error.problem_mark, error.context_mark
        within = f" {error.context}, begun in line {begun.line + 1}" if error.context and begun else ""
        raise SweepError(f"{path}, line {mark.line + 1}, column {mark.column + 1}: {error.problem}{within}") from error
    except (yaml.YAMLError, UnicodeDecodeError, SweepError) as error:
        message = str(error).replace('\n  in "<unicode string>"', "")
        raise SweepError(f"{path}: {message}") from error
    if not isinstance(content, dict):
        raise SweepError(f"{path}: {expected}, not {type(content).__name__}")
    return {"name": path.stem} | {key: value for key, value in content.items() if value is not None}


def load_sweep(path: str | Path, knobs: dict | None = None, scale: str = "", seeds: list[int] | None = None) -> Sweep:
    """Read and check a whole sweep file; knobs and seeds override it.

    scale='nano' shrinks every run to a minute on one CPU thread (proxy.proxy_config) and adds -nano to the name; a
    sweep on the nano track is small already.

    Raises FileNotFoundError, or one SweepError that names every problem.
    """
    if scale not in ("", "nano"):
        raise SweepError(_no_such("scale", scale, ["nano"]))
    return sweep_of(read_yaml(path), path, knobs, scale, seeds)


def sweep_of(
    given: dict, path: str | Path, knobs: dict | None = None, scale: str = "", seeds: list[int] | None = None
) -> Sweep:
    """As load_sweep, from the keys of a sweep file; path: the file that errors name."""
    checked = checked_keys(SweepKeys, given | ({"seeds": seeds} if seeds else {}), path)
    ways = math.prod(map(len, checked.grid.values())) if checked.grid else 0
    if (many := (ways + len(checked.runs)) * max(len(checked.seeds), 1) * checked.repeats) > MAX_RUNS:
        raise SweepError(f"{path}: {shown(many)} runs by grid, runs, seeds and repeats; at most {MAX_RUNS:,}")
    sweep, problems = _check(checked, knobs or {}, shrink=scale == "nano" != checked.track)
    refuse(problems, path)
    return sweep


def checked_keys(keys: type[Keys], given: dict, path: str | Path) -> Keys:
    """The keys of a file, checked and converted to their types. Raises SweepError naming every problem."""
    try:
        return keys(**given)
    except ValidationError as error:
        refuse([_explain(problem, keys) for problem in error.errors()], path)
        raise


def refuse(problems: list[str], path: str | Path) -> None:
    """SweepError naming the file's problems, if there are any."""
    if problems:
        more = [f"and {len(problems) - MAX_NAMED} problems more"] * (len(problems) > MAX_NAMED)
        raise SweepError(f"{path}:\n" + "\n".join(f"  - {problem}" for problem in problems[:MAX_NAMED] + more))


def _explain(problem: dict, keys: type[BaseModel]) -> str:
    """One of pydantic's problems: 'runs: a: input should be a valid dictionary, found 3'."""
    place, message = ": ".join(str(part)[:100] for part in problem["loc"]), problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "extra_forbidden":
        return _no_such("key", place, keys.model_fields) if len(problem["loc"]) == 1 else f"key {place}: no such"
    return f"{place}: {message[0].lower()}{message[1:]}, found {shown(problem['input'])}"


def _check(content: SweepKeys, knobs: dict, shrink: bool) -> tuple[Sweep, list[str]]:
    """The sweep and its problems; it is valid only without any."""
    problems, base, entries = [], {"track": content.track} | content.base, [*content.runs.items()]
    for values in itertools.product(*content.grid.values()):
        if point := dict(zip(content.grid, values, strict=True)):
            entries.append(("-".join(folder_name(f"{knob}{value}") for knob, value in point.items()), point))
    changes = {group: sorted(own) for group, own in entries}
    if not entries:
        problems.append("no runs; give runs: or grid:")
    if content.control and content.control not in changes:
        problems.append(_no_such("control: run", content.control, changes))
    if content.nproc is not None:
        if any("world_size" in own for own in (base, *changes.values())):
            problems.append("nproc and world_size are the same; give one of them")
        base |= {"world_size": content.nproc}
    if content.seeds:
        problems += [f"{group}: sets seed, and the sweep has seeds" for group, own in entries if "seed" in own]
        problems += ["-k seed: the sweep has seeds; give one or the other"] if "seed" in knobs else []
    usual = base.get("seed", RunConfig.model_fields["seed"].default)
    runs = []  # name, group and knobs of each
    for (group, own), seed, letter in itertools.product(entries, content.seeds or [None], LETTERS[: content.repeats]):
        # The usual seed adds nothing to the name: runs that are complete keep theirs when seeds are added.
        name = group + ("" if seed in (None, usual) else f"-s{seed}") + (f"_{letter}" if content.repeats > 1 else "")
        runs.append((name, group, base | own | ({} if seed is None else {"seed": seed})))
    (_, train_parameters), *stages = _check_stages(content.stages, problems)
    check_names(content.name, [name for name, *_ in runs] + [name for name, _ in stages], problems)
    configs = _resolve(runs, knobs, shrink, problems)
    for knob in NEEDED_BY_STAGES if stages else ():
        if lacking := [run for run, config in configs.items() if not getattr(config, knob)]:
            problems.append(f"run {_names(lacking)}: {knob}=0, and the stages after training need it")
    groups = {name: group for name, group, _ in runs}
    return Sweep(
        content.name + "-nano" * shrink, content.question, content.control, configs, groups, changes,
        content.over_cap == "skip", train_parameters,
        {name: proxy_parameters(own) if shrink else own for name, own in stages},
    ), problems  # fmt: skip


def _resolve(runs: list[tuple[str, str, dict]], knobs: dict, shrink: bool, problems: list[str]) -> dict[str, RunConfig]:
    """Every run's config. A problem that several runs share is reported once, naming them all."""
    configs, bad, same = {}, defaultdict(list), {}
    outside = environment_knobs(prefixed=True)
    for name, group, own in runs:
        if sum(map(len, bad.values())) > 3 * MAX_NAMED:
            break
        try:
            config = RunConfig(outside, **own if shrink else own | knobs)
            config = configs[name] = proxy_config(config, knobs) if shrink else config
        except ConfigError as error:
            for problem in str(error).splitlines()[1:]:
                bad[problem.removeprefix("  - ")].append(name)
            continue
        twin, of_group = same.setdefault(config.hash, (name, group))
        if of_group != group:
            at_scale = " at scale nano, which sets steps, batches and heads itself" if shrink else ""
            problems.append(f"runs {twin} and {name} have the same knobs{at_scale}; one is enough")
    for problem, names in bad.items():
        problems.append(("every run" if len(names) == len(runs) else "run " + _names(names)) + f": {problem}")
    return configs


def said_of_environment() -> list[str]:
    """Lines about environment variables that set knobs of sweeps, and about those that would only of single runs."""
    ours, all_names = environment_knobs(prefixed=True), environment_knobs()
    taken = " ".join(f"{name}={shown(text)}" for name, text in sorted(ours.items()))
    others = ", ".join(name.upper() for name in sorted(all_names.keys() - ours.keys()))
    lines = [f"knobs from the environment: {taken}"] * bool(taken)
    return lines + [f"environment: a sweep does not take {others}; for its runs write {PREFIX}NAME"] * bool(others)


def check_names(sweep: str, names: list[str], problems: list[str]) -> None:
    """Names are folders: on Windows too, and on disks that ignore case."""
    rule = "cannot be a folder everywhere; use letters, digits, . _ + = -, at most 100 of them"
    problems += [f"name {shown(name)}: {rule}" for name in [sweep, *names] if name != folder_name(name)]
    seen: dict[str, str] = {}
    for name in names:
        if same := seen.get(name.lower()):
            problems.append(f"name {name}: used twice" + (f" (as {same})" if same != name else ""))
        seen[name.lower()] = name


def _check_stages(stages: list[tuple[str, dict]], problems: list[str]) -> list[tuple[str, dict]]:
    """The stages, train.ipynb as the first; their notebooks and parameters are checked."""
    if not stages or stages[0][0] != "train":
        stages = [("train", {}), *stages]
    if any(name == "train" for name, _ in stages[1:]):
        problems.append("stages: train is the first, and there once")
    for stage, parameters in stages:
        notebook = NOTEBOOKS / f"{stage}.ipynb"
        if not notebook.is_file():
            known = [path.stem for path in sorted(NOTEBOOKS.glob("*.ipynb"))]
            problems.append(_no_such("stages: notebook", stage, known) + f" in {NOTEBOOKS}")
            continue
        names, given = parameter_names(notebook), GIVEN if stage == "train" else (*GIVEN, "source")
        problems += [f"{notebook}: its parameters cell has no {name}" for name in given if name not in names]
        for name in parameters:
            if stage == "train" and name == "nproc":
                problems.append("stages: train: nproc is a key of the sweep, beside base:")
            elif name in given:
                problems.append(f"stages: {stage}: {name} is given by the sweep")
            elif name not in names:
                problems.append(_no_such(f"stages: {stage}: parameter", name, names))
    return stages


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
    return f"{what} {name[:100]}: no such" + (did_you_mean(name, known) or f"; there are {_names([*known])}")


def _names(names: list[str]) -> str:
    more = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
    return ", ".join(name[:100] for name in names[:MAX_NAMED]) + more
