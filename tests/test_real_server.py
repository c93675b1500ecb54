"""A real `transformers serve`: the judge and the served sampler say what the same checkpoint says here."""

from __future__ import annotations

import re
import subprocess
import sys
import threading

import numpy as np
import pytest

from jsublim.errors import JsublimError
from jsublim.inference.lm import BUNDLED, load_model
from jsublim.inference.sampling import Sampling
from jsublim.inference.served import SampleServer, SampleServerSettings
from jsublim.judge import server as judges
from jsublim.judge.local import LocalJudge

FOLDER = BUNDLED / "tiny-qwen2"
PROMPTS = ["Which animal do you like? One word.", "Go on: 4, 8, 12", "Name a tree."]
# The server takes the penalty of generation_config.json for a chat, whatever the request says.
GREEDY = Sampling(temperature=0.0, repetition_penalty=1.05)


@pytest.fixture(scope="module")
def address():
    """A server of this module's own on a free port."""
    command = [sys.executable, "-c", "import sys; from transformers.cli.transformers import main; sys.exit(main())"]
    options = ["serve", str(FOLDER), "--host", "127.0.0.1", "--port", "0", "--device", "cpu"]
    server = subprocess.Popen([*command, *options], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    alarm = threading.Timer(120, server.kill)
    alarm.start()
    said = []
    try:
        for line in server.stdout:
            said.append(line)
            if found := re.search(r"running on (http://\S+)", line):
                threading.Thread(target=server.stdout.read, daemon=True).start()  # a full pipe would stop it
                yield f"{found[1]}/v1"
                break
        else:
            pytest.fail(f"transformers serve did not start:\n{''.join(said)}")
    finally:
        alarm.cancel()
        server.kill()
        server.wait()


@pytest.fixture(scope="module")
def here():
    lm = load_model(FOLDER)
    return lm, LocalJudge(lm, GREEDY, max_new_tokens=12).ask(PROMPTS)


def test_the_judge(address, here, tmp_path):
    lm, said = here
    numbers = {"base_url": address, "model": str(FOLDER), "max_tokens": 12}
    prices = {"prompt_price": 1.0, "completion_price": 2.0}
    judge = judges.ServerJudge(judges.ServerSettings(**numbers, **prices), tmp_path)
    asked = [*PROMPTS, PROMPTS[1]]
    replies = judge.ask(asked)
    assert replies == [*said, said[1]] and len(set(replies)) == 3
    read = sum(len(lm.chat.prompt_tokens([{"role": "user", "content": prompt}])) for prompt in PROMPTS)
    spent = judge.spending
    assert spent.prompt_tokens == read and 0 < spent.completion_tokens <= 36
    assert spent.cost == pytest.approx((read + 2 * spent.completion_tokens) / 1e6)
    with pytest.raises(JsublimError, match=r"judge .* HTTP 4\d\d: "):  # the server holds one model, and says so
        judges.ServerJudge(judges.ServerSettings(**numbers | {"model": "another"}), tmp_path).ask(asked)
    gone = {"base_url": "http://127.0.0.1:9/v1"}
    unasked = judges.ServerJudge(judges.ServerSettings(**numbers | gone, **prices, budget=0), tmp_path)
    assert unasked.ask(asked) == replies and unasked.spending.cost == 0


def test_the_sampler(address, here):
    """It takes text, and does not say what it is."""
    lm, said = here
    prompts = [lm.chat.prompt_tokens([{"role": "user", "content": prompt}]) for prompt in PROMPTS]
    how = Sampling(temperature=0.0, repetition_penalty=1.05, stop=lm.chat.stop_tokens)
    place = {"base_url": address, "engine": "transformers 5", "concurrency": 2}
    server = SampleServer(SampleServerSettings(**place), "tiny-qwen2", lm.chat)
    server.check()
    assert server.answers([None], prompts, how, 12, 0) == [said]
    warm = Sampling(temperature=1.5, top_k=7, stop=lm.chat.stop_tokens)
    [drawn] = server.answers([None], prompts[:1], warm, 12, 0, samples=4)
    assert len(set(drawn)) > 1
    with pytest.raises(JsublimError, match="does not say what it runs"):
        SampleServer(SampleServerSettings(base_url=address), "tiny-qwen2", lm.chat).check()
    with pytest.raises(JsublimError, match="it loads no adapters while it runs"):
        SampleServer(SampleServerSettings(**place, adapters="load"), "tiny-qwen2", lm.chat).check()
    with pytest.raises(JsublimError, match="no text has the tokens"):
        letters = lm.tokenizer.convert_tokens_to_ids(list("owl"))  # of a text they would be one token
        server.answers([None], [np.asarray(letters)], how, 12, 0)
