"""Every row of the table in docs/models.md, computed again."""

import pytest

from docs.generate_families import PAGE, line
from tests.core.backbone.families import FAMILIES, examine


@pytest.mark.parametrize("family", FAMILIES)
def test_row_of_the_table_is_what_is_found(family, gpt2, tmp_path):
    assert line(examine(family, gpt2[1], tmp_path)) in PAGE.read_text(encoding="utf-8").splitlines()


def test_table_has_no_other_rows():
    rows = [r for r in PAGE.read_text(encoding="utf-8").splitlines() if r.startswith("| `")]
    assert [row.split("`")[1] for row in rows] == list(FAMILIES)
