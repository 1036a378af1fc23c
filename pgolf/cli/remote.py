"""`pgolf remote`: sweeps on a rented machine, which is torn down once every file is local and verified."""

import argparse
import sys
from collections.abc import Callable
from functools import partial

from pgolf.cli.arguments import add_knobs, existing_file, knobs_of


def add_commands(commands) -> None:
    text = "sweeps on a rented machine, torn down once every file is local and verified"
    remote = commands.add_parser("remote", help=text, description=text)
    remote.set_defaults(command=lambda _: remote.print_help() or 0)
    actions = remote.add_subparsers(metavar="ACTION")

    def action(function, name: str, text: str, files: str) -> None:
        sub = actions.add_parser(name, help=text, description=text)
        sub.set_defaults(command=function)
        sub.add_argument("pod", type=existing_file, metavar="POD.yaml", help="the machine; see pgolf/machines/pod.py")
        sub.add_argument("files", type=existing_file, nargs=files, metavar="SWEEP.yaml")
        sub.add_argument("--scale", default="", metavar="nano", help="see `pgolf sweep`")
        sub.add_argument("--seeds", type=int, nargs="+", metavar="SEED", help="see `pgolf sweep`")
        add_knobs(sub)

    action(check, "check", "check whether sweeps could run there; start nothing", "*")
    action(run, "run", "run what is missing of sweeps there, pull, verify, tear down; again: continue with that", "+")
    action(pull, "pull", "pull what is there now", "+")
    text = "every job that was started from here, as it was last seen"
    actions.add_parser("status", help=text, description=text).set_defaults(command=status)


# Torch takes seconds to import, so the machinery is imported by the commands that need it; status needs none.


say = partial(print, flush=True)


def _job(arguments: argparse.Namespace):
    from pgolf.machines.job import load_job

    return load_job(arguments.pod, arguments.files, knobs_of(arguments.knobs), arguments.scale, arguments.seeds)


def _explained(attempt: Callable, *arguments: object):
    """The attempt's return value; a refusal of the local disk becomes a RemoteError."""
    from pgolf.machines.pod import RemoteError

    try:
        return attempt(*arguments)
    except OSError as error:
        if isinstance(error, BrokenPipeError):
            raise
        raise RemoteError(f"{error.filename or 'here'}: {error.strerror}; the same command continues") from error


def check(arguments: argparse.Namespace) -> int:
    from pgolf.machines import preflight

    _explained(preflight.check, _job(arguments), say)
    return 0


def run(arguments: argparse.Namespace) -> int:
    from pgolf.machines import remote

    job = _job(arguments)
    try:
        return _explained(remote.run, job, say)
    except KeyboardInterrupt:
        if not (known := job.known()):  # nothing was started
            raise
        what = f"The job was last seen {known['state']} there; the same command continues"
        if known["state"] == "running":
            what = f"The job continues on {job.pod.address}; the same command finds it"
        print(f"\npgolf: stopped here. {what}", file=sys.stderr)
        return 130


def pull(arguments: argparse.Namespace) -> int:
    from pgolf.machines import remote

    return _explained(remote.pull_once, _job(arguments), say)


def status(_: argparse.Namespace) -> int:
    from pgolf.machines import state

    print("\n".join(state.report()))
    return 0
