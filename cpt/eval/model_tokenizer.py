"""The tokenizer with which benchmarks read texts: the one that lies in an exported folder, or would lie there.

Owns what is missing of it: which token stands before a text that has no context. Refuses a model that knows none.
"""

import tempfile
from pathlib import Path
from typing import Any

from cpt.model.export import write_tokenizer
from cpt.problems import ConfigError, Problem


def open_tokenizer(folder: Path) -> Any:
    """As a Hugging Face folder has it; a bare tokenizer.json says not which token ends a text, then the model's config
    does.

    Raises:
        ConfigError: nobody knows a token that can stand before a text.
    """
    from transformers import AutoConfig, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
        config = AutoConfig.from_pretrained(str(folder), local_files_only=True).get_text_config()
        known = next((number for number in (config.eos_token_id, config.bos_token_id) if isinstance(number, int)), None)
        if known is None or known >= len(tokenizer):
            fix = "add eos_token to its tokenizer_config.json"
            raise ConfigError(Problem("model.tokenizer", str(folder), "has no token for the end of a text", fix))
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(known)
    return tokenizer


def tokenizer_as_exported(tokenizer: Path, model_config: Any) -> Any:
    """What ``open_tokenizer`` gives of the folder that an export of a model of this config would be.

    Raises:
        ConfigError: ``tokenizer`` is none, or has no token that can stand before a text.
    """
    with tempfile.TemporaryDirectory() as name:
        model_config.save_pretrained(name)
        write_tokenizer(tokenizer, Path(name))
        return open_tokenizer(Path(name))
