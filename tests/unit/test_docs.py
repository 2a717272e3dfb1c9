"""The pages a newcomer reads say what is: links lead somewhere, commands parse, names exist, numbers are the run's."""

from __future__ import annotations

import ast
import asyncio
import importlib.util
import json
import re
import shlex
import sys
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest

from lockstep import cli
from lockstep.config.checks import check_training
from lockstep.config.hooks import load_function
from lockstep.config.parsing import parse_options
from lockstep.types import Sample

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "recipes").rglob("*.md")],
    key=lambda page: page.relative_to(ROOT),
)
RECIPES = sorted(path for path in (ROOT / "recipes").rglob("*.toml") if path.name != "twin.toml")
README = (ROOT / "README.md").read_text()
QUICKSTART = (ROOT / "recipes" / "quickstart" / "README.md").read_text()
ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text()


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def fenced(text: str) -> list[str]:
    return re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def code_lines(text: str) -> list[str]:
    """Lines of fenced and of indented code, without trailing comments."""
    lines = [line for block in fenced(text) for line in block.splitlines()]
    lines += [line for line in text.splitlines() if line.startswith("    ")]
    return [re.sub(r"\s+# .*", "", line).strip() for line in lines]


def inline_code(text: str) -> list[str]:
    return re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL))


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def named_files(text: str) -> dict[str, str]:
    """Code blocks that begin with their own file's name (`# my_run.toml`), by that name."""
    found = {}
    for block in fenced(text):
        if match := re.match(r"# (\S+\.(?:toml|py))\n", block):
            found[match[1]] = block
    return found


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_relative_link_leads_somewhere(page: Path):
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if link.startswith(("http:", "https:")):
            continue
        file, _, anchor = link.partition("#")
        target = page.parent / file if file else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert broken == []


def is_a_file_of_ours(word: str) -> bool:
    suffixes = (".py", ".toml", ".md", ".json", ".txt", "/")
    is_path = re.fullmatch(r"[\w./-]+", word) and word.endswith(suffixes) and word.strip("./")
    return bool(is_path) and not word.startswith("runs/")


FOUND_ELSEWHERE = {"config.json", "config.toml", "data/", "sft/", "checkpoints/", "recipe.toml"}
"""Files of models and of runs."""


@pytest.mark.parametrize("page", [p for p in PAGES if "docs/algorithms" not in str(p)], ids=name_of)
def test_every_file_that_is_named_exists(page: Path):
    places = [ROOT, ROOT / "lockstep", page.parent]
    named = {word for word in inline_code(page.read_text()) if is_a_file_of_ours(word)} - FOUND_ELSEWHERE
    named -= set(named_files(page.read_text()))
    assert [word for word in sorted(named) if not any((place / word).exists() for place in places)] == []


@pytest.fixture
def newcomer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A folder with the README's own files, where each command is read by its real parser and does nothing more.

    Returns the commands that were reached.
    """
    reached: list[str] = []

    def install(module: str, **names: str) -> None:
        fake = ModuleType(module)
        for function, command in names.items():
            setattr(fake, function, lambda *_, command=command, **__: reached.append(command) or 0)
        monkeypatch.setitem(sys.modules, module, fake)

    install("lockstep.loop", train="train", evaluate="eval")
    install("lockstep.report", write_report="report")
    install("lockstep.bench.loop", main="bench")
    install("lockstep.doctor", main="doctor")
    install("lockstep.launch", launch="launch")
    install("lockstep.serve", serve="serve")
    install("lockstep.plan.command", run_plan="plan")
    install("lockstep.checkpoint.megatron.command", run_hf_to_torch_dist="convert", run_torch_dist_to_hf="convert")
    for name, content in named_files(README).items():
        (tmp_path / name).write_text(content)
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    monkeypatch.chdir(tmp_path)
    return reached


COMMANDS = [
    (name_of(page), line)
    for page in PAGES
    for line in code_lines(page.read_text())
    if line.removeprefix(".venv/bin/").startswith("lockstep ")
]


def test_the_readme_shows_every_command():
    shown = {line.split()[1] for page, line in COMMANDS if page == "README.md"} | {"bench"}
    assert shown == set(cli.COMMANDS)


@pytest.mark.parametrize(("page", "line"), COMMANDS)
def test_a_command_of_the_docs_is_read_by_the_real_parser(page: str, line: str, newcomer: list[str]):
    words = shlex.split(line)[1:]
    assert cli.main(words) == 0
    assert newcomer == ([] if "--dry-run" in words else words[:1])


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_named_in_passing_exist(page: Path, newcomer: list[str]):
    for words in map(str.split, inline_code(page.read_text())):
        if words[0] == "lockstep" and len(words) > 1:
            assert words[1] in cli.COMMANDS
            if words[1:] == ["bench", "loop"]:
                assert cli.main(words[1:]) == 0


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_scripts_and_modules_that_are_to_be_run_exist(page: Path):
    for line in [*code_lines(page.read_text()), *inline_code(page.read_text())]:
        if match := re.match(r"(?:\./)?(scripts/\w+)", line):
            assert (ROOT / match[1]).stat().st_mode & 0o111, line
        if match := re.match(r"(?:\.venv/bin/)?python -m ([\w.]+)", line):
            assert importlib.util.find_spec(match[1]), line
        if match := re.match(r"(?:\.venv/bin/)?python (\S+\.py)", line):
            assert (ROOT / match[1]).is_file(), line


@pytest.mark.parametrize("recipe", RECIPES, ids=name_of)
def test_a_recipe_loads_and_could_train(recipe: Path):
    check_training(parse_options("train", [str(recipe)]).config)


def test_the_readme_names_five_files_to_read():
    listed = re.findall(r"^\d\. \[([^\]]+)\]\(([^)]+)\)", README, re.MULTILINE)
    assert len(listed) == 5
    assert [name for name, link in listed if name != link or not (ROOT / link).is_file()] == []


def test_the_readmes_picture_has_five_boxes_with_folders_that_exist():
    (picture,) = [block for block in fenced(README) if block.startswith("flowchart")]
    boxes = re.findall(r'"([^<"]+)<br/>([^"]+)"', picture)
    assert len(boxes) == 5
    folders = [folder for _, named in boxes for folder in named.split(", ")]
    assert [folder for folder in folders if not (ROOT / "lockstep" / folder).is_dir()] == []


def test_the_readmes_reward_tells_right_from_wrong(newcomer: list[str]):
    reward = load_function("my_reward.py:reward")
    right, wrong = Sample(response="7+6=13 \\boxed{843}", label="843"), Sample(response="\\boxed{743}", label="843")
    assert asyncio.run(reward(None, right)) == 1.0
    assert asyncio.run(reward(None, wrong)) == 0.0


def test_the_readmes_result_is_that_of_its_curve():
    """If this fails: draw the curve again, and copy the last line of the same run."""
    before, after = re.search(r"held-out accuracy (\S+) -> (\S+), \d+ steps, \d+ s, report ", README).groups()
    curve = (ROOT / "docs" / "img" / "quickstart.svg").read_text()
    assert re.findall(r'class="(?:end )?heldout">([\d.]+)<', curve) == [before, after]
    assert float(after) - float(before) >= 0.3


def test_the_quickstarts_page_has_the_recipes_numbers():
    config = parse_options("train", [str(ROOT / "recipes" / "quickstart" / "grpo.toml")]).config
    prepare = ast.parse((ROOT / "recipes" / "quickstart" / "prepare.py").read_text())
    forget = next(
        ast.literal_eval(node.value)
        for node in prepare.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "FORGET"
    )
    assert f"forgets each carry with probability {forget}" in QUICKSTART
    assert f"{config.eval.n_samples_per_eval_prompt} samples each" in QUICKSTART
    assert f"in {config.rollout.num_rollout} steps" in QUICKSTART


FUNCTION = ast.FunctionDef | ast.AsyncFunctionDef


@cache
def definitions() -> set[str]:
    """Every function, class and named value of the package; methods also as `Class.method`."""
    found = set()
    for path in (ROOT / "lockstep").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                found |= {f"{node.name}.{member.name}" for member in node.body if isinstance(member, FUNCTION)}
            if isinstance(node, FUNCTION | ast.ClassDef):
                found.add(node.name)
            if isinstance(node, ast.Assign | ast.AnnAssign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                found |= {target.id for target in targets if isinstance(target, ast.Name)}
    return found


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "docs/architecture.md"])
def test_functions_and_classes_that_are_named_exist(page: str):
    names = [word for word in inline_code((ROOT / page).read_text()) if re.fullmatch(r"\w+\(\)|[A-Z]\w+(\.\w+)?", word)]
    assert [name for name in names if name.removesuffix("()") not in definitions()] == []


def test_the_architecture_page_lists_every_room_and_no_other():
    rooms = {
        path.name + ("/" if path.is_dir() else "")
        for path in (ROOT / "lockstep").iterdir()
        if path.name not in ("__init__.py", "__main__.py", "__pycache__", "py.typed")
    }
    table = ARCHITECTURE[ARCHITECTURE.index("## Rooms") : ARCHITECTURE.index("## The life of a step")]
    assert set(re.findall(r"^\| `([^`]+)` \|", table, re.MULTILINE)) == rooms


def test_the_curve_puts_every_number_where_the_weights_had_it(tmp_path: Path):
    """Step k samples before its update, after k steps, and is evaluated after it, after k + 1."""
    spec = importlib.util.spec_from_file_location("plot_curve", ROOT / "recipes" / "quickstart" / "plot_curve.py")
    plot_curve = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(plot_curve)
    rows = [
        {"step": -1, "eval/heldout": 0.25},
        {"step": 0, "rollout/raw_reward": 0.2},
        {"step": 1, "rollout/raw_reward": 0.6, "eval/heldout": 0.75},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    reward, heldout = plot_curve.curves(plot_curve.read_steps(tmp_path / "metrics.jsonl"))
    assert reward == [(0, 0.2), (1, 0.6)]
    assert heldout == [(0, 0.25), (2, 0.75)]
    drawn = plot_curve.draw(reward, heldout)
    left, middle, right = plot_curve.LEFT, (plot_curve.LEFT + plot_curve.RIGHT) / 2, plot_curve.RIGHT
    height = plot_curve.BOTTOM - plot_curve.TOP
    at = {share: plot_curve.BOTTOM - share * height for share in (0.2, 0.25, 0.6, 0.75)}
    assert f'<polyline points="{left:.1f},{at[0.2]:.1f} {middle:.1f},{at[0.6]:.1f}"/>' in drawn
    assert re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)"', drawn) == [
        (f"{left:.1f}", f"{at[0.25]:.1f}"),
        (f"{right:.1f}", f"{at[0.75]:.1f}"),
    ]
