"""The Dockerfile, where there is nothing to build it with: its steps in a clean environment.

They run as they stand, but for this: absolute paths lie under a temporary folder; what only root
could do (apt-get, useradd, install) is replaced by programs that write down how they were called;
torch comes from the usual index, not from PyTorch's own.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import venv
from pathlib import Path

import httpx
import pytest

from tests.support.servers import eventually, free_port

ROOT = Path(__file__).parent.parent
PRIVILEGED = ("apt-get", "useradd", "install")
TORCH_INDEX = "--index-url https://download.pytorch.org/whl/cpu"


def instructions() -> list[tuple[str, str]]:
    """Every instruction and its arguments, on one line each."""
    text = re.sub(r"^#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.M)
    lines = [line.strip() for line in text.replace("\\\n", " ").splitlines() if line.strip()]
    return [(name, " ".join(rest.split())) for name, _, rest in (x.partition(" ") for x in lines)]


def last(name: str) -> str:
    return [rest for instruction, rest in instructions() if instruction == name][-1]


def copy_context(target: Path) -> None:
    """What `COPY . .` would copy."""
    ignored = [line.rpartition("/")[2] for line in (ROOT / ".dockerignore").read_text().split()]
    shutil.copytree(ROOT, target, ignore=shutil.ignore_patterns(*ignored))


def test_the_image_serves_as_a_user_with_a_volume_and_a_health_check() -> None:
    names = [name for name, _ in instructions()]

    assert names.count("FROM") == 2
    assert last("USER") not in ("root", "0")
    assert names.index("USER") > max(at for at, name in enumerate(names) if name == "RUN")
    assert f"LOGITMILL_HOME={last('VOLUME')}" in last("ENV")
    assert last("EXPOSE") in last("HEALTHCHECK")
    assert json.loads(last("ENTRYPOINT")) + json.loads(last("CMD")) == ["logitmill", "serve"]


@pytest.mark.slow
def test_the_steps_make_a_server(tmp_path: Path, real_folder: Path) -> None:
    root, stubs, environment = tmp_path / "root", tmp_path / "stubs", tmp_path / "venv"
    venv.create(environment, with_pip=True)
    copy_context(root / "src")
    (root / "wheels").mkdir()
    stubs.mkdir()
    called = tmp_path / "called"
    for name in PRIVILEGED:
        (stubs / name).write_text(f'#!/bin/sh\necho {name} "$@" >> {called}\n')
        (stubs / name).chmod(0o755)
    variables = {name: value for name, value in os.environ.items() if "LOGITMILL" not in name}
    variables["PATH"] = f"{stubs}:{environment}/bin:{variables['PATH']}"
    variables |= dict([last("ARG").split("=")])

    for name, step in instructions():
        if name == "RUN":
            here = re.sub(r"(?<=\s)/(?=\w)", f"{root}/", step.replace(TORCH_INDEX, ""))
            subprocess.run(["sh", "-ec", here], cwd=root / "src", env=variables, check=True)

    assert re.search(r"^apt-get install .*g\+\+", called.read_text(), re.M)
    owner = re.search(r"--owner (\w+) ", called.read_text())
    assert owner is not None
    assert re.search(rf"^useradd .* {owner[1]}$", called.read_text(), re.M)
    (kernels,) = environment.glob("lib/python*/site-packages/engine/kernels")
    assert bool(list(kernels.glob("_cpu*"))) == bool(shutil.which("g++"))
    answers_like_the_image(environment, variables, real_folder)


def answers_like_the_image(environment: Path, variables: dict[str, str], model: Path) -> None:
    """The command of the image, with its model already there, another port and no delays."""
    port = str(free_port())
    image = dict(pair.split("=") for pair in last("ENV").split())
    options = {"MODEL": str(model), "PORT": port, "DRAIN_DELAY": "0"}
    variables |= image | {f"LOGITMILL_{name}": value for name, value in options.items()}
    program, *rest = json.loads(last("ENTRYPOINT")) + json.loads(last("CMD"))
    _, check = last("HEALTHCHECK").split("CMD ")
    _, *probe = json.loads(check.replace(last("EXPOSE"), port))

    def healthy() -> bool:
        assert server.poll() is None
        return subprocess.run([sys.executable, *probe], capture_output=True).returncode == 0

    assert subprocess.run([sys.executable, *probe], capture_output=True).returncode != 0
    server = subprocess.Popen(
        [environment / "bin" / program, *rest], env=variables, cwd=environment
    )
    try:
        eventually(healthy)
        response = httpx.post(
            f"http://127.0.0.1:{port}/v1/completions",
            json={"prompt": "The capital of France is", "max_tokens": 1, "temperature": 0},
            trust_env=False,
            timeout=60,
        )
        assert response.json()["choices"][0]["text"] == " Paris"
        server.send_signal(signal.SIGTERM)
        assert server.wait(60) == 0
    finally:
        server.kill()
        server.wait()
