"""Clients as their makers publish them, each run as a program of its own; the slow ones are
installed aside first.

    python tests/serve/test_clients.py http://127.0.0.1:8000     # the table in serve/README.md
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import harness
import pytest
from PIL import Image, ImageDraw

PROGRAMS = Path(__file__).with_name("clients")


@dataclass(frozen=True)
class ClientProgram:
    """A client and the program that uses it.

    Attributes:
        name: of the client, for people.
        program: a file of clients/, Python or JavaScript.
        packages: to install, from PyPI or npm; none for the client that is installed.
    """

    name: str
    program: str
    packages: tuple[str, ...] = ()


INSTALLED = ClientProgram("openai (Python), installed", "openai_python.py")
OTHERS = (
    # httpx<0.28 is what the early 1.x expect
    ClientProgram("openai (Python) 1.x", "openai_python.py", ("openai>=1,<2", "httpx<0.28")),
    ClientProgram("openai (Python) 2.x", "openai_python.py", ("openai>=2,<3",)),
    ClientProgram("openai (Python) 3.x", "openai_python.py", ("openai>=3,<4",)),
    ClientProgram(
        "LangChain (Python), `DallEAPIWrapper`", "langchain_python.py",
        ("langchain-community", "openai"),
    ),
    ClientProgram("LiteLLM", "litellm_python.py", ("litellm",)),
    ClientProgram("openai (Node)", "openai_node.mjs", ("openai",)),
    ClientProgram(
        "Vercel AI SDK, `@ai-sdk/openai-compatible`", "ai_sdk.mjs",
        ("ai", "@ai-sdk/openai-compatible"),
    ),
    ClientProgram(
        "LangChain (JavaScript), `DallEAPIWrapper`", "langchain_js.mjs",
        ("@langchain/openai", "@langchain/core"),
    ),
)  # fmt: skip


def run_client(client: ClientProgram, url: str, folder: Path) -> dict[str, str | None]:
    """What a client got of the service at `url`: its version, the sizes of an image that it asked
    for as 1024x1024 and of an edited 640x480 photograph, and what it shows of a refusal."""
    for file in PROGRAMS.iterdir():
        shutil.copy(file, folder)
    _write_inputs(folder)
    python = client.program.endswith(".py")
    runner, install = (
        ([sys.executable], [sys.executable, "-m", "pip", "install", "-q", "--target", "packages"])
        if python
        else (["node"], ["npm", "install", "--silent", "--no-fund", "--no-audit"])
    )
    if client.packages:
        _checked([*install, *client.packages], folder)
    inputs = [f"{url}/v1", "photo.jpg", "mask.png"]
    printed = _checked([*runner, client.program, *inputs], folder)
    found: dict[str, str | None] = json.loads(printed.splitlines()[-1])
    return found


def _write_inputs(folder: Path) -> None:
    photo = Image.new("RGB", (640, 480), (90, 160, 220))
    ImageDraw.Draw(photo).ellipse((160, 120, 320, 240), fill=(200, 30, 30))
    photo.save(folder / "photo.jpg")
    mask = Image.new("RGBA", photo.size, "black")
    mask.paste((0, 0, 0, 0), (0, 0, 320, 240))
    mask.save(folder / "mask.png")


def _checked(command: list[str], folder: Path) -> str:
    environment = os.environ | {"PYTHONPATH": str(folder / "packages"), "NO_PROXY": "127.0.0.1"}
    ran = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600
    )
    assert ran.returncode == 0, f"{' '.join(command)}:\n{ran.stderr[-2000:]}"
    return ran.stdout


@pytest.mark.parametrize(
    "client",
    [INSTALLED, *(pytest.param(other, marks=pytest.mark.slow) for other in OTHERS)],
    ids=lambda client: client.name,
)
def test_a_client_gets_what_it_asks_for_and_shows_our_refusals(
    client: ClientProgram, server: harness.Running, tmp_path: Path
) -> None:
    found = run_client(client, server.url, tmp_path)
    assert found["generated"] == "1024x1024"
    assert found["edited"] in ("64x48", None)
    assert "write WIDTHxHEIGHT with 16 to 2048 pixels each" in str(found["refusal"])


def _print_table(url: str) -> None:
    """What OTHERS got, as a table of Markdown."""
    print(
        "| client | version | image of 1024x1024 | photograph of 640x480 edited | refusal shown |"
    )
    print("|---|---|---|---|---|")
    for client in OTHERS:
        with tempfile.TemporaryDirectory() as folder:
            found = run_client(client, url, Path(folder))
        shown = "the whole body" if "'error'" in str(found["refusal"]) else "the message"
        cells = found["version"], found["generated"], found["edited"] or "does not edit", shown
        print(f"| {client.name} | {' | '.join(map(str, cells))} |")


if __name__ == "__main__":
    _print_table(sys.argv[1])
