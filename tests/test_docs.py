"""What the README and the pages say exists: commands, links, files, pictures, tests, and the code that is quoted."""

import importlib
import re

import pytest
from conftest import ROOT

from support.options import parse_args

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)


def blocks(page, language):
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.DOTALL)


def commands(page):
    """The commands of a page's shell blocks that run one of our scripts, as lists of words: runner, script, arguments.

    A script is a file, or a module after -m, such as extras.estimate.
    """
    lines = "\n".join(blocks(page, "bash")).replace("\\\n", " ").splitlines()
    lines = [re.sub(r"^torchrun( --\S+)*", "torchrun", line).replace("python -m ", "python ") for line in lines]
    return [line.split("#")[0].split() for line in lines if re.match(r"(python|torchrun) (\w+\.py|extras\.\w+)", line)]


def anchors(page):
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@every_page
def test_commands_are_accepted(page, monkeypatch, tmp_path):
    """By the options of their scripts, with files and values as written there."""
    for path in [ROOT / "configs", *ROOT.glob("config_*.yaml")]:
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / "my_images").mkdir()
    monkeypatch.chdir(tmp_path)
    for _, script, *arguments in commands(page):
        module = importlib.import_module(script.removesuffix(".py"))
        if script == "extras.estimate":
            options = importlib.import_module(f"train_{arguments.pop(0)}").OPTIONS | {"estimate": module.ESTIMATE}
        else:
            options = module.OPTIONS
        parse_args(options, "", arguments)


def test_every_script_is_shown():
    scripts = {path.name for path in ROOT.glob("*.py") if "run_script(" in path.read_text()}
    scripts |= {f"extras.{path.stem}" for path in (ROOT / "extras").glob("*.py") if "run_script(" in path.read_text()}
    assert {command[1] for page in PAGES for command in commands(page)} == scripts


@every_page
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if not link.startswith("http"):
            path, _, anchor = link.partition("#")
            target = (page.parent / path).resolve() if path else page
            assert target.exists(), link
            assert not anchor or anchor in anchors(target), link


@every_page
def test_files_that_are_named_exist(page):
    for name in re.findall(r"`((?:[\w.-]+/)*[\w-]+\.(?:py|md|sh|yaml|html))[`: ]", page.read_text()):
        written = {"compare.md", "output_dir/config.yaml"}
        if name not in written and "NAME" not in name and "MODULE" not in name:
            assert (ROOT / name).exists(), name


def test_pictures_are_shown():
    shown = {path for page in PAGES for path in re.findall(r"([\w-]+\.png)\)", page.read_text())}
    assert shown == {path.name for path in (ROOT / "docs").glob("*.png")}


def test_each_promise_names_a_test():
    tests = "\n".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    promises = (ROOT / "docs" / "reliability.md").read_text().split("\n## ")[0]
    rows = [line for line in promises.splitlines() if line.startswith("| ")][1:]
    assert len(rows) > 10
    for row in rows:
        named = re.findall(r"`(test_\w+)`", row)
        assert named and all(f"def {name}(" in tests for name in named), row


def test_the_code_of_the_readme_is_the_code():
    shown = [block for block in blocks(ROOT / "README.md", "python") if "def " in block]
    source = re.sub(r'\n    """.*?"""', "", (ROOT / "objectives.py").read_text(), flags=re.DOTALL)
    assert shown and all(block.strip() in source for block in shown)


def test_the_readme_stays_short():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 170
    assert all(len(line) <= 150 or line.startswith(("|", "python")) for line in lines)
