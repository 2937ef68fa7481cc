"""The doctor recognizes layouts, reports faults, and proposes a command that trains."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mprd.backbone.network import Backbone
from mprd.config.loading import load_config
from mprd.data.datasets import load_dataset
from mprd.data.recognition import locate, recognize
from mprd.doctor import estimate, plans
from mprd.doctor.checks import DatasetReport, examine
from mprd.doctor.cli import app
from mprd.engine.trainer import Trainer
from mprd.train.cli import app as train_app
from tests.conftest import TINY, write_crop
from tests.trees import write_image, write_images, write_msmt17


@pytest.fixture(autouse=True)
def offline_and_short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Request no weights from a server, and measure briefly."""
    monkeypatch.setattr(plans, "has_imagenet_weights", lambda _name: False)
    monkeypatch.setattr(estimate, "MEASURED_SECONDS", 0.01)


@pytest.fixture
def root(tiny_root: Path, tmp_path: Path) -> Path:
    """Copy the tiny data set, to be changed."""
    return Path(shutil.copytree(tiny_root, tmp_path / "data"))


def doctor(capfd: pytest.CaptureFixture[str], *args: str) -> tuple[int, str]:
    """Run the command; return its exit code and output."""
    with pytest.raises(SystemExit) as stop:
        app(list(args))
    return stop.value.code or 0, capfd.readouterr().out  # type: ignore[return-value]


def texts(found: DatasetReport, level: str) -> str:
    """Return the findings of a level."""
    return "\n".join(finding.text for finding in found.findings if finding.level == level)


def paste(command: str, out: Path) -> None:
    """Run a proposed command at tiny size."""
    words = shlex.split(command)
    assert words[:3] == ["python", "-m", "mprd.train"]
    sizes = [size for size in TINY if not size.startswith(("data.dataset", "meta.num_ids", "train.epochs"))]
    sets = [word for size in (*sizes, "train.epochs=1") for word in ("--set", size)]
    with pytest.raises(SystemExit) as stop:
        train_app([*words[3:], *sets, "--launcher", "local", "--out", str(out)])
    assert not stop.value.code


def test_the_plan_reads_the_recognized_layout(tmp_path: Path) -> None:
    for folder in ("bounding_box_train", "query", "bounding_box_test"):
        write_images(tmp_path / folder, ["0001_c2_f0046182.jpg", "0001_c5_f0051341.jpg"])
    plan = plans.base_plan(recognize(tmp_path), "paper")
    assert locate(plan.compose()[0].data).dataset == "dukemtmcreid"
    assert plan.command == f"python -m mprd.train --preset paper --data {tmp_path}"


def test_missing_lists_are_a_problem(tmp_path: Path) -> None:
    (write_msmt17(tmp_path) / "list_query.txt").unlink()
    found = examine(tmp_path)
    assert found.command is None
    assert "list_query.txt missing" in texts(found, "problem")


def hide_ids(root: Path) -> None:
    crops = sorted((root / "bounding_box_train").iterdir())
    for number, path in enumerate(crops):
        path.rename(root / f"crop{number}.jpg")
    for folder in ("bounding_box_train", "query", "bounding_box_test"):
        shutil.rmtree(root / folder)


def nest_and_break_an_image(root: Path) -> None:
    (root / "bounding_box_train" / "0001_c1s1_000001_01.jpg").write_bytes(b"no image")
    (root / "one" / "two").mkdir(parents=True)
    for folder in ("bounding_box_train", "query", "bounding_box_test"):
        (root / folder).rename(root / "one" / "two" / folder)


@pytest.mark.parametrize("change", [hide_ids, nest_and_break_an_image])
def test_the_proposed_command_trains(
    change: Callable[[Path], None], root: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    change(root)
    code, printed = doctor(capfd, str(root))
    assert code == 0
    assert re.search(r"^estimate: .* GB of memory, on ", printed, re.MULTILINE)
    command = re.search(r"^    (python -m mprd\.train .*)$", printed, re.MULTILINE)
    assert command is not None
    paste(command[1], tmp_path / "run")


def misname(root: Path) -> None:
    write_crop(root / "query" / "portrait.jpg", 1, 1, 1)


def keep_a_few(root: Path) -> None:
    for path in sorted((root / "bounding_box_train").iterdir())[8:]:
        path.unlink()


def use_one_camera(root: Path) -> None:
    for path in sorted(root.rglob("*_c2s1_*.jpg")):
        path.unlink()
    for number in range(12):
        write_crop(root / "bounding_box_train" / f"0001_c1s2_{number:06d}_01.jpg", 1, 1, number)


def empty_the_images(root: Path) -> None:
    for path in (root / "query").iterdir():
        path.write_bytes(b"")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (misname, "query/portrait.jpg: the name does not parse (1 of 9 do not)"),
        (keep_a_few, "neighbors.k = 8 needs more training images"),
        (use_one_camera, "no query has a match in the gallery under another camera"),
        (empty_the_images, "no image of query can be read"),
    ],
)
def test_what_would_fail_is_a_problem_and_exits_with_1(
    change: Callable[[Path], None], message: str, root: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    change(root)
    code, printed = doctor(capfd, str(root))
    assert code == 1
    assert message in printed
    assert "mprd.train" not in printed


def test_a_pattern_that_is_no_expression_is_a_problem(root: Path) -> None:
    found = examine(root, settings=["data.name_pattern=(['"])
    assert texts(found, "problem").startswith("data.name_pattern: not a regular expression")


def test_without_queries_a_data_set_is_read_as_a_tree_and_not_evaluated(root: Path) -> None:
    shutil.rmtree(root / "query")
    found = examine(root)
    assert "no images in query and gallery, so nothing is evaluated" in texts(found, "warning")
    assert found.command == f"python -m mprd.train --preset demo --data {root}"


def test_folders_that_the_user_names_and_lists_are_examined(root: Path, tmp_path: Path) -> None:
    (root / "query").rename(root / "ask")
    settings = ["data.train=bounding_box_train", "data.query=ask", "data.gallery=bounding_box_test"]
    found = examine(root, settings=settings)
    assert found.splits["query"]["images"] == 8
    assert found.command == f"python -m mprd.train --preset demo --data {root} --set " + " --set ".join(settings)
    list_ = root / "list.csv"
    rows = [f"{path.relative_to(root)},train,{path.name[:4]},{path.name[6]}" for path in root.rglob("bounding*train/*")]
    list_.write_text("\n".join(["file,split,identity,camera", *rows]))
    listed = examine(list_)
    assert listed.splits["train"] == {"images": 24, "identities": 6, "cameras": 2}
    assert listed.command == f"python -m mprd.train --preset demo --data {list_}"


def test_faults_that_do_not_stop_a_run_are_warnings_with_their_files(root: Path) -> None:
    train = root / "bounding_box_train"
    shutil.copy(train / "0001_c1s1_000001_01.jpg", root / "query" / "0001_c1s1_000009_01.jpg")
    shutil.copy(train / "0002_c1s1_000001_01.jpg", train / "0003_c1s1_000009_01.jpg")
    write_image(train / "0002_c1s1_000009_01.jpg", (9, 9, 9), size=(8, 16))
    found = examine(root)
    assert found.command is not None
    warnings = texts(found, "warning")
    assert "1 image less than 16 x 32 pixels" in warnings
    assert "2 copies of another image, 1 of them across training and test, 1 under two identities" in warnings
    assert "1 of 6 training identities are in query or gallery too" in warnings
    (double,) = [finding for finding in found.findings if "copies" in finding.text]
    assert [Path(file).name for file in double.files] == ["0001_c1s1_000001_01.jpg", "0001_c1s1_000009_01.jpg"]


def test_the_first_person_of_a_tree_is_no_distractor(root: Path, tmp_path: Path) -> None:
    words = tmp_path / "words"
    for split, people in (("train", ("ann", "bob")), ("query", ("ann",)), ("gallery", ("ann", "eve"))):
        write_images(words / split, [f"{name}/c{camera}_1.jpg" for name in people for camera in (1, 2)])
    assert "1 of 2 training identities are in query or gallery too" in texts(examine(words), "warning")
    for folder in ("bounding_box_train", "query", "bounding_box_test"):
        write_images(root / folder, [f"0000_c{camera}s1_000001_01.jpg" for camera in (1, 2)])
    assert "training identities" not in texts(examine(root), "warning")


def test_counts_and_sizes_are_reported(root: Path, capfd: pytest.CaptureFixture[str]) -> None:
    write_image(root / "bounding_box_train" / "0001_c1s1_000009_01.jpg", size=(30, 90))
    code, printed = doctor(capfd, str(root), "--json")
    found = json.loads(printed)
    assert code == 0
    assert found["splits"] == {
        "train": {"images": 25, "identities": 6, "cameras": 2},
        "query": {"images": 8, "identities": 4, "cameras": 2},
        "gallery": {"images": 8, "identities": 4, "cameras": 2},
    }
    assert found["sizes"]["max"] == {"width": 30, "height": 90}
    assert found["sizes"]["median"] == {"width": 20, "height": 40}
    assert found["command"] == f"python -m mprd.train --preset demo --data {root}"
    assert found["estimate"]["least_seconds"] > 0


def test_square_crops_unreadable_styles_and_a_large_estimate_are_reported(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plans, "estimate_cost", lambda _trainer: estimate.Cost(1, 1, 1, 60, 60, 2 * 10**9, 10**9))
    for path in root.rglob("*.jpg"):
        write_image(path, size=(40, 40))
    style = write_image(root / "bounding_box_train_camstyle" / "0001_c1s1_000001_01_fake_1to2.jpg")
    style.write_bytes(b"no image")
    found = examine(root)
    assert "crops are not twice as high as wide" in texts(found, "note")
    assert "1 CamStyle images are unreadable" in texts(found, "warning")
    assert "needs about 2.0 GB of memory, 1.0 GB available" in texts(found, "warning")
    assert found.command is not None
    assert found.command.endswith("--set data.on_bad_image=skip")


@pytest.mark.parametrize(
    ("names", "level", "message"),
    [
        ([], "warning", "has no image of an expected name, so no style is transferred"),
        (["0001_c1s1_000001_01_fake_1to2.jpg"], "warning", "incomplete, 23 of 24 images are missing"),
        (None, "note", "no folder bounding_box_train_camstyle, so no style is transferred"),
        ("all", "note", "complete, 24 images"),
    ],
)
def test_camstyle_is_missing_incomplete_or_complete(
    names: list[str] | str | None, level: str, message: str, root: Path
) -> None:
    if names == "all":
        stems = [path.stem for path in (root / "bounding_box_train").iterdir()]
        names = [f"{stem}_fake_{stem[6]}to{3 - int(stem[6])}.jpg" for stem in stems]
    if names is not None:
        (root / "bounding_box_train_camstyle").mkdir()
        write_images(root / "bounding_box_train_camstyle", names)
    assert message in texts(examine(root), level)


def test_a_missing_folder_exits_with_2_an_empty_one_with_1(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert doctor(capfd, str(tmp_path / "gone"))[0] == 2
    assert doctor(capfd, str(tmp_path)) == (
        1,
        f"problem: {tmp_path}: no images, and no data set one or two folders below\n"
        "training would fail: see the problem above\n",
    )


def test_the_recommended_is_proposed_where_its_weights_and_the_time_are_there(
    tiny_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plans, "has_imagenet_weights", lambda _name: True)
    tried = []

    def estimated(trainer: Trainer) -> estimate.Cost:
        tried.append(trainer.config.backbone.name)
        hours = 1 if len(tried) == 1 else 100
        return estimate.Cost(1, 1, 1, 1800 * hours, 3600 * hours, 10**9, 10**10)

    monkeypatch.setattr(plans, "estimate_cost", estimated)
    recommended = f"python -m mprd.train --data {tiny_root}"
    paper = f"python -m mprd.train --preset paper --data {tiny_root}"
    short = examine(tiny_root)
    assert [short.command, *(plan.command for plan in short.others)] == [recommended, paper]
    long = examine(tiny_root)
    assert long.command == f"python -m mprd.train --preset demo --data {tiny_root}"
    assert [plan.command for plan in long.others] == [recommended, paper]
    assert not any(plan.remark for plan in (*short.others, *long.others))
    assert tried == ["resnet50", "resnet50", "small"]


def test_the_recommended_does_without_cameras_where_none_are_known(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hide_ids(root)
    monkeypatch.setattr(plans, "has_imagenet_weights", lambda _name: True)
    monkeypatch.setattr(plans, "estimate_cost", lambda _trainer: estimate.Cost(1, 1, 1, 60, 60, 10**9, 10**10))
    found = examine(root)
    assert found.command == f"python -m mprd.train --data {root}"
    assert "no cameras in the file names, so batch norms take the statistics of all images" in texts(found, "note")


def test_the_bytes_that_autograd_saves_are_counted() -> None:
    # tanh saves its output, 2 x 3 x 4 x 4 floats; mean, batch norm and normalization save rows
    images = torch.rand(2, 3, 4, 4, requires_grad=True)
    saved = estimate.count_saved(Backbone(torch.nn.Tanh(), 3), images)
    assert 2 * 3 * 4 * 4 * 4 <= saved < 2 * 3 * 4 * 4 * 4 + 40 * 3 * 4


@pytest.mark.parametrize(("source", "num_extracted"), [("memory", 24), ("mean", 48)])
def test_an_estimate_leaves_the_network_as_it_was(source: str, num_extracted: int, tiny_root: Path) -> None:
    overrides = (*TINY, "pairs.refresh=epoch", f"neighbors.source={source}")
    config = load_config("demo", overrides=overrides, values={"data": {"root": tiny_root}})
    dataset = load_dataset(config.data)
    trainer = Trainer(config, dataset, device=torch.device("cpu"))
    before = {name: tensor.clone() for name, tensor in trainer.state.backbone.state_dict().items()}
    found = estimate.estimate_cost(trainer)
    for name, tensor in trainer.state.backbone.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    # 3 epochs of 24 images trained and extracted, twice for frozen lists, and 16 tested; and the initial extraction
    step, look = found.train_seconds + found.load_seconds, found.extract_seconds + found.load_seconds
    assert found.least_seconds == pytest.approx(3 * (24 * step + num_extracted * look + 16 * look) + 40 * look)
