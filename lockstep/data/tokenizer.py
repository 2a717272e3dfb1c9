"""The tokenizer of an HF folder, loaded without touching the network."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol, cast

from lockstep.errors import DataError

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")


class Tokenizer(Protocol):
    """What the data room needs of a `transformers` tokenizer."""

    chat_template: str | dict[str, str] | None
    eos_token: str | None

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]: ...

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool = False) -> str: ...

    def apply_chat_template(self, conversation: list[dict[str, Any]], **kwargs: Any) -> Any: ...


def load_tokenizer(hf_checkpoint: str | Path) -> Tokenizer:
    """The tokenizer saved in a local folder. From here on `transformers` logs errors only.

    Raises:
        DataError: the folder or its tokenizer files are missing or unreadable.
    """
    folder = Path(hf_checkpoint)
    if not folder.is_dir():
        raise DataError(
            "--hf-checkpoint",
            str(hf_checkpoint),
            "there is no such folder, and nothing is downloaded during a run.",
            "Download the model first and give its local folder.",
        )
    if not any((folder / name).exists() for name in TOKENIZER_FILES):
        raise DataError(
            "--hf-checkpoint",
            str(hf_checkpoint),
            f"it holds no tokenizer (none of {', '.join(TOKENIZER_FILES)}).",
            "Copy the tokenizer's files from the model's original folder.",
        )
    import transformers  # takes seconds, and most users of this folder never load a tokenizer

    transformers.logging.set_verbosity_error()
    try:
        return cast(Tokenizer, transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True))
    except Exception as error:
        raise DataError(
            "--hf-checkpoint",
            str(hf_checkpoint),
            f"its tokenizer cannot be loaded ({type(error).__name__}: {str(error).split(chr(10), 1)[0]}).",
            "Copy the tokenizer's files again from the model's original folder.",
        ) from error
