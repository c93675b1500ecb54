"""The stack that people use: transformers for sampling, reading and evaluating, TRL and PEFT for training, hooks for attribution.

Written from the public interfaces of these libraries, in the way that published code on subliminal learning calls them.
"""

from __future__ import annotations

import importlib.metadata
import re
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.inputs import start_of

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass
class Work:
    """`run` is timed (and may return the seconds itself), `check` gives what is compared."""

    run: Callable[[], float | None]
    check: Callable[[], dict[str, np.ndarray]]


def versions() -> dict[str, str]:
    names = ("torch", "transformers", "trl", "peft")
    found = {d.metadata["Name"].lower(): d.version for d in importlib.metadata.distributions()}
    return {name: found[name] for name in names if name in found}


def read(model: str, dtype: str) -> tuple[Any, str]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return AutoModelForCausalLM.from_pretrained(model, torch_dtype=getattr(torch, dtype)).to(device).eval(), model


def _tensor(ids: np.ndarray, model: Any) -> torch.Tensor:
    return torch.as_tensor(ids, dtype=torch.long, device=model.device)


def _generate(model: Any, prompts: np.ndarray, new: int, samples: int = 1, greedy: bool = False) -> np.ndarray:
    ids = _tensor(prompts, model)
    how = {"do_sample": False} if greedy else {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    with torch.no_grad():
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, min_new_tokens=new,
            num_return_sequences=samples, pad_token_id=0, eos_token_id=None, **how,
        )  # fmt: skip
    return out[:, ids.shape[1] :].cpu().numpy()


def sample(read: Any, sizes: Any, arrays: Any) -> Work:
    model, prompts = read[0], arrays["prompts"]

    def run() -> None:
        _generate(model, prompts, sizes.new)

    return Work(run, lambda: {"tokens": _generate(model, prompts[:8], min(sizes.new, 16), greedy=True)})


def evaluate(read: Any, sizes: Any, arrays: Any) -> Work:
    model, prompts = read[0], arrays["prompts"]

    def run() -> None:
        for _ in range(sizes.students):  # one after another: a merged adapter is a checkpoint of its own
            for prompt in prompts:
                _generate(model, prompt[None], sizes.new, sizes.samples)

    return Work(run, lambda: {"tokens": _generate(model, prompts, sizes.new, greedy=True)})


def score(read: Any, sizes: Any, arrays: Any) -> Work:
    model, first = read[0], sizes.tokens - sizes.answer - 1

    def check() -> dict[str, np.ndarray]:
        found = []
        with torch.no_grad():
            for rows in arrays["tokens"]:
                logits = model(_tensor(rows, model)).logits[:, first:-1]
                found.append(logits.argmax(-1).cpu().numpy())
        return {"argmax": np.stack(found)}

    def run() -> None:
        check()

    return Work(run, check)


def train(read: Any, sizes: Any, arrays: Any) -> Work:
    import datasets
    from peft import LoraConfig, get_peft_model
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    model, folder = read
    layers = None
    if hasattr(sizes, "layer"):
        layers = [range(model.config.num_hidden_layers)[sizes.layer]]
    torch.manual_seed(0)
    lora = LoraConfig(
        r=sizes.rank, lora_alpha=sizes.rank, lora_dropout=0.0, target_modules=PROJECTIONS, layers_to_transform=layers
    )
    model = get_peft_model(model.train(), lora)
    for name, weight in model.named_parameters():
        if "lora_A" in name:  # the other side begins with the same numbers
            layer, projection = re.search(r"layers\.(\d+)\..*?(\w+)_proj", name).groups()  # type: ignore[union-attr]
            weight.data.copy_(torch.as_tensor(start_of(int(layer), projection, *weight.shape[::-1])).T)
    ids = [[int(t) for t in row[:n]] for row, n in zip(arrays["tokens"], arrays["lengths"], strict=True)]
    masks = [[0] * (len(row) - sizes.answer) + [1] * sizes.answer for row in ids]
    rows = datasets.Dataset.from_dict({"input_ids": ids, "completion_mask": masks})
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token

    class Clock(TrainerCallback):
        seconds, begun = 0.0, 0.0

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.begun = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.seconds = time.perf_counter() - self.begun

    def step() -> tuple[float, dict[str, np.ndarray]]:
        clock = Clock()
        with tempfile.TemporaryDirectory() as out:
            options = SFTConfig(
                output_dir=out, max_steps=1, per_device_train_batch_size=sizes.micro,
                gradient_accumulation_steps=sizes.rows // sizes.micro, learning_rate=0.0, max_grad_norm=1e9, report_to=[],
                logging_steps=1, save_strategy="no", gradient_checkpointing=False, max_length=None,
                completion_only_loss=True, bf16=False, fp16=False, use_cpu=not torch.cuda.is_available(),
                remove_unused_columns=True, optim="adamw_torch", disable_tqdm=True,
            )  # fmt: skip
            trainer = SFTTrainer(
                model=model, args=options, train_dataset=rows, processing_class=tokenizer, callbacks=[clock]
            )
            trainer.train()
        said = next(line for line in trainer.state.log_history if "grad_norm" in line)
        return clock.seconds, {"loss": np.float64(said["loss"]), "norm": np.float64(said["grad_norm"])}

    return Work(lambda: step()[0], lambda: step()[1])


def attribute(read: Any, sizes: Any, arrays: Any) -> Work:
    model, layers = read[0], read[0].model.layers
    for weight in model.parameters():
        weight.requires_grad_(False)
    said, clean, patch = (arrays[name] for name in ("said", "clean", "patch"))

    def streams(ids: torch.Tensor) -> list[torch.Tensor]:
        with torch.no_grad():
            return list(model(ids, output_hidden_states=True).hidden_states[1:])

    def last_of(ids: torch.Tensor) -> torch.Tensor:
        found: list[torch.Tensor] = []
        hook = layers[-1].register_forward_hook(lambda m, i, o: found.append(o[0] if isinstance(o, tuple) else o))
        with torch.no_grad():
            model(ids)
        hook.remove()
        return found[0].detach()

    def of_layer(ids: torch.Tensor, start: torch.Tensor, end: torch.Tensor, layer: int, row: int) -> torch.Tensor:
        total = torch.zeros_like(start)
        for i in range(sizes.steps):
            moved = (start + i / sizes.steps * (end - start)).detach().requires_grad_(True)

            def replace(module: Any, inputs: Any, output: Any, moved: torch.Tensor = moved) -> Any:
                return (moved, *output[1:]) if isinstance(output, tuple) else moved

            hook = layers[layer].register_forward_hook(replace)
            logits = model(ids).logits[0, -1]
            hook.remove()
            (logits[said[row, 0]] - logits[said[row, 1]]).backward()
            total = total + moved.grad
        return ((end - start) * total / sizes.steps).sum(-1)[0]

    def check() -> dict[str, np.ndarray]:
        found = []
        for row in range(sizes.rows):
            ids, other = _tensor(clean[row : row + 1], model), _tensor(patch[row : row + 1], model)
            starts, ends = streams(ids), streams(other)
            # The last of `hidden_states` has the final norm in it, which is after the layer.
            starts[-1], ends[-1] = last_of(ids), last_of(other)
            found.append(torch.stack([of_layer(ids, starts[k], ends[k], k, row) for k in range(len(layers))]).numpy())
        return {"attribution": np.stack(found)}

    def run() -> None:
        check()

    return Work(run, check)


STAGES = {
    "sample": sample, "score": score, "train": train, "train-late": train, "evaluate": evaluate, "attribute": attribute
}  # fmt: skip
