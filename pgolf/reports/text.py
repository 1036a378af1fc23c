"""Tables for a terminal: runs, imported logs, and the bytes of an artifact."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd

    from pgolf.analysis.records import Imported
    from pgolf.runs.result import Result
    from pgolf_core.artifact.container import Unpacked


def runs(table: "pd.DataFrame") -> str:
    """A DataFrame of runs as text; a figure that a run does not have stays empty."""
    rows = [("sweep", "run", "status", "bpb", "bytes", "cap", "seconds", "")]
    for run in table.itertuples():
        figures = [(run.bpb, ".4f"), (run.total_bytes, ",.0f"), (run.cap_bytes, ",.0f"), (run.train_seconds, ".0f")]
        late = "; ".join(run.flags) if run.kind == "train" else ""
        note = " ".join(f"{'over its cap' * (run.over_cap is True)} {late} {run.problem}".split())
        known = ["" if value is None or value != value else format(value, form) for value, form in figures]
        rows.append((run.sweep, run.run, run.status, *known, note))
    return "\n".join(aligned(rows, "<<<>>>><"))


def answer(result: "Result") -> str:
    """'4.5270 bpb in 938,732 of 1,000,000 bytes, fits', or why there is no such score."""
    if result.roundtrip_val_bpb is None:
        raw = "no score" if result.val_bpb is None else f"{result.val_bpb:.4f} bpb of the unquantized weights"
        return f"{raw}; no file was written and scored, since final_roundtrip_eval is 0"
    over = (result.total_bytes or 0) - (result.cap_bytes or 0)
    fits = "fits" if result.fits else f"over its cap by {over:,} bytes"
    return f"{result.roundtrip_val_bpb:.4f} bpb in {result.total_bytes:,} of {result.cap_bytes:,} bytes, {fits}"


def columns(table: "pd.DataFrame") -> str:
    """Any columns of a DataFrame of runs as text; numbers to the right, a missing value is empty."""

    def cell(value: object) -> str:
        missing = value is None or (isinstance(value, float) and value != value)
        return "" if missing else f"{value:.6g}" if isinstance(value, float) else " ".join(str(value).split())

    rows = [tuple(table.columns), *([cell(value) for value in row] for row in table.itertuples(index=False))]
    numbers = [all(isinstance(value, int | float) for value in table[name].dropna()) for name in table.columns]
    return "\n".join(aligned(rows, "".join("<>"[number] for number in numbers)))


def imports(imported: "list[Imported]") -> list[str]:
    """A line per imported log, and below it its remarks."""
    rows = []
    for run in imported:
        bpb = "no final score" if run.bpb is None else f"{run.bpb:.8f} bpb"
        size = "size unknown" if run.total_bytes is None else f"{run.total_bytes:,} bytes"
        name = f"{run.run_dir.parent.name}/{run.run_dir.name}"
        rows.append((name, run.status, bpb, size, "was imported before" * run.again))
    lines = zip(imported, aligned(rows, "<<<><"), strict=True)
    return [text for run, line in lines for text in (line, *(f"    {remark}" for remark in run.remarks))]


def artifact(unpacked: "Unpacked") -> str:
    """Every byte of a file as text: by part, then by tensor if the codec stores tensors apart."""
    from pgolf_core.artifact.format import ACCOUNT, part_of  # with torch, which the other tables do not need

    total = sum(unpacked.parts.values())
    versions = ", ".join(f"{package} {version}" for package, version in unpacked.libraries.items())
    lines = [f"artifact version {unpacked.version}, {len(unpacked.arrays)} arrays; whole, checksums right"]
    lines += [f"written with {versions}"] if versions else []
    rows = [("part", "codec", "arrays", "decoded", "stored", "share")]
    for part in [*ACCOUNT, *sorted(unpacked.parts.keys() - set(ACCOUNT))]:
        if part in unpacked.parts:
            members = [a for name, a in unpacked.arrays.items() if part_of(name) == part]
            arrays, decoded = (f"{len(members)}", f"{sum(a.nbytes for a in members):,}") if members else ("", "")
            stored = unpacked.parts[part]
            rows.append((part, unpacked.codecs.get(part, ""), arrays, decoded, f"{stored:,}", f"{stored / total:.1%}"))
    rows.append(("total", "", f"{len(unpacked.arrays)}", "", f"{total:,}", ""))
    lines += ["", *aligned(rows, "<<>>>>")]
    rows = []
    for name, a in unpacked.arrays.items():
        if part_of(name) == "weights":
            stored = unpacked.array_bytes[name]
            size = ("", "") if stored is None else (f"{stored:,}", f"{8 * stored / max(a.size, 1):.2f}")
            levels = int(a.max()) - int(a.min()) + 1 if a.size else 0
            rows.append((name.partition("/")[2], " × ".join(map(str, a.shape)), f"{levels:,}", *size))
    if rows:
        lines += ["", *aligned([("tensor", "shape", "levels", "stored", "bits each"), *rows], "<>>>>")]
    return "\n".join(lines)


def aligned(rows: Iterable[Iterable[str]], align: str) -> list[str]:
    """Rows as lines with padded columns. align: < or > per column."""
    rows = [list(row) for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)] or [0] * len(align)
    form = "  ".join(f"{{:{side}{width}}}" for side, width in zip(align, widths, strict=True))
    return [form.format(*row).rstrip() for row in rows]
