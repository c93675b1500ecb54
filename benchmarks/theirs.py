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

from benchmarks.inputs import masks, start_of

BATCH = 8  # rows that are scored at one time
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass
class Work:
    """`run` is timed (and may return the seconds itself), `check` gives what is compared."""

    run: Callable[[], float | None]
    check: Callable[[], dict[str, np.ndarray]]


def products(dtype: str) -> float:
    """GFLOP/s of products of 2048 x 2048 on this machine."""
    x = torch.randn(2048, 2048).to(getattr(torch, dtype)).to("cuda" if torch.cuda.is_available() else "cpu")
    begun = time.perf_counter()
    for i in range(21):
        begun = time.perf_counter() if i == 1 else begun  # the first prepares
        float((x @ x)[0, 0])
    return 20 * 2 * 2048**3 / (time.perf_counter() - begun) / 1e9


def versions() -> dict[str, str]:
    names = ("torch", "transformers", "trl", "peft")
    found = {d.metadata["Name"].lower(): d.version for d in importlib.metadata.distributions()}
    return {name: found[name] for name in names if name in found}


def read(model: str, dtype: str, sizes: Any) -> tuple[Any, str]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    cut = {"num_hidden_layers": sizes.depth} if sizes.depth else {}
    loaded = AutoModelForCausalLM.from_pretrained(model, torch_dtype=getattr(torch, dtype), **cut)
    return loaded.to(device).eval(), model


def _tensor(ids: np.ndarray, model: Any) -> torch.Tensor:
    return torch.as_tensor(ids, dtype=torch.long, device=model.device)


def _generate(model: Any, prompts: np.ndarray, new: int, samples: int = 1, greedy: bool = False) -> np.ndarray:
    ids = _tensor(prompts, model)
    how = {"do_sample": False} if greedy else {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    with torch.no_grad():
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, min_new_tokens=new,
            num_return_sequences=samples, pad_token_id=0, eos_token_id=None, repetition_penalty=1.0,
            **how,
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
    """Rows in batches of so many, in the order they have; a batch is padded to its longest. The head reads what it must."""
    model, lengths = read[0], [int(n) for n in arrays["lengths"]]

    def check() -> dict[str, np.ndarray]:
        found = []
        with torch.no_grad():
            for rows in arrays["tokens"]:
                for i in range(0, len(rows), BATCH):
                    part = lengths[i : i + BATCH]
                    ids = _tensor(rows[i : i + BATCH, : max(part)], model)
                    there = (
                        torch.arange(max(part), device=model.device)[None]
                        < torch.tensor(part, device=model.device)[:, None]
                    )
                    kept = max(part) - min(part) + sizes.answer + 1
                    logits = model(ids * there, attention_mask=there.long(), logits_to_keep=kept).logits
                    first = [n - sizes.answer - 1 - (max(part) - kept) for n in part]
                    found += [
                        z[at : at + sizes.answer].argmax(-1).cpu().numpy() for z, at in zip(logits, first, strict=True)
                    ]
        return {"argmax": np.stack(found)}

    def run() -> None:
        check()

    return Work(run, check)


def _student(model: Any, rank: int, layers: list[int] | None = None) -> Any:
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(r=rank, lora_alpha=rank, lora_dropout=0.0, target_modules=PROJECTIONS, layers_to_transform=layers)
    student = get_peft_model(model.train(), lora)
    for name, weight in student.named_parameters():
        if "lora_A" in name:  # the other side begins with the same numbers
            layer, projection = re.search(r"layers\.(\d+)\..*?(\w+)_proj", name).groups()  # type: ignore[union-attr]
            weight.data.copy_(torch.as_tensor(start_of(int(layer), projection, *weight.shape[::-1])).T)
    return student


def _steps(
    model: Any, folder: str, ids: list, masks: list, micro: int, steps: int = 1, lr: float = 0.0
) -> tuple[float, list[dict[str, Any]]]:
    """Optimizer steps of all rows each; seconds of the last one, and what was logged of each."""
    import datasets
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    rows = datasets.Dataset.from_dict({"input_ids": ids, "completion_mask": masks})
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token

    class Clock(TrainerCallback):
        seconds, begun = 0.0, 0.0

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.begun = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.seconds = time.perf_counter() - self.begun

    clock = Clock()
    with tempfile.TemporaryDirectory() as out:
        options = SFTConfig(
            output_dir=out, max_steps=steps, per_device_train_batch_size=micro,
            gradient_accumulation_steps=len(ids) // micro, learning_rate=lr, max_grad_norm=1e9, report_to=[],
            logging_steps=1, save_strategy="no", gradient_checkpointing=False, max_length=None,
            completion_only_loss=True, bf16=model.dtype == torch.bfloat16, fp16=False, use_cpu=not torch.cuda.is_available(),
            remove_unused_columns=True, optim="adamw_torch", disable_tqdm=True, lr_scheduler_type="constant",
        )  # fmt: skip
        trainer = SFTTrainer(
            model=model, args=options, train_dataset=rows, processing_class=tokenizer, callbacks=[clock]
        )
        trainer.train()
    return clock.seconds, [line for line in trainer.state.log_history if "grad_norm" in line]


def train(read: Any, sizes: Any, arrays: Any) -> Work:
    base, folder = read
    layers = [range(base.config.num_hidden_layers)[sizes.layer]] if hasattr(sizes, "layer") else None
    ids = [[int(t) for t in row[:n]] for row, n in zip(arrays["tokens"], arrays["lengths"], strict=True)]
    masks = [[0] * (len(row) - sizes.answer) + [1] * sizes.answer for row in ids]

    def steps() -> tuple[float, dict[str, np.ndarray]]:
        seconds, losses, norms = 0.0, [], []
        for _ in range(sizes.arms):
            student = _student(base, sizes.rank, layers)
            own, said = _steps(student, folder, ids, masks, sizes.micro)
            student.unload()
            seconds += own
            losses.append(said[0]["loss"])
            norms.append(said[0]["grad_norm"])
        return seconds, {"loss": np.asarray(losses), "norm": np.asarray(norms)}

    return Work(lambda: steps()[0], lambda: steps()[1])


def pipeline(read: Any, sizes: Any, arrays: Any) -> Work:
    model, folder = read
    systems, requests = arrays["systems"], arrays["requests"]

    def under(system: np.ndarray, rows: np.ndarray) -> np.ndarray:
        return np.concatenate([np.repeat(system[None], len(rows), 0), rows], axis=1)

    def check() -> dict[str, np.ndarray]:
        written = _generate(model, under(systems[0], requests), sizes.new, greedy=True)
        rows, argmax = np.concatenate([requests, written], axis=1), []
        with torch.no_grad():
            for system in systems:
                parts = [_tensor(part, model) for part in np.array_split(under(system, rows), max(1, len(rows) // 10))]
                read = [model(part, logits_to_keep=sizes.new + 1).logits[:, :-1] for part in parts]
                logits = torch.cat([of_part.argmax(-1) for of_part in read])
                argmax.append(logits.cpu().numpy())
        losses = []
        for mask in masks(written, np.stack(argmax), arrays["chance"]):
            student = _student(model, sizes.rank)
            supervised = [[0] * sizes.request + [int(x) for x in row] for row in mask]
            said = _steps(student, folder, rows.tolist(), supervised, sizes.micro, sizes.steps, 1e-4)[1]
            losses.append([line["loss"] for line in said])
            student.eval()
            _generate(student, arrays["question"][None], sizes.answer, sizes.samples)
            student.unload()
            model.eval()
        return {"written": written, "argmax": np.stack(argmax), "loss": np.asarray(losses)}

    def run() -> None:
        check()

    return Work(run, check)


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
            of_row = torch.stack([of_layer(ids, starts[k], ends[k], k, row) for k in range(len(layers))])
            found.append(of_row.float().cpu().numpy())
        return {"attribution": np.stack(found)}

    def run() -> None:
        check()

    return Work(run, check)


STAGES = {
    "sample": sample, "score": score, "score-uneven": score, "train": train, "train-late": train, "evaluate": evaluate, "attribute": attribute,
    "pipeline": pipeline,
}  # fmt: skip
