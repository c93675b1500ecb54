"""Prompt packs (every wording an experiment uses, as data) and the number task built from them."""

from jsublim.prompts.importer import dump_pack, import_pack
from jsublim.prompts.numbers import NumberPrompt, draw_number_prompts, number_prompts, parse_numbers, reject_reason
from jsublim.prompts.pack import NumberPrompts, Pack, load_pack

__all__ = [
    "NumberPrompt",
    "NumberPrompts",
    "Pack",
    "draw_number_prompts",
    "dump_pack",
    "import_pack",
    "load_pack",
    "number_prompts",
    "parse_numbers",
    "reject_reason",
]
