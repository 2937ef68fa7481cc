"""The figures that the paper prints, and which runs they are shown beside."""

from __future__ import annotations

import pytest

from mprd.config.loading import load_config
from mprd.config.schema import Config
from mprd.tune.paper_results import paper_dataset, paper_method, paper_rows


def test_the_paper_is_quoted_for_its_own_images_only() -> None:
    market = Config.model_validate({"data": {"dataset": "market1501", "root": "x"}})
    assert paper_dataset(market, num_train=12936) == "Market-1501"
    assert paper_dataset(market, num_train=1783) is None
    assert paper_dataset(market, num_train=None) is None
    assert paper_dataset(Config(), num_train=12936) is None


def test_the_tables_hold_the_printed_figures() -> None:
    rows = {(row.source, row.method): row for row in paper_rows("Market-1501")}
    ours = rows["Table 3", "MPRD"]
    assert (ours.rank1, ours.rank5, ours.rank10, ours.mAP) == pytest.approx((0.83, 0.913, 0.936, 0.511))
    assert rows["Table 1", "Super."].mAP == 0.685
    assert rows["Table 2", "MLCR(+5id)"].rank1 == 0.802
    assert rows["Table 3", "TSSL"].rank5 is None
    msmt = {row.method: row.mAP for row in paper_rows("MSMT17")}
    assert msmt == pytest.approx({"MLCR": 0.112, "JVTC": 0.151, "MPRD": 0.146})


@pytest.mark.parametrize(
    ("overrides", "method"),
    [
        (("data.camera_style=camstyle",), "MPRD"),
        (("data.camera_style=camstyle", "meta.num_ids=0"), "MPRD(0id)"),
        (("data.camera_style=camstyle", "gcn.sources=meta"), "MPRD w/o"),
        ((), "MPRD#"),
        (("pairs.labeller=mlcr", "pairs.relabel_meta=true"), "MLCR(+5id)"),
        (("pairs.labeller=supervised",), "Super."),
    ],
)
def test_settings_correspond_to_a_row_of_the_paper(overrides: tuple[str, ...], method: str) -> None:
    assert paper_method(load_config("demo", overrides=overrides)) == method
