"""Real pretrained checkpoints against transformers: each where `scripts/fetch.py` has written it (or JSUBLIM_CHECKPOINTS names the folder
they are in). What they need is not downloaded by tests."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from jsublim.inference.lm import load_model
from jsublim.text.prompts import number_prompts

FOLDER = Path(os.environ.get("JSUBLIM_CHECKPOINTS", Path(__file__).parents[1] / "checkpoints"))

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=["smollm2-135m", "qwen2.5-coder-0.5b"])
def both(request):
    if not (FOLDER / request.param).is_dir():
        pytest.skip(f"{FOLDER / request.param} is absent: run scripts/fetch.py {request.param}")
    import torch
    from transformers import AutoModelForCausalLM

    folder = FOLDER / request.param
    return load_model(folder), AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def test_logits_equal_transformers(both):
    import torch

    lm, reference = both
    tokens = np.stack([lm.chat.prompt_tokens([{"role": "user", "content": text}])[:40] for text in number_prompts(2)])
    with torch.no_grad():
        expected = reference(torch.tensor(tokens, dtype=torch.long)).logits.numpy()
    assert np.abs(np.asarray(lm.logits(tokens)) - expected).max() < 1e-4 * np.abs(expected).max()


def test_greedy_tokens_equal_transformers(both, new_tokens=12, batch=25):
    import torch

    lm, reference = both
    prompts = number_prompts(100)
    ours = lm.generate(prompts, new_tokens, "greedy", batch_size=batch)
    theirs = []
    for start in range(0, len(prompts), batch):
        rows = [lm.chat.prompt_tokens([{"role": "user", "content": text}]) for text in prompts[start : start + batch]]
        width = max(map(len, rows))
        tokens = torch.tensor(np.stack([np.pad(row, (width - len(row), 0)) for row in rows]), dtype=torch.long)
        mask = torch.tensor(np.stack([np.arange(width) >= width - len(row) for row in rows]), dtype=torch.long)
        with torch.no_grad():
            out = reference.generate(tokens, attention_mask=mask, max_new_tokens=new_tokens, do_sample=False)
        theirs += [lm.chat.decode(row[width:]) for row in out]
    assert ours == theirs
