"""Comparison groups of runs and the Pareto front of each; all exports of one checkpoint.

Every function reads the table of runs.table.load_runs. Runs are compared only if they were scored on the same text in
the same way: `comparison_groups` splits the table, and the other functions take one group or refuse a mixture.
"""

from collections import namedtuple
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pandas as pd

from pgolf.analysis import seed_groups, statistics
from pgolf.runs.directory import metric_rows
from pgolf.runs.table import COMPARABLE
from pgolf_core.knobs import ExportConfig

# The reference's format, with which every export is compared. keep_float_max_numel is left to the source's config: the
# right value depends on the size of the model.
INT8_ZLIB_BASELINE = dict(
    allocation="fixed", quantizer="absmax", weight_quantization_bits=8, embed_quantization_bits=0, codec="zlib",
    gptq=False, control_dtype="float32", mlp_permutation=False,
    embed_quantizer="", attn_in_quantizer="", attn_out_quantizer="", mlp_in_quantizer="", mlp_out_quantizer="",
    head_quantizer="", int8_residual_rank=0, int8_residual_budget_bytes=0, int8_targeted_residual_mode="off",
)  # fmt: skip
SOLVER, LEARNED = "solver", "learned"  # families of exports

ComparisonGroup = namedtuple("ComparisonGroup", COMPARABLE)  # properties that comparable scores share


def scored(table: pd.DataFrame) -> pd.DataFrame:
    """Complete runs (imported logs excluded) that have a round-trip score and a size, both as floats."""
    numbers = {name: pd.to_numeric(table[name], errors="coerce").astype(float) for name in ("bpb", "total_bytes")}
    table = table.assign(**numbers, over_cap=table.over_cap.eq(True))
    ours = (table.status == "complete") & (table.kind != "import")
    return table[ours & table.bpb.notna() & table.total_bytes.notna()]


def comparison_groups(table: pd.DataFrame) -> list[tuple[ComparisonGroup, pd.DataFrame]]:
    """Scored runs split into groups of comparable scores, the group of most runs first."""
    groups = scored(table).groupby(list(ComparisonGroup._fields), dropna=False, sort=True)
    return sorted(((ComparisonGroup(*key), runs) for key, runs in groups), key=lambda group: -len(group[1]))


def group_title(key: ComparisonGroup) -> str:
    return f"{key.roundtrip_bytes:,.0f} bytes of validation text {str(key.scored_text)[:8]}, {key.protocol}"


def pareto(table: pd.DataFrame) -> np.ndarray:
    """Bool per row: the run fits its cap and no other fitting run is at least as good in bytes and bpb, better in one.

    Runs equal in both are on the front together.
    """
    size, bpb = table.total_bytes.astype(float), table.bpb.astype(float)
    fits = ~table.over_cap.eq(True) & bpb.notna()
    best = bpb[fits].groupby(size[fits]).min()  # of each size, smallest first
    best = best[best < best.cummin().shift(fill_value=np.inf)]  # better than everything smaller
    return (fits & (bpb == size.map(best))).to_numpy()


def frontier_table(table: pd.DataFrame) -> pd.DataFrame:
    """One comparison group's runs, baselines first, then by bpb. Raises ValueError if runs are not comparable.

    headroom: cap − total bytes. delta_bpb: mean of the run's config − the sweep's baseline, for an export − the run it
    exports; delta_half, verdict, method, detectable: its statistics, see seed_groups.by_config. quantisation_bpb: round
    trip − pre-quant bpb on the same tokens; quantisation_half: half of its 95 % interval over other text.
    """
    groups = comparison_groups(table)
    if len(groups) > 1:
        raise ValueError(f"these runs are not comparable: {'; '.join(group_title(key) for key, _ in groups)}")
    table = scored(table)
    rows = seed_groups.by_config(table)
    config = rows.explode("index").set_index("index").reindex(table.index)  # one row per run
    columns = dict(
        sweep=table.sweep, run=table.run, kind=table.kind, bpb=table.bpb,
        total_bytes=table.total_bytes.astype("int64"),
        headroom=(table.cap_bytes.astype(float) - table.total_bytes).astype("int64"),
        delta_bpb=config.delta.mask(config.is_baseline, 0.0), delta_half=config.half,
        verdict=config.verdict.fillna(""), method=config.method, detectable=config.detectable,
        seeds=config.seeds.str.len(),
        quantisation_bpb=table.unadapted_val_bpb.astype(float).fillna(table.bpb) - table.prequant_val_bpb.astype(float),
        quantisation_half=_half(table.roundtrip_block_nats, _unadapted_nats(table), table.roundtrip_bytes),
        parameters=table.parameters, steps=table.steps, train_seconds=table.train_seconds.astype(float),
        on_front=pareto(table), over_cap=table.over_cap, source=table.source, is_baseline=config.is_baseline,
    )  # fmt: skip
    return pd.DataFrame(columns).iloc[np.lexsort((table.bpb, ~config.is_baseline))]


def _unadapted_nats(table: pd.DataFrame) -> list:
    """Blocks of the unquantized weights; none beside an adapted file, whose blocks differ by more than rounding."""
    pairs = zip(table.prequant_block_nats, table.unadapted_val_bpb, strict=True)
    return [nats if pd.isna(adapted) else [] for nats, adapted in pairs]


def _half(nats: Iterable, baseline: Iterable, text_bytes: Iterable) -> list[float]:
    """Half of each file's 95 % interval over other text, by its blocks and a baseline's."""
    return [statistics.compare_blocks(*file).half for file in zip(nats, baseline, text_bytes, strict=True)]


def not_counted(table: pd.DataFrame) -> pd.DataFrame:
    """Runs that no frontier counts: sweep, run and why, one sentence. Stages, which have no score, are left out."""
    rows = []
    for run in table[~table.index.isin(scored(table).index)].itertuples():
        match run.status:
            case "incomplete" | "interrupted":
                steps = [row["step"] for row in metric_rows(run.path) if "step" in row]
                total = pd.to_numeric(run.iterations, errors="coerce")
                of = "" if pd.isna(total) else f" of {total:.0f}"
                last = f"last step {max(steps)}{of}" if steps else "no step logged"
                why = f"{run.status}, {last}" + (f": {run.problem}" if run.problem else "")
            case "failed" | "damaged" | "refused" | "pruned":
                why = f"{run.status}: {run.problem}"
            case _ if run.table or run.kind == "import":
                continue
            case _ if run.roundtrip_val_bpb is not None and not pd.isna(run.total_bytes):
                why = "complete, but its score is not a number"
            case _:
                prequant = "" if pd.isna(run.val_bpb) else f"; pre-quant bpb {run.val_bpb:.4f}"
                why = f"complete, but without a round-trip score (final_roundtrip_eval=0){prequant}"
        rows.append((run.sweep, run.run, why))
    return pd.DataFrame(rows, columns=["sweep", "run", "why"])


def fold(rows: pd.DataFrame, best: int) -> pd.DataFrame:
    """Shorten a frontier_table to the front, the baselines, the `best` that fit and the best three over their cap.

    A checkpoint may have dozens of exports, so five of its front are kept; the export report has them all.
    """
    if len(rows) <= 2 * best:
        return rows
    trained = rows[rows.kind != "export"]
    rank = trained.bpb.groupby(trained.over_cap).rank(method="first")
    keep = trained[trained.on_front | trained.is_baseline | (rank <= np.where(trained.over_cap, 3, best))].index
    front = rows[(rows.kind == "export") & rows.on_front].drop_duplicates(["total_bytes", "bpb"])
    for _, exports in front.sort_values("total_bytes").groupby("source", dropna=False):
        keep = keep.append(exports.index[np.unique(np.linspace(0, len(exports) - 1, 5).round().astype(int))])
    return rows[rows.index.isin(keep)]


def checkpoints(table: pd.DataFrame) -> list[tuple[str, str, pd.DataFrame]]:
    """The group's checkpoints that have exports: 'sweep/run', sha256, exports() of each; most files first.

    A run trained again is another checkpoint.
    """
    columns = dict(
        variant=table.run.str.split("/").str[-1].where(table.kind == "export", "as trained"), bpb=table.bpb,
        total_bytes=table.total_bytes.astype("int64"), raw_bpb=table.prequant_val_bpb.astype(float), bytes=table.bytes,
        knobs=table[[*ExportConfig.model_fields]].astype(object).to_dict("records"), path=table.path,
        block_nats=table.roundtrip_block_nats, raw_block_nats=_unadapted_nats(table),
        unadapted_bpb=table.unadapted_val_bpb.astype(float).fillna(table.bpb),
        text_bytes=table.roundtrip_bytes,
    )  # fmt: skip
    variants = pd.DataFrame(columns, index=table.index)
    places = table.path.map(lambda path: f"{Path(path).parent.name}/{Path(path).name}")
    source = table.source.where(table.kind == "export", places)
    groups = variants.groupby([source, table.checkpoint_sha256], dropna=False)
    found = [(*key, exports(rows)) for key, rows in groups if (table.kind[rows.index] == "export").any()]
    return sorted(found, key=lambda checkpoint: -len(checkpoint[2]))


def exports(variants: pd.DataFrame) -> pd.DataFrame:
    """Files of one checkpoint, smallest first, equal ones once. variants: the rows of studies.export_lab.

    delta_prequant: bpb, not adapted − pre-quant bpb. delta_int8, share: bpb − that of INT8_ZLIB_BASELINE, and bytes
    as a share of its bytes; nan if that file is missing. half_prequant, half_int8: half of their 95 % intervals over
    other text.
    on_front: on the Pareto front of all files; fixed_front: of the files without the solver's, learned or not.
    """
    plain = variants.get("unadapted_bpb", variants.bpb)
    rows = variants.assign(family=variants.knobs.map(family), delta_prequant=plain - variants.raw_bpb)
    int8 = rows[rows.knobs.map(lambda knobs: INT8_ZLIB_BASELINE.items() <= knobs.items())].nlargest(1, "total_bytes")
    bpb, size, int8_nats = int8[["bpb", "total_bytes", "block_nats"]].iloc[0] if len(int8) else (np.nan, np.nan, [])
    rows = rows.assign(
        delta_int8=rows.bpb - bpb, share=rows.total_bytes / size,
        half_prequant=_half(rows.block_nats, rows.raw_block_nats, rows.text_bytes),
        half_int8=_half(rows.block_nats, [int8_nats] * len(rows), rows.text_bytes),
    )  # fmt: skip
    rows = rows.sort_values(["total_bytes", "bpb"], kind="stable").drop_duplicates(["total_bytes", "bpb"])
    on_front = pareto(rows.assign(over_cap=False))
    fixed_front = pareto(rows.assign(over_cap=rows.family.isin([SOLVER, LEARNED])))
    return rows.assign(on_front=on_front, fixed_front=fixed_front).reset_index(drop=True)


def family(knobs: dict) -> str:
    """The method of an export in a word or two."""
    kind, *rest = knobs["quantizer"].split(":")
    if knobs.get("learn_steps"):
        return LEARNED
    if knobs["allocation"] == "solve":
        return SOLVER
    if knobs["int8_residual_rank"] and knobs["int8_residual_budget_bytes"]:
        rank_one = knobs["int8_residual_rank"] == 1 and knobs.get("int8_residual_bits", 16) == 16
        return "rank-1 residual" if rank_one else "LQER"
    if kind in ("step", "absmax") and knobs["gptq"]:
        return "GPTQ, Fisher steps" if "fisher" in rest else "GPTQ"
    return {"step": "Fisher steps" if "fisher" in rest else "σ-tied steps", "absmax": "absmax"}.get(kind, kind)


def within(rows: pd.DataFrame, shares: Iterable[float] = (1.0, 0.8, 0.6, 0.4)) -> pd.DataFrame:
    """The solver compared with all other methods: the best file of each within a share of the int8 zlib bytes.

    rows: exports(), of which those that learned are left out. Columns: share, limit (bytes); solver, solver_bpb,
    solver_bytes; fixed, fixed_bpb, fixed_bytes; delta_bpb (solver − fixed), half, p, verdict. No rows if
    INT8_ZLIB_BASELINE's file is missing.
    """
    int8_bytes, rows = (rows.total_bytes / rows.share).dropna().round(), rows[rows.family != LEARNED]
    table = []
    for share in shares if len(int8_bytes) else ():
        row = {"share": share, "limit": int(share * int8_bytes.iloc[0])}
        fitting, nats = rows[rows.total_bytes <= row["limit"]], {}
        for who, some in fitting.groupby(fitting.family.eq(SOLVER).map({True: "solver", False: "fixed"})):
            best = some.loc[some.bpb.idxmin()]
            row |= {who: best.variant, f"{who}_bpb": best.bpb, f"{who}_bytes": best.total_bytes}
            nats[who] = best.block_nats
        found = statistics.compare_blocks(nats.get("solver", []), nats.get("fixed", []), rows.text_bytes.iloc[0])
        table.append(row | {"half": found.half, "p": found.p, "verdict": found.verdict})
    columns = [f"{who}{figure}" for who in ("solver", "fixed") for figure in ("", "_bpb", "_bytes")]
    table = pd.DataFrame(table, columns=["share", "limit", *columns, "half", "p", "verdict"])
    return table.assign(delta_bpb=table.solver_bpb - table.fixed_bpb)
