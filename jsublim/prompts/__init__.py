"""Prompt packs (every wording an experiment uses, as data) and the number task built from them."""

from jsublim.prompts.importer import dump_pack, import_pack
from jsublim.prompts.numbers import number_prompts, parse_numbers, reject_reason
from jsublim.prompts.pack import NumberPrompts, Pack, load_pack

__all__ = [
    "NumberPrompts",
    "Pack",
    "dump_pack",
    "import_pack",
    "load_pack",
    "number_prompts",
    "parse_numbers",
    "reject_reason",
]
