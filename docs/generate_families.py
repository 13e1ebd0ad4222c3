"""Writes the table of docs/models.md: what works for which family, found by computing it.

    .venv/bin/python -m docs.generate_families

A test computes each row again and fails when the page says something else.
"""

import tempfile
import warnings
from collections import Counter
from pathlib import Path

from rlhf_core.backbone.base_model import load_tokenizer
from rlhf_core.backbone.pretrained import quiet
from rlhf_core.settings.model import FreshModelConfig, ModelConfig
from tests.core.backbone.families import FAMILIES, Row, examine

PAGE = Path(__file__).with_name("models.md")
BEGIN, END = "<!-- families: written by docs/generate_families.py -->", "<!-- end of families -->"
HEAD = (
    "| Family | Computed | Policy | Reward model and critic | Adapters |\n|---|---|---|---|---|\n"
)


def line(row: Row) -> str:
    """A row of the table."""
    cells = [f"`{row.family}`", *(cell or "no" for cell in row[1:])]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Examine every family and write the table."""
    warnings.filterwarnings("ignore")
    tokenizer = load_tokenizer(ModelConfig(fresh=FreshModelConfig(vocab_size=260)), ["a"])
    rows = []
    for family in FAMILIES:
        with tempfile.TemporaryDirectory() as folder, quiet():
            rows.append(examine(family, tokenizer, Path(folder)))
    before, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
    after = rest.split(END)[1]
    table = HEAD + "\n".join(map(line, rows))
    PAGE.write_text(f"{before}{BEGIN}\n{table}\n{END}{after}", encoding="utf-8")
    print(Counter(row.computed for row in rows))


if __name__ == "__main__":
    main()
