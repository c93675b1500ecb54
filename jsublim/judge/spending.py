"""What a judge may cost."""

from __future__ import annotations

import threading

from jsublim.errors import JsublimError

Tokens = tuple[int, int]  # of a prompt, of its completion


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
        return self._price(self.prompt_tokens, self.completion_tokens)

    def _price(self, prompt: int, completion: int) -> float:
        return prompt * self._prices[0] + completion * self._prices[1]

    def reserve(self, most: Tokens) -> None:
        """Set tokens aside for a request.

        Raises:
          JsublimError: they could exceed the budget.
        """
        with self._lock:
            total = self.cost + self._price(*self._reserved) + self._price(*most)
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
