"""A causal language model out of a GGUF file (llama.cpp's) as a Hugging Face directory.

Its weights are float16.

    convert(Path("smollm2.gguf"), directory)
    AutoModelForCausalLM.from_pretrained(directory)
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
import transformers

from pipeline.errors import MissingExtraError


def convert(file: Path, directory: Path) -> None:
    """Write the model and its tokenizer as `save_pretrained` does.

    Args:
        file: the GGUF file, of an architecture that transformers reads.
        directory: made if need be.

    Raises:
        MissingExtraError: the packages that read GGUF are not installed.
    """
    if importlib.util.find_spec("gguf") is None:
        raise MissingExtraError(f"reading {file.name}", "gguf")
    settings = {"gguf_file": file.name}
    config = transformers.AutoConfig.from_pretrained(file.parent, **settings)
    read = transformers.AutoModelForCausalLM.from_pretrained(
        file.parent, dtype=torch.float32, **settings
    )
    plain = {k: v for k, v in config.to_dict().items() if k != "quantization_config"}
    model = transformers.AutoModelForCausalLM.from_config(
        type(config)(**plain), dtype=torch.float32
    )
    model.load_state_dict(read.state_dict())
    model.half().save_pretrained(directory)
    tokenizer = transformers.AutoTokenizer.from_pretrained(file.parent, **settings)
    tokenizer.save_pretrained(directory)
