"""The docs say what the program does: settings, commands, links, errors, and a tutorial that runs."""

from __future__ import annotations

import doctest
import inspect
import json
import re
import runpy
from importlib import import_module
from pathlib import Path

import pytest
from PIL import Image

from mprd import load_model
from mprd.__main__ import COMMANDS
from mprd.config.schema import Config
from mprd.tune.study import Study

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))


@pytest.mark.parametrize("name", ["settings", "studies"])
def test_a_written_page_is_current(name: str) -> None:
    written = runpy.run_path(str(DOCS / f"{name}.py"))["page"]()
    assert (DOCS / f"{name}.md").read_text() == written, f"run `python docs/{name}.py`"


def test_the_schema_of_study_files_is_current() -> None:
    assert json.loads((DOCS / "_static" / "study.schema.json").read_text()) == Study.model_json_schema()


def test_every_command_has_a_page_in_the_index() -> None:
    assert {page.stem for page in (DOCS / "commands").glob("*.md")} == set(COMMANDS)
    index = (DOCS / "index.md").read_text()
    assert [name for name in COMMANDS if f"(commands/{name}.md)" not in index] == []


@pytest.mark.parametrize("page", [*PAGES, ROOT / "README.md"], ids=lambda page: page.name)
def test_links_lead_to_files_that_are_there(page: Path) -> None:
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text())
    assert [link for link in links if not (page.parent / link).exists()] == []


@pytest.mark.parametrize("page", [*PAGES, ROOT / "README.md"], ids=lambda page: page.name)
def test_settings_that_pages_name_exist(page: Path) -> None:
    from mprd.config.loading import setting_names

    known = set(setting_names())
    named = re.findall(r"--set[ =]'?([a-z_]+(?:\.[a-z_]+)+)=", page.read_text())
    assert [name for name in named if name not in known] == []


@pytest.mark.parametrize("page", [*PAGES, ROOT / "README.md"], ids=lambda page: page.name)
def test_options_that_pages_name_exist(page: Path) -> None:
    helps = {name: (ROOT / "mprd" / name / "cli.py").read_text() for name in COMMANDS}
    wrong = []
    # with the lines that a backslash joins
    command = r"^(?:    )?(?:python -m mprd\.|mprd )([a-z]+)((?:.*\\\n)*.*)$"
    for name, rest in re.findall(command, page.read_text(), re.MULTILINE):
        for option in re.findall(r"--([a-z][a-z-]+)", rest.split("#")[0]):
            is_named = f'"--{option}"' in helps[name] or re.search(rf"\b{option.replace('-', '_')}_?:", helps[name])
            wrong += [] if is_named or option == "install-completion" else [f"{name} --{option}"]
    assert wrong == []


# what the examples of others return
WITHOUT_EXAMPLE = {"mprd.feature_file.FeatureFile", "mprd.metrics.RankMetrics"}
# has its example on the page
WITHOUT_EXAMPLE |= {"mprd.engine.fit"}


def documented() -> dict[str, list[str]]:
    """Map each name of the reference to the members that it lists."""
    entry = r"^\.\. auto(?:function|class):: (\S+)\n(?:   :members: (.+))?"
    found = re.findall(entry, (DOCS / "reference.md").read_text(), re.MULTILINE)
    return {name: members.split(", ") if members else [] for name, members in found}


@pytest.mark.parametrize("name", documented())
def test_each_name_of_the_reference_has_an_example_that_runs(
    name: str, tiny_run: Path, tiny_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    module, _, attribute = name.rpartition(".")
    thing = getattr(import_module(module), attribute)
    crop = min((tiny_root / "bounding_box_train").iterdir())
    globs = {"run": str(tiny_run), "model": load_model(tiny_run, device="cpu"), "path": crop, "Image": Image}
    globs |= vars(inspect.getmodule(inspect.unwrap(thing)))
    texts = [inspect.getdoc(part) or "" for part in (thing, *(getattr(thing, member) for member in documented()[name]))]
    tests = [doctest.DocTestParser().get_doctest(text, dict(globs), name, None, 0) for text in texts]
    assert name in WITHOUT_EXAMPLE or any(test.examples for test in tests)
    runner = doctest.DocTestRunner()
    assert [runner.run(test).failed for test in tests] == [0] * len(tests)


@pytest.mark.parametrize("page", ["api", "reference"])
def test_the_examples_on_pages_run(
    page: str, tiny_config: Config, tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tiny_config.data.root
    assert root is not None
    crop = min((root / "bounding_box_train").iterdir())
    names = {"run": str(tiny_run), "path": crop, "folder": str(root / "query"), "config": tiny_config}
    monkeypatch.chdir(tmp_path)
    result = doctest.testfile(str(DOCS / f"{page}.md"), module_relative=False, globs=names)
    assert (result.failed, result.attempted > 8) == (0, True)


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_the_figure_of_the_method_is_current(theme: str) -> None:
    drawn = runpy.run_path(str(DOCS / "method_figure.py"))["figure"](theme)
    assert (DOCS / "figures" / f"method-{theme}.svg").read_text() == drawn, "run `python docs/method_figure.py`"


def test_troubleshooting_quotes_messages_that_the_program_has() -> None:
    sources = "\n".join(path.read_text() for path in (ROOT / "mprd").rglob("*.py"))
    # names and punctuation of f-strings stand between the pieces
    quoted = re.findall(r"^\| `(.+?)`(?: \(warning\))? \|", (DOCS / "troubleshooting.md").read_text(), re.MULTILINE)
    pieces = [piece.strip(" :;,()") for message in quoted for piece in message.split("...")]
    assert len(quoted) > 25
    assert [piece for piece in pieces if piece and piece not in sources] == []
