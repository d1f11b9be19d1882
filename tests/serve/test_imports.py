"""The ingress is a light process: it imports neither PyTorch nor the models."""

from __future__ import annotations

import subprocess
import sys


def test_the_ingress_does_without_pytorch() -> None:
    code = "import sys, serve.api; print({'torch', 'transformers'} & set(sys.modules))"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "set()"
