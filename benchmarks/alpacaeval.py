"""The published columns of AlpacaEval 2, computed again by the functions that the evaluation uses.

    python benchmarks/alpacaeval.py ../shared/data

The folder has `alpacaeval2-verdicts-and-lengths.csv` (a judge's preference and the difference of
the lengths for each model and instruction) and `alpacaeval2-published-win-rates.csv`.

Reference: Dubois et al. 2024, https://arxiv.org/abs/2404.04475.
"""

import argparse
from pathlib import Path

import pandas as pd
import torch
from scipy.stats import spearmanr

from rlhf_core.functional.length_control import Verdicts, length_controlled_win_rates


def main() -> None:
    """Print how near the two columns are to the published ones, and the models that differ most."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    table = pd.read_csv(folder / "alpacaeval2-verdicts-and-lengths.csv")
    published = pd.read_csv(folder / "alpacaeval2-published-win-rates.csv", index_col="model")
    candidate, names = pd.factorize(table["model"])
    verdicts = Verdicts(
        torch.tensor(table["preference"].to_numpy()),
        torch.tensor(table["length_difference"].to_numpy()),
        torch.from_numpy(candidate),
        torch.tensor(pd.factorize(table["instruction"])[0]),
    )
    rates = length_controlled_win_rates(
        verdicts, resamples=200, generator=torch.Generator().manual_seed(0)
    )
    ours = pd.DataFrame(
        {
            "raw": 100 * table.groupby("model")["preference"].mean(),
            "controlled": pd.Series([100 * rate.value for rate in rates], index=names),
            "low": pd.Series([100 * rate.low for rate in rates], index=names),
            "high": pd.Series([100 * rate.high for rate in rates], index=names),
        }
    ).join(published)
    gap = (ours["controlled"] - ours["length_controlled_win_rate"]).abs()
    inside = ours["length_controlled_win_rate"].between(ours["low"], ours["high"])
    rank = spearmanr(ours["controlled"], ours["length_controlled_win_rate"]).statistic
    raw_rank = spearmanr(ours["raw"], ours["length_controlled_win_rate"]).statistic
    print(f"{len(ours)} models, {len(table):,} verdicts")
    print(f"raw: largest difference {(ours['raw'] - ours['win_rate']).abs().max():.1e} points")
    print(
        f"length-controlled: Spearman {rank:.4f} (of the raw column {raw_rank:.4f}), mean absolute "
        f"difference {gap.mean():.2f} points, largest {gap.max():.2f}; the published value is "
        f"in our interval for {inside.sum()} models"
    )
    print(ours.assign(gap=gap).sort_values("gap", ascending=False).head(8).round(1).to_string())


if __name__ == "__main__":
    main()
