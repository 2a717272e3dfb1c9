from __future__ import annotations

import pytest
from e2e_runs import SYSTEM, Workshop, load_prepare, write_model


@pytest.fixture(scope="session")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    root = tmp_path_factory.mktemp("workshop")
    prepare = load_prepare()
    for side, count in (("train", 64), ("heldout", 8)):
        rows = [
            row | {"prompt": [{"role": "system", "content": SYSTEM}, {"role": "user", "content": row["prompt"]}]}
            for row in prepare.make_prompt_rows(side, count, 0)
        ]
        prepare.write_rows(root / f"{side}.jsonl", rows)
    return Workshop(root, write_model(root / "model"), root / "train.jsonl", root / "heldout.jsonl")
