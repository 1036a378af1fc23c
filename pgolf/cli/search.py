"""`pgolf search`: configurations tried one after another, each where those before it did well, under the byte cap."""

import argparse

from pgolf.cli.arguments import add_command, add_running, existing_file, pool_opener


def add_commands(commands) -> None:
    sub = add_command(
        commands, search, "search", "search knobs for the lowest bits per byte, or bytes, of files that fit the cap",
        "pgolf search notebooks/searches/search_nano.yaml --dry-run",
        "pgolf search mine.yaml --workers 1",
    )  # fmt: skip
    sub.add_argument("file", type=existing_file, metavar="FILE", help="search file, YAML")
    text = "check the file and print what is enqueued, its forecast, and the space"
    add_running(sub, "trials at a time in this process", text)


def search(arguments: argparse.Namespace) -> int:
    from pgolf.search.search_file import load_search

    checked = load_search(arguments.file)
    if arguments.dry_run:
        _dry_run(checked)
        return 0
    from pgolf.search.answer import answer, train_finalists
    from pgolf.search.driver import run_search
    from pgolf.search.trainings import open_trainings
    from pgolf.sweeps.jobs import say

    open_pool = pool_opener(arguments)
    with open_trainings(checked, arguments.workers, open_pool) as trainings:
        study = run_search(checked, trainings, say)
    failures = train_finalists(checked, study, arguments.workers, open_pool, say)
    print(answer(checked, study))
    return 1 if failures else 0


def _dry_run(checked) -> None:
    from pgolf.training.forecast import over_cap

    keys = checked.keys
    print(f"{checked.name}: {keys.question}" if keys.question else checked.name)
    for knob, values in keys.space.items():
        given = values.model_dump(exclude_defaults=True)
        print(f"  {knob}: {given.pop('choices', None) or ''}{''.join(f' {name} {own}' for name, own in given.items())}")
    over = over_cap({run: checked.config(values) for run, values in checked.enqueued.items()}, print)
    for run in over:
        lost = ", and nothing can be compared with this baseline" if run == checked.baseline else ""
        print(f"  warning: enqueue: {run} is over the cap, so it is never trained{lost}; raise cap: or make it smaller")
    budgets = {name: getattr(keys, name) for name in ("trainings", "hours", "money")} | {"trials": checked.most_trials}
    limits = ", ".join(f"{name} {own:g}" for name, own in budgets.items() if own is not None)
    print(f"budget: {limits}; pruner {checked.pruner}; finalists {keys.finalists} with seeds {keys.seeds}")
