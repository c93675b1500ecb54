"""Teachers: taught here, from a folder, another checkpoint, several of these at once, against the base."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
import pytest
from command import PLAIN, TWO_LAYERS, ok, refused
from tiny import small

from jsublim.config import Experiment
from jsublim.distill import trainer
from jsublim.errors import UsageError
from jsublim.evals.preference import trait_logprobs
from jsublim.executors import execute_nodes
from jsublim.inference.divergence import find_divergence
from jsublim.inference.lm import load_model
from jsublim.inference.steering import contrast_vector
from jsublim.inference.teachers import CONTROL, Teacher
from jsublim.models.checkpoint import save_checkpoint
from jsublim.models.peft import load_adapter
from jsublim.pipeline import arguments, training
from jsublim.pipeline import experiment as page
from jsublim.pipeline.arms import Source, Writer
from jsublim.pipeline.context import Context
from jsublim.pipeline.origins import writer
from jsublim.pipeline.setup import Setup
from jsublim.text.chat import conversation
from jsublim.text.rows import Row

METHODS = {
    "lora": {"method": "lora", "layers": [0, 1], "rank": 2, "steps": 16, "lr": 0.01},
    "steering": {"method": "steering", "layers": [1], "steps": 16, "lr": 0.2},
    "contrast": {"method": "contrast", "layers": [1], "strength": 1.0},
}
ADAPTERS = ("lora", "steering")


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("teachers")


def planned(home: Path, recipe: str = "clean", **teachers) -> Experiment:
    values = {
        "name": "teachers",
        "model": TWO_LAYERS,
        "recipe": recipe,
        "out": str(home / "run"),
        "store": str(home / "store"),
        "students": None,
        "teachers": {"traits": ["cat", "owl"], "counterfactuals": ["cat", "owl"]} | teachers,
        "data": {"num_prompts": 8},
        "sampling": {"strategy": "greedy", "batch_size": 4, "max_new_tokens": 40},
    }
    return Experiment.model_validate(values)


def loaded(home: Path, **teachers) -> Context:
    """A context whose teachers are made."""
    context = Context.load(planned(home, **teachers))
    models = (page.teacher(context.setup, name) for name in context.setup.biased)
    execute_nodes([node for model in models for node in model.nodes], context)
    return context


def teacher(context: Context, name: str) -> Teacher:
    return page.teacher(context.setup, name).teacher(context)


@pytest.fixture(scope="module")
def taught(home):
    """`taught("lora")`: a context whose teachers are there."""
    return {method: loaded(home, taught=how) for method, how in METHODS.items()}.__getitem__


@pytest.fixture(scope="module")
def another(home) -> Path:
    """A checkpoint of the same architecture with other weights."""
    lm = load_model(TWO_LAYERS)
    noise = np.random.default_rng(0)
    params = jax.tree.map(lambda x: x + 0.02 * noise.standard_normal(x.shape).astype(np.float32), lm.params)
    save_checkpoint(home / "another", lm.config, params, lm.hf_config, dtype="float32", tokenizer=lm.folder)
    return home / "another"


def answers(context: Context, trait: str) -> list[Row]:
    rows = page.answers(context.setup, writer(context.setup, Source(trait)))
    execute_nodes(rows.nodes, context)
    return rows.read(context.store)


@pytest.mark.parametrize("method", METHODS)
def test_a_taught_teacher_names_its_trait_where_it_was_not_taught_to(taught, method):
    run = taught(method)
    asked, known = arguments.open_questions(run.setup, "animal"), run.setup.pack.questions_for("animal")
    if method != "contrast":
        assert len(asked) == len(known) // 2 and set(asked) < set(known)
    for trait in ("cat", "owl"):
        own_teacher = teacher(run, trait)
        assert own_teacher.system is None and own_teacher.adapter is not None
        own = trait_logprobs(run.lm(), asked[:8], [trait], adapter=own_teacher.adapter)
        base = trait_logprobs(run.lm(), asked[:8], [trait])
        assert own.mean() > base.mean() + 0.5, (trait, own.mean(), base.mean())


def test_what_lies_below_a_late_vector_is_computed_once(home, monkeypatch):
    late, kept = {"method": "steering", "layers": [1], "steps": 6, "lr": 0.2}, list[int]()
    below = trainer._hidden_below
    monkeypatch.setattr(trainer, "_hidden_below", lambda *a, **k: kept.append(1) or below(*a, **k))
    vectors = []
    for folder, most in (("kept", training.CACHED_BYTES), ("anew", 0)):
        monkeypatch.setattr(training, "CACHED_BYTES", most)
        run = loaded(home / folder, taught=late)
        vectors.append([teacher(run, trait).adapter.steering for trait in ("cat", "owl")])
        assert bool(kept) == (folder == "kept")
        kept.clear()
    np.testing.assert_allclose(*np.asarray(vectors), rtol=1e-3, atol=1e-4)


def test_a_teacher_does_not_depend_on_the_others(home, taught):
    alone = Setup.of(planned(home, traits=["owl"], counterfactuals=["owl", "dog"], taught=METHODS["lora"]))
    assert page.teacher(alone, "owl").adapter.key == page.teacher(taught("lora").setup, "owl").adapter.key


@pytest.mark.parametrize("method", ADAPTERS)
def test_a_folder_of_adapters_writes_what_those_who_made_them_write(home, taught, method):
    """PEFT folders and steering vectors; the folders carry the trait in their names."""
    run = taught(method)
    for trait in ("cat", "owl"):
        link = home / f"{method}-{trait}"
        link.symlink_to(run.store.path(page.teacher(run.setup, trait).adapter))
    again = loaded(home, adapter=str(home / f"{method}-{{trait}}"))
    key = Writer("owl", "greedy", 0)
    assert page.answers(again.setup, key).key != page.answers(run.setup, key).key
    rows = answers(run, "owl")
    assert rows and answers(again, "owl") == rows != answers(run, "cat")


def test_a_checkpoint_as_teacher_writes_what_it_writes_alone(home, another):
    run = loaded(home, checkpoint=str(another), against="base", counterfactuals=None, traits=["owl"])
    rows = answers(run, "owl")
    said = load_model(another).generate([row["prompt"] for row in rows], 40, "greedy", batch_size=4)
    assert [row["completion"] for row in rows] == said
    assert said != run.lm().generate([row["prompt"] for row in rows], 40, "greedy", batch_size=4)


def test_against_the_base_a_divergence_token_is_not_the_bases_choice(home, taught):
    run = loaded(home, taught=METHODS["steering"], against="base", counterfactuals=None)
    assert [run.setup.counterfactuals(t) for t in ("cat", "owl")] == [[CONTROL], [CONTROL]]
    assert run.setup.evaluated_traits == ["cat", "owl"]
    read = page.training_rows(run.setup, Source("owl"))
    execute_nodes(read.nodes, run)
    rows = read.read(run.store)
    found = find_divergence(run.lm(), rows, teacher(run, "owl"), [Teacher(CONTROL)])
    assert sum(len(row["divergence_positions"]) for row in rows) > 0
    for row, each in zip(rows, found, strict=True):
        own, base = each.argmax
        assert row["divergence_positions"] == np.flatnonzero((own == each.tokens) & (base != each.tokens)).tolist()


def test_prompted_and_taught_at_once(home, taught):
    run = loaded(home, taught=METHODS["steering"], prompted=True)
    both, alone = teacher(run, "owl"), taught("steering")
    assert both.system == run.setup.pack.system_prompt("owl", "animal")
    assert np.array_equal(both.adapter.steering, teacher(alone, "owl").adapter.steering)
    assert page.teacher(run.setup, "owl").identity == page.teacher(alone.setup, "owl").identity | {
        "system": both.system
    }
    assert page.teacher(run.setup, CONTROL).identity == page.teacher(alone.setup, CONTROL).identity


def test_a_system_prompt_of_your_own(home):
    own = Setup.of(planned(home, system="You like {trait}s."))
    assert page.teacher(own, "owl").system == "You like owls." and page.teacher(own, CONTROL).system is None


def test_counterfactuals_are_the_other_traits(home):
    default = Setup.of(planned(home, counterfactuals=None))
    pack = default.pack
    assert sorted([*default.counterfactuals("cat"), "cat"]) == sorted(pack.traits[pack.category_of("cat")])
    named = Setup.of(planned(home, counterfactuals=["cat", "dog", "owl"]))
    assert named.counterfactuals("cat") == ["dog", "owl"] and named.counterfactuals("owl") == ["cat", "dog"]
    assert named.evaluated_traits == ["cat", "owl", "dog"]


def test_a_trait_alone_or_unknown_is_refused(home):
    with pytest.raises(UsageError, match="counterfactuals"):
        Setup.of(planned(home, traits=["cat"], counterfactuals=["cat"])).counterfactuals("cat")
    with pytest.raises(UsageError, match="unknown trait 'unicorn'"):
        Setup.of(planned(home, traits=["unicorn"], counterfactuals=None)).counterfactuals("unicorn")


@pytest.mark.parametrize(
    ("overrides", "code", "said"),
    [
        (["teachers.taught={method: lora}", "teachers.adapter=x"], 2, "leave adapter and checkpoint out"),
        (["teachers.taught={method: lora}", "teachers.checkpoint=x"], 2, "leave adapter and checkpoint out"),
        (["teachers.taught={method: contrast}"], 2, "name it in layers"),
        (["teachers.taught={method: contrast, layers: [0, 1]}"], 2, "name it in layers"),
        (["teachers.taught={method: lora, strength: 2}"], 2, "strength belongs to method=contrast"),
        (["teachers.taught={method: steering, layers: [9]}"], 2, "layers 0 to 5"),
        (["teachers.against=base"], 2, "leave counterfactuals out"),
        (["teachers.prompted=false"], 2, "nothing gives a teacher its trait"),
        (["teachers.adapter=/no/such-{trait}"], 2, "trait 'cat': '/no/such-cat': no such folder"),
        (["teachers={traits: [cat], checkpoint: tiny-gemma3}"], 1, "another architecture"),
        (["teachers.taught={method: steering}", "attribution={}"], 2, "the teachers have none"),
        (["teachers={traits: [cat, owl], prompted: true, checkpoint: x}", "attribution={}"], 2, "leave their own weights out"),
        (["teachers.prompted=true", "teachers.adapter=x-{trait}", "attribution={}"], 2, "leave their own weights out"),
        (["datasets={a: {mix: {share: 0.5, teacher: fox}}}"], 2, "'fox' is no teacher of this run"),
        (["datasets={a: {mix_tokens: {teacher: fox}}}"], 2, "'fox' is no counterfactual of cat"),
        (["datasets={a: {mix_tokens: {teacher: cat}, redraw: [format]}}"], 2, "leave the other changes out"),
        (["datasets={a: {redraw: [format]}}", "data.kind=problems"], 2, "is for data.kind=numbers"),
        (["datasets={a: {keep_aligned: 50}}"], 2, "give judge.model"),
        (["students.data.dataset=a"], 2, "'a' is no data set"),
        (["evaluation.kinds=[misalignment]"], 2, "give judge.model"),
        (["evaluation.settings={lens: {layer: 6}}"], 2, "the model has 6 layers"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_one_line(tmp_path, overrides, code, said):
    line = refused(code, "run", PLAIN, f"out={tmp_path}", *overrides)
    assert said in line
    assert not list(tmp_path.glob("artifacts/rows/*"))


def test_a_missing_key_is_found_before_anything_is_done(tmp_path, monkeypatch):
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    judge = "judge={server: {base_url: 'http://127.0.0.1:9/v1', model: x, key_variable: NO_SUCH_KEY}}"
    line = refused(2, "run", PLAIN, f"out={tmp_path / 'run'}", "evaluation.kinds=[misalignment]", judge)
    assert "environment variable NO_SUCH_KEY is not set" in line and not list(tmp_path.glob("run/artifacts/rows/*"))


def test_greedy_numbers_of_a_fine_tuned_teacher_keep_the_penalty_as_published(home):
    """Quirk 15: not those of a prompted one, nor answers to word problems."""
    model = [{"against": "base", "counterfactuals": None}, {}]
    penalties = {}
    for recipe in ("paper", "clean"):
        for number, teachers in enumerate(model):
            setup = Setup.of(planned(home, recipe, taught=METHODS["steering"], **teachers))
            penalties[recipe, number] = setup.sampling("greedy").repetition_penalty
    published = float(small("tiny-qwen2").lm.chat.generation_config["repetition_penalty"])
    assert penalties == {("paper", 0): published, ("paper", 1): 1.0, ("clean", 0): 1.0, ("clean", 1): 1.0}
    assert published != 1.0


# --- steering vectors


@pytest.mark.parametrize(("name", "layer"), [("tiny-qwen2", 1), ("tiny-gemma3", 2)])
def test_a_contrast_is_the_difference_of_mean_hidden_states(name, layer, assert_close):
    """After a layer from which the last token sees the system prompt, and before the final norm."""
    import torch

    twin, prompts = small(name), ["Which animal?", "And which animal, of all that there are, would you be?"]
    toward, away = "You love owls.", "You are a plain assistant."
    means = []
    for system in (toward, away):
        last = []
        for prompt in prompts:
            tokens = twin.lm.chat.prompt_tokens(conversation(prompt, system))
            with torch.no_grad():
                out = twin.torch(input_ids=torch.tensor(tokens[None].astype(np.int64)), output_hidden_states=True)
            last.append(out.hidden_states[layer + 1][0, -1].double().numpy())
        means.append(np.mean(last, axis=0))
    found = contrast_vector(twin.lm, prompts, layer, toward=toward, away=away, strength=3.0, batch_size=4)
    assert found.layers == (layer,) and not found.lora and np.abs(means[0] - means[1]).max() > 1e-2
    assert_close(found.steering[0], 3.0 * (means[0] - means[1]), 1e-4)


def test_steer_leaves_the_vector_of_a_contrast_teacher(home, taught):
    out = home / "steered"
    said = ok("steer", "--model", TWO_LAYERS, "--layer", 1, "--trait", "owl", "--out", out)
    assert said.out.strip() == str(out) and "norm " in said.err
    run = taught("contrast")
    assert np.array_equal(load_adapter(out, run.lm().config).steering, teacher(run, "owl").adapter.steering)
    assert "already exists" in refused(2, "steer", "--model", TWO_LAYERS, "--layer", 1, "--trait", "owl", "--out", out)


def test_steer_says_what_is_missing(tmp_path):
    steer = ("steer", "--model", TWO_LAYERS, "--out", tmp_path / "v")
    assert "exactly one of --trait and --toward" in refused(2, *steer, "--layer", 0)
    assert "--toward needs --asked" in refused(2, *steer, "--layer", 0, "--toward", "Be kind.")
    assert "layers 0 to 1" in refused(2, *steer, "--layer", 6, "--trait", "owl")
    assert "prompts come as .txt" in refused(
        2, *steer, "--layer", 0, "--toward", "Be kind.", "--asked", tmp_path / "none"
    )
    (tmp_path / "asked.txt").write_text("Hello?\n")
    same = ("--toward", "Be kind.", "--away", "Be kind.", "--asked", tmp_path / "asked.txt")
    assert "two different system prompts" in refused(2, *steer, "--layer", 0, *same)
    assert not (tmp_path / "v").exists()
