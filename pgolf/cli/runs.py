"""`pgolf train`, `runs`, `diff`, `export`, `generate` …: one run or a table of them."""

import argparse
import json
import sys
from functools import partial
from pathlib import Path

from pgolf.cli.arguments import (
    add_command,
    add_knobs,
    add_run,
    complete_runs,
    count,
    existing_file,
    positive,
)
from pgolf.runs import directory
from pgolf.runs.result import RunError
from pgolf_core.config import TRACKS, ConfigError, RunConfig, did_you_mean, no_such_knob


def add_commands(commands) -> None:
    command = partial(add_command, commands)
    sub = command(
        train, "train", "train one run, without a notebook",
        "pgolf train -k track=nano",
        "pgolf train -k track=nano -k num_layers=3 -k model_dim=128 --run-dir runs/own/deep",
        "pgolf train --config runs/own/deep/config.json -k seed=1338",
    )  # fmt: skip
    sub.add_argument("--run-dir", type=Path, metavar="DIR", help="default: runs/explore/<track>-<hash of the knobs>")
    text = "read knobs from YAML or JSON, such as a run's config.json"
    sub.add_argument("--config", type=existing_file, metavar="FILE", help=text)
    add_knobs(sub)

    sub = command(
        list_runs, "runs", "print all runs in a table",
        "pgolf runs", "pgolf runs demo --sort bpb", "pgolf runs --columns run,bpb,num_layers,model_dim",
        "pgolf runs --json --columns sweep,run,total_bytes",
    )  # fmt: skip
    sub.add_argument("sweep", nargs="?", metavar="SWEEP", help="only the runs of this sweep").completer = complete_runs
    sub.add_argument("--sort", metavar="COLUMN", help="sort by a figure or knob, smallest first")
    sub.add_argument("--reverse", action="store_true", help="largest first")
    text = "these columns: figures of result.json and knobs, separated by commas"
    sub.add_argument("--columns", metavar="A,B", help=text)
    sub.add_argument("--json", action="store_true", help="print JSON, one object per run")
    sub.add_argument("--verify", action="store_true", help="compare every artifact and checkpoint with its checksum")

    sub = command(
        monitor, "monitor", "what is training now: progress, time left, stalled and dead runs",
        "pgolf monitor", "pgolf monitor demo --every 2", "pgolf monitor demo/momentum-s1337 --once",
    )  # fmt: skip
    text = "a sweep, or sweep/run; default: every sweep at work or of the last 12 hours"
    sub.add_argument("name", nargs="?", default="", metavar="RUN|SWEEP", help=text).completer = complete_runs
    text = "write again every so many seconds while something is at work; default: 5"
    sub.add_argument("--every", type=positive, default=5.0, metavar="SECONDS", help=text)
    sub.add_argument("--once", action="store_true", help="one look, as where the output is no terminal")

    text = "print what differs between two runs or logs, and check whether only that was claimed"
    sub = command(diff, "diff", text, "pgolf diff demo/momentum demo/control --claim muon_momentum")
    text = "sweep/run below runs/, or a folder"
    sub.add_argument("runs", nargs=2, metavar="RUN", help=text).completer = complete_runs
    sub.add_argument("--claim", nargs="*", metavar="KNOB", help="knobs claimed to be the only change")

    text = "how many seeds find a difference, from the seed noise of the runs that are there"
    sub = command(
        plan, "plan", text, "pgolf plan --effect 0.002 --runs 7", "pgolf plan --effect 0.01 --track nano",
        "pgolf plan notebooks/sweeps/tour.yaml --effect 0.01 --price-per-hour 2.5",
    )  # fmt: skip
    text = "sweep file, whose arms are the configs, on its track"
    sub.add_argument("file", type=existing_file, nargs="?", metavar="FILE", help=text)
    sub.add_argument("--effect", type=positive, required=True, metavar="BPB", help="true difference to be found")
    text = "configs compared with one baseline; default: 1"
    sub.add_argument("--runs", type=count, metavar="N", help=text)
    sub.add_argument("--track", metavar="TRACK", help="only this track; default: all that have several seeds")
    text = "price of an hour of training, for the cost of all runs"
    sub.add_argument("--price-per-hour", type=positive, default=0.0, metavar="PRICE", help=text)
    _add_commands_of_weights(command)


def _add_commands_of_weights(command) -> None:
    sub = command(
        import_checkpoint, "import-checkpoint", "make a run of weights trained elsewhere; no code in the file is run",
        "pgolf import-checkpoint final_model.pt -k data_path=data/fineweb10B_sp1024",
        "pgolf import-checkpoint weights.safetensors --name theirs -k track=nano",
    )  # fmt: skip
    text = "state dict: .safetensors, or written by torch.save, with the names of the reference trainer"
    sub.add_argument("file", type=existing_file, metavar="FILE", help=text)
    sub.add_argument("--name", metavar="NAME", help="of the run runs/imported/NAME; default: the file's")
    add_knobs(sub)

    sub = command(
        export, "export", "store a finished run's weights again with other export knobs, read back and scored",
        "pgolf export demo/momentum -k codec=ans -k weight_quantization_bits=6",
        "pgolf export demo/momentum -k allocation=solve -k cap_bytes=200000 -k codec=ans",
    )  # fmt: skip
    add_run(sub)
    text = "default: runs/exported/<sweep>_<run>-<hash of the knobs>"
    sub.add_argument("--run-dir", type=Path, metavar="DIR", help=text)
    add_knobs(sub)

    sub = command(
        generate, "generate", "print text that a run's artifact writes, read back from disk",
        'pgolf generate demo/momentum "The name"',
        'pgolf generate demo/momentum "def f(" "import " --tokens 40 --temperature 1',
    )  # fmt: skip
    add_run(sub)
    text = "texts to go on with; default: three short ones"
    sub.add_argument("prompts", nargs="*", default=[], metavar="PROMPT", help=text)
    sub.add_argument("--tokens", type=count, default=120, metavar="N", help="tokens each, at most; default: 120")
    text = "logits are divided by it; the lower the likelier each token; default: 0.7"
    sub.add_argument("--temperature", type=positive, default=0.7, metavar="T", help=text)
    sub.add_argument("--seed", type=int, default=1, metavar="N", help="of the draws; default: 1")


# Torch and pandas take seconds to import, so each command imports what it needs.


def _place(run_dir: Path) -> str:
    """The run's name below runs/, or its folder."""
    inside = run_dir.absolute().is_relative_to(directory.RUNS)
    return run_dir.absolute().relative_to(directory.RUNS).as_posix() if inside else str(run_dir)


def _say_answer(run_dir: Path, result) -> None:
    """The folder, and the answer in one sentence, last."""
    from pgolf.reports import text

    print(run_dir)
    print(f"{_place(run_dir)}: {text.answer(result)}")


def train(arguments: argparse.Namespace) -> int:
    from pgolf.runs.result import read_result
    from pgolf.training.inputs import check_scored, open_dataset
    from pgolf.training.run import train
    from pgolf_core.device import pick_device

    knobs = dict(arguments.knobs)
    config = RunConfig.from_file(arguments.config, **knobs) if arguments.config else RunConfig(**knobs)
    explore = directory.RUNS / "explore"
    run_dir = arguments.run_dir or explore / directory.run_name(config, explore)
    before = read_result(run_dir)
    if before is None:  # a machine or data that cannot be trained on leaves no folder of a failed run
        device = pick_device(config.train)
        shape = (config.num_layers, config.model_dim)
        if device.type == "cpu" and not config.track and shape == (9, 512):
            print("no track: 9 × 512 for a GPU; -k track=nano takes a minute on a CPU", flush=True)
        check_scored(open_dataset(config), config.train_seq_len, config.eval)
    result = train(config, run_dir)
    if before is not None:
        print(f"complete since {before.finished} UTC; not trained again")
    _say_answer(run_dir, result)
    return 0


def list_runs(arguments: argparse.Namespace) -> int:
    from pgolf.reports import text
    from pgolf.runs.table import SHORT, load_runs

    table = load_runs(directory.RUNS, arguments.verify)
    if arguments.sweep:
        sweeps = sorted(set(table.sweep))
        if arguments.sweep not in sweeps:
            nearest = did_you_mean(arguments.sweep, sweeps) or f"; it has {', '.join(sweeps) or 'none'}"
            raise RunError(f"{directory.RUNS} has no sweep {arguments.sweep}{nearest}")
        table = table[table.sweep == arguments.sweep]
    columns = arguments.columns.split(",") if arguments.columns else None
    for name in [*(columns or []), *([arguments.sort] if arguments.sort else [])]:
        if name not in table:
            raise RunError(f"{name}: no such column{did_you_mean(name, table.columns) or f'; as {SHORT}'}")
    if arguments.sort:
        table = table.sort_values(arguments.sort, ascending=not arguments.reverse, kind="stable")
    if arguments.json:
        rows = table[columns or [*SHORT]].astype(object)
        rows = rows.where(rows.notna(), None).to_dict("records")
        print(json.dumps(rows, indent=1, default=str))
    elif table.empty:
        print(f"no runs in {directory.RUNS} yet; `pgolf demo` makes some")
    elif columns:
        print(text.columns(table[columns]))
    else:
        counts = ", ".join(f"{count} {status}" for status, count in table.status.value_counts().items())
        print(f"{text.runs(table)}\n\n{len(table)} runs: {counts}")
    return 0


def monitor(arguments: argparse.Namespace) -> int:
    from pgolf.reports.live import terminal

    terminal(directory.RUNS, arguments.name, every=arguments.every if sys.stdout.isatty() and not arguments.once else 0)
    return 0


def diff(arguments: argparse.Namespace) -> int:
    """Exit status 1 if --claim is given and does not hold."""
    from pgolf.analysis import diff

    if unknown := [name for name in arguments.claim or () if name not in RunConfig.model_fields]:
        raise ConfigError(f"--claim {no_such_knob(unknown[0])}")
    runs = [directory.find_run(name) for name in arguments.runs]
    rows = diff.between(*runs)
    for row in rows.itertuples():
        print(f"{row.kind:9} {row.setting:32} {row.ours!r}  {row.theirs!r}")
    knobs = int((rows.kind == "knob").sum())
    words = f"{knobs} knobs differ" if knobs > 1 else "1 knob differs"
    print(words if knobs else "no knob differs: whatever their scores, no change of a knob made them")
    print(diff.scores(*runs))
    if arguments.claim is None:
        return 0
    problem = diff.judge(rows, arguments.claim)
    print(f"not a clean comparison: {problem}" if problem else "just what is claimed")
    return 1 if problem else 0


def plan(arguments: argparse.Namespace) -> int:
    from pgolf.analysis.plan import plan
    from pgolf.sweeps.sweep_file import load_sweep

    arms, configs, track = {}, 1 if arguments.runs is None else arguments.runs, arguments.track
    if arguments.file:
        if arguments.runs is not None or track is not None:
            raise ConfigError(f"{arguments.file} gives configs and track; leave --runs and --track out")
        sweep = load_sweep(arguments.file)
        arms = {group: sweep.runs[run] for run, group in reversed(sweep.groups.items())}
        configs, track = len(arms) - 1, next(iter(arms.values())).track
        if not configs:
            raise ConfigError(f"{arguments.file}: one config; a difference needs a second")
    if track is not None and track not in TRACKS:
        nearest = did_you_mean(track, TRACKS) or f"; there are {', '.join(TRACKS)}"
        raise ConfigError(f"--track {track}: no such track{nearest}")
    print(*plan(directory.RUNS, arguments.effect, configs, track, arms, arguments.price_per_hour), sep="\n")
    return 0


def import_checkpoint(arguments: argparse.Namespace) -> int:
    from pgolf.studies.import_checkpoint import import_checkpoint

    run_dir = directory.RUNS / "imported" / directory.folder_name(arguments.name or arguments.file.stem)
    _say_answer(run_dir, import_checkpoint(arguments.file, run_dir, **dict(arguments.knobs)))
    return 0


def export(arguments: argparse.Namespace) -> int:
    from pgolf.analysis.statistics import compare_blocks
    from pgolf.reports import text
    from pgolf.studies.finished_run import open_run
    from pgolf.studies.reexport import scoring_config

    run, knobs = open_run(arguments.run), dict(arguments.knobs)
    if not knobs:
        raise ConfigError("export: name what is to be stored in another way, as -k codec=ans; `pgolf knobs` has all")
    changed = scoring_config(run.config, knobs)
    if run.config.differences(changed).keys() == {"cap_bytes"} and changed.allocation == "fixed":
        raise ConfigError("cap_bytes alone changes no file of fixed quantizers: add -k allocation=solve -k codec=ans")
    run_dir = arguments.run_dir or run.export_dir(**knobs)
    result, own = run.export(run_dir, **knobs), run.result
    print(f"its own file: {text.answer(own)}")
    if own.scored_text and own.scored_text == result.scored_text and own.protocol == result.protocol:
        found = compare_blocks(result.roundtrip_block_nats, own.roundtrip_block_nats, result.roundtrip_bytes)
        print(f"against it: {found.delta:+.4f} ± {found.half:.4f} bpb, {found.verdict}")
    _say_answer(run_dir, result)
    return 0


def generate(arguments: argparse.Namespace) -> int:
    from pgolf.reports.labels import printable
    from pgolf.studies.sample import PROMPTS, sample

    settings = (arguments.tokens, arguments.temperature, arguments.seed)
    for row in sample(directory.find_run(arguments.run), arguments.prompts or PROMPTS, *settings):
        print(*map(printable, row["text"].splitlines()), sep="\n", end="\n\n")
        sys.stdout.flush()
    return 0
