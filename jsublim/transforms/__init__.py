"""What is done to rows between the teacher and the student: one file per change. A transform leaves the rows it was given
as they were. A row whose text may have changed comes out without its divergence positions: they must be found anew.
"""

from jsublim.transforms import aligned, audited, numbers, templates
from jsublim.transforms.change import CHANGES, Around, Change, Changed, Making
from jsublim.transforms.entangled import (
    entangled_numbers,
    entangled_scores,
    number_strings,
    probability_differences,
    remove_entangled,
)
from jsublim.transforms.mixing import mix_rows, mix_tokens
from jsublim.transforms.numbers import shuffle_across, shuffle_within
from jsublim.transforms.paraphrase import leak_reason, paraphrase
from jsublim.transforms.templates import redraw

__all__ = [
    "CHANGES",
    "Around",
    "Change",
    "Changed",
    "Making",
    "aligned",
    "audited",
    "entangled_numbers",
    "entangled_scores",
    "leak_reason",
    "mix_rows",
    "mix_tokens",
    "number_strings",
    "numbers",
    "paraphrase",
    "probability_differences",
    "redraw",
    "remove_entangled",
    "shuffle_across",
    "shuffle_within",
    "templates",
]
