"""The table of docs/compare.md: every claim has its file or page; what a Mamba peer has and ssmgen lacks is listed."""

import re
from pathlib import Path

import pytest

#: Where a Mamba peer has something that ssmgen lacks; the page says why.
LACKING = (
    *("video", "weights trained on photographs", "a branch of frequencies, a mixture of experts"),
    "upsampling without training",
)
MAMBA_PEERS = ("ZigMa", "U-Shape Mamba", "Mamba-ST", "DiM", "DiMSUM")
CELL = re.compile(r"\[(yes|part)\]\((\S+)\)")


def rows():
    lines = [
        line
        for line in Path(__file__).parents[1].joinpath("docs/compare.md").read_text().splitlines()
        if line.startswith("| ")
    ]
    head, *rest = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    return [dict(zip(head, row, strict=True)) for row in rest if not row[0].startswith("**")]


@pytest.mark.parametrize("row", rows(), ids=lambda row: row["feature"])
def test_every_claim_has_its_place(row):
    cells = {name: cell for name, cell in row.items() if name != "feature"}
    found = {name: CELL.fullmatch(cell) for name, cell in cells.items()}
    assert all(match or cells[name] in ("-", "n/a") for name, match in found.items())
    for name, match in found.items():
        if match and name != "ssmgen":
            assert re.match(r"https://github\.com/[\w.-]+/[\w.-]+/blob/[0-9a-f]{40}/", match[2]), name
    if row["feature"] in LACKING:
        assert not found["ssmgen"] and any(found[name] for name in MAMBA_PEERS)
    elif any(found[name] for name in MAMBA_PEERS):
        assert found["ssmgen"] and found["ssmgen"][1] == "yes", row["feature"]


def test_the_table_has_the_columns_and_many_rows():
    table = rows()
    assert list(table[0])[:7] == ["feature", "ssmgen", *MAMBA_PEERS] and len(table) > 40
