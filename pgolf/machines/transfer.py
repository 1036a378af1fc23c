"""Files to the machine and home: never less at home than before, and no result before what it speaks of.

Pulling, rsync puts what is not home into runs/.remote/<job>/.arriving. From there each file moves into its place, or
does not: see `why_kept`. So a kill at any moment leaves whole files, and the longer ones.
"""

import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from pgolf.disk import checksum
from pgolf.machines.ssh import PARTIAL, Pod, RemoteError, UnreachableError, at, rsync, run_script
from pgolf.runs import directory, integrity
from pgolf.runs.directory import INTERRUPTED, write_failure, write_interruption
from pgolf.runs.result import CHECKPOINT, RunError, read_json, read_result
from pgolf.sweeps.sweep_file import Sweep
from pgolf.training.round_trip import open_dataset
from pgolf_core.config import ROOT

REMOTE = ".remote"  # below runs/: a folder for each job
ARRIVING = ".arriving"
RESUME = "resume.pt"
LATER = ("notebook.ipynb", "kernel.log", "job.json")  # may be written after the result
TORN = "torn there"
TRIES = 3  # to make what is home equal to what is there
PUSHED = ".pgolf-pushed"  # there, in the checkout: what we put into it, and
PUSHED_NAME = ".pgolf-pushed-name"  # the name of that push
PROJECT = (  # what is pushed whether git knows it or not
    *("pgolf_core", "pgolf", "notebooks", "tools", "benchmarks", "tests", "reports/example"),
    *("pyproject.toml", "constraints.txt", "environment.yml", "README.md", "LICENSE", "Makefile"),
)

# Two may push the same at once, each by names of its own (new); what a killed one left goes after a day.
FOLDERS = """
mkdir -p "$1/runs" && cd "$1/runs" || exit 1
find . ../checkout -maxdepth 1 -name '.incoming-*' -mtime +0 -exec rm -rf {} +
mkdir ".incoming-$2" || exit 1
shift 2
for sweep; do
    mkdir -p "$sweep" || exit 1
    for path in "$sweep"/*; do
        [ -e "$path" ] || continue
        rows=0
        if [ -s "$path/result.json" ]; then
            rows=all
        elif [ -s "$path/resume.pt" ] && [ -f "$path/metrics.jsonl" ]; then
            rows=$(wc -l < "$path/metrics.jsonl")
        fi
        echo ${rows:-0} "$path"
    done
done
"""
CODE = f"""
cd "$1/checkout" || exit 1
new=".incoming-$2"
cat > "$new" && [ "$(wc -l < "$new")" -eq "$3" ] || exit 1
if [ -f {PUSHED} ]; then grep -vxFf "$new" {PUSHED} | while IFS= read -r name; do rm -f -- "$name"; done; fi
mv "$new" {PUSHED} && echo "$2" > {PUSHED_NAME}
"""
CHECKSUMS = """
cd "$1/runs" || exit 1; shift
if command -v sha256sum >/dev/null; then sum=sha256sum; else sum='shasum -a 256'; fi
for sweep; do
    [ ! -d "$sweep" ] || find "$sweep" -name '.*' -prune -o -type f -exec $sum {} + || exit 1
done
echo end
"""


# To the machine


def code_files() -> list[str]:
    """What the checkout is made of, from ROOT: what git knows, or would add below PROJECT; all of that without git."""
    names = [*_git_files("-c"), *_git_files("-o", "--exclude-standard", "--", *PROJECT)]
    if not names:
        for path in (ROOT / name for name in PROJECT):
            below = path.rglob("*") if path.is_dir() else [path]
            names += [p.relative_to(ROOT).as_posix() for p in below if "__pycache__" not in p.parts]
    return sorted({name for name in names if name and "\n" not in name and (ROOT / name).is_file()})


def not_pushed() -> list[str]:
    """What git would add, and is not of the project: notes, data, keys."""
    return sorted({*_git_files("-o", "--exclude-standard")} - {*code_files()})


def _git_files(*words: str) -> list[str]:
    """[] without git."""
    try:
        listed = subprocess.run(["git", "ls-files", "-z", *words], cwd=ROOT, capture_output=True).stdout
    except FileNotFoundError:
        return []
    return [name for name in os.fsdecode(listed).split("\0") if name]


def data_files(sweeps: tuple[Sweep, ...]) -> list[str]:
    """Files of the folders of shards that the runs use, from ROOT. DataError; RemoteError where they lie elsewhere."""
    names: set[str] = set()
    root = ROOT.absolute()
    configs = [config for sweep in sweeps for config in sweep.runs.values()]
    for config in {(c.data_path, c.tokenizer, c.tokenizer_path, c.vocab_size): c for c in configs}.values():
        dataset = open_dataset(config)
        for path in [*dataset.directory.absolute().iterdir(), dataset.tokenizer_path.absolute()]:
            named = (config.data_path, config.tokenizer_path)
            if any(map(os.path.isabs, named)) or not path.is_relative_to(root) or ".." in path.parts:
                raise RemoteError(
                    f"data: push: {path} is to be below {root}, and data_path to name it from there: on the machine "
                    "the folder has another place. Or put it there yourself and set data: there"
                )
            if path.is_file() and not path.name.endswith((".tmp", ".lock")):
                names.add(path.relative_to(root).as_posix())
    return sorted(names)


def push_code(pod: Pod, sweeps: tuple[Sweep, ...], others: list[str], new: str, say: Callable[[str], None]) -> None:
    """Code, and the data of the sweeps. others: jobs that run there, whose code must stay what it is.

    new: a name that nobody who pushes at the same time has.
    """
    code, data = code_files(), data_files(sweeps) if pod.data == "push" else []
    checkout = [".", *at(pod, "checkout/")]
    if others:
        dry = rsync(pod, ["-rlptn", "--checksum", "--out-format=%i %n", *checkout], ROOT, code).stdout.decode()
        changed = [line.split(" ", 1)[1] for line in dry.splitlines() if line.startswith("<f")]
        there = run_script(pod, f'cat "$1/checkout/{PUSHED}" 2>/dev/null; exit 0', pod.dir).splitlines()
        if changed := changed + sorted({*there} - {*code}):
            raise RemoteError(
                f"{pod.address}: job {', '.join(others)} runs there with other code ({', '.join(changed[:5])}); wait "
                "for it, or set another dir:"
            )
    run_script(pod, f'mkdir -p "$1/checkout" && rm -f "$1/checkout/{PUSHED_NAME}"', pod.dir)
    say(f"pushing {len(code)} files of code")
    if unknown := not_pushed():
        more = f" and {len(unknown) - 5} more" if len(unknown) > 5 else ""
        say(f"not pushed: {', '.join(unknown[:5])}{more}, which git does not know")
    send(pod, checkout, ROOT, code)
    if data:
        size = sum((ROOT / name).stat().st_size for name in data)
        say(f"pushing {len(data)} files of data, {size:,} bytes")
        send(pod, checkout, ROOT, data)
    run_script(pod, CODE, pod.dir, new, str(len(code)), more="\n".join(code) + "\n")


def pushed_name(pod: Pod) -> str:
    """The name of the last push of code; '' where there was none."""
    return run_script(pod, f'cat "$1/checkout/{PUSHED_NAME}" 2>/dev/null; exit 0', pod.dir).strip()


def push_runs(pod: Pod, sweeps: tuple[Sweep, ...], new: str, say: Callable[[str], None]) -> None:
    """What home has more of than the machine, into runs/.incoming-<new> there: complete runs, and what others go on
    from."""
    listed = run_script(pod, FOLDERS, pod.dir, new, *(sweep.name for sweep in sweeps)).splitlines()
    there = {path: rows for rows, _, path in (line.partition(" ") for line in listed)}
    if results := [name for sweep in sweeps for name in _to_go_on(sweep, there)]:
        say(f"pushing {len(results)} files of runs that are home already")
        send(pod, [".", *at(pod, f"runs/.incoming-{new}/")], directory.RUNS, results)


def send(pod: Pod, words: list[str], cwd: Path, names: list[str]) -> None:
    """Copy these files of a folder to the pod, all of them."""
    if rsync(pod, ["-rlpt", *words], cwd, names).returncode == PARTIAL:
        raise RemoteError(f"{pod.address}: not every file could be pushed; is {pod.dir} writable there?")


def _to_go_on(sweep: Sweep, there: dict[str, str]) -> list[str]:
    """Files of the sweep, from runs/, that the machine lacks: of runs that are complete here alone, or further.

    there: path from runs/ -> 'all' of a complete run, else how many rows of metrics go with its resume file.
    """
    names = [f"{sweep.name}/sweep.json"] if (sweep.directory / "sweep.json").exists() else []
    names = [name for name in names if name not in there]
    for run_dir in wanted(sweep):
        place = f"{sweep.name}/{run_dir.name}"
        if there.get(place) == "all":
            continue
        complete = is_complete(run_dir)
        further = (run_dir / RESUME).exists() and (place not in there or _rows(run_dir) > int(there[place]))
        if not complete and not further:
            continue
        without = {"error.json", *([RESUME] if complete else [])}
        if complete and not sweep.stages:  # whose weights nobody there needs
            without.add(CHECKPOINT)
        names += [
            f"{place}/{path.name}" for path in sorted(run_dir.iterdir())
            if path.is_file() and path.name not in without and not path.name.startswith(".")
        ]  # fmt: skip
    return names


def _rows(run_dir: Path) -> int:
    metrics = run_dir / "metrics.jsonl"
    return metrics.read_bytes().count(b"\n") if metrics.exists() else 0


# Home


@dataclass(frozen=True)
class Pulled:
    """What a pull did. whole: every file could be read there."""

    changed: list[str] = field(default_factory=list)  # <sweep>/<run>/<file> that are new or other than before
    kept: dict[str, str] = field(default_factory=dict)  # files of which home has what is better, and why
    held: dict[str, str] = field(default_factory=dict)  # results that wait for the file they name
    whole: bool = True


def folder(job: str) -> Path:
    """Of what home knows about a job: state.json, and the job's own folder there, with its logs."""
    return directory.RUNS / REMOTE / job


def pull(pod: Pod, job: str, names: list[str], checksum: bool = False) -> Pulled:
    """Bring home what is new in these folders below runs/ there, and in the job's.

    checksum: read all files on both sides, not only their sizes and times. Raises UnreachableError, RemoteError or
    OSError; whatever had arrived whole is home then.
    """
    arriving = folder(job) / ARRIVING
    arriving.mkdir(parents=True, exist_ok=True)
    for leftover in arriving.rglob(".*"):
        if leftover.is_file() and leftover.parent.name != ".partial":
            leftover.unlink()
    words = ["-rtR", "--partial-dir=.partial", "--exclude=.*", "--compare-dest=../..", "--compare-dest=../../.."]
    words += ["--checksum"] if checksum else []
    sources = [*at(pod, *(f"runs/./{name}" for name in names), f"jobs/./{job}"), "."]
    try:
        # Resume files first: then log and metrics at home reach at least as far as the training they belong to.
        only = [f"--include={RESUME}", "--include=*/", "--exclude=*"]
        status = [rsync(pod, [*words, *only, *sources], arriving).returncode]
        status.append(rsync(pod, [*words, f"--exclude={RESUME}", *sources], arriving).returncode)
    except (RemoteError, OSError):
        _take_in(job, names, resume=False)
        raise
    changed, kept, held = _take_in(job, names, resume=PARTIAL not in status)
    return Pulled(changed, kept, held, PARTIAL not in status)


def _take_in(job: str, names: list[str], resume: bool) -> tuple[list[str], dict[str, str], dict[str, str]]:
    """Move what arrived into its place; (changed, kept, held) of Pulled."""
    arriving = folder(job) / ARRIVING
    changed, kept, held = [], {}, {}
    found = [path for path in arriving.rglob("*") if path.is_file() and ".partial" not in path.parts]
    complete: dict[Path, bool] = {}
    # Results last, when what they speak of is in its place.
    for path in sorted(found, key=lambda path: (path.name == "result.json", path.name == RESUME, path)):
        place = path.relative_to(arriving)
        if place.parts[0] not in (*names, job) or (path.name == RESUME and not resume):
            continue
        ours = place.parts[0] == job
        there = (directory.RUNS / REMOTE if ours else directory.RUNS) / place
        run_dir = directory.RUNS.joinpath(*place.parts[:2])
        if not ours and len(place.parts) > 2 and run_dir not in complete:
            complete[run_dir] = is_complete(run_dir)
        if path.name == "result.json" and not complete.get(run_dir) and (why := _result_waits(path.parent, run_dir)):
            held["/".join(place.parts[:2])] = why
            path.unlink()
        elif path.name == RESUME and there.exists() and f"{place.parent.as_posix()}/metrics.jsonl" in kept:
            kept[place.as_posix()] = "home is further"
            path.unlink()
        elif why := why_kept(path, there, complete.get(run_dir, False)):
            kept[place.as_posix()] = why
            path.unlink()
        else:
            there.parent.mkdir(parents=True, exist_ok=True)
            os.replace(path, there)
            changed.append(place.as_posix())
    if resume:  # all that is left is empty folders, and parts of files that were no more there
        shutil.rmtree(arriving, ignore_errors=True)
    return changed, kept, held


def why_kept(arrived: Path, there: Path, complete: bool) -> str:
    """Why a file that arrived must not take the place of what is home, '' where it may. complete: its run is, here.

    Logs grow, and a truncated file is a beginning of the whole one: so a beginning never replaces what it begins. A
    training that goes on from its resume file writes its later rows anew; from the first that differs theirs count.
    """
    if complete and arrived.name not in LATER and (there.exists() or arrived.name in ("error.json", RESUME)):
        return "the run is complete here"
    if arrived.suffix in (".json", ".ipynb") and not _is_json(arrived):
        return TORN
    size = arrived.stat().st_size
    if not there.exists() or size >= there.stat().st_size:
        return ""
    return "home has more of it" if _begins(arrived, there, size) else ""


def _is_json(path: Path) -> bool:
    try:
        return isinstance(json.loads(path.read_bytes()), dict)
    except ValueError:
        return False


def _begins(part: Path, whole: Path, size: int, piece: int = 1 << 20) -> bool:
    with open(part, "rb") as a, open(whole, "rb") as b:
        return all(a.read(n) == b.read(n) for at in range(0, size, piece) if (n := min(piece, size - at)))


def is_complete(run_dir: Path) -> bool:
    """Whether the run has a result and every file is what it wrote."""
    try:
        result = read_result(run_dir)
    except RunError:
        return False
    return result is not None and not integrity.damage(run_dir, vars(result), thorough=True)


def _result_waits(arrived: Path, run_dir: Path) -> str:
    """What a result that arrived in a folder speaks of and is not home yet; '' where it all is."""
    try:
        result = read_result(arrived)
    except RunError:
        return f"result.json ({TORN})"
    return integrity.damage(run_dir, vars(result), thorough=True)


# At the end


def checksums(pod: Pod, names: list[str]) -> dict[str, str]:
    """sha256 of every file of these folders below runs/ there, computed there."""
    lines = run_script(pod, CHECKSUMS, pod.dir, *names, timeout=3600).splitlines()
    if not lines or lines[-1] != "end":
        raise UnreachableError(f"{pod.address}: the connection broke while files were read there")
    return {line[66:]: line[:64] for line in lines[:-1]}


def differing(pod: Pod, job: str, names: list[str], kept: dict[str, str]) -> list[str]:
    """Files there that are not home with their checksums, nor known to be better here, after TRIES more pulls."""
    for i in range(TRIES + 1):
        there = checksums(pod, names)
        homes = {name: directory.RUNS / name for name in there}
        differ = [n for n, path in homes.items() if not path.is_file() or checksum(path) != there[n]]
        differ = [n for n in differ if n not in kept or (kept[n] == TORN and n.split("/")[-1] not in LATER)]
        if not differ or i == TRIES:
            return differ
        kept = kept | pull(pod, job, names, checksum=True).kept
    raise AssertionError("unreachable")


def wanted(sweep: Sweep) -> list[Path]:
    """The folders of all runs and stages of a sweep."""
    return [sweep.directory / name for name in [*sweep.runs, *(stage.notebook for stage in sweep.stages)]]


def shortfalls(sweep: Sweep, log: str, all_ran: bool) -> tuple[list[str], list[str]]:
    """(what forbids that the machine goes, runs without a result), in sentences, from what is home.

    log: what the job said. A run that failed without leaving why gets its reason from there.
    """
    problems, failed = [], []
    stages = [stage.notebook for stage in sweep.stages]
    for run_dir in wanted(sweep):
        name = f"{sweep.name}/{run_dir.name}"
        files = [path for path in run_dir.iterdir() if path.name != ".lock"] if run_dir.is_dir() else []
        if not files:
            if all_ran or run_dir.name not in stages:
                problems.append(f"{name}: nothing of it is there")
            else:
                failed.append(f"{name}: was not run, since runs before it failed")
            continue
        try:
            result = read_result(run_dir)
        except RunError as error:
            problems.append(str(error))
            continue
        if result is not None:
            if damage := integrity.damage(run_dir, vars(result), thorough=True):
                problems.append(f"{name}: damaged: {damage}")
        else:
            if read_json(run_dir / "error.json") is None:
                said = re.search(rf"^{re.escape(run_dir.name)} +FAILED: (.*)$", log, re.MULTILINE)
                write_failure(run_dir, RemoteError(said[1] if said else "ended without a result, and without a word"))
            error = read_json(run_dir / "error.json") or {}
            failed.append(f"{name}: " + " ".join(f"{error.get('error')}: {error.get('message')}".split()))
        lacking = integrity.lacking(run_dir, training=run_dir.name not in stages)
        problems += [f"{name}: has no {', '.join(lacking)}"] if lacking else []
    return problems, failed


def interrupt(sweep: Sweep, why: str) -> list[str]:
    """Mark the runs that began and have neither result nor reason; their names."""
    marked = []
    for run_dir in wanted(sweep):
        if (run_dir / "config.json").exists() and not (run_dir / "result.json").exists():
            error = read_json(run_dir / "error.json")
            if error is None or error.get("error") == INTERRUPTED:
                write_interruption(run_dir, why)
                marked.append(f"{sweep.name}/{run_dir.name}")
    return marked


def forget_errors(sweeps: tuple[Sweep, ...], interruptions: bool = False) -> None:
    """Why runs ended without a result, because they are tried again; or that they were interrupted, as they go on."""
    for run_dir in (run_dir for sweep in sweeps for run_dir in wanted(sweep)):
        error = read_json(run_dir / "error.json") or {}
        marked = error.get("error") == INTERRUPTED
        if (marked or not interruptions) and not (run_dir / "result.json").exists():
            (run_dir / "error.json").unlink(missing_ok=True)
