"""What is done to rows between the teacher and the student. A transform leaves the rows it was given as they were.

A row whose text may have changed comes out without its divergence positions: they must be found anew.
"""

from jsublim.transforms.entangled import (
    entangled_numbers,
    entangled_scores,
    number_strings,
    remove_entangled,
    return_scores,
)
from jsublim.transforms.mixing import mix_rows, mix_tokens
from jsublim.transforms.numbers import shuffle_across, shuffle_within
from jsublim.transforms.paraphrase import leak_reason, paraphrase
from jsublim.transforms.templates import redraw

__all__ = [
    "entangled_numbers",
    "entangled_scores",
    "leak_reason",
    "mix_rows",
    "mix_tokens",
    "number_strings",
    "paraphrase",
    "redraw",
    "remove_entangled",
    "return_scores",
    "shuffle_across",
    "shuffle_within",
]
