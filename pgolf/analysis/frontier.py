"""Pareto front and comparability of runs; all exports of one checkpoint.

Everything here reads the table of `runs.load`. Figures of runs that were not scored on the same text in the same
way are never set against each other: `comparable` splits the table into panels, and the rest refuses a mixture.
"""

from collections import namedtuple
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pandas as pd

from pgolf.analysis import seed_groups, statistics
from pgolf.runs.table import COMPARABLE, load_metrics
from pgolf_core.knobs import ExportConfig

# The seed's format, whatever the source was exported with: what every variant is held against. Which matrices are too
# small to quantise is the source's own affair: it goes with the size of the model.
INT8_ZLIB_BASELINE = dict(
    allocation="fixed", quantizer="absmax", weight_quantization_bits=8, embed_quantization_bits=0, codec="zlib",
    gptq=False, control_dtype="float32", mlp_permutation=False,
    embed_quantizer="", attn_in_quantizer="", attn_out_quantizer="", mlp_in_quantizer="", mlp_out_quantizer="",
    head_quantizer="", int8_residual_rank=0, int8_residual_budget_bytes=0, int8_targeted_residual_mode="off",
)  # fmt: skip

Panel = namedtuple("Panel", COMPARABLE)  # what two scores must share to be set against each other


def scored(table: pd.DataFrame) -> pd.DataFrame:
    """Complete runs of ours that have a round-trip score and a size, as numbers."""
    numbers = {name: pd.to_numeric(table[name], errors="coerce").astype(float) for name in ("bpb", "total_bytes")}
    table = table.assign(**numbers, over_cap=table.over_cap.eq(True))
    ours = (table.status == "complete") & (table.kind != "import")
    return table[ours & table.bpb.notna() & table.total_bytes.notna()]


def comparable(table: pd.DataFrame) -> list[tuple[Panel, pd.DataFrame]]:
    """Scored runs by what makes their scores comparable, the panel of most runs first."""
    groups = scored(table).groupby(list(Panel._fields), dropna=False, sort=True)
    panels = [(Panel(*key), group) for key, group in groups]
    return sorted(panels, key=lambda panel: -len(panel[1]))


def panel_title(key: Panel) -> str:
    return f"{key.roundtrip_bytes:,.0f} bytes of validation text {str(key.scored_text)[:8]}, {key.protocol}"


def pareto(table: pd.DataFrame) -> np.ndarray:
    """Bool a row: fits its cap, and no fitting run has as few bytes and as low a bpb, one of them strictly.

    Runs over their cap neither stand on the front nor push others off it. Runs equal in both stand together.
    """
    size, bpb = table.total_bytes.to_numpy(float), table.bpb.to_numpy(float)
    rows = np.flatnonzero(~table.over_cap.eq(True).to_numpy() & ~np.isnan(size) & ~np.isnan(bpb))
    rows = rows[np.lexsort((bpb[rows], size[rows]))]
    # Sorted by bytes: a run is on the front when no smaller one has its bpb, and it is the best of its own size.
    first = np.searchsorted(size[rows], size[rows])  # of this size; the best of them by the second key
    lowest = np.minimum.accumulate(np.concatenate([[np.inf], bpb[rows]]))  # before each place
    front = np.zeros(len(table), bool)
    front[rows] = (bpb[rows] < lowest[first]) & (bpb[rows] == bpb[rows][first])
    return front


def frontier_table(table: pd.DataFrame) -> pd.DataFrame:
    """One panel's runs, controls first, then by bpb. Raises ValueError on runs that are not comparable.

    headroom is cap − total bytes. delta_bpb is against the sweep's control, of the arm's mean where it has several
    seeds, of an export against its own run; delta_half is half of its 95 % interval, verdict and method what arms.arms
    says. quantisation_bpb is what the round trip lost against the raw weights on the same tokens, quantisation_half
    the same of it, over other text.
    """
    panels = comparable(table)
    if len(panels) > 1:
        raise ValueError(f"these runs are not comparable: {'; '.join(panel_title(key) for key, _ in panels)}")
    table = scored(table)
    rows = seed_groups.arms(table)
    of_arm = rows.loc[rows.index.repeat(rows["index"].str.len())]  # a row a run
    of_arm = of_arm.set_axis(rows["index"].explode().to_numpy()).reindex(table.index)
    is_control = of_arm.is_control
    blocks = zip(table.roundtrip_block_nats, table.prequant_block_nats, table.roundtrip_bytes, strict=True)
    columns = {
        "sweep": table.sweep,
        "run": table.run,
        "kind": table.kind,
        "bpb": table.bpb,
        "total_bytes": table.total_bytes.astype("int64"),
        "headroom": (table.cap_bytes.astype(float) - table.total_bytes).astype("int64"),
        "delta_bpb": of_arm.delta.mask(is_control, 0.0),
        "delta_half": of_arm.half,
        "verdict": of_arm.verdict.fillna(""),
        "method": of_arm.method,
        "needed": of_arm.needed,
        "seeds": of_arm.seeds.str.len(),
        "quantisation_bpb": table.bpb - table.prequant_val_bpb.astype(float),
        "quantisation_half": [statistics.compare_blocks(*scores).half for scores in blocks],
        "parameters": table.parameters,
        "steps": table.steps,
        "train_seconds": table.train_seconds.astype(float),
        "on_front": pareto(table),
        "over_cap": table.over_cap,
        "source": table.source,
        "is_control": is_control,
    }
    order = np.lexsort((table.bpb, ~is_control))
    return pd.DataFrame(columns).iloc[order]


def not_counted(table: pd.DataFrame) -> pd.DataFrame:
    """Every run that no frontier counts: sweep, run, and why in words. Stages have tables, not scores: left out."""
    rows = []
    for run in table[~table.index.isin(scored(table).index)].itertuples():
        match run.status:
            case "incomplete" | "interrupted":
                steps = load_metrics(run.path).get("step", pd.Series(dtype=float)).max()
                of = pd.to_numeric(run.iterations, errors="coerce")
                where = "no step logged" if pd.isna(steps) else f"last step {steps:.0f}"
                where += "" if pd.isna(steps) or pd.isna(of) else f" of {of:.0f}"
                why = f"{run.status}, {where}" + (f": {run.problem}" if run.problem else "")
            case "failed":
                why = f"failed: {run.problem}"
            case "damaged":
                why = f"damaged: {run.problem}"
            case _ if run.table or run.kind == "import":
                continue
            case _ if run.roundtrip_val_bpb is not None and not pd.isna(run.total_bytes):
                why = "complete, but its score is no number"
            case _:
                raw = "" if pd.isna(run.val_bpb) else f"; its raw weights had {run.val_bpb:.4f} bpb"
                why = f"complete, but without a round-trip score (final_roundtrip_eval=0){raw}"
        rows.append((run.sweep, run.run, why))
    return pd.DataFrame(rows, columns=["sweep", "run", "why"])


def fold(rows: pd.DataFrame, best: int) -> pd.DataFrame:
    """Of many rows of a frontier_table the front, the controls, the best that fit and three over cap.

    Of a checkpoint's exports, which may be dozens, only a few of the front: the export report has them all.
    """
    if len(rows) <= 2 * best:
        return rows
    trained = rows[rows.kind != "export"]
    place = trained.bpb.groupby(trained.over_cap).rank(method="first")
    keep = trained[trained.on_front | trained.is_control | (place <= np.where(trained.over_cap, 3, best))].index
    front = rows[(rows.kind == "export") & rows.on_front].drop_duplicates(["total_bytes", "bpb"])
    for _, exports in front.sort_values("total_bytes").groupby("source", dropna=False):
        keep = keep.append(exports.index[np.unique(np.linspace(0, len(exports) - 1, 5).round().astype(int))])
    return rows[rows.index.isin(keep)]


def checkpoints(table: pd.DataFrame) -> list[tuple[str, str, pd.DataFrame]]:
    """This panel's checkpoints that were exported in other ways: 'sweep/run', sha256, exports(); most files first.

    A checkpoint is a run and the weights it had: trained again, it is another.
    """
    variants = pd.DataFrame(
        {
            "variant": table.run.str.split("/").str[-1].where(table.kind == "export", "as trained"),
            "bpb": table.bpb,
            "total_bytes": table.total_bytes.astype("int64"),
            "raw_bpb": table.prequant_val_bpb.astype(float),
            "bytes": table.bytes,
            "knobs": table[[*ExportConfig.model_fields]].astype(object).to_dict("records"),
            "path": table.path,
            "block_nats": table.roundtrip_block_nats,
            "raw_block_nats": table.prequant_block_nats,
            "text_bytes": table.roundtrip_bytes,
        },
        index=table.index,
    )
    source = table.source.where(table.kind == "export", places_of(table))
    groups = variants.groupby([source, table.checkpoint_sha256], dropna=False)
    found = [(*key, exports(rows)) for key, rows in groups if (table.kind[rows.index] == "export").any()]
    return sorted(found, key=lambda checkpoint: -len(checkpoint[2]))


def exports(variants: pd.DataFrame) -> pd.DataFrame:
    """Files of one checkpoint, smallest first, equal ones once. variants: columns as the rows of lab.export_lab.

    delta_raw: bpb lost against the raw weights; delta_plain, share: against the seed's int8 under zlib, NaN where
    that is not among them; half_raw, half_plain: half of their 95 % intervals over other text; on_front: no file here
    is as small and as good; fixed_front: of all but the solver's.
    """
    rows = variants.assign(family=variants.knobs.map(family), delta_raw=variants.bpb - variants.raw_bpb)
    plain = rows[rows.knobs.map(lambda knobs: INT8_ZLIB_BASELINE.items() <= knobs.items())]
    plain = plain.nlargest(1, "total_bytes")
    bpb, size = plain[["bpb", "total_bytes"]].iloc[0] if len(plain) else (np.nan, np.nan)
    plain_nats = plain.block_nats.iloc[0] if len(plain) else []
    rows = rows.assign(delta_plain=rows.bpb - bpb, share=rows.total_bytes / size)
    rows["half_raw"] = [
        statistics.compare_blocks(r.block_nats, r.raw_block_nats, r.text_bytes).half for r in rows.itertuples()
    ]
    rows["half_plain"] = [
        statistics.compare_blocks(r.block_nats, plain_nats, r.text_bytes).half for r in rows.itertuples()
    ]
    rows = rows.sort_values(["total_bytes", "bpb"], kind="stable").drop_duplicates(["total_bytes", "bpb"])
    on_front = pareto(rows.assign(over_cap=False))
    fixed_front = pareto(rows.assign(over_cap=rows.family == "solver"))
    return rows.assign(on_front=on_front, fixed_front=fixed_front).reset_index(drop=True)


def family(knobs: dict) -> str:
    """How an export was made, in a word or two."""
    kind, *rest = knobs["quantizer"].split(":")
    if knobs["allocation"] == "solve":
        return "solver"
    if knobs["int8_residual_rank"] and knobs["int8_residual_budget_bytes"]:
        rank_one = knobs["int8_residual_rank"] == 1 and knobs.get("int8_residual_bits", 16) == 16
        return "rank-1 residual" if rank_one else "LQER"
    if kind in ("step", "absmax") and knobs["gptq"]:
        return "GPTQ, Fisher steps" if "fisher" in rest else "GPTQ"
    return {"step": "Fisher steps" if "fisher" in rest else "σ-tied steps", "absmax": "absmax"}.get(kind, kind)


def within(rows: pd.DataFrame, shares: Iterable[float] = (1.0, 0.8, 0.6, 0.4)) -> pd.DataFrame:
    """The solver against all others: a row a share of the seed's bytes, the best of both of no more bytes.

    rows: of exports(). Columns share, limit (bytes); solver, solver_bpb, solver_bytes, the same of fixed; delta_bpb
    (solver − fixed), and of it half, p, verdict as noise.compare_blocks. No rows where the seed's file is not there.
    """
    plain = (rows.total_bytes / rows.share).dropna().round()
    table = []
    for share in shares if len(plain) else ():
        row = {"share": share, "limit": int(share * plain.iloc[0])}
        fitting, nats = rows[rows.total_bytes <= row["limit"]], {}
        for who, some in fitting.groupby(fitting.family.eq("solver").map({True: "solver", False: "fixed"})):
            best = some.loc[some.bpb.idxmin()]
            row |= {who: best.variant, f"{who}_bpb": best.bpb, f"{who}_bytes": best.total_bytes}
            nats[who] = best.block_nats
        found = statistics.compare_blocks(nats.get("solver", []), nats.get("fixed", []), rows.text_bytes.iloc[0])
        table.append(row | {"half": found.half, "p": found.p, "verdict": found.verdict})
    columns = [f"{who}{figure}" for who in ("solver", "fixed") for figure in ("", "_bpb", "_bytes")]
    table = pd.DataFrame(table, columns=["share", "limit", *columns, "half", "p", "verdict"])
    return table.assign(delta_bpb=table.solver_bpb - table.fixed_bpb)


def growth(panel: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """Models that were trained for three or more lengths: a name, and a row a run by how it was stored and steps.

    how; steps; bits, of the artifact without its code, a parameter; bpb; cost, what it lost against the raw weights,
    and half of the 95 % interval of that over other text.
    """
    trained = panel[panel.kind == "train"]
    free = {"iterations", "seed", *ExportConfig.model_fields}
    found = []
    for _, group in trained.groupby(seed_groups.same_knobs(trained, tuple(free))):
        if group.iterations.nunique() < 3:
            continue
        rows = []
        for run in group.itertuples():
            cost = statistics.compare_blocks(run.roundtrip_block_nats, run.prequant_block_nats, run.roundtrip_bytes)
            how = family({name: getattr(run, name) for name in ExportConfig.model_fields})
            how += "" if how == run.quantizer else f" ({run.quantizer})"
            row = {"how": f"{how}, {run.codec}", "steps": int(run.steps), "bpb": run.bpb}
            row |= {"bits": 8 * (run.total_bytes - run.bytes["code"]) / run.parameters, "bytes": int(run.total_bytes)}
            rows.append(row | {"cost": run.bpb - float(run.prequant_val_bpb), "half": cost.half})
        first = group.iloc[0]
        name = f"{first.num_layers:.0f} × {first.model_dim:.0f}, sweep {first.sweep}"
        rows = pd.DataFrame(rows).drop_duplicates(["how", "steps"])  # of several seeds the first
        found.append((name, rows.sort_values(["how", "steps"], ignore_index=True)))
    return found


def places_of(table: pd.DataFrame) -> pd.Series:
    return table.path.map(lambda path: f"{Path(path).parent.name}/{Path(path).name}")
