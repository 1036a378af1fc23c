"""`pgolf`: the workbench from the command line."""

import argparse
import os
import sys
from pathlib import Path

from pgolf_core.config import ROOT, ConfigError, RunConfig

DEMO = ROOT / "notebooks" / "sweeps" / "demo.yaml"


def main(words: list[str] | None = None) -> int:
    """Exit status: 0 done, 1 some runs failed, 2 the request cannot be met, 130 stopped by Ctrl-C."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a redirected Windows console cannot say Δ
    arguments = _parser().parse_args(words)
    if "command" not in arguments:
        _parser().print_help()
        return 0
    try:
        return arguments.command(arguments)
    except BrokenPipeError:  # the reader of our output has seen enough: `pgolf runs | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        # Ours are for users: ConfigError, DataError, RunError, SweepError, TrainError … Others keep their traceback.
        if not type(error).__module__.startswith("pgolf_core."):
            raise
        print(f"pgolf: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\npgolf: stopped; the same command goes on where this one was", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="pgolf", description="The lowest bits per byte that fits in N bytes.")
    commands = parser.add_subparsers(metavar="COMMAND")

    def command(function, name: str, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(command=function)
        return sub

    sub = command(demo, "demo", "corpus, demo sweep and report: ten minutes on two cores")
    sub.add_argument("--slots", type=int, metavar="N", help="notebooks at a time")

    sub = command(sweep, "sweep", "run what is missing of sweep files, one after the other")
    sub.add_argument("files", type=_file, nargs="+", metavar="FILE")
    sub.add_argument("--scale", default="", metavar="nano", help="nano = each run shrunk to a minute on one CPU thread")
    sub.add_argument(
        "--seeds", type=int, nargs="+", metavar="SEED", help="every run once for each; what is there stays"
    )
    sub.add_argument("--slots", type=int, metavar="N", help="notebooks at a time; default: what the cores or GPUs hold")
    sub.add_argument("--dry-run", action="store_true", help="check the file and say what would run")
    _add_knobs(sub)

    sub = command(train, "train", "one run, without a notebook")
    sub.add_argument("--run-dir", type=Path, metavar="DIR", help="default: runs/explore/<track>-<hash of the knobs>")
    sub.add_argument("--config", type=_file, metavar="FILE", help="knobs as YAML or JSON; a run's config.json too")
    _add_knobs(sub)

    sub = command(list_runs, "runs", "all runs in a table")
    sub.add_argument("sweep", nargs="?", metavar="SWEEP")
    sub.add_argument("--verify", action="store_true", help="hold every artifact and checkpoint to its checksum")

    sub = command(import_log, "import-log", "make runs of training logs, with what is odd about each")
    sub.add_argument("paths", type=Path, nargs="+", metavar="PATH", help="a log, or a folder with logs in it or below")
    sub.add_argument("--sweep", metavar="NAME", help="default: the name of the folder that holds submission.json")
    sub.add_argument("--out", type=Path, metavar="RUNS_DIR", help="default: runs")

    sub = command(diff, "diff", "what differs between two runs or imported logs, and whether that is what is claimed")
    sub.add_argument("runs", nargs=2, metavar="RUN", help="sweep/run below runs/, or a folder")
    sub.add_argument("--claim", nargs="*", metavar="KNOB", help="knobs that are said to be the only change")

    sub = command(report, "report", "write the reports of all runs: index.html and the pages it links")
    sub.add_argument("--out", type=Path, default=ROOT / "reports", metavar="DIR")

    sub = command(artifact, "artifact", "check an artifact file and account for its bytes")
    sub.add_argument("file", type=_file, metavar="FILE")

    sub = command(submission, "submission", "score a run's file again, audit its data, and pack what it claims")
    sub.add_argument("run", metavar="RUN", help="sweep/run below runs/, or a folder")
    sub.add_argument("--out", type=Path, metavar="DIR", help="default: reports/submissions/<sweep>_<run>")

    data = commands.add_parser("data", help="make data ready, and hold it to what its scores claim")
    data.set_defaults(command=lambda _: data.print_help() or 0)
    _add_data_commands(data.add_subparsers(metavar="SOURCE"))
    return parser


def _add_data_commands(sources) -> None:
    def source(function, name: str, text: str) -> argparse.ArgumentParser:
        sub = sources.add_parser(name, help=text, description=text)
        sub.set_defaults(command=function)
        return sub

    def add_tokenizer(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("--tokenizer", default="bpe", metavar="KIND", help="bpe (default), unigram or bytes")
        sub.add_argument("--vocab-size", type=_count, metavar="V", help="pieces; default 1024, of bytes 260")

    def add_hub(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("--revision", default="main", metavar="R", help="branch, tag or commit of the publication")
        sub.add_argument("--endpoint", metavar="URL", help="a mirror of the hub")

    sub = source(data_embedded, "embedded", "docstrings of the installed packages: 17 MB of English, no download")
    add_tokenizer(sub)
    sub.add_argument("--large", action="store_true", help="35 MB: more packages, short docstrings, comments")

    sub = source(data_fineweb, "fineweb", "the challenge's published shards")
    sub.add_argument("--variant", default="sp1024", metavar="NAME", help="sp1024 (default), byte260 …: its tokenizer")
    sub.add_argument("--train-shards", type=_count, default=1, metavar="N", help="of 100,000,000 tokens, 200 MB, each")
    add_hub(sub)
    sub.add_argument("--out", type=Path, metavar="DIR", help="default: data/fineweb10B_<variant>")

    sub = source(data_docs, "docs", "shards of documents: your own, or those the challenge published")
    sub.add_argument(
        "source", nargs="?", type=Path, metavar="PATH", help="a .jsonl, .txt or .parquet file, or a folder"
    )
    sub.add_argument("--documents", type=_count, default=0, metavar="N", help="only the first N; default: all")
    sub.add_argument("--val-documents", type=_count, default=0, metavar="N", help="the first N are for validation")
    sub.add_argument("--val-share", type=float, default=0.0, metavar="S", help="a share of them is, by hash: 0.01")
    add_tokenizer(sub)
    sub.add_argument("--tokenizer-path", type=_file, metavar="FILE", help="a tokenizer that is there, instead")
    sub.add_argument("--tokenizer-documents", type=_count, default=500_000, metavar="K", help="train it on the first K")
    sub.add_argument("--field", default="text", metavar="NAME", help="of a .jsonl or .parquet row")
    sub.add_argument(
        "--split", default="auto", metavar="HOW", help="of .txt: a document is a file, blank (lines), line"
    )
    sub.add_argument("--keep-overlap", action="store_true", help="training documents that are validation ones too stay")
    sub.add_argument("--workers", type=_count, default=0, metavar="W", help="threads; default: a core each")
    add_hub(sub)
    sub.add_argument("--download", type=Path, metavar="DIR", help="of published documents; default: data/docs")
    sub.add_argument("--out", type=Path, metavar="DIR", help="default: data/<name>_<tokenizer>")

    sub = source(
        data_audit, "audit", "hold a folder of shards to what its scores claim; exit 1 where they would be false"
    )
    sub.add_argument("folder", type=Path, metavar="DIR")
    sub.add_argument("--fast", action="store_true", help="what every run does: a sample of documents")
    sub.add_argument("--seq-len", type=_count, default=1024, metavar="N", help="window in tokens; default 1024")
    sub.add_argument("--max-tokens", type=_count, default=0, metavar="N", help="that are scored; default: all")
    sub.add_argument("--max-documents", type=_count, default=0, metavar="N", help="that are scored; default: all")
    sub.add_argument(
        "--source", type=Path, metavar="PATH", help="documents it was made of: their bytes must be counted"
    )


def _count(text: str) -> int:
    """A whole number, with or without thousands separators."""
    digits = text.replace(",", "").replace("_", "")
    if not digits.isdecimal():
        raise argparse.ArgumentTypeError(f"{text}: expected a whole number, like 50,000")
    return int(digits)


def _file(name: str) -> Path:
    if not Path(name).is_file():
        raise argparse.ArgumentTypeError(f"{name}: no such file")
    return Path(name)


def _add_knobs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-k", dest="knobs", action="append", default=[], metavar="NAME=VALUE", help="a knob of RunConfig"
    )


def _knobs(pairs: list[str]) -> dict[str, str]:
    """Values stay text, as they are in the environment; RunConfig reads them by the knob's type."""
    if bad := [pair for pair in pairs if "=" not in pair]:
        raise ConfigError(f"-k {' '.join(bad)}: expected NAME=VALUE")
    return dict(pair.split("=", 1) for pair in pairs)


# Torch takes seconds to import, so what needs it is imported where it is used.


def demo(arguments: argparse.Namespace) -> int:
    from pgolf_core import report, runs, tables
    from pgolf_core.sweep import load_sweep, run_sweep

    failures = run_sweep(DEMO, arguments.slots)
    pages = report.write_reports(root=runs.RUNS, out=ROOT / "reports")
    table = runs.load(runs.RUNS)
    directory = load_sweep(DEMO).directory
    print(tables.summary(table[table.sweep == directory.name]))
    print(f"\nThe reports: {', '.join(map(str, pages))}\nEvery run, with its executed notebook: {directory}")
    return 1 if failures else 0


def sweep(arguments: argparse.Namespace) -> int:
    from pgolf_core.sweep import load_sweep, run_sweep

    knobs, failures = _knobs(arguments.knobs), []
    for file in arguments.files:  # what is wrong with any of them is said before the first one runs
        load_sweep(file, knobs, arguments.scale, arguments.seeds)
    for file in arguments.files:
        if arguments.dry_run:
            _dry_run(load_sweep(file, knobs, arguments.scale, arguments.seeds))
        else:
            failures += run_sweep(file, arguments.slots, knobs, arguments.scale, arguments.seeds)
    if failures:
        print(f"pgolf: {len(failures)} failed: {', '.join(f.run for f in failures)}", file=sys.stderr)
        print("the same command tries these again, and nothing else", file=sys.stderr)
    return 1 if failures else 0


def _dry_run(checked) -> None:
    from pgolf_core import runs
    from pgolf_core.forecast import check
    from pgolf_core.sweep import missing, plan, slot_environments

    jobs, stages = missing(checked)
    to_run = {job.name for job in jobs} | {stage.notebook for stage in stages}
    status = dict(runs.load(checked.directory)[["run", "status"]].itertuples(index=False))
    print(f"{checked.name}: {checked.question}" if checked.question else checked.name)
    for name in [job.name for job in plan(checked)] + [stage.notebook for stage in checked.stages]:
        print(f"  {name:32} {status.get(name, 'new'):12} {'to run' if name in to_run else ''}".rstrip())
    slots = len(slot_environments([job.config for job in jobs]))
    print(f"{len(to_run)} to run, {slots} at a time")
    check({job.name: job.config for job in jobs}, print)


def train(arguments: argparse.Namespace) -> int:
    from pgolf_core import runs
    from pgolf_core.train import train

    knobs = _knobs(arguments.knobs)
    config = RunConfig.from_file(arguments.config, **knobs) if arguments.config else RunConfig(**knobs)
    run_dir = arguments.run_dir or runs.RUNS / "explore" / runs.run_name(config)
    train(config, run_dir)
    print(run_dir)
    return 0


def list_runs(arguments: argparse.Namespace) -> int:
    from pgolf_core import runs

    table = runs.load(runs.RUNS, arguments.verify)
    if arguments.sweep:
        sweeps = sorted(set(table.sweep))
        if arguments.sweep not in sweeps:
            raise runs.RunError(f"{runs.RUNS} has no sweep {arguments.sweep}; it has {', '.join(sweeps) or 'none'}")
        table = table[table.sweep == arguments.sweep]
    if table.empty:
        print(f"no runs in {runs.RUNS} yet; `pgolf demo` makes some")
        return 0
    print(_table(table))
    return 0


def _table(table) -> str:
    """A DataFrame of runs as text; a figure that a run does not have stays empty."""

    def figures(column: str, form: str) -> list[str]:
        return ["" if value != value else format(value, form) for value in table[column].astype(float)]

    over = ["over its cap" if value is True else "" for value in table.over_cap]
    notes = [" ".join(f"{note} {problem}".split()) for note, problem in zip(over, table.problem, strict=True)]
    columns = [
        ["sweep", *table.sweep],
        ["run", *table.run],
        ["status", *table.status],
        ["bpb", *figures("bpb", ".4f")],
        ["bytes", *figures("total_bytes", ",.0f")],
        ["cap", *figures("cap_bytes", ",.0f")],
        ["seconds", *figures("train_seconds", ".0f")],
    ]
    numbers = ("bpb", "bytes", "cap", "seconds")
    widths = [max(map(len, column)) for column in columns]
    padded = [
        [cell.rjust(width) if column[0] in numbers else cell.ljust(width) for cell in column]
        for column, width in zip(columns, widths, strict=True)
    ]
    return "\n".join("  ".join(row).rstrip() for row in zip(*padded, ["", *notes], strict=True))


def import_log(arguments: argparse.Namespace) -> int:
    from pgolf_core import records, runs

    imported, remarks = records.import_logs(arguments.paths, arguments.sweep, arguments.out or runs.RUNS)
    names = [f"{run.run_dir.parent.name}/{run.run_dir.name}" for run in imported]
    for run, name in zip(imported, names, strict=True):
        bpb = "no final score" if run.bpb is None else f"{run.bpb:.8f} bpb"
        size = "size unknown" if run.total_bytes is None else f"{run.total_bytes:,} bytes"
        again = "  was imported before" if run.again else ""
        print(f"{name:{max(map(len, names))}}  {run.status:10}  {bpb:14}  {size:>16}{again}")
        for remark in run.remarks:
            print(f"    {remark}")
    for remark in remarks:
        print(remark)
    return 0


def diff(arguments: argparse.Namespace) -> int:
    """Exit status 1 where --claim is given and does not hold."""
    from pgolf_core import difference

    rows = difference.between(*map(_run_dir, arguments.runs))
    for row in rows.itertuples():
        print(f"{row.kind:9} {row.setting:32} {row.ours!r}  {row.theirs!r}")
    knobs = list(rows.setting[rows.kind == "knob"])
    print(
        f"{len(knobs)} knob{'s' * (len(knobs) > 1)} differ{'s' * (len(knobs) == 1)}"
        if knobs
        else "no knob differs: whatever their scores, no change of a knob made them"
    )
    if arguments.claim is None:
        return 0
    problem = difference.judge(rows, arguments.claim)
    print(f"not a clean comparison: {problem}" if problem else "just what is claimed")
    return 1 if problem else 0


def _run_dir(name: str) -> Path:
    """The folder of that name, else the run below runs/."""
    from pgolf_core import runs

    return Path(name) if Path(name).is_dir() else runs.RUNS / name


def report(arguments: argparse.Namespace) -> int:
    from pgolf_core import report, runs

    for page in report.write_reports(root=runs.RUNS, out=arguments.out):
        print(page)
    return 0


def artifact(arguments: argparse.Namespace) -> int:
    from pgolf_core.artifact import read

    print(_account(read(arguments.file)))
    return 0


def _account(unpacked) -> str:
    """Every byte of a file, for a terminal: by part, then by tensor where the codec tells."""
    from pgolf_core.artifact import ACCOUNT, PARTS

    total = sum(unpacked.parts.values())
    versions = ", ".join(f"{package} {version}" for package, version in unpacked.libraries.items())
    lines = [f"artifact version {unpacked.version}, {len(unpacked.arrays)} arrays; whole, checksums right"]
    lines += [f"written with {versions}"] if versions else []
    lines += ["", f"{'part':14} {'codec':8} {'arrays':>7} {'decoded':>12} {'stored':>12} {'share':>7}"]
    for part in [*ACCOUNT, *sorted(unpacked.parts.keys() - set(ACCOUNT))]:
        if part in unpacked.parts:
            members = [a for name, a in unpacked.arrays.items() if PARTS.get(name.partition("/")[0]) == part]
            decoded = f"{sum(a.nbytes for a in members):,}" if members else ""
            figures = f"{len(members) or '':>7} {decoded:>12} {unpacked.parts[part]:>12,}"
            lines.append(f"{part:14} {unpacked.codecs.get(part, ''):8} {figures} {unpacked.parts[part] / total:>7.1%}")
    lines += [f"{'total':14} {'':8} {len(unpacked.arrays):>7} {'':>12} {total:>12,}"]
    matrices = {name: a for name, a in unpacked.arrays.items() if name.startswith(("q/", "index/"))}
    if matrices:
        width = max(len(name) for name in matrices) - 2
        lines += ["", f"{'tensor':{width}} {'shape':>14} {'levels':>7} {'stored':>12} {'bits each':>10}"]
    for name, a in matrices.items():
        stored = unpacked.array_bytes[name]
        size = ("", "") if stored is None else (f"{stored:,}", f"{8 * stored / max(a.size, 1):.2f}")
        levels = int(a.max()) - int(a.min()) + 1 if a.size else 0
        shape = " × ".join(map(str, a.shape))
        lines.append(f"{name.partition('/')[2]:{width}} {shape:>14} {levels:>7,} {size[0]:>12} {size[1]:>10}".rstrip())
    return "\n".join(lines)


def submission(arguments: argparse.Namespace) -> int:
    from pgolf_core.submission import submit

    print(submit(_run_dir(arguments.run), arguments.out))
    return 0


def data_embedded(arguments: argparse.Namespace) -> int:
    from pgolf_core import corpus

    kind = arguments.tokenizer
    print(corpus.build_embedded(_vocab_size(arguments), kind=kind, large=arguments.large))
    return 0


def _vocab_size(arguments: argparse.Namespace) -> int:
    return arguments.vocab_size or (260 if arguments.tokenizer == "bytes" else 1024)


def data_fineweb(arguments: argparse.Namespace) -> int:
    from pgolf_core import hub

    out = arguments.out and arguments.out.absolute()  # of the command line: from here, not from the checkout
    hub.fineweb(arguments.variant, arguments.train_shards, arguments.revision, arguments.endpoint, out)
    return 0


def data_docs(arguments: argparse.Namespace) -> int:
    from pgolf_core import documents, hub, tokenization, vocabulary
    from pgolf_core.files import DataError

    published = arguments.source is None
    kind, vocab_size = arguments.tokenizer, _vocab_size(arguments)
    if arguments.tokenizer_path:
        if arguments.vocab_size:
            raise DataError("--vocab-size: the tokenizer at --tokenizer-path has a size of its own; name one of them")
        name = arguments.tokenizer_path.stem
    else:
        vocabulary.check(kind, vocab_size)
        name = vocabulary.name_of(kind, vocab_size)
    wanted = arguments.documents
    if published:
        trained_on = 0 if arguments.tokenizer_path or kind == "bytes" else arguments.tokenizer_documents
        folder = arguments.download and arguments.download.absolute()
        path = hub.documents(wanted and max(wanted, trained_on), arguments.revision, arguments.endpoint, folder)
        val_documents = arguments.val_documents or (0 if arguments.val_share else 50_000)
    else:
        path, val_documents = arguments.source.resolve(), arguments.val_documents
    val_share = arguments.val_share or (0.0 if val_documents else 0.01)
    stem = "docs" if published else path.stem
    out = arguments.out or ROOT / "data" / f"{stem}{f'_{wanted}' if wanted else ''}_{name}"
    tokenization.build(
        documents.open_source(path, arguments.field, arguments.split),
        out.absolute(),
        kind=kind,
        vocab_size=vocab_size,
        tokenizer_path=arguments.tokenizer_path,
        documents=wanted,
        val_documents=val_documents,
        val_share=val_share,
        tokenizer_documents=arguments.tokenizer_documents,
        tokenizer_sees_val=published,  # as the published tokenizers did
        keep_overlap=arguments.keep_overlap or published,
        workers=arguments.workers,
    )
    return 0


def data_audit(arguments: argparse.Namespace) -> int:
    """Exit status 1 where a score on this data would be false."""
    from pgolf_core import audit, documents, tokenization
    from pgolf_core.data import Dataset
    from pgolf_core.files import DataError

    folder = arguments.folder.absolute()
    if not folder.is_dir():
        raise DataError(f"{arguments.folder}: no such folder")
    options = dict(seq_len=max(1, arguments.seq_len), thorough=not arguments.fast)
    limits = dict(max_tokens=arguments.max_tokens, max_documents=arguments.max_documents)
    if arguments.source:
        told = Dataset.open(folder).about.get("source", {})
        source = documents.open_source(arguments.source.resolve(), told.get("field", "text"), told.get("split", "auto"))
        if any(told.get(name) != value for name, value in source.about().items()):
            raise DataError(f"{arguments.source}: not what {arguments.folder} was made of, as its dataset.json tells")
        options["documents"] = tokenization.validation_texts(source, told)
    found = audit.inspect(folder, **options, **limits)
    print(audit.words(found))
    if found.thorough and not any(limits.values()):
        audit.store(Dataset.open(folder), found)  # runs on it tell that it was done, or refuse it
    return 0 if found.ok else 1


def console() -> None:
    """Of the shell: `main`, and its exit status."""
    status = main()
    sys.stdout.flush()
    sys.stderr.flush()
    if status == 130:  # without waiting for threads: SentencePiece may be at work in one, and would abort
        os._exit(status)
    sys.exit(status)


if __name__ == "__main__":
    console()
