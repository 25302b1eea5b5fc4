"""What the documentation says exists: generated pages, links, files, tests, names, commands, configuration keys."""

from __future__ import annotations

import ast
import functools
import importlib.util
import re
import shlex
import textwrap
from pathlib import Path
from types import ModuleType

import pytest

import farspan
from farspan.launch.cli import _parser
from farspan.pretrain.config import Config
from farspan.pretrain.config_file import known_keys
from farspan.pretrain.models import ARCHITECTURES
from farspan.pretrain.models.config import ModelConfig

ROOT = Path(farspan.__file__).resolve().parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FOLDERS = ("pretrain", "parallel", "kernels", "launch", "configs", "tests", "benchmarks", "docs")
# What a run, a checkpoint or a reader's own machine has, and the repository has not.
ELSEWHERE = re.compile(r"(runs|data|models|texts|checkpoints|tensorboard|tokenizer)/|data/mine|texts/\*\.txt")


@functools.cache
def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_configuration", ROOT / "docs/make_configuration.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def code_of(text: str) -> list[str]:
    """Code spans, and the lines of code blocks (fenced, or indented by four spaces)."""
    fenced = re.findall(r"^```\w*\n(.*?)^```", text, flags=re.M | re.S)
    rest = re.sub(r"^```\w*\n.*?^```", "", text, flags=re.M | re.S)
    blocks = [line for block in fenced for line in block.splitlines()] + re.findall(r"^ {4}(\S.*)$", rest, flags=re.M)
    return re.findall(r"`([^`\n]+)`", rest) + [line.strip() for line in blocks]


def anchors_of(text: str) -> set[str]:
    """The names that headings get on a page of a repository."""
    headings = re.findall(r"^#+ (.+)$", text, flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


each_page = pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])


# The page of the configuration.


def test_the_page_is_what_the_generator_gives() -> None:
    page = generator().PAGE
    assert text_of(page) == generator().page(), "run python docs/make_configuration.py"


def test_the_page_has_every_key() -> None:
    page = text_of(generator().PAGE)
    missing = [key for key in known_keys() if f"\n| `{key}`" not in page and f"\n## {key}\n" not in page]
    assert missing == []


def test_a_key_without_a_description_is_refused() -> None:
    class Undescribed(ModelConfig):
        novelty: int = 3

    with pytest.raises(SystemExit, match=r"model\.novelty has no description"):
        list(generator()._rows({"model.novelty": [(Undescribed.model_fields["novelty"], "x")]}))


def test_an_architectures_own_default_keeps_the_constraints() -> None:
    for name, architecture in ARCHITECTURES.items():
        for key, field in ModelConfig.model_fields.items():
            own = architecture.config_class.model_fields[key]
            assert own.metadata == field.metadata, f"{name}: {key}"


def test_what_is_said_to_be_refused_is_refused() -> None:
    with pytest.raises(SystemExit, match="is not refused"):
        generator().refusal({"training.steps": 5})


# All pages.


@each_page
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", text_of(page)):
        if re.match(r"https?:", target):
            assert re.match(r"https://(arxiv\.org/abs/\d{4}\.\d{5}|huggingface\.co/|github\.com/)", target), target
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{target} does not exist"
        assert not anchor or anchor in anchors_of(text_of(file)), f"{target}: no such heading"


@each_page
def test_files_and_tests_exist(page: Path) -> None:
    for code in code_of(text_of(page)):
        for word in re.findall(r"[\w.\-/]+(?:::\w+)?", code):
            path, _, test = word.removeprefix("./").partition("::")
            if path.split("/")[0] not in FOLDERS or "/" not in path or ELSEWHERE.match(path):
                continue
            assert (ROOT / path).exists(), f"{word} does not exist"
            if test:
                names = {n.name for n in ast.walk(ast.parse(text_of(ROOT / path))) if isinstance(n, ast.FunctionDef)}
                assert test in names, f"{word} does not exist"


@functools.cache
def vocabulary() -> set[str]:
    """Every name in the sources, the examples and the recipes."""
    folders = {*FOLDERS, "tests/support"} - {"tests"}
    files = [f for folder in folders for kind in ("py", "yaml", "sh") for f in (ROOT / folder).rglob(f"*.{kind}")]
    return {word for file in files for word in re.findall(r"\w+", text_of(file))}


@each_page
def test_names_are_those_of_the_code(page: Path) -> None:
    """A code span that is a name, a dotted name or a call says nothing that the code does not know."""
    for code in re.findall(r"(?<!`)`([^`\n]+)`(?!`)", text_of(page)):
        if re.fullmatch(r"[A-Za-z_][\w.]*(\(.*\))?", code):
            unknown = [word for word in re.findall(r"[A-Za-z_]\w*", code) if word not in vocabulary()]
            assert not unknown, f"{code}: nothing is called {unknown}"


@each_page
def test_commands_are_understood(page: Path) -> None:
    for line in code_of(text_of(page)):
        words = shlex.split(line, comments=True) if line.startswith("farspan ") else []
        if len(words) < 2 or words[1].startswith("-") or "|" in words:
            continue
        named = all(re.fullmatch(r"[a-z-]+", word) for word in words)  # not given: without arguments
        try:
            rest = _parser(words[1]).parse_known_args(words[1:] + ["--help"] * named)[1]
            assert not [word for word in rest if word.startswith("-")], line
        except SystemExit as end:
            assert end.code == 0, line


@each_page
def test_keys_are_those_of_the_configuration(page: Path) -> None:
    known = set(re.findall(r"^\| `([\w.]+)`", text_of(generator().PAGE), flags=re.M))
    for code in code_of(re.sub(r"^```python\n.*?^```", "", text_of(page), flags=re.M | re.S)):
        for key in re.findall(r"(?<![\w./])([a-z]+(?:\.[a-z_0-9]+)+)(?=[=:\s]|$)", code):
            if key.partition(".")[0] in Config.model_fields and not key.endswith(".jsonl"):  # a file's name
                assert key in known, f"{code}: there is no key {key}"


@each_page
def test_python_is_python(page: Path) -> None:
    for block in re.findall(r"^```python\n(.*?)^```", text_of(page), flags=re.M | re.S):
        compile(textwrap.dedent(block), str(page), "exec")


@each_page
def test_the_page_speaks_of_the_project_alone(page: Path) -> None:
    found = re.search(r"\b(TODO|FIXME|XXX)\b|(?<![\w.])/(work|home|root|tmp)\b", text_of(page))
    assert found is None, found


def test_the_walk_through_shows_what_stands_in_the_files() -> None:
    shown = re.findall(r"^```python\n(.*?)^```", text_of(ROOT / "docs/add-an-architecture.md"), flags=re.M | re.S)
    files = [text_of(ROOT / name) for name in ("docs/examples/fnet.py", "tests/models/test_fnet.py")]
    unknown = [block for block in shown if not any(block in file for file in files)]
    assert len(shown) > 5 and len(unknown) == 1 and unknown[0].startswith("# pretrain/models/__init__.py")
    table = unknown[0].partition("\n")[2].replace("        FNet,\n", "")
    assert table in text_of(ROOT / "pretrain/models/__init__.py")
