"""Tables for a terminal: runs, imported logs, and the bytes of an artifact."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd

    from pgolf.analysis.records import Imported
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
    return "\n".join(_lines(rows, "<<<>>>><"))


def imports(imported: "list[Imported]") -> list[str]:
    """A line per imported log, and below it its remarks."""
    rows = []
    for run in imported:
        bpb = "no final score" if run.bpb is None else f"{run.bpb:.8f} bpb"
        size = "size unknown" if run.total_bytes is None else f"{run.total_bytes:,} bytes"
        name = f"{run.run_dir.parent.name}/{run.run_dir.name}"
        rows.append((name, run.status, bpb, size, "was imported before" * run.again))
    lines = zip(imported, _lines(rows, "<<<><"), strict=True)
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
    lines += ["", *_lines(rows, "<<>>>>")]
    rows = []
    for name, a in unpacked.arrays.items():
        if part_of(name) == "weights":
            stored = unpacked.array_bytes[name]
            size = ("", "") if stored is None else (f"{stored:,}", f"{8 * stored / max(a.size, 1):.2f}")
            levels = int(a.max()) - int(a.min()) + 1 if a.size else 0
            rows.append((name.partition("/")[2], " × ".join(map(str, a.shape)), f"{levels:,}", *size))
    if rows:
        lines += ["", *_lines([("tensor", "shape", "levels", "stored", "bits each"), *rows], "<>>>>")]
    return "\n".join(lines)


def _lines(rows: Iterable[Iterable[str]], align: str) -> list[str]:
    """Rows as lines with padded columns. align: < or > per column."""
    rows = [list(row) for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)] or [0] * len(align)
    form = "  ".join(f"{{:{side}{width}}}" for side, width in zip(align, widths, strict=True))
    return [form.format(*row).rstrip() for row in rows]
