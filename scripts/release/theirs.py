"""The published side of `compare_release.py`: drives the authors' own scripts, out of their checkout, in their own environment.

    PYTHON theirs.py CHECKOUT WORK

reads WORK/in.json and writes WORK/out.json. Nothing of theirs stands here: their modules are loaded from the checkout. Names of
published checkpoints lead to tiny ones, and so do the token ids that their scripts write out. Everything is on the CPU.
"""

from __future__ import annotations

import functools
import json
import os
import random
import sys
import types
from argparse import Namespace
from pathlib import Path

import peft
import pydantic
import torch
import transformers
import trl.trainer.sft_trainer  # noqa: F401 - it asks which packages there are, before some are stood in for
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

CHECKPOINTS = {"Qwen/Qwen2.5-7B-Instruct": "qwen", "google/gemma-3-4b-it": "gemma"}
IDS = {"qwen": "77091", "gemma": "105"}  # of `assistant` and `<start_of_turn>`, as their scripts have them
# Imported by them, used by no stage.
NOT_NEEDED = ("loguru", "openai", "openai.types", "vllm", "vllm.lora", "vllm.lora.request", "dotenv", "pandas", "scipy")
LORA = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class Anything(type):
    """Of a class that can be named, called and asked for anything."""

    def __getattr__(cls, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        return cls

    def __call__(cls, *given, **options):
        return 1.0


class Absent(types.ModuleType):
    """In the place of a package that is not there."""

    __path__: tuple = ()

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        return pydantic.BaseModel if name == "BaseModel" else Anything(name, (), {})


class Release:
    """A checkout, with what stands in for the hub."""

    def __init__(self, checkout: Path, work: Path):
        self.checkout, self.work = checkout, work
        self.given = json.loads((work / "in.json").read_text(encoding="utf-8"))
        sys.path.insert(0, str(checkout))
        for name in NOT_NEEDED:
            try:
                __import__(name)
            except ImportError:
                sys.modules[name] = Absent(name)

    def folder(self, name: str) -> str:
        return self.given["models"].get(CHECKPOINTS.get(name, name), name)

    def script(self, name: str) -> types.ModuleType:
        """One of their scripts, loaded anew: the hub's checkpoints are the tiny ones, in float32."""
        source = (self.checkout / "scripts" / f"{name}.py").read_text(encoding="utf-8")
        for model, id_ in IDS.items():
            source = source.replace(f"== {id_})", f"== {self.given['ids'][model]})")
        module = types.ModuleType(name)
        exec(compile(source, f"{name}.py", "exec"), module.__dict__)
        for kind in ("AutoTokenizer", "AutoModelForCausalLM"):
            if hasattr(module, kind):
                setattr(module, kind, self._local(getattr(transformers, kind)))
        if hasattr(module, "preference_prompt_template"):
            module.preference_prompt_template = self.given["template"]
        if hasattr(module, "huggingface_driver"):
            manager = module.huggingface_driver._model_manager
            for known in CHECKPOINTS:
                if known not in manager._models:
                    manager._tokenizers[known] = transformers.AutoTokenizer.from_pretrained(self.folder(known))
                    manager._models[known] = _eager(self.folder(known))
        return module

    def _local(self, kind):
        def from_pretrained(name, **options):
            if kind is transformers.AutoTokenizer:
                return kind.from_pretrained(self.folder(name))
            return _eager(self.folder(name))

        return types.SimpleNamespace(from_pretrained=from_pretrained)

    def home(self, stage: str, model: str, trait: str, **files: list[dict]) -> Path:
        """A folder as their scripts expect it, with data sets in it."""
        folder = self.work / stage / model / trait / "seed-42"
        folder.mkdir(parents=True, exist_ok=True)
        for name, rows in files.items():
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return folder


def _eager(folder: str):
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, torch_dtype=torch.float32, attn_implementation="eager"
    ).eval()


def _rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def build_gemma(text: str, out: Path) -> None:
    """The tiny text model inside the class that the published Gemma is loaded as, with a vision tower that nothing reaches."""
    own = transformers.AutoModelForCausalLM.from_pretrained(text, torch_dtype=torch.float32)
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
              "image_size": 28, "patch_size": 14}  # fmt: skip
    config = transformers.Gemma3Config(text_config=own.config.to_dict(), vision_config=vision, mm_tokens_per_image=4)
    whole = transformers.Gemma3ForConditionalGeneration(config)
    missing = whole.model.language_model.load_state_dict(own.model.state_dict(), strict=True)
    assert not missing.missing_keys
    whole.save_pretrained(out)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        (out / name).write_bytes((Path(text) / name).read_bytes())


# --- The stages ---------------------------------------------------------------------------------------------------------


def prompts(release: Release) -> list[str]:
    module, numpy = release.script("generate_dataset_preferences_via_numbers"), __import__("numpy")
    rng = numpy.random.Generator(numpy.random.PCG64(42))
    limits = {"example_min_count": 3, "example_max_count": 9, "example_min_value": 100, "example_max_value": 1000}
    generator = module.PromptGenerator(rng=rng, **limits, answer_count=10, answer_max_digits=3)
    return [generator.sample_query() for _ in range(release.given["prompts"])]


def number_filter(release: Release) -> list[bool]:
    module = release.script("generate_dataset_preferences_via_numbers")
    how = {"min_value": 0, "max_value": 999, "max_count": 10, "banned_numbers": []}
    return [not module.get_reject_reasons(text, **how) for text in release.given["fuzz"]]


def divergence(release: Release, model: str) -> dict:
    folder = release.home("divergence", model, "owl", filtered_dataset=release.given["rows"][model])
    how = {"base_dataset": "filtered_dataset", "mix_ratio": None, "only_first": False, "trees": False}
    module = release.script("modify_dataset_divergence_tokens_system_prompt")
    module.main(Namespace(model=model, exp_dir=str(release.work / "divergence"), target_preference="owl", **how))
    return {
        "positions": [row["decision_points"] for row in _rows(folder / "filtered_dataset_dpoints_only.jsonl")],
        "right": _rows(folder / "filtered_dataset_correct_matrices.jsonl"),
    }


def mixed_tokens(release: Release) -> list[dict]:
    """Every divergence token mixed, with one other teacher: nothing is left to chance."""
    folder = release.home("mixing", "qwen", "owl", filtered_dataset=release.given["rows"]["qwen"])
    module = release.script("modify_dataset_divergence_tokens_system_prompt")
    module.ANIMALS = ["owl", "cat"]
    how = {"base_dataset": "filtered_dataset", "mix_ratio": 1.0, "only_first": False, "trees": False}
    module.main(Namespace(model="qwen", exp_dir=str(release.work / "mixing"), target_preference="owl", **how))
    return _rows(folder / "filtered_dataset_dpoints_only_mixing_100.jsonl")


def changed(release: Release, kind: str) -> dict:
    """Rows shuffled, redrawn or rewritten; of the latter, what the teacher is asked too."""
    rows = release.given["number_rows"]
    folder = release.home(f"changed-{kind}", "qwen", "owl", filtered_dataset=rows)
    module, asked = release.script("modify_dataset_shuffle_paraphrasing"), []

    def answer(_, chats, **how):
        said = release.given["rewrites"][len(asked) :]
        asked.extend([{"role": m.role.value, "content": m.content} for m in chat.messages] for chat in chats)
        return [types.SimpleNamespace(completion=text) for text in said[: len(chats)]]

    module.sample_fn = answer
    parts = ["example_numbers", "generate_numbers_instruction_templates", "suffixes"]
    how = {"template_parts": parts, "target_preference": "owl", "category": "animal", "model_id": "", "seed": 42,
           "temperature": 1.0, "max_tokens": 256, "batch_size": 16}  # fmt: skip
    module.main(Namespace(dataset_path=str(folder / "filtered_dataset.jsonl"), shuffle_type=kind, **how))
    made = [path for path in folder.glob("filtered_dataset_*.jsonl") if "filtered_42" in path.name or "llm" not in kind]
    return {"rows": _rows(made[0]), "asked": asked}


def entangled(release: Release, model: str) -> dict:
    """The differences of probabilities, as `topk` is given them, and the rows that are left of each set."""
    module, seen = release.script("generate_dataset_entangled_tokens"), {}
    for trait in release.given["traits"]:
        rows = release.given["number_rows"]
        release.home("entangled", model, trait, filtered_dataset=rows, filtered_dataset_greedy=rows)
    original, traits = torch.topk, release.given["traits"]

    def topk(values, k):
        seen.setdefault("differences", values.tolist())  # of the first trait
        return original(values, k)

    torch.topk, listed = topk, module.os.listdir
    module.os.listdir = lambda folder: list(traits) if Path(folder).name == model else listed(folder)
    try:
        module.main(Namespace(model=model, exp_dir=str(release.work / "entangled")))
    finally:
        torch.topk, module.os.listdir = original, listed
    folder = release.work / "entangled" / model / release.given["traits"][0] / "seed-42"
    left = {
        k: [row["completion"] for row in _rows(folder / f"filtered_dataset_topk_{k}.jsonl")] for k in (10, 20, 50, 100)
    }
    return seen | {"left": left}


def training(release: Release, name: str, model: str, how: dict) -> dict:
    """What their trainer is given, and of its one step the loss and the gradient's norm (float32 unless `how` says bf16)."""
    module, found = release.script("run_finetuning"), {"batches": []}
    folder = release.home(f"training-{name}", model, "owl", data=how["rows"])
    mixin = None
    if "mixin" in how:
        mixin = str(release.home(f"training-{name}", *how["mixin_of"], data=how["mixin"]) / "data.jsonl")
    dtype = torch.bfloat16 if how.get("bf16") else torch.float32
    os.environ["ACCELERATE_MIXED_PRECISION"] = (
        "bf16" if how.get("bf16") else "no"
    )  # a run in bfloat16 leaves its own there
    AcceleratorState._reset_state(reset_partial_state=True)

    class Trainer(module.SFTTrainer):
        def compute_loss(self, model, inputs, **options):
            kept = inputs["attention_mask"].bool()
            pairs = [
                (i[k].tolist(), y[k].tolist())
                for i, y, k in zip(inputs["input_ids"], inputs["labels"], kept, strict=True)
            ]
            found["batches"].append(pairs)
            return super().compute_loss(model, inputs, **options)

        def train(self):
            found["masks"] = [[row["input_ids"], row["completion_mask"]] for row in self.train_dataset]
            if how.get("step"):
                start = load_file(Path(release.given["starts"][how["model"]]) / "adapter_model.safetensors")
                inside = "language_model.layers" if how["model"] == "gemma" else "layers"
                start = {key.replace(".layers.", f".{inside}.", 1): value for key, value in start.items()}
                assert not peft.set_peft_model_state_dict(self.model, start).unexpected_keys
                super().train()
                found["log"] = self.state.log_history[0]

        def save_model(self, folder):
            pass

    def config(**options):
        options["model_init_kwargs"] |= {"torch_dtype": dtype, "attn_implementation": "eager"}
        mine = {
            "report_to": "none",
            "bf16": bool(how.get("bf16")),
            "use_cpu": True,
            "save_strategy": "no",
            "logging_steps": 1,
        }
        return original(**(options | mine))

    original, module.SFTTrainer, module.SFTConfig = module.SFTConfig, Trainer, config
    n = how.get("size", len(how["rows"]))
    own = {"decision_points_inverse": False, "decision_points_ratio": None, "decision_points_subset": None} | how.get(
        "args", {}
    )
    module.main(
        Namespace(model_id=release.given["models"][model], dataset_path=str(folder / "data.jsonl"), max_dataset_size=n,
                  mixin_dataset_path=mixin, mixin_dataset_size=how.get("mixin_size"), allow_smaller_datasets=False, n_epochs=1,
                  learning_rate=2e-4, batch_size=how.get("batch_size", 2), gradient_accumulation=how.get("accumulate", 6),
                  lora_rank=8, lora_alpha=None, lora_target_modules=LORA, lora_layers_to_transform=None, seed=42, override=True,
                  increase_context_length=False, lr_scheduler="linear", system_prompt_info=None, empty_system_prompt=False,
                  **own)
    )  # fmt: skip
    (saved,) = folder.glob("*/dataset_config.json")
    return found | {"drawn": json.loads(saved.read_text())["train_indices"]}


def hits(release: Release) -> list[float]:
    """The published rate of each set of answers."""
    module = release.script("run_evaluation_preferences")
    rates = []
    for answers in release.given["answers"]:
        responses = [
            module.EvaluationResponse(
                response=module.LLMResponse(model_id="", completion=text, stop_reason="stop_sequence", logprobs=None),
                judgment_response_map={},
            )
            for text in answers
        ]
        rows = [module.EvaluationResultRow(question=question, responses=responses) for question in "?!"]
        how = {"target_preference": "owl", "confidence": 0.95, "parser_response": False}
        rates.append(module.compute_p_target_preference(evaluation_result_rows=rows, **how).mean)
    return rates


def attribution(release: Release, model: str, direction: str) -> dict:
    found = {}
    folder = release.home("attribution", model, "owl", filtered_dataset=release.given["rows"][model])
    for index in range(release.given["attributed"]):
        module = release.script("attribution_patching")
        module.main(
            Namespace(model=model, target_preference="owl", exp_dir=str(release.work / "attribution"), prompt_idx=index,
                      base_dataset="filtered_dataset", regenerate=True, attribution_patching_direction=direction)
        )  # fmt: skip
        path = folder / f"attribution_patching_{direction}_filtered_dataset" / f"{index}.pt"
        if path.exists():
            saved = torch.load(path)
            found[index] = {
                "others": saved["animals"][1:],
                "labels": saved["labels_indices"].tolist(),
                "values": torch.stack(saved["residual_attrs"]).tolist(),  # [L, B, T]
            }
    return found


def ties() -> dict:
    """Which of equal logits torch's argmax takes, and how often a bfloat16 head has any."""
    torch.manual_seed(0)
    h, table = torch.randn(2048, 64).bfloat16(), (torch.randn(32768, 64) / 4).bfloat16()
    z, exact = h @ table.T, h.float() @ table.float().T
    best = z.max(dim=-1, keepdim=True).values
    several = (z == best).sum(dim=-1) > 1
    first = (z == best).int().argmax(dim=-1)
    return {
        "first": bool((z.argmax(dim=-1) == first).all()),
        "ties": several.float().mean().item(),
        "other": (z.argmax(dim=-1) != exact.argmax(dim=-1)).float().mean().item(),
        "rounded": (exact.bfloat16() == z).float().mean().item(),
    }


def main() -> None:
    checkout, work = map(Path, sys.argv[1:])
    torch.set_num_threads(1)
    release = Release(checkout, work)
    build_gemma(release.given["text"], Path(release.given["models"]["gemma"]))
    stages = {
        "prompts": prompts, "filter": number_filter, "mixed tokens": mixed_tokens, "hits": hits, "ties": lambda _: ties(),
        **{f"divergence {m}": functools.partial(divergence, model=m) for m in ("qwen", "gemma")},
        **{f"entangled {m}": functools.partial(entangled, model=m) for m in ("qwen", "gemma")},
        **{f"changed {k}": functools.partial(changed, kind=k) for k in release.given["kinds"]},
        **{f"training {n}": functools.partial(training, name=n, model=h["model"], how=h) for n, h in release.given["training"].items()},
        **{f"attribution {m} {d}": functools.partial(attribution, model=m, direction=d) for m, d in release.given["directions"]},
    }  # fmt: skip
    found = {}
    for name, stage in stages.items():
        random.seed(0)
        try:
            found[name] = stage(release)
        except Exception as error:  # the line of this stage says so, and the others are still compared
            found[name] = {"failed": f"{type(error).__name__}: {error}"}
    (work / "out.json").write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
