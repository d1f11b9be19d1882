"""The Serve config file as a cluster takes it: `serve run`, behind Serve's own proxy."""

from __future__ import annotations

import hashlib
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from openai import AuthenticationError, OpenAI
from served import free_port, ready
from test_launch import CONFIG_FILE

SERVE = Path(sys.executable).with_name("serve")
KEY = "tsr-for-this-test-alone"


def written(directory: Path, bundle: Path, home: Path, port: int) -> Path:
    """The shipped file with a model, a home, a port and a key that exist here."""
    config = yaml.safe_load(CONFIG_FILE.read_text())
    config["http_options"] = {"host": "127.0.0.1", "port": port}
    args = config["applications"][0]["args"]
    args |= {"model": str(bundle), "home": str(home)}
    args["service"]["keys"][0]["sha256"] = hashlib.sha256(KEY.encode()).hexdigest()
    args["serve"] |= {"num_cpus": 0.5, "max_replicas": 1}
    path = directory / "serve.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def test_the_config_file_serves(tiny_bundle: Path, pretrained_cache: Path, tmp_path: Path) -> None:
    (tmp_path / "pretrained").symlink_to(pretrained_cache)
    port, log = free_port(), tmp_path / "log"
    path = written(tmp_path, tiny_bundle, tmp_path, port)
    with log.open("w") as output:
        process = subprocess.Popen(
            [SERVE, "run", path], stdout=output, stderr=output, cwd=tmp_path, text=True
        )
    try:
        url = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + 120
        while not ready(url):
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.5)
        client = OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0, timeout=60)
        drawn = client.images.generate(prompt="一个红苹果", extra_body={"seed": 1})
        assert drawn.data is not None and len(drawn.data) == 1
        with pytest.raises(AuthenticationError):
            client.with_options(api_key="tsr-another").images.generate(prompt="a red apple")
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(60)
        finally:
            process.kill()
