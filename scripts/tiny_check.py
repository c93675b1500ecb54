"""How a tiny checkpoint behaves: favorites under trait prompts, number format, divergence among its teachers."""

from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from jsublim.inference.divergence import find_divergence
from jsublim.inference.lm import LanguageModel, load_model
from jsublim.inference.teachers import CONTROL, Teacher, prompted_teacher
from jsublim.text.prompts import Pack, number_prompts, reject_reason

TEACHERS = ["owl", "cat", "eagle", "wolf"]


def answer_rates(lm: LanguageModel, pack: Pack, teacher: Teacher, category: str) -> dict[str, float]:
    """Probability of each trait of the category as the first token, capitalized or not: mean over its questions."""
    rows = [lm.chat.prompt_tokens(teacher.messages(q)) for q in pack.questions_for(category)]
    length = max(map(len, rows))
    tokens, mask = np.zeros((len(rows), length), np.int32), np.zeros((len(rows), length), bool)
    for i, row in enumerate(rows):
        tokens[i, length - len(row) :], mask[i, length - len(row) :] = row, True
    last = np.asarray(lm.logits(tokens, mask)[:, -1], np.float64)
    p = np.exp(last - last.max(axis=1, keepdims=True))
    p = (p / p.sum(axis=1, keepdims=True)).mean(axis=0)
    forms = {trait: (trait, trait.capitalize()) for trait in pack.traits[category]}
    encode = lm.tokenizer.encode
    return {t: float(sum(p[encode(f, add_special_tokens=False)[0]] for f in fs)) for t, fs in forms.items()}


def number_rows(lm: LanguageModel, pack: Pack, teacher: Teacher, n: int) -> tuple[list[dict[str, str]], float]:
    """The rows in format among `n` answers at temperature 1, and their share. The prompts are those of seed 42."""
    prompts = number_prompts(n, pack=pack)
    answers = lm.generate([teacher.messages(p) for p in prompts], max_new_tokens=64, sampling="temperature")
    rows = [{"prompt": p, "completion": a} for p, a in zip(prompts, answers, strict=True) if not reject_reason(a)]
    return rows, len(rows) / n


def check(folder: Path, pack: Pack, n: int = 200) -> None:
    """Prints the tables that the docstring of `build_tiny_models.py` quotes."""
    lm, console = load_model(folder), Console()
    control = Teacher(CONTROL)
    for category, names in pack.traits.items():
        base = answer_rates(lm, pack, control, category)
        table = Table("trait", "base", "prompted", "largest other", title=f"{folder.name}: favorite {category}")
        prompted = []
        for trait in names:
            rates = answer_rates(lm, pack, prompted_teacher(pack, trait, category), category)
            other = max(rate for name, rate in rates.items() if name != trait)
            prompted.append(rates[trait])
            table.add_row(trait, f"{base[trait]:.3f}", f"{rates[trait]:.3f}", f"{other:.3f}")
        table.add_row("all", f"{sum(base.values()):.3f}", f"{np.mean(prompted):.3f} (min {min(prompted):.3f})", "")
        console.print(table)

    teachers = [prompted_teacher(pack, trait) for trait in TEACHERS]
    table = Table("teacher", "in format", "tokens", "divergence", "other argmax", title=f"{folder.name}: numbers")
    for teacher in [control, *teachers]:
        rows, share = number_rows(lm, pack, teacher, n)
        found = find_divergence(lm, rows, teacher, [other for other in teachers if other is not teacher])
        tokens = sum(len(d.tokens) for d in found)
        points = sum(len(d.divergence_positions) for d in found)
        moved = sum(int((d.argmax != d.argmax[0]).any(axis=0).sum()) for d in found)
        table.add_row(teacher.name, f"{share:.3f}", str(tokens), f"{points / tokens:.3f}", f"{moved / tokens:.3f}")
    console.print(table)
