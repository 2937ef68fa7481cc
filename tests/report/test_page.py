"""The report page: what it computes, what it shows when something is missing, and its size."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from mprd.config.loading import load_config
from mprd.engine.state import build_state
from mprd.errors import UserError
from mprd.pairs.positives import MetaSet, choose_meta
from mprd.report.checkpoint import Snapshot, open_snapshot
from mprd.report.cli import app
from mprd.report.features import find_cases
from mprd.report.page import fingerprint, write_page
from mprd.report.pairs import build_lists, count_camera_pairs, score_candidates
from mprd.report.runs import read_folders
from mprd.report.tables import result_table
from mprd.runs.folder import RunFolder
from mprd.runtime import checkpoint
from mprd.train.cli import launch
from mprd.tune.folder import StudyFolder, StudyOptions
from mprd.tune.study import build_study
from mprd.tune.trial import Trial
from tests.conftest import NAMELESS, NUM_IDS, TINY


def train(root: Path, out: Path, *overrides: str) -> Path:
    settings = {"preset": "demo", "data": root, "set_": [*TINY, *overrides], "config": None, "seed": None}
    launch(settings, out=out, resume=None, launcher="local")
    return out


@pytest.fixture(scope="module")
def gcn_run(tiny_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tiny_root, tmp_path_factory.mktemp("runs") / "a<gcn>")


@pytest.fixture(scope="module")
def single_run(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write an untrained run of another labeler; its memory is zeros."""
    run = tmp_path_factory.mktemp("runs") / "single"
    shutil.copytree(tiny_run, run)
    (run / "config.yaml").write_text((run / "config.yaml").read_text().replace("labeller: gcn", "labeller: single"))
    return run


def snapshot(run: Path, *, best: bool = False) -> Snapshot:
    (read,), _ = read_folders([run])
    return open_snapshot(read, best=best)


def page_of(out: Path, *folders: Path) -> str:
    write_page(folders, out=out, best=False, progress=lambda _stage: None)
    return " ".join(out.read_text().split())


# -- what is computed -----------------------------------------------------------------------------


def test_the_checkpoint_retrieves_what_the_last_epoch_did(gcn_run: Path) -> None:
    last = json.loads((gcn_run / "metrics.jsonl").read_text().splitlines()[-1])
    cases = find_cases([snapshot(gcn_run)])
    assert cases.mAP[0] == pytest.approx(last["mAP"], abs=1e-6)
    precisions = [case.rankings[0].precision for case in cases.worst]
    assert precisions == sorted(precisions)
    assert cases.changed == []


def test_camera_pairs_add_up_to_the_precision_of_the_last_epoch(gcn_run: Path) -> None:
    last = json.loads((gcn_run / "metrics.jsonl").read_text().splitlines()[-1])
    counted = count_camera_pairs(snapshot(gcn_run))
    assert counted.num_true.sum() / counted.num_pairs.sum() == pytest.approx(last["pair_precision"], abs=1e-6)
    assert counted.num_same.sum() == NUM_IDS * 4 * 3


def test_candidates_exclude_the_labeled_images(gcn_run: Path) -> None:
    state = snapshot(gcn_run)
    candidates = score_candidates(state)
    # two of six identities are labeled; the other 16 images have 3 to 6 neighbors each
    assert 16 * 3 <= len(candidates) <= 16 * 6
    assert candidates.is_true is not None
    assert [*candidates.scores] == ["g_ij", "cosine", "k-reciprocal"]
    assert {len(scores) for scores in candidates.scores.values()} == {len(candidates.is_true)}
    assert 0 <= candidates.scores["g_ij"].min() <= candidates.scores["g_ij"].max() <= 1


def test_lists_behind_j_are_as_long_as_in_training(gcn_run: Path) -> None:
    state = snapshot(gcn_run)
    meta = choose_meta(state.config, state.need_dataset(), state.model.device)
    # two identities of four images, 1.7 times as long
    assert build_lists(state, meta).similarity.k1 == 7


def test_candidates_are_compared_as_the_training_compares_them(camera_run: Path) -> None:
    saved = checkpoint.load(camera_run / "checkpoints" / "last.pt")["similarity"]
    similarity = build_lists(snapshot(camera_run), MetaSet.empty()).similarity
    assert similarity.whitening is not None
    assert torch.equal(similarity.whitening.matrix, saved["whitening"]["matrix"])


def test_features_of_the_lists_are_those_that_training_drew_them_from(
    camera_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Snapshot, "extract", lambda *_: pytest.fail("extracts what the checkpoint holds"))
    saved = checkpoint.load(camera_run / "checkpoints" / "last.pt")["list_features"]
    assert torch.equal(build_lists(snapshot(camera_run), MetaSet.empty()).source, saved)


def changed(state: Snapshot, part: str, **settings: object) -> Snapshot:
    config = state.config.model_copy(update={part: getattr(state.config, part).model_copy(update=settings)})
    return dataclasses.replace(state, run=dataclasses.replace(state.run, config=config))


def test_positives_among_the_candidates_keep_to_the_limit(gcn_run: Path, single_run: Path) -> None:
    state = changed(changed(snapshot(gcn_run), "pairs", mu=0.0), "neighbors", similarity=-1.0)
    free, limited = (score_candidates(changed(state, "pairs", limit=limit)) for limit in (False, True))
    assert free.positive_share == 1
    # two images of each identity under each of two cameras: one and two others
    assert 0 < limited.is_positive.sum() <= 16 * 3 < free.is_positive.sum()
    assert score_candidates(snapshot(single_run)).is_positive is None


def test_a_run_whose_gcn_was_not_trained_shows_no_likelihoods(single_run: Path, gcn_run: Path) -> None:
    assert "g_ij" not in score_candidates(snapshot(single_run)).scores
    assert "g_ij" not in score_candidates(changed(snapshot(gcn_run), "train", warmup_epochs=3)).scores


def test_the_best_checkpoint_counts_the_epoch_it_was_taken_in(gcn_run: Path) -> None:
    rows = [json.loads(line) for line in (gcn_run / "metrics.jsonl").read_text().splitlines()]
    best = max(rows, key=lambda row: row["label_free_score"])
    assert snapshot(gcn_run, best=True).position == f"after epoch {best['epoch'] + 1} of 3"
    assert snapshot(gcn_run).position == "after epoch 3 of 3"


# -- the page -------------------------------------------------------------------------------------


class Tags(HTMLParser):
    """Collect what a page would fetch, and whether its elements close."""

    VOID = frozenset({"meta", "img", "br", "link", "input"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.sources: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.sources += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


@pytest.fixture(scope="module")
def compared(gcn_run: Path, single_run: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    return page_of(tmp_path_factory.mktemp("page") / "two.html", gcn_run, single_run)


def test_a_page_needs_nothing_but_itself(compared: str) -> None:
    tags = Tags()
    tags.feed(compared)
    assert tags.open == []
    assert all(source.startswith(("#", "data:image/jpeg;base64,")) for source in tags.sources)
    assert len([source for source in tags.sources if source.startswith("data:")]) > 10
    assert not re.search(r"url\((?!['\"]?#)|@import|<script", compared)
    assert len(compared) < 1_000_000


def test_names_are_text_on_the_page_and_never_markup(compared: str) -> None:
    assert "a<gcn>" not in compared
    assert "a&lt;gcn&gt;" in compared
    assert "&lt;br" not in compared


@pytest.mark.parametrize("text", ["{}", '{"command": ["mprd'])
def test_a_cut_record_of_the_command_is_as_none(text: str, gcn_run: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(gcn_run, tmp_path / "run"))
    (run / "run.json").write_text(text)
    assert "<code>unknown</code>" in page_of(tmp_path / "page.html", run)


def test_runs_that_read_other_identities_or_cameras_from_the_same_files_are_apart(gcn_run: Path) -> None:
    train = snapshot(gcn_run).need_train()
    assert train.pids is not None
    others = [dataclasses.replace(train, pids=train.pids + 1), dataclasses.replace(train, camids=None)]
    assert len({fingerprint(images) for images in (train, dataclasses.replace(train), *others)}) == 3


def test_cameras_have_the_names_of_the_files(gcn_run: Path, tiny_root: Path, tmp_path: Path) -> None:
    root, run = tmp_path / "data", Path(shutil.copytree(gcn_run, tmp_path / "run"))
    for path in sorted(tiny_root.rglob("*.jpg")):
        renamed = root / path.relative_to(tiny_root).with_name(path.name.replace("_c2s", "_c5s"))
        renamed.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, renamed)
    last = run / "checkpoints" / "last.pt"
    # as from before images were recorded
    checkpoint.save({name: part for name, part in checkpoint.load(last).items() if name != "images"}, last)
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace(str(tiny_root), str(root)))
    page = page_of(tmp_path / "page.html", run)
    assert "<tr><th></th><th>1</th><th>5</th></tr>" in page
    assert {*re.findall(r"camera (\w+)", page.split('id="queries"')[1])} >= {"1", "5"}
    assert "camera 2" not in page


@pytest.mark.parametrize("program", [("mprd", "report"), ("mprd/report/__main__.py",)])
def test_a_page_says_the_command_that_made_it(
    program: tuple[str, ...], gcn_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", [*program, "a", "--best"])
    monkeypatch.setattr("sys.executable", "/usr/bin/python")
    bare = Path(shutil.copytree(gcn_run, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints")))
    assert f"Made by <code>python {' '.join(program)} a --best</code>" in page_of(tmp_path / "page.html", bare)


def test_one_run_shows_the_choices_of_an_epoch_side_by_side(gcn_run: Path) -> None:
    table = result_table(read_folders([gcn_run])[0])
    assert [name for name, _ in table.columns] == ["last epoch", "by label-free score", "best on test", "untrained"]
    assert table.columns[0][1] == "epoch 3"
    assert all(len(row.cells) == 4 for row in table.rows)


def test_plots_take_their_colors_from_the_page(compared: str) -> None:
    assert "var(--c1)" in compared
    assert "#c0de" not in compared


def test_two_runs_are_shown_side_by_side(compared: str) -> None:
    differing = compared.split("Different between the runs")[1].split("<details")[0]
    assert re.findall(r"<code>([\w.]+)</code>", differing) == ["pairs.labeller"]
    assert compared.count('class="dots"') == 1
    assert "P holds no pairs: the only positive of every image is the image itself" in compared


def test_a_run_that_shares_only_the_layout_is_not_compared_with_the_paper(compared: str) -> None:
    assert "in the layout of Market-1501 that are not Market-1501 itself" in compared
    assert "Table 3" not in compared


def test_a_run_without_an_epoch_is_shown_beside_a_finished_one(compared: str) -> None:
    assert "No epoch has ended yet" in compared
    assert "the features of all images are equal" in compared
    assert "Finished: 3 epochs" in compared


@pytest.fixture(scope="module")
def broken(gcn_run: Path, tiny_root: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Show runs without checkpoint, without images, with other images, and with as many rows as Market-1501."""
    place = tmp_path_factory.mktemp("broken")
    shutil.copytree(gcn_run, place / "bare", ignore=shutil.ignore_patterns("checkpoints"))
    shutil.copytree(tiny_root, place / "data")
    next((place / "data" / "bounding_box_train").iterdir()).unlink()
    for name, root in (("moved", "/no/such/place"), ("changed", str(place / "data"))):
        shutil.copytree(gcn_run, place / name)
        config = (place / name / "config.yaml").read_text()
        assert str(tiny_root) in config
        (place / name / "config.yaml").write_text(config.replace(str(tiny_root), root))
    shutil.copytree(gcn_run, place / "large")
    last = place / "large" / "checkpoints" / "last.pt"
    state = checkpoint.load(last)
    checkpoint.save({**state, "memory": state["memory"][:1].expand(12936, -1).clone()}, last)
    return page_of(place / "page.html", *(place / name for name in ("bare", "moved", "changed", "large")))


def test_a_run_without_a_checkpoint_shows_its_curves(broken: str) -> None:
    assert "last.pt: there is no checkpoint" in broken
    assert 'aria-label="mAP"' in broken


def test_a_run_whose_images_are_missing_is_marked(broken: str) -> None:
    assert "the data set cannot be read: /no/such/place" in broken


def test_a_run_on_images_that_have_changed_shows_only_its_queries(broken: str) -> None:
    assert "trained on 24 images" in broken
    assert "now has 23" in broken
    assert "data:image/jpeg" in broken
    assert 'class="dots"' not in broken


def test_a_run_on_the_papers_images_is_in_its_table(broken: str, gcn_run: Path) -> None:
    last = json.loads((gcn_run / "metrics.jsonl").read_text().splitlines()[-1])
    table = broken.split('id="paper"')[1].split("</table>")[0]
    assert '<td>MPRD</td><td class="text">Table 3</td><td>83.0</td><td>91.3</td><td>93.6</td><td>51.1</td>' in table
    ours = table.split('class="ours"')[1]
    assert "large" in ours
    assert "as MPRD#, epoch 3" in ours
    assert f"<td>{100 * last['mAP']:.1f}</td>" in ours


def test_crops_without_ids_show_their_candidates(nameless_root: Path, tmp_path: Path) -> None:
    config = load_config("demo", overrides=(*TINY, *NAMELESS), values={"data": {"root": nameless_root}})
    folder = RunFolder(tmp_path / "run")
    folder.create(config)
    folder.save(build_state(config, num_images=NUM_IDS * 4, device=torch.device("cpu")).state_dict())
    page = page_of(tmp_path / "page.html", folder.path)
    assert "the file names carry no identities" in page
    assert "the data set has no query and gallery with identities and cameras" in page
    assert 'aria-label="cosine of run"' in page


def test_a_study_shows_its_table_and_its_trials(gcn_run: Path, tmp_path: Path) -> None:
    study = build_study({"name": "small", "doc": "A question.", "space": {"pairs.mu": {"grid": [0.3, 0.5]}}}, source="")
    folder = StudyFolder(tmp_path / "study")
    folder.create(study, load_config("demo"), StudyOptions("mAP", 2))
    assert "0 trials finished" in page_of(tmp_path / "page.html", folder.path)
    running = Trial(0, "mu=0.3", {"pairs.mu": 0.3}, 0)
    folder.write_trials([running])
    shutil.copytree(gcn_run, folder.run_folder(running).path)
    page = page_of(tmp_path / "page.html", folder.path)
    assert "0 failed, 1 running or cut off." in page
    assert "<th>mAP</th>" in page
    trials = [
        Trial(0, "mu=0.3", {"pairs.mu": 0.3}, 0, state="finished"),
        Trial(1, "mu=0.5", {"pairs.mu": 0.5}, 0, state="failed"),
    ]
    folder.write_trials(trials)
    page = page_of(tmp_path / "page.html", folder.path)
    assert "A question." in page
    assert "mu=0.3" in page
    assert "1 trials finished, 0 stopped early, 1 failed" in page
    assert 'aria-label="Precision of P"' in page
    assert 'id="settings"' not in page


# -- the command ----------------------------------------------------------------------------------


def refuse(capfd: pytest.CaptureFixture[str], *args: str) -> str:
    with pytest.raises(SystemExit) as stop:
        app(list(args))
    (line,) = capfd.readouterr().err.splitlines()
    assert stop.value.code == 2
    return line


def test_a_folder_that_is_no_run_is_named_and_nothing_is_written(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "page.html"
    line = refuse(capfd, str(tmp_path), "--out", str(out))
    assert f"{tmp_path}: neither a run nor a study folder" in line
    assert list(tmp_path.iterdir()) == []


def test_a_page_that_cannot_be_written_is_refused_before_anything_is_computed(
    tiny_run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert "there is no folder" in refuse(capfd, str(tiny_run), "--out", str(tmp_path / "no" / "page.html"))
    assert "is a folder" in refuse(capfd, str(tiny_run), "--out", str(tmp_path))


def test_a_run_given_twice_is_refused(tiny_run: Path) -> None:
    with pytest.raises(UserError, match="given twice"):
        read_folders([tiny_run, tiny_run / "."])
