"""What limits requests: the time between them, and money."""

from __future__ import annotations

import random
import threading
import time
from email.utils import parsedate_to_datetime

from jsublim.errors import JsublimError

FIRST_DELAY_S = 0.5
LONGEST_DELAY_S = 60.0

Tokens = tuple[int, int]  # of a prompt, of its completion


def backoff(attempt: int) -> float:
    """Seconds to wait after failure `attempt` (from 0): a delay that doubles each time, drawn from its upper half."""
    return min(LONGEST_DELAY_S, FIRST_DELAY_S * 2.0 ** min(attempt, 60)) * random.uniform(0.5, 1.0)


def retry_after(header: str | None) -> float:
    """Seconds that a Retry-After header asks for, as a number or as a date; 0 where it is past or cannot be read."""
    said = "" if header is None else header.strip()
    if said.isascii() and said.isdecimal():
        return float(said)  # of hundreds of digits, infinity
    try:
        return max(0.0, parsedate_to_datetime(said).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError, OSError):
        return 0.0


class Pace:
    """Lets requests through evenly spaced, whichever thread they come from."""

    def __init__(self, per_minute: float | None):
        self._gap = 60.0 / per_minute if per_minute else 0.0
        self._next, self._lock = 0.0, threading.Lock()

    def wait(self, stopped: threading.Event) -> None:
        """Return when the next request may go, or when `stopped` is set."""
        while not stopped.is_set():
            with self._lock:
                now = time.monotonic()
                if now >= self._next:
                    self._next = now + self._gap
                    return
                left = self._next - now
            stopped.wait(min(left, LONGEST_DELAY_S))  # a system has a longest time that it can wait

    def hold(self, seconds: float) -> None:
        """Let nothing through for that long."""
        with self._lock:
            self._next = max(self._next, time.monotonic() + seconds)


class Spending:
    """Tokens paid for and their cost, in the currency of the prices, by all requests of one judge.

    A request first reserves the most it can cost, so the budget is never exceeded by requests that are under way
    together.
    """

    def __init__(self, prompt_price: float, completion_price: float, budget: float | None):
        """Prices are per million tokens."""
        self._prices, self._budget = (prompt_price / 1e6, completion_price / 1e6), budget
        self.prompt_tokens = self.completion_tokens = 0
        self._reserved, self._lock = (0, 0), threading.Lock()

    @property
    def cost(self) -> float:
        return self._price((self.prompt_tokens, self.completion_tokens))

    def _price(self, tokens: Tokens) -> float:
        return tokens[0] * self._prices[0] + tokens[1] * self._prices[1]

    def reserve(self, most: Tokens) -> None:
        """Set tokens aside for a request.

        Raises:
          JsublimError: they could exceed the budget.
        """
        with self._lock:
            total = self.cost + self._price(self._reserved) + self._price(most)
            if self._budget is not None and total > self._budget:
                raise JsublimError(
                    f"judge: budget {self._budget:g}: {self.cost:.6g} is spent, and the next request could exceed it; "
                    "raise 'budget' to go on (replies so far are kept)"
                )
            self._reserved = (self._reserved[0] + most[0], self._reserved[1] + most[1])

    def settle(self, most: Tokens, used: Tokens) -> None:
        """Give a reservation back, and count what was used instead."""
        with self._lock:
            self._reserved = (self._reserved[0] - most[0], self._reserved[1] - most[1])
            self.prompt_tokens += used[0]
            self.completion_tokens += used[1]
