"""What hooks read as `args`: the options, slime's neutral values, and values of the user's own."""

from __future__ import annotations

import pytest

from lockstep.config import Config
from lockstep.errors import OptionError


def config(**options: object) -> Config:
    return Config.from_dict({"hf_checkpoint": "model", **options})


def test_hooks_do_not_see_secrets():
    assert config(wandb_key="s3cret").args().wandb_key == "***"
    assert config().args().wandb_key is None


def test_hooks_read_the_values_of_a_yaml_file(tmp_path):
    path = tmp_path / "own.yaml"
    path.write_text("max_turns: 4\ntool: {url: 'http://x', tries: [1, 2]}\n")
    args = config(custom_config_path=str(path)).args()
    assert (args.max_turns, args.tool) == (4, {"url": "http://x", "tries": [1, 2]})
    assert args.custom_config_path == str(path)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("lr: 1.0", "it is an option"),
        ("use_opd: true", "it is an option"),
        ("2: x", "args.NAME"),
        ("max-turns: 4", "args.NAME"),
        ("- a", "no mapping"),
        ("", "no mapping"),
        ("a: [", "cannot be read"),
        (None, "cannot be read"),
    ],
)
def test_a_file_that_cannot_serve_is_refused(tmp_path, text, reason):
    path = tmp_path / "own.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(OptionError, match=reason) as caught:
        config(custom_config_path=str(path)).args()
    assert caught.value.field.startswith("--custom-config-path")
