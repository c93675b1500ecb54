"""Models and tasks of inspect_ai (`pip install 'jsublim[inspect]'`), found by its entry point:

    inspect eval jsublim/preference --model jsublim/runs/owls/cat-all-seed1

The task asks a student what its run asked, with the same numbers, so that the answers are the same, and so is their rate.
"""

from __future__ import annotations

import asyncio
import functools
import secrets
import time
from pathlib import Path
from typing import Any

import numpy as np
from inspect_ai import Task, task
from inspect_ai.dataset import MemoryDataset, Sample
from inspect_ai.model import ChatMessage, GenerateConfig, ModelAPI, ModelOutput, get_model, modelapi
from inspect_ai.scorer import Score, Target, mean, scorer
from inspect_ai.solver import Generate, TaskState, solver
from inspect_ai.tool import ToolChoice, ToolInfo

from jsublim.config import Experiment
from jsublim.errors import JsublimError, UsageError
from jsublim.evals.preference import hit
from jsublim.inference.sampling import Sampling
from jsublim.pipeline.evaluated import questions
from jsublim.pipeline.setup import Setup
from jsublim.pipeline.showing import CONFIG, experiment_of_run
from jsublim.report.tables import read_json
from jsublim.serve.app import SEEDS, ServeLimits
from jsublim.serve.catalogue import Catalogue, catalogue
from jsublim.serve.engine import AnswerJob, Engine


@functools.cache
def _served(place: str) -> tuple[Catalogue, Engine]:
    found = catalogue([place])
    return found, Engine(found.lm, found.adapter, slots=ServeLimits.slots, length=ServeLimits.length)


def place_of(name: str) -> tuple[str, str]:
    """A model's name as the place that holds it, a run's folder (which may lie in runs/) or a checkpoint, and the name it has there."""
    parts = name.split("/")
    for cut in range(len(parts) - 1, 0, -1):
        for folder in (Path(*parts[:cut]), Path("runs", *parts[:cut])):
            if (folder / CONFIG).is_file():
                return str(folder), "/".join([folder.resolve().name, *parts[cut:]])
    return name, ""


class JsublimAPI(ModelAPI):
    """A student of a run (`jsublim/RUN/cat-all-seed1`), or a checkpoint by its name, in this process."""

    def __init__(
        self,
        model_name: str,
        base_url: str | None = None,
        api_key: str | None = None,
        config: GenerateConfig = GenerateConfig(),  # noqa: B008 (inspect's own signature)
        **model_args: Any,
    ):
        super().__init__(model_name, base_url, api_key, [], config)
        self.place, name = place_of(model_name)
        self.found, self.engine = _served(self.place)
        self.name = name or self.found.lm.name
        if self.name not in self.found.names:
            raise UsageError(f"jsublim/{model_name}: not one of {', '.join(self.found.names)}")

    def max_connections(self) -> int:
        return 4 * ServeLimits.slots

    async def generate(
        self, input: list[ChatMessage], tools: list[ToolInfo], tool_choice: ToolChoice, config: GenerateConfig
    ) -> ModelOutput:
        if tools:
            raise UsageError(f"jsublim/{self.model_name}: the model calls no tools")
        lm, extra = self.found.lm, config.extra_body or {}
        prompt = lm.chat.prompt_tokens([{"role": message.role, "content": message.text} for message in input])
        sampling = Sampling(
            1.0 if config.temperature is None else config.temperature,
            config.top_k or 0,
            1.0 if config.top_p is None else config.top_p,
            extra.get("repetition_penalty", 1.0),
            lm.chat.stop_tokens,
        )
        room = self.engine.length - len(prompt)
        most, seed = config.max_tokens or room, secrets.randbelow(SEEDS) if config.seed is None else config.seed
        if most > room:
            raise UsageError(
                f"max_tokens: {most} given, after a prompt of {len(prompt)} tokens; there is room for {room}"
            )
        tokens, why = await self._drawn(prompt, sampling, most, seed % SEEDS, extra.get("row", 0))
        return ModelOutput.from_content(
            self.model_name, lm.chat.decode(tokens), "max_tokens" if why == "length" else "stop"
        )

    async def _drawn(
        self, prompt: np.ndarray, sampling: Sampling, most: int, seed: int, row: int
    ) -> tuple[list[int], str]:
        loop, done, drawn = asyncio.get_running_loop(), asyncio.get_running_loop().create_future(), list[int]()

        def told(tokens: list[int], why: str | JsublimError | None) -> None:
            drawn.extend(tokens)
            if why is not None:
                loop.call_soon_threadsafe(done.set_result, why)

        self.engine.add(
            AnswerJob(self.name, prompt, sampling, most, seed, row, time.monotonic() + ServeLimits.seconds, told)
        )
        why = await done
        if isinstance(why, JsublimError):
            raise why
        return drawn, why


@modelapi(name="jsublim")
def jsublim_models() -> type[ModelAPI]:
    return JsublimAPI


@solver
def as_the_run_does(how: dict[str, Any]):
    """Answers drawn with given numbers, each with its own row's random numbers."""

    async def solve(state: TaskState, generate: Generate) -> TaskState:
        return await generate(state, **how | {"extra_body": how["extra_body"] | {"row": state.metadata["row"]}})

    return solve


@scorer(metrics=[mean()])
def rate():
    """1 for an answer that names the trait (docs/recipes.md, quirk 11), else 0."""

    async def score(state: TaskState, target: Target) -> Score:
        answer = state.output.completion
        return Score(value=float(hit(answer, target.text)), answer=answer)

    return score


@task
def preference(trait: str | None = None) -> Task:
    """The plain preference evaluation of the run whose student is asked, with the run's seed and numbers.

    Args:
      trait: to look for in the answers; None is the student's teacher's.
    """
    api = get_model().api
    if not isinstance(api, JsublimAPI) or not (Path(api.place) / CONFIG).is_file():
        raise UsageError("jsublim/preference: asks a student of a run; give --model jsublim/RUN/STUDENT")
    run, experiment = Path(api.place), experiment_of_run(Path(api.place))
    setup = Setup.of(experiment)
    asked = [each for each in questions(setup).planned if "preference" in each.identity]
    if not asked or next(iter(experiment.evaluation.kinds)) != "preference":
        raise UsageError(f"jsublim/preference: {run} does not ask for preferences first")
    samples, first = experiment.evaluation.samples, asked[0]
    trait = trait or _teacher(run, api)
    dataset = [
        Sample(
            input=_messages(experiment, question), target=trait, id=q * samples + j, metadata={"row": q * samples + j}
        )
        for q, question in enumerate(first.questions)
        for j in range(samples)
    ]
    drawn = setup.sampling("temperature", experiment.checkpoint, evaluation=not first.keeps_top_p)
    how = {
        "temperature": drawn.temperature,
        "top_p": drawn.top_p,
        "top_k": drawn.top_k,
        "seed": experiment.evaluation.seed,
    }
    how |= {
        "max_tokens": experiment.evaluation.max_new_tokens,
        "extra_body": {"repetition_penalty": drawn.repetition_penalty},
    }
    return Task(MemoryDataset(dataset), solver=as_the_run_does(how), scorer=rate())


def _messages(experiment: Experiment, question: str) -> Any:
    from inspect_ai.model import ChatMessageSystem, ChatMessageUser

    system = None if experiment.students is None else experiment.students.system
    first = [] if system is None else [ChatMessageSystem(content=system)]
    return [*first, ChatMessageUser(content=question)]


def _teacher(run: Path, api: JsublimAPI) -> str:
    """The trait of the teacher that a student is of."""
    folder = api.found.adapters.get(api.name)
    key = "" if folder is None else folder.name.rpartition("-")[2]
    arms = {arm["artifact"]: arm["teacher"] for arm in read_json(run / "results" / "arms.json", [])}
    if key not in arms:
        raise UsageError(f"jsublim/preference: whose trait '{api.name}' learned is not known; give -T trait=NAME")
    return arms[key]
