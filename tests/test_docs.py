"""The documentation: generated pages, links, and examples that run as they stand."""

import json
import re
import runpy
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from engine.config import EngineConfig
from engine.load import load_engine
from engine.logits import STAGES
from engine.params import SamplingParams
from server import cli
from server.app import create_app
from server.config import ServerConfig
from server.schemas import ChatCompletionRequest, CompletionRequest, ExplainRequest
from server.settings import OPTIONS, Settings, variable
from tests.support.servers import live_server
from tests.support.wire import CHAT, COMPLETIONS

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]
README = (ROOT / "README.md").read_text()
SERVER = "http://127.0.0.1:8000"
SCHEMAS: dict[str, Any] = {
    COMPLETIONS: CompletionRequest,
    CHAT: ChatCompletionRequest,
    "/v1/explain": ExplainRequest,
}


def blocks(language: str) -> list[str]:
    """Every block of code in a language, on any page."""
    pattern = rf"^```{language}\n(.*?)^```$"
    return [block for page in PAGES for block in re.findall(pattern, page.read_text(), re.M | re.S)]


def asked(command: str) -> tuple[str, dict[str, Any]]:
    """The path and the body of a curl command, which uses nothing that this does not know."""
    name, url, *options = shlex.split(command.replace("\\\n", ""))
    assert (name, url.removeprefix(SERVER)) == ("curl", urlsplit(url).path)
    assert options[::2] == ["-H", "-d"]
    assert options[1] == "Content-Type: application/json"
    return urlsplit(url).path, json.loads(options[3])


CURLS = [asked(block) for block in blocks("bash") if block.startswith("curl")]
PROGRAMS = [block for block in blocks("python") if SERVER in block]
COMMANDS = [
    line for block in blocks("bash") for line in block.splitlines() if line.startswith("logitmill ")
]


def ids(cases: list[tuple[str, dict[str, Any]]]) -> list[str]:
    return [f"{path} {' '.join(body)}" for path, body in cases]


# -- what can be read


def test_the_generated_pages_are_up_to_date(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["generate.py", "--check"])

    status = runpy.run_path(str(ROOT / "docs/generate.py"))["main"]()

    assert (status, capsys.readouterr().out) == (0, "")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)\s]+)\)", page.read_text())
    for target in targets:
        if urlsplit(target).scheme:
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file.read_text()), target


def anchors(text: str) -> set[str]:
    """What GitHub makes of headings."""
    headings = re.findall(r"^#+ (.*)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in headings}


def test_every_method_is_described() -> None:
    text = (ROOT / "docs/methods.md").read_text()
    fields = {field for stage in STAGES for field in stage.fields}
    methods = {field for field in fields if field in SamplingParams.model_fields}
    assert {field for field in methods if f"`{field}" not in text} == set()


def test_the_readme_begins_with_two_commands() -> None:
    first, second, *_ = re.findall(r"^```bash\n(.*?)^```$", README, re.M | re.S)

    assert first == "pip install . && logitmill serve\n"
    assert second == 'pip install ".[test]" && pytest\n'


# -- what can be run


@pytest.mark.parametrize(("path", "body"), CURLS, ids=ids(CURLS))
def test_examples_hold_only_what_requests_may_hold(path: str, body: dict[str, Any]) -> None:
    assert not SCHEMAS[path].model_validate(body).model_extra


@pytest.mark.parametrize("command", COMMANDS)
def test_the_command_line_takes_the_examples(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for model in OPTIONS.values():
        for name in model.model_fields:
            monkeypatch.delenv(variable(name), raising=False)
    served: list[Settings] = []
    monkeypatch.setattr("server.run.serve", lambda given: served.append(given) or 0)

    with pytest.raises(SystemExit) as caught:
        cli.main(shlex.split(command, comments=True)[1:])

    assert caught.value.code == 0
    assert served or "--help" in command
    assert capsys.readouterr().err == ""


@pytest.fixture(scope="module")
def real_url(real_folder: Path) -> Iterator[str]:
    """Where the default model is served by its own name, and is its own amateur."""
    name = EngineConfig().model
    app = create_app(
        lambda: load_engine(EngineConfig(), real_folder, (name, real_folder)),
        ServerConfig(),
        [name],
    )
    with live_server(app) as url:
        yield url


@pytest.mark.slow
@pytest.mark.parametrize(("path", "body"), CURLS, ids=ids(CURLS))
def test_requests_are_answered(real_url: str, path: str, body: dict[str, Any]) -> None:
    response = httpx.post(f"{real_url}{path}", json=body, trust_env=False, timeout=120)

    assert response.status_code == 200, response.text
    assert "x-ignored-fields" not in response.headers
    answer = response.json()
    assert answer["usage"]["prompt_tokens"] > 0
    assert all(choice["text"] for choice in answer.get("choices", []))


@pytest.mark.slow
@pytest.mark.parametrize("program", PROGRAMS, ids=range(len(PROGRAMS)))
def test_programs_run(
    real_url: str, program: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")

    exec(compile(program.replace(SERVER, real_url), "example", "exec"), {})

    assert capsys.readouterr().out.strip()


def test_there_are_examples() -> None:
    assert len(CURLS) > 20
    assert PROGRAMS
    assert COMMANDS
