"""`pgolf`: the workbench from the command line."""

import argparse
import os
import sys
from contextlib import suppress
from functools import partial
from importlib import metadata
from pathlib import Path

from pgolf.cli import cluster, data, doctor, init, knobs, legality, records, remote, runs, schema, search, sweeps
from pgolf.cli.arguments import Parser, add_command, add_run, complete_runs, escape_controls, positive
from pgolf.runs import directory
from pgolf.runs.result import ARTIFACT
from pgolf_core.config import require_root

EXAMPLES = """first steps:
  pgolf demo                                   build a corpus, run the demo sweep, write reports
  pgolf train -k track=nano                    one run, a minute on one CPU thread
  pgolf knobs learning rate                    which knob does what
  pgolf generate explore/NAME "The name"      text that a run writes
  pgolf COMMAND --help                         what a command takes, with examples"""


def main(words: list[str] | None = None) -> int:
    """Exit status: 0 done, 1 some runs failed, 2 the request cannot be met, 130 stopped by Ctrl-C."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a redirected Windows console cannot encode Δ
            escape_controls(stream, keep="\r" if stream is sys.stderr else "")
    parser = make_parser()
    with suppress(ImportError):  # the extra `completion`
        import argcomplete

        argcomplete.autocomplete(parser)
    arguments, unexpected = parser.parse_known_args(words)
    if unexpected:
        getattr(arguments, "parser", parser).refuse(unexpected)
    if "command" not in arguments:
        parser.print_help()
        return 0
    try:
        if "anywhere" not in arguments:
            require_root()
        return arguments.command(arguments)
    except BrokenPipeError:  # the reader closed the pipe: `pgolf runs | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        # The packages' own errors are for users: ConfigError, DataError, RunError … Others keep their traceback.
        if isinstance(error, OSError):  # a full disk, a file that may not be written
            problem = f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error)
        elif type(error).__module__.startswith(("pgolf.", "pgolf_core.")):
            problem = str(error)
        else:
            raise
        print(f"pgolf: {problem}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\npgolf: stopped; the same command goes on where this one was", file=sys.stderr)
        return 130


class _Version(argparse.Action):
    def __call__(self, parser, *_):
        print("pgolf", metadata.version("pgolf"))
        parser.exit()


def make_parser() -> Parser:
    """The parser of all commands."""
    raw = argparse.RawDescriptionHelpFormatter
    text = "The lowest bits per byte that fits in N bytes."
    parser = Parser(prog="pgolf", description=text, epilog=EXAMPLES, formatter_class=raw)
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version of pgolf")
    commands = parser.add_subparsers(metavar="COMMAND")

    sweeps.add_commands(commands)
    search.add_commands(commands)
    runs.add_commands(commands)
    command = partial(add_command, commands)

    text = "check an artifact file and list its bytes by part and tensor"
    sub = command(artifact, "artifact", text, "pgolf artifact demo/momentum")
    sub.add_argument("file", metavar="FILE", help="artifact.pgolf of a run, or the run").completer = complete_runs

    text = "score runs' artifacts again, audit their data, and write a record folder whose script runs alone"
    example = "pgolf submission demo/momentum-s1337 demo/momentum-s1338 --base demo/baseline-s1337 --out my_record"
    sub = command(submission, "submission", text, example)
    text = "sweep/run below runs/, or a folder; several are seeds of one config"
    sub.add_argument("runs", nargs="+", metavar="RUN", help=text).completer = complete_runs
    sub.add_argument("--base", metavar="RUN", help="run whose knobs the README compares with these")
    sub.add_argument("--beats", type=positive, metavar="BPB", help="claimed bits per byte to test the seeds against")
    sub.add_argument("--out", type=Path, metavar="DIR", help="folder; default: reports/submissions/<sweep>_<run>")

    text = "upload a run to the Hugging Face hub: artifact, config, result, script and a model card"
    example = "pgolf push demo/momentum-s1337 --to hub --repo my-model --private"
    sub = command(push, "push", text, "pgolf push demo/momentum-s1337 --to hub", example)
    add_run(sub)
    sub.add_argument("--to", choices=["hub"], default="hub", help="where to; default: hub")
    text = "NAME of your account's repository, or OWNER/NAME; default: pgolf-<sweep>-<run>"
    sub.add_argument("--repo", default="", metavar="NAME", help=text)
    sub.add_argument("--private", action="store_true", help="a repository that only its owner sees")
    sub.add_argument("--endpoint", metavar="URL", help="address of the hub; default: HF_ENDPOINT")

    for module in (records, knobs, legality, data, remote, cluster, doctor, init, schema):
        module.add_commands(commands)
    return parser


# Torch and pandas take seconds to import, so each command imports what it needs.


def artifact(arguments: argparse.Namespace) -> int:
    from pgolf.reports import text
    from pgolf_core.artifact.format import read

    of_run = directory.RUNS / arguments.file / ARTIFACT
    print(text.artifact(read(of_run if of_run.is_file() else arguments.file)))
    return 0


def submission(arguments: argparse.Namespace) -> int:
    from pgolf.submission.submit import submit

    base = directory.find_run(arguments.base) if arguments.base else None
    runs = [directory.find_run(run) for run in arguments.runs]
    print(submit(runs, arguments.out, base, arguments.beats))
    return 0


def push(arguments: argparse.Namespace) -> int:
    from pgolf.reports import text
    from pgolf.runs.result import read_result
    from pgolf.submission.push import push

    run = directory.find_run(arguments.run)
    address = push(run, arguments.repo, arguments.private, arguments.endpoint)
    print(f"{address}: {text.answer(read_result(run))}")
    return 0


def console() -> None:
    """The command `pgolf` of the shell: end the process with main's exit status."""
    status = main()
    sys.stdout.flush()
    sys.stderr.flush()
    if status == 130:  # without joining threads: SentencePiece may run in one and would abort
        os._exit(status)
    sys.exit(status)


if __name__ == "__main__":
    console()
