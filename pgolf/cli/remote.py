"""`pgolf remote`: sweeps on a rented machine, which is torn down once every file is local and verified."""

import argparse
import sys
from functools import partial

from pgolf.cli.arguments import add_command, add_overrides, existing_file, overrides


def add_commands(commands) -> None:
    text = "sweeps on a rented machine, torn down once every file is local and verified"
    example = "pgolf remote run pod.yaml notebooks/sweeps/tour.yaml"
    remote = add_command(commands, lambda _: remote.print_help() or 0, "remote", text, example)
    actions = remote.add_subparsers(metavar="ACTION")
    for function, text, files in (
        (check, "check whether sweeps could run there; start nothing", "*"),
        (run, "run what is missing of sweeps there, pull, verify, tear down; again: continue with that", "+"),
        (pull, "pull what is there now", "+"),
    ):
        example = f"pgolf remote {function.__name__} pod.yaml notebooks/sweeps/tour.yaml"
        sub = add_command(actions, function, function.__name__, text, example)
        sub.add_argument("pod", type=existing_file, metavar="POD.yaml", help="the machine; see pgolf/machines/pod.py")
        sub.add_argument("files", type=existing_file, nargs=files, metavar="SWEEP.yaml")
        add_overrides(sub)
    text = "every job that was started from here, as it was last seen"
    add_command(actions, status, "status", text, "pgolf remote status")


# Torch takes seconds to import, so the machinery is imported by the commands that need it; status needs none.


say = partial(print, flush=True)


def _job(arguments: argparse.Namespace):
    from pgolf.machines.job import load_job

    return load_job(arguments.pod, arguments.files, *overrides(arguments))


def check(arguments: argparse.Namespace) -> int:
    from pgolf.machines import preflight

    preflight.check(_job(arguments), say)
    return 0


def run(arguments: argparse.Namespace) -> int:
    from pgolf.machines import remote

    job = _job(arguments)
    try:
        return remote.run(job, say)
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

    return remote.pull_once(_job(arguments), say)


def status(_: argparse.Namespace) -> int:
    from pgolf.machines import state

    print("\n".join(state.report()))
    return 0
