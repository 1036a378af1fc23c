"""A checkpoint stored as the public records store theirs, beside the solver's files of equal bytes and equal loss."""

import math
from collections.abc import Iterable

import pandas as pd

from pgolf.analysis.frontier import INT8_ZLIB_BASELINE, SOLVER, family

# Every matrix quantised, as at the records' scale, where all have more than keep_float_max_numel elements.
_PUBLISHED = INT8_ZLIB_BASELINE | dict(
    control_dtype="float16", keep_float_max_numel=0, gptq=True, codec="brotli_shuffle", quantizer="sdclip:6:12.85"
)
RECORD_EXPORTS = {  # name -> export knobs. #1855 packs with lrzip instead, in 1.8 % fewer bytes by its own figures
    "record 1394": _PUBLISHED | dict(embed_quantizer="sdclip:8:20"),
    "record 1855": _PUBLISHED | dict(
        quantizer="sdclip:6:13", mlp_in_quantizer="sdclip:6:11.5", mlp_out_quantizer="sdclip:6:11.5",
        embed_quantizer="sdclip:7:14", int8_residual_rank=4, int8_residual_bits=4, int8_residual_group=64,
        int8_residual_budget_bytes=32_768, int8_targeted_residual_mode="largest_3",
    ),
}  # fmt: skip
SMALLEST = 0.25  # share of a record's weights below which no file of equal loss is sought
NEAR = 1.02  # ratio of the caps between which the equal loss lies, when the search ends


def is_record(knobs: dict) -> bool:
    """Whether export knobs are one of RECORD_EXPORTS."""
    return any(own.items() <= knobs.items() for own in RECORD_EXPORTS.values())


def solver_caps(rows: Iterable[dict], caps: Iterable[int]) -> list[int]:
    """Caps of the solver's files to hold beside the records' rows, in order: that of equal bytes, then a bisection.

    rows: of studies.export_lab, finished so far. caps: the solver's, which are asked for anyway. The last cap is of a
    file that is not among the rows yet, unless all are; so equal rows of a finished search give equal caps.
    """
    bpb = {row["knobs"]["cap_bytes"]: row["bpb"] for row in rows if family(row["knobs"]) == SOLVER}
    sought, known = [], {*caps} & bpb.keys()
    for record in (row for row in rows if is_record(row["knobs"])):
        cap, code = record["total_bytes"], record["bytes"]["code"]
        while cap:
            if cap not in known:
                sought.append(cap)
            if cap not in bpb:
                return sought
            known.add(cap)
            good = min((c for c in known if bpb[c] <= record["bpb"]), default=0)
            bad = max((c for c in known if c < good), default=code + int(SMALLEST * (record["total_bytes"] - code)))
            between = int(math.sqrt(bad * good))
            cap = between if good > NEAR * bad else 0
    return sought


def beside_records(rows: pd.DataFrame) -> pd.DataFrame:
    """Each record's file and the solver's: its best of no more bytes, and its smallest of no more loss.

    rows: frontier.exports(). Columns: record, bpb, bytes; equal_bpb, of at most these bytes; equal_bytes, of at most
    this loss; share, equal_bytes / bytes. NaN where there is none.
    """
    solved, table = rows[rows.family == SOLVER], []
    for record in rows[rows.knobs.map(is_record)].itertuples():
        small, good = solved[solved.total_bytes <= record.total_bytes], solved[solved.bpb <= record.bpb]
        found = record.variant, record.bpb, record.total_bytes, small.bpb.min(), good.total_bytes.min()
        table.append((*found, found[-1] / record.total_bytes))
    return pd.DataFrame(table, columns=["record", "bpb", "bytes", "equal_bpb", "equal_bytes", "share"])
