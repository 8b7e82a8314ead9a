"""The files of a Hugging Face model, and the words of the command line; nothing of torch."""

from __future__ import annotations

from typing import Literal

FormatName = Literal["mixtral", "olmoe", "qwen3_moe", "llama", "mistral", "qwen3"]
DtypeName = Literal["fp32", "bf16"]

CONFIG = "config.json"
GENERATION = "generation_config.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
TEMPLATE_FILE = "chat_template.jinja"
SOURCE = "huggingface.json"
"""The config.json that a model was imported with, in the folder of a run."""
KEPT = (GENERATION, TOKENIZER_CONFIG, TEMPLATE_FILE, SOURCE)
"""Files of an imported model that say nothing of what is computed: they stand in the folders of
runs that go on from it, and in their exports."""
CARRIED = ("bos_token_id", "eos_token_id", "pad_token_id")
"""Of such a config.json, what an export has as it was."""
