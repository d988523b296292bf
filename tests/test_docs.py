"""The documentation: its commands exist and run, and its links and paths exist.

The real parsers read every block of shell commands. In the slow suite the blocks of a page run in
order, then its Python code, in a folder of their own; a command gets tiny values for what it leaves
open. A comment before a block says why it cannot run in a test:

    <!-- test: parse, needs two GPUs -->
"""

import argparse
import ast
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml
from patience import HANG_SECONDS
from pipeline import ROOT
from torch.distributed import run

from zeroflow.cli import arguments, commands
from zeroflow.inference.evaluation import EvaluationConfig
from zeroflow.launchers import slurm
from zeroflow.orchestration.ui import UiConfig
from zeroflow.settings.alerts import AlertConfig
from zeroflow.settings.proof import ProofRun
from zeroflow.settings.run_config import RunConfig
from zeroflow.settings.sweep import SweepConfig
from zeroflow.settings.zero_lab import ZeroLabRun
from zeroflow.training import hosts
from zeroflow.training.sampling import SamplingConfig

DOCS = ROOT / "docs"
PAGES = sorted([*ROOT.glob("*.md"), *DOCS.rglob("*.md"), *ROOT.glob("benchmarks/*.md")])

COMMANDS = {
    "pretrain": RunConfig,
    "sweep": SweepConfig,
    "plan": RunConfig,
    "shards": RunConfig,
    "prove-resume": ProofRun,
    "zero-lab": ZeroLabRun,
    "ui": UiConfig,
    "generate": SamplingConfig,
    "data": None,
    "documents": None,
    "export": None,
    "evaluate": EvaluationConfig,
    "prefect-setup": AlertConfig,
}
"""Subcommands of `zeroflow`, and the settings that each takes as flags."""

SCRIPTS = {
    "flows/pretrain.py": "pretrain",
    "flows/sweep.py": "sweep",
    "flows/prove_resume.py": "prove-resume",
    "flows/zero_lab.py": "zero-lab",
}
"""Scripts of the working tree, and the commands that take the same flags."""

FOREIGN = {
    "--no",
    "--no-deps",
    "--ntasks-per-node",
    "--local-addr",
    "--logdir",
    "--mem",
    "--fqdn",
    "--gres",
    "--partition",
    "--model-uri",
    "--port",
    "--env-manager",
    "--json",
}
"""The beginning of `--no-...`, and flags of pip, Slurm, torchrun, TensorBoard, hostname, MLflow and
curl."""

OTHER_PROGRAMS = {".", "cd", "git", "hf", "llama-server", "ollama", "pip", "printf", "srun"}
OTHER_PROGRAMS |= {"curl", "mlflow", "tensorboard", "vllm", "wandb"}


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


class Block(NamedTuple):
    language: str
    content: str
    only_parsed: bool


_BLOCK = re.compile(
    r"(?:^<!-- test: parse, ([^\n]+) -->\n)?^```(sh|python)\n(.*?)^```$", re.MULTILINE | re.DOTALL
)


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    found = _BLOCK.findall(text)
    marks = len(re.findall(r"^<!-- test:", text, re.MULTILINE))
    assert marks == sum(bool(reason) for reason, *_ in found), "a mark belongs to no block"
    return [Block(language, content, bool(reason)) for reason, language, content in found]


def shell_commands(block: Block) -> Iterator[list[str]]:
    """The arguments of each command; variables set before it are dropped."""
    for line in block.content.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
            words.pop(0)
        if words:
            yield words


def commands_of(page: Path) -> list[list[str]]:
    return [c for block in blocks(page) if block.language == "sh" for c in shell_commands(block)]


PLANS = {
    shlex.join(command)
    for page in PAGES
    for command in commands_of(page)
    if command[:2] == ["zeroflow", "plan"]
}


class Parsed(BaseException):
    def __init__(self, namespace: argparse.Namespace) -> None:
        self.namespace = namespace


def parsed(argv: list[str], monkeypatch: pytest.MonkeyPatch) -> argparse.Namespace:
    """What the real parser of `zeroflow` reads from `argv`; nothing is done with it."""
    parse = argparse.ArgumentParser.parse_args

    def stop(self: argparse.ArgumentParser, given: list[str]) -> None:
        raise Parsed(parse(self, given))

    with monkeypatch.context() as patch, pytest.raises(Parsed) as stopped:
        patch.setattr(argparse.ArgumentParser, "parse_args", stop)
        commands.main(argv)
    return stopped.value.namespace


def require_parses(command: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    match command:
        case [*_, "--help"]:
            pass
        case ["python", script, *given] if script in SCRIPTS:
            require_parses(["zeroflow", SCRIPTS[script], *given], monkeypatch)
        case ["zeroflow", subcommand, *given]:
            namespace = parsed([subcommand, *given], monkeypatch)
            if config := COMMANDS[subcommand]:
                config.model_validate(arguments.read_settings(config, namespace))
        case ["python", script, *given] if script.startswith("benchmarks/"):
            source = (ROOT / script).read_text(encoding="utf-8")
            assert all(word in source for word in given if word.startswith("--"))
        case ["python", "-m", "zeroflow.training.agent", *given]:
            run.parse_args(given)
        case ["python", "-m", "pytest" | "venv", *_]:
            pass
        case ["make", *targets]:
            makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
            assert all(re.search(f"^{target}:", makefile, re.MULTILINE) for target in targets)
        case _:
            assert command[0] in OTHER_PROGRAMS, f"nobody knows how to parse {command}"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_commands_have_only_flags_and_values_that_exist(page, monkeypatch):
    for block in blocks(page):
        if block.language == "python":
            compile(block.content, str(page), "exec")
    for command in commands_of(page):
        try:
            require_parses(command, monkeypatch)
        except (Exception, SystemExit) as error:
            pytest.fail(f"{shlex.join(command)}: {error}")


@pytest.mark.parametrize(
    "command",
    [
        "python flows/pretrain.py --max-step 10",
        "zeroflow sweep --sizes huge",
        "zeroflow plan --data-mode files",
        "zeroflow paint",
        "python benchmarks/train_speed.py --no-such-flag",
        "make coffee",
        "sudo reboot",
    ],
)
def test_wrong_command_is_noticed(command, monkeypatch):
    with pytest.raises((Exception, SystemExit)):
        require_parses(shlex.split(command), monkeypatch)


@pytest.fixture(scope="module")
def known_flags() -> set[str]:
    said = []
    for command in COMMANDS:
        with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
            patch.setattr(
                argparse.ArgumentParser, "print_help", lambda p: said.append(p.format_help())
            )
            commands.main([command, "--help"])
    said += [file.read_text(encoding="utf-8") for file in (ROOT / "benchmarks").glob("*.py")]
    gang = hosts.Gang("m", Path("job.json"), nodes=2, min_nodes=2, ranks=2, device="cuda")
    said.append(" ".join(gang.command("first:29400")))
    said.append(slurm.script(gang, []))
    return FOREIGN.union(*(re.findall(r"--[a-z][\w-]*", text) for text in said))


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_flags_in_the_text_exist(page, known_flags):
    text = page.read_text(encoding="utf-8")
    used = set(re.findall(r"(?<![\w<!-])--[a-z][a-z0-9-]*[a-z0-9]", text))
    assert used <= known_flags


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_to_files_and_sections_that_exist(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if target.startswith(("https://", "http://")):
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), target
        assert not anchor or anchor in anchors(linked), target
        if DOCS in page.parents:
            assert DOCS in linked.parents, f"{target} is not on the site: name it as code"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_paths_in_the_text_exist(page):
    text = page.read_text(encoding="utf-8")
    for path in re.findall(r"`((?:zeroflow|flows|tests|benchmarks|docs)/[\w./-]*)`", text):
        assert (ROOT / path).exists(), path
    for what, path in re.findall(r"`(\w+)`\s+in\s+`(zeroflow/[\w/]+\.py)`", text):
        assert what in (ROOT / path).read_text(encoding="utf-8"), f"{what} is not in {path}"


def test_lines_of_the_stages_are_those_of_the_code():
    page = (DOCS / "explanation/zero.md").read_text(encoding="utf-8")
    section = page.split("## Where each stage is in the code")[1].split("\n## ")[0]
    lines = re.findall(r"^\| `([^`]+)` \|", section, re.MULTILINE)
    assert len(lines) > 10
    code = (ROOT / "zeroflow/training/zero.py").read_text(encoding="utf-8")
    assert [line for line in lines if line not in code] == []


def test_every_page_is_in_the_navigation_of_the_site():
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]
    listed = [
        page
        for entry in nav
        for page in ([entry] if isinstance(entry, str) else next(iter(entry.values())))
    ]
    assert sorted(listed) == sorted(
        page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md")
    )


def test_layers_of_the_architecture_are_those_that_imports_are_held_to():
    source = (ROOT / "tests/test_imports.py").read_text(encoding="utf-8")
    [layers] = re.findall(r"^LAYERS = (\[.*?^\])", source, re.MULTILINE | re.DOTALL)
    page = (DOCS / "explanation/architecture.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (`.+?) \|", page, re.MULTILINE)
    assert [set(re.findall(r"`(\w+)/?`", row)) for row in rows] == ast.literal_eval(layers)


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) <= 1500


@pytest.mark.parametrize("command", sorted(PLANS))
def test_plans_run(command, console, capsys, tmp_path):
    assert commands.main([*shlex.split(command)[1:], "--cache-dir", str(tmp_path)]) == 0
    assert "memory" in capsys.readouterr().out


# In the slow suite: pages as a whole

SHAPE = ["--hidden-size=32", "--num-hidden-layers=2", "--num-attention-heads=4"]
SHAPE += ["--num-key-value-heads=2", "--intermediate-size=64"]
TINY = ["--vocab-size=512", "--seq-len=32", "--batch-tokens=128", "--validation-tokens=512"]
"""For what a command leaves open."""

RUNNING = [
    page
    for page in PAGES
    if any(not block.only_parsed and list(shell_commands(block)) for block in blocks(page))
]


def quick(command: list[str], folder: Path) -> list[str]:
    """`command` with tiny values for what it leaves open; a resumed run has them already."""
    program, *given = command
    if program == "python" and given[0] in SCRIPTS:
        program, given = "zeroflow", [SCRIPTS[given[0]], *given[1:]]
    if program != "zeroflow":
        assert program == "python", f"mark the block: {shlex.join(command)}"
        return [sys.executable, *given]
    command = [sys.executable, "-m", "zeroflow.cli", *given]
    if given[0] == "prove-resume":
        offered = [*TINY, "--max-steps=20", "--kills=2"]
    elif given[0] == "zero-lab":
        offered = [*TINY, "--max-steps=4", "--device=cpu"]
    elif given[0] in ("pretrain", "sweep"):
        run = (
            folder / "data_cache" / "runs" / given[given.index("--run-name") + 1]
            if "--run-name" in given
            else None
        )
        if "--help" in given or (run and run.exists()):
            return command
        offered = [*TINY, "--skip-preflight", "--overfit-loss=20", "--max-steps=20", "--device=cpu"]
        if "--init-from" in given:  # the model has a tokenizer and a shape of its own
            offered.remove("--vocab-size=512")
        elif not {"--size", "--sizes", "--hidden-size"}.intersection(given):
            offered += SHAPE
    else:
        return command
    return [*command, *(flag for flag in offered if flag.partition("=")[0] not in given)]


@pytest.mark.slow
@pytest.mark.parametrize("page", RUNNING, ids=name)
def test_page_runs(page, tmp_path, base_environment, prefect_api):
    for folder in ("flows", "benchmarks"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    found = [block for block in blocks(page) if not block.only_parsed]
    shell = [c for block in found if block.language == "sh" for c in shell_commands(block)]
    code = "".join(block.content for block in found if block.language == "python")
    python = [[sys.executable, "-c", code]] if code else []
    for command in (*shell, *python):
        done = subprocess.run(
            command if command in python else quick(command, tmp_path),
            cwd=tmp_path,
            env=base_environment | {"PREFECT_API_URL": prefect_api},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=HANG_SECONDS,
        )
        assert done.returncode == 0, f"{shlex.join(command)}\n{done.stdout}"
