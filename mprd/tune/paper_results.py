"""The figures of the paper's Tables 1 to 4."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources

from mprd.config.loading import read_yaml
from mprd.config.schema import Config
from mprd.data.datasets import PUBLISHED_COUNTS
from mprd.tune.study import build_study

DATASETS = {"market1501": "Market-1501", "dukemtmcreid": "DukeMTMC-reID", "msmt17": "MSMT17"}
"""The paper's names of its data sets, by `data.dataset`."""

# Tables 3 and 4 as printed: Rank-1, Rank-5, Rank-10, mAP in percent
COMPARISON: dict[str, tuple[str, dict[str, tuple[float | None, ...]]]] = {
    "Market-1501": (
        "Table 3",
        {
            "LOMO": (27.2, 41.6, 49.1, 8.0),
            "BOW": (35.8, 52.4, 60.3, 14.8),
            "BUC": (66.2, 79.6, 84.5, 38.3),
            "DBC": (69.2, 83.0, 87.8, 41.3),
            "TSSL": (71.2, None, None, 43.3),
            "SSLR": (71.7, 83.8, 87.4, 37.8),
            "MLCR": (80.3, 89.4, 92.3, 45.5),
            "JVTC": (72.9, 84.2, 88.7, 41.8),
            "MPRD": (83.0, 91.3, 93.6, 51.1),
        },
    ),
    "DukeMTMC-reID": (
        "Table 3",
        {
            "LOMO": (12.3, 21.3, 26.6, 4.8),
            "BOW": (17.1, 28.8, 34.9, 8.3),
            "BUC": (47.4, 62.6, 68.4, 27.5),
            "DBC": (51.5, 64.6, 70.1, 30.0),
            "TSSL": (62.2, None, None, 38.5),
            "SSLR": (52.5, 63.5, 68.9, 28.6),
            "MLCR": (65.2, 75.9, 80.0, 40.2),
            "JVTC": (67.6, 78.0, 81.6, 42.2),
            "MPRD": (67.4, 78.7, 81.8, 43.7),
        },
    ),
    "MSMT17": (
        "Table 4",
        {
            "MLCR": (35.4, 44.8, 49.8, 11.2),
            "JVTC": (39.0, 50.9, 56.8, 15.1),
            "MPRD": (37.7, 51.3, 57.1, 14.6),
        },
    ),
}

ROWS = {"supervised": "Super.", "knn": "KNN", "ss": "SS", "mplp": "MPLP", "single": "Single"}
"""Rows of Table 1 by `pairs.labeller`."""


@dataclass(frozen=True)
class PaperRow:
    """A method's figures as fractions; None where the paper has none."""

    source: str
    method: str
    rank1: float | None
    rank5: float | None
    rank10: float | None
    mAP: float | None  # noqa: N815


def paper_rows(dataset: str) -> list[PaperRow]:
    """Return all rows of a data set by its name in the paper, Table 1 first."""
    rows = []
    for study in ("table1", "table2"):
        file = resources.files("mprd").joinpath("tune_configs", f"{study}.yaml")
        with resources.as_file(file) as path:
            paper = build_study(read_yaml(path), source=path.name).paper
        assert paper is not None
        stated = paper.values.get(dataset, {})
        rows += [PaperRow(paper.source, name, f.rank1, None, None, f.mAP) for name, f in stated.items()]
    source, methods = COMPARISON[dataset]
    for name, percents in methods.items():
        rows.append(PaperRow(source, name, *(None if p is None else p / 100 for p in percents)))
    return rows


def paper_dataset(config: Config, *, num_train: int | None) -> str | None:
    """Return the paper's data set that a run was trained on; None for other images in its layout."""
    name = config.data.dataset
    if name not in DATASETS or num_train != PUBLISHED_COUNTS[name][0]:
        return None
    return DATASETS[name]


def paper_method(config: Config) -> str:
    """Return the row of Tables 1 and 2 that the settings correspond to; other labelers keep their own name."""
    labeller = config.pairs.labeller
    if labeller == "mlcr":
        return "MLCR(+5id)" if config.pairs.relabel_meta else "MLCR"
    if labeller != "gcn":
        return ROWS.get(labeller, labeller)
    if config.gcn.sources == "meta":
        return "MPRD w/o"
    if config.meta.num_ids == 0:
        return "MPRD(0id)"
    return "MPRD#" if config.data.camera_style == "none" else "MPRD"
