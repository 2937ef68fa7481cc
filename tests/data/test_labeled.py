"""The labeled images: all of a few identities, from file names or from a file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from mprd.config.loading import load_config
from mprd.config.schema import Config, DataConfig, MetaConfig
from mprd.data.datasets import ImageSet, load_dataset
from mprd.data.labeled import choose_labeled
from mprd.engine.trainer import Trainer, fit
from mprd.errors import UserError
from mprd.evaluate.epoch_metrics import epoch_row
from mprd.neighbors.exact import PADDING
from mprd.runs.console import epoch_cells
from mprd.runtime import checkpoint
from tests.conftest import TINY
from tests.trees import write_images

ROOT = Path("/data")
NAMES = ("train/a.jpg", "train/b.jpg", "train/c.jpg", "train/d.jpg", "train/e.jpg")
NAMELESS = ImageSet(tuple(ROOT / name for name in NAMES), None, None)
FOLDER = ("data.dataset=folder", r"data.name_pattern=_c(?P<camid>\d+)")


def named(pids: list[int]) -> ImageSet:
    return ImageSet(tuple(ROOT / f"{row}.jpg" for row in range(len(pids))), np.array(pids), None)


def choose(images: ImageSet, num_ids: int, *, seed: int = 0, labels: Path | None = None) -> tuple[list[int], list[int]]:
    rows, pids = choose_labeled(images, ROOT, MetaConfig(num_ids=num_ids, labels=labels), seed=seed)
    assert rows.dtype == pids.dtype == np.int64
    return rows.tolist(), pids.tolist()


@pytest.fixture
def labels(tmp_path: Path) -> Path:
    return tmp_path / "labels.csv"


def test_all_images_of_the_drawn_identities_are_labeled() -> None:
    pids = [4, 9, 4, 7, 9, 9]
    rows, chosen = choose(named(pids), 2, seed=3)
    assert len(set(chosen)) == 2
    assert rows == [row for row, pid in enumerate(pids) if pid in chosen]
    assert chosen == [pids[row] for row in rows]


def test_drawn_identities_depend_on_the_seed_alone() -> None:
    images = named(np.repeat(np.arange(50), 2).tolist())
    assert choose(images, 5, seed=1) == choose(images, 5, seed=1)
    assert choose(images, 5, seed=1) != choose(images, 5, seed=2)


def test_zero_labeled_identities_are_no_images() -> None:
    assert choose(named([1, 2]), 0) == choose(NAMELESS, 0) == ([], [])


def test_more_identities_than_there_are_are_refused(labels: Path) -> None:
    with pytest.raises(UserError, match=r"meta\.num_ids must be at most 2, the training identities, but got 3"):
        choose(named([1, 2, 1]), 3)
    labels.write_text("file,identity\ntrain/a.jpg,ann\ntrain/b.jpg,ann\n")
    with pytest.raises(UserError, match=r"meta\.num_ids must be at most 1, the identities of .*labels\.csv, but got 2"):
        choose(NAMELESS, 2, labels=labels)
    with pytest.raises(UserError, match=r"meta\.num_ids must be 0 without identities in .* or in meta\.labels"):
        choose(NAMELESS, 5)


@pytest.mark.parametrize("text", [
    "file,identity\ntrain/d.jpg,ann\ntrain/a.jpg,bob\ntrain/c.jpg,ann\ntrain/a.jpg,bob\n",
    "\ufefffile,identity\r\ntrain/d.jpg, ann\r\n\r\n./train/a.jpg,bob\r\ntrain/c.jpg,ann\r\n",
])  # fmt: skip
def test_a_file_lists_the_identities_of_some_images(text: str, labels: Path) -> None:
    labels.write_text(text, newline="", encoding="utf-8")
    assert choose(NAMELESS, 2, labels=labels) == ([0, 2, 3], [1, 0, 0])
    # the file has precedence over names
    assert choose(ImageSet(NAMELESS.paths, np.arange(5), None), 2, labels=labels) == ([0, 2, 3], [1, 0, 0])


def test_images_of_a_list_elsewhere_are_named_by_whole_paths_or_from_the_lists_folder(
    labels: Path, tmp_path: Path
) -> None:
    write_images(tmp_path / "images", ["a.jpg", "b.jpg", "c.jpg"])
    (tmp_path / "lists").mkdir()
    file = tmp_path / "lists" / "list.csv"
    rows = [f"{tmp_path}/images/{name}.jpg,train" for name in "abc"]
    file.write_text("\n".join(["file,split", *rows]))
    data = load_dataset(DataConfig(dataset="auto", root=file))
    labels.write_text(f"file,identity\n{tmp_path}/images/c.jpg,ann\n../images/a.jpg,ann\n")
    found = choose_labeled(data.train, data.root, MetaConfig(num_ids=1, labels=labels), seed=0)
    assert [ids.tolist() for ids in found] == [[0, 2], [0, 0]]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"wanted the header file,identity, but got ''"),
        ("train/a.jpg,ann\n", r"wanted the header file,identity, but got 'train/a.jpg,ann'"),
        ("file,identity\ntrain/a.jpg\n", r"line 2: train/a.jpg has no identity"),
        ("file,identity\ntrain/a.jpg,ann,1\n", r"line 2: wanted file,identity, but got 'train/a.jpg,ann,1'"),
        ("file,identity\ntrain/a.jpg, \n", r"line 2: train/a.jpg has no identity"),
        ("file,identity\ntrain/a.jpg,x\nquery/a.jpg,x\n", r"line 3: query/a.jpg is no training image"),
        ("file,identity\ntrain/a.jpg,x\ntrain/a.jpg,y\n", r"line 3: train/a.jpg has two identities"),
        ("file,identity\ntrain/a.jpg,x\ntrain/b.jpg,y\n", r"no identity has two images"),
        (None, r"labels.csv: cannot read the list: No such file"),
        (b"\xff\xfe\x00", r"labels.csv: not text"),
    ],
)
def test_a_faulty_file_is_refused_with_its_line(text: str | bytes | None, message: str, labels: Path) -> None:
    if text is not None:
        labels.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=r"^meta\.labels: .*" + message):
        choose(NAMELESS, 1, labels=labels)


def build(root: Path, *overrides: str) -> Trainer:
    config: Config = load_config("demo", overrides=(*TINY, *overrides), values={"data": {"root": root}})
    dataset = load_dataset(config.data)
    trainer = Trainer(config, dataset, device=torch.device("cpu"))
    trainer.fill_memory()
    return trainer


def write_labels(trainer: Trainer, labels: Path, root: Path) -> list[str]:
    """Write the labeled images of a trainer to a file; return its lines in the order of the images."""
    paths = trainer.dataset.train.paths
    chosen = zip(trainer.state.meta.ids.tolist(), trainer.state.meta.pids.tolist(), strict=True)
    lines = [f"{paths[row].relative_to(root)},number {pid}" for row, pid in chosen]
    labels.write_text("\n".join(["file,identity", *reversed(lines)]))
    return lines


def test_a_file_trains_as_the_same_identities_in_names(tiny_root: Path, labels: Path, tmp_path: Path) -> None:
    by_name = build(tiny_root)
    lines = write_labels(by_name, labels, tiny_root)
    by_file = build(tiny_root, *FOLDER, f"meta.labels={labels}", "meta.all_listed=true")
    assert by_file.pids is None
    assert by_file.state.meta.ids.tolist() == by_name.state.meta.ids.tolist()
    for trainer in (by_name, by_file):
        fit(trainer)
    assert torch.equal(by_name.state.memory.features, by_file.state.memory.features)
    assert torch.equal(by_name.state.positives.ids, by_file.state.positives.ids)
    # a checkpoint holds the labeled images
    checkpoint.save(by_file.state.state_dict(), tmp_path / "last.pt")
    labels.write_text("\n".join(["file,identity", *lines[1:]]))
    changed = build(tiny_root, *FOLDER, f"meta.labels={labels}")
    with pytest.raises(UserError, match=r"last\.pt: made with other labeled images; meta\.labels"):
        changed.state.load_state_dict(checkpoint.load(tmp_path / "last.pt"), path=tmp_path / "last.pt")


def largest_positives(trainer: Trainer) -> tuple[int, int]:
    """Return the largest number of positives of an image under its own camera and under others."""
    assert trainer.camids is not None
    most = [0, 0]
    for i, row in enumerate(trainer.state.positives.ids.tolist()):
        mates = [j for j in row if j not in (i, PADDING)]
        near = sum(int(trainer.camids[j] == trainer.camids[i]) for j in mates)
        most = [max(most[0], near), max(most[1], len(mates) - near)]
    return most[0], most[1]


@pytest.mark.parametrize(
    "settings",
    [(), ("pairs.labeller=reciprocal", "pairs.threshold=0")],
    ids=["gcn", "reciprocal"],
)
def test_no_image_has_more_positives_than_a_labeled_one(tiny_root: Path, settings: tuple[str, ...]) -> None:
    # an untrained network accepts nearly all pairs, so that the limit alone bounds P
    loose = ("pairs.mu=0.01", "neighbors.k=8", "neighbors.k_max=8", *settings)
    limited, free = build(tiny_root, *loose), build(tiny_root, *loose, "pairs.limit=false")
    for trainer in (limited, free):
        trainer.label_all(trainer.build_labeller())
    # an identity has two images under each of two cameras
    assert largest_positives(limited) == (1, 2)
    assert max(largest_positives(free)) > 2


def test_a_file_limits_positives_where_it_lists_whole_identities(tiny_root: Path, labels: Path) -> None:
    write_labels(build(tiny_root), labels, tiny_root)
    assert build(tiny_root, *FOLDER, f"meta.labels={labels}").limit is None
    whole = build(tiny_root, *FOLDER, f"meta.labels={labels}", "meta.all_listed=true").limit
    assert whole is not None
    assert (whole.same, whole.other) == (1, 2)
    assert build(tiny_root, "meta.num_ids=0").limit is None
    assert build(tiny_root, "pairs.labeller=knn").limit is None


@pytest.mark.parametrize("all_listed", [True, False])
def test_labels_are_evaluated_on_whole_identities_where_no_others_are_known(
    tiny_root: Path, labels: Path, all_listed: bool
) -> None:
    write_labels(build(tiny_root), labels, tiny_root)
    trainer = build(tiny_root, *FOLDER, f"meta.labels={labels}", f"meta.all_listed={str(all_listed).lower()}")
    row = epoch_row(trainer)
    assert "pair_precision" not in row
    shown = {title: text for title, _, text in epoch_cells(row, 3, 0.0)}
    if all_listed:
        # P_i = {i} before training
        assert (row["labelled_precision"], row["labelled_recall"]) == (None, 0.0)
        assert (shown["prec known"], shown["rec known"]) == ("-", "0.0")
    else:
        assert "labelled_recall" not in row
        assert shown["rec known"] == "-"
