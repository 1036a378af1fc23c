"""`pgolf remote`: sweeps on a rented machine, which goes when everything is home."""

import argparse
import sys
from collections.abc import Callable

from pgolf.cli.arguments import add_knobs, existing_file, knobs_of


def add_commands(commands) -> None:
    text = "sweeps on a rented machine, which goes when everything is home"
    remote = commands.add_parser("remote", help=text, description=text)
    remote.set_defaults(command=lambda _: remote.print_help() or 0)
    actions = remote.add_subparsers(metavar="ACTION")

    def action(function, name: str, text: str, files: str) -> None:
        sub = actions.add_parser(name, help=text, description=text)
        sub.set_defaults(command=function)
        sub.add_argument(
            "pod", type=existing_file, metavar="POD.yaml", help="the machine; keys in pgolf/machines/ssh.py"
        )
        sub.add_argument("files", type=existing_file, nargs=files, metavar="SWEEP.yaml")
        sub.add_argument("--scale", default="", metavar="nano", help="as of `pgolf sweep`")
        sub.add_argument("--seeds", type=int, nargs="+", metavar="SEED", help="as of `pgolf sweep`")
        add_knobs(sub)

    action(check, "check", "look whether sweeps could run there; start nothing", "*")
    action(run, "run", "run what is missing of sweeps there, pull, verify, tear down; again: go on with that", "+")
    action(pull, "pull", "bring home what is there now", "+")
    text = "every job that was started from here, as it was last seen"
    sub = actions.add_parser("status", help=text, description=text)
    sub.set_defaults(command=status)


def _job(arguments: argparse.Namespace):
    from pgolf.machines.remote_job import load_job

    return load_job(arguments.pod, arguments.files, knobs_of(arguments.knobs), arguments.scale, arguments.seeds)


def _say(line: str) -> None:
    print(line, flush=True)


def _told(attempt: Callable, *arguments: object):
    """What it returns; RemoteError for what the disk here refuses."""
    from pgolf.machines.ssh import RemoteError

    try:
        return attempt(*arguments)
    except BrokenPipeError:
        raise
    except OSError as error:
        raise RemoteError(f"{error.filename or 'here'}: {error.strerror or error}; the same command goes on") from error


def check(arguments: argparse.Namespace) -> int:
    from pgolf.machines import remote

    _told(remote.check, _job(arguments), _say)
    return 0


def run(arguments: argparse.Namespace) -> int:
    from pgolf.machines import remote

    job = _job(arguments)
    try:
        return _told(remote.run, job, _say)
    except KeyboardInterrupt:
        state = remote.read_state(job.id)
        if "state" not in state:  # nothing was started
            raise
        what = {
            "running": f"The job goes on on {job.pod.address}; the same command finds it",
            "verified": "All is home and verified; the same command goes on with the teardown",
        }.get(state["state"], f"The job was last seen {state['state']} on {job.pod.address}; the same command goes on")
        print(f"\npgolf: stopped here. {what}", file=sys.stderr)
        return 130


def pull(arguments: argparse.Namespace) -> int:
    from pgolf.machines import remote

    return _told(remote.pull_once, _job(arguments), _say)


def status(_: argparse.Namespace) -> int:
    from pgolf.machines import remote_job
    from pgolf.runs import directory

    found = remote_job.states()
    if not found:
        print(f"no remote jobs in {directory.RUNS}; `pgolf remote run` starts one")
    for job, state in found.items():
        if "host" not in state:
            print(f"{job:32} its state.json cannot be read; the command that started it writes it anew")
            continue
        torn = (state.get("teardown") or {}).get("status")
        words = [
            state.get("state", "checked"),
            f"on {state['user']}@{state['host']} port {state['port']}",
            *(
                f"{key.replace('_', ' ')} {state[key]}"
                for key in ("started", "last_pull", "ended", "verified")
                if state.get(key)
            ),
            *(["torn down"] if torn == 0 else [f"TEARDOWN FAILED ({torn})"] if torn else []),
            *([f"{len(state['failed'])} failed"] if state.get("failed") else []),
        ]
        print(f"{job:32} {', '.join(words)}")
        if not state.get("verified") and "command" in state:
            print(f"{'':32} {state['command']}")
    return 0
