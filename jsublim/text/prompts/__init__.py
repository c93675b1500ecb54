"""Prompt packs (every wording an experiment uses, as data) and the number task built from them."""

from jsublim.text.prompts.importer import dump_pack, import_pack
from jsublim.text.prompts.numbers import NumberPrompt, draw_number_prompts, number_prompts, parse_numbers, reject_reason
from jsublim.text.prompts.pack import NumberPrompts, Pack, load_pack, scan_questions, whose
from jsublim.text.prompts.problems import Problem, load_problems, load_prompts, parse_answer, problem_reject_reason

__all__ = [
    "NumberPrompt",
    "NumberPrompts",
    "Pack",
    "Problem",
    "draw_number_prompts",
    "dump_pack",
    "import_pack",
    "load_pack",
    "load_problems",
    "load_prompts",
    "number_prompts",
    "parse_answer",
    "parse_numbers",
    "problem_reject_reason",
    "reject_reason",
    "scan_questions",
    "whose",
]
