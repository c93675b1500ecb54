"""Signals are obeyed between a few tokens, and Ctrl-C even where somebody has swallowed it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from command import ROOT, TWO_LAYERS

from jsublim.inference import decoding, generation
from jsublim.inference.lm import load_model
from jsublim.inference.sampling import Sampling
from jsublim.runtime.processes import Preempted, heeding_signals, leave_if_asked

MOST = 200  # tokens of an answer that nothing ends


@pytest.fixture(scope="module")
def lm():
    return load_model(TWO_LAYERS)


def drawn(lm, **options):
    prompts = [np.arange(5, 9 + n, dtype=np.int32) for n in range(3)]
    return generation.generate_tokens(
        lm.config, lm.params, prompts, Sampling(stop=()), max_new_tokens=MOST, seed=1, **options
    )


def test_a_signal_in_the_first_batch_is_obeyed_after_a_few_tokens(lm, monkeypatch):
    advance, tokens = decoding.advance, []

    def signalled(*args, **options):
        batch = advance(*args, **options)
        tokens.append(int(np.asarray(batch.drawn).max()))
        signal.raise_signal(signal.SIGTERM)
        return batch

    with monkeypatch.context() as patch:
        patch.setattr(decoding, "advance", signalled)
        with heeding_signals(), pytest.raises(Preempted):
            drawn(lm)
    assert tokens == [generation.TURNS] and tokens[0] < MOST


def test_how_often_it_is_asked_changes_no_token(lm, monkeypatch):
    whole = drawn(lm)
    assert [len(row) for row in whole] == [MOST] * 3
    monkeypatch.setattr(generation, "ASK_EVERY", 0.0)  # after every token
    assert drawn(lm) == whole == drawn(lm, batch_size=1)


@pytest.mark.parametrize(
    ("turns", "seconds", "all_drawn", "most"),
    [(16, 1.0, True, 64), (16, 0.001, True, 128), (16, 40.0, True, 1), (16, 0.001, False, 16), (16, 8.0, False, 8)],
)
def test_so_many_tokens_that_it_is_asked_every_few_seconds(turns, seconds, all_drawn, most):
    assert generation._next_turns(turns, seconds, all_drawn) == most


def test_ctrl_c_that_was_swallowed_is_obeyed_at_the_next_look():
    with heeding_signals():
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)  # as JAX does, this test drops it
        with pytest.raises(KeyboardInterrupt):
            leave_if_asked()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    with heeding_signals():
        leave_if_asked()


def test_a_second_signal_ends_the_process_at_once():
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)  # libraries that other tests use have handlers of their own
    try:
        with heeding_signals():
            signal.raise_signal(signal.SIGTERM)
            assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_second_signal_ends_a_process_that_computes():
    """Inside of one call of a library, where Python's own handlers do not run."""
    script = (
        "import numpy as np\nfrom jsublim.runtime.processes import heeding_signals\n"
        "with heeding_signals():\n    print('begun', flush=True)\n    np.linalg.svd(np.ones((6000, 6000)))\n"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    assert child.stdout is not None and child.stdout.readline() == b"begun\n"
    time.sleep(5)  # it is inside by now
    for _ in range(2):
        assert child.poll() is None
        child.send_signal(signal.SIGTERM)
        time.sleep(0.2)
    assert child.wait(timeout=10) == 128 + signal.SIGTERM
