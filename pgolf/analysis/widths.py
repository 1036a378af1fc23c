"""Models of several sizes stored in files of one size: few wide weights or many bits each."""

import pandas as pd

MIN_SIZES = 3  # fewer sizes of models show no optimum
MIN_FILL = 0.95  # share of the cap that a file of full size takes


def bits_per_weight(configs: pd.DataFrame) -> pd.DataFrame:
    """The best config of each size of model whose files have one size, with `bits` of file and code per weight.

    configs: of seed_groups.by_config, of one comparison group. Sorted by cap, steps and bits; `best`: the lowest mean
    bpb of its cap and steps. Empty where no cap has MIN_SIZES sizes of models.
    """
    full = configs[~configs.over_cap & (configs.total_bytes >= MIN_FILL * configs.cap_bytes)]
    sets = full.groupby(["cap_bytes", "steps"], group_keys=False)
    full = full[sets.parameters.transform("nunique") >= MIN_SIZES]
    full = full.assign(bits=8 * full.total_bytes / full.parameters)
    full = full.sort_values("bpb").drop_duplicates(["cap_bytes", "steps", "parameters"])
    best = full.groupby(["cap_bytes", "steps"]).bpb.transform("min")
    return full.assign(best=full.bpb == best).sort_values(["cap_bytes", "steps", "bits"])
